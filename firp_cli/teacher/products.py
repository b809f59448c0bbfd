"""Products of few rows with a frozen matrix: what decoding steps spend their time on.

A step's product is bound by reading the matrix. On a CPU torch's own product reads it on one core for one row, and
slowly for few: a batch of parts of the matrix runs on all cores, and a product from a copy in the order that its kernel
reads takes a few rows at little more than the price of one. Intel processors have the best such kernel in MKL, others
in oneDNN. On other devices, for other dtypes and for hundreds of rows the product is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.provenance import processor_name

Packed = Callable[[Tensor, Tensor | None], Tensor]  # rows (..., m) and a bias to the product (..., n)

NOMINAL_ROWS = 16  # what a copy is ordered for; the order is the same for other small numbers
MOST_ROWS = 256  # above, torch's own product is as fast
PROBED_ROWS = (2, 5, 24)  # row counts that a packed product is tried with
MOST_BYTES = 2 << 30  # of copies in one process: beyond, memory is worth more


class Product:
    """y = x W^T + b for frozen W (n, m): x (..., m) to y (..., n).

    Args:
        lean: False takes torch's own product always.
        wide: give float32 where W is of half precision and the device can (`widens`): sums are kept in float32 anyway,
            and rounding them makes near ties of logits equal.
    """

    copied = 0  # bytes of all copies that there are

    def __init__(self, weight: Tensor, bias: Tensor | None = None, lean: bool = True, wide: bool = False) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.inputs = self.weight.shape[1]
        self._packed: Packed | None = None
        self._parts: Tensor | None = None
        self._most = MOST_ROWS * self.inputs
        self._wide = wide and widens(weight.dtype, weight.device)
        if lean and weight.device.type == "cpu" and weight.dtype == torch.float32 and self.weight.is_contiguous():
            self._packed = _pack(self.weight)
            threads = torch.get_num_threads()
            if threads > 1 and len(self.weight) % threads == 0 and not _intel():  # MKL shares one row out itself
                self._parts = self.weight.view(threads, -1, self.inputs).transpose(1, 2)

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:  # the packed product has no gradient
            return functional.linear(hidden, self.weight, self.bias)
        if self._wide:
            product = torch.mm(hidden.reshape(-1, self.inputs), self.weight.T, out_dtype=torch.float32)
            product = product.view(*hidden.shape[:-1], len(self.weight))
            return product if self.bias is None else product.add_(self.bias)
        if hidden.numel() == self.inputs and self._parts is not None:
            rows = hidden.reshape(1, 1, -1).expand(len(self._parts), 1, -1)
            product = torch.bmm(rows, self._parts).view(*hidden.shape[:-1], len(self.weight))
            return product if self.bias is None else product + self.bias
        if self._packed is not None and self.inputs < hidden.numel() <= self._most:
            return self._packed(hidden, self.bias)
        return functional.linear(hidden, self.weight, self.bias)

    @property
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return self.weight, self.bias

    def add_to(self, target: Tensor, hidden: Tensor) -> None:
        """target (rows, n) += the product of hidden (rows, m), in place: the sum costs no operation of its own."""
        target.addmm_(hidden, self.weight.T)
        if self.bias is not None:
            target.add_(self.bias)

    def __del__(self) -> None:
        if getattr(self, "_packed", None) is not None:
            Product.copied -= self.weight.numel() * self.weight.element_size()


@cache
def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies half-precision matrices into float32 there (torch 2.8 and later, CUDA), by trying it."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    matrix = torch.full((16, 16), 1.125, dtype=dtype, device=device)
    try:
        product = torch.mm(matrix, matrix.T, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return product.dtype == torch.float32 and bool((product == 16 * 1.125**2).all())


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of many rows in bfloat16 are several times as fast there as in float32: on CUDA devices with
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


def _pack(weight: Tensor) -> Packed | None:
    """The product with a copy in a kernel's own order; None where this torch has no such kernel that is right, or
    copies have taken enough memory. The kernel depends on the processor alone, so that every run rounds alike.
    """
    size = weight.numel() * weight.element_size()
    if Product.copied + size > MOST_BYTES:
        return None
    for make in (_pack_mkl, _pack_onednn) if _intel() else (_pack_onednn,):
        try:
            packed = make(weight)
            right = packed is not None and _agrees(packed, weight)
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # a torch without these operations
            continue
        if right:
            Product.copied += size
            return packed
    return None


def _pack_mkl(weight: Tensor) -> Packed | None:
    """MKL's packed product. Its order does not depend on the number of rows, which `_agrees` makes sure of."""
    if not torch.backends.mkl.is_available():
        return None
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, NOMINAL_ROWS)
    inputs = weight.shape[1]

    def product(hidden: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkl._mkl_linear(hidden, packed, weight, bias, hidden.numel() // inputs)

    return product


def _pack_onednn(weight: Tensor) -> Packed | None:
    """oneDNN's product from a matrix in its block order, as torch's own compiler packs it."""
    if not torch.backends.mkldnn.is_available():
        return None
    packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, NOMINAL_ROWS)

    def product(hidden: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")

    return product


def _agrees(packed: Packed, weight: Tensor) -> bool:
    """Whether a packed product gives torch's own for few and for many rows."""
    rows = torch.linspace(-1, 1, PROBED_ROWS[-1] * weight.shape[1]).view(-1, weight.shape[1])
    expected = functional.linear(rows, weight)
    scale = expected.abs().max().clamp(min=1e-9)
    return all(
        bool((packed(rows[:count], None) - expected[:count]).abs().max() <= 1e-4 * scale) for count in PROBED_ROWS
    )


@cache
def _intel() -> bool:
    return "intel" in processor_name().lower()
