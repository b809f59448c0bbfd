"""Fallback of draft trees: its decisions by the test's own clock, and that it changes no token."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.fallback import (
    CALIBRATION,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    TREES,
    AutoregressiveFallback,
    tree_fallback,
)
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.step import DecodeStep, Mode
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.results import Generation, Prediction
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TunedTree
from helpers.graphs import with_graphs
from helpers.models import (
    VOCABULARY,
    FakePredictor,
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    make_predictor,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered

AUTOREGRESSIVE, DRAFTED, START = 1.0, 1.5, 1.1  # seconds of a step, by the tests' clock


def script(
    fallback: AutoregressiveFallback, rate: Callable[[int], float], seconds: float, steps: int
) -> list[tuple[str, int]]:
    """Return the runs of speculative ("s") and autoregressive ("a") steps that the fallback asks for if step n emits
    rate(n) tokens. An autoregressive step takes a second.
    """
    asked = []
    for number in range(steps):
        asked.append("s" if fallback.speculating else "a")
        if fallback.speculating:
            fallback.speculated(rate(number), seconds)
        else:
            fallback.decoded(1.0)
    return [(kind, len(list(run))) for kind, run in groupby(asked)]


def test_pauses_grow_while_speculation_loses() -> None:
    """Six clear losses start the timing of autoregressive steps; every later try ends after six steps."""
    runs = script(tree_fallback(), lambda _: 1.0, 1.5, 4000)
    early = ("s", TREES.early)
    pauses = [min(FIRST_PAUSE * 2**time, LONGEST_PAUSE) for time in range(8)]
    expected = [
        early,
        ("a", CALIBRATION + FIRST_PAUSE),
        *(part for pause in pauses[1:] for part in (early, ("a", pause))),
    ]
    assert runs[:-1] == expected[: len(runs) - 1]
    assert len(runs) > 14


@pytest.mark.parametrize(("rate", "first"), [(3.0, TREES.early), (4.5, TREES.untimed)])
def test_speculation_that_pays_is_never_paused(rate: float, first: int) -> None:
    """Autoregressive steps are timed once, early if the rate is doubted, and again after hundreds of steps."""
    runs = script(tree_fallback(), lambda _: rate, 1.5, 900)
    quick = ("a", TREES.quick)
    retime = ("s", TREES.retime)
    assert runs[:6] == [("s", first), quick, retime, quick, retime, quick]
    assert {count for kind, count in runs if kind == "a"} == {TREES.quick}


def test_timing_costs_little_where_speculation_pays() -> None:
    """In an answer of 128 tokens, at twice the throughput: under 2%, and nothing with a predicted ratio."""
    for fallback, most in ((tree_fallback(), 0.02), (tree_fallback(1.5), 0.0)):
        runs = script(fallback, lambda _: 3.0, 1.5, 43)
        timed = sum(count for kind, count in runs if kind == "a")
        began = sum(kind == "a" for kind, _ in runs)
        lost = timed * (1 - 1.5 / 3.0) + began * (1.15 - 1.5 / 3.0)
        assert lost / (128 / 2.0) <= most


def test_predicted_ratio_holds_until_steps_are_timed() -> None:
    doubtful = script(tree_fallback(1.2), lambda _: 2.0, 2.4, 200)
    assert doubtful[0] == ("s", TREES.untimed), "2.0 tokens for 1.2 autoregressive steps"
    assert doubtful[1] == ("a", CALIBRATION + FIRST_PAUSE), "but a step takes 2.4"
    losing = script(tree_fallback(2.4), lambda _: 2.0, 1.2, 100)
    assert losing[:2] == [("s", TREES.early), ("a", CALIBRATION)], "it loses by the prediction, not by the clock"
    assert tree_fallback(1.7).needed == 1.7
    assert tree_fallback().needed is None


def test_fallback_ends_when_speculation_pays_again() -> None:
    fallback = tree_fallback()
    runs = script(fallback, lambda number: 1.0 if 100 <= number < 300 else 4.0, 1.5, 1200)
    away = [number for number, (kind, count) in enumerate(runs) if kind == "a" and count >= FIRST_PAUSE]
    assert away and runs[-1][0] == "s"
    assert sum(count for kind, count in runs[away[-1] + 1 :] if kind == "s") > 500
    assert script(fallback, lambda _: 1.0, 1.5, 60)[-1][0] == "a"
    assert fallback.pause <= FIRST_PAUSE, "after it paid, the first pause is the shortest again"


def test_clear_loss_ends_a_try_early() -> None:
    for rates, length in (([1.0], TREES.early), ([1.0, 3.0, 1.0, 3.0, 1.0, 2.5], TREES.trial)):
        fallback = tree_fallback(2.0)
        runs = script(fallback, lambda number, rates=rates: rates[number % len(rates)], 2.0, 40)
        assert runs[0] == ("s", length)


def test_noise_costs_little() -> None:
    """Losses against the better of the two ways, by simulation; close to break-even they are small."""
    for pays, ratio, most in (
        (0.6, 1.3, 0.02),
        (0.6, 1.8, 0.025),
        (0.6, 2.2, 0.04),
        (0.6, 2.6, 0.04),
        (0.3, 2.5, 0.04),
    ):
        lost = []
        for seed in range(8):
            dice, fallback, spent, made, speculative = random.Random(seed), tree_fallback(), 0.0, 0, 0.0
            while made < 2000:
                slow = (1 + abs(dice.gauss(0, 0.1))) * (3 if dice.random() < 0.02 else 1)
                if fallback.speculating:
                    rate = 1 + next((n for n in range(4) if dice.random() > pays), 4)
                    fallback.speculated(rate, ratio * slow)
                    spent, made = spent + ratio * slow, made + rate
                else:
                    fallback.decoded(slow)
                    spent, made = spent + slow, made + 1
            speculative = 2000 * ratio / sum(pays**n for n in range(5))
            lost.append(spent / 1.12 / min(2000, speculative) - 1)
        assert sum(lost) / len(lost) < most, (pays, ratio)


def test_unusable_times_are_ignored() -> None:
    """Captured steps have no usable time: autoregressive steps go on until some are timed."""
    fallback = tree_fallback()
    for _ in range(TREES.early):
        fallback.speculated(1.0, 1.5)
    fallback.decoded(None)
    fallback.decoded(None)
    assert not fallback.speculating and fallback.needed is None
    fallback.decoded(1.0)
    fallback.decoded(1.0)
    assert fallback.needed == 1.5


def test_timing_ends_without_usable_times() -> None:
    blind = tree_fallback()
    runs = []
    for _ in range(60):
        runs.append(blind.speculating)
        (blind.speculated(1.0, None) if blind.speculating else blind.decoded(None))
    assert blind.needed is None
    assert 0 < runs.count(False) < 30, "the pause ends although nothing was timed"
    (blind.speculated(1.0, 9.9) if blind.speculating else blind.decoded(9.9))
    paused = tree_fallback(2.0)
    for _ in range(TREES.early):
        paused.speculated(1.0, 2.0)
    while not paused.speculating:
        paused.decoded(None)
    assert paused.needed == 2.0


def test_steps_launched_before_a_decision_do_not_count() -> None:
    fallback = tree_fallback(1.5)
    for _ in range(TREES.early):
        fallback.speculated(1.0, 1.5)
    pause = fallback.pause
    fallback.speculated(4.0, 1.5)
    assert (fallback.speculating, fallback.pause) == (False, pause)


class Clock:
    """Clock that every step advances by its mode's time; it records the modes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.modes: list[Mode] = []
        self.seconds: dict[Mode, float] = {"autoregressive": AUTOREGRESSIVE, "start": START, "drafted": DRAFTED}

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Steps advance this clock; `guarded` engines read it."""
    clock, original = Clock(), DecodeStep.step

    def step(stepper: DecodeStep, longest: int, mode: Mode, exact: bool = False) -> None:
        clock.modes.append(mode)
        clock.now += clock.seconds[mode]
        original(stepper, longest, mode, exact)

    monkeypatch.setattr(DecodeStep, "step", step)
    return clock


def guarded(clock: Clock, teacher: Teacher, predictor: TreePredictor, tree: Any = "chain", **options: Any) -> Engine:
    spec = parse_tree(tree, predictor.steps) if isinstance(tree, str) else tree
    return Engine(teacher, predictor, spec, guard=True, clock=clock, **options)


TOKENS = 240


@cache
def endless() -> Teacher:
    teacher = copy.copy(tiny_teacher("llama", lean=True))
    teacher.eos_token_ids = ()
    return teacher


@cache
def answers() -> list[tuple[list[int], list[int]]]:
    prompts = random_prompts(4, seed=61)
    return [(prompt, generate_reference(tiny_model("llama"), prompt, TOKENS, eos_token_id=-1)) for prompt in prompts]


def known(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts, and the teacher's texts after them."""
    return [prompt for prompt, _ in answers()[:count]], [text for _, text in answers()[:count]]


