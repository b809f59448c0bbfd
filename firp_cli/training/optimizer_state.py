"""Weights and optimizer states of a predictor as whole float32 tensors, read from and written to a DeepSpeed engine.

ZeRO partitions them, bf16 adds a float32 copy, and each stage does so differently. A checkpoint of whole tensors does
not depend on the number of ranks, on the stage, or on DeepSpeed's own file format (a pickle). All uses of DeepSpeed's
private attributes are in this file.
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

States = dict[str, Tensor]  # `weight` and MOMENTS of one parameter, float32, in the parameter's own shape


def learning(predictor: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of those that learn."""
    return ((name, parameter) for name, parameter in predictor.named_parameters() if parameter.requires_grad)


def whole_states(engine: Any) -> Iterator[tuple[str, States]]:
    """Yield name and whole states of each parameter that learns. A collective: every rank iterates over all of them."""
    tools = importlib.import_module("deepspeed.utils")
    for name, parameter in learning(engine.module.predictor):
        if _is_partitioned(parameter):
            values = {WEIGHT: tools.safe_get_full_fp32_param(parameter)}
            values |= {key: tools.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        else:
            full = _optimized(engine, parameter)
            state = _adam(engine).state[full]
            values = {WEIGHT: full.detach(), **{key: state[key] for key in MOMENTS}}
        yield name, {key: value.detach().float().reshape(shape_of(parameter)) for key, value in values.items()}


def restore_states(engine: Any, read: Callable[[str], States], steps: float) -> None:
    """Write the states that `read(name)` returns to an engine that has taken no step. `steps`: Adam's own count."""
    tools = importlib.import_module("deepspeed.utils")
    adam = _adam(engine)
    _begin_states(engine, tools)
    with torch.no_grad():
        for name, parameter in learning(engine.module.predictor):
            values = read(name)
            if hasattr(parameter, "ds_id"):
                part = _part_of(tools.safe_get_local_fp32_param(parameter))
                tools.safe_set_local_fp32_param(parameter, part(values[WEIGHT]))
                for key in MOMENTS:
                    tools.safe_set_local_optimizer_state(parameter, part(values[key]), key)
            elif _is_partitioned(parameter):
                tools.safe_set_full_fp32_param(parameter, values[WEIGHT])
                for key in MOMENTS:
                    tools.safe_set_full_optimizer_state(parameter, values[key], key)
            else:
                full = _optimized(engine, parameter)
                full.copy_(values[WEIGHT])
                moments = {key: values[key].to(full.device, full.dtype, copy=True) for key in MOMENTS}
                adam.state[full] = {"step": torch.tensor(float(steps)), **moments}
    for state in adam.state.values():
        state["step"] = torch.tensor(float(steps))


def adam_steps(engine: Any) -> float:
    """Return Adam's count of steps. DeepSpeed's bf16 optimizer takes one before the first: it may exceed the run's."""
    return max((float(state["step"]) for state in _adam(engine).state.values() if "step" in state), default=0.0)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, also where ZeRO-3 released its storage."""
    return getattr(parameter, "ds_shape", parameter.shape)


def schedule_state(engine: Any) -> dict[str, Any]:
    """Return the state of the learning rate schedule as JSON values."""
    return {key: engine.lr_scheduler.state_dict()[key] for key in ("last_epoch", "_last_lr")}


def restore_schedule(engine: Any, schedule: dict[str, Any], step: int) -> None:
    """Set the learning rate schedule and the engine's counters to their values after optimizer step `step`."""
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict() | schedule)
    for group, rate in zip(_adam(engine).param_groups, schedule["_last_lr"], strict=True):
        group["lr"] = rate
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _adam(engine: Any) -> Any:
    """Return the torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _optimized(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Return the tensor that Adam updates: a bf16 parameter's float32 copy, else the parameter itself."""
    optimizer = engine.optimizer
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    for weights, copies in groups:
        for weight, copy in zip(weights, copies, strict=True):
            if weight is parameter:
                return copy
    return parameter


def _begin_states(engine: Any, tools: Any) -> None:
    """Create Adam's states and map each parameter to its part of them, as DeepSpeed does at the first step."""
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
    """Return a function that cuts this rank's part out of a whole tensor: flat, equal, zero-padded (ZeRO-3)."""
    size = local.numel()

    def part(whole: Tensor) -> Tensor:
        flat = whole.flatten()
        padded = torch.cat([flat, flat.new_zeros(size * world_size() - flat.numel())])
        return padded[size * rank() : size * (rank() + 1)]

    return part
