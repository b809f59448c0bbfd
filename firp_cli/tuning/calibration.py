"""What a tree is tuned for, and the answers that it is tuned on: written by the teacher, drafted along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.errors import UsageError
from firp_cli.evaluation.simulate import Trace, trace
from firp_cli.predictors.base import TreePredictor
from firp_cli.teacher.teacher import Teacher

BATCHES = (1, 2, 4, 8, 16, 32)
WRITTEN_AT_ONCE = 16  # answers


@dataclass(frozen=True)
class TuneSettings:
    """What to tune for.

    Attributes:
        batches: batch sizes, each of which gets a tree. context: tokens in the cache; None: the middle of an answer.
        most_rows: rows of a step and sequence at most; None: MOST_ROWS, on CUDA devices MOST_ROWS_CUDA.
        trial: decode prompts that were kept back with the chosen trees. repeats: of that, at most.
        again: measure the machine's costs anew. seconds: of that; None: 50, on CUDA devices 15.
        sittings: at which whole steps are timed, of each batch size; None: one on CUDA devices, elsewhere several.
        engine: how steps are run.

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
    sittings: int | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"batch sizes must be at least 1, got {', '.join(map(str, self.batches)) or 'none'}")


@dataclass
class Calibration:
    """Answers that the teacher wrote, with the predictor's drafts: `traces`, of `prompts` prompts and `tokens` new
    tokens; `context`: tokens in the cache in the middle of an answer.
    """

    traces: list[Trace]
    prompts: int
    tokens: int
    context: int


def calibrate(
    teacher: Teacher, predictor: TreePredictor, prompts: Sequence[Sequence[int]], settings: TuneSettings, breadth: int
) -> Calibration:
    """Let the teacher answer the prompts by plain decoding and draft along. Raises UsageError where all answers are
    too short for a decoding step.
    """
    writer = Engine(
        teacher,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        options=settings.engine,
    )
    traces, tokens, middles = [], 0, []
    for start in range(0, len(prompts), WRITTEN_AT_ONCE):
        part = prompts[start : start + WRITTEN_AT_ONCE]
        for prompt, written in zip(part, writer.generate(part, settings.max_new_tokens), strict=True):
            tokens += len(written.token_ids)
            middles.append(len(prompt) + len(written.token_ids) // 2)
            traces.append(trace(teacher, predictor, [*prompt, *written.token_ids], len(prompt), breadth))
    found = [item for item in traces if item is not None]
    if not found:
        raise UsageError(
            "the teacher ends every answer to these prompts at once: nothing can be learnt from them; take another "
            "--dataset"
        )
    return Calibration(found, len(prompts), tokens, int(median(middles)))
