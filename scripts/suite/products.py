"""A decoding layer's products of few rows: torch's with the operations around them, and the kernel that does both."""

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

ROWS = (1, 16, 64)
APART = 1 << 28  # bytes of different matrices that a timing goes through: more than a cache holds
EPSILON = 1e-5
POINT_SECONDS = 6.0  # of one matrix with all tiles and rows on a GPU, compiling included
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, matrix, residual


@dataclass(frozen=True)
class Matrix:
    """A product of a layer: (N, K), twice N if `gated`; a norm ahead of it; its result added to the residual rows."""

    name: str
    outputs: int
    inputs: int
    norm: bool = False
    gated: bool = False
    added: bool = False

    @property
    def weights(self) -> int:
        return self.outputs * (2 if self.gated else 1)


def matrices(shape: Shape) -> list[Matrix]:
    """The products of a layer of a shape, and the head's."""
    size, feed, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    return [
        Matrix("queries, keys, values", queries + 2 * keys, size, norm=True),
        Matrix("output", size, queries, added=True),
        Matrix("gate, up", feed, size, norm=True, gated=True),
        Matrix("down", size, feed, added=True),
        Matrix("head", shape["vocab_size"], size),
    ]


def library(matrix: Matrix, norm: Tensor) -> Product:
    """torch's operations."""

    def run(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if matrix.norm:
            rows = functional.rms_norm(rows, (matrix.inputs,), norm, EPSILON)
        if matrix.added:
            return residual.addmm_(rows, weight.T)
        product = functional.linear(rows, weight)
        if matrix.gated:
            gate, up = product.chunk(2, dim=-1)
            product = functional.silu(gate) * up
        return product

    return run


def kernel(matrix: Matrix, norm: Tensor, tiles: Any) -> Product:
    """The kernel with given tiles."""
    from firp_cli.teacher.row_products import row_product

    def run(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        before = (norm, EPSILON) if matrix.norm else None
        onto = residual if matrix.added else None
        return row_product(rows, weight, norm=before, gated=matrix.gated, onto=onto, tiles=tiles)

    return run


def products(shared: Shared, work: Work, name: str) -> None:
    """Milliseconds of each product of a shape, by torch and by the kernel with several tiles, over the rows."""
    if shared.device.type != "cuda":
        raise Skipped("the kernel runs on CUDA devices")
    from firp_cli.teacher.row_products import Tiles

    wanted = [Tiles(16, 256, 4, 4), Tiles(32, 128, 5, 4), Tiles(32, 256, 4, 4), Tiles(64, 128, 4, 4)]
    headers = ["product", "rows", "at the copy's rate", "torch", *(f"{t.outputs}x{t.inputs}" for t in wanted), "off by"]
    table = Table(f"{name}: products of few rows, microseconds (norm, gate and residual included)", headers)
    work.tables.append(table)
    rate = shared.found.get("bytes_per_second")
    for matrix in matrices(shared.sizes.shapes[name]):
        if not work.clock.allows(POINT_SECONDS, matrix.name):
            break
        for rows in ROWS:
            found = one(shared, matrix, rows, wanted)
            floor = 1e3 * matrix.weights * matrix.inputs * 2 / rate if rate else None
            work.values[f"{matrix.name}, {rows} rows"] = found | {"floor_milliseconds": floor}
            times = [found["torch"], *(found[f"{t.outputs}x{t.inputs}"] for t in wanted)]
            cells = [f"{1e3 * value:.1f}" if value else "-" for value in (floor, *times)]
            table.cells.append([matrix.name, str(rows), *cells, f"{found['difference']:.2g}"])
            work.save()
        shared.free()
    work.key = f"{len(table.cells)} products"


def one(shared: Shared, matrix: Matrix, rows: int, wanted: list[Any]) -> dict[str, Any]:
    """Times of one product, and how far the kernel is from torch, relative to the largest value."""
    device, dtype = shared.device, torch.bfloat16
    torch.manual_seed(rows)
    count = max(2, APART // (2 * matrix.weights * matrix.inputs))
    scale = matrix.inputs**-0.5
    weights = [
        torch.randn(matrix.weights, matrix.inputs, device=device).mul_(scale).to(dtype) for _ in range(min(count, 64))
    ]
    hidden = torch.randn(rows, matrix.inputs, device=device).to(dtype)
    residual = torch.randn(rows, matrix.outputs, device=device).to(dtype)
    norm = torch.rand(matrix.inputs, device=device).add_(0.5).to(dtype)
    expected = library(matrix, norm)(hidden, weights[0], residual.clone()).float()
    values: dict[str, Any] = {"difference": 0.0}
    runs = {"torch": library(matrix, norm)} | {f"{t.outputs}x{t.inputs}": kernel(matrix, norm, t) for t in wanted}
    for label, run in runs.items():
        try:
            got = run(hidden, weights[0], residual.clone()).float()
        except Exception as error:  # tiles that do not fit a device's shared memory
            if label == "torch":
                raise
            values[label], values[f"{label} error"] = None, str(error).partition("\n")[0][:120]
            continue
        off = ((got - expected).abs().max() / expected.abs().max()).item()
        values["difference"] = max(values["difference"], off)
        values[label] = timed(shared, run, hidden, weights, residual)
    return values


def timed(shared: Shared, run: Product, hidden: Tensor, weights: list[Tensor], residual: Tensor) -> float:
    """Milliseconds of a call, from a graph that goes through all matrices."""

    @torch.inference_mode()
    def every() -> None:
        for weight in weights:
            run(hidden, weight, residual)

    graph = graphed(every, shared.device)
    graph = graph[0] if isinstance(graph, tuple) else graph
    spent = milliseconds(graph, shared.device, shared.sizes.repeats) / len(weights)
    residual.normal_()  # what was added again and again
    return spent
