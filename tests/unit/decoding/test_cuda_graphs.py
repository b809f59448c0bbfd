"""Captured and replayed steps: keys and limits with a capture that records calls, and tapes of a step's operations.

A tape replays on the CPU as a CUDA graph does: the same operations on the same tensors, without the Python code.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.decoding.batch import halves
from firp_cli.decoding.cuda_graphs import SMALLEST_BUCKET, CaptureError, CudaCapture, Step, StepGraphs, bucket
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher.teacher import Teacher
from helpers.graphs import RecordingGraphs, with_graphs
from helpers.models import (
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    make_predictor,
    random_prompts,
    tiny_model,
    tiny_teacher,
)

TOKENS = 30


class RecordingCapture:
    """Capture that records its calls. It raises from the `failing`-th capture on."""

    def __init__(self, failing: int = 1 << 30, error: Exception | None = None) -> None:
        self.events: list[str] = []
        self.captures, self.failing, self.error = 0, failing, error or RuntimeError("no")

    def __call__(self, step: Step) -> Step:
        self.captures += 1
        number = self.captures
        if number >= self.failing:
            raise self.error
        self.events.append(f"capture {number}")
        return lambda: self.events.append(f"replay {number}")

    def eager(self) -> None:
        self.events.append("eager")

    def since(self) -> list[str]:
        """Return the calls since the last `since`."""
        events, self.events = self.events, []
        return events


def test_key_runs_then_is_captured_then_replayed() -> None:
    capture = RecordingCapture()
    graphs = StepGraphs(capture)
    for key in ("a", "b"):
        graphs.run(key, capture.eager)
        assert capture.since() == ["eager"]
    for number, key in enumerate(("a", "b"), start=1):
        graphs.run(key, capture.eager)
        assert capture.since() == [f"capture {number}", f"replay {number}"]
    for number, key in ((1, "a"), (2, "b"), (2, "b"), (1, "a")):
        graphs.run(key, capture.eager)
        assert capture.since() == [f"replay {number}"]


def test_failed_capture_is_an_error() -> None:
    """The step is not run, then or later; existing graphs are still replayed."""
    capture = RecordingCapture(failing=2, error=CaptureError("no; --no-graphs"))
    graphs = StepGraphs(capture)
    for key in "aab":
        graphs.run(key, capture.eager)
    capture.since()
    for _ in range(2):
        with pytest.raises(CaptureError, match="no-graphs"):
            graphs.run("b", capture.eager)
        assert capture.since() == []
    graphs.run("a", capture.eager)
    assert capture.since() == ["replay 1"]


def test_forgotten_graphs_are_captured_again() -> None:
    capture = RecordingCapture()
    graphs = StepGraphs(capture)
    for _ in range(3):
        graphs.run("a", capture.eager)
    graphs.forget()
    capture.since()
    for _ in range(3):
        graphs.run("a", capture.eager)
    assert capture.since() == ["eager", "capture 2", "replay 2", "replay 2"]


def test_buckets_are_powers_of_two() -> None:
    lengths = [1, SMALLEST_BUCKET - 1, SMALLEST_BUCKET, SMALLEST_BUCKET + 1, 1024, 1025, 100_000]
    assert [bucket(length) for length in lengths] == [256, 256, 256, 512, 1024, 2048, 131_072]


@cache
def reference(number: int, tokens: int) -> list[int]:
    return generate_reference(embedded_teacher().model, embedded_prompts(5)[number], tokens)


METHODS: dict[str, tuple[str | None, str]] = {
    "ar": (None, ""),
    "firp": ("firp", "dynamic:9"),
    "firp-budget": ("firp", "dynamic:9@3"),
    "hidden_transfer-static": ("hidden_transfer", "static:3x2x1@4"),
    "medusa": ("medusa", "dynamic:6"),
}


def embedded_engine(method: str, teacher: Teacher | None = None, **sampling: Any) -> Engine:
    kind, tree = METHODS[method]
    predictor = embedded_predictor(kind) if kind else None
    spec = parse_tree(tree, predictor.steps) if predictor else None
    return Engine(teacher or embedded_teacher(), predictor, spec, **sampling)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("method", list(METHODS))
def test_replayed_steps_write_the_same_tokens(method: str, batch: int) -> None:
    """In the third run every key is captured, so all steps are replays in the first run's buffers. Sequences end at
    different times, by EOS and by the limit.
    """
    prompts = embedded_prompts(5)[:batch]
    teacher = copy.copy(embedded_teacher())
    teacher.eos_token_ids = (*teacher.eos_token_ids, reference(0, TOKENS)[9])
    engine = embedded_engine(method, teacher)
    eager = engine.generate(prompts, TOKENS)
    lengths = [len(item.token_ids) for item in eager]
    assert batch == 1 or min(lengths) < max(lengths)
    graphs, tapes = with_graphs(engine)
    for _ in range(3):
        before = (len(graphs.keys), tapes.captured, tapes.replayed)
        got = engine.generate(prompts, TOKENS)
        assert [item.token_ids for item in got] == [item.token_ids for item in eager]
        assert [item.accepted_lengths for item in got] == [item.accepted_lengths for item in eager]
        assert [item.finish_reason for item in got] == [item.finish_reason for item in eager]
    keys, captured, replayed = before
    assert tapes.captured == captured > 0
    assert tapes.replayed - replayed == len(graphs.keys) - keys > 0
    sizes = [size for _, size, _ in graphs.keys[keys:]]
    assert sizes == sorted(sizes, reverse=True)
    assert {mode for mode, _, _ in graphs.keys} == {"drafted" if METHODS[method][0] else "autoregressive"}


def test_finished_sequences_stay_until_half_of_the_batch_has_finished() -> None:
    prompts = embedded_prompts(5)
    engine = embedded_engine("ar")
    expected = [reference(number, 120) for number in range(5)]
    ends = sorted((len(text) for text in expected), reverse=True)
    assert ends[0] > ends[1] > ends[2]
    engine.graphs = graphs = RecordingGraphs(lambda step: step)
    assert [item.token_ids for item in engine.generate(prompts, 120)] == expected
    # a step per token after the first; two of five remain once the third has ended
    sizes = [size for _, size, _ in graphs.keys]
    assert [sizes.count(size) for size in (5, 2, 1)] == [ends[2] - 1, ends[1] - ends[2], ends[0] - ends[1]]


def test_longer_text_takes_the_next_bucket() -> None:
    prompt = random_prompts(1, seed=41, low=240, high=240)[0]
    teacher = tiny_teacher("llama", lean=True)
    engine = Engine(teacher, make_predictor(teacher, kind="firp", layer=2, steps=3))
    graphs, tapes = with_graphs(engine)
    got = engine.generate([prompt], 40)[0]
    expected = generate_reference(tiny_model("llama"), prompt, 40)
    assert got.token_ids == expected
    lengths = [length for _, _, length in graphs.keys]
    assert (lengths[0], lengths[-1]) == (256, 512)
    assert lengths == sorted(lengths)
    assert tapes.replayed > 0


def test_buffers_are_kept_while_requests_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger request gets new buffers, at least as large as all before, and the old graphs are dropped."""
    monkeypatch.setattr("firp_cli.decoding.engine.CAPACITY_STEP", 32)
    teacher = tiny_teacher("qwen3", lean=True)
    engine = Engine(teacher, make_predictor(teacher, kind="firp", layer=2, steps=3))
    graphs, tapes = with_graphs(engine)

    def check(count: int, length: int, tokens: int) -> DecodeStep:
        """Decode `count` prompts of `length` tokens; return the buffers of the batch."""
        prompts = random_prompts(count, seed=count * length + tokens, low=length, high=length)
        expected = [generate_reference(tiny_model("qwen3"), prompt, tokens) for prompt in prompts]
        assert [item.token_ids for item in engine.generate(prompts, tokens)] == expected
        assert engine.kept is not None
        return engine.kept

    first = check(3, 20, 12)
    assert (first.most, first.capacity) == (3, 32)
    assert check(2, 6, 20) is check(1, 27, 5) is check(3, 22, 10) is first
    assert graphs.forgotten == 0
    second = check(1, 50, 12)
    assert (second.most, second.capacity, graphs.forgotten) == (3, 64, 1)
    third = check(4, 5, 12)
    assert (third.most, third.capacity, graphs.forgotten) == (4, 64, 2)
    replayed = tapes.replayed
    assert check(4, 40, 24) is check(4, 40, 24) is third
    assert tapes.replayed > replayed


