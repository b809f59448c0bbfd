"""The next draft by a kernel on a CPU: the Python side of `firp_draft` in cpu_decoding.h.

With torch's operations a draft takes dozens of calls, most of them shorter than the call itself. Shapes: B sequences, R
rows, N nodes, k steps, C candidates, S tokens among which drafts are chosen, d hidden size.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from firp_cli.predictors.coupling import EPSILON, Coupling
from firp_cli.predictors.draft import Draft
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.cpu_kernels import Matrix, PackedMatrix
from firp_cli.teacher.lean_layers import LeanStack
from firp_cli.teacher.packed_linear import PackedLinear
from firp_cli.teacher.teacher import Teacher


class _Drafter(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("head", "features")),
        *((name, c_void_p) for name in ("known", "norm", "bias")),
        *((name, c_float) for name in ("cap", "norm_epsilon", "epsilon")),
        *((name, c_int64) for name in ("size", "width", "coupled", "recurrent")),
    ]


class _Next(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "steps", "candidates", "raw")),
        *((name, c_void_p) for name in ("states", "logits", "final", "floor", "picks", "ahead", "node")),
        *((f"{name}_stride", c_int64) for name in ("states", "logits", "final")),
        *((name, c_void_p) for name in ("tokens", "log_probs", "context")),
    ]


class DraftRows(NamedTuple):
    """Rows that a draft is made of: the accepted nodes (B,), the steps' rows (B, k) (None: the first k), the number of
    each from 0 (B, k), and what is added to its log-probabilities (B, k).
    """

    node: Tensor
    picks: Tensor | None
    ahead: Tensor
    floor: Tensor


class DraftKernel:
    """Kernel that drafts with the head of a teacher in float32 on a CPU.

    Args:
        head: the packed head of the tokens among which drafts are chosen. known: (S,) these tokens; None: all.
        coupling: prepared for decoding; it then reads the states alone with `features`.
    """

    def __init__(
        self,
        teacher: Teacher,
        head: PackedMatrix,
        known: Tensor | None,
        coupling: Coupling | None,
        features: PackedMatrix | None,
    ) -> None:
        assert isinstance(teacher.stack, LeanStack)
        norm, cap = teacher.stack.final_norm, teacher.head_parts()[2]
        bias = None if coupling is None else coupling.bias.detach().float().contiguous()
        self._kept = norm.weight, head, features, known, bias  # the memory that the kernel reads
        self._own = _Drafter(head.own, Matrix() if features is None else features.own)
        self._own.known, self._own.norm, self._own.bias = map(_address, (known, norm.weight, bias))
        self._own.cap, self._own.norm_epsilon, self._own.epsilon = cap or 0.0, norm.epsilon, EPSILON
        self._own.size, self._own.coupled = teacher.hidden_size, coupling is not None
        if coupling is not None:
            self._own.width, self._own.recurrent = coupling.bias.shape[1], coupling.recurrent
        self._draft = cpu_kernels.compiled().firp_draft
        self._draft.argtypes, self._draft.restype = [POINTER(_Drafter), POINTER(_Next), c_int], None

    @classmethod
    def of(
        cls, teacher: Teacher, head: PackedLinear | None, known: Tensor | None, coupling: Coupling | None
    ) -> DraftKernel | None:
        """Return the kernel for drafts of a teacher's `head` (None: its whole one); None where it does not serve."""
        stack = teacher.stack
        whole = stack.head if isinstance(stack, LeanStack) and head is None else head
        if not isinstance(stack, LeanStack) or not isinstance(whole, PackedLinear) or whole.kernel is None:
            return None
        if stack.final_norm.weight.dtype != torch.float32:
            return None
        features = None
        if coupling is not None:
            matrix = coupling.states_matrix
            features = None if matrix is None else matrix.kernel
            if not coupling.shared or (coupling.form != "low_rank" and features is None):
                return None
        return cls(teacher, whole.kernel, known, coupling, features)

    def write(
        self, draft: Draft, rows: DraftRows, states: Tensor, raw: bool, final: Tensor, logits: Tensor | None
    ) -> None:
        """Write the next draft into `draft`, contiguous tensors.

        Args:
            states: (B, R, d) that the head reads. raw: before the final norm. final: (B, N, d) normed, of the nodes.
            logits: (B, R, S) of the states, where they are known.
        """
        batch, steps, candidates = draft.tokens.shape
        asked = _Next(batch, steps, candidates)
        for name, part in (("states", states), ("logits", logits), ("final", final)):
            if part is not None:
                assert part.dtype == torch.float32 and part.stride(2) == 1 and part.stride(1) == part.shape[2]
                setattr(asked, name, part.data_ptr())
                setattr(asked, f"{name}_stride", part.stride(0))
        asked.raw, asked.floor, asked.picks = raw, rows.floor.data_ptr(), _address(rows.picks)
        asked.ahead, asked.node = rows.ahead.data_ptr(), rows.node.data_ptr()
        assert all(part.is_contiguous() for part in draft.tensors)
        asked.tokens, asked.log_probs = draft.tokens.data_ptr(), draft.log_probs.data_ptr()
        asked.context = _address(draft.context)
        self._draft(self._own, asked, torch.get_num_threads())


def _address(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()
