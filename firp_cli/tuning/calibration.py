"""Settings of tuning, and the answers that trees are tuned on: written by the teacher, with the predictor's drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.errors import UsageError
from firp_cli.evaluation.simulate import Trace, make_trace
from firp_cli.predictors.base import TreePredictor
from firp_cli.teacher.teacher import Teacher

BATCHES = (1, 2, 4, 8, 16, 32)
ANSWER_BATCH = 16  # answers decoded together
KEPT_BACK = 0.25  # share of the prompts that is kept for the trial
LEAST_PROMPTS = 4
SAMPLED_PARTS, PART_ANCHORS = 20, 32  # of the answers, on which accepted lengths are estimated


@dataclass(frozen=True)
class TuneSettings:
    """Settings of tuning.

    Attributes:
        batches: batch sizes, each of which gets a tree.
        context: tokens in the K/V cache; None: the middle of a typical answer.
        most_rows: largest number of rows of a decoding step per sequence; None: MOST_ROWS, on CUDA devices
            MOST_ROWS_CUDA.
        trial: decode prompts that were kept back with the chosen trees. repeats: repeats of the trial at most.
        again: measure the machine's costs again. seconds: time to measure them; None: 50, on CUDA devices 15.
        timing_rounds: rounds of timing whole decoding steps, for each batch size; None: 1 on CUDA devices, several on
            CPUs.
        engine: how decoding steps are run.

    Raises UsageError.
    """

    batches: tuple[int, ...] = BATCHES
    context: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    most_rows: int | None = None
    trial: bool = True
    repeats: int = 2
    again: bool = False
    seconds: float | None = None
    timing_rounds: int | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"batch sizes must be at least 1, got {', '.join(map(str, self.batches)) or 'none'}")

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of an engine for sampling."""
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}

    def describe(self) -> dict[str, Any]:
        """Return the settings under the keys of tune.json."""
        return {"sittings" if name == "timing_rounds" else name: value for name, value in asdict(self).items()}


@dataclass
class Calibration:
    """Answers that the teacher wrote, with the predictor's drafts.

    Attributes:
        traces: one per answer. prompts: number of prompts. tokens: number of new tokens.
        context: tokens in the K/V cache in the middle of a typical answer.
    """

    traces: list[Trace]
    prompts: int
    tokens: int
    context: int

    @cached_property
    def sample(self) -> list[Trace]:
        """Parts of the answers, evenly spread over them."""
        parts = [part for trace in self.traces for part in trace.parts(PART_ANCHORS)]
        return parts[:: -(-len(parts) // SAMPLED_PARTS)]


def split_prompts(
    teacher: Teacher, prompts: Sequence[Sequence[int]], settings: TuneSettings
) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """Return the prompts that calibrate and those that are kept back for the trial. Raises UsageError."""
    room = teacher.max_positions - settings.max_new_tokens
    if settings.context is not None and not 1 <= settings.context <= room:
        raise UsageError(
            f"--context {settings.context} leaves no room for {settings.max_new_tokens} new tokens: the teacher's "
            f"context has {teacher.max_positions} positions; lower --context or --max-new-tokens"
        )
    fitting = [ids for ids in prompts if len(ids) <= room]
    kept = max(1, round(KEPT_BACK * len(fitting))) if settings.trial else 0
    if len(fitting) - kept < LEAST_PROMPTS:
        raise UsageError(
            f"{len(fitting)} of {len(prompts)} prompts leave room for {settings.max_new_tokens} new tokens in a "
            f"context of {teacher.max_positions}; tuning needs at least {LEAST_PROMPTS + kept}: raise --limit, or "
            "lower --max-new-tokens"
        )
    return fitting[: len(fitting) - kept], fitting[len(fitting) - kept :]


def calibrate(
    teacher: Teacher, predictor: TreePredictor, prompts: Sequence[Sequence[int]], settings: TuneSettings, breadth: int
) -> Calibration:
    """Answer the prompts by autoregressive decoding, and draft at every position of the answers.

    Raises UsageError when all answers are too short for a decoding step.
    """
    engine = Engine(teacher, options=settings.engine, **settings.sampling)
    traces, tokens, middles = [], 0, []
    for start in range(0, len(prompts), ANSWER_BATCH):
        part = prompts[start : start + ANSWER_BATCH]
        for prompt, answer in zip(part, engine.generate(part, settings.max_new_tokens), strict=True):
            tokens += len(answer.token_ids)
            middles.append(len(prompt) + len(answer.token_ids) // 2)
            trace = make_trace(teacher, predictor, [*prompt, *answer.token_ids], len(prompt), breadth)
            traces += [trace] if trace else []
    if not traces:
        raise UsageError(
            "the teacher's answers to these prompts are too short to tune on (fewer than 2 tokens): take another "
            "--dataset"
        )
    return Calibration(traces, len(prompts), tokens, int(median(middles)))
