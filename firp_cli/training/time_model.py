"""Estimates from the shapes alone: the store's disk space in every dtype, the hours of collecting and of training.

Hours are floating-point operations divided by ranks * peak * utilisation. The utilisations are assumptions: replace
them by measured ones. That attention sees half of a conversation on average is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from firp_cli.config import Recipe
from firp_cli.store.reader import FLOATS, SCALED, bytes_per_token
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.draft_states import DTYPE
from firp_cli.training.first_stage import coupling_shapes, has_first_stage, loss_tokens, stage_recipe
from firp_cli.training.memory_model import count_parameters

PEAK_FLOPS = 989e12  # an H100's, bfloat16, dense
UTILISATION = 0.35  # share of the peak, in forwards over whole conversations and in training
ANSWER_UTILISATION = 0.05  # share of the peak, while the teacher generates answers token by token


@dataclass(frozen=True)
class Throughput:
    """Peak operations per second of a device, and the shares of it that are reached."""

    peak_flops: float = PEAK_FLOPS
    utilisation: float = UTILISATION
    answer_utilisation: float = ANSWER_UTILISATION


@dataclass(frozen=True)
class RunTimes:
    """`tokens` of all conversations; `disk` in bytes by store dtype; operations and hours by stage of the run.

    `draft_states`: bytes of the draft states that a first stage keeps until its end.
    """

    conversations: int
    tokens: int
    disk: dict[str, int]
    flops: dict[str, float]
    hours: dict[str, float]
    draft_states: int = 0


def estimate_times(
    recipe: Recipe, teacher: Teacher, parameters: int, ranks: int, conversations: int, tokens: int, reached: Throughput
) -> RunTimes:
    """Estimate collecting and training on `conversations` with `tokens` in all.

    Args:
        parameters: number of parameters of the predictor.
        reached: by each of `ranks` devices.
    """
    assert recipe.predictor is not None
    layers = len(recipe.predictor.required_layers(teacher))
    disk = {name: tokens * bytes_per_token(teacher.hidden_size, layers, name) for name in (*FLOATS, *SCALED)}
    flops = {
        "answers": answer_flops(recipe, teacher, conversations),
        "states": tokens * forward_flops(teacher, 0, tokens / max(1, conversations)),
    }
    if has_first_stage(recipe):
        flops["first stage"] = _first_stage_flops(recipe, teacher, parameters, conversations, tokens)
    flops["training"] = _training_flops(recipe, teacher, parameters, conversations, tokens)
    shares = {"answers": reached.answer_utilisation}
    hours = {
        name: count / (ranks * reached.peak_flops * shares.get(name, reached.utilisation)) / 3600
        for name, count in flops.items()
    }
    return RunTimes(conversations, tokens, disk, flops, hours, _kept_bytes(recipe, teacher, conversations, tokens))


def forward_flops(teacher: Teacher, first: int, length: float) -> float:
    """Return the operations of one token of a conversation of `length` in the layers from `first` on.

    Two for each weight, and in each layer four for each of length / 2 positions and each feature of the heads.
    """
    unique = list(teacher.layers.children())
    order = teacher.looped.order if teacher.looped else range(teacher.num_layers)
    weights = sum(count_parameters(unique[number]) for number in order[first:])
    return 2 * weights + 2 * length * teacher.query_size * (teacher.num_layers - first)


def answer_flops(recipe: Recipe, teacher: Teacher, answers: int) -> float:
    """Return the operations of answers that the teacher writes, each of `data.max_new_tokens`; 0 for given ones."""
    if not recipe.data.regenerate:
        return 0.0
    head = count_parameters(teacher.model.get_output_embeddings())
    each = forward_flops(teacher, 0, recipe.data.max_length) + 2 * head
    return answers * recipe.data.max_new_tokens * each


def _training_flops(recipe: Recipe, teacher: Teacher, parameters: int, conversations: int, tokens: int) -> float:
    """Return the operations of all epochs, without those of a first stage; 0 if `max_steps` is 0.

    Real rows run forward, from the first transfer layer on. The backward pass of a pseudo row costs as much as the
    forward in frozen layers and twice as much in its map. A draft passes the head three times: forward, backward, and
    as the teacher's own row.
    """
    assert recipe.predictor is not None
    if recipe.training.max_steps == 0:
        return 0.0
    transfers, steps = recipe.predictor.transfer_layers, _steps(recipe, teacher)
    length = tokens / max(1, conversations)
    anchors = min(float(recipe.training.anchors_per_sequence), length)
    head = loss_tokens(recipe.training, teacher) * teacher.hidden_size
    others, coupled = _weights_run(recipe, teacher, parameters)
    per_anchor = 6.0 * (head * steps + others + coupled)
    per_anchor += sum(2 * forward_flops(teacher, layer, length) for layer in transfers)
    real = forward_flops(teacher, transfers[0], length) if transfers else 0.0
    return recipe.training.epochs * (tokens * real + conversations * anchors * per_anchor)


def _first_stage_flops(recipe: Recipe, teacher: Teacher, parameters: int, conversations: int, tokens: int) -> float:
    """Return the operations of a first stage.

    The draft states are computed once: real rows and pseudo rows forward. In every epoch the coupling and the S tokens
    of the loss run forward and backward, and S tokens of the teacher's own row forward.
    """
    assert recipe.predictor is not None
    stage, transfers = stage_recipe(recipe).training, recipe.predictor.transfer_layers
    length = tokens / max(1, conversations)
    anchors = conversations * min(float(stage.anchors_per_sequence), length)
    others, coupled = _weights_run(recipe, teacher, parameters)
    frozen = anchors * (2.0 * others + sum(forward_flops(teacher, layer, length) for layer in transfers))
    frozen += tokens * forward_flops(teacher, transfers[0], length) if transfers else 0.0
    scored = _steps(recipe, teacher) * loss_tokens(stage, teacher) * teacher.hidden_size
    forwards = 1 if _keeps(recipe) else stage.epochs
    return forwards * frozen + stage.epochs * anchors * 6.0 * (coupled + scored)


def _kept_bytes(recipe: Recipe, teacher: Teacher, conversations: int, tokens: int) -> int:
    """Return the bytes of the draft states that a first stage keeps: conversations * anchors * k * d * 2."""
    if not has_first_stage(recipe) or not _keeps(recipe):
        return 0
    anchors = min(float(recipe.training.coupling.anchors_per_sequence), tokens / max(1, conversations))
    return round(conversations * anchors * _steps(recipe, teacher) * teacher.hidden_size * DTYPE.itemsize)


def _keeps(recipe: Recipe) -> bool:
    """Return False where a first stage computes its draft states in every epoch: all ranks must run each forward."""
    return recipe.teacher.sharding != "zero3"


def _steps(recipe: Recipe, teacher: Teacher) -> int:
    assert recipe.predictor is not None
    steps = len(recipe.predictor.transfer_layers) or int(getattr(recipe.predictor, "steps", 0))
    return steps or len(recipe.predictor.required_layers(teacher))


def _weights_run(recipe: Recipe, teacher: Teacher, parameters: int) -> tuple[int, int]:
    """Return the weights that one anchor reads without the coupling, and in it: a shared head runs for every step."""
    coupling = coupling_shapes(recipe, teacher)
    if coupling is None:
        return parameters, 0
    whole, biases = count_parameters(coupling), coupling.bias.numel()
    return parameters - whole, (whole - biases) * (_steps(recipe, teacher) if coupling.shared else 1)
