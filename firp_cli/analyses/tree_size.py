"""Accepted length by tree size, by simulated decoding of written answers."""

from __future__ import annotations

from torch import Tensor

from firp_cli.analyses.subject import Subject
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import MethodError
from firp_cli.evaluation.simulate import Trace, make_trace, simulate_steps
from firp_cli.predictors.base import TreePredictor
from firp_cli.results import Analysis, Panel

SIZES = (1, 2, 4, 8, 16, 32, 64)


def tree_of_size(nodes: int) -> TreeSpec:
    """Return the dynamic tree of so many nodes; one node is the root alone."""
    return TreeSpec("dynamic", nodes) if nodes > 1 else TreeSpec("none", 1)


def first_answer(input_ids: Tensor, loss_mask: Tensor) -> tuple[list[int], int]:
    """Return a conversation up to the end of its first answer, and the length of the prompt."""
    places = loss_mask.nonzero()[:, 0]
    start = int(places[0]) if len(places) else len(input_ids)
    later = (~loss_mask[start:].bool()).nonzero()[:, 0]
    end = start + int(later[0]) if len(later) else len(input_ids)
    return input_ids[:end].tolist(), start


def tree_size(subject: Subject) -> Analysis:
    """Simulate decoding with dynamic trees of SIZES nodes. Raises MethodError."""
    teacher, predictor = subject.teacher, subject.predictor
    if not isinstance(predictor, TreePredictor):
        raise MethodError(f"a {predictor.kind} predictor drafts no tree")
    traces: list[Trace] = []
    breadth = min(SIZES[-1], teacher.vocab_size)
    for index in range(len(subject.sequences)):
        item = subject.sequences[index]
        trace = make_trace(teacher, predictor, *first_answer(item.input_ids, item.loss_mask), breadth)
        traces += [trace] if trace else []
        subject.progress(index + 1, len(subject.sequences))
    if not traces:
        raise MethodError("no answer is long enough for a decoding step")
    lengths, table = [], []
    for nodes in SIZES:
        spec = tree_of_size(nodes)
        emitted = [count for answer in simulate_steps(predictor, traces, spec) for count in answer]
        lengths.append(sum(emitted) / len(emitted))
        passed = nodes * (1 + (spec.drafting(predictor.steps) if predictor.transfer_layers else 0))
        table.append(
            [nodes, passed, lengths[-1], lengths[-1] - lengths[-2] if len(lengths) > 1 else None, len(emitted)]
        )
    return Analysis(
        "tree-size",
        ["nodes", "rows", "accepted length", "over the size before", "steps"],
        table,
        reading=(
            f"the accepted length grows from {lengths[0]:.2f} to {lengths[-1]:.2f} at {SIZES[-1]} nodes; doubling the "
            f"nodes from {SIZES[-2]} adds {lengths[-1] - lengths[-2]:.2f}"
        ),
        note=(
            f"decoding with dynamic trees is simulated over {len(traces)} written answers, with {predictor.steps} "
            "draft steps; one node is autoregressive decoding; rows: nodes and their pseudo states in one pass"
        ),
        panels=[
            Panel(
                "nodes of the tree", "accepted length", {predictor.kind: list(zip(SIZES, lengths, strict=True))}, True
            )
        ],
    )
