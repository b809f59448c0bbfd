"""Result records: plain data that commands write as JSON and reports draw. No torch here.

Rates are fractions of 1, times are seconds unless the name says otherwise, intervals are (low, high) at 95%.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BENCH_SCHEMA = "firp.bench/1"
EVAL_SCHEMA = "firp.eval/1"
TUNE_SCHEMA = "firp.tune/1"

Interval = tuple[float, float]


def plain(record: Any) -> Any:
    """A record as JSON values; NaN and infinities become None."""
    value = asdict(record) if hasattr(record, "__dataclass_fields__") else record
    return _finite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass
class PipelineTrace:
    """What a SPEED pipeline did for one sequence, or, added up, for several.

    Attributes:
        loops: r. exits: the loops that predict.
        ticks: passes of the pipeline. left: tokens that it emitted. plain: tokens that were decoded one by one because
            the pipeline did not pay.
        started: tokens that entered. flushes: times that a changed prediction threw younger tokens out. flushed: how
            many it threw out.
        corrected: tokens of `left` whose early prediction of the next token was changed later on.
        hits: by exit, predictions that the last loop confirmed, out of `left`.
        occupancy: tokens in flight, tick by tick.
    """

    loops: int
    exits: list[int]
    ticks: int = 0
    left: int = 0
    plain: int = 0
    started: int = 0
    flushes: int = 0
    flushed: int = 0
    corrected: int = 0
    hits: list[int] = field(default_factory=list)
    occupancy: list[int] = field(default_factory=list)


@dataclass
class Generation:
    """What one method wrote after one prompt.

    `accepted_lengths` has one entry per decoding step after prefill: tokens that the step emitted, bonus included
    (1 for plain decoding). The first new token comes from prefill and belongs to no step, so
    `len(token_ids) == 1 + sum(accepted_lengths)` unless the last step was cut by EOS, a stop string or the limit.
    `emitted` says where each run ended: tokens emitted by each step after that cut.
    """

    prompt_tokens: int
    token_ids: list[int]
    steps: int
    accepted_lengths: list[int]
    emitted: list[int]
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str  # "eos", "stop" or "length"
    text: str = ""
    pipeline: PipelineTrace | None = None  # for SPEED: a step is a tick, which emits one token or none
    plain: int = 0  # steps that did not draft, since drafting did not pay

    @property
    def accepted_length(self) -> float | None:
        """Tokens per decoding step, the bonus token included; of a pipeline tokens in r ticks. None without a step."""
        ticks = self.pipeline.loops if self.pipeline else 1
        return ticks * sum(self.emitted) / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the decoding steps by their seconds; prefill and its token are left out. None without a step."""
        return sum(self.emitted) / self.decode_seconds if self.emitted and self.decode_seconds else None


@dataclass
class Divergence:
    """First token at which an output differs from the baseline's. `logit_gap`: logit of expected minus that of got."""

    prompt: int
    position: int
    expected: int
    got: int
    logit_gap: float


@dataclass
class Lossless:
    """Token-for-token comparison with the baseline."""

    compared: int = 0
    identical: int = 0
    divergences: list[Divergence] = field(default_factory=list)


@dataclass
class TickCost:
    """Where a pipeline's tick goes, measured apart from decoding, in milliseconds.

    Attributes:
        context: tokens in the K/V cache while measuring. tick: a tick with a token at every stage.
        step: a plain decoding step of one token. loop: one loop of it, step / r.
        layers, heads, decision: the tick's parts: shared layers over all stages; exit maps, norm and head; what
            starts, what is flushed, and the read of what left. rows: the layers' time for 1..r tokens in flight.
    """

    context: int
    tick: float
    step: float
    loop: float
    layers: float
    heads: float
    decision: float
    rows: list[float]

    @property
    def relative(self) -> float:
        """A tick in loops of one token."""
        return self.tick / self.loop


