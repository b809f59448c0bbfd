"""Attention of a decoding step's rows by the kernel, with blocks of 32 and of 64 packed rows."""

from __future__ import annotations

import torch

from suite.timing import graphed, milliseconds
from suite.work import Shared, Skipped, Table, Work

ROWS = (1, 8, 16, 32, 64)
CONTEXTS = (512, 4096, 16_384)
BLOCKS = (32, 64)
POINT_SECONDS = 1.5  # seconds of one row count at one context on a GPU, compiling included
LAYERS = 16  # different caches in one timing: more than fit the device's own cache


def attention(shared: Shared, work: Work, name: str) -> None:
    """Measure milliseconds of one layer's attention over rows and contexts, batch 1."""
    if shared.device.type != "cuda":
        raise Skipped("the kernel runs on CUDA devices")
    table = Table(
        f"{name}: attention of a layer, microseconds", ["context", "rows", *(f"blocks of {m}" for m in BLOCKS)]
    )
    work.tables.append(table)
    for context in CONTEXTS:
        for rows in ROWS:
            if not work.clock.allows(POINT_SECONDS, f"{rows} rows after {context} tokens"):
                return
            found = {most: point(shared, name, context, rows, most) for most in BLOCKS}
            work.values[f"{context} tokens, {rows} rows"] = {str(most): spent for most, spent in found.items()}
            table.cells.append([str(context), str(rows), *(f"{1e3 * spent:.1f}" for spent in found.values())])
            work.key = f"{rows} rows after {context} tokens: {table.cells[-1][2]} and {table.cells[-1][3]} microseconds"
            work.save()


def point(shared: Shared, name: str, context: int, rows: int, most_m: int) -> float:
    """Return milliseconds of one layer, from a graph of several."""
    from firp_cli.teacher.triton_attention import row_bits, tree_attention

    shape, device, dtype = shared.sizes.shapes[name], shared.device, torch.bfloat16
    heads, key_heads, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    queries = torch.randn(1, heads, rows, size, device=device, dtype=dtype)
    caches = torch.randn(LAYERS, 2, 1, key_heads, rows + context, size, device=device, dtype=dtype)
    lengths = torch.tensor([context], device=device)
    bits = row_bits(torch.ones(1, rows, rows, dtype=torch.bool, device=device).tril())

    @torch.inference_mode()
    def run() -> None:
        for keys, values in caches:
            tree_attention(
                queries, keys, values, lengths, bits, scratch=rows, scaling=size**-0.5, longest=context, most_m=most_m
            )

    return milliseconds(graphed(run, device)[0], device, shared.sizes.repeats) / LAYERS
