"""Teacher, predictor and conversations that an analysis looks at, and what several analyses need of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firp_cli.collecting.teacher_states import capture, plan_batches
from firp_cli.config import HiddenTransferConfig
from firp_cli.errors import MethodError, StoreError
from firp_cli.evaluation.quality import Quality, Sequences, evaluate
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import build_predictor
from firp_cli.predictors.hidden_transfer import HiddenTransferPredictor
from firp_cli.results import Progress, no_progress
from firp_cli.store.reader import FINAL, StoredSequence
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import split_validation
from firp_cli.training.ridge import ridge_start

HELD_OUT = 1 / 3  # share of the conversations that solved maps are evaluated on
PACK_TOKENS = 2048  # positions of a forward
FEW = 10  # pairs for each input of a map, below which a note warns
BATCH = 4  # conversations whose states are summed together


@dataclass
class Subject:
    """Teacher and predictor with the conversations of an evaluation.

    Attributes:
        ridge_lambda: damping of maps that an analysis solves. against: other predictors by label, for `heads`.
    """

    teacher: Teacher
    predictor: Predictor
    sequences: Sequences
    ridge_lambda: float = 1e-2
    against: Mapping[str, Predictor] = field(default_factory=dict)
    progress: Progress = no_progress
    _pairs: list[int] = field(default_factory=lambda: [0])  # of the last solution, by step

    @cached_property
    def parts(self) -> tuple[list[int], list[int]]:
        """Numbers of the conversations that maps are solved on, and of those that they are evaluated on. Raises
        MethodError.
        """
        solved, held_out = split_validation(len(self.sequences), HELD_OUT, 0)
        if not held_out:
            raise MethodError("maps are solved on some conversations and evaluated on others: give two or more")
        return solved, held_out

    def data_note(self) -> str:
        """Return a sentence on the conversations, and on how maps were solved."""
        solved, count = self.parts[0], len(self.sequences)
        pairs, size = self._pairs[0], self.teacher.hidden_size
        few = f", few for maps of {size} inputs: raise --limit" if pairs < FEW * size else ""
        return (
            f"maps marked ridge are solved in closed form on {len(solved)} of {count} conversations ({pairs} "
            f"pairs{few}; lambda {self.ridge_lambda:g} of the mean diagonal), without gradient training; all figures "
            "are those of the rest"
        )

    def with_states(self, layers: Sequence[int]) -> list[StoredSequence]:
        """Return the conversations with the states after `layers` and the final ones, as the teacher computes them."""
        given = [self.sequences[index] for index in range(len(self.sequences))]
        ids = [item.input_ids.long() for item in given]
        found: dict[int, StoredSequence] = {}

        def sink(batch: list[int], states: dict[str, Tensor]) -> None:
            lengths = [len(ids[number]) for number in batch]
            split = {name: rows.split(lengths) for name, rows in states.items()}
            for place, number in enumerate(batch):
                hidden = {layer: split[f"hidden.{layer}"][place] for layer in layers}
                mask = given[number].loss_mask.bool()
                found[number] = StoredSequence(ids[number], mask, split[FINAL][place], hidden)
            self.progress(len(found), len(ids))

        capture(self.teacher, ids, sorted(set(layers)), PACK_TOKENS, sink)
        return [found[number] for number in range(len(ids))]

    def solve(self, predictor: Predictor, items: Sequence[StoredSequence]) -> None:
        """Set the predictor's maps to their ridge solution over the first part of the conversations."""
        self._pairs = ridge_start(predictor, self.teacher, items, self.parts[0], self.ridge_lambda, BATCH)

    def transfer(self, items: Sequence[StoredSequence], layers: Sequence[int]) -> HiddenTransferPredictor:
        """Return a predictor whose step i enters at layers[i-1], at its ridge solution."""
        bias = bool(getattr(self.predictor.config, "bias", False))
        config = HiddenTransferConfig(kind="hidden_transfer", layers=list(layers), bias=bias)
        made = build_predictor(config, self.teacher).eval().requires_grad_(False)
        assert isinstance(made, HiddenTransferPredictor)
        made.initialise("ridge", self.teacher)
        self.solve(made, items)
        return made

    def quality(self, predictor: Predictor, items: Sequence[StoredSequence]) -> Quality:
        """Return the draft quality on the second part of the conversations. Raises MethodError."""
        try:
            return evaluate(self.teacher, predictor, [items[index] for index in self.parts[1]], None)
        except StoreError:
            raise MethodError("no held-out conversation has two response tokens: give longer or more answers") from None


@torch.inference_mode()
def run_layer(teacher: Teacher, items: Sequence[StoredSequence], layer: int) -> None:
    """Replace the states of the conversations before `layer` by those after it."""
    lengths = [len(item.input_ids) for item in items]
    for batch in plan_batches(lengths, PACK_TOKENS):
        hidden = pad_sequence([items[number].hidden[layer] for number in batch], batch_first=True)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        after = teacher.run(hidden, positions, teacher.causal_mask(hidden.shape[1]), layer, layer + 1)
        for row, number in enumerate(batch):
            items[number].hidden = {layer + 1: after[row, : lengths[number]]}


def transfer_layers(predictor: Predictor) -> tuple[int, ...]:
    """Return the transfer layers of a predictor. Raises MethodError where it has none."""
    if not isinstance(predictor, HiddenTransferPredictor):
        raise MethodError(f"a {predictor.kind} predictor has no pseudo states")
    return predictor.transfer_layers


def quality_headers(names: Sequence[str], steps: int) -> list[str]:
    """Return the headers of `quality_rows`."""
    return [*names, "hits", *(f"step {step}" for step in range(1, steps + 1)), "chain"]


def quality_rows(names: Sequence[Any], quality: Quality, steps: int) -> list[list[Any]]:
    """Return a row of top-1 and one of top-5 by step, the first with the expected accepted length of the chain."""
    missing = [None] * (steps - len(quality.steps))
    top1, top5 = [item.top1 for item in quality.steps], [item.top5 for item in quality.steps]
    return [
        [*names, "top-1", *top1[:steps], *missing, quality.expected_accepted_length_chain],
        [*names, "top-5", *top5[:steps], *missing, None],
    ]


def by_step(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """Return the points (step, value) of a line, without those that were not measured."""
    return [(step, value) for step, value in enumerate(values, start=1) if value is not None and value == value]
