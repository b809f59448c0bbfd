"""Children of tree nodes by a coupling, in one kernel on a CPU: the Python side of cpu_coupling.h.

With torch's operations a depth of a tree takes about twenty calls, most of them shorter than the call itself. Shapes: B
sequences, F nodes of one depth, M candidates, s children of a node, d hidden size, w width of the head, c columns of a
context.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from firp_cli.predictors.draft import Children
from firp_cli.teacher.cpu_kernels import Matrix, PackedMatrix, compiled, watched
from firp_cli.teacher.teacher import Teacher


class _Coupling(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("node", "output")),
        *((name, c_void_p) for name in ("vocabulary", "bias")),
        *((name, c_float) for name in ("cap", "epsilon")),
        *((name, c_int64) for name in ("size", "width", "recurrent", "activated")),
    ]


class _Nodes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "nodes", "candidates", "count")),
        *((name, c_void_p) for name in ("embedded", "previous", "context", "tokens", "first")),
        *((f"{name}_stride", c_int64) for name in ("previous", "previous_row", "context", "tokens", "first")),
        *((name, c_void_p) for name in ("children", "scores", "adjusted")),
    ]


class ChildrenKernel:
    """Kernel of a coupling that all steps share, for a teacher in float32 on a CPU.

    Args:
        node: the matrix that reads a node, (w, 2 d) for recurrent couplings, else (w, d). output: (d, w).
        recurrent: the head reads the parent node's adjusted state. activated: by SiLU.
        epsilon: of the root mean square of that state.
    """

    def __init__(
        self,
        node: PackedMatrix,
        output: PackedMatrix,
        teacher: Teacher,
        recurrent: bool,
        activated: bool,
        epsilon: float,
    ) -> None:
        weight, bias, cap = teacher.head_parts()
        self._kept = node, output, weight, bias  # the memory that the kernel reads
        address = None if bias is None else bias.data_ptr()
        sizes = (output.outputs, output.inputs, recurrent, activated)
        self._own = _Coupling(node.own, output.own, weight.data_ptr(), address, cap or 0.0, epsilon, *sizes)
        self._run = compiled().firp_children
        self._run.argtypes, self._run.restype = [POINTER(_Coupling), POINTER(_Nodes), c_int], None

    @staticmethod
    def serves(teacher: Teacher) -> bool:
        """Return True where the kernel can read the teacher's vocabulary matrix."""
        weight, bias, _ = teacher.head_parts()
        parts = [weight] if bias is None else [weight, bias]
        return all(part.device.type == "cpu" and part.dtype == torch.float32 and part.is_contiguous() for part in parts)

    def takes(self, embedded: Tensor, context: Tensor) -> bool:
        """Return True where the kernel computes the children of nodes (B, F, d) in a context."""
        plain = embedded.numel() and not (embedded.requires_grad or watched())
        return bool(plain) and embedded.dtype == context.dtype == torch.float32

    def __call__(
        self, embedded: Tensor, tokens: Tensor, first: Tensor, context: Tensor, previous: Tensor | None, count: int
    ) -> Children:
        """Return the `count` most probable children of each node (B, F, s), in descending order, and the nodes'
        adjusted states (B, F, d). Arguments: see `Coupling.best_children`; `embedded` (B, F, d) the nodes' embeddings.
        """
        embedded = embedded.contiguous()
        batch, nodes, size = embedded.shape
        assert tokens.stride(1) == context.stride(1) == 1
        children, scores = tokens.new_empty(batch, nodes, count), first.new_empty(batch, nodes, count)
        adjusted = torch.empty_like(embedded)
        asked = _Nodes(batch, nodes, tokens.shape[1], count)
        asked.embedded, asked.context, asked.tokens = embedded.data_ptr(), context.data_ptr(), tokens.data_ptr()
        asked.first, asked.first_stride = first.data_ptr(), first.stride(0)
        asked.context_stride, asked.tokens_stride = context.stride(0), tokens.stride(0)
        if previous is not None:
            assert previous.stride(2) == 1 and previous.shape == (batch, nodes, size)
            asked.previous, (asked.previous_stride, asked.previous_row_stride, _) = (
                previous.data_ptr(),
                previous.stride(),
            )
        asked.children, asked.scores, asked.adjusted = children.data_ptr(), scores.data_ptr(), adjusted.data_ptr()
        self._run(self._own, asked, torch.get_num_threads())
        return Children(children, scores, adjusted)
