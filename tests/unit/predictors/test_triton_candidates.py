"""The most probable tokens of logits by the Triton kernels, against a stable sort and float64.

Kernels are compiled or interpreted as in test_triton_attention.py: `tests/integration/test_triton_interpreter.py` runs
`TestCandidates` in a separate process; on a CUDA device it also runs here, compiled.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.predictors import triton_candidates
from firp_cli.predictors.draft import KERNEL_BREADTH, most_probable_tokens
from firp_cli.predictors.triton_candidates import most_probable
from helpers.launches import Launches, trace_kernels
from helpers.pairwise import nightly_rest
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KINDS = ["usual", "ties", "masked", "certain"]
INFINITY, NAN = float("inf"), float("nan")
# V and s: less than a part, exactly one, parts of several lengths, the last part with fewer than s tokens
SIZES = [(1, 1), (7, 7), (64, 64), (512, 3), (513, 5), (5000, 64), (32_000, 1), (50_257, 4), (131_073, 10)]


def make_logits(kind: str, size: int, *rows: int) -> Tensor:
    normal = torch.randn(*rows, size, generator=torch.Generator().manual_seed(size)) * 3
    if kind == "ties":
        normal = (normal / 2).round()  # with both zeros
        assert size < 1000 or (normal == 0).logical_and(normal.signbit()).any()
    if kind == "masked":
        normal[..., 1::2] = -INFINITY
    if kind == "certain":
        normal[..., size // 2] = 60.0
    return normal.to(DEVICE)


def check(logits: Tensor, breadth: int) -> None:
    tokens, log_probs = most_probable(logits, breadth)
    assert (tokens.dtype, log_probs.dtype) == (torch.long, torch.float32)
    # on a CUDA device a sort tells the zeros apart
    expected = (logits + 0.0).cpu().sort(dim=-1, descending=True, stable=True).indices[..., :breadth]
    assert torch.equal(tokens.cpu(), expected)
    exact = logits.cpu().double().log_softmax(-1).gather(-1, expected)
    float32 = logits.log_softmax(-1).cpu().gather(-1, expected)
    assert torch.equal(log_probs.cpu().isinf(), exact.isinf())
    assert log_probs.max() <= 0
    finite = exact.isfinite()
    error = (log_probs.cpu().double() - exact)[finite].abs()
    bound = (float32.double() - exact)[finite].abs().max() + 2.5e-7 * (1 + exact[finite].abs())
    assert (error <= bound).all(), (error - bound).max()


class TestCandidates:
    """The kernels on the CUDA device if there is one, else in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize(
        ("size", "kind"),
        nightly_rest([(size, KINDS[number % 4]) for number, size in enumerate([*SIZES, SIZES[4]])], SIZES, KINDS),
    )
    def test_tokens_are_the_most_probable_ones(self, size: tuple[int, int], kind: str) -> None:
        vocabulary, breadth = size
        check(make_logits(kind, vocabulary, 2, 2), breadth)

    def test_rows_of_all_layouts(self) -> None:
        """One vector; rows behind other rows; steps and sequences in another order."""
        logits = make_logits("usual", 700, 3, 4)
        check(logits[0, 0], 2)
        check(logits[:1, 2:], 3)
        check(logits.transpose(0, 1), 3)

    def test_rows_without_probabilities_end(self) -> None:
        """A faulty teacher's rows give distinct tokens of the vocabulary, and NaN where log_softmax does."""
        size, breadth = 1100, 6
        rows = make_logits("usual", size, 6)
        rows[0] = NAN
        rows[1, 700] = NAN
        rows[2] = -INFINITY
        rows[3, [3, 600]] = INFINITY
        rows[4] = -torch.tensor(NAN)
        tokens, log_probs = most_probable(rows, breadth)
        assert all(len(set(row)) == breadth and min(row) >= 0 and max(row) < size for row in tokens.tolist())
        assert log_probs[:5].isnan().all()
        assert tokens[2].tolist() == list(range(breadth)), "equal ones in order"
        assert tokens[3, :2].tolist() == [3, 600]
        check(rows[5], breadth)
        marked = most_probable(rows, breadth, mark=True)[0]
        assert (marked[:5] == -1).all() and torch.equal(marked[5], tokens[5])

    @pytest.mark.parametrize("breadth", [4, KERNEL_BREADTH + 1])
    def test_candidates_are_those_without_the_kernel(self, breadth: int) -> None:
        logits = make_logits("usual", 900, 3, 2)
        drafts = [most_probable_tokens(logits, breadth, kernel) for kernel in (True, False)]
        assert torch.equal(drafts[0].tokens, drafts[1].tokens)
        torch.testing.assert_close(drafts[0].log_probs, drafts[1].log_probs, rtol=1e-6, atol=1e-6)

    def test_search_launches_two_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = make_logits("usual", 900, 3, 2)
        with Launches() as launches:
            trace_kernels(monkeypatch, launches, triton_candidates, "_search_part", "_merge_parts")
            most_probable(logits, 4)
        assert launches.names == ["_search_part", "_merge_parts"]

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    def test_search_is_captured_without_sync(self) -> None:
        """The captured kernels, replayed with other logits, give their tokens."""
        logits = make_logits("usual", 128_256, 1, 4)
        most_probable(logits, 8)
        torch.cuda.set_sync_debug_mode("error")
        try:
            most_probable(logits, 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = most_probable(logits, 8)
        for number in range(1, 4):
            logits.copy_(logits.roll(1000 * number, -1) + number)
            graph.replay()
            for got, expected in zip(captured, most_probable(logits, 8), strict=True):
                assert torch.equal(got, expected)
            check(logits, 8)


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the kernels are interpreted, or compiled for the device here"
)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile one variant of the search for all numbers of rows and tokens. The driver here launches nothing."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 6000 + architecture)
    for size in (32_000, 151_936):
        for rows in (1, 5):
            for breadth in (1, 7, 8, 64):
                most_probable(torch.zeros(rows, size), breadth)
    assert loaded.count("_search_part") == 2
    assert loaded.count("_merge_parts") == 2 * 3, "of keys rounded up to a power of two"
