"""SPEED's pipeline: the tokens of transformers' `generate`, ticks, and the fallback."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from firp_cli.decoding.fallback import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    TIMED,
    AutoregressiveFallback,
    pipeline_fallback,
)
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.speed.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.speed.tick_log import total
from firp_cli.errors import CapacityError, TeacherError, UsageError
from firp_cli.results import Generation
from helpers.decoding import count_reads
from helpers.models import (
    DESCRIBED,
    FAMILIES,
    VOCABULARY,
    FakeExits,
    looped_teacher,
    pipe_teacher,
    random_prompts,
    tiny_teacher,
)
from helpers.pairwise import covered
from helpers.pipelines import RULES, TOKENS, fake_exits, random_exits, references, some_prompts

SHAPES = ["1x4", "2x3", "4x2", "3x4"]
OWN_CODE = [name for name, (family, _) in DESCRIBED.items() if family == "own"]
DESCRIBED_LLAMAS = [name for name, (family, _) in DESCRIBED.items() if family != "own"]
UNSHARED = [f"{family}/{loops}" for family in FAMILIES for loops in (2, 3, 4)]


def batches(engine: PipelineEngine, prompts: list[list[int]], size: int, tokens: int = TOKENS) -> list[Generation]:
    return [
        item
        for start in range(0, len(prompts), size)
        for item in engine.generate(prompts[start : start + size], tokens)
    ]


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        *((name, "lean") for name in (*SHAPES, *OWN_CODE, *DESCRIBED_LLAMAS, *UNSHARED)),
        *(
            (name, "library")
            for name in ("2x3", *OWN_CODE, *DESCRIBED_LLAMAS, "llama/2", "qwen2-window/3", "mistral-window/4")
        ),
    ],
)
def test_random_exits_are_lossless(name: str, stack: str) -> None:
    teacher, loops = pipe_teacher(name, stack == "lean")
    prompts = some_prompts()
    expected = references(name, prompts)
    engine = PipelineEngine(teacher, random_exits(teacher, loops), guard=False)
    together = engine.generate(prompts, TOKENS)
    alone = batches(engine, prompts[:2], 1)
    assert [item.token_ids for item in together] == expected
    assert [item.token_ids for item in alone] == expected[:2]
    for item in [*together, *alone]:
        assert item.pipeline is not None
        assert item.pipeline.left == sum(item.accepted_lengths) == len(item.token_ids) - 1
        assert item.steps == item.pipeline.ticks == len(item.accepted_lengths) == len(item.pipeline.occupancy)
        assert item.finish_reason == ("eos" if item.token_ids[-1] in teacher.eos_token_ids else "length")


@pytest.mark.parametrize("name", [*SHAPES, "raven", "ouro", "qwen2-window", "llama/2", "mistral-window/4"])
@pytest.mark.parametrize("mode", list(RULES))
def test_fakes_are_lossless(name: str, mode: str) -> None:
    prompts = some_prompts(seed=1)
    predictor = fake_exits(name, prompts, mode)
    engine = PipelineEngine(pipe_teacher(name)[0], predictor, guard=False)
    got = [*engine.generate(prompts, TOKENS), *batches(engine, prompts[:2], 1)]
    expected = references(name, prompts)
    assert [item.token_ids for item in got] == expected + expected[:2]
    for item in got:
        trace, loops = item.pipeline, predictor.loops
        assert trace is not None
        if mode == "always":
            filling = loops - 1 if trace.left else 0
            assert trace.ticks == trace.left + filling, "once it is full, every tick emits a token"
            assert item.accepted_lengths == [0] * filling + [1] * trace.left
            assert trace.corrected == 0
            if item.finish_reason == "length":  # after an EOS in flight no prediction is right or wrong
                assert (trace.flushes, trace.flushed) == (0, 0)
            assert trace.hits == [trace.left] * len(predictor.exits)
        if mode == "never":
            assert trace.ticks == loops * trace.left, "as without early exits"
            assert item.accepted_lengths == ([0] * (loops - 1) + [1]) * trace.left
            assert trace.corrected == trace.left
            assert not any(trace.hits)


@pytest.mark.parametrize(("name", "first"), [("1x4", 2), ("3x4", 3), ("2x3", 2), ("llama/4", 2)])
def test_fakes_right_from_a_later_exit_on(name: str, first: int) -> None:
    """A successor starts `first` ticks after its predecessor; the first token leaves after r."""
    prompts = some_prompts(seed=2)
    predictor = fake_exits(name, prompts, "always", exits=[first])
    for item, text in zip(
        PipelineEngine(pipe_teacher(name)[0], predictor, guard=False).generate(prompts, TOKENS),
        references(name, prompts),
        strict=True,
    ):
        assert item.token_ids == text
        assert item.pipeline is not None
        left = item.pipeline.left
        assert item.pipeline.ticks == (predictor.loops + first * (left - 1) if left else 0)
        assert item.pipeline.flushes == 0


@pytest.mark.parametrize("name", [*SHAPES, "ouro", "raven", "raven-norms", "qwen2-window", "mistral-window/3"])
def test_pipeline_below_the_threshold_has_one_token_in_flight(name: str) -> None:
    teacher, loops = pipe_teacher(name)
    prompts = some_prompts(seed=5)
    got = PipelineEngine(teacher, random_exits(teacher, loops, threshold=0.999), guard=False).generate(prompts, TOKENS)
    assert [item.token_ids for item in got] == references(name, prompts)
    for item in got:
        assert item.pipeline is not None
        assert item.pipeline.ticks == len(teacher.boundaries(loops)) * item.pipeline.left
        assert item.pipeline.occupancy == [1] * item.pipeline.ticks


@pytest.mark.parametrize("name", ["2x3", "qwen2-window", "mistral-window/3"])
def test_long_prompts_in_chunks(name: str) -> None:
    teacher, loops = pipe_teacher(name)
    prompts = [*random_prompts(1, seed=4, low=70, high=90), *random_prompts(1, seed=5, low=3, high=9), [9]]
    engine = PipelineEngine(teacher, random_exits(teacher, loops), prefill_chunk=16, guard=False)
    assert [item.token_ids for item in engine.generate(prompts, TOKENS)] == references(name, prompts)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("name", ["1x4", "raven", "llama/4"])
def test_answers_shorter_than_the_pipe(name: str, tokens: int) -> None:
    """The pipe is never full."""
    prompts = some_prompts(seed=6)
    expected = [text[:tokens] for text in references(name, prompts)]
    predictor = fake_exits(name, prompts, "always")
    got = PipelineEngine(pipe_teacher(name)[0], predictor, guard=False).generate(prompts, tokens)
    assert [item.token_ids for item in got] == expected
    for item in got:
        assert item.steps == (predictor.loops + len(item.token_ids) - 2 if len(item.token_ids) > 1 else 0)


@pytest.mark.parametrize("mode", list(RULES))
@pytest.mark.parametrize("name", ["1x4", "2x3", "raven", "qwen2-window/3"])
def test_eos_in_flight(name: str, mode: str) -> None:
    """EOS ends a sequence, keeps the EOS token, drops the tokens in flight after it, and the others go on."""
    prompts = some_prompts(seed=7)
    texts = references(name, prompts)
    teacher = copy.copy(pipe_teacher(name)[0])
    ending = texts[1][5]
    teacher.eos_token_ids = (ending, *teacher.eos_token_ids)
    expected = [text[: text.index(ending) + 1] if ending in text else text for text in texts]
    assert len(set(map(len, expected))) > 1
    predictor = fake_exits(name, prompts, mode)
    got = PipelineEngine(teacher, predictor, guard=False).generate(prompts, TOKENS)
    assert [item.token_ids for item in got] == expected
    for item in got:
        assert item.finish_reason == ("eos" if item.token_ids[-1] in teacher.eos_token_ids else "length")
        assert item.pipeline is not None
        assert item.pipeline.left == len(item.token_ids) - 1
        if mode == "always" and len(item.token_ids) > predictor.loops:
            assert item.pipeline.occupancy[-1] == predictor.loops, "the pipe was full when it ended"
    assert "eos" in {item.finish_reason for item in got}


def test_callback_gets_every_token() -> None:
    """In order, one at a time; drafted tokens are those that the last exit predicted."""
    prompts = some_prompts(seed=8)
    seen: list[list[int]] = [[] for _ in prompts]
    drafted = [0] * len(prompts)

    def on_tokens(number: int, tokens: list[int], count: int) -> None:
        assert len(tokens) == 1
        seen[number] += tokens
        drafted[number] += count

    engine = PipelineEngine(looped_teacher(2, 3), fake_exits("2x3", prompts, "sometimes"), guard=False)
    got = engine.generate(prompts, TOKENS, on_tokens=on_tokens)
    assert seen == [item.token_ids for item in got]
    assert drafted == [item.pipeline.hits[-1] for item in got if item.pipeline]
    assert 0 < sum(drafted) < sum(map(len, seen))


def test_refusals() -> None:
    teacher = looped_teacher(2, 3)
    predictor = random_exits(teacher, None)
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UsageError, match=next(iter(options))):
            PipelineEngine(teacher, predictor, **options)
    with pytest.raises(TeacherError, match=r"predictor\.loops is 2"):
        random_exits(teacher, 2)
    with pytest.raises(TeacherError, match=r"\(1 to 4\)"):
        random_exits(tiny_teacher("llama"), None)
    engine = PipelineEngine(teacher, predictor)
    with pytest.raises(CapacityError, match="512"):
        engine.generate([[5] * 500], 20)
    with pytest.raises(UsageError, match="empty"):
        engine.generate([[5], []], 20)
    full = [5] * 506
    assert engine.generate([full], 6)[0].token_ids == greedy(teacher, full, 6), "up to the last position"


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", ["1x4", "2x3", "raven", "ouro", "qwen2-window", "mistral-window/3", "llama/2"])
def test_fallback_changes_no_token(name: str, batch: int) -> None:
    """Exits that are never right: a window of ticks (4r: four tokens), five tokens that time autoregressive steps, 32
    more without the pipeline, a window, ... By this test's clock a tick takes as long as an autoregressive step.
    """
    outside = TIMED + FIRST_PAUSE
    tokens = 1 + 4 + outside + 4 + 7
    teacher = copy.copy(pipe_teacher(name)[0])
    teacher.eos_token_ids = ()
    prompts = some_prompts(seed=9)[:batch]
    expected = [greedy(teacher, prompt, tokens) for prompt in prompts]
    known = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    predictor = FakeExits(teacher, known, RULES["never"], loops=pipe_teacher(name)[1])
    engine = PipelineEngine(teacher, predictor, clock=itertools.count().__next__)
    for item, text in zip(engine.generate(prompts, tokens), expected, strict=True):
        trace, loops = item.pipeline, predictor.loops
        assert item.token_ids == text
        assert trace is not None
        assert (trace.ticks, trace.left, trace.autoregressive_tokens) == (2 * 4 * loops, 8, outside + 7)
        assert item.steps == trace.ticks + loops * trace.autoregressive_tokens == len(item.accepted_lengths)
        assert item.accepted_lengths == ([0] * (loops - 1) + [1]) * (tokens - 1)


@pytest.mark.parametrize("name", SHAPES)
def test_full_pipe_is_not_paused(name: str) -> None:
    prompts = some_prompts(seed=10)
    got = PipelineEngine(pipe_teacher(name)[0], fake_exits(name, prompts, "always")).generate(prompts, TOKENS)
    assert [item.token_ids for item in got] == references(name, prompts)
    assert all(item.pipeline is not None and item.pipeline.autoregressive_tokens == 0 for item in got)


def pause_of(fallback: AutoregressiveFallback, seconds: float = 1.0) -> int:
    """Return the number of autoregressive steps of `seconds` until the pipeline runs again."""
    steps = 0
    while not fallback.speculating:
        fallback.decoded(seconds)
        steps += 1
    return steps


def tick_window(fallback: AutoregressiveFallback, rate: float, seconds: float) -> None:
    """Record a window of ticks, or fewer if the fallback pauses them."""
    for _ in range(fallback._rates.maxlen or 0):
        if fallback.speculating:
            fallback.speculated(rate, seconds)


def test_pauses_grow_until_the_pipeline_pays_again() -> None:
    """A tick takes half an autoregressive step: half a token per tick breaks even."""
    fallback = pipeline_fallback(4)
    pauses = []
    for _ in range(8):
        tick_window(fallback, 0.25, 0.5)
        pauses.append(pause_of(fallback))
    assert pauses == [TIMED + FIRST_PAUSE, *(min(FIRST_PAUSE * 2**time, LONGEST_PAUSE) for time in range(1, 8))]
    assert fallback.cost == 0.5
    tick_window(fallback, 0.5, 0.5)
    tick_window(fallback, 0.55, 0.5)
    assert fallback.speculating
    tick_window(fallback, 0.0, 0.5)
    assert pause_of(fallback) == FIRST_PAUSE, "after it paid, the first pause is the shortest again"


def test_fallback_times_an_empty_pipe() -> None:
    """The same half token per tick pays with cheap ticks, and does not with expensive ones."""
    for seconds, pause in ((0.3, TIMED), (0.9, TIMED + FIRST_PAUSE)):
        fallback = pipeline_fallback(4)
        tick_window(fallback, 0.5, seconds)
        assert pause_of(fallback) == pause
    full = pipeline_fallback(4)
    for _ in range(5):
        tick_window(full, 0.95, 0.9)
    assert full.speculating and not full.measured, "a full pipe is not doubted"
    unshared = pipeline_fallback(4, shared=False)
    tick_window(unshared, 0.95, 1.1)
    assert pause_of(unshared) == TIMED + FIRST_PAUSE


def test_sampling_is_exact() -> None:
    """Chi-square over the first three sampled tokens: the pipeline against the teacher's exact distribution.

    The exact marginals sum over all prefixes. Exits that know likely texts start most tokens early, some of them wrong.
    """
    teacher, prompt, draws, likely = copy.copy(looped_teacher(2, 3)), [7, 23], 4000, 12
    teacher.eos_token_ids = ()
    everything = torch.arange(VOCABULARY)
    with torch.no_grad():
        first = teacher.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.cat([torch.tensor([prompt]).expand(VOCABULARY, -1), everything[:, None]], dim=1)
        after = teacher.model(pairs).logits[:, -1].softmax(-1)
        triples = torch.cat([pairs.repeat_interleave(VOCABULARY, 0), everything.repeat(VOCABULARY)[:, None]], dim=1)
        last = teacher.model(triples, logits_to_keep=1).logits[:, -1].softmax(-1)
    joint = first[:, None] * after
    exact = [first, joint.sum(0), joint.flatten() @ last]
    starts = [[*prompt, token] for token in first.topk(likely).indices.tolist()]
    predictor = FakeExits(teacher, [start + greedy(teacher, start, 6) for start in starts], RULES["sometimes"])
    counts, traces = torch.zeros(3, VOCABULARY), []
    for seed in range(draws // 500):
        engine = PipelineEngine(teacher, predictor, temperature=1.0, seed=seed, guard=False)
        for item in engine.generate([prompt] * 500, 3):
            counts[torch.arange(3), torch.tensor(item.token_ids)] += 1
            traces.append(item.pipeline)
    whole = total([trace for trace in traces if trace])
    assert whole is not None
    assert min(whole.hits) > draws / 20
    assert whole.corrected > draws / 20
    for place in range(3):
        expected = exact[place] * draws
        common = expected >= 5
        assert common.sum() > 10
        observed = torch.cat([counts[place][common], counts[place][~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        assert statistic < chi2.ppf(0.999, len(expected) - 1), (place, statistic)


@pytest.mark.parametrize(
    ("name", "section", "options"),
    covered(
        ["2x3", "raven", "ouro", "qwen2-window/3"],
        [{}, {"exits": [2], "threshold": 0.5}],
        [{}, {"temperature": 1.0, "top_p": 0.9}],
    ),
    ids=str,
)
def test_tick_reads_once(
    name: str, section: dict[str, Any], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the tokens that left the pipe reach Python, in one read."""
    teacher, loops = pipe_teacher(name)
    engine = PipelineEngine(teacher, random_exits(teacher, loops, **section), guard=False, **options)
    original, reads = PipelineRun.tick, []

    def guarded(run: PipelineRun, writer: Any) -> float:
        with monkeypatch.context() as patch:
            seen = count_reads(patch)
            rate = original(run, writer)
        reads.append(seen)
        return rate

    monkeypatch.setattr(PipelineRun, "tick", guarded)
    engine.generate([[5, 6, 7], [8, 9]], 8)
    assert len(reads) > 7
    assert all(seen == ["tolist"] for seen in reads), reads
