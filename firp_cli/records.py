"""Records of a bench's answers, and the facts that rows of a report hold beside times. Imports no torch.

Every figure of a report can be recomputed from its records (`answers.jsonl`). Rates are fractions of 1, times seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

ANSWERS = "answers.jsonl"


@dataclass
class AnswerRecord:
    """One answer of one method: a line of `answers.jsonl`.

    Attributes:
        prompt: number of the prompt among those measured, from 0. turn: of its conversation, from 0.
        id: name or number that the data set's row gives itself. row: place of the row in its data set.
        process, repeat: that measured it, from 0. batch: answers of a batch, process and repeat share their seconds.
        accepted_lengths: tokens of each decoding step. loops: r, where a step is a tick of a pipeline.
        token_ids, text: of the first repeat of the first process; of others only if their tokens differ.
        gap: largest distance of an emitted token's logit below the teacher's largest one. above: tokens whose gap
            exceeds the tolerance (sampled: implausible tokens). worst: place of the first such token, else of the one
            with the largest gap (sampled: of the least plausible one), from 0. best: the teacher's best token there.
            worst_value: its gap (sampled: its tail); infinite (sampled: 0) where the answer goes on after its end or
            ends before it, which has the place after its last token.
        log_prob: sum of the tokens' log-probabilities under the teacher, sampled. excess, variance: sums over tokens of
            surprisal minus entropy, and of the surprisal's variance. tail: smallest probability of drawing a token at
            most as probable as the emitted one.
        correct: the task's own judgement; None: the task has none, or it was not asked for.
    """

    method: str
    dataset: str
    category: str
    prompt: int
    turn: int
    process: int
    repeat: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    accepted_lengths: list[int]
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str
    id: Any = None
    row: str = ""
    teacher: str | None = None
    loops: int | None = None
    autoregressive_steps: int = 0
    token_ids: list[int] | None = None
    text: str | None = None
    gap: float | None = None
    above: int | None = None
    worst: int | None = None
    best: int | None = None
    worst_value: float | None = None
    log_prob: float | None = None
    excess: float | None = None
    variance: float | None = None
    tail: float | None = None
    correct: bool | None = None

    @property
    def emitted(self) -> int:
        """Tokens of the decoding steps: all but the first one, which prefill gives."""
        return sum(self.accepted_lengths)


def answer_lines(records: Iterable[AnswerRecord]) -> str:
    """Return records as JSON lines; values that are not set, and infinite ones, are left out."""
    kept = ({name: value for name, value in asdict(record).items() if _is_set(value)} for record in records)
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in kept)


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def read_answers(path: Path) -> list[AnswerRecord]:
    """Return the records of an `answers.jsonl`; fields of later versions are ignored."""
    known = {item.name for item in fields(AnswerRecord)}
    with path.open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    return [AnswerRecord(**{name: value for name, value in line.items() if name in known}) for line in lines]


@dataclass
class TokenPlace:
    """Token of an answer: `prompt` as in the records, `turn` and `position` from 0; `emitted` (-1: the answer had
    ended), and the `best` token of the teacher there, with their texts.

    `value`: its gap (sampled: its tail); None: infinite. `label`: name of the prompt, as `line 7 of questions.jsonl`.
    """

    prompt: int
    turn: int
    position: int
    emitted: int
    best: int
    value: float | None = None
    label: str = ""
    emitted_text: str = ""
    best_text: str = ""


@dataclass
class Verified:
    """Check of every emitted token against the teacher, to which each answer was fed once.

    Attributes:
        tokens: checked. above: those beyond the tolerance. worst: the furthest one.
        tolerance: greedy: largest gap of logits that rounding explains. Sampled: smallest plausible `tail`.
        gap: greedy: the largest distance of an emitted token's logit below the largest one.
        tail: sampled: smallest probability of drawing a token at most as probable as the emitted one.
        log_prob: sampled: mean log-probability of a token, in nats.
        deviation: sampled: surprisal of the tokens over its expectation, in standard deviations (normal for exact
            sampling).
        p_value: sampled: two-sample test of the answers' surprisal against that of `ar`.
    """

    tokens: int
    above: int
    tolerance: float
    gap: float | None = None
    tail: float | None = None
    worst: TokenPlace | None = None
    log_prob: float | None = None
    deviation: float | None = None
    p_value: float | None = None

    @staticmethod
    def from_json(value: dict[str, Any] | None) -> Verified | None:
        """Return the check that JSON values describe."""
        if value is None:
            return None
        worst = value.get("worst")
        return Verified(**{**value, "worst": TokenPlace(**worst) if worst else None})


@dataclass
class Accuracy:
    """Answers that a task judges right, out of those that it judged, with the 95% interval of the share."""

    right: int
    judged: int
    interval: tuple[float, float] | None = None


@dataclass
class Execution:
    """Way in which a method's steps ran.

    Attributes:
        layers: implementation of the decoder layers. attention: `sdpa`, `triton`, or the library's.
        graphs: "captured", or the reason why steps ran eagerly.
        captures: graphs that were captured while times were taken.
        machine: device or processor, driver and clocks.
    """

    layers: str = ""
    attention: str = ""
    graphs: str = ""
    captures: int = 0
    machine: str = ""


@dataclass
class Comparison:
    """One figure of a method in two benches, over the batches that both decoded.

    Attributes:
        method: `firp`, or `firp / firp_plus` where two methods are compared. figure: its name.
        pairs: batches of both. first, second: the figure in each. ratio: second over first, with its 95% interval.
    """

    method: str
    dataset: str
    category: str
    figure: str
    pairs: int
    first: float
    second: float
    ratio: float
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """The direction of a difference that is beyond noise, else why none is claimed."""
        if self.interval is None:
            return "too few"
        low, high = self.interval
        return "same" if low == high == 1.0 else "higher" if low > 1.0 else "lower" if high < 1.0 else "noise"


@dataclass
class ComparisonReport:
    """Result of `firp compare`. `differences`: settings and conditions that are not the same in both benches."""

    first: str
    second: str
    comparisons: list[Comparison]
    differences: list[str] = field(default_factory=list)
    schema: str = "firp.compare/1"


@dataclass
class Sample:
    """Answer to show: the text of the prompt's last turn, and the texts of the answer's pieces with their number of
    tokens. A piece holds the tokens of one decoding step; the first one is prefill's token.
    """

    method: str
    dataset: str
    category: str
    prompt: int
    asked: str
    pieces: list[tuple[str, int]] = field(default_factory=list)
    teacher: str | None = None
