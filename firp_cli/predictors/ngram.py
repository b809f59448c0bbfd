"""Drafts from a sequence's own text, without training: the tokens after earlier occurrences of its last ones.

The text of a sequence is its prompt and its answer so far. Nothing is taken from other sequences, not even from an
earlier answer to the same prompt: a bench repeats its prompts, and the first answer would then draft the others.

- `prompt-lookup` (Saxena, "Prompt Lookup Decoding", 2023; `prompt_lookup_num_tokens` of transformers' `generate`).
- `suffix` (Oliaro et al., "SuffixDecoding", arXiv 2411.04975, section 3). The paper also searches the answers to other
  requests, and counts all occurrences by a suffix tree.

Shapes: B sequences, T positions, M tokens of the longest match, W occurrences, D tokens drafted after one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from firp_cli.config import PredictorSection
from firp_cli.errors import PredictorError
from firp_cli.predictors.base import TreePredictor

NOTHING = -2  # token of a node that drafts nothing: no token that the teacher chooses equals it
BEFORE = -1  # token of the M - 1 places before a text


@dataclass(frozen=True)
class NgramRule:
    """Choice of occurrences, and what is drafted after them.

    Attributes:
        steps: D. longest: M; longer matches count as M tokens. occurrences: W.
        latest: of matches of equal length the latest are taken; False: the earliest.
        growth: most drafted tokens, for each token of the longest match (alpha of SuffixDecoding).
        least_share: least share of the occurrences that continue with a node's path, by weight: of m tokens it is 2^m.
            The last two bound trees of several occurrences, where fewer nodes cost less (`TextDrafts`).
    """

    steps: int
    longest: int
    occurrences: int
    latest: bool
    growth: float = math.inf
    least_share: float = 0.0


# Matches of at most 3 tokens and 10 drafted ones are the values of Saxena's code and of Spec-Bench. Of equal matches
# the earliest is taken, as in transformers' `generate`. That ends a draft before an EOS token, which is drafted here.
PROMPT_LOOKUP = NgramRule(steps=10, longest=3, occurrences=1, latest=False)
# On answers of SmolLM2 more occurrences, longer matches and deeper drafts add less than 1% to the accepted length, and
# growth of 3 to 6 gives equal speed on a CPU.
SUFFIX = NgramRule(steps=10, longest=8, occurrences=16, latest=True, growth=4.0, least_share=0.1)
RULES = {"prompt-lookup": PROMPT_LOOKUP, "suffix": SUFFIX}


class Continuations(NamedTuple):
    """Tokens that followed the occurrences of a text's last ones (B, W, D), NOTHING after the text's end and where
    fewer are found, and the length of each match (B, W), 0 where there is none.
    """

    tokens: Tensor
    matched: Tensor


class NgramPredictor(TreePredictor):
    """Predictor without weights, whose drafts come from a sequence's text. It cannot be trained or saved.

    decoding/text_drafts.py holds the texts and makes trees from `continuations`.
    """

    def __init__(self, name: str, rule: NgramRule) -> None:
        super().__init__(PredictorSection(), rule.steps)
        self.name, self.rule = name, rule

    @property
    def kind(self) -> str:
        return self.name

    def _truncate(self, steps: int) -> None:
        pass

    def continuations(self, text: Tensor, lengths: Tensor, count: int, numbers: Tensor) -> Continuations:
        """Find the W best occurrences of the last tokens of each text, and what followed them.

        A match of m tokens at position j: the m tokens that end at j equal the text's last m, m <= M. Longer ones are
        better.

        Args:
            text: (B, M - 1 + T + D or more) tokens; position 0 is preceded by M - 1 tokens BEFORE, which no match has.
            lengths: (B,) positions of the last tokens. count: T, above all of them. numbers: 0, 1, ..., of `text`.
        """
        rule, longest = self.rule, self.rule.longest
        places = numbers[:count]
        last = text.gather(1, lengths[:, None] + numbers[:longest])
        windows = text[:, : longest - 1 + count].unfold(1, longest, 1)  # (B, T, M) tokens that end at each position
        misses = torch.where(windows == last[:, None], 0, numbers[1 : longest + 1])
        found = (longest - misses.amax(-1)).masked_fill(places >= lengths[:, None], 0)
        ranks = torch.add(found * count, places, alpha=1 if rule.latest else -1)
        at = ranks.topk(min(rule.occurrences, count), dim=1).indices
        matched = found.gather(1, at)
        ahead = at[:, :, None] + numbers[longest : longest + self.steps]
        tokens = text.gather(1, ahead.flatten(1)).view(ahead.shape)
        known = (ahead < (lengths + longest)[:, None, None]) & (matched > 0)[:, :, None]
        return Continuations(torch.where(known, tokens, NOTHING), matched)

    def draft_states(self, *_: Any, **__: Any) -> Tensor:
        self._refuse()

    def step_logits(self, *_: Any, **__: Any) -> Tensor:
        self._refuse()

    def draft_hidden(self, *_: Any, **__: Any) -> Tensor:
        self._refuse()

    def state_dict(self, *_: Any, **__: Any) -> Any:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PredictorError(f"{self.name} drafts from the text: it has no weights to train, save or evaluate")
