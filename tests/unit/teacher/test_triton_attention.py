"""Triton kernels of a decoding step's attention against dense attention under a mask made element by element.

Triton decides at its first import whether kernels are compiled or interpreted, and transformers imports it. So
`tests/integration/test_triton_interpreter.py` runs `TestKernels` in a separate process; on a CUDA device
they also run here, compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.teacher.triton_attention import MAX_SPLITS, head_block, launch_sizes, row_bits, tree_attention  # noqa: E402
from helpers.triton_offline import compile_only  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One call: `lengths` of B sequences, M `rows`, R `scratch`, Hk `heads`, G `group`, D `size`."""

    lengths: tuple[int, ...] = (37, 5)
    rows: int = 5
    scratch: int = 7
    heads: int = 1
    group: int = 2
    size: int = 128
    dtype: torch.dtype = torch.float32
    window: int | None = None
    splits: int | None = None
    longest: int | None = None
    most_m: int | None = None

    @property
    def slots(self) -> int:
        return self.scratch + max(self.lengths) + 9


BLOCK = launch_sizes(1, 1, 1, 128, 4, 1, 1).block_n  # slots of a block of the default case


@dataclass
class Inputs:
    """Tensors of a case, on the CPU; `mask` (B, M, S), row sees slot, is made element by element."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    allowed: Tensor
    positions: Tensor
    mask: Tensor


def slots_first(keys: Tensor) -> Tensor:
    """Return the same (B, H, S, D) as a view into a larger storage, NaN elsewhere; a slot's heads are adjacent."""
    batch, heads, slots, size = keys.shape
    storage = keys.new_full((slots + 3, batch, heads + 1, size + 8), float("nan"))
    view = storage[1 : slots + 1, :, 1:, :size].permute(1, 2, 0, 3)
    return view.copy_(keys)


def heads_first(keys: Tensor) -> Tensor:
    """Return the same as a view of slots [0, S) of a longer (B, H, S', D) storage, NaN after them."""
    batch, heads, slots, size = keys.shape
    return keys.new_full((batch, heads, slots + 5, size), float("nan"))[:, :, :slots].copy_(keys)


