"""First stage of training: the coupling alone learns, on draft states that do not change (FIRP+)."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_cli.config import CouplingConfig, Recipe, TrainingConfig
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.coupling import Coupling
from firp_cli.teacher.teacher import Teacher

COUPLING = "coupling."  # first part of the names of the coupling's parameters


def has_first_stage(recipe: Recipe) -> bool:
    """Return True if the recipe's predictor has a coupling that a first stage trains."""
    return getattr(recipe.predictor, "coupling", None) is not None and recipe.training.coupling.epochs > 0


def stage_settings(settings: TrainingConfig) -> TrainingConfig:
    """Return the settings of the first stage: those of `training.coupling`, the others as they are."""
    stage = settings.coupling
    changed = {
        "epochs": stage.epochs,
        "max_minutes": stage.max_minutes,
        "micro_batch_size": stage.micro_batch_size,
        "anchors_per_sequence": stage.anchors_per_sequence,
        "learning_rate": stage.learning_rate,
        "max_steps": None,
        "validate_every": None,
        "save_every": None,
    }
    return settings.model_copy(update=changed)


def stage_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the first stage as a run of its own."""
    return recipe.model_copy(update={"training": stage_settings(recipe.training)})


def coupling_shapes(recipe: Recipe, teacher: Teacher) -> Coupling | None:
    """Return the coupling of the recipe's predictor without weights; None if it has none."""
    config: CouplingConfig | None = getattr(recipe.predictor, "coupling", None)
    if config is None:
        return None
    assert recipe.predictor is not None
    steps = len(recipe.predictor.transfer_layers) or int(getattr(recipe.predictor, "steps", 0))
    with torch.device("meta"):
        return Coupling(config, steps, teacher)


def loss_tokens(settings: TrainingConfig, teacher: Teacher) -> int:
    """Return the number of tokens that the loss compares."""
    return min(settings.vocabulary or teacher.vocab_size, teacher.vocab_size)


def freeze_drafts(predictor: Predictor) -> None:
    """Let only the coupling learn."""
    for name, parameter in predictor.named_parameters():
        parameter.requires_grad_(name.startswith(COUPLING))


def cpu_weights(predictor: Predictor) -> dict[str, Tensor]:
    """Return copies of all weights on the CPU."""
    return {
        name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, value in predictor.state_dict().items()
    }
