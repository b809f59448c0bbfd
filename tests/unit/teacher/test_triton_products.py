"""Triton kernel of a step's products against torch's operations in float64, interpreted or on a CUDA device.

Triton decides at its first import whether kernels are compiled or interpreted, and transformers imports it. So
`tests/integration/test_triton_interpreter.py` runs `TestProducts` in a separate process; on a CUDA device
it also runs here, compiled.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.teacher.triton_products import ROWS, Processors, Tiles, add_product, choose, normed_product, prepare
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
EPSILON = 1e-5


class Case:
    """Random inputs of a product of M `rows`, K `inputs`, N `outputs`."""

    def __init__(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float16, gated: bool = False):
        generator = torch.Generator().manual_seed(rows + inputs + outputs)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weights = outputs * (2 if gated else 1)
        self.gated, self.dtype = gated, dtype
        self.rows = random(1, rows, inputs).to(DEVICE, dtype)
        self.weight = (random(weights, inputs) / inputs**0.5).to(DEVICE, dtype)
        self.bias = random(weights).to(DEVICE, dtype)
        self.norm = (random(inputs).abs() + 0.5).to(DEVICE, dtype)
        self.following = (random(outputs).abs() + 0.5).to(DEVICE, dtype)
        self.residual = random(1, rows, outputs).to(DEVICE, dtype)

    def own_bias(self, bias: bool) -> Tensor | None:
        return self.bias if bias else None

    def close(self, got: Tensor, expected: Tensor) -> None:
        assert got.shape == expected.shape
        assert (got.double() - expected).abs().max() <= TOLERANCE[self.dtype] * expected.abs().max()

    def product(self, rows: Tensor, bias: bool) -> Tensor:
        return functional.linear(rows, self.weight.double(), self.bias.double() if bias else None)

    def check_normed(self, bias: bool = True, tiles: Tiles | None = None) -> Tensor:
        """Compare norm, product and gate with float64."""
        got = normed_product(
            prepare(self.rows, self.norm), self.weight, self.own_bias(bias), EPSILON, self.gated, tiles
        )
        rows = functional.rms_norm(self.rows.double(), self.rows.shape[-1:], self.norm.double(), EPSILON)
        expected = self.product(rows, bias)
        if self.gated:
            gate, up = expected.chunk(2, dim=-1)
            expected = functional.silu(gate) * up
        self.close(got, expected)
        return got

    def check_added(self, bias: bool = True) -> None:
        """Compare product and residual, and the rows prepared for the next norm, with float64."""
        residual = self.residual.clone()
        made = add_product(self.rows, self.weight, self.own_bias(bias), residual, self.following)
        expected = self.residual.double() + self.product(self.rows.double(), bias)
        self.close(residual, expected)
        assert made is not None and made.hidden is residual
        self.close(made.scaled, (residual.double() * self.following.double()).flatten(0, 1))
        squares = made.squares.double().sum(1)
        assert torch.allclose(squares, residual.double().square().sum(-1).flatten(), rtol=1e-4)
        again = self.residual.clone()
        assert add_product(self.rows, self.weight, self.own_bias(bias), again, None) is None
        assert torch.equal(again, residual)


@pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="run by tests/integration/test_triton_interpreter.py, or on a CUDA device",
)
@pytest.mark.gpu
class TestProducts:
    @pytest.mark.parametrize("bias", [False, True])
    def test_product_with_norm_gate_and_residual(self, bias: bool) -> None:
        Case(3, 96, 40).check_normed(bias)
        Case(3, 96, 40, gated=True).check_normed(bias)
        Case(3, 96, 40).check_added(bias)

    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    @pytest.mark.parametrize("rows", [1, 2, 16, 17, 40, 64, 70])
    def test_row_counts(self, rows: int, dtype: torch.dtype) -> None:
        Case(rows, 64, 48, dtype).check_normed()
        Case(rows, 64, 48, dtype).check_added()

    @pytest.mark.parametrize(("inputs", "outputs"), [(20, 7), (64, 16), (100, 33), (256, 64), (512, 1), (576, 70)])
    def test_sizes_without_whole_blocks(self, inputs: int, outputs: int) -> None:
        Case(5, inputs, outputs).check_normed()
        Case(5, inputs, outputs, gated=True).check_normed(False)
        Case(5, inputs, outputs).check_added()

    def test_tiles_change_rounding_only(self) -> None:
        case = Case(4, 200, 50)
        for tiles in (Tiles(16, 32, 2, 4), Tiles(32, 64, 3, 4), Tiles(64, 256, 2, 8)):
            case.check_normed(tiles=tiles)

    def test_row_sums_ignore_other_rows(self) -> None:
        """A tree's node equals autoregressive decoding bit for bit, up to 32 rows."""
        case = Case(32, 256, 64)
        whole = normed_product(prepare(case.rows, case.norm), case.weight, case.bias, EPSILON)
        added = case.residual.clone()
        add_product(case.rows, case.weight, None, added, None)
        for count in (1, 7, 16):
            rows, residual = case.rows[:, :count], case.residual[:, :count].clone()
            alone = normed_product(prepare(rows, case.norm), case.weight, case.bias, EPSILON)
            assert torch.equal(alone, whole[:, :count])
            add_product(rows, case.weight, None, residual, None)
            assert torch.equal(residual, added[:, :count])

    def test_prepare_accepts_strided_rows(self) -> None:
        case = Case(6, 64, 32)
        wide = torch.full((1, 6, 80), float("nan"), dtype=case.dtype, device=DEVICE)
        wide[:, :, :64] = case.rows
        one, two = (prepare(rows, case.norm) for rows in (wide[:, :, :64], case.rows))
        assert torch.equal(one.scaled, two.scaled) and torch.equal(one.squares, two.squares)

    def test_added_product_prepares_next_rows(self) -> None:
        """The prepared rows equal those of `prepare`."""
        first, second = Case(3, 96, 64), Case(3, 64, 40)
        residual = first.residual.clone()
        made = add_product(first.rows, first.weight, first.bias, residual, second.norm)
        assert made is not None
        expected = normed_product(prepare(residual, second.norm), second.weight, None, EPSILON)
        got = normed_product(made, second.weight, None, EPSILON)
        assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()

    def test_lean_layers_equal_torch_products(self) -> None:
        """Run a decoding step's rows through lean layers with either kind of product, and through torch's."""
        import transformers

        from firp_cli.teacher.check import use_lean_layers
        from firp_cli.teacher.kv_cache import KVCache
        from firp_cli.teacher.lean_layers import LeanStack
        from firp_cli.teacher.load import wrap_model
        from firp_cli.teacher.masks import KernelMask, Mask, step_mask

        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        config = transformers.Qwen3Config(**sizes, **heads, initializer_range=0.2, attention_bias=True)
        model = transformers.Qwen3ForCausalLM(config).to(DEVICE, torch.float16)
        teacher = wrap_model(model, check=False)
        assert use_lean_layers(teacher) is None
        stack = teacher.stack
        assert isinstance(stack, LeanStack)
        rows, length = 5, 9
        hidden = torch.randn(1, rows, 64).to(DEVICE, torch.float16)
        positions = length + torch.arange(rows, device=DEVICE)[None]
        seen = torch.ones(1, rows, rows, dtype=torch.bool, device=DEVICE).tril()
        results = []
        with torch.inference_mode():
            for kernel, own in ((False, False), (True, False), (True, True)):
                torch.manual_seed(1)
                cache = KVCache(2, 1, rows, 32, 2, 16, torch.float16, torch.device(DEVICE))
                cache.fill(length)
                cache.begin(rows, length)
                stack.own_products = own
                slots = cache.prefix_slots(length)
                mask: Mask = step_mask(seen, positions, cache.lengths, slots, torch.float16)
                if kernel:
                    mask = KernelMask(seen, positions, cache.lengths, length)
                out = hidden
                rotary = teacher.rotary(hidden, positions)
                for index in range(2):
                    out = teacher.layer(index, out, rotary, positions, mask.at(None, rows), cache)
                results.append(teacher.head(teacher.norm(out)))
        scale = results[0].abs().max()
        for other in results[1:]:
            assert (other - results[0]).abs().max() <= 2e-2 * scale