def test_engine_without_graphs_keeps_no_buffers() -> None:
    engine = embedded_engine("firp")
    engine.generate(embedded_prompts(1), 4)
    assert (engine.graphs, engine.kept) == (None, None)


def test_replayed_steps_draw_new_numbers() -> None:
    """In sampling the generator's state advances from replay to replay, as in eager steps."""
    eager, captured = (embedded_engine("firp", temperature=2.0, top_p=0.9, seed=5) for _ in range(2))
    _, tapes = with_graphs(captured)
    texts = set()
    for _ in range(3):
        expected = eager.generate(embedded_prompts(1), 30)[0].token_ids
        assert captured.generate(embedded_prompts(1), 30)[0].token_ids == expected
        texts.add(tuple(expected))
    assert len(texts) == 3
    assert tapes.replayed > 10


@pytest.mark.parametrize(("method", "guard"), [("ar", False), ("firp", False), ("firp-budget", True)])
def test_capture_in_advance_leaves_none_to_answers(method: str, guard: bool) -> None:
    """Also for the sizes to which a batch shrinks, and for each bucket of lengths."""
    prompts, engine = embedded_prompts(5), embedded_engine(method, guard=guard)
    expected = [reference(number, TOKENS) for number in range(5)]
    graphs, tapes = with_graphs(engine)
    engine.capture(5, max(map(len, prompts)), TOKENS)
    captured, keys = tapes.captured, set(graphs.keys)
    modes = {"autoregressive"} if method == "ar" else {"drafted", "autoregressive"} if guard else {"drafted"}
    assert {(mode, size) for mode, size, _ in keys} == {(mode, size) for mode in modes for size in (5, 2, 1)}
    for count in (5, 2):
        got = engine.generate(prompts[:count], TOKENS)
        assert [item.token_ids for item in got] == expected[:count]
    assert tapes.captured == captured == len(keys) and set(graphs.keys) == keys