def fake(count: int, right: Callable[[int, int], bool]) -> FakePredictor:
    return FakePredictor(endless(), [prompt + text for prompt, text in answers()[:count]], 3, right)


@pytest.mark.parametrize("read", ["at-once", "late"])
@pytest.mark.parametrize("batch", [1, 4])
def test_predictor_never_right_is_paused(clock: Clock, batch: int, read: str, request: pytest.FixtureRequest) -> None:
    if read == "late":
        request.getfixturevalue("late")
    prompts, texts = known(batch)
    options = EngineOptions(read_every=4 if read == "late" else 1)
    engine = guarded(clock, endless(), fake(batch, lambda n, i: False), options=options)
    got = engine.generate(prompts, TOKENS)
    assert [item.token_ids for item in got] == texts
    runs = [(mode, len(list(run))) for mode, run in groupby(clock.modes)]
    if read == "at-once":
        assert runs[:3] == [("start", 1), ("drafted", 6), ("autoregressive", CALIBRATION + FIRST_PAUSE)]
        assert runs[3:6] == [("start", 1), ("drafted", 6), ("autoregressive", 2 * FIRST_PAUSE)]
    assert clock.modes.count("autoregressive") > 0.7 * TOKENS
    assert all(set(item.accepted_lengths) == {1} and item.steps == TOKENS - 1 for item in got)
    assert all(item.autoregressive_steps == clock.modes.count("autoregressive") for item in got) or read == "late"
    before = len(clock.modes)
    assert [item.token_ids for item in engine.generate(prompts, TOKENS)] == texts
    assert clock.modes[before] == "autoregressive", "the pause goes on: no pseudo rows after this prompt"


