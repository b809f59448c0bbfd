"""Attention under every kind of mask, and the choice of its backend.

Shapes: B sequences, M rows, S key/value slots, Hq query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.errors import TeacherError
from firp_cli.teacher.masks import LayerMask, TreeRows

BACKENDS = ("auto", "sdpa", "triton")


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: LayerMask, scaling: float | None = None) -> Tensor:
    """Attention of queries (B, Hq, M, D) over keys and values (B, Hk, S, D), Hq a multiple of Hk: (B, Hq, M, D).

    Args:
        mask: additive (B, 1, M, S), the kernel's arguments, a mask that attends by itself, or None where every row
            sees every slot.
        scaling: factor of the scores; None: 1 / sqrt(D).
    """
    if isinstance(mask, TreeRows):
        from firp_cli.teacher.triton_attention import tree_attention

        return tree_attention(
            queries,
            keys,
            values,
            mask.lengths,
            mask.bits,
            scratch=mask.scratch,
            scaling=queries.shape[-1] ** -0.5 if scaling is None else scaling,
            longest=mask.longest,
            window=mask.window,
            positions=None if mask.window is None else mask.positions,
        )
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(queries, keys, values, scaling)
    grouped = queries.shape[1] != keys.shape[1]
    if grouped and mask is not None and queries.is_cuda:
        # with a mask and grouped heads CUDA has only the unfused kernel, which stores all scores
        share = queries.shape[1] // keys.shape[1]
        keys, values, grouped = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1), False
    if grouped and queries.shape[2] == 1:  # heads that share keys become rows: the keys are read once
        shape = queries.shape
        queries = queries.reshape(shape[0], keys.shape[1], -1, shape[3])
        return functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling).reshape(shape)
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def choose_backend(name: str, device: torch.device, own_masks: str | None = None) -> str:
    """Return `sdpa` or `triton`; `auto` is the kernel on CUDA devices where Triton is installed, else torch.

    Args:
        own_masks: the reason why the teacher's layers need written-out masks, if they do: then it is `sdpa`.

    Raises TeacherError for an unknown name, or where Triton is missing or cannot run on the device or the layers.
    """
    if name not in BACKENDS:
        raise TeacherError(f"unknown attention {name!r}: choose from {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    if name == "triton" and not installed:
        raise TeacherError("attention triton needs the package triton: pip install 'firp[triton]', or attention=sdpa")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TeacherError(f"attention triton runs on CUDA devices, the teacher is on {device}: use sdpa")
    if name == "triton" and own_masks:
        raise TeacherError(f"attention triton cannot run this teacher: {own_masks}: use auto or sdpa")
    if name == "auto" and not own_masks:
        return "triton" if device.type == "cuda" and installed else "sdpa"
    return "sdpa" if name == "auto" else name
