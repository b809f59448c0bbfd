"""Triton kernels of a decoding step's layers against torch, and layers with these kernels against layers without.

Kernels are compiled or interpreted as in test_triton_attention.py: `tests/integration/test_triton_interpreter.py` runs
`TestKernels` and `TestLayers` in a separate process; on a CUDA device they also run here, compiled.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.draft import most_probable_tokens
from firp_cli.predictors.forward import forward_rows
from firp_cli.teacher import masks, triton_attention, triton_layer, triton_products
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.lean_layers import LeanLayer, LeanStack, RMSNorm
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.masks import AttentionMask, KernelMask, Mask
from firp_cli.teacher.packed_linear import PackedLinear, widens
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.triton_layer import rotate_and_write, silu_product
from helpers.launches import Launches, trace_kernels
from helpers.layers import new_teacher, some_ids, tolerance_of, varied
from helpers.models import FAMILIES, generate_reference, make_predictor, random_prompts, tiny_model
from helpers.pairwise import nightly_rest, pairwise
from helpers.trees import torch_accept, torch_build
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Relative to the numbers' size. The interpreter truncates numbers where the compiler rounds them.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
HIDDEN = 50


@dataclass(frozen=True)
class Case:
    """One call: B `batch`, R `rows`, Hk `heads`, G `group`, D `size`."""

    batch: int = 2
    rows: int = 3
    heads: int = 2
    group: int = 2
    size: int = 64
    dtype: torch.dtype = torch.float32
    normed: bool = False
    shared_angles: bool = False

    @property
    def joined(self) -> int:
        return self.heads * (self.group + 2)


@dataclass
class Inputs:
    joined: Tensor
    cosine: Tensor
    sine: Tensor
    hidden: Tensor
    norms: list[tuple[Tensor, float]]


def make(case: Case, device: str = DEVICE) -> Inputs:
    """Return random inputs; the angles are views of one look-up, the hidden rows the first of a larger tensor."""
    generator = torch.Generator().manual_seed(case.size + case.rows)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    looked_up = numbers(1 if case.shared_angles else case.batch, case.rows + 2, 1, 2 * case.size)[:, : case.rows]
    cosine, sine = looked_up.chunk(2, dim=-1)
    joined = numbers(case.batch, case.rows, case.joined * case.size)
    hidden = numbers(case.batch, case.rows + 1, HIDDEN)[:, : case.rows]
    norms = [(numbers(case.size), 1e-6), (numbers(case.size), 1e-2)] if case.normed else []
    return Inputs(joined, cosine, sine, hidden, norms)


def heads_first(case: Case, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    """Return slots for keys and values in the cache's layout, NaN around them."""
    shape = (2, case.batch, case.heads, case.rows + 9, case.size)
    keys, values = torch.full(shape, float("nan"), dtype=case.dtype, device=device)[:, :, :, 4 : 4 + case.rows].unbind()
    return keys, values