@pytest.mark.parametrize("read", ["at-once", "late"])
@pytest.mark.parametrize("batch", [1, 4])
def test_predictor_always_right_is_not_paused(
    clock: Clock, batch: int, read: str, request: pytest.FixtureRequest
) -> None:
    if read == "late":
        request.getfixturevalue("late")
    prompts, texts = known(batch)
    options = EngineOptions(read_every=4 if read == "late" else 1)
    engine = guarded(clock, endless(), fake(batch, lambda n, i: True), options=options)
    for _ in range(3):
        got = engine.generate(prompts, TOKENS)
        assert [item.token_ids for item in got] == texts
        assert sum(item.autoregressive_steps for item in got) <= batch * TREES.quick
    assert clock.modes.count("autoregressive") == TREES.quick
    assert clock.modes.count("start") == 3 + 1


def test_predictor_right_again_is_used_again(clock: Clock) -> None:
    prompts, texts = known(1)
    middle = range(len(prompts[0]) + 60, len(prompts[0]) + 110)
    engine = guarded(clock, endless(), fake(1, lambda n, i: n not in middle))
    for _ in range(4):
        got = engine.generate(prompts, TOKENS)[0]
        assert got.token_ids == texts[0]
    runs = [(mode, len(list(run))) for mode, run in groupby(clock.modes)]
    assert any(mode == "autoregressive" and count >= FIRST_PAUSE for mode, count in runs)
    assert runs[-1][0] == "drafted"


@pytest.mark.parametrize("read", ["at-once", "late"])
def test_steps_read_together_have_one_mode(clock: Clock, read: str, request: pytest.FixtureRequest) -> None:
    """A change of mode reads all steps first, and a tree follows a step that drafted."""
    if read == "late":
        request.getfixturevalue("late")
    prompts, _ = known(1)
    predictor = fake(1, lambda n, i: True)
    options = EngineOptions(read_every=4)
    engine = Engine(endless(), predictor, parse_tree("chain", 3), guard=Restless(0), clock=clock, options=options)
    unread: list[tuple[int, Mode]] = []
    original = DecodeBatch.step

    def step(run: DecodeBatch, mode: Mode) -> None:
        unread.append((run.stepper.ring.unread, mode))
        original(run, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeBatch, "step", step)
        engine.generate(prompts, TOKENS)
    modes = [mode for _, mode in unread]
    for place in range(1, len(unread)):
        assert modes[place] == modes[place - 1] or not unread[place][0]
        assert modes[place] != "drafted" or modes[place - 1] != "autoregressive"
    assert max(count for count, _ in unread) == (7 if read == "late" else 3)
    assert set(modes) == {"autoregressive", "start", "drafted"}


METHODS = {
    "firp": ("firp", "dynamic:8"),
    "firp-budget": ("firp", "dynamic:9@3"),
    "firp-steps": ("firp", "dynamic:6/2@2"),
    "hidden_transfer": ("hidden_transfer", "static:3x2x1@4"),
    "hidden_transfer-shallow": ("hidden_transfer", "static:2x1"),
    "medusa": ("medusa", "dynamic:6"),
}


