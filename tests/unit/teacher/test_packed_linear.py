"""Packed products of few rows against torch's own."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn import functional

from firp_cli.teacher import cpu_kernels, packed_linear
from firp_cli.teacher.cpu_kernels import MOST_ROWS, Copy, PackedMatrix
from firp_cli.teacher.packed_linear import OneDNNMatrix, PackedLinear


def some_matrix(bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    return torch.randn(37, 24), torch.randn(37) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 5), (2, 1), (1, 4, 9), (MOST_ROWS,), (MOST_ROWS + 1,), (0,), ()])
def test_product_equals_torch(shape: tuple[int, ...], bias: bool) -> None:
    """Compare with and without packing."""
    weight, offset = some_matrix(bias)
    rows = torch.randn(*shape, 24)
    expected = functional.linear(rows, weight, offset)
    for lean in (True, False):
        got = PackedLinear(weight, offset, lean)(rows)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_product_accepts_strided_rows() -> None:
    weight, offset = some_matrix(bias=True)
    product = PackedLinear(weight, offset)
    for rows in (torch.randn(24, 6).t(), torch.randn(4, 48)[:, ::2], torch.randn(3, 24).expand(2, 3, 24)):
        torch.testing.assert_close(product(rows), functional.linear(rows, weight, offset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_product_of_other_dtypes_is_torchs(dtype: torch.dtype) -> None:
    weight, _ = some_matrix(bias=False)
    product, rows = PackedLinear(weight.to(dtype)), torch.randn(3, 24).to(dtype)
    assert product._packed is None
    assert torch.equal(product(rows), functional.linear(rows, weight.to(dtype)))


def test_product_passes_gradients_to_rows() -> None:
    weight, offset = some_matrix(bias=True)
    rows = torch.randn(5, 24, requires_grad=True)
    PackedLinear(weight.requires_grad_(True), offset)(rows).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, weight.detach().sum(0).expand(5, -1))
    assert weight.grad is None, "the matrix is frozen"


@pytest.fixture(params=[PackedMatrix, OneDNNMatrix])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Copy]:
    """Each kind of packed product in turn, used by every new `PackedLinear`."""
    if request.param is OneDNNMatrix:
        monkeypatch.setattr(packed_linear, "missing", lambda: "none")
    if PackedLinear(torch.randn(8, 8))._packed is None:
        pytest.skip("this machine has no such kernel")
    assert isinstance(PackedLinear(torch.randn(8, 8))._packed, request.param)
    kind: type[Copy] = request.param
    return kind


@pytest.mark.parametrize("size", [(37, 24), (192, 64), (64, 192)])
def test_packed_product_accepts_any_row_count(kernel: type[Copy], size: tuple[int, int]) -> None:
    torch.manual_seed(2)
    weight, offset = torch.randn(size), torch.randn(size[0])
    product = PackedLinear(weight, offset)
    for shape in ((1,), (2,), (3,), (2, 4), (1, 17), (64,), (MOST_ROWS,)):
        rows = torch.randn(*shape, size[1])
        torch.testing.assert_close(product(rows), functional.linear(rows, weight, offset), rtol=1e-5, atol=1e-5)


def test_wrong_packed_product_is_not_used(kernel: type[Copy], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = some_matrix(bias=False)
    wrong = lambda self, rows: functional.linear(rows, weight) + (len(rows) > 8)  # noqa: E731
    monkeypatch.setattr(kernel, "__call__", wrong)
    assert PackedLinear(weight)._packed is None


def test_packed_copies_are_counted_and_limited(kernel: type[Copy], monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    weight, _ = some_matrix(bias=False)
    size, before = weight.nbytes, Copy.total()
    first = PackedLinear(weight)
    assert Copy.total() == before + size
    monkeypatch.setattr(cpu_kernels, "MOST_BYTES", before + 2 * size)
    second, third = PackedLinear(weight), PackedLinear(weight)
    assert (second._packed is None, third._packed is None) == (False, True)
    rows = torch.randn(4, 24)
    torch.testing.assert_close(third(rows), second(rows), rtol=1e-5, atol=1e-5)
    del first, third
    gc.collect()
    assert Copy.total() == before + size, "a deleted copy makes room"
    assert PackedLinear(weight)._packed is not None
    del second
    gc.collect()
    assert Copy.total() == before


def test_fast_bfloat16_follows_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: {"amx_bf16": units}, raising=False)
        assert packed_linear.fast_bfloat16(cpu) == (units and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"}, raising=False)
    assert not packed_linear.fast_bfloat16(cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)  # an older torch
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units, raising=False)
        assert packed_linear.fast_bfloat16(cpu) == (units and torch.backends.mkldnn.is_available())
