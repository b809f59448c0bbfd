"""What a run would take, from its recipe alone: parameters, memory per rank, steps. Loads no weights, starts nothing.

Memory figures are estimates by the rules written beside them; the allocator's slack and the process itself come on top.
"""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch

from firp_cli.predictors.registry import build_predictor
from firp_cli.recipe import PredictorSection, Recipe, TeacherConfig, TrainingConfig, teacher_source
from firp_cli.teacher.stack import Teacher
from firp_cli.training.batches import PREFETCH, split_validation
from firp_cli.training.objective import LIVE_LOGITS, logit_budget
from firp_cli.training.trainer import data_order, planned_steps

SAVED_PER_ROW = (8, 4)  # elements a decoder layer keeps for the backward pass: times d, times the feed-forward size
HUB_SECONDS = 2.0


@dataclass
class Plan:
    """Figures of a run; None where they need the teacher's config (`missing` says why) or the store.

    Memory is bytes per rank by name. `trained` counts optimizer steps, `tokens` those of all epochs, all ranks.
    """

    ranks: int
    missing: str | None
    predictor_parameters: int | None = None
    parameters_per_step: int | None = None
    teacher_parameters: int | None = None
    teacher_parameters_used: int | None = None
    memory: dict[str, int] | None = None
    conversations: int | None = None
    steps: int | None = None
    tokens: int | None = None


def make_plan(recipe: Recipe, ranks: int, conversations: int | None = None, tokens: int | None = None) -> Plan:
    """Plan a run over a store of `conversations` and `tokens`; without a store `data.limit` stands for the count.

    Raises PredictorError when a transfer layer is out of the teacher's range.
    """
    assert recipe.predictor is not None
    teacher, missing = skeleton(recipe.teacher)
    plan = Plan(ranks, missing)
    if teacher is not None:
        with torch.device("meta"):
            predictor = build_predictor(recipe.predictor, teacher)
        count = sum(parameter.numel() for parameter in predictor.parameters())
        plan.predictor_parameters, plan.parameters_per_step = count, count // predictor.steps
        plan.teacher_parameters = _count(teacher.model)
        plan.teacher_parameters_used = teacher_parameters_used(teacher, recipe.predictor)
        plan.memory = memory_per_rank(recipe, teacher, count, ranks)
    plan.conversations = conversations if conversations is not None else recipe.data.limit
    settings = recipe.training
    if plan.conversations:
        training, _ = split_validation(plan.conversations, settings.validation_fraction, settings.seed)
        order = data_order(settings, training, ranks)
        plan.steps = planned_steps(settings, order)
        if tokens is not None:
            plan.tokens = round(plan.steps * order.per_step * order.size * tokens / plan.conversations)
    else:
        plan.steps = settings.max_steps
    return plan


def check_predictor(recipe: Recipe) -> None:
    """Raise PredictorError for a transfer layer that the teacher does not have, where its config is at hand."""
    assert recipe.predictor is not None
    teacher, _ = skeleton(recipe.teacher)
    if teacher is not None:
        with torch.device("meta"):
            build_predictor(recipe.predictor, teacher)


def skeleton(config: TeacherConfig) -> tuple[Teacher | None, str | None]:
    """The teacher's modules without memory behind them, from its config alone; or None and the reason."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from firp_cli.teacher.looped_llama import register

    register()
    source = teacher_source(config.model)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        try:
            found = AutoConfig.from_pretrained(source, local_files_only=True, **options)
        except OSError:
            if not _hub_reachable():
                return None, f"the config of {config.model} is neither in a local folder nor in the hub's cache"
            found = AutoConfig.from_pretrained(source, **options)
        dtype = found.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                found, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
            )
        return Teacher(model, name=config.model, check=False, looped=config.looped), None
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, f"the config of {config.model} cannot be read: {first}"


def _hub_reachable() -> bool:
    """Ask once and briefly: the hub's client retries for half a minute where there is no network."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT"):
        return True
    try:
        socket.create_connection(("huggingface.co", 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first_layer(config: PredictorSection, teacher: Teacher) -> int:
    """The lowest layer that training runs; L for predictors that read the final state only."""
    return min(config.transfer_layers, default=teacher.num_layers)


def teacher_parameters_used(teacher: Teacher, config: PredictorSection) -> int:
    """Frozen parameters that a training step runs through: layers from the first transfer layer on, and the head."""
    first = _first_layer(config, teacher)
    unique = list(teacher.layers.children())
    order = teacher.looped.order if teacher.looped else range(teacher.num_layers)
    upper = sum(_count(unique[number]) for number in sorted(set(order[first:])))
    return upper + _count(teacher.model.get_output_embeddings())


def memory_per_rank(recipe: Recipe, teacher: Teacher, parameters: int, ranks: int) -> dict[str, int]:
    """Bytes on one rank's device by what holds them, at the longest conversations that `data.max_length` allows."""
    assert recipe.predictor is not None
    settings, config = recipe.training, teacher.model.config.get_text_config()
    width = torch.finfo(teacher.dtype).bits // 8
    size, layers = teacher.hidden_size, teacher.num_layers
    batch, anchors, length = settings.micro_batch_size, settings.anchors_per_sequence, recipe.data.max_length
    transfers = recipe.predictor.transfer_layers
    steps = int(getattr(recipe.predictor, "steps", 1))
    memory = {"teacher weights": _count(teacher.model) * width}
    memory |= optimizer_memory(settings, parameters, ranks)
    states = batch * length * size * width * (1 + len(recipe.predictor.required_layers(teacher)))
    memory["hidden states, read ahead"] = states * (PREFETCH + 1)
    if transfers:
        per_row = SAVED_PER_ROW[0] * size + SAVED_PER_ROW[1] * int(getattr(config, "intermediate_size", 4 * size))
        rows = sum((layers - layer) * batch * anchors for layer in transfers)
        seen = length + steps * anchors
        keys = 2 * batch * seen * size * (layers - transfers[0])
        memory["pseudo rows, kept for the backward pass"] = (rows * per_row + keys) * width
        memory["attention masks"] = batch * seen * seen * (width + 1)
    else:
        memory["drafts"] = 4 * steps * batch * anchors * size * width
    budget = logit_budget(steps, batch * anchors, size)
    logits = min(budget, max(teacher.vocab_size, steps * batch * anchors * teacher.vocab_size))
    memory["logits, one piece"] = logits * 4 * LIVE_LOGITS
    memory["total"] = sum(memory.values())
    return memory


def optimizer_memory(settings: TrainingConfig, parameters: int, ranks: int) -> dict[str, int]:
    """Bytes per rank of the predictor's weights, gradients and AdamW states: ZeRO 1 shards the states over the ranks,
    2 the gradients too, 3 the weights too. bf16, and every stage above 0, keeps a float32 copy with the states.
    """
    stage = settings.zero_stage
    width = 2 if settings.precision == "bf16" else 4
    copy = 4 if settings.precision == "bf16" or stage else 0

    def shard(count: int, sharded: bool) -> int:
        return math.ceil(count / ranks) if sharded else count

    return {
        "predictor weights": shard(parameters * width, stage >= 3),
        "predictor gradients": shard(parameters * (4 if stage == 0 else width), stage >= 2),
        "optimizer states": shard(parameters * (8 + copy), stage >= 1),
    }
