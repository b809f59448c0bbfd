"""Similarity of pseudo and real states by layer and step: FIRP's claim is that the gap narrows with depth.

Shapes: B sequences, A anchors, k steps, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.analyses.subject import Subject, transfer_layers
from firp_cli.evaluation.quality import anchor_chunks, rows_at
from firp_cli.predictors.anchors import Anchors
from firp_cli.results import Analysis, Panel

MEASURES = ("cosine", "cosine of the anchor", "relative L2", "norm ratio")
NOTE = (
    "step i's pseudo state of anchor n is compared with the real state of position n+i after each layer, before the "
    "final norm; means over anchors of the cosine, of relative L2 (norm of the difference over the real norm) and of "
    "the norm ratio (pseudo over real); 'cosine of the anchor' compares the anchor's own state with the same real "
    "state: a prediction has to exceed it"
)
Sums = dict[tuple[int, int], Tensor]  # (layer, step) -> (measures,) sums over the anchors


@torch.inference_mode()
def similarity(subject: Subject) -> Analysis:
    """Compare pseudo states with later real states. Raises MethodError."""
    teacher, predictor = subject.teacher, subject.predictor
    layers, steps = transfer_layers(predictor), predictor.steps
    sums: Sums = {}
    counts = torch.zeros(steps, dtype=torch.float64)
    for batch, anchors in anchor_chunks(teacher, predictor, subject.sequences, progress=subject.progress):
        predictor.draft_states(teacher, batch, anchors.index, on_layer=_hook(sums, anchors))
        counts += anchors.valid.sum(dim=(0, 1)).cpu()
    depths = range(layers[0], teacher.num_layers + 1)
    means: dict[str, dict[int, list[float | None]]] = {
        name: {layer: [_mean(sums, counts, layer, step, place) for step in range(1, steps + 1)] for layer in depths}
        for place, name in enumerate(MEASURES)
    }
    rows = [[name, layer, *means[name][layer]] for name in MEASURES for layer in depths]
    return Analysis(
        "similarity",
        ["measure", "after layer", *(f"step {step}" for step in range(1, steps + 1))],
        rows,
        reading=_reading(means, layers, teacher.num_layers),
        note=NOTE,
        panels=[_panel(means[name], name, steps) for name in ("cosine", "relative L2")],
    )


def _hook(sums: Sums, anchors: Anchors) -> Callable[[int, Tensor, Tensor], None]:
    def on_layer(layer: int, real: Tensor, pseudo: Tensor) -> None:
        origin = rows_at(real, anchors.index).double()
        for step in range(1, pseudo.shape[2] + 1):
            counted = anchors.valid[:, :, step - 1]
            predicted = pseudo[:, :, step - 1].double()[counted]
            later = rows_at(real, anchors.index + step).double()[counted]
            length = later.norm(dim=-1).clamp(min=1e-12)
            measured = (
                functional.cosine_similarity(predicted, later, dim=-1),
                functional.cosine_similarity(origin[counted], later, dim=-1),
                (predicted - later).norm(dim=-1) / length,
                predicted.norm(dim=-1) / length,
            )
            total = torch.stack([values.sum() for values in measured]).cpu()
            sums[layer, step] = sums.get((layer, step), torch.zeros(len(MEASURES), dtype=torch.float64)) + total

    return on_layer


def _mean(sums: Sums, counts: Tensor, layer: int, step: int, place: int) -> float | None:
    """Return a mean over the anchors that count; None at layers below the step's own, or without anchors."""
    if (layer, step) not in sums or not counts[step - 1]:
        return None
    return float(sums[layer, step][place] / counts[step - 1])


def _reading(means: dict[str, dict[int, list[float | None]]], layers: tuple[int, ...], last: int) -> str:
    """Return whether the relative distance at the entry shrinks up to the last layer, by step."""
    parts: list[str] = []
    narrowed = 0
    for step, layer in enumerate(layers, start=1):
        before, after = (means["relative L2"][place][step - 1] for place in (layer, last))
        if before is None or after is None:
            continue
        narrowed += after < before
        cosines = [means["cosine"][place][step - 1] for place in (layer, last)]
        parts.append(f"step {step} from {before:.2f} to {after:.2f} (cosine {cosines[0]:.2f} to {cosines[1]:.2f})")
    distances = {layer: line[0] for layer, line in means["relative L2"].items() if line[0] is not None}
    copied = [means["cosine of the anchor"][place][0] for place in (layers[0], last)]
    if not distances or copied[0] is None or copied[1] is None:
        return "no step has an anchor"
    closest = min(distances, key=lambda layer: distances[layer])
    return (
        f"from the transfer layer to layer {last} the relative distance of pseudo and real states narrows at "
        f"{narrowed} of {len(parts)} steps: {', '.join(parts)}; step 1 is closest after layer {closest} "
        f"({distances[closest]:.2f}); the anchor's own state has cosine {copied[0]:.2f} to {copied[1]:.2f} at step 1"
    )


def _panel(means: dict[int, list[float | None]], name: str, steps: int) -> Panel:
    lines: dict[str, Any] = {}
    for step in range(1, steps + 1):
        values = [(layer, line[step - 1]) for layer, line in means.items()]
        lines[f"step {step}"] = [(layer, value) for layer, value in values if value is not None]
    return Panel("after layer", f"{name}, pseudo and real state", lines)
