"""Acceptance by a kernel on a CPU: the Python side of `firp_accept` in cpu_decoding.h. It finds what accept.py finds.

Shapes: B sequences, N nodes, P nodes of the longest path, A nodes with pseudo rows, k steps of the next draft, V
vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from firp_cli.decoding.accept import NextDraft, Taken
from firp_cli.decoding.tree_build import Tree
from firp_cli.predictors.draft_kernel import DraftRows
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.teacher import Teacher


class _Descent(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "nodes", "vocabulary", "longest", "steps", "anchors")),
        *((name, c_void_p) for name in ("logits", "targets", "tokens", "parents", "depth", "paths", "anchored")),
        *((name, c_int64) for name in ("logits_stride", "paths_stride", "paths_row")),
        *((name, c_int64) for name in ("anchor_rows", "step_rows", "row_stride")),
        *((name, c_void_p) for name in ("root", "row", "kept", "path", "node", "picks", "ahead", "floor")),
    ]


class Descended(NamedTuple):
    """The rows that a step keeps, and those of its next draft, if it makes one."""

    taken: Taken
    rows: DraftRows | None


class AcceptKernel:
    """Kernel of a step's acceptance. Its results are overwritten by the next step of the same shape.

    Args:
        root: (B or more,) the next roots are written there. row: (B or more, 1 + P or more) counts and emitted tokens.
    """

    def __init__(self, root: Tensor, row: Tensor) -> None:
        self._root, self._row = root, row
        self._made: dict[tuple[int, ...], tuple[_Descent, Descended, dict[str, Tensor]]] = {}
        self._accept = cpu_kernels.compiled().firp_accept
        self._accept.argtypes, self._accept.restype = [POINTER(_Descent), c_int], None

    @staticmethod
    def serves(teacher: Teacher) -> bool:
        """Return True where the kernel reads the teacher's logits."""
        return teacher.device.type == "cpu" and cpu_kernels.missing() is None

    def __call__(
        self,
        tree: Tree,
        chosen: Tensor,
        depth: int,
        anchors: Tensor | None,
        steps: int,
        strides: tuple[int, int],
    ) -> Descended:
        """Accept a path and find the rows of a next draft of `steps` steps. Writes root and row.

        Args:
            chosen: float32 logits (B, N, V), whose largest are the targets, or the targets (B, N).
            depth: of the deepest tree. anchors, strides: see `accept.next_draft`.
        """
        batch, nodes = tree.tokens.shape
        width = 0 if anchors is None else anchors.shape[1]
        descent, descended, written = self._prepared(batch, nodes, min(depth + 1, nodes), steps, width, *strides)
        if chosen.dim() == 3:
            assert chosen.dtype == torch.float32 and chosen.stride(2) == 1 and chosen.stride(1) == chosen.shape[2]
            descent.logits, descent.logits_stride, descent.vocabulary = chosen.data_ptr(), *chosen.stride()[:2]
        else:
            descent.logits = None
            written["targets"].copy_(chosen)
        parts = tree.tokens.contiguous(), tree.parents.contiguous(), tree.depth.contiguous()
        descent.tokens, descent.parents, descent.depth = (part.data_ptr() for part in parts)
        assert tree.paths.stride(2) == 1
        descent.paths, (descent.paths_stride, descent.paths_row, _) = tree.paths.data_ptr(), tree.paths.stride()
        if anchors is not None:
            anchors = anchors.contiguous()
            descent.anchored = anchors.data_ptr()
        self._accept(descent, torch.get_num_threads())
        return descended

    def _prepared(
        self, batch: int, nodes: int, longest: int, steps: int, anchors: int, anchor_rows: int, step_rows: int
    ) -> tuple[_Descent, Descended, dict[str, Tensor]]:
        """Return arguments and results of such steps, and all memory that is written; they are made once."""
        key = (batch, nodes, longest, steps, anchors, anchor_rows, step_rows)
        if key not in self._made:
            kept, node, targets = (torch.zeros(batch, *size, dtype=torch.long) for size in ((), (), (nodes,)))
            path, picks, ahead = (torch.zeros(batch, size, dtype=torch.long) for size in (longest, steps, steps))
            floor = torch.zeros(batch, steps)
            descent = _Descent(batch, nodes, 0, longest, steps, anchors)
            descent.anchor_rows, descent.step_rows, descent.row_stride = anchor_rows, step_rows, self._row.stride(0)
            written = {"targets": targets, "kept": kept, "path": path, "node": node, "picks": picks, "ahead": ahead}
            written |= {"floor": floor, "root": self._root, "row": self._row}
            for name, part in written.items():
                setattr(descent, name, part.data_ptr())
            following = NextDraft(node, picks, floor if anchors else None) if steps else None
            rows = DraftRows(node, picks, ahead, floor) if steps else None
            self._made[key] = descent, Descended(Taken(kept, path, following), rows), written
        return self._made[key]
