"""What is accepted of a draft, learnt from answers that the teacher wrote: by step and rank, by whole paths, and, for
any tree, by walking through those answers as the decoder would.

Shapes: S sequences, A anchors, k steps, s candidates per step, N nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firp_cli.decoding.accept import accept
from firp_cli.decoding.tree import TreeSpec, anchor_nodes, build, nearest_anchor
from firp_cli.evaluation.states import LOGIT_ELEMENTS, sequence_states
from firp_cli.predictors.base import Draft, Predictor
from firp_cli.records import RankRate, Reliability
from firp_cli.teacher.stack import Teacher

ANCHOR_CHUNK = 128  # anchors of one forward
PRIOR = 16.0  # anchors' worth of trust in rates by step and rank, against what was counted on one path
BINS = 10  # of draft probabilities
SHOWN_RANKS = 8


@dataclass
class Trace:
    """A written answer with what the predictor drafts at its positions.

    Attributes:
        ids: (T,) long. first: the anchor of the first draft; anchors are first..T-3.
        draft: of every anchor, tokens and log_probs (A, k, s).
    """

    ids: Tensor
    first: int
    draft: Draft

    @property
    def last(self) -> int:
        """The position behind the last anchor."""
        return self.ids.shape[0] - 2


@torch.inference_mode()
def trace(
    teacher: Teacher, predictor: Predictor, token_ids: Sequence[int], prompt_length: int, breadth: int
) -> Trace | None:
    """Draft at every position of an answer; None where it is too short for a decoding step."""
    first, length = prompt_length - 1, len(token_ids)
    if length - prompt_length < 2:
        return None
    batch = sequence_states(teacher, predictor, token_ids)
    tokens, log_probs = [], []
    rows = max(1, LOGIT_ELEMENTS // (predictor.steps * teacher.vocab_size))
    for anchors in torch.arange(first, length - 2, device=teacher.device).split(ANCHOR_CHUNK):
        states = predictor.draft_states(teacher, batch, anchors[None])[0]
        for part in states.split(rows):
            draft = predictor.draft(teacher, part, breadth)
            tokens.append(draft.tokens)
            log_probs.append(draft.log_probs)
    return Trace(batch.input_ids[0], first, Draft(torch.cat(tokens), torch.cat(log_probs)))


@torch.inference_mode()
def walk(predictor: Predictor, traces: Sequence[Trace], spec: TreeSpec) -> list[list[int]]:
    """Tokens that each decoding step with such trees would emit while writing the answers, by answer.

    All answers are walked at once, each from accepted node to accepted node, the last step cut at the answer's end. The
    first new token is prefill's and belongs to no step.
    """
    if spec.kind == "none":
        return [[1] * (trace.last - trace.first) for trace in traces]
    steps = spec.drafting(predictor.steps)
    predictor = predictor.first(steps)
    depth, device = spec.depth(steps), traces[0].ids.device
    breadth = min(spec.breadth(1 << 30), traces[0].draft.tokens.shape[2])
    tokens = torch.cat([trace.draft.tokens[:, :steps, :breadth] for trace in traces])
    log_probs = torch.cat([trace.draft.log_probs[:, :steps, :breadth] for trace in traces])
    sizes = torch.tensor([trace.last - trace.first for trace in traces], device=device)
    firsts = torch.tensor([trace.first for trace in traces], device=device)
    offset = sizes.cumsum(0) - sizes - firsts  # of an anchor's draft among all
    lasts = firsts + sizes
    width = max(trace.ids.shape[0] for trace in traces) + steps + 2
    ids = torch.stack([torch.nn.functional.pad(trace.ids, (0, width - len(trace.ids)), value=-1) for trace in traces])
    anchor, behind, emitted = firsts.clone(), torch.zeros_like(firsts), []
    budgeted = spec.limited and bool(predictor.transfer_layers)
    while bool((anchor < lasts).any()):
        here = torch.minimum(anchor, lasts - 1)
        place = torch.maximum(here - behind, firsts) + offset  # an answer that has ended stays within its own drafts
        draft = Draft(tokens[place], log_probs[place])
        if budgeted:
            draft = _shifted(draft, behind)
        tree = build(spec, predictor, draft, ids.gather(1, here[:, None] + 1)[:, 0])
        accepted = accept(tree, ids.gather(1, here[:, None] + 2 + tree.depth), depth)
        count = accepted.count + 1
        emitted.append(torch.minimum(count, lasts - anchor).clamp(min=0))
        if budgeted:
            _, behind = nearest_anchor(tree, anchor_nodes(tree, spec.budget or 1), accepted.path, accepted.count)
        anchor = anchor + count
    return [[count for count in row if count] for row in torch.stack(emitted, dim=1).tolist()]


def _shifted(draft: Draft, behind: Tensor) -> Draft:
    """The draft of a node from its ancestor's, `behind` (S,) tokens back: step i from its step i + behind. Steps that
    the ancestor did not reach have probability 0. One head serves all steps of predictors with pseudo states.
    """
    steps = draft.tokens.shape[1]
    ahead = behind[:, None] + torch.arange(steps, device=behind.device)
    index = ahead.clamp(max=steps - 1)[:, :, None].expand_as(draft.tokens)
    log_probs = draft.log_probs.gather(1, index).masked_fill((ahead >= steps)[:, :, None], -torch.inf)
    return Draft(draft.tokens.gather(1, index), log_probs)


@torch.inference_mode()
def ranks(predictor: Predictor, traces: Sequence[Trace]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the answers' own tokens stand among the candidates, given that all tokens before were drafted: (A, k)
    ranks from 0, s where a token is no candidate, -1 behind the answer's end; and the candidates' probabilities
    (A, k, s).
    """
    found, probable = [], []
    for item in traces:
        anchors = torch.arange(item.first, item.last, device=item.ids.device)
        padded = torch.nn.functional.pad(item.ids, (0, predictor.steps + 1), value=-1)
        breadth = item.draft.tokens.shape[2]
        columns, values = [], []
        for step in range(1, predictor.steps + 1):
            tokens, log_probs = predictor.child_candidates(item.draft, step, padded[anchors + step][:, None])
            follows = padded[anchors + step + 1]
            hits = tokens[:, 0] == follows[:, None]
            rank = torch.where(hits.any(-1), hits.int().argmax(-1), breadth)
            columns.append(torch.where(follows < 0, -1, rank))
            values.append(log_probs[:, 0].exp())
        found.append(torch.stack(columns, dim=1).cpu().numpy())
        probable.append(torch.stack(values, dim=1).double().cpu().numpy())
    return np.concatenate(found).astype(np.int64), np.concatenate(probable)


