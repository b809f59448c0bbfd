"""Environment of a measurement: machine, versions, threads and device."""

from __future__ import annotations

import os
from typing import Any

import torch

from firp_cli.machine import processor_name
from firp_cli.provenance import environment
from firp_cli.teacher.attention import choose_backend
from firp_cli.teacher.teacher import Teacher


def measurement_environment(teacher: Teacher) -> dict[str, Any]:
    """Return `provenance.environment` with threads, layer backend, device name and CUDA version from torch."""
    values = environment()
    values["torch_threads"] = torch.get_num_threads()
    values["layers"] = teacher.stack.name
    if teacher.device.type == "cuda":
        values["device_name"] = torch.cuda.get_device_name(teacher.device)
        values["cuda"] = torch.version.cuda
    return values


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