def slots_first(case: Case, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    """Return slots in a layout with all heads of a slot together, keys beside their values."""
    shape = (case.rows + 2, case.batch, case.heads + 1, 2, case.size + 8)
    storage = torch.full(shape, float("nan"), dtype=case.dtype, device=device)
    keys, values = storage[1 : case.rows + 1, :, 1:, :, : case.size].permute(3, 1, 2, 0, 4).unbind()
    return keys, values


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, heads, R, D) in float32, computed one head at a time."""
    parts = [part.cpu().float() for part in (inputs.joined, inputs.cosine, inputs.sine)]
    heads = parts[0].view(case.batch, case.rows, -1, case.size).unbind(2)
    cosine, sine = (part[:, :, 0] for part in parts[1:])
    query_heads, made = case.heads * case.group, []
    for number, head in enumerate(heads[: query_heads + case.heads]):
        if inputs.norms:
            weight, epsilon = inputs.norms[number >= query_heads]
            head = head / (head.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.cpu().float()
        halves = head.chunk(2, dim=-1)
        made.append(head * cosine + torch.cat([halves[1], halves[0]], dim=-1) * sine)
    made += heads[query_heads + case.heads :]
    queries, keys, values = torch.stack(made, dim=1).split([query_heads, case.heads, case.heads], dim=1)
    return queries, keys, values


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu().float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max().item()
    )


def check(case: Case, places: Callable[[Case], tuple[Tensor, Tensor]] = heads_first) -> None:
    inputs, (keys, values) = make(case), places(case)
    storage, given = keys._base, inputs.hidden.clone()
    assert storage is not None
    queries, residual = rotate_and_write(
        inputs.joined, inputs.cosine, inputs.sine, keys, values, inputs.hidden, *inputs.norms
    )
    assert queries.transpose(1, 2).is_contiguous()
    for got, expected in zip((queries, keys, values), reference(case, inputs), strict=True):
        near(got, expected, case.dtype)
    assert residual.is_contiguous()
    assert torch.equal(residual, given)
    assert residual.data_ptr() != inputs.hidden.data_ptr()
    written = storage.numel() - int(storage.isnan().sum())
    assert written == 2 * keys.numel(), "wrote outside its slots"


class TestKernels:
    """Kernels on the CUDA device if there is one, else in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize("normed", [False, True], ids=["no-norm", "normed"])
    @pytest.mark.parametrize("size", [12, 16, 64, 80, 96, 128, 256])
    def test_head_sizes(self, size: int, normed: bool) -> None:
        for layout in (heads_first, slots_first):
            check(Case(size=size, normed=normed), layout)

    @pytest.mark.parametrize("group", [1, 2, 4, 7])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_grouped_heads(self, heads: int, group: int) -> None:
        check(Case(heads=heads, group=group, normed=True))

    @pytest.mark.parametrize(("rows", "batch"), nightly_rest([(1, 3), (2, 1), (7, 3)], [1, 2, 7, 20], [1, 3]))
    def test_rows(self, rows: int, batch: int) -> None:
        check(Case(batch, rows))
        check(Case(batch, rows, shared_angles=True), slots_first)

    @dtypes
    def test_dtypes(self, dtype: torch.dtype) -> None:
        for normed in (False, True):
            check(Case(dtype=dtype, normed=normed))
            check(Case(dtype=dtype, normed=normed, size=12))

    def test_more_heads_than_hidden_parts(self) -> None:
        """There are more heads than parts of the hidden row."""
        check(Case(heads=30, group=1, size=16))

    @dtypes
    @pytest.mark.parametrize("features", [1, 64, 511, 512, 1300])
    def test_silu_product(self, features: int, dtype: torch.dtype) -> None:
        for rows in (1, 5):
            joined = torch.randn(rows, 2 * features, generator=torch.Generator().manual_seed(rows)).mul_(6).to(dtype)
            gate, up = joined.float().chunk(2, dim=-1)
            near(silu_product(joined.to(DEVICE)), functional.silu(gate) * up, dtype)

    def test_silu_product_of_extremes_equals_torch(self) -> None:
        gates = torch.tensor([0.0, -0.0, 30.0, -30.0, 90.0, -90.0, 1e4, -1e4, float("inf"), float("nan")])
        got = silu_product(torch.stack([gates, torch.ones_like(gates)]).view(1, -1).to(DEVICE)).cpu()[0]
        torch.testing.assert_close(got, functional.silu(gates), rtol=1e-5, atol=1e-12, equal_nan=True)


def new_cache(teacher: Teacher, batch: int) -> KVCache:
    shape = (teacher.num_layers, batch, 6, 40, teacher.kv_heads, teacher.head_size, teacher.dtype, teacher.device)
    return KVCache(*shape, spread=3)


def prefilled(teacher: Teacher, ids: Tensor) -> KVCache:
    """Return a cache of the first 18 positions, of which the second sequence has committed 11."""
    kv_cache, positions = new_cache(teacher, len(ids)), torch.arange(18, device=teacher.device)[None]
    kv_cache.begin_chunk(0, 18)
    slots = kv_cache.prefix_slots(18)[None]
    mask = AttentionMask(slots <= positions[:, :, None], teacher.dtype, positions, slots)
    forward_rows(teacher, teacher.embed(ids[:, :18]), positions, mask, cache=kv_cache)
    kv_cache.set_lengths(torch.tensor([18, 11], device=teacher.device)[: len(ids)])
    return kv_cache


def step_mask(kv_cache: KVCache, depth: list[int], dtype: torch.dtype, kernel: bool) -> tuple[Tensor, Mask]:
    """Return positions and mask of rows at these depths, which all see themselves and the first row."""
    device, count = kv_cache.lengths.device, len(depth)
    rows = torch.eye(count, device=device).bool()
    rows[:, 0] = True
    positions = kv_cache.lengths[:, None] + torch.tensor(depth, device=device)
    allowed = rows.expand(len(positions), -1, -1)
    if kernel:
        return positions, KernelMask(allowed, positions, kv_cache.lengths, 24)
    return positions, masks.step_mask(allowed, positions, kv_cache.lengths, kv_cache.prefix_slots(24), dtype)