def make(case: Case) -> Inputs:
    """Return random inputs; rows see themselves and random scratch slots, some of which no row sees."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.rows)
    batch, rows = len(case.lengths), case.rows
    shape = (2, batch, case.heads, case.slots, case.size)
    keys, values = torch.randn(shape, generator=generator).to(case.dtype)
    queries = torch.randn(batch, case.heads * case.group, rows, case.size, generator=generator).to(case.dtype)
    allowed = torch.rand(batch, rows, case.scratch, generator=generator) < 0.5
    allowed &= torch.rand(batch, 1, case.scratch, generator=generator) < 0.5
    allowed |= torch.eye(rows, case.scratch, dtype=torch.bool)
    lengths = torch.tensor(case.lengths)
    positions = lengths[:, None] + torch.randint(0, 4, (batch, rows), generator=generator)
    mask = torch.zeros(batch, rows, case.slots, dtype=torch.bool)
    for b, length in enumerate(case.lengths):
        for m in range(rows):
            for s in range(case.scratch):
                mask[b, m, s] = allowed[b, m, s]
            for p in range(length):
                mask[b, m, case.scratch + p] = case.window is None or int(positions[b, m]) - p < case.window
    return Inputs(queries, keys, values, lengths, allowed, positions, mask)


def reference(inputs: Inputs) -> Tensor:
    queries, keys, values = (item.float() for item in (inputs.queries, inputs.keys, inputs.values))
    return scaled_dot_product_attention(queries, keys, values, inputs.mask[:, None], scale=0.1, enable_gqa=True)


def attend(case: Case, inputs: Inputs, layout: Callable[[Tensor], Tensor] = slots_first) -> Tensor:
    """Run the kernels with NaN in every slot that no row of its sequence sees."""
    unseen = ~inputs.mask.any(1)[:, None, :, None]
    keys, values = (layout(item.masked_fill(unseen, float("nan")).to(DEVICE)) for item in (inputs.keys, inputs.values))
    return tree_attention(
        inputs.queries.to(DEVICE),
        keys,
        values,
        inputs.lengths.to(DEVICE),
        row_bits(inputs.allowed.to(DEVICE)),
        scratch=case.scratch,
        scaling=0.1,
        longest=case.longest or max(case.lengths),
        window=case.window,
        positions=inputs.positions.to(DEVICE) if case.window is not None else None,
        splits=case.splits,
        most_m=case.most_m,
    )


def check(case: Case) -> None:
    inputs = make(case)
    got = attend(case, inputs)
    assert got.dtype == case.dtype and got.shape == inputs.queries.shape
    torch.testing.assert_close(got.cpu().float(), reference(inputs), rtol=0, atol=TOLERANCE[case.dtype])


class TestKernels:
    """Kernels on the CUDA device if there is one, else in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize("size", [64, 96, 128, 256])
    def test_groups_and_head_sizes(self, size: int, group: int) -> None:
        check(Case(size=size, group=group, heads=2, rows=3, splits=2))

    @pytest.mark.parametrize("size", [12, 16, 80])
    def test_other_head_sizes(self, size: int) -> None:
        check(Case(size=size))

    @pytest.mark.parametrize("size", [64, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, dtype: torch.dtype, size: int) -> None:
        for splits in (1, 2):
            check(Case(dtype=dtype, size=size, lengths=(90,), splits=splits))

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("lengths", [(0, 1, BLOCK - 1), (BLOCK, BLOCK + 1, 3 * BLOCK + 5), (0,), (4 * BLOCK,)])
    def test_lengths_around_a_block(self, lengths: tuple[int, ...], splits: int) -> None:
        check(Case(lengths, splits=splits))

    @pytest.mark.parametrize("splits", [1, 2, 4, 7, 40])
    def test_splits_without_slots(self, splits: int) -> None:
        check(Case((18 * BLOCK, 3, 0), splits=splits))

    def test_longest_changes_grid_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("firp_cli.teacher.triton_attention._multiprocessors", lambda _: 8)
        for longest in (37, 100, 5000):
            check(Case((37, 20), longest=longest))

    @pytest.mark.parametrize(("scratch", "rows"), [(1, 1), (7, 2), (31, 31), (32, 32), (33, 33), (45, 20), (70, 66)])
    def test_row_bits_across_words(self, scratch: int, rows: int) -> None:
        check(Case((BLOCK + 3,), scratch=scratch, rows=rows))
        check(Case((BLOCK + 3,), scratch=scratch, rows=rows, splits=3))

    @pytest.mark.parametrize("window", [1, 3, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 1000])
    def test_windows(self, window: int) -> None:
        for splits in (1, 3):
            check(Case((5 * BLOCK + 3, BLOCK, 2), window=window, splits=splits))

    def test_rows_beyond_window(self) -> None:
        """Positions need not follow the length: some rows see no prefix, one sees nearly all of it."""
        case = Case((3 * BLOCK, 3 * BLOCK), rows=2, window=8)
        inputs = make(case)
        inputs.positions = torch.tensor([[3 * BLOCK + 50, 20], [3 * BLOCK + 50, 3 * BLOCK + 60]])
        prefix = torch.arange(case.slots) - case.scratch
        inside = (prefix >= 0) & (prefix < 3 * BLOCK)
        inputs.mask[:, :, inside] = False
        inputs.mask[0, 1, inside] = prefix[inside] > 12
        for splits in (1, 4):
            got = attend(replace(case, splits=splits), inputs)
            torch.testing.assert_close(got.cpu(), reference(inputs), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("window", [None, 20])
    def test_several_tiles_of_rows(self, window: int | None) -> None:
        case = Case((30,), rows=20, scratch=24, group=4, window=window, splits=2)
        assert launch_sizes(80, 24, 30, 128, 4, 1, 1).tiles == 3
        check(case)

    @pytest.mark.parametrize("most_m", [16, 64])
    def test_other_blocks_of_rows(self, most_m: int) -> None:
        check(Case((30,), rows=20, scratch=24, group=4, dtype=torch.bfloat16, splits=2, most_m=most_m))

    def test_strided_layouts(self) -> None:
        case = Case(heads=2)
        inputs = make(case)
        expected = reference(inputs)
        together = torch.full((2, 5, 6, 3, 128), float("nan"))[:, :, 1:5, 1]  # heads of a joined projection
        apart = together.transpose(1, 2).copy_(inputs.queries)
        rows_first = inputs.queries.transpose(1, 2).contiguous().transpose(1, 2)
        for queries in (apart, rows_first, inputs.queries.contiguous()):
            for layout in (slots_first, heads_first, Tensor.contiguous):
                got = attend(case, replace(inputs, queries=queries), layout)
                assert got.transpose(1, 2).is_contiguous()
                assert got.transpose(1, 2).view(2, 5, 4 * 128).shape == (2, 5, 512)
                torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-5)

    def test_row_without_bit_sees_itself(self) -> None:
        case = Case((0,), heads=2, group=1)
        inputs = make(case)
        inputs.allowed = torch.zeros_like(inputs.allowed)
        assert torch.equal(attend(case, inputs).cpu(), inputs.values[:, :, :5])

    @pytest.mark.parametrize("splits", [1, 3])
    def test_nan_row_spoils_no_other(self, splits: int) -> None:
        case = Case((2 * BLOCK,), splits=splits)
        inputs = make(case)
        inputs.queries[0, 1, 2] = float("nan")
        spoilt = attend(case, inputs).isnan()
        assert spoilt[0, 1, 2].all() and spoilt.sum() == case.size

    def test_large_scores(self) -> None:
        case = Case(splits=2)
        inputs = make(case)
        inputs.queries *= 300
        torch.testing.assert_close(attend(case, inputs).cpu(), reference(inputs), rtol=0, atol=1e-3)

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_graph_serves_every_length(self, dtype: torch.dtype) -> None:
        """Nothing in the graph waits for the device."""
        case = Case((600, 600), heads=2, dtype=dtype, window=300, longest=600)
        inputs = make(case)
        on_device = [item.to(DEVICE) for item in (inputs.queries, inputs.keys, inputs.values, inputs.lengths)]
        allowed, positions = inputs.allowed.to(DEVICE), inputs.positions.to(DEVICE)

        def step() -> Tensor:
            return tree_attention(
                *on_device, row_bits(allowed), scratch=7, scaling=0.1, longest=600, window=300, positions=positions
            )

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
        for lengths in ((600, 600), (0, 299), (1, 431)):
            inputs = make(replace(case, lengths=lengths))
            sources = (inputs.queries, inputs.keys, inputs.values, inputs.lengths)
            for target, source in zip(on_device, sources, strict=True):
                target[tuple(map(slice, source.shape))].copy_(source)
            allowed.copy_(inputs.allowed)
            positions.copy_(inputs.positions)
            graph.replay()
            torch.testing.assert_close(output.cpu().float(), reference(inputs), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the kernels are interpreted, or compiled for the device here"
)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter accepts types that the compiler refuses. The driver here launches nothing."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, architecture)
    large = Case(dtype=torch.bfloat16, rows=40, scratch=40, most_m=64)
    for case in (Case(dtype=torch.bfloat16, window=9), Case(dtype=torch.float16, size=96), Case(), large):
        attend(replace(case, splits=2), make(case))
    assert len(loaded) == 7  # the outputs of two cases are combined by one variant


def test_row_bits_pack_columns() -> None:
    for columns in (1, 31, 32, 33, 64, 70):
        allowed = torch.rand(2, 3, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
        allowed[0, 0] = True
        words = row_bits(allowed)
        assert words.dtype == torch.int32 and words.shape == (2, 3, -(-columns // 32))
        for (b, m, word), value in zip(
            torch.cartesian_prod(*map(torch.arange, words.shape)).tolist(), words.flatten(), strict=True
        ):
            bits = allowed[b, m, 32 * word : 32 * word + 32].tolist()
            assert int(value) % 2**32 == sum(bit << j for j, bit in enumerate(bits))


@pytest.mark.parametrize("size", [12, 64, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_sizes_cover_all_rows_and_slots(itemsize: int, size: int) -> None:
    for packed in (1, 16, 17, 60, 200, 300):
        for prefix in (0, 1, 700, 100_000):
            for heads in (1, 8, 256):
                made = launch_sizes(packed, 20, prefix, size, itemsize, heads, multiprocessors=132)
                for block in (made.block_m, made.block_n):
                    assert block >= 16 and block & (block - 1) == 0
                assert (made.tiles - 1) * made.block_m < packed <= made.tiles * made.block_m
                blocks = -(-20 // made.block_n) - (-prefix // made.block_n)
                assert 1 <= made.splits <= min(blocks, MAX_SPLITS)
                rows, programs = heads * made.tiles, heads * made.tiles * made.splits
                if (made.block_m, head_block(size)) == (64, 128):  # one program a multiprocessor
                    assert programs <= max(132, rows) and (programs > 132 - rows or made.splits in (blocks, MAX_SPLITS))
                else:
                    assert programs < 2 * 132 + rows and (programs >= 2 * 132 or made.splits in (blocks, MAX_SPLITS))


def test_launch_sizes_of_llama_8b() -> None:
    """Sizes of a Llama 8B step on an H100: (block_m, block_n, tiles, splits)."""
    assert launch_sizes(4 * 8, 8, 4096, 128, 2, 8, 132) == (32, 64, 1, 33)
    assert launch_sizes(4 * 8, 8, 100, 128, 2, 8, 132) == (32, 64, 1, 3)
    assert launch_sizes(4 * 32, 32, 4096, 128, 2, 32 * 8, 132) == (32, 64, 4, 1)
    assert launch_sizes(4 * 64, 64, 512, 128, 2, 8, 132) == (64, 64, 4, 4)
