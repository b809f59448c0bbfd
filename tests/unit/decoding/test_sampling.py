"""Top-p thresholds and draws against transformers' warpers, in torch and by the Triton kernel.

`tests/integration/test_triton_interpreter.py` runs `TestKernel` in a process that interprets kernels; on a CUDA device
it runs here, compiled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from firp_cli.decoding import sampling
from firp_cli.decoding.sampling import CANDIDATES, Sampler, top_p_thresholds
from firp_cli.errors import UsageError
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
CPU = torch.device("cpu")
TOP_P = [0.1, 0.5, 0.8, 0.9, 0.95, 0.99]
VOCABULARIES = [1, 2, 11, 1000, 5000]
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda normal: normal * 3,
    "flat": lambda normal: normal * 0.01,
    "peaked": lambda normal: (normal * 4).index_fill(-1, torch.tensor([normal.shape[-1] // 2]), 16.0),
    "ties": lambda normal: normal.mul(2).round(),
    "masked": lambda normal: (normal * 3).masked_fill(normal.roll(1, -1) > 0.5, float("-inf")),
}
BORDER = 5e-7  # of a sum of probabilities in float32


def make_logits(shape: str, rows: int, vocabulary: int) -> Tensor:
    """Return (rows, V) logits; a row has at least one that is finite."""
    logits = SHAPES[shape](torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)))
    logits[:, 0] = logits[:, 0].clamp(min=-1.0)
    return logits


def mass_above(probabilities: Tensor) -> Tensor:
    """Return in float64, for each token of (R, V), the sum of the probabilities that are greater than its own."""
    ascending = probabilities.cpu().sort(-1).values
    from_here = ascending.double().flip(-1).cumsum(-1).flip(-1)
    from_here = torch.cat([from_here, torch.zeros(len(from_here), 1, dtype=torch.float64)], dim=-1)
    return from_here.gather(-1, torch.searchsorted(ascending, probabilities.cpu(), right=True))


def kept_by_transformers(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits.cpu())
    return TopPLogitsWarper(top_p)(None, scores) > float("-inf")


def check_thresholds(find: Callable[[Tensor, float], Tensor], logits: Tensor, temperature: float) -> tuple[int, int]:
    """Compare kept tokens with the definition and with transformers, for all of TOP_P.

    Returns:
        The number of rows in which both tokens next to the threshold were compared, and the number of rows.
    """
    probabilities = (logits / temperature).softmax(-1)
    above, values = mass_above(probabilities), probabilities.cpu()
    whole = 0
    for top_p in TOP_P:
        thresholds = find(probabilities, top_p).cpu()
        assert (thresholds.shape, thresholds.dtype) == ((len(logits), 1), torch.float32)
        kept = values >= thresholds
        assert kept.gather(-1, values.argmax(-1, keepdim=True)).all()
        clear = (above - top_p).abs() > BORDER
        assert torch.equal(kept[clear], (above < top_p)[clear])
        # transformers may divide tokens of equal probability, those of the threshold
        differs = (kept != kept_by_transformers(logits, temperature, top_p)) & clear
        divided = kept & (values == thresholds) & ((values == thresholds).sum(-1, keepdim=True) > 1)
        assert not (differs & ~divided).any()
        least_kept = values.masked_fill(~kept, 2.0).argmin(-1, keepdim=True)
        most_removed = values.masked_fill(kept, -1.0).argmax(-1, keepdim=True)
        whole += int((clear.gather(-1, least_kept) & clear.gather(-1, most_removed)).sum())
    return whole, len(TOP_P) * len(logits)


class Sorted(TorchDispatchMode):
    """Shapes of the tensors that are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.sort:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds_are_those_of_transformers(shape: str, vocabulary: int) -> None:
    logits = make_logits(shape, 16, vocabulary)
    whole, rows = 0, 0
    for temperature in (0.3, 1.0, 2.0):
        counts = check_thresholds(top_p_thresholds, logits, temperature)
        whole, rows = whole + counts[0], rows + counts[1]
    assert whole > 0.9 * rows


def test_equal_probabilities_stay_together() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]]).log().repeat(2, 1)
    probabilities = logits.softmax(-1)
    for top_p, count in ((0.2, 1), (0.39, 1), (0.41, 6), (0.6, 6), (0.89, 6), (0.91, 8), (0.99, 8)):
        assert (probabilities >= top_p_thresholds(probabilities, top_p)).sum(-1).tolist() == [count] * 2
    equal = torch.full((1, 4 * CANDIDATES), 0.25 / CANDIDATES)
    for top_p in (0.1, 0.9):
        assert (equal >= top_p_thresholds(equal, top_p)).all()