@torch.no_grad()
def steps(teacher: Teacher, batch: int, kernel: bool) -> list[Tensor]:
    """Return states of a tree's real rows and pseudo states, which join at layer 2, then of one row; after each the
    whole cache.
    """
    ids, found = some_ids(batch, 21).to(teacher.device), []
    kv_cache = prefilled(teacher, ids)
    for depth, transfer in (([0, 1, 1], (2,)), ([0], ())):
        nodes, rows = len(depth), len(depth) * (1 + len(transfer))
        positions, mask = step_mask(
            kv_cache, depth + [level + 1 for level in depth * len(transfer)], teacher.dtype, kernel
        )
        kv_cache.begin(rows, 24)
        embedded = teacher.embed(ids[:, :nodes])
        given = embedded.clone()
        real, pseudo = forward_rows(
            teacher,
            embedded,
            positions,
            mask,
            transfer_layers=transfer,
            make_pseudo_states=lambda first, last, hidden: hidden if first == 0 else 0.5 * hidden,
            cache=kv_cache,
        )
        assert torch.equal(embedded, given), "the caller's rows are unchanged"
        found += [real, real if pseudo is None else pseudo, kv_cache._store.clone()]
        path = torch.tensor([[0, 2][:nodes]] * batch, device=teacher.device)
        kv_cache.commit(path, torch.tensor([2, 1], device=teacher.device)[:batch].clamp(max=nodes))
    return found