class Acceptance:
    """How likely a path of ranks is accepted.

    Args:
        ranks: (A, k) as `ranks` gives. breadth: s.
    """

    def __init__(self, ranks: NDArray[np.int64], breadth: int) -> None:
        self.ranks, self.breadth = ranks, breadth
        self.steps = ranks.shape[1]
        self.counts, self.rates = [], []
        reached = np.ones(len(ranks), dtype=bool)  # the path so far was among the candidates
        for step in range(self.steps):
            column = ranks[:, step]
            reached = reached & (column >= 0)
            hits = np.bincount(column[reached], minlength=breadth + 1)[:breadth]
            self.counts.append(int(reached.sum()))
            self.rates.append(hits / max(1, self.counts[-1]))
            reached = reached & (column < breadth)

    def by_rank(self) -> list[RankRate]:
        """Acceptance of each step and rank given that the parent was accepted, with how often that was."""
        shown = range(min(self.breadth, SHOWN_RANKS))
        return [
            RankRate(step + 1, rank, self.counts[step], float(self.rates[step][rank]))
            for step in range(self.steps)
            for rank in shown
        ]

    def grow(self, nodes: int, depth: int | None = None) -> list[tuple[tuple[int, ...], float]]:
        """The `nodes - 1` paths below the root that are accepted most often, most likely first, with how often.

        Best first: a child is at most as likely as its parent, so paths leave the heap in descending order and the
        first ones are the likeliest of all. No tree of as many nodes and this depth has a greater sum, which is its
        expected number of accepted tokens; every beginning of the list is closed under parents.
        """
        depth = min(depth or self.steps, self.steps)
        everyone = np.arange(len(self.ranks))
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]] = []
        self._push(heap, (), 1.0, everyone)
        grown: list[tuple[tuple[int, ...], float]] = []
        while heap and len(grown) < nodes - 1:
            value, path, chosen = heapq.heappop(heap)
            grown.append((path, -value))
            if len(path) < depth:
                self._push(heap, path, -value, chosen)
        return grown

    def _push(
        self,
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]],
        path: tuple[int, ...],
        value: float,
        chosen: NDArray[np.int64],
    ) -> None:
        """Put a path's children on the heap: counted where it was accepted, and where that is rare, as likely as their
        step and rank is on the whole.
        """
        step = len(path)
        column = self.ranks[chosen, step]
        chosen, column = chosen[column >= 0], column[column >= 0]
        hits = np.bincount(column, minlength=self.breadth + 1)[: self.breadth]
        rates = (hits + PRIOR * self.rates[step]) / (len(chosen) + PRIOR)
        for rank in np.flatnonzero(rates > 0):
            child = (*path, int(rank))
            heapq.heappush(heap, (-value * float(rates[rank]), child, chosen[column == rank]))


def reliability(ranks: NDArray[np.int64], probable: NDArray[np.float64]) -> list[Reliability]:
    """The draft's own probabilities against what came of them, by step and bin, given that the parent was accepted.
    Dynamic trees go by these probabilities.
    """
    breadth, found = probable.shape[2], []
    reached = np.ones(len(ranks), dtype=bool)
    for step in range(ranks.shape[1]):
        reached = reached & (ranks[:, step] >= 0)
        drafted = probable[reached, step]
        right = ranks[reached, step][:, None] == np.arange(breadth)
        bins = np.minimum((drafted * BINS).astype(int), BINS - 1)
        for number in range(BINS):
            inside = bins == number
            if inside.any():
                rate = float(right[inside].mean())
                found.append(Reliability(step + 1, int(inside.sum()), float(drafted[inside].mean()), rate))
        reached = reached & (ranks[:, step] < breadth)
    return found