def check_neighbours(find: Callable[[Tensor, float], Tensor]) -> None:
    """Find thresholds in a row of two probabilities next to each other, the first token's mass exactly at top-p."""
    half = torch.tensor(0.5)
    below = torch.nextafter(half, torch.tensor(0.0))
    row = torch.stack([below, half])[None].to(DEVICE)
    assert find(row, 0.5).item() == 0.5
    assert find(row, 0.6).item() == below.item()


def test_neighbouring_floats_are_told_apart() -> None:
    check_neighbours(top_p_thresholds)


def test_only_rows_with_many_likely_tokens_are_sorted() -> None:
    vocabulary = 5 * CANDIDATES
    logits = make_logits("usual", 5, vocabulary)
    logits[[1, 4]] *= 0.01
    probabilities = logits.softmax(-1)
    likely = probabilities.topk(CANDIDATES).values.sum(-1)
    assert ((likely > 0.8) == torch.tensor([True, False, True, True, False])).all()
    for rows, expected in (([0, 2, 3], []), (list(range(5)), [(2, vocabulary)]), ([1], [(1, vocabulary)])):
        with Sorted() as sorts:
            thresholds = top_p_thresholds(probabilities[rows], 0.8)
        assert sorts.shapes == expected
        above = mass_above(probabilities[rows])
        clear = (above - 0.8).abs() > BORDER
        assert torch.equal((probabilities[rows] >= thresholds)[clear], (above < 0.8)[clear])


def check_draws(device: torch.device, logits: Tensor, temperature: float, top_p: float, draws: int) -> None:
    """Chi-square of draws from logits (V,) against the renormalised probabilities of the kept tokens."""
    sampler = Sampler(temperature, top_p, 3, device)
    rows = 2000
    given = logits.to(device).expand(2, rows // 2, -1)
    counts = sum(
        torch.bincount(sampler(given).flatten().cpu(), minlength=len(logits)) for _ in range(math.ceil(draws / rows))
    )
    exact = (logits.double() / temperature).softmax(-1)
    exact = exact.masked_fill(~kept_by_transformers(logits[None], temperature, top_p)[0], 0.0)
    assert counts[exact == 0].sum() == 0
    expected = exact / exact.sum() * counts.sum()
    common = expected >= 5
    assert common.sum() > 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    assert statistic < chi2.ppf(0.999, len(expected) - 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.8), (0.7, 0.95), (1.5, 1.0)])
@pytest.mark.parametrize("vocabulary", [40, CANDIDATES + 200])
def test_draws_follow_the_kept_probabilities(vocabulary: int, temperature: float, top_p: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(2)) * 1.5
    check_draws(CPU, logits, temperature, top_p, 20_000)


def draws_by_warpers(logits: Tensor, temperature: float, top_p: float, seed: int) -> Tensor:
    """Draw from transformers' scores, which need a sort and two softmaxes, by the same race."""
    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.flatten(0, 1)))
    clocks = torch.empty_like(scores).exponential_(generator=torch.Generator().manual_seed(seed))
    return (scores.softmax(-1) / clocks).argmax(-1).view(logits.shape[:2])


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_seeds_reproduce_the_draws_of_transformers_scores(vocabulary: int) -> None:
    logits = make_logits("usual", 400, vocabulary).view(4, 100, -1)
    for temperature, top_p in ((1.0, 0.9), (0.6, 0.95), (2.0, 0.5)):
        got = Sampler(temperature, top_p, 7, CPU)(logits)
        assert torch.equal(got, draws_by_warpers(logits, temperature, top_p, 7))
        assert torch.equal(got, Sampler(temperature, top_p, 7, CPU)(logits))
        assert not torch.equal(got, Sampler(temperature, top_p, 8, CPU)(logits))
    sampler = Sampler(1.0, 0.9, 7, CPU)
    assert not torch.equal(sampler(logits), sampler(logits))


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_clocks_of_zero_choose_no_removed_token(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda clocks, generator: clocks.zero_())
    logits = torch.tensor([float("-inf"), 1.0, 3.0, float("-inf"), -2.0, -200.0]).expand(1, 3, -1)
    assert Sampler(1.0, top_p, 0, CPU)(logits).tolist() == [[2] * 3]


def test_settings_out_of_range_are_refused() -> None:
    for temperature in (-0.1, math.nan, math.inf, 1e-7, 2e6):
        with pytest.raises(UsageError, match=rf"^temperature must be 0 .* from 1e-06 to 1e\+06, got {temperature}$"):
            Sampler(temperature, 1.0, 0, CPU)
    for top_p in (0.0, 1.1, math.nan):
        with pytest.raises(UsageError, match=f"^top_p must be above 0 and at most 1, got {top_p}$"):
            Sampler(1.0, top_p, 0, CPU)


