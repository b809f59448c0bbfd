"""Products of few rows in a decoding layer: torch's with the operations around them, and the kernels that do both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from suite.sizes import Shape
from suite.timing import graphed, milliseconds
from suite.work import Shared, Skipped, Table, Work

ROWS = (1, 32, 64)
APART = 1 << 28  # bytes of different matrices in one timing: more than fit a cache
EPSILON = 1e-5
POINT_SECONDS = 5.0  # seconds of one matrix with all tiles and rows on a GPU, compiling included
TILES = ((32, 256, 6, 4), (32, 128, 6, 4), (64, 128, 4, 4), (16, 512, 4, 4))
GATED_TILES = ((32, 128, 5, 4), (64, 64, 5, 4), (64, 128, 4, 8))
PackedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, matrix, residual


@dataclass(frozen=True)
class Matrix:
    """A product of a layer: (N, K), twice N if `gated`; after a norm, or added to the residual rows."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False
    added: bool = False

    @property
    def weights(self) -> int:
        return self.outputs * (2 if self.gated else 1)


def matrices(shape: Shape) -> list[Matrix]:
    """Return the products of a layer of a shape."""
    size, feed, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    return [
        Matrix("queries, keys, values", queries + 2 * keys, size),
        Matrix("output", size, queries, added=True),
        Matrix("gate, up", feed, size, gated=True),
        Matrix("down", size, feed, added=True),
    ]


def library(matrix: Matrix, norm: Tensor) -> PackedLinear:
    """Return torch's operations, and the kernel for the gate."""
    from firp_cli.teacher.triton_layer import silu_product

    def run(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if matrix.added:
            return residual.addmm_(rows, weight.T)
        product = functional.linear(functional.rms_norm(rows, (matrix.inputs,), norm, EPSILON), weight)
        return silu_product(product) if matrix.gated else product

    return run


def kernel(matrix: Matrix, norm: Tensor, following: Tensor, hidden: Tensor, tiles: Any) -> PackedLinear:
    """Return the kernel with given tiles, on rows that the previous kernel has prepared."""
    from firp_cli.teacher.triton_products import add_product, normed_product, prepare

    prepared = prepare(hidden, norm)

    def run(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if matrix.added:
            add_product(rows, weight, None, residual, following, tiles)
            return residual
        return normed_product(prepared, weight, None, EPSILON, matrix.gated, tiles)

    return run


def products(shared: Shared, work: Work, name: str) -> None:
    """Measure milliseconds of each product of a shape, by torch and by the kernel with several tiles, over the rows."""
    if shared.device.type != "cuda":
        raise Skipped("the kernel runs on CUDA devices")
    from firp_cli.teacher.triton_products import Tiles

    headers = ["product", "rows", "at the copy's rate", "torch", "kernel: tiles", "off by"]
    table = Table(f"{name}: products of few rows, microseconds (norm, gate and residual included)", headers)
    work.tables.append(table)
    rate = shared.found.get("bytes_per_second")
    for matrix in matrices(shared.sizes.shapes[name]):
        if not work.clock.allows(POINT_SECONDS, matrix.name):
            break
        for rows in ROWS:
            wanted = [Tiles(*sizes) for sizes in (GATED_TILES if matrix.gated else TILES)]
            found = one(shared, matrix, rows, wanted)
            floor = 1e3 * matrix.weights * matrix.inputs * 2 / rate if rate else None
            work.values[f"{matrix.name}, {rows} rows"] = found | {"floor_milliseconds": floor}
            tried = [f"{label} {1e3 * value:.1f}" for label, value in found["kernel"].items() if value]
            cells = [f"{1e3 * value:.1f}" if value else "-" for value in (floor, found["torch"])]
            table.cells.append([matrix.name, str(rows), *cells, "; ".join(tried), f"{found['difference']:.2g}"])
            work.save()
        shared.free()
    work.key = f"{len(table.cells)} products"


def one(shared: Shared, matrix: Matrix, rows: int, wanted: list[Any]) -> dict[str, Any]:
    """Return times of one product, and the error of the kernel against torch, relative to the largest value."""
    device, dtype = shared.device, torch.bfloat16
    torch.manual_seed(rows)
    count = max(2, APART // (2 * matrix.weights * matrix.inputs))
    scale = matrix.inputs**-0.5
    weights = [
        torch.randn(matrix.weights, matrix.inputs, device=device).mul_(scale).to(dtype) for _ in range(min(count, 64))
    ]
    hidden = torch.randn(rows, matrix.inputs, device=device).to(dtype)
    residual = torch.randn(rows, matrix.outputs, device=device).to(dtype)
    norm, following = (torch.rand(size, device=device).add_(0.5).to(dtype) for size in (matrix.inputs, matrix.outputs))
    plain = library(matrix, norm)
    expected = plain(hidden, weights[0], residual.clone()).float()
    values: dict[str, Any] = {"torch": timed(shared, plain, hidden, weights, residual.clone())}
    values |= {"kernel": {}, "difference": 0.0}
    for tiles in wanted:
        label, run = "x".join(map(str, tiles)), kernel(matrix, norm, following, hidden, tiles)
        try:
            got = run(hidden, weights[0], residual.clone()).float()
        except Exception as error:  # tiles that do not fit a device's shared memory
            values["kernel"][label], values[f"{label} error"] = None, str(error).partition("\n")[0][:120]
            continue
        off = ((got - expected).abs().max() / expected.abs().max()).item()
        values["difference"] = max(values["difference"], off)
        values["kernel"][label] = timed(shared, run, hidden, weights, residual.clone())
    return values


def timed(shared: Shared, run: PackedLinear, hidden: Tensor, weights: list[Tensor], residual: Tensor) -> float:
    """Return milliseconds of a call, from a graph that goes through all matrices."""

    @torch.inference_mode()
    def every() -> None:
        for weight in weights:
            run(hidden, weight, residual)

    graph = graphed(every, shared.device)
    graph = graph[0] if isinstance(graph, tuple) else graph
    return milliseconds(graph, shared.device, shared.sizes.repeats) / len(weights)