class Trace(Launches):
    """Launches of torch's operations and of the Triton kernels. An RMS norm is one kernel on CUDA devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for module, kernels in (
            (triton_products, ("_prepare", "_product")),
            (triton_layer, ("_rotate_and_write", "_silu_product")),
            (triton_attention, ("_attend", "_combine")),
        ):
            trace_kernels(monkeypatch, self, module, *kernels)
        norm = RMSNorm.__call__
        monkeypatch.setattr(RMSNorm, "__call__", lambda *given: self.counted("norm", lambda: norm(*given)))


LAYERED = [*FAMILIES, "3x4", "ouro-loops", "qwen3-loops"]
STEPS = [("llama", 2), ("qwen2", 1), ("mistral-window", 1), ("qwen3-loops", 1)]


class TestLayers:
    """Whole decoding steps through lean layers, on the CUDA device or in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize(("name", "batch"), nightly_rest(STEPS, LAYERED, [1, 2]))
    def test_steps_are_those_without_kernels(self, name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        teacher = new_teacher(name)
        teacher.model.to(DEVICE)
        assert use_lean_layers(teacher) is None
        expected = steps(teacher, batch, kernel=False)
        decoded, original = [], LeanLayer.decode
        monkeypatch.setattr(LeanLayer, "decode", lambda *given: (decoded.append(1), original(*given))[1])
        got = steps(teacher, batch, kernel=True)
        assert len(decoded) == 2 * teacher.num_layers
        tolerance = tolerance_of(teacher) if DEVICE == "cuda" else tolerance_of(teacher) / 2
        for one, other in zip(got, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())

    def test_biases_of_all_products(self) -> None:
        """Compare biases of every product, including those that are added to the residual."""
        config = copy.deepcopy(tiny_model("llama").config)
        config.attention_bias = config.mlp_bias = True
        torch.manual_seed(1)
        teacher = wrap_model(varied(type(tiny_model("llama"))(config).eval()).to(DEVICE))
        assert use_lean_layers(teacher) is None
        for got, expected in zip(steps(teacher, 2, True), steps(teacher, 2, False), strict=True):
            assert (got - expected).abs().max().item() <= 2e-5 * max(1.0, expected.abs().max().item())

    @pytest.mark.parametrize(
        ("name", "batch", "rows"), pairwise(["llama", "qwen3", "qwen2", "mistral-window"], [1, 2], [1, 4])
    )
    def test_layer_launches_ten_kernels(
        self, name: str, batch: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kernels: norm; queries, keys and values; rotation and K/V; attention (two); output and residual; norm; gate
        and up; silu x up; down and residual.
        """
        teacher = new_teacher(name)
        teacher.model.to(DEVICE)
        assert use_lean_layers(teacher) is None
        monkeypatch.setattr(triton_attention, "_multiprocessors", lambda _: 132)
        with torch.no_grad():  # in inference mode a trace shows composite operations
            ids = some_ids(batch, 21).to(DEVICE)
            kv_cache = prefilled(teacher, ids)
            kv_cache.begin(rows, 24)
            positions, mask = step_mask(kv_cache, list(range(rows)), teacher.dtype, kernel=True)
            hidden = teacher.embed(ids[:, :rows])
            rotary = teacher.rotary(hidden, positions)
            seen = mask.at(teacher.windows[1], rows)
            with Trace(monkeypatch) as trace:
                teacher.layer(1, hidden, rotary, positions, seen, kv_cache)
        products = [trace.names[number] for number in (1, 7)]  # torch chooses the operation by device
        expected = ["norm", products[0], "_rotate_and_write", "_attend", "_combine", "addmm_"]
        assert trace.names == [*expected, "norm", products[1], "_silu_product", "addmm_"]

    @pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2"])
    def test_layer_with_own_products_launches_seven_kernels(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kernels: queries, keys and values; rotation and K/V; attention (two); output; gate, up and silu; down. The
        first layer prepares its rows, later layers get them prepared.
        """
        teacher = new_teacher(name)
        teacher.model.to(DEVICE, torch.float16)
        assert use_lean_layers(teacher) is None
        teacher.stack.own_products = True  # type: ignore[attr-defined]
        monkeypatch.setattr(triton_attention, "_multiprocessors", lambda _: 132)
        with torch.no_grad():
            ids = some_ids(1, 21).to(DEVICE)
            kv_cache = prefilled(teacher, ids)
            kv_cache.begin(3, 24)
            positions, mask = step_mask(kv_cache, [0, 1, 1], teacher.dtype, kernel=True)
            hidden = teacher.embed(ids[:, :3])
            rotary, seen = teacher.rotary(hidden, positions), mask.at(None, 3)
            with Trace(monkeypatch) as trace:
                for number in (0, 1):
                    hidden = teacher.layer(number, hidden, rotary, positions, seen, kv_cache)
        layer = ["_product", "_rotate_and_write", "_attend", "_combine", *["_product"] * 3]
        assert trace.names == ["_prepare", *layer, *layer]

    def test_other_activation_runs_in_torch(self) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.GELU()
        teacher = wrap_model(model.to(DEVICE))
        assert use_lean_layers(teacher) is None
        assert isinstance(teacher.stack, LeanStack)
        assert not any(layer.in_kernels for layer in teacher.stack._layers if layer)
        for got, expected in zip(steps(teacher, 2, True), steps(teacher, 2, False), strict=True):
            assert (got - expected).abs().max().item() <= 2e-5 * max(1.0, expected.abs().max().item())

    @pytest.mark.parametrize(("family", "tree"), nightly_rest([], ["llama", "qwen3"], ["static:2x1", "dynamic:5@2"]))
    def test_the_engine_writes_what_generate_does(self, family: str, tree: str) -> None:
        """Sequences of different lengths, the first of which leaves before the other one."""
        teacher = wrap_model(copy.deepcopy(tiny_model(family)).to(DEVICE))
        assert use_lean_layers(teacher) is None
        predictor = make_predictor(teacher, kind="firp", layer=2, steps=2).to(DEVICE)
        options = EngineOptions(attention="triton")
        engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps), options=options)
        prompts = random_prompts(2, seed=3, low=3, high=9)
        got = engine.generate(prompts, 8)
        assert [item.token_ids for item in got] == [generate_reference(teacher.model, prompt, 8) for prompt in prompts]

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    @dtypes
    def test_layer_is_captured_without_sync(self, dtype: torch.dtype) -> None:
        """The captured layer, replayed with other rows and lengths, equals the eager one."""
        teacher = wrap_model(copy.deepcopy(tiny_model("qwen3")).to("cuda", dtype))
        assert use_lean_layers(teacher) is None
        with torch.inference_mode():
            ids = some_ids(2, 21).cuda()
            kv_cache = prefilled(teacher, ids)
            kv_cache.begin(4, 24)
            hidden = teacher.embed(ids[:, :4])
            positions, mask = step_mask(kv_cache, [0, 1, 1, 2], dtype, kernel=True)
            seen, rotary = mask.at(teacher.windows[1], 4), teacher.rotary(hidden, positions)
            teacher.layer(1, hidden, rotary, positions, seen, kv_cache)
            torch.cuda.set_sync_debug_mode("error")
            try:
                teacher.layer(1, hidden, rotary, positions, seen, kv_cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = teacher.layer(1, hidden, rotary, positions, seen, kv_cache)
            for seed in range(3):
                torch.manual_seed(seed)
                hidden.normal_()
                kv_cache.lengths.random_(0, 18)
                graph.replay()
                replayed = output.clone()
                torch.testing.assert_close(replayed, teacher.layer(1, hidden, rotary, positions, seen, kv_cache))


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the kernels are interpreted, or compiled for the device here"
)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile one variant for all numbers of rows. The driver here launches nothing."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 1000 + architecture)
    variants = [(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in (64, 128)]
    for dtype, size in variants:
        for batch, rows in ((1, 1), (1, 2), (1, 16), (2, 5)):
            for normed in (False, True):
                case = Case(batch, rows, size=size, dtype=dtype, normed=normed)
                inputs = make(case)
                angles, rotated = (inputs.cosine, inputs.sine), heads_first(case)
                hidden = torch.zeros(batch, rows, 64, dtype=dtype)
                rotate_and_write(inputs.joined, *angles, *rotated, hidden, *inputs.norms)
            silu_product(torch.zeros(rows, 2 * size, dtype=dtype))
    assert sorted(loaded) == sorted(["_rotate_and_write"] * 2 * len(variants) + ["_silu_product"] * len(variants))


def test_wide_head_on_cpu_keeps_dtype() -> None:
    """On a CPU a wide head returns the teacher's dtype."""
    torch.manual_seed(0)
    weight, bias, states = torch.randn(40, 16), torch.randn(40), torch.randn(2, 3, 16)
    assert not widens(torch.bfloat16, torch.device("cpu"))
    for some_bias in (None, bias.bfloat16()):
        head = PackedLinear(weight.bfloat16(), some_bias, wide=True)
        expected = functional.linear(states.bfloat16(), weight.bfloat16(), some_bias)
        assert torch.equal(head(states.bfloat16()), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_head_on_cuda_gives_float32(dtype: torch.dtype) -> None:
    assert widens(dtype, torch.device("cuda:0"))
    torch.manual_seed(0)
    weight, bias = torch.randn(4000, 256, device="cuda").to(dtype), torch.randn(4000, device="cuda").to(dtype)
    for shape in ((1, 1), (2, 5)):
        states = torch.randn(*shape, 256, device="cuda").to(dtype)
        for some_bias in (None, bias):
            logits = PackedLinear(weight, some_bias, wide=True)(states)
            exact = functional.linear(states.double(), weight.double(), None if some_bias is None else bias.double())
            assert (logits.dtype, logits.shape) == (torch.float32, (*shape, 4000))
            torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-3)
    with_gradient = states.clone().requires_grad_(True)
    PackedLinear(weight, bias, wide=True)(with_gradient).sum().backward()
    assert with_gradient.grad is not None


@pytest.mark.parametrize("section", [{"kind": "firp", "layer": 2, "steps": 2}, {"kind": "medusa", "steps": 2}])
@pytest.mark.parametrize("tree", ["static:2x1", "dynamic:4", "dynamic:4@2"])
def test_decode_step_has_the_bits_of_its_rows(
    section: dict[str, Any], tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a kernel makes the bits alone; those of the root's rows are made once."""
    for name, work in (("build_tree", torch_build), ("accept_tree", torch_accept)):
        monkeypatch.setattr(f"firp_cli.decoding.triton_tree.{name}", work)
    teacher = new_teacher("llama")
    predictor = make_predictor(teacher, **section)
    spec = parse_tree(tree, predictor.steps)
    sampler = Sampler(0.0, 1.0, 0, torch.device("cpu"))
    stepper = DecodeStep(teacher, DraftSetup.of(predictor, spec), sampler, 3, 40, kernel=True)
    stepper.cache._kernel = False
    monkeypatch.setattr(
        "firp_cli.predictors.base.most_probable_tokens", lambda *given: most_probable_tokens(*given[:2])
    )
    made: list[KernelMask] = []

    def forward(
        _: Any, real: Tensor, positions: Tensor, mask: KernelMask, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        made.append(mask)
        slots = stepper.cache.prefix_slots(mask.longest)
        dense = masks.step_mask(mask.rows, positions, mask.lengths, slots, teacher.dtype)
        return forward_rows(teacher, real, positions, dense, **given)

    monkeypatch.setattr("firp_cli.decoding.step.forward_rows", forward)
    with torch.inference_mode():
        monkeypatch.setattr(stepper, "kernel", False)  # the prompts' masks are not for the kernel
        stepper.cache.use(3)
        stepper.cache.set_lengths(torch.tensor([3, 5, 4]))
        monkeypatch.setattr(stepper, "kernel", True)
        for batch in (3, 2):
            stepper.select(torch.arange(batch))
            for mode in ("autoregressive", "drafted", "drafted", "autoregressive"):
                stepper.step(12, mode)  # type: ignore[arg-type]
                tree_rows = made[-1].at(None, made[-1].rows.shape[1])
                assert torch.equal(tree_rows.bits, triton_attention.row_bits(made[-1].rows))
    kept = [mask.at(None, mask.rows.shape[1]).bits for mask in made[:4]]
    assert kept[3] is kept[0], "made once"
    assert kept[2] is not kept[1]
