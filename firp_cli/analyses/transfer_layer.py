"""Accuracy of drafts against the transfer layer, with closed-form maps for every layer from the same conversations."""

from __future__ import annotations

from firp_cli.analyses.subject import Subject, quality_headers, quality_rows, run_layer
from firp_cli.errors import MethodError
from firp_cli.evaluation.quality import Quality
from firp_cli.predictors.base import TreePredictor
from firp_cli.results import Analysis, Panel

MOST_LAYERS = 10  # layers that are evaluated; of a deeper teacher every n-th


def measured_layers(last: int, kept: tuple[int, ...] = ()) -> list[int]:
    """Return the layers 1..last, or every n-th where there are more than MOST_LAYERS, with `kept` and the last."""
    apart = -(-last // MOST_LAYERS)
    return sorted({*range(1, last + 1, apart), *kept, last})


def transfer_layer(subject: Subject) -> Analysis:
    """Solve and evaluate the maps of one layer after another. Raises MethodError.

    The states of one layer are held at a time, and each layer runs once over all conversations.
    """
    teacher, predictor = subject.teacher, subject.predictor
    if not isinstance(predictor, TreePredictor):
        raise MethodError(f"a {predictor.kind} predictor drafts no tree")
    if teacher.num_layers < 2:
        raise MethodError(f"{teacher.name} has one layer: no layer is left to transfer to")
    steps, own = predictor.steps, predictor.transfer_layers
    layers = measured_layers(teacher.num_layers - 1, own)
    items = subject.with_states([1])
    found: dict[int, Quality] = {}
    for layer in range(1, layers[-1] + 1):
        if layer in layers:
            found[layer] = subject.quality(subject.transfer(items, [layer] * steps), items)
        if layer < layers[-1]:
            run_layer(teacher, items, layer)
        subject.progress(layer, layers[-1])
    top1 = {
        f"step {step}": [(layer, found[layer].steps[step - 1].top1) for layer in layers] for step in range(1, steps + 1)
    }
    chain = [(layer, found[layer].expected_accepted_length_chain) for layer in layers]
    return Analysis(
        "transfer-layer",
        quality_headers(["layer"], steps),
        [row for layer in layers for row in quality_rows([layer], found[layer], steps)],
        reading=_reading(dict(chain), own),
        note=(
            f"all {steps} steps enter at the layer; maps are closed-form start values, not trained predictors: "
            f"{subject.data_note()}"
        ),
        panels=[
            Panel("transfer layer", "top-1", {name: _measured(points) for name, points in top1.items()}),
            Panel("transfer layer", "expected accepted length of the chain", {"ridge": _measured(chain)}),
        ],
    )


def _measured(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(layer, value) for layer, value in points if value == value]


def _reading(chain: dict[int, float], own: tuple[int, ...]) -> str:
    best = max(chain, key=lambda layer: chain[layer])
    text = f"layer {best} has the longest expected accepted length, {chain[best]:.2f}"
    known = ", ".join(f"layer {layer} {chain[layer]:.2f}" for layer in dict.fromkeys(own))
    return f"{text}; the predictor's own: {known}" if known else text
