"""Products of few rows with a frozen matrix: what decoding steps spend their time on.

A step's product is bound by reading the matrix. On a CPU torch's own product reads it on one core for one row, and
slowly for few: a batch of parts of the matrix runs on all cores, and oneDNN's product from a copy in its own block
order takes a few rows at little more than the price of one. On other devices, for other dtypes and for hundreds of
rows the product is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NOMINAL_ROWS = 16  # what a copy is ordered for; the order is the same for other small numbers
MOST_ROWS = 256  # above, torch's own product is as fast
MOST_BYTES = 2 << 30  # of copies in one process: beyond, memory is worth more


class Product:
    """y = x W^T + b for frozen W (n, m): x (..., m) to y (..., n).

    Args:
        lean: False takes torch's own product always.
    """

    copied = 0  # bytes of all copies that there are

    def __init__(self, weight: Tensor, bias: Tensor | None = None, lean: bool = True) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.inputs = self.weight.shape[1]
        self._packed: Any = None
        self._parts: Tensor | None = None
        self._most = MOST_ROWS * self.inputs
        if lean and weight.device.type == "cpu" and weight.dtype == torch.float32 and self.weight.is_contiguous():
            self._packed = _pack(self.weight)
            threads = torch.get_num_threads()
            if threads > 1 and len(self.weight) % threads == 0:
                self._parts = self.weight.view(threads, -1, self.inputs).transpose(1, 2)

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:  # the packed product has no gradient
            return functional.linear(hidden, self.weight, self.bias)
        if hidden.numel() == self.inputs and self._parts is not None:
            rows = hidden.reshape(1, 1, -1).expand(len(self._parts), 1, -1)
            product = torch.bmm(rows, self._parts).view(*hidden.shape[:-1], len(self.weight))
            return product if self.bias is None else product + self.bias
        if self._packed is not None and self.inputs < hidden.numel() <= self._most:
            return torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self.bias, "none", [], "")
        return functional.linear(hidden, self.weight, self.bias)

    def __del__(self) -> None:
        if getattr(self, "_packed", None) is not None:
            Product.copied -= self.weight.numel() * self.weight.element_size()


def _pack(weight: Tensor) -> Any:
    """The matrix in oneDNN's order, as torch's own compiler packs it; None where this torch cannot, or should not."""
    size = weight.numel() * weight.element_size()
    if not torch.backends.mkldnn.is_available() or Product.copied + size > MOST_BYTES:
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, NOMINAL_ROWS)
        row = torch.zeros(2, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise(row, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # a torch without these operations
        return None
    Product.copied += size
    return packed