class Restless(AutoregressiveFallback):
    """Fallback that pauses at random."""

    def __init__(self, seed: int) -> None:
        super().__init__(TREES)
        self.dice = random.Random(seed)

    def speculated(self, rate: float, seconds: float | None) -> None:
        if self.speculating and self.dice.random() < 0.4:
            self.pause = self.dice.randint(1, 4)

    def decoded(self, seconds: float | None) -> None:
        self.pause -= 1


@cache
def reference(number: int) -> list[int]:
    return generate_reference(embedded_teacher().model, embedded_prompts(4)[number], 60)


def outcome(item: Generation) -> tuple[Any, ...]:
    return item.token_ids, item.accepted_lengths, item.finish_reason


@pytest.mark.parametrize(("method", "batch", "run"), covered(list(METHODS), [1, 4], ["at-once", "late", "graphs"]))
def test_mode_changes_change_no_token(method: str, batch: int, run: str, request: pytest.FixtureRequest) -> None:
    """Trained predictors, sequences that end by EOS in the middle of steps, and random pauses; read at once, read late,
    and with replayed steps.
    """
    if run == "late":
        request.getfixturevalue("late")
    kind, tree = METHODS[method]
    predictor = embedded_predictor(kind)
    teacher = copy.copy(embedded_teacher())
    teacher.eos_token_ids = (*teacher.eos_token_ids, reference(0)[21])
    texts = [reference(number) for number in range(batch)]
    expected = [
        text[: min([place + 1 for place, token in enumerate(text) if token in teacher.eos_token_ids], default=60)]
        for text in texts
    ]
    spec, options = parse_tree(tree, predictor.steps), EngineOptions(read_every=3)
    engine = Engine(teacher, predictor, spec, guard=Restless(0), options=options)
    tapes = with_graphs(engine)[1] if run == "graphs" else None
    lengths: set[int] = set()
    for _ in range(4 if run == "graphs" else 2):
        got = engine.generate(embedded_prompts(4)[:batch], 60)
        assert [item.token_ids for item in got] == expected
        for item in got:
            assert sum(item.accepted_lengths) + 1 == len(item.token_ids)
            lengths |= set(item.accepted_lengths)
    assert 1 in lengths and len(lengths) > 1
    assert tapes is None or tapes.replayed > 0


@pytest.mark.parametrize(
    ("section", "family", "stack"),
    covered(
        [{"kind": "firp", "layer": 2, "steps": 3}, {"kind": "medusa", "steps": 3}],
        ["mistral-window", "qwen2-window", "qwen3"],
        ["lean", "library"],
    ),
)
def test_mode_changes_change_no_token_of_other_teachers(section: dict[str, Any], family: str, stack: str) -> None:
    teacher = tiny_teacher(family, stack == "lean")
    prompts = random_prompts(4, seed=63)
    engine = Engine(teacher, make_predictor(teacher, **section), parse_tree("dynamic:5", 3), guard=Restless(0))
    for prompt, item in zip(prompts, engine.generate(prompts, 24), strict=True):
        assert item.token_ids == generate_reference(tiny_model(family), prompt, 24)


def test_each_mode_has_its_own_graph() -> None:
    predictor = embedded_predictor("firp")
    engine = Engine(embedded_teacher(), predictor, parse_tree("dynamic:8", 4), guard=Restless(0))
    graphs, tapes = with_graphs(engine)
    for _ in range(4):
        engine.generate(embedded_prompts(1), 60)
    assert {mode for mode, _, _ in graphs.keys} == {"autoregressive", "start", "drafted"}
    assert tapes.captured == len(set(graphs.keys))
    assert all(graphs.settled(key) for key in graphs.keys)


def test_times_of_captured_steps_are_not_used() -> None:
    """With graphs the first run of a key is eager and the second one is captured: both take longer than usual."""
    recorded: list[float | None] = []

    class Recording(Restless):
        def speculated(self, rate: float, seconds: float | None) -> None:
            recorded.append(seconds)

    predictor = embedded_predictor("firp")
    engine = Engine(embedded_teacher(), predictor, parse_tree("dynamic:8", 4), guard=Recording(0))
    with_graphs(engine)
    engine.generate(embedded_prompts(1), 30)
    assert recorded[:2] == [None, None]
    assert len(recorded) > 4 and all(second is not None for second in recorded[2:])


