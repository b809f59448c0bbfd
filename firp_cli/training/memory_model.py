"""Memory of a rank, by line with its arithmetic, and the settings that make it fit a device.

Figures are for the longest conversations that `data.max_length` allows, and are upper estimates.

Letters in the arithmetic: B micro-batch, T longest conversation, A anchors, k steps, P = k*A pseudo rows, d hidden
size, f feed-forward size, V vocabulary, S tokens of the loss, m width of a coupling, w bytes of the teacher's dtype, R
ranks.

A predictor with a coupling has two stages, each with figures of its own; a run needs the larger memory of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from firp_cli.config import CouplingTraining, Recipe, TrainingConfig
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.training_masks import MASK_BUDGET
from firp_cli.training.batches import PREFETCH
from firp_cli.training.first_stage import coupling_shapes, has_first_stage, loss_tokens, stage_recipe
from firp_cli.training.objective import LIVE_LOGITS, logit_budget

SAVED_PER_ROW = (8, 4)  # elements that a decoder layer keeps of a row for the backward pass: times d, times f
PASSING_PER_ROW = (4, 3)  # elements of a row that exist at once within a layer without a backward pass: the same
COUPLED_ROW = (8, 4)  # elements of a draft that a coupling keeps for the backward pass: times d, times its width
PROCESS_BYTES = 1 << 30  # interpreter, libraries, the device's context and its allocator's unusable remainder


@dataclass(frozen=True)
class MemoryLine:
    """Memory of one kind on one rank, in `bytes`, and its arithmetic."""

    name: str
    bytes: int
    rule: str


def total_bytes(lines: list[MemoryLine]) -> int:
    """Return the peak of a rank: the memory of the ridge start is free again before gradients and activations."""
    ridge = sum(line.bytes for line in lines if line.name == RIDGE)
    permanent = sum(line.bytes for line in lines if line.name in PERMANENT)
    rest = sum(line.bytes for line in lines) - ridge - permanent
    return permanent + max(ridge, rest)


RIDGE = "ridge start"
PERMANENT = ("process", "teacher weights", "gathered teacher layer", "predictor weights")
Learning = Literal["all", "coupling", "none"]  # parameters that a stage trains


def memory_lines(recipe: Recipe, teacher: Teacher, parameters: int, ranks: int) -> list[MemoryLine]:
    """Return the memory of a rank in the stage of training that needs most.

    Args:
        teacher: with or without weights; only its shapes are read.
        parameters: number of parameters of the predictor.
    """
    return max(stage_lines(recipe, teacher, parameters, ranks).values(), key=total_bytes)


def stage_lines(recipe: Recipe, teacher: Teacher, parameters: int, ranks: int) -> dict[str, list[MemoryLine]]:
    """Return the memory of a rank by stage of training: `training`, or `first stage` and `second stage`."""
    if not has_first_stage(recipe):
        return {"training": _stage_lines(recipe, teacher, parameters, ranks)}
    second: Learning = "none" if recipe.training.max_steps == 0 else "all"
    return {
        "first stage": _stage_lines(stage_recipe(recipe), teacher, parameters, ranks, "coupling"),
        "second stage": _stage_lines(recipe, teacher, parameters, ranks, second),
    }


def _stage_lines(
    recipe: Recipe, teacher: Teacher, parameters: int, ranks: int, learning: Learning = "all"
) -> list[MemoryLine]:
    assert recipe.predictor is not None
    settings, size, width = recipe.training, teacher.hidden_size, torch.finfo(teacher.dtype).bits // 8
    batch, anchors, length = settings.micro_batch_size, settings.anchors_per_sequence, recipe.data.max_length
    transfers = recipe.predictor.transfer_layers
    required = len(recipe.predictor.required_layers(teacher))
    steps = int(getattr(recipe.predictor, "steps", required or 1))
    drafts = steps * batch * anchors
    coupling = coupling_shapes(recipe, teacher)
    trained = count_parameters(coupling) if coupling is not None and learning == "coupling" else parameters
    lines = [
        MemoryLine("process", PROCESS_BYTES, "libraries, context, allocator"),
        *_teacher_lines(recipe, teacher, ranks),
    ]
    optimizer = _optimizer(settings, parameters, ranks, trained)
    lines += [MemoryLine(name, count, rule) for name, (count, rule) in optimizer.items()]
    ahead = PREFETCH + settings.readers
    states = batch * length * size * width * (1 + required)
    lines.append(MemoryLine("states read ahead", states * ahead, f"B*T*d*w*{1 + required} * ({PREFETCH} + readers)"))
    if transfers:
        lines += _row_lines(recipe, teacher, width, learning == "all")
    if learning == "coupling":
        read = drafts * size * width * ahead
        lines.append(MemoryLine("draft states read ahead", read, f"k*B*A*d*w * ({PREFETCH} + readers)"))
        tokens = loss_tokens(settings, teacher)
        if tokens < teacher.vocab_size:
            lines.append(MemoryLine("vocabulary of the loss", tokens * size * (width + 4), "S*d*(w + 4)"))
    if coupling is not None and learning != "none":
        row = COUPLED_ROW[0] * size + COUPLED_ROW[1] * coupling.bias.shape[1]
        lines.append(MemoryLine("coupling, for backward", drafts * row * 4, "k*B*A*(8d + 4m)*4"))
    lines.append(MemoryLine("drafts, targets, gradients", 4 * drafts * size * width, "4 * k*B*A*d*w"))
    logits = min(logit_budget(steps, batch * anchors, size), batch * anchors * teacher.vocab_size)
    logits = max(logits, teacher.vocab_size) * 4 * LIVE_LOGITS
    lines.append(MemoryLine("logits of one piece", logits, f"min(budget, B*A*V) * 4 * {LIVE_LOGITS}"))
    if settings.init == "ridge" and not (has_first_stage(recipe) and learning != "coupling"):
        sums = 8 * size * size * (2 * steps + 4)
        lines.append(MemoryLine(RIDGE, sums, "8*d*d * (2*k + 4), before the first step"))
    return lines


def collecting_lines(recipe: Recipe, teacher: Teacher, ranks: int) -> list[MemoryLine]:
    """Return a rank's device memory while states are collected: its part of the teacher, and one forward."""
    assert recipe.predictor is not None
    width, tokens = torch.finfo(teacher.dtype).bits // 8, max(recipe.data.pack_tokens, recipe.data.max_length)
    size, feed = teacher.hidden_size, _feed_forward(teacher)
    kept = 1 + len(recipe.predictor.required_layers(teacher))
    return [
        MemoryLine("process", PROCESS_BYTES, "libraries, context, allocator"),
        *_weight_lines(recipe, teacher, ranks, count_parameters(teacher.model), "all layers"),
        MemoryLine(
            "rows in one layer",
            tokens * (PASSING_PER_ROW[0] * size + PASSING_PER_ROW[1] * feed) * width,
            "N*(4d + 3f)*w",
        ),
        MemoryLine("states kept", tokens * size * width * kept, f"N*d*w*{kept}, N tokens of a forward"),
    ]