@dataclass
class PipelineReport:
    """What a SPEED pipeline did over all sequences of a row. Rates are fractions of 1.

    Attributes:
        loops: r. exits: the loops that predict. shared: the loops share their parameters. ranks: processes.
        ticks, tokens: ticks and the tokens that left the pipe in them. plain_tokens: decoded outside the pipe, because
            it did not pay.
        tokens_per_tick: tokens / ticks; a full pipe gives 1, plain decoding 1 / r.
        idle: share of ticks from which nothing left. flushes: changed predictions that threw younger tokens out;
            flushed: share of started tokens that were thrown out.
        corrected: share of tokens whose early prediction of the next one was changed later on.
        exit_accuracy: by exit, predictions that the last loop confirmed.
        occupancy: tick by tick, tokens in flight, averaged over the sequences that still ran.
        cost: measured tick; predicted_speedup: tokens_per_tick x r / relative tick cost, for tokens in the pipe.
    """

    loops: int
    exits: list[int]
    shared: bool
    ranks: int
    ticks: int
    tokens: int
    plain_tokens: int
    tokens_per_tick: float
    idle: float
    flushes: int
    flushed: float
    corrected: float
    exit_accuracy: list[float]
    occupancy: list[float]
    cost: TickCost | None = None
    predicted_speedup: float | None = None

    @staticmethod
    def from_plain(value: dict[str, Any] | None) -> PipelineReport | None:
        """The report read back from its JSON form."""
        if value is None:
            return None
        cost = value.get("cost")
        return PipelineReport(**{**value, "cost": TickCost(**cost) if cost else None})


@dataclass
class Prediction:
    """What a tree is expected to bring on one machine, at one batch size and context.

    `ar_milliseconds`, `step_milliseconds`: a plain step and a step of this tree. `speedup`: over plain decoding.
    """

    accepted_length: float
    step_milliseconds: float
    ar_milliseconds: float
    speedup: float


@dataclass
class BenchRow:
    """One method on one data set (or one category of it). Field names are DESIGN section 5's."""

    dataset: str
    category: str
    method: str
    predictor: str | None
    batch_size: int
    temperature: float
    prompts: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    speedup: float | None  # over `ar`, decode time only
    speedup_interval: Interval | None
    speedup_hf: float | None  # over transformers generate, decode time only
    accepted_length: float
    accepted_length_interval: Interval | None
    acceptance_by_step: list[float]  # share of steps that accepted at least i drafted tokens, i = 1..k
    accepted_histogram: list[int]  # entry a: steps that emitted a tokens (entry 0 is always 0)
    steps: int
    step_milliseconds: float
    lossless: Lossless
    tree: str | None = None
    speedup_with_prefill: float | None = None  # Spec-Bench's definition: wall time including prefill
    pipeline: PipelineReport | None = None  # SPEED: a step is a tick; accepted length counts tokens in r ticks
    predicted: Prediction | None = None  # what `firp tune` foretold for this tree, batch size and machine
    teacher: str | None = None  # label of its teacher; set only where the report has several


@dataclass
class BenchReport:
    """A whole bench run. `teachers`: where several were measured, each in the order of the rows' labels; `teacher` is
    then the first of them. A row's speedup is over its own teacher's baseline.
    """

    environment: dict[str, Any]
    teacher: dict[str, Any]
    settings: dict[str, Any]
    rows: list[BenchRow]
    skipped_long: int = 0
    teachers: list[dict[str, Any]] = field(default_factory=list)
    schema: str = BENCH_SCHEMA

    @staticmethod
    def from_plain(value: dict[str, Any]) -> BenchReport:
        """The report read back from its JSON form."""
        rows = []
        for row in value["rows"]:
            row = dict(row)
            lossless, pipeline = row.pop("lossless"), row.pop("pipeline", None)
            foretold = row.pop("predicted", None)
            marks = [Divergence(**mark) for mark in lossless["divergences"]]
            record = Lossless(lossless["compared"], lossless["identical"], marks)
            known = {item.name for item in fields(BenchRow)}
            kept = {key: item for key, item in row.items() if key in known}
            prediction = Prediction(**foretold) if foretold else None
            traced = PipelineReport.from_plain(pipeline)
            rows.append(BenchRow(**kept, lossless=record, pipeline=traced, predicted=prediction))
        keys = ("environment", "teacher", "settings", "skipped_long", "schema")
        return BenchReport(rows=rows, teachers=value.get("teachers", []), **{key: value[key] for key in keys})


@dataclass
class StepQuality:
    """Quality of step i's draft against the teacher's own row at n+i, averaged over anchors."""

    step: int
    top1: float
    top5: float
    kl: float
    anchors: int


@dataclass
class EvalReport:
    """What `firp eval` measured. `similarity[l]`: cosine(pseudo, real) at layer l by step; None before it starts."""

    environment: dict[str, Any]
    teacher: dict[str, Any]
    predictor: dict[str, Any]
    data: dict[str, Any]
    steps: list[StepQuality]
    expected_accepted_length_chain: float
    expected_accepted_length_tree: float
    tree: str
    similarity: dict[int, list[float | None]]
    pipeline: PipelineReport | None = None  # SPEED: `steps` are its exits, by loop
    schema: str = EVAL_SCHEMA