def test_batch_sizes_have_their_own_fallbacks(clock: Clock) -> None:
    """Times of one sequence are not used for four."""
    prompts, texts = known(4)
    engine = guarded(clock, endless(), fake(4, lambda n, i: False))
    engine.generate(prompts[:1], 40)
    first = len(clock.modes)
    assert clock.modes[1:7] == ["drafted"] * 6
    assert [item.token_ids for item in engine.generate(prompts, 40)] == [text[:40] for text in texts]
    assert clock.modes[first : first + 7] == ["start"] + ["drafted"] * 6
    assert len(engine.fallbacks) == 2


def test_tuned_trees_give_their_predicted_ratio(clock: Clock) -> None:
    """The predicted ratio is used until autoregressive steps are timed."""
    prompts, texts = known(1)
    predictor = fake(1, lambda n, i: True)
    for step, timed in ((1.5, 0), (6.0, CALIBRATION)):
        entry = TunedTree({}, "", 1, 128, 0.0, "chain/3", Prediction(4.0, step, 1.0, 4.0 / step))
        trees = TunedTrees(parse_tree("dynamic:8", 3), 3, (entry,))
        engine = guarded(clock, endless(), predictor, trees)
        clock.modes.clear()
        assert engine.generate(prompts, 100)[0].token_ids == texts[0][:100]
        assert clock.modes.count("autoregressive") == timed


def test_autoregressive_decoding_has_no_fallback() -> None:
    teacher, prompts = embedded_teacher(), embedded_prompts(1)
    for engine in (
        Engine(teacher, guard=True),
        Engine(teacher, embedded_predictor("firp"), parse_tree("none", 4), guard=True),
    ):
        assert engine.generate(prompts, 60)[0].token_ids == reference(0)
        assert engine.fallbacks == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("section", [{"kind": "firp", "layer": 2, "steps": 3}, {"kind": "medusa", "steps": 3}])
def test_mode_changes_on_cuda(
    section: dict[str, Any], batch: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step of any mode waits for the host, and the tokens are those of `generate`, replayed or not."""
    teacher = wrap_model(copy.deepcopy(tiny_model("llama")).to("cuda", torch.float32), name="llama")
    predictor = make_predictor(teacher, **section).to(teacher.device, teacher.dtype)
    options = EngineOptions(graphs=graphs)
    engine = Engine(teacher, predictor, parse_tree("dynamic:6@3", 3), guard=Restless(0), options=options)
    prompts = random_prompts(batch, seed=65)
    expected = [generate_reference(teacher.model, prompt, 40) for prompt in prompts]
    assert [item.token_ids for item in engine.generate(prompts, 40)] == expected
    original = DecodeStep.step

    def watched(*arguments: Any, **options: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if not graphs:
        monkeypatch.setattr(DecodeStep, "step", watched)
    for _ in range(5):
        assert [item.token_ids for item in engine.generate(prompts, 40)] == expected
    assert engine.graphs is None or len(engine.graphs._replays) >= 3


@pytest.mark.slow
def test_sampling_with_mode_changes_is_exact() -> None:
    """Chi-square over the first two tokens against the teacher's exact distribution: the mode of a step may depend on
    the accepted tokens, but not on the next one.
    """
    from scipy.stats import chi2

    soft = wrap_model(tiny_model("qwen3"), check=False)
    soft.eos_token_ids = ()
    prompt, head = random_prompts(1, seed=9)[0], soft.head
    soft.head = lambda normed: head(normed) * 0.25  # type: ignore[method-assign]
    text = greedy(tiny_teacher("qwen3"), prompt, 8)
    predictor = FakePredictor(soft, [prompt + text], 3, lambda n, i: i % 2 == 1)
    counts = torch.zeros(2, VOCABULARY)
    for seed in range(80):
        tree = parse_tree("dynamic:6", 3)
        engine = Engine(soft, predictor, tree, temperature=1.0, seed=seed, guard=Restless(seed))
        for item in engine.generate([prompt] * 50, 3):
            counts[0, item.token_ids[0]] += 1
            counts[1, item.token_ids[1]] += 1
    with torch.no_grad():
        ids = torch.tensor([prompt])
        first = (soft.model(ids).logits[0, -1] * 0.25).softmax(-1)
        pairs = torch.cat([ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        second = first @ (soft.model(pairs).logits[:, -1] * 0.25).softmax(-1)
    for observed, exact in zip(counts, (first, second), strict=True):
        expected = exact * observed.sum()
        common = expected >= 5
        got = torch.cat([observed[common], observed[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        statistic = ((got - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        assert statistic < chi2.ppf(0.999, len(expected) - 1)
