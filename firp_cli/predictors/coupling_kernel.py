"""Children of tree nodes by a coupling, and dynamic trees of them, by kernels on a CPU: the Python side of
cpu_coupling.h.

With torch's operations a depth of a tree takes about thirty calls, most of them shorter than the call itself. Shapes: B
sequences, F nodes of one depth, N nodes of a tree, k steps, M candidates, s children of a node, d hidden size, w width
of the head, c columns of a context, P = k + 1.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from firp_cli.predictors.draft import Children, Draft
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.cpu_kernels import Matrix, PackedMatrix, watched
from firp_cli.teacher.teacher import Teacher


class _Coupling(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("node", "output")),
        *((name, c_void_p) for name in ("vocabulary", "bias")),
        *((name, c_float) for name in ("cap", "epsilon", "scale")),
        *((name, c_int64) for name in ("size", "width", "recurrent", "activated")),
    ]


class _Nodes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "nodes", "candidates", "count")),
        *((name, c_void_p) for name in ("embedded", "previous", "context", "tokens", "first")),
        *((f"{name}_stride", c_int64) for name in ("previous", "previous_row", "context", "tokens", "first")),
        *((name, c_void_p) for name in ("children", "scores", "adjusted")),
    ]


class _Drafts(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "steps", "candidates", "nodes")),
        *((name, c_void_p) for name in ("root", "tokens", "log_probs", "context", "embedding")),
        *((f"{name}_{each}", c_int64) for name in ("tokens", "log_probs", "context") for each in ("stride", "step")),
        *((name, c_void_p) for name in ("node_tokens", "parents", "depth", "paths", "ancestors", "scores")),
    ]


class CouplingKernel:
    """Kernels of a coupling that all steps share, for a teacher in float32 on a CPU.

    Args:
        node: the matrix that reads a node, (w, 2 d) for recurrent couplings, else (w, d). output: (d, w).
        scale: factor of embeddings. recurrent: the head reads the parent node's adjusted state. activated: by SiLU.
        epsilon: of the root mean square of that state.
    """

    def __init__(
        self,
        node: PackedMatrix,
        output: PackedMatrix,
        teacher: Teacher,
        scale: float,
        recurrent: bool,
        activated: bool,
        epsilon: float,
    ) -> None:
        weight, bias, cap = teacher.head_parts()
        embedding = teacher.embedding_matrix()
        self._embedding = embedding if embedding is not None and _plain(embedding) else None
        self._kept = node, output, weight, bias  # the memory that the kernels read
        address = None if bias is None else bias.data_ptr()
        sizes = (output.outputs, output.inputs, recurrent, activated)
        self._own = _Coupling(node.own, output.own, weight.data_ptr(), address, cap or 0.0, epsilon, scale, *sizes)
        library = cpu_kernels.compiled()
        self._children, self._tree = library.firp_children, library.firp_tree
        self._children.argtypes, self._children.restype = [POINTER(_Coupling), POINTER(_Nodes), c_int], None
        self._tree.argtypes, self._tree.restype = [POINTER(_Coupling), POINTER(_Drafts), c_int], None

    @staticmethod
    def serves(teacher: Teacher) -> bool:
        """Return True where the kernels can read the teacher's vocabulary matrix."""
        weight, bias, _ = teacher.head_parts()
        parts = [weight] if bias is None else [weight, bias]
        return all(map(_plain, parts))

    def takes(self, embedded: Tensor, context: Tensor) -> bool:
        """Return True where the kernel computes the children of nodes (B, F, d) in a context."""
        plain = embedded.numel() and not (embedded.requires_grad or watched())
        return bool(plain) and embedded.dtype == context.dtype == torch.float32

    def children(
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
            asked.previous = previous.data_ptr()
            asked.previous_stride, asked.previous_row_stride, _ = previous.stride()
        asked.children, asked.scores, asked.adjusted = children.data_ptr(), scores.data_ptr(), adjusted.data_ptr()
        self._children(self._own, asked, torch.get_num_threads())
        return Children(children, scores, adjusted)

    def tree(self, draft: Draft, root: Tensor, nodes: int) -> tuple[Tensor, ...] | None:
        """Return the dynamic trees of N = `nodes` nodes below root tokens (B,), as the fields of a
        `decoding.tree_build.Tree`; None where no kernel builds them.
        """
        (batch, steps, candidates), context = draft.tokens.shape, draft.context
        if self._embedding is None or context is None or context.dtype != torch.float32 or watched():
            return None
        if not 1 < nodes <= candidates + 1:
            return None
        tokens, parents, depth = root.new_empty(3, batch, nodes)
        ancestors = torch.empty(batch, nodes, nodes, dtype=torch.bool)
        paths, scores = root.new_empty(batch, nodes, steps + 1), context.new_empty(batch, nodes)
        asked = _Drafts(batch, steps, candidates, nodes)
        root = root.contiguous()
        asked.root, asked.embedding = root.data_ptr(), self._embedding.data_ptr()
        for name, part in (("tokens", draft.tokens), ("log_probs", draft.log_probs), ("context", context)):
            assert part.stride(2) == 1
            setattr(asked, name, part.data_ptr())
            setattr(asked, f"{name}_stride", part.stride(0))
            setattr(asked, f"{name}_step", part.stride(1))
        asked.node_tokens, asked.parents, asked.depth = tokens.data_ptr(), parents.data_ptr(), depth.data_ptr()
        asked.paths, asked.ancestors, asked.scores = paths.data_ptr(), ancestors.data_ptr(), scores.data_ptr()
        self._tree(self._own, asked, torch.get_num_threads())
        return tokens, parents, depth, ancestors, paths, scores


def _plain(matrix: Tensor) -> bool:
    """Return True where the kernels can read a matrix."""
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.is_contiguous()
