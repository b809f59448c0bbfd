"""Predictors with a coupling, and its formulas one node at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.coupling import Coupling
from firp_cli.teacher.teacher import Teacher
from helpers.models import embedded_predictor, embedded_teacher, make_predictor

FORMS = ["mlp", "recurrent", "low_rank"]
UNCOUPLED: dict[str, dict[str, Any]] = {
    "firp_plus": {"kind": "firp_plus", "layer": 2, "steps": 3, "bias": True},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    "medusa": {"kind": "medusa", "steps": 3, "own_head": False},
}
COUPLED: dict[str, dict[str, Any]] = {  # the forms, shared or not, of all kinds
    "firp_plus": {**UNCOUPLED["firp_plus"], "coupling": {"candidates": 5}},
    "firp_plus-recurrent": {**UNCOUPLED["firp_plus"], "coupling": {"form": "recurrent"}},
    "hidden_transfer-coupled": {**UNCOUPLED["hidden_transfer"], "coupling": {"share": False, "candidates": 20}},
    "medusa-coupled": {**UNCOUPLED["medusa"], "coupling": {"form": "low_rank", "share": False}},
}


def section(kind: str, form: str = "mlp", share: bool = True, **fields: Any) -> dict[str, Any]:
    """Return a predictor section with a coupling; `fields` are the coupling's."""
    return {**UNCOUPLED[kind], "coupling": {"form": form, "share": share, "candidates": 12, **fields}}


def coupling_of(predictor: TreePredictor) -> Coupling:
    assert predictor.coupling is not None
    return predictor.coupling


def coupled(teacher: Teacher, described: dict[str, Any], strength: float = 4.0, seed: int = 0) -> TreePredictor:
    """Return a predictor with random weights, whose coupling matters as much as `strength` says."""
    predictor = make_predictor(teacher, seed, **described)
    with torch.no_grad():
        coupling_of(predictor).output_weight.mul_(strength)
    return predictor


def embedded_coupled(kind: str, form: str, share: bool, strength: float = 2.0, **fields: Any) -> TreePredictor:
    """Return an embedded predictor, which drafts well, with a random coupling that changes some of its drafts."""
    plain = embedded_predictor("firp" if kind == "firp_plus" else kind)
    described = {**plain.config.model_dump(), "kind": kind, "coupling": {"form": form, "share": share, **fields}}
    predictor = coupled(embedded_teacher(), described, strength)
    missing, unexpected = predictor.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("coupling.") for name in missing)
    return predictor


def adjusted_state(
    coupling: Coupling, teacher: Teacher, step: int, state: Tensor, token: int, previous: Tensor
) -> Tensor:
    """Return z_i' (d,) of step i = `step` (from 0) by the formulas: state z_i (d,), the parent's token, and z_(i-1)'
    (d,), which recurrent heads read.
    """
    place = step if len(coupling.output_weight) > 1 else 0
    embedding = teacher.model.get_input_embeddings().weight.float()
    parts, columns = [embedding[token] / embedding.std()], [coupling.node_weight[place]]
    if coupling.form == "recurrent":
        parts.append(previous / previous.square().mean().sqrt())
    if coupling.form != "low_rank":
        assert coupling.state_weight is not None
        parts.insert(0, state / state.square().mean().sqrt())
        columns.insert(0, coupling.state_weight[place])
    hidden = torch.cat(columns, dim=1) @ torch.cat(parts) + coupling.bias[step]
    if coupling.form != "low_rank":
        hidden = hidden * hidden.sigmoid()
    return state + coupling.output_weight[place] @ hidden
