"""Commit of accepted rows by the Triton kernel, against torch's.

Kernels are compiled or interpreted as in test_triton_attention.py: `tests/integration/test_triton_interpreter.py` runs
`TestCommit` in a separate process; on a CUDA device it also runs here, compiled.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher import triton_commit
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.triton_commit import commit_rows
from helpers.launches import Launches, trace_kernels
from helpers.models import generate_reference, make_predictor, random_prompts, tiny_model
from helpers.pairwise import pairwise
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SCRATCH, CAPACITY, WIDTH = 20, 24, 20


def new_caches(batch: int, size: int, dtype: torch.dtype) -> list[KVCache]:
    """Return equal caches of random rows, of batches larger than `batch`: with the kernel, and without."""
    caches = []
    for kernel in (True, False):
        device = torch.device(DEVICE)
        cache = KVCache(3, batch + 1, SCRATCH, CAPACITY, 2, size, dtype, device, spread=WIDTH, kernel=kernel)
        cache.use(batch)
        cache._store.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        caches.append(cache)
    return caches


def random_path(batch: int, rows: int, places: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending rows (B, P) and counts (B,) of 1 to P, the last one P."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(rows, generator=generator)[:places].sort().values for _ in range(batch)]
    counts = torch.randint(1, places + 1, (batch,), generator=generator)
    counts[-1] = places
    return torch.stack(picks).to(DEVICE), counts.to(DEVICE)


def assert_equal(got: KVCache, expected: KVCache, before: Tensor) -> None:
    """Compare lengths and committed rows; past them the kernel leaves what was there."""
    assert torch.equal(got.lengths, expected.lengths)
    assert not got._arrived.any()
    slots = torch.arange(got._store.shape[4], device=DEVICE)
    ends = torch.zeros(got._store.shape[2], dtype=torch.long, device=DEVICE)
    ends[: got.batch] = got.lengths + SCRATCH
    kept = (slots < ends[:, None])[:, None, :, None]
    assert torch.equal(got._store.where(kept, 0), expected._store.where(kept, 0))
    # a finished sequence's rows beyond the capacity are written too
    unused = (slots >= ends[:, None])[:, None, :, None] & (ends < SCRATCH + CAPACITY)[:, None, None, None]
    assert torch.equal(got._store.where(unused, 0), before.where(unused, 0))


class TestCommit:
    """The kernel on the CUDA device if there is one, else in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize(
        ("batch", "size", "dtype", "places"),
        pairwise([1, 3], [8, 20], [torch.float32, torch.float16, torch.bfloat16], [1, 3, 8, WIDTH]),
    )
    def test_committed_rows_are_those_of_torch(self, batch: int, size: int, dtype: torch.dtype, places: int) -> None:
        """Steps until all sequences have reached the capacity; of one row, as the root's, where the path is one row."""
        caches = new_caches(batch, size, dtype)
        for number in range(2 + CAPACITY // places):
            rows = 1 if places == 1 else SCRATCH - number % (SCRATCH - places + 1)
            path, counts = random_path(batch, rows, places, number)
            before = caches[0]._store.clone()
            for cache in caches:
                cache.begin(rows, CAPACITY)
                cache.commit(path, counts)
            assert_equal(*caches, before)
        assert caches[0].lengths[-1] == CAPACITY

    def test_path_of_any_strides(self) -> None:
        caches = new_caches(2, 8, torch.float32)
        path, counts = random_path(2, SCRATCH, 5, 3)
        for given in (path.t().contiguous().t(), torch.cat([path, path], dim=1)[:, :5], path[:1].expand(2, -1)):
            before = caches[0]._store.clone()
            for cache in caches:
                cache.begin(SCRATCH, CAPACITY)
                cache.commit(given, counts.clamp(max=4))
            assert_equal(*caches, before)

    def test_commit_launches_one_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = new_caches(2, 8, torch.float32)[0]
        path, counts = random_path(2, 4, 3, 0)
        cache.begin(4, CAPACITY)
        with Launches() as launches:
            trace_kernels(monkeypatch, launches, triton_commit, "_commit")
            cache.commit(path, counts)
        assert launches.names == ["_commit"]

    @pytest.mark.parametrize("tree", [pytest.param("static:2x1", marks=pytest.mark.nightly), "dynamic:5@2"])
    def test_the_engine_writes_what_generate_does(self, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Candidates and commits by kernels; sequences of different lengths, the first of which leaves first."""
        calls: list[int] = []
        monkeypatch.setattr(triton_commit, "commit_rows", lambda *given: (calls.append(1), commit_rows(*given))[1])
        teacher = wrap_model(copy.deepcopy(tiny_model("llama")).to(DEVICE))
        assert use_lean_layers(teacher) is None
        predictor = make_predictor(teacher, kind="firp", layer=2, steps=2).to(DEVICE)
        options = EngineOptions(attention="triton")
        engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps), options=options)
        prompts = random_prompts(2, seed=3, low=3, high=9)
        got = engine.generate(prompts, 6)
        assert [item.token_ids for item in got] == [generate_reference(teacher.model, prompt, 6) for prompt in prompts]
        assert calls

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    def test_commit_is_captured_without_sync(self) -> None:
        """The captured kernel, replayed with other rows, paths and counts, commits what torch does."""
        caches = new_caches(3, 128, torch.bfloat16)
        path, counts = random_path(3, SCRATCH, 4, 0)
        for cache in caches:
            cache.begin(SCRATCH, CAPACITY)
            cache.commit(path, counts)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                caches[0].commit(path, counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for number in range(8):
            for given, new in zip((path, counts), random_path(3, SCRATCH, 4, number), strict=True):
                given.copy_(new)
            before = caches[0]._store.clone()
            graph.replay()
            caches[1].commit(path, counts)
            assert_equal(*caches, before)


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the kernel is interpreted, or compiled for the device here"
)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernel_compiles_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile one variant for all batches, paths and steps' rows. The driver here launches nothing."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 7000 + architecture)
    sizes = [(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in (64, 128)]
    for dtype, size in sizes:
        for batch, places in ((1, 1), (1, 16), (4, 5)):
            store = torch.zeros(2, 2, batch, 2, 40, size, dtype=dtype)
            path, counts = torch.zeros(batch, places, dtype=torch.long), torch.ones(batch, dtype=torch.long)
            arrived = torch.zeros(batch, dtype=torch.int32)
            for first in (0, 15, 16):
                commit_rows(store, path, counts, counts, arrived, first, 17, 16)
    assert loaded == ["_commit"] * len(sizes)
