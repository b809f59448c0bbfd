"""A predictor's weights and optimizer states as whole float32 tensors, whatever DeepSpeed made of them.

ZeRO cuts them up, bf16 keeps a second copy, and each stage in a way of its own. A checkpoint that holds them whole does
not depend on the number of ranks, on the stage, or on DeepSpeed's own file format (a pickle).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.machine import rank, world_size

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
WEIGHT = "weight"

Whole = dict[str, Tensor]  # `weight` and MOMENTS of one parameter, float32, in the parameter's own shape


def whole_states(engine: Any) -> Iterator[tuple[str, Whole]]:
    """Each parameter's name and whole states, one parameter at a time. A collective: every rank goes through all."""
    tools = importlib.import_module("deepspeed.utils")
    for name, parameter in engine.module.predictor.named_parameters():
        if _cut_up(parameter):
            values = {WEIGHT: tools.safe_get_full_fp32_param(parameter)}
            values |= {key: tools.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        else:
            held = _holder(engine, parameter)
            state = _adam(engine).state[held]
            values = {WEIGHT: held.detach(), **{key: state[key] for key in MOMENTS}}
        yield name, {key: value.detach().float().reshape(shape_of(parameter)) for key, value in values.items()}


def restore_states(engine: Any, read: Callable[[str], Whole], steps: float) -> None:
    """Put the states that `read(name)` gives into an engine that has taken no step. `steps`: Adam's own count."""
    tools = importlib.import_module("deepspeed.utils")
    adam = _adam(engine)
    _begin_states(engine, tools)
    with torch.no_grad():
        for name, parameter in engine.module.predictor.named_parameters():
            values = read(name)
            if hasattr(parameter, "ds_id"):
                part = _part_of(tools.safe_get_local_fp32_param(parameter))
                tools.safe_set_local_fp32_param(parameter, part(values[WEIGHT]))
                for key in MOMENTS:
                    tools.safe_set_local_optimizer_state(parameter, part(values[key]), key)
            elif _cut_up(parameter):
                tools.safe_set_full_fp32_param(parameter, values[WEIGHT])
                for key in MOMENTS:
                    tools.safe_set_full_optimizer_state(parameter, values[key], key)
            else:
                held = _holder(engine, parameter)
                held.copy_(values[WEIGHT])
                moments = {key: values[key].to(held.device, held.dtype, copy=True) for key in MOMENTS}
                adam.state[held] = {"step": torch.tensor(float(steps)), **moments}
    for state in adam.state.values():
        state["step"] = torch.tensor(float(steps))


def adam_steps(engine: Any) -> float:
    """Adam's count of steps. DeepSpeed's bf16 optimizer takes one before the first, so it may not be the run's."""
    return max((float(state["step"]) for state in _adam(engine).state.values() if "step" in state), default=0.0)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 took its storage away."""
    return getattr(parameter, "ds_shape", parameter.shape)


def learning_rates(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's groups, whose `lr` the schedule writes."""
    return _adam(engine).param_groups


def _cut_up(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _adam(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _holder(engine: Any, parameter: nn.Parameter) -> Tensor:
    """What Adam steps in a parameter's place: its float32 copy, where the weights are bf16, else itself."""
    optimizer = engine.optimizer
    for low, full in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False):
        for one, copy in zip(low, full, strict=True):
            if one is parameter:
                return copy
    return parameter


def _begin_states(engine: Any, tools: Any) -> None:
    """What else happens at the first step: Adam makes its states, DeepSpeed finds each parameter's place in them."""
    optimizer, adam = engine.optimizer, _adam(engine)

    def begin(flat: Tensor) -> None:
        adam.state[flat] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(flat) for key in MOMENTS}}

    for flat in getattr(optimizer, "fp32_partitioned_groups_flat", ()):  # ZeRO-3
        begin(flat)
    flats = getattr(optimizer, "single_partition_of_fp32_groups", ())  # ZeRO-1 and 2
    for parameters, flat in zip(getattr(optimizer, "bit16_groups", ()), flats, strict=False):
        begin(flat)
        tools.lazy_init_hp_params_optimizer_state(parameters, flat, adam.state)


def _part_of(local: Tensor) -> Callable[[Tensor], Tensor]:
    """This rank's part of a whole tensor, as ZeRO-3 cuts it: equal flat parts, the last one filled up with zeros."""
    size = local.numel()

    def part(whole: Tensor) -> Tensor:
        flat = whole.flatten()
        filled = torch.cat([flat, flat.new_zeros(size * world_size() - flat.numel())])
        return filled[size * rank() : size * (rank() + 1)]

    return part
