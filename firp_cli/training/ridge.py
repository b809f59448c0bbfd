"""Ridge start: each map in closed form, W_i = (sum y x^T)(sum x x^T + lambda I)^-1 with x = h_n^t, y = h_{n+i}^t.

One pass over the training conversations sums the d x d products in float64, over every anchor at which step i counts.
lambda is `training.ridge_lambda` times the mean diagonal of sum x x^T. With a bias the sums are centred first.
Shapes: B sequences, T positions, M anchors, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from firp_cli.errors import NumericsError
from firp_cli.predictors.anchors import Sequenced, choose_anchors
from firp_cli.predictors.base import Predictor, SequenceBatch
from firp_cli.results import Progress
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import read_batch


@dataclass
class RidgeSums:
    """Float64 sums over the anchors of one step: x x^T (d, d), y x^T (d, d), x (d,), y (d,) and their count."""

    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    count: Tensor

    @staticmethod
    def empty(size: int, device: torch.device) -> RidgeSums:
        """Return sums over no anchors."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return RidgeSums(zeros(size, size), zeros(size, size), zeros(size), zeros(size), zeros(1))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add pairs of rows x, y (M, d)."""
        x, y = x.double(), y.double()
        self.xx.addmm_(x.T, x)
        self.yx.addmm_(y.T, x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.count += x.shape[0]

    def reduce(self) -> None:
        """Sum over all ranks."""
        for part in (self.xx, self.yx, self.x, self.y, self.count):
            torch.distributed.all_reduce(part)

    def solve(self, relative_lambda: float, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Return W (d, d) with y = W x + b, and b (d,) with `bias`, in float64. Raises NumericsError."""
        xx, yx, count = self.xx, self.yx, self.count.clamp(min=1)
        if bias:
            xx = xx - torch.outer(self.x, self.x) / count
            yx = yx - torch.outer(self.y, self.x) / count
        damping = relative_lambda * xx.diagonal().mean()
        if not (damping > 0 and torch.isfinite(damping) and torch.isfinite(yx).all()):
            raise NumericsError(
                "the hidden states have no finite, nonzero variance to fit: run `firp store verify STORE`, or set "
                "training.init=identity"
            )
        weight = torch.linalg.solve(xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), yx.T).T
        return weight, (self.y - weight @ self.x) / count if bias else None


@torch.no_grad()
def ridge_start(
    predictor: Predictor,
    teacher: Teacher,
    store: Sequence[Sequenced],
    indices: Sequence[int],
    relative_lambda: float,
    batch_size: int,
    progress: Progress | None = None,
) -> list[int]:
    """Set every map of the predictor to its ridge solution over conversations `indices` of the store.

    Each rank of a group reads its part, and the sums are reduced. Returns the number of fitted pairs by step; a step
    without any keeps its map. Raises NumericsError naming the conversations whose states are not finite.
    """
    layers = predictor.ridge_layers()
    sums = [RidgeSums.empty(teacher.hidden_size, teacher.device) for _ in layers]
    grouped = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if grouped else 0
    ranks = torch.distributed.get_world_size() if grouped else 1
    part = list(indices[rank::ranks])
    # a rank without conversations repeats the first, uncounted: a sharded teacher needs all ranks in each forward
    for start in range(0, math.ceil(len(indices) / ranks), batch_size):
        picks = part[start : start + batch_size]
        batch = read_batch(store, picks or indices[:1]).to(teacher.device, teacher.dtype)
        _add_batch(sums, predictor, teacher, batch, picks)
        if progress:
            progress(min(len(indices), (start + len(picks)) * ranks), len(indices))
    for step, total in enumerate(sums, start=1):
        if grouped:
            total.reduce()
        if total.count:
            predictor.set_map(step, *total.solve(relative_lambda, bool(getattr(predictor.config, "bias", False))))
    return [int(total.count) for total in sums]


def _add_batch(
    sums: list[RidgeSums], predictor: Predictor, teacher: Teacher, batch: SequenceBatch, picks: list[int]
) -> None:
    layers = predictor.ridge_layers()
    anchors = choose_anchors(batch, predictor.offsets)
    states = states_at(teacher, batch, sorted(set(layers)))
    if not picks:
        return
    for step, layer in enumerate(layers, start=1):
        counted = anchors.valid[:, :, step - 1]
        row = torch.arange(len(picks), device=counted.device)[:, None].expand_as(counted)[counted]
        position = anchors.index[counted]
        hidden = states[layer]
        if not torch.isfinite(hidden).all():
            raise NumericsError(f"NaN or infinity in the states of layer {layer}, conversations {picks} of the store")
        target = predictor.ridge_target(teacher, batch, hidden)
        sums[step - 1].add(hidden[row, position], target[row, position + predictor.offsets[step - 1]])


def states_at(teacher: Teacher, batch: SequenceBatch, layers: list[int]) -> dict[int, Tensor]:
    """Return h^l (B, T, d) of the real rows for ascending layers l: from the store, or computed from its first one."""
    if all(layer in batch.hidden for layer in layers):
        return {layer: batch.hidden[layer] for layer in layers}
    first, last = layers[0], layers[-1]
    states = {first: batch.hidden[first]}
    if last > first:
        rows = batch.input_ids.shape[1]
        positions = torch.arange(rows, device=batch.input_ids.device).expand(batch.input_ids.shape)
        teacher.run(
            states[first],
            positions,
            teacher.causal_mask(rows),
            first,
            last,
            on_layer=lambda layer, hidden: states.update({layer: hidden}),
        )
    return {layer: states[layer] for layer in layers}
