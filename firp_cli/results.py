"""Results that commands write as JSON and reports draw. Imports no torch.

Rates are fractions of 1, times are in seconds unless the name gives another unit, and intervals are (low, high) at 95%.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from firp_cli.records import Accuracy, AnswerRecord, Execution, Sample, Verified

BENCH_SCHEMA = "firp.bench/1"
EVAL_SCHEMA = "firp.eval/1"
TUNE_SCHEMA = "firp.tune/1"
ANALYSES = ("similarity", "transfer-layer", "attention", "heads", "rows", "tree-size")  # of `firp eval --analysis`
UNDRAFTED = ("ar", "hf", "hf-static")  # methods of a bench that decode token by token: they draft nothing

Interval = tuple[float, float]
Progress = Callable[[int, int | None], None]  # (done, total); total None: not known


def no_progress(done: int, total: int | None = None) -> None:
    """Ignore progress."""


def as_json(result: Any) -> Any:
    """Return a dataclass or a value as JSON values; NaN and infinities become None. Records are left out."""
    if isinstance(result, BenchReport):
        result = replace(result, records=[])
    value = asdict(result) if hasattr(result, "__dataclass_fields__") else result
    if isinstance(result, BenchReport):
        del value["records"]
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
    """Counts of a SPEED pipeline for one sequence, or their sums over several sequences.

    Attributes:
        loops: r, the loops of the teacher. exits: the loops that predict.
        ticks: passes of the pipeline. left: tokens that it emitted. autoregressive_tokens: tokens decoded
            without the pipeline, while it was slower.
        started: tokens that entered. flushes: changed predictions that discarded younger tokens. flushed: discarded
            tokens.
        corrected: tokens of `left` whose early prediction of the next token changed in a later loop.
        hits: by exit, predictions that the last loop confirmed, out of `left`.
        occupancy: tokens in flight, by tick.
    """

    loops: int
    exits: list[int]
    ticks: int = 0
    left: int = 0
    autoregressive_tokens: int = 0
    started: int = 0
    flushes: int = 0
    flushed: int = 0
    corrected: int = 0
    hits: list[int] = field(default_factory=list)
    occupancy: list[int] = field(default_factory=list)


@dataclass
class Generation:
    """Answer of one method to one prompt.

    `accepted_lengths` has one entry per decoding step after prefill: the tokens that the step emitted, bonus included
    (1 in autoregressive decoding), up to the answer's end. Prefill gives the first new token, which belongs to no
    step, so `len(token_ids) == 1 + sum(accepted_lengths)`.
    """

    prompt_tokens: int
    token_ids: list[int]
    steps: int
    accepted_lengths: list[int]
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str  # "eos", "stop" or "length"
    text: str = ""
    pipeline: PipelineTrace | None = None  # SPEED: a step is a tick, which emits one token or none
    autoregressive_steps: int = 0  # steps without a draft, made while drafting was slower
    batch_size: int = 1  # prompts decoded together; they share `prefill_seconds` and `decode_seconds`

    @property
    def accepted_length(self) -> float | None:
        """Tokens per decoding step, the bonus token included; of a pipeline tokens in r ticks. None without a step."""
        ticks = self.pipeline.loops if self.pipeline else 1
        return ticks * sum(self.accepted_lengths) / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the decoding steps by their seconds; prefill and its token are left out. None without a step."""
        return (
            sum(self.accepted_lengths) / self.decode_seconds if self.accepted_lengths and self.decode_seconds else None
        )


@dataclass
class Divergence:
    """First token at which an output differs from the reference. `logit_gap`: logit of expected minus that of got, NaN
    where one side had ended, which has token -1; `gap_ulps`: the same in units in the last place of the larger logit;
    `turn`: of the conversation, from 1. Later turns are not compared: their prompts contain this output.
    """

    prompt: int
    position: int
    expected: int
    got: int
    logit_gap: float
    gap_ulps: float | None = None
    turn: int = 1


@dataclass
class Lossless:
    """Token-for-token comparison with the reference: numbers of prompts, and where outputs diverge. A prompt is
    identical if the outputs of all its turns are.
    """

    compared: int = 0
    identical: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Lossless:
        """Return the comparison that JSON values describe."""
        return Lossless(value["compared"], value["identical"], [Divergence(**mark) for mark in value["divergences"]])


@dataclass
class TickCost:
    """Time of a SPEED pipeline's tick and of its parts, in milliseconds, measured separately from decoding.

    Attributes:
        context: tokens in the K/V cache while measuring. tick: a tick with a token at every stage.
        step: an autoregressive decoding step of one token. loop: one loop of it, step / r.
        layers, heads, decision: parts of the tick. Shared layers over all stages; exit maps, norm and head; choice of
            the tokens to start and to flush, with the copy of emitted tokens to the host.
        rows: time of the layers for 1..r tokens in flight.
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
        """Cost of a tick, in loops of one token."""
        return self.tick / self.loop


@dataclass
class PipelineReport:
    """Statistics of a SPEED pipeline over all sequences of a row. Rates are fractions of 1.

    Attributes:
        loops: r. exits: the loops that predict. shared: the loops share their parameters. ranks: processes.
        ticks, tokens: ticks, and the tokens that the pipeline emitted in them. plain_tokens: tokens decoded
            autoregressively while the pipeline was slower.
        tokens_per_tick: tokens / ticks; 1 for a full pipeline, 1 / r for autoregressive decoding.
        idle: share of ticks that emitted no token. flushes: changed predictions that discarded younger tokens.
            flushed: share of started tokens that were discarded.
        corrected: share of tokens whose early prediction of the next token changed in a later loop.
        exit_accuracy: by exit, share of predictions that the last loop confirmed.
        occupancy: by tick, mean tokens in flight over the sequences that still ran.
        cost: measured tick. predicted_speedup: tokens_per_tick x r / relative tick cost, for tokens in the pipeline.
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
    def from_json(value: dict[str, Any] | None) -> PipelineReport | None:
        """Return the report that JSON values describe."""
        if value is None:
            return None
        cost = value.get("cost")
        return PipelineReport(**{**value, "cost": TickCost(**cost) if cost else None})