def first_layer(recipe: Recipe, teacher: Teacher) -> int:
    """Return the lowest layer that training runs; L for predictors that read only the final state."""
    assert recipe.predictor is not None
    return min(recipe.predictor.transfer_layers, default=teacher.num_layers)


def loaded_parameters(recipe: Recipe, teacher: Teacher) -> tuple[int, str]:
    """Return the number of teacher parameters that training loads, and their description.

    With a store these are the layers from the first transfer layer on and the head; otherwise, and where layers run
    several times, all.
    """
    whole = count_parameters(teacher.model)
    if recipe.data.mode != "cached" or teacher.looped is not None or recipe.teacher.device_map is not None:
        return whole, "all layers"
    first = first_layer(recipe, teacher)
    upper = sum(count_parameters(layer) for layer in list(teacher.layers)[first:])
    embedding, head = teacher.model.get_input_embeddings(), teacher.model.get_output_embeddings()
    upper += count_parameters(head)
    if getattr(recipe.predictor, "coupling", None) is not None and embedding.weight is not head.weight:
        return upper + count_parameters(embedding), f"layers {first}.., embedding and head"
    return upper, f"layers {first}.. and the head"


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _teacher_lines(recipe: Recipe, teacher: Teacher, ranks: int) -> list[MemoryLine]:
    return _weight_lines(recipe, teacher, ranks, *loaded_parameters(recipe, teacher))


