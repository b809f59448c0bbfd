"""Products of few rows with a frozen matrix, which take most of the time of a decoding step.

Reading the matrix bounds such a product. On a CPU torch's own product reads it on one core for one row, and slowly for
few rows. From a packed copy, in the order in which a kernel reads, a dozen rows take little longer than one. The kernel
is that of teacher/cpu_kernels.py, or oneDNN's where that one cannot be compiled. On other devices, for other dtypes and
for hundreds of rows the product is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.teacher.cpu_kernels import MOST_ROWS, Copy, PackedMatrix, missing, watched

NOMINAL_ROWS = 16  # rows that oneDNN's copy is ordered for; other small numbers give the same order
PROBED_ROWS = (1, 2, 5, 24)  # row counts with which a packed product is compared with torch's


class PackedLinear:
    """y = x W^T + b for frozen W (n, m): x (..., m) to y (..., n).

    Args:
        lean: pack the matrix where a kernel serves it; False always takes torch's own product.
        half: keep a packed copy in bfloat16, half the bytes: for bfloat16 values, or where rounding does not matter.
        wide: return float32 where W has half precision and the device can (`widens`). Sums are float32 in any case, and
            rounding them would make close logits equal.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, lean: bool = True, wide: bool = False, half: bool = False
    ) -> None:
        self.matrix = weight.detach(), None if bias is None else bias.detach()
        self.weight, self.bias = self.matrix
        self.inputs = self.weight.shape[1]
        self._packed: Callable[[Tensor], Tensor] | None = None
        self._parts: Tensor | None = None
        self._wide = wide and widens(weight.dtype, weight.device)
        if lean and weight.device.type == "cpu" and weight.dtype == torch.float32 and self.weight.is_contiguous():
            self._packed = _pack(self.weight, self.bias, half)
            threads = torch.get_num_threads()
            if not isinstance(self._packed, PackedMatrix) and threads > 1 and len(weight) % threads == 0:
                self._parts = self.weight.view(threads, -1, self.inputs).transpose(1, 2)

    @property
    def kernel(self) -> PackedMatrix | None:
        """The copy that this machine's own kernel reads, if there is one."""
        return self._packed if isinstance(self._packed, PackedMatrix) else None

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:  # the packed product has no gradient
            return functional.linear(hidden, self.weight, self.bias)
        if self._wide:
            product = torch.mm(hidden.reshape(-1, self.inputs), self.weight.T, out_dtype=torch.float32)
            product = product.view(*hidden.shape[:-1], len(self.weight))
            return product if self.bias is None else product.add_(self.bias)
        if hidden.numel() == self.inputs and self._parts is not None:  # torch takes one core for one row
            rows = hidden.reshape(1, 1, -1).expand(len(self._parts), 1, -1)
            product = torch.bmm(rows, self._parts).view(*hidden.shape[:-1], len(self.weight))
            return product if self.bias is None else product + self.bias
        if self._packed is not None and 0 < hidden.numel() <= MOST_ROWS * self.inputs and not watched():
            return self._packed(hidden)
        return functional.linear(hidden, self.weight, self.bias)

    def add_to(self, target: Tensor, hidden: Tensor) -> None:
        """Add the product of hidden (rows, m) to target (rows, n) in place; the sum takes no operation of its own."""
        target.addmm_(hidden, self.weight.T)
        if self.bias is not None:
            target.add_(self.bias)


@cache
def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True where torch multiplies half-precision matrices into float32 (torch 2.8, CUDA), found by trying it."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    matrix = torch.full((16, 16), 1.125, dtype=dtype, device=device)
    try:
        product = torch.mm(matrix, matrix.T, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return product.dtype == torch.float32 and bool((product == 16 * 1.125**2).all())


def fast_bfloat16(device: torch.device) -> bool:
    """Return True where products of many rows are several times as fast in bfloat16 as in float32: on CUDA devices with
    bfloat16 units, and on processors with AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities: Any = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get("amx_bf16"))
    tiles: Any = getattr(torch.cpu, "_is_amx_tile_supported", None)  # before torch.cpu.get_capabilities
    return tiles is not None and bool(tiles())


def is_bfloat16(weight: Tensor) -> bool:
    """Return True where rounding to bfloat16 changes no value of a float32 tensor."""
    return bool((weight.bfloat16().float() == weight).all())


def _pack(weight: Tensor, bias: Tensor | None, half: bool) -> Callable[[Tensor], Tensor] | None:
    """Return the product with a packed copy; None where no kernel gives torch's product, or copies have reached their
    limit of memory. The kernel depends only on the machine, so that every run rounds alike.
    """
    if not Copy.fits(weight.nbytes):
        return None
    own = missing() is None
    try:
        packed = PackedMatrix(weight, bias, half=half) if own else OneDNNMatrix(weight, bias)
        kept = weight.bfloat16().float() if own and half else weight
        return packed if _agrees(packed, kept, bias) else None
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # a torch without these operations
        return None


class OneDNNMatrix(Copy):
    """Copy of a matrix in oneDNN's block order, as torch's own compiler packs it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.nbytes)
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, NOMINAL_ROWS)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")


def _agrees(packed: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> bool:
    """Return True where a packed product equals torch's own, for few and for many rows."""
    rows = torch.linspace(-1, 1, PROBED_ROWS[-1] * weight.shape[1]).view(-1, weight.shape[1])
    expected = functional.linear(rows, weight, bias)
    scale = expected.abs().max().clamp(min=1e-9)
    return all(bool((packed(rows[:count]) - expected[:count]).abs().max() <= 1e-4 * scale) for count in PROBED_ROWS)