@dataclass
class Prediction:
    """Performance of a tree on one machine, at one batch size and context; `Trial.measured` holds measured values.

    `accepted_length`: tokens per decoding step. `step_milliseconds`, `ar_milliseconds`: a step with this tree and an
    autoregressive one. `speedup`: over autoregressive decoding.
    """

    accepted_length: float
    step_milliseconds: float
    ar_milliseconds: float
    speedup: float


@dataclass
class BenchRow:
    """Measurements of one method on one data set, or on one category of it."""

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
    speedup_with_prefill: float | None = None  # Spec-Bench's definition: wall time, prefill included
    pipeline: PipelineReport | None = None  # SPEED: a step is a tick; accepted length is tokens per r ticks
    predicted: Prediction | None = None  # by `firp tune`, for this tree, batch size and machine
    teacher: str | None = None  # label of its teacher, in a report of several
    lossless_ar: Lossless | None = None  # against `ar`, where rounding separates `ar` from the reference
    turns: int | None = None  # user turns of the prompts that were answered; None: not recorded, one of each
    reason: str | None = None  # why the method cannot run here: the row has no figures
    speedup_hf_interval: Interval | None = None
    speedup_with_prefill_interval: Interval | None = None
    speedup_with_prefill_hf: float | None = None  # Spec-Bench's definition over transformers generate
    speedup_with_prefill_hf_interval: Interval | None = None
    verified: Verified | None = None
    accuracy: Accuracy | None = None
    execution: Execution | None = None
    parts: dict[str, float] = field(default_factory=dict)  # milliseconds of a decoding step by part
    speedup_by_process: list[float] = field(default_factory=list)  # over `ar`, where several processes measured


@dataclass
class BenchReport:
    """Results of a bench run. In a report of several teachers `teachers` lists them in the order of the rows' labels,
    and `teacher` is the first. A row's speedup is over the baseline of its own teacher.
    """

    environment: dict[str, Any]
    teacher: dict[str, Any]
    settings: dict[str, Any]
    rows: list[BenchRow]
    skipped_long: int = 0
    left_out_trained: int = 0  # prompts that a predictor was trained on
    teachers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what a reader of the figures must know
    records: list[AnswerRecord] = field(default_factory=list)  # in answers.jsonl, not in bench.json
    schema: str = BENCH_SCHEMA

    @staticmethod
    def from_json(value: dict[str, Any]) -> BenchReport:
        """Return the report that JSON values describe."""
        rows = []
        for row in value["rows"]:
            row = dict(row)
            lossless, against_ar = Lossless.from_json(row.pop("lossless")), row.pop("lossless_ar", None)
            predicted = row.pop("predicted", None)
            pipeline = PipelineReport.from_json(row.pop("pipeline", None))
            known = {item.name for item in fields(BenchRow)}
            kept = {key: item for key, item in row.items() if key in known}
            prediction = Prediction(**predicted) if predicted else None
            made = BenchRow(**kept, lossless=lossless, pipeline=pipeline, predicted=prediction)
            made.lossless_ar = Lossless.from_json(against_ar) if against_ar else None
            made.verified = Verified.from_json(row.get("verified"))
            made.accuracy = Accuracy(**row["accuracy"]) if row.get("accuracy") else None
            made.execution = Execution(**row["execution"]) if row.get("execution") else None
            rows.append(made)
        keys = ("environment", "teacher", "settings", "skipped_long", "schema")
        given = {key: value[key] for key in keys} | {"left_out_trained": value.get("left_out_trained", 0)}
        given |= {key: value.get(key, []) for key in ("teachers", "warnings")}
        return BenchReport(rows=rows, samples=[Sample(**item) for item in value.get("samples", [])], **given)


@dataclass
class StepQuality:
    """Quality of draft step i, averaged over anchors n: agreement with the teacher's row at n+i. `kl` in nats."""

    step: int
    top1: float
    top5: float
    kl: float
    anchors: int


@dataclass
class Panel:
    """Axes of a figure with their labels, and lines of points (x, y) by name. `doubling`: x grows by factors of 2."""

    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    doubling: bool = False


@dataclass
class Analysis:
    """One of the papers' analyses: a table, and the panels of its figure.

    Attributes:
        rows: numbers, texts, and None where nothing was measured, under `headers`.
        reading: sentence on the result. note: what was measured, and on which data.
        reason: why this predictor has no such analysis, which then has no table.
    """

    name: str
    headers: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    reading: str = ""
    note: str = ""
    panels: list[Panel] = field(default_factory=list)
    reason: str | None = None


@dataclass
class EvalReport:
    """Results of `firp eval`. `similarity[l]`: cosine(pseudo, real) at layer l by draft step; None below its layer."""

    environment: dict[str, Any]
    teacher: dict[str, Any]
    predictor: dict[str, Any]
    data: dict[str, Any]
    steps: list[StepQuality]
    expected_accepted_length_chain: float
    expected_accepted_length_tree: float
    tree: str
    similarity: dict[int, list[float | None]]
    pipeline: PipelineReport | None = None  # SPEED: `steps` are the exits, by loop
    analyses: list[Analysis] = field(default_factory=list)
    schema: str = EVAL_SCHEMA