def _weight_lines(recipe: Recipe, teacher: Teacher, ranks: int, loaded: int, which: str) -> list[MemoryLine]:
    width = torch.finfo(teacher.dtype).bits // 8
    if recipe.teacher.sharding != "zero3":
        return [MemoryLine("teacher weights", loaded * width, f"{loaded:,} ({which}) * w")]
    parts = [*teacher.layers.children(), teacher.model.get_output_embeddings()]
    largest = max(count_parameters(part) for part in parts)
    return [
        MemoryLine("teacher weights", math.ceil(loaded / ranks) * width, f"{loaded:,} ({which}) * w / R"),
        MemoryLine("gathered teacher layer", largest * width, f"{largest:,} * w"),
    ]


def _row_lines(recipe: Recipe, teacher: Teacher, width: int, backward: bool) -> list[MemoryLine]:
    """Return the memory of the pseudo rows and of the real rows that they attend to; without a backward pass one layer
    at a time has any.
    """
    assert recipe.predictor is not None
    settings, size, layers = recipe.training, teacher.hidden_size, teacher.num_layers
    batch, anchors, length = settings.micro_batch_size, settings.anchors_per_sequence, recipe.data.max_length
    transfers = recipe.predictor.transfer_layers
    feed = _feed_forward(teacher)
    per_row = SAVED_PER_ROW[0] * size + SAVED_PER_ROW[1] * feed
    runs = sum(layers - layer for layer in transfers)
    attended, pseudo = length + len(transfers) * anchors, len(transfers) * anchors
    kept = layers - transfers[0] if backward else 1
    keys = 2 * batch * attended * size * kept * width
    passing = batch * length * (PASSING_PER_ROW[0] * size + PASSING_PER_ROW[1] * feed) * width
    windows = len({teacher.windows[layer] for layer in range(transfers[0], layers)})
    mask = min(batch * pseudo * attended * width, MASK_BUDGET) * windows
    rows = MemoryLine(
        "pseudo rows, for backward", runs * batch * anchors * per_row * width, f"{runs} layers*B*A*(8d + 4f)*w"
    )
    if not backward:
        rows = MemoryLine("pseudo rows in one layer", passing * pseudo // length, "B*P*(4d + 3f)*w")
    return [
        rows,
        MemoryLine("keys and values", keys, f"2*B*(T + P)*d * {kept} layer{'s' * (kept > 1)} * w"),
        MemoryLine("real rows in one layer", passing, "B*T*(4d + 3f)*w"),
        MemoryLine("attention mask", mask, f"min(B*P*(T + P)*w, {MASK_BUDGET >> 20} MiB)"),
    ]


def _feed_forward(teacher: Teacher) -> int:
    return int(getattr(teacher.model.config.get_text_config(), "intermediate_size", 0) or 4 * teacher.hidden_size)


def optimizer_memory(settings: TrainingConfig, parameters: int, ranks: int) -> dict[str, int]:
    """Return the bytes per rank of the predictor's weights, gradients and AdamW states.

    ZeRO 1 shards the states over the ranks, 2 also the gradients, 3 also the weights. bf16, and every stage above 0,
    adds a float32 copy to the states.
    """
    return {name: count for name, (count, _) in _optimizer(settings, parameters, ranks, parameters).items()}


def _optimizer(settings: TrainingConfig, parameters: int, ranks: int, trained: int) -> dict[str, tuple[int, str]]:
    """Return `optimizer_memory` with its arithmetic, where `trained` of the parameters learn."""
    stage = settings.zero_stage
    width = 2 if settings.precision == "bf16" else 4
    copy = 4 if settings.precision == "bf16" or stage else 0

    def shard(each: int, sharded: bool, elements: int = trained) -> tuple[int, str]:
        count = math.ceil(elements * each / ranks) if sharded else elements * each
        return count, f"{elements:,} * {each}" + (" / R" if sharded else "")

    return {
        "predictor weights": shard(width, stage >= 3, parameters),
        "predictor gradients": shard(4 if stage == 0 else width, stage >= 2),
        "optimizer states": shard(8 + copy, stage >= 1),
    }


def remedies(recipe: Recipe, teacher: Teacher, parameters: int, ranks: int, available: int) -> list[str]:
    """Return overrides that each make a rank fit `available` bytes; else one line of several; else none."""

    def fits(changed: Recipe) -> bool:
        return total_bytes(memory_lines(changed, teacher, parameters, ranks)) <= available

    single = _smaller_sizes(recipe, fits)
    for stage in range(recipe.training.zero_stage + 1, 4):
        if fits(_with(recipe, zero_stage=stage)):
            single.append(f"training.zero_stage={stage}")
            break
    sharded = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"sharding": "zero3"})})
    shardable = ranks > 1 and recipe.teacher.sharding == "none" and _allowed(sharded)
    if shardable and fits(sharded):
        single.append("teacher.sharding=zero3")
    if single:
        return single
    overrides = []
    combined = recipe
    if shardable:
        combined, overrides = sharded, ["teacher.sharding=zero3"]
    if recipe.training.zero_stage < 3 and ranks > 1:
        combined = _with(combined, zero_stage=3)
        overrides.append("training.zero_stage=3")
    if overrides and fits(combined):
        return [" ".join(overrides)]
    combined, smallest = _capped(combined, "micro_batch_size", 1)
    if smallest:
        overrides += smallest
        if fits(combined):
            return [" ".join(overrides)]
    fewer = [override for override in _smaller_sizes(combined, fits) if "anchors" in override]
    return [" ".join([*overrides, fewer[0]])] if fewer else []