def test_captured_lengths_cover_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded_engine("firp")
    graphs, _ = with_graphs(engine)
    engine.capture(1, 700, 100)
    assert sorted(longest for _, _, longest in set(graphs.keys)) == [256, 512, 1024]


def test_batches_shrink_to_their_halves() -> None:
    """Three of four remaining sequences decode in a batch of four until half of them have finished."""
    assert halves(13) == [13, 6, 3, 1] and halves(1) == [1]
    engine = embedded_engine("firp")
    expected = [reference(number, 60) for number in range(5)]
    engine.graphs = graphs = RecordingGraphs(lambda step: step)
    assert [item.token_ids for item in engine.generate(embedded_prompts(5), 60)] == expected
    assert {size for _, size, _ in graphs.keys} <= {5, 2, 1}


class FakeGenerator:
    """Random state that, as torch's, refuses draws while a capture has not ended."""

    def __init__(self) -> None:
        self.capturing = False

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator()

    def graphsafe_set_state(self, state: FakeGenerator) -> None:
        self.capturing = state.capturing


class FakeCuda:
    """The parts of `torch.cuda` that a capture uses. A broken capture raises at its end, before anything is undone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream_now, self.pools = "default", 0
        self.recording: set[int] = set()
        self.generators = [FakeGenerator()]
        self.broken = False
        cuda = self

        class Graph:
            def __init__(self) -> None:
                self.drawing = list(cuda.generators)

            def register_generator_state(self, generator: FakeGenerator) -> None:
                self.drawing.append(generator)

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert cuda.stream_now == "capture" and torch.is_inference_mode_enabled()
                assert not cuda.recording and not any(generator.capturing for generator in self.drawing)
                self.pool = pool
                cuda.recording.add(pool)
                for generator in self.drawing:
                    generator.capturing = True

            def capture_end(self) -> None:
                if cuda.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.recording.remove(self.pool)
                for generator in self.drawing:
                    generator.capturing = False

            def replay(self) -> None:
                pass

        @contextlib.contextmanager
        def stream(name: str) -> Iterator[None]:
            before, cuda.stream_now = cuda.stream_now, name
            try:
                yield
            finally:
                cuda.stream_now = before

        def pool_handle() -> int:
            cuda.pools += 1
            return cuda.pools

        for name, value in {
            "CUDAGraph": Graph,
            "Stream": lambda device: "capture",
            "stream": stream,
            "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": pool_handle,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "current_device": lambda: 0,
            "default_generators": self.generators,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda index, pool: cuda.recording.discard(pool), raising=False
        )


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen stream is capturing"), KeyboardInterrupt()]
)
def test_capture_that_fails_half_way_leaves_nothing_behind(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stream, pool and random states are as before, and the next capture succeeds."""
    cuda, sampler = FakeCuda(monkeypatch), FakeGenerator()
    capture = CudaCapture(torch.device("cuda", 0), [sampler])  # type: ignore[list-item]
    done: list[str] = []

    def failing() -> None:
        done.append("half")
        cuda.broken = True
        raise error

    expected = CaptureError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        capture(failing)
    if expected is CaptureError:
        assert "operation not permitted" in str(raised.value) and "--no-graphs" in str(raised.value)
        assert "stream is capturing" not in str(raised.value), "one line"
    assert cuda.stream_now == "default" and not cuda.recording
    assert not sampler.capturing and not cuda.generators[0].capturing
    cuda.broken, before = False, cuda.pools
    replay = capture(lambda: done.append("whole"))
    assert callable(replay) and done == ["half", "whole"]
    assert cuda.pools == before, "the pool was replaced after the failure, not before the next capture"
    assert cuda.stream_now == "default" and not cuda.recording and not sampler.capturing
