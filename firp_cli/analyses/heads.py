"""The predictor against Medusa and early-exit heads on equal data.

Shapes: B sequences, T positions, A anchors, k steps, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from firp_cli.analyses.subject import Subject, by_step, quality_headers, quality_rows
from firp_cli.config import PredictorSection
from firp_cli.errors import MethodError, TeacherError
from firp_cli.evaluation.quality import Quality, rows_at
from firp_cli.predictors.base import LinearMapPredictor, Predictor, RowsHook, SequenceBatch, TreePredictor
from firp_cli.predictors.speed import exit_target
from firp_cli.results import Analysis, Panel
from firp_cli.store.reader import StoredSequence
from firp_cli.teacher.teacher import Teacher

NOTE = (
    "trained, against: the given predictors, trained on their own data. The others share their data: {solved}. "
    "{own}linear head: one map per step from the anchor's final state to the later one, then the teacher's head "
    "(Medusa-1 without its nonlinearity). exit l: the teacher's norm and head on "
    "the state after layer l of position n+i, with ridge through a solved map; it reads the real tokens before, so its "
    "top-1 is that of a drafter that has been right so far. per pass: the chain's expected tokens over the passes of "
    "the teacher, one that verifies and, for each token that an exit drafts, l of its layers"
)


class LinearHead(LinearMapPredictor):
    """W_1..W_k: the teacher's head on W_i times the anchor's normed final state."""

    def __init__(self, teacher: Teacher, steps: int) -> None:
        super().__init__(PredictorSection(), steps, teacher.hidden_size, bias=False)
        self._layer = teacher.num_layers

    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        final = rows_at(batch.final, anchors)
        return torch.stack([linear(final.to(linear.weight.dtype)) for linear in self.maps], dim=2).to(final.dtype)  # type: ignore[arg-type]

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        return teacher.head(states)

    def ridge_layers(self) -> tuple[int, ...]:
        return (self._layer,) * self.steps  # `normed` gives the conversations their final states as this layer's


class EarlyExit(LinearMapPredictor):
    """The teacher's norm and head on a map of the state after `layer`, at position n + offsets[i-1] for step i.

    All steps share the map, which starts at the identity: the plain exit.
    """

    def __init__(self, teacher: Teacher, layer: int, offsets: Sequence[int]) -> None:
        super().__init__(PredictorSection(), 1, teacher.hidden_size, bias=False)
        self.steps, self.layer, self._offsets = len(offsets), layer, tuple(offsets)

    @property
    def offsets(self) -> tuple[int, ...]:
        return self._offsets

    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        states = torch.stack([rows_at(batch.hidden[self.layer], anchors + ahead) for ahead in self._offsets], dim=2)
        linear = self.maps[0]
        return teacher.norm(linear(states.to(linear.weight.dtype)).to(states.dtype))  # type: ignore[arg-type]

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        return teacher.head(states)

    def ridge_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def ridge_target(self, teacher: Teacher, batch: SequenceBatch, hidden: Tensor) -> Tensor:
        return exit_target(teacher, batch, hidden)


Head = TypeVar("Head", LinearHead, EarlyExit)


def linear_head(subject: Subject, items: Sequence[StoredSequence], steps: int) -> LinearHead:
    """Return the linear heads at their ridge solution."""
    head = _frozen(LinearHead(subject.teacher, steps), subject.teacher)
    last = subject.teacher.num_layers
    subject.solve(head, [replace(item, hidden={last: item.final}) for item in items])
    return head


def exit_head(subject: Subject, items: Sequence[StoredSequence], layer: int, steps: int) -> EarlyExit:
    """Return an early exit whose map has its ridge solution. Raises TeacherError where the norm cannot be undone."""
    solved = _frozen(EarlyExit(subject.teacher, layer, [0]), subject.teacher)
    subject.solve(solved, items)
    later = EarlyExit(subject.teacher, layer, range(1, steps + 1))
    later.maps = solved.maps
    return later


def _frozen(predictor: Head, teacher: Teacher) -> Head:
    predictor.initialise("identity", teacher)
    return predictor.to(teacher.device).eval().requires_grad_(False)


def heads(subject: Subject) -> Analysis:
    """Evaluate all drafters on the same held-out conversations. Raises MethodError."""
    teacher, predictor = subject.teacher, subject.predictor
    if not isinstance(predictor, TreePredictor):
        raise MethodError(f"a {predictor.kind} predictor drafts no tree; its exits are the steps of the evaluation")
    steps, own = predictor.steps, predictor.transfer_layers
    exits = exit_layers(own, teacher.num_layers)
    needed = {layer for drafter in (predictor, *subject.against.values()) for layer in drafter.required_layers}
    items = subject.with_states(sorted({*own, *exits, *needed}))
    drafters: dict[str, Predictor] = {f"{predictor.kind} (trained)": predictor, **subject.against}
    if own:
        drafters[f"{predictor.kind} (ridge)"] = subject.transfer(items, own)
    drafters["linear head (ridge)"] = linear_head(subject, items, steps)
    for layer in exits:
        drafters[f"exit {layer}"] = _frozen(EarlyExit(teacher, layer, range(1, steps + 1)), teacher)
        try:
            drafters[f"exit {layer} (ridge)"] = exit_head(subject, items, layer, steps)
        except TeacherError:
            continue  # its norm cannot be undone: there is no such target
    found: dict[str, Quality] = {}
    for name, drafter in drafters.items():
        found[name] = subject.quality(drafter, items)
        subject.progress(len(found), len(drafters))
    deepest, table = max(len(quality.steps) for quality in found.values()), []
    per_pass = {}
    for name, quality in found.items():
        per_pass[name] = quality.expected_accepted_length_chain / (1 + draft_passes(drafters[name], teacher))
        first, second = quality_rows([name], quality, deepest)
        table += [[*first, per_pass[name]], [*second, None]]
    return Analysis(
        "heads",
        [*quality_headers(["drafter"], deepest), "per pass"],
        table,
        reading=_reading(per_pass),
        note=NOTE.format(
            own=f"{predictor.kind} (ridge): the predictor's own kind and layers. " if own else "",
            solved=subject.data_note(),
        ),
        panels=[
            Panel(
                "step i (drafts the token i + 1 ahead)",
                "top-1",
                {name: by_step([item.top1 for item in quality.steps]) for name, quality in found.items()},
            )
        ],
    )


def exit_layers(own: Sequence[int], layers: int) -> list[int]:
    """Return the exits: the first transfer layer (else the middle), and halfway from there to the last layer."""
    first = own[0] if own else layers // 2
    return sorted({layer for layer in (first, (first + layers) // 2) if 1 <= layer < layers})


def draft_passes(drafter: Predictor, teacher: Teacher) -> float:
    """Return the passes of the teacher that a draft takes beside its verification; pseudo rows ride in that pass."""
    return drafter.steps * drafter.layer / teacher.num_layers if isinstance(drafter, EarlyExit) else 0.0


def _reading(per_pass: dict[str, float]) -> str:
    ordered = sorted(per_pass, key=lambda name: -per_pass[name])
    return f"tokens per pass of the teacher: {', '.join(f'{name} {per_pass[name]:.2f}' for name in ordered)}"
