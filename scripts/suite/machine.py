"""Ceilings of the device: bytes per second of a copy, and the rate of a large bf16 matrix product."""

from __future__ import annotations

import torch

from suite.timing import milliseconds
from suite.work import Shared, Table, Work


def bandwidth(shared: Shared, work: Work) -> None:
    """Measure median rates of a copy (bytes read and bytes written) and of a square product of random numbers; later
    parts read `bytes_per_second`.
    """
    sizes = shared.sizes
    dtype = torch.bfloat16 if shared.device.type == "cuda" else shared.dtype
    copying, multiplying = copy(shared), product(shared, dtype)
    moved, operations = 2 * sizes.copy_bytes, 2 * sizes.matrix**3
    work.values |= {
        "copied_bytes": sizes.copy_bytes,
        "copy_milliseconds": copying,
        "bytes_per_second": moved / copying * 1e3,
        "matrix": sizes.matrix,
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "matrix_milliseconds": multiplying,
        "operations_per_second": operations / multiplying * 1e3,
    }
    shared.found["bytes_per_second"] = work.values["bytes_per_second"]
    rates = (work.values["bytes_per_second"] / 1e12, work.values["operations_per_second"] / 1e12)
    work.key = f"{rates[0]:.3f} TB/s copied, {rates[1]:.1f} TFLOP/s"
    what = [f"copy of {sizes.copy_bytes >> 20} MiB, read + written", f"{sizes.matrix} x {sizes.matrix} {dtype}"]
    cells = [[what[0], f"{rates[0]:.3f} TB/s"], [what[1], f"{rates[1]:.1f} TFLOP/s"]]
    work.tables.append(Table("Ceilings", ["", "measured"], cells))
    shared.free()


def copy(shared: Shared) -> float:
    """Return the milliseconds of a copy."""
    source = torch.empty(shared.sizes.copy_bytes // 2, dtype=torch.bfloat16, device=shared.device).normal_()
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), shared.device, shared.sizes.repeats)


def product(shared: Shared, dtype: torch.dtype) -> float:
    """Return the milliseconds of a matrix product."""
    shape = (shared.sizes.matrix, shared.sizes.matrix)
    left, right = (torch.empty(shape, device=shared.device).normal_().to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return milliseconds(lambda: torch.mm(left, right, out=out), shared.device, shared.sizes.repeats)
