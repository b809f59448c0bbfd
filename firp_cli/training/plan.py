"""Plan of a run from its recipe alone: parameters, memory per rank, steps, hours. Loads no weights, starts nothing.

Memory follows the rules of training/memory_model.py, hours those of training/time_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from firp_cli.assets import embedded_folder
from firp_cli.chat_template import note_once
from firp_cli.config import Recipe, TeacherConfig, TrainingConfig
from firp_cli.errors import FirpError, TeacherError, first_line
from firp_cli.machine import hub_reachable
from firp_cli.predictors.folder import build_predictor
from firp_cli.teacher.source import locate_config
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import data_order, planned_steps, split_validation
from firp_cli.training.first_stage import has_first_stage, stage_settings
from firp_cli.training.memory_model import (
    MemoryLine,
    collecting_lines,
    count_parameters,
    first_layer,
    memory_lines,
    stage_lines,
    total_bytes,
)
from firp_cli.training.time_model import RunTimes, Throughput, estimate_times


@dataclass
class Plan:
    """Figures of a run; None where they need the teacher's config (`missing` is the reason) or the store.

    Attributes:
        memory: bytes per rank of training by name, in the stage that needs most. lines: their arithmetic.
        stages: total bytes per rank by stage of training. collecting: the lines of collecting.
        steps: optimizer steps, without those of a first stage. first_stage_steps: the others; None without one.
        tokens: of all epochs and stages, all ranks.
        chain: estimates of disk space and hours.
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
    first_stage_steps: int | None = None
    tokens: int | None = None
    lines: list[MemoryLine] = field(default_factory=list)
    stages: dict[str, int] = field(default_factory=dict)
    collecting: list[MemoryLine] = field(default_factory=list)
    chain: RunTimes | None = None


def make_plan(
    recipe: Recipe,
    ranks: int,
    conversations: int | None = None,
    tokens: int | None = None,
    mean_tokens: int | None = None,
    reached: Throughput | None = None,
) -> Plan:
    """Plan a run over a store of `conversations` and `tokens`.

    Without a store `data.limit` replaces the count, and `mean_tokens` (default: `data.max_length`, an upper bound) the
    length of each.

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
        plan.teacher_parameters = count_parameters(teacher.model)
        plan.teacher_parameters_used = teacher_parameters_used(teacher, recipe)
        plan.collecting = collecting_lines(recipe, teacher, ranks)
        stages = stage_lines(recipe, teacher, count, ranks)
        plan.stages = {name: total_bytes(lines) for name, lines in stages.items()}
        plan.lines = max(stages.values(), key=total_bytes)
        plan.memory = {line.name: line.bytes for line in plan.lines} | {"total": total_bytes(plan.lines)}
    plan.conversations = conversations if conversations is not None else recipe.data.limit
    if plan.conversations and teacher is not None and plan.predictor_parameters is not None:
        read = plan.conversations * (mean_tokens or recipe.data.max_length) if tokens is None else tokens
        plan.chain = estimate_times(
            recipe, teacher, plan.predictor_parameters, ranks, plan.conversations, read, reached or Throughput()
        )
    if plan.conversations:
        plan.steps, read_by = _count_steps(recipe.training, plan.conversations, ranks)
        if has_first_stage(recipe):
            plan.first_stage_steps, read_before = _count_steps(
                stage_settings(recipe.training), plan.conversations, ranks
            )
            read_by += read_before
        if tokens is not None:
            plan.tokens = round(read_by * tokens / plan.conversations)
    else:
        plan.steps = recipe.training.max_steps
    return plan


def _count_steps(settings: TrainingConfig, conversations: int, ranks: int) -> tuple[int, int]:
    """Return the optimizer steps of a stage, and the conversations that they read in all."""
    training, _ = split_validation(conversations, settings.validation_fraction, settings.seed)
    order = data_order(settings, training, ranks)
    steps = planned_steps(settings, order)
    return steps, steps * order.per_step * order.size


def check_predictor(recipe: Recipe) -> None:
    """Raise PredictorError for a transfer layer that the teacher lacks, where the teacher's config is available."""
    assert recipe.predictor is not None
    teacher, _ = skeleton(recipe.teacher)
    if teacher is not None:
        with torch.device("meta"):
            build_predictor(recipe.predictor, teacher)


def skeleton(config: TeacherConfig) -> tuple[Teacher | None, str | None]:
    """Return the teacher's modules without weights, from its config alone; or None and the reason."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from firp_cli.teacher.looped_llama import register

    register()
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        folder = _shape_folder(config.model)
        try:
            source, found = (folder, None) if folder else locate_config(config)
        except TeacherError as error:  # a known teacher that is not installed
            return None, str(error).splitlines()[0]
        try:
            found = found or AutoConfig.from_pretrained(source, local_files_only=True, **options)
        except OSError:
            shape = _shape_of(config.model)
            if not hub_reachable() and shape is None:
                return None, f"the config of {config.model} is neither in a local folder nor in the hub's cache"
            found = _hub_config(source, shape, options)
        dtype = found.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                found, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
            )
        return Teacher(model, name=config.model, looped=config.looped), None
    except FirpError:
        raise
    except Exception as error:  # the library's errors on a damaged config are of any kind
        return None, f"the config of {config.model} cannot be read: {first_line(error)}"


def _shape_of(model: str) -> str | None:
    """Return the folder of the embedded shape of a gated model on the hub, by its id; a finetuned one has its own."""
    owner, _, name = model.partition("/")
    return _shape_folder(name.lower().removesuffix("-instruct")) if owner == "meta-llama" else None


def _hub_config(source: str, shape: str | None, options: dict[str, Any]) -> Any:
    """Return a model's config from the hub; where it cannot be had, that of its embedded shape. Raises OSError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **options, local_files_only=not hub_reachable())
    except OSError:
        if shape is None:
            raise
        note_once(f"the config of {source} is not at hand: the embedded shape {Path(shape).name} stands for it")
        return AutoConfig.from_pretrained(shape)


def _shape_folder(model: str) -> str | None:
    """Return the folder of an embedded config without weights, for planning with a large model."""
    folder = embedded_folder("data") / "shapes" / model
    return str(folder) if (folder / "config.json").is_file() and not Path(model).is_dir() else None


def planned_memory(recipe: Recipe, ranks: int) -> tuple[Teacher, int, list[MemoryLine]] | None:
    """Return the teacher without weights, the predictor's parameters and a rank's memory; None without a config.

    Raises PredictorError for a transfer layer that the teacher lacks.
    """
    assert recipe.predictor is not None
    teacher, _ = skeleton(recipe.teacher)
    if teacher is None:
        return None
    with torch.device("meta"):
        predictor = build_predictor(recipe.predictor, teacher)
    parameters = count_parameters(predictor)
    return teacher, parameters, memory_lines(recipe, teacher, parameters, ranks)


def teacher_parameters_used(teacher: Teacher, recipe: Recipe) -> int:
    """Return the number of frozen parameters in a training step: from the first transfer layer on, and the head."""
    first = first_layer(recipe, teacher)
    unique = list(teacher.layers.children())
    order = teacher.looped.order if teacher.looped else range(teacher.num_layers)
    upper = sum(count_parameters(unique[number]) for number in sorted(set(order[first:])))
    return upper + count_parameters(teacher.model.get_output_embeddings())