def _smaller_sizes(recipe: Recipe, fits: Callable[[Recipe], bool]) -> list[str]:
    """Return the largest number of anchors and the largest micro-batch that fit, as overrides of all stages."""
    overrides = []
    for field in ("anchors_per_sequence", "micro_batch_size"):
        low, high = 0, max(getattr(section, field) for section in _sizes(recipe).values())
        while high - low > 1:  # bisection: the memory grows with the number
            middle = (low + high) // 2
            low, high = (middle, high) if fits(_capped(recipe, field, middle)[0]) else (low, middle)
        if low:
            overrides.append(" ".join(_capped(recipe, field, low)[1]))
    return overrides


def _sizes(recipe: Recipe) -> dict[str, TrainingConfig | CouplingTraining]:
    """Return the sections with the sizes of each stage, by name."""
    sections: dict[str, TrainingConfig | CouplingTraining] = {"training": recipe.training}
    if has_first_stage(recipe):
        sections["training.coupling"] = recipe.training.coupling
    return sections


def _capped(recipe: Recipe, field: str, most: int) -> tuple[Recipe, list[str]]:
    """Return the recipe with `field` of each stage at most `most`, and the overrides that do that."""
    larger = [name for name, section in _sizes(recipe).items() if getattr(section, field) > most]
    training = recipe.training
    if "training.coupling" in larger:
        training = training.model_copy(update={"coupling": training.coupling.model_copy(update={field: most})})
    if "training" in larger:
        training = training.model_copy(update={field: most})
    return recipe.model_copy(update={"training": training}), [f"{name}.{field}={most}" for name in larger]


def _allowed(changed: Recipe) -> bool:
    """Return True if the recipe is valid: a sharded teacher excludes some settings."""
    try:
        Recipe.model_validate(changed.model_dump())
    except ValueError:
        return False
    return True


def _with(recipe: Recipe, **changes: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