def test_tiles_fit_matrix_and_memory() -> None:
    for inputs, outputs in ((576, 960), (4096, 6144), (14336, 4096), (100, 7)):
        for block in (16, 32, ROWS):
            for gated in (False, True):
                for shared in (227, 99):  # KiB of a block on an H100, and on the smallest device with these products
                    tiles = choose(outputs, inputs, block, gated, Processors(132, shared << 10))
                    assert tiles.inputs == 32 or inputs % tiles.inputs == 0
                    stage = 2 * tiles.inputs * (block + tiles.outputs * (2 if gated else 1))
                    assert tiles.stages >= 2 and stage * tiles.stages <= max(shared - 1 << 10, 2 * stage)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="kernels are interpreted, or compiled for the device here")
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile one variant for all numbers of rows that share a block."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 2000 + architecture)
    for rows in (1, 3, 16):
        case, gated = Case(rows, 128, 64, torch.bfloat16), Case(rows, 128, 64, torch.bfloat16, gated=True)
        prepared = prepare(case.rows, case.norm)
        normed_product(prepared, case.weight, None, EPSILON)
        normed_product(prepared, gated.weight, None, EPSILON, gated=True)
        add_product(case.rows, case.weight, None, case.residual, case.following)
    assert sorted(loaded) == ["_prepare", "_product", "_product", "_product"]