class TestKernel:
    """The kernel on the CUDA device if there is one, else in the interpreter."""

    __test__ = INTERPRETED or DEVICE == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.fixture
    def find(self) -> Callable[[Tensor, float], Tensor]:
        pytest.importorskip("triton", reason="needs triton: pip install triton")
        from firp_cli.decoding import triton_sampling

        return triton_sampling.top_p_thresholds

    @pytest.mark.parametrize("vocabulary", [1, 11, 20_000])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_thresholds_are_those_of_transformers(
        self, shape: str, vocabulary: int, find: Callable[[Tensor, float], Tensor]
    ) -> None:
        """20,000 tokens are more than two chunks."""
        whole, rows = check_thresholds(find, make_logits(shape, 2, vocabulary).to(DEVICE), 1.0)
        assert whole > 0.75 * rows

    def test_equal_probabilities_stay_together(self, find: Callable[[Tensor, float], Tensor]) -> None:
        equal = torch.full((2, 300), 1 / 300, device=DEVICE)
        equal[1, :100] = 0.0
        assert (equal >= find(equal, 0.3)).sum(-1).tolist() == [300, 200]
        certain = torch.eye(5, device=DEVICE)
        for top_p in (1e-6, 0.5, 1 - 1e-6):
            assert torch.equal(find(certain, top_p), torch.ones(5, 1, device=DEVICE))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_greedy_tokens_are_the_first_of_the_largest(self, shape: str) -> None:
        pytest.importorskip("triton", reason="needs triton: pip install triton")
        sampler = Sampler(0.0, 1.0, 0, torch.device(DEVICE), kernel=True)
        logits = make_logits(shape, 6, 3000).view(2, 3, 3000)
        expected = torch.from_numpy(logits.numpy().argmax(-1))  # of equal ones the first
        assert torch.equal(sampler(logits.to(DEVICE)).cpu(), expected)
        assert torch.equal(sampler(logits.to(DEVICE)[:, :2]).cpu(), expected[:, :2])

    def test_neighbouring_floats_are_told_apart(self, find: Callable[[Tensor, float], Tensor]) -> None:
        check_neighbours(find)

    def test_rows_without_probabilities_end(self, find: Callable[[Tensor, float], Tensor]) -> None:
        """NaN and zeros, which a faulty teacher gives, do not run for ever."""
        rows = torch.stack([torch.full((20,), math.nan), torch.zeros(20), torch.full((20,), 0.05)]).to(DEVICE)
        assert find(rows, 0.5)[1:].flatten().tolist() == [0.0, torch.tensor(0.05).item()]

    def test_sampler_draws_as_without_the_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = make_logits("usual", 12, 3000).view(2, 6, -1).to(DEVICE)
        choices = []
        for backend in ("triton", "sdpa"):
            monkeypatch.setattr(sampling, "choose_backend", lambda *_, chosen=backend: chosen)
            sampler = Sampler(1.0, 0.9, 7, torch.device(DEVICE))
            assert (sampler._find_thresholds is top_p_thresholds) == (backend == "sdpa")
            choices.append(sampler(logits))
        assert torch.equal(*choices)

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    def test_draws_follow_the_kept_probabilities(self) -> None:
        logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 1.5
        check_draws(torch.device("cuda"), logits, 1.0, 0.8, 20_000)

    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    def test_sampler_is_captured_without_sync(self) -> None:
        """The captured sampler, replayed with other logits, keeps what transformers does and draws anew."""
        device = torch.device("cuda")
        sampler = Sampler(1.0, 0.9, 3, device)
        logits = make_logits("usual", 8, 130_000).view(2, 4, -1).to(device)
        sampler(logits)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler(logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(sampler.generator)
        with torch.cuda.graph(graph):
            chosen = sampler(logits)
        for number in range(3):
            logits.copy_(logits.roll(number, -1))
            found = []
            for _ in range(20):
                graph.replay()
                found.append(chosen.clone())
            assert len({tuple(draw.flatten().tolist()) for draw in found}) > 1
            above = mass_above(logits.flatten(0, 1).softmax(-1))
            for draw in found:
                assert (above.gather(-1, draw.cpu().view(-1, 1)) < 0.9 + BORDER).all()


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the kernel is interpreted, or compiled for the device here"
)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernel_compiles_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile one variant for all numbers of rows and all top-p. The driver here launches nothing."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from firp_cli.decoding import triton_sampling

    loaded = compile_only(monkeypatch, architecture, tmp_path, 3000 + architecture)
    for vocabulary in (32_000, 151_936, 50_257):
        for rows in (1, 2, 16):
            for top_p in (0.5, 0.9):
                triton_sampling.top_p_thresholds(torch.zeros(rows, vocabulary), top_p)
    assert loaded == ["_find_threshold"] * 3
