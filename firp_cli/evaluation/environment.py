"""Environment of a measurement: machine, versions, threads and device."""

from __future__ import annotations

import os
from typing import Any

import torch

from firp_cli.machine import processor_name, processor_state, query_gpus
from firp_cli.provenance import environment
from firp_cli.teacher.attention import choose_backend
from firp_cli.teacher.teacher import Teacher

# fields of nvidia-smi, by the names that a report gives them
GPU_FIELDS = {
    "driver": "driver_version",
    "sm_megahertz": "clocks.sm",
    "sm_megahertz_max": "clocks.max.sm",
    "memory_megahertz": "clocks.mem",
    "memory_megahertz_max": "clocks.max.mem",
    "power_limit_watts": "power.limit",
    "power_watts": "power.draw",
    "temperature_celsius": "temperature.gpu",
}


def measurement_environment(teacher: Teacher) -> dict[str, Any]:
    """Return `provenance.environment` with threads, layer backend, load of the machine and clocks of its cores; on CUDA
    devices also their name and number, the versions of driver, CUDA and NCCL, clocks and power.

    Clocks and load are those of this moment. Values that the system does not tell are left out.
    """
    values = environment()
    values["torch_threads"] = torch.get_num_threads()
    values["layers"] = teacher.stack.name
    if hasattr(os, "getloadavg"):
        values["load"] = [round(load, 2) for load in os.getloadavg()]  # over 1, 5 and 15 minutes
    if state := processor_state():
        values["processor_state"] = state
    if teacher.device.type == "cuda":
        values["device_name"] = torch.cuda.get_device_name(teacher.device)
        values["devices"] = torch.cuda.device_count()
        values["cuda"] = torch.version.cuda
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            values["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if state := device_state(teacher.device):
            values |= {name: state.pop(name) for name in ("driver",) if name in state}
            values["device_state"] = state
    return values


def machine_line(values: dict[str, Any]) -> str:
    """Return device or processor, driver and clock of a measurement's environment, as far as they are known."""
    state, unit = values.get("device_state") or values.get("processor_state") or {}, ""
    clock, most = (state.get(f"sm_{name}", state.get(name)) for name in ("megahertz", "megahertz_max"))
    if isinstance(clock, (int, float)):
        unit = f"{clock:g} of {most:g} MHz" if isinstance(most, (int, float)) else f"{clock:g} MHz"
    driver = f"driver {values['driver']}" if values.get("driver") else ""
    return ", ".join(part for part in (values.get("device_name") or values.get("processor"), driver, unit) if part)


def device_state(device: torch.device) -> dict[str, Any]:
    """Return driver version, clocks, power and temperature of a CUDA device at this moment; empty on other devices."""
    if device.type != "cuda":
        return {}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return read_gpu(f"GPU-{uuid}") if uuid else {}


def read_gpu(name: str) -> dict[str, Any]:
    """Return what nvidia-smi tells about the device of that number or UUID; empty where it does not answer."""
    rows = query_gpus(list(GPU_FIELDS.values()), [name])
    values = dict(zip(GPU_FIELDS, rows[0], strict=True)) if rows else {}
    known = {key: text for key, text in values.items() if text and text[0] not in "[N"}  # [N/A], N/A, [Not Supported]
    return {key: text if key == "driver" else _number(text) for key, text in known.items()}


def _number(text: str) -> float | str:
    try:
        return round(float(text), 1)
    except ValueError:
        return text


def machine_key(teacher: Teacher, attention: str = "auto", graphs: bool = True) -> dict[str, Any]:
    """Return the properties that must be equal for a time measured here to be valid: device, threads, dtype, torch."""
    device = teacher.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "cores": None if cuda else os.cpu_count(),
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "layers": teacher.stack.name,
        "attention": choose_backend(attention, device, teacher.own_masks),
        "graphs": cuda and graphs,
        "torch": torch.__version__,
    }
