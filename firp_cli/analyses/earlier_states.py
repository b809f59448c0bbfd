"""Effect of earlier pseudo states on later steps: drafts with and without sight of them."""

from __future__ import annotations

from firp_cli.analyses.subject import Subject, by_step, quality_headers, quality_rows, transfer_layers
from firp_cli.errors import MethodError
from firp_cli.predictors.hidden_transfer import HiddenTransferPredictor
from firp_cli.results import Analysis, Panel


def attention(subject: Subject) -> Analysis:
    """Evaluate the predictor and its ridge start under both masks. Raises MethodError."""
    predictor, layers = subject.predictor, transfer_layers(subject.predictor)
    assert isinstance(predictor, HiddenTransferPredictor)
    if predictor.steps == 1:
        raise MethodError("a predictor of one step has no earlier pseudo states")
    items = subject.with_states(sorted(set(layers)))
    rows, lines, found = [], {}, {}
    for name, drafter in (("trained", predictor), ("ridge", subject.transfer(items, layers))):
        for sight, masked in (("on", drafter), ("off", drafter.isolated())):
            quality = found[name, sight] = subject.quality(masked, items)
            rows += quality_rows([f"{predictor.kind} ({name})", sight], quality, predictor.steps)
            lines[f"{name}, {sight}"] = by_step([item.top1 for item in quality.steps])
            subject.progress(len(found), 4)
    changes = []
    for name in ("trained", "ridge"):
        before, after = found[name, "on"], found[name, "off"]
        by = [
            f"step {one.step} {one.top1:.3f} to {other.top1:.3f}"
            for one, other in zip(before.steps[1:], after.steps[1:], strict=True)
        ]
        lengths = f"{before.expected_accepted_length_chain:.2f} to {after.expected_accepted_length_chain:.2f}"
        changes.append(f"{name}: {', '.join(by)} (expected accepted length {lengths})")
    return Analysis(
        "attention",
        quality_headers(["drafter", "earlier"], predictor.steps),
        rows,
        reading=f"hiding earlier pseudo states changes top-1 as follows; {'; '.join(changes)}",
        note=(
            "earlier off: the mask hides the pseudo states of earlier steps, so that step i sees the real rows and "
            "itself; the trained predictor was trained with them visible, which favours on; its ridge start was solved "
            f"without regard to either mask; {subject.data_note()}"
        ),
        panels=[Panel("step i (drafts the token i + 1 ahead)", "top-1", lines)],
    )
