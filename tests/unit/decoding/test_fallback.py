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

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.fallback import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    RETIMED,
    TIMED,
    TRIAL,
    UNKNOWN,
    WINDOW,
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

AUTOREGRESSIVE, DRAFTED = 1.0, 1.5  # seconds of a step, by the tests' clock


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
    """The first loss starts the timing of autoregressive steps; every later try ends after TRIAL steps."""
    runs = script(tree_fallback(), lambda _: 1.0, 1.5, 4000)
    pauses = [min(FIRST_PAUSE * 2**time, LONGEST_PAUSE) for time in range(8)]
    expected = [("s", TRIAL), ("a", TIMED + FIRST_PAUSE)]
    expected += [part for pause in pauses[1:] for part in (("s", TRIAL), ("a", pause))]
    assert runs[:-1] == expected[: len(runs) - 1]
    assert len(runs) > 14


@pytest.mark.parametrize(("cost", "first"), [(UNKNOWN, TRIAL), (1.9, TRIAL), (1.3, WINDOW)])
def test_speculation_that_pays_is_never_paused(cost: float, first: int) -> None:
    """Autoregressive steps are timed once, early if the rate is doubted, and again after hundreds of steps."""
    runs = script(tree_fallback(cost), lambda _: 1.8, 1.5, 2000)
    timed = ("a", TIMED)
    assert runs[:6] == [("s", first), timed, ("s", RETIMED), timed, ("s", RETIMED), timed]
    assert {count for kind, count in runs if kind == "a"} == {TIMED}


def test_predicted_cost_holds_until_steps_are_timed() -> None:
    doubtful = script(tree_fallback(1.2), lambda _: 2.0, 2.4, 200)
    assert doubtful[0] == ("s", WINDOW), "2.0 tokens for 1.2 autoregressive steps"
    assert doubtful[1] == ("a", TIMED + FIRST_PAUSE), "but a step takes 2.4"
    losing = script(tree_fallback(2.4), lambda _: 2.0, 1.2, 100)
    assert losing[:2] == [("s", TRIAL), ("a", TIMED)], "it loses by the prediction, not by the clock"
    assert tree_fallback(1.7).cost == 1.7
    assert tree_fallback().cost == UNKNOWN


def test_fallback_ends_when_speculation_pays_again() -> None:
    fallback = tree_fallback()
    runs = script(fallback, lambda number: 1.0 if 100 <= number < 300 else 4.0, 1.5, 1200)
    away = [number for number, (kind, count) in enumerate(runs) if kind == "a" and count >= FIRST_PAUSE]
    assert away and runs[-1][0] == "s"
    assert sum(count for kind, count in runs[away[-1] + 1 :] if kind == "s") > 500
    assert script(fallback, lambda _: 1.0, 1.5, 60)[-1][0] == "a"
    assert fallback.pause <= FIRST_PAUSE, "after it paid, the first pause is the shortest again"


def test_close_rates_are_judged_by_the_whole_window() -> None:
    """A clear loss ends a try early, a loss within the noise of few steps does not."""
    for rates, most in (([1.0], TRIAL), ([1.0, 2.6], WINDOW)):
        fallback = tree_fallback(1.9)
        for _ in range(TRIAL):
            fallback.speculated(9.0, 1.9)
        fallback._rates.clear()
        script(fallback, lambda _: 9.0, 1.9, WINDOW + TIMED)  # measured
        fallback._rates.clear()
        runs = script(fallback, lambda number, rates=rates: rates[number % len(rates)], 1.9, 200)
        assert runs[0] == ("s", most)


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


def test_outliers_do_not_change_the_cost() -> None:
    """The first steps of either kind are captured, or something else disturbs them."""
    fallback = tree_fallback()
    for seconds in (90.0, 70.0, *[1.5] * (TRIAL - 2)):
        fallback.speculated(1.8, seconds)
    for seconds in (50.0, 30.0, *[1.0] * (TIMED - 2)):
        assert not fallback.speculating and not fallback.measured
        fallback.decoded(seconds)
    assert fallback.speculating and fallback.cost == 1.5


def test_steps_launched_before_a_decision_do_not_count() -> None:
    """As on a CUDA device, where the host reads a step after it has launched the next one."""
    fallback = tree_fallback(1.5)
    for _ in range(TRIAL):
        fallback.speculated(1.0, 1.5)
    fallback.speculated(4.0, 1.5)
    assert fallback.pause == TIMED
    for _ in range(TIMED + FIRST_PAUSE):
        assert not fallback.speculating
        fallback.decoded(1.0)
    fallback.decoded(1.0)
    assert fallback.speculating
    for _ in range(TRIAL - 1):
        fallback.speculated(1.0, 1.5)
    assert fallback.speculating, "the late step is none of this try"
    fallback.speculated(1.0, 1.5)
    assert fallback.pause == 2 * FIRST_PAUSE


class Clock:
    """Clock that every step advances by its mode's time; it records the modes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.modes: list[Mode] = []
        self.seconds: dict[Mode, float] = {"autoregressive": AUTOREGRESSIVE, "drafted": DRAFTED}

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Steps advance this clock; `guarded` engines read it."""
    clock, original = Clock(), DecodeStep.step

    def step(stepper: DecodeStep, longest: int, mode: Mode, exact: bool = False, first: bool = False) -> None:
        clock.modes.append(mode)
        clock.now += clock.seconds[mode]
        original(stepper, longest, mode, exact, first)

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
    engine = guarded(clock, endless(), fake(batch, lambda n, i: False))
    got = engine.generate(prompts, TOKENS)
    assert [item.token_ids for item in got] == texts
    runs = [(mode, len(list(run))) for mode, run in groupby(clock.modes)]
    if read == "at-once":
        # the first of each run of drafted steps has no draft to verify
        assert runs[:2] == [("drafted", 1 + TRIAL), ("autoregressive", TIMED + FIRST_PAUSE)]
        assert runs[2:4] == [("drafted", 1 + TRIAL), ("autoregressive", 2 * FIRST_PAUSE)]
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
    engine = guarded(clock, endless(), fake(batch, lambda n, i: True))
    for _ in range(3):
        got = engine.generate(prompts, TOKENS)
        assert [item.token_ids for item in got] == texts
        assert sum(item.autoregressive_steps for item in got) <= batch * (TIMED + 1)
    assert clock.modes.count("autoregressive") == TIMED + (read == "late"), "the host learns late that they are timed"


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
def test_fallback_is_told_of_every_step(clock: Clock, read: str, request: pytest.FixtureRequest) -> None:
    """Each step's own time and tokens, also where it is read after a step of the other mode was launched. The first
    drafted step after an autoregressive one verified no draft.
    """
    if read == "late":
        request.getfixturevalue("late")

    class Recording(Restless):
        def __init__(self) -> None:
            super().__init__(0)
            self.told: list[tuple[Mode, float, float]] = []

        def speculated(self, tokens: float, seconds: float) -> None:
            self.told.append(("drafted", tokens, seconds))
            super().speculated(tokens, seconds)

        def decoded(self, seconds: float) -> None:
            self.told.append(("autoregressive", 1.0, seconds))
            super().decoded(seconds)

    prompts, texts = known(1)
    fallback = Recording()
    engine = Engine(endless(), fake(1, lambda n, i: True), parse_tree("chain", 3), guard=fallback, clock=clock)
    (got,) = engine.generate(prompts, TOKENS)
    assert got.token_ids == texts[0]
    steps = clock.modes[1 : 1 + got.steps]
    expected = [
        (mode, 1.0 if mode == "autoregressive" else float(length))
        for before, mode, length in zip(clock.modes, steps, got.accepted_lengths, strict=False)
        if mode == "autoregressive" or before == "drafted"
    ]
    told = [(mode, tokens) for mode, tokens, _ in fallback.told]
    assert told[:-1] == expected[: len(told) - 1] and len(told) >= len(expected)
    assert {tokens for mode, tokens in told[:-1] if mode == "drafted"} == {4.0}  # the last step passes the known text
    assert sum(mode == "autoregressive" for mode in steps) == got.autoregressive_steps > 5
    if read == "at-once":
        assert all(seconds == clock.seconds[mode] for mode, _, seconds in fallback.told)


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
        super().__init__(UNKNOWN)
        self.dice = random.Random(seed)

    def speculated(self, tokens: float, seconds: float) -> None:
        if self.speculating and self.dice.random() < 0.4:
            self.pause = self.dice.randint(1, 4)

    def decoded(self, seconds: float) -> None:
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
    engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps), guard=Restless(0))
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
    assert {mode for mode, _, _ in graphs.keys} == {"autoregressive", "drafted"}
    assert tapes.captured == len(set(graphs.keys))


def test_batch_sizes_have_their_own_fallbacks(clock: Clock) -> None:
    """Times of one sequence are not used for four."""
    prompts, texts = known(4)
    engine = guarded(clock, endless(), fake(4, lambda n, i: False))
    engine.generate(prompts[:1], 40)
    first = len(clock.modes)
    assert clock.modes[: 1 + TRIAL] == ["drafted"] * (1 + TRIAL) and clock.modes[-1] == "autoregressive"
    assert [item.token_ids for item in engine.generate(prompts, 40)] == [text[:40] for text in texts]
    assert clock.modes[first : first + 1 + TRIAL] == ["drafted"] * (1 + TRIAL)
    assert len(engine.fallbacks) == 2


def test_tuned_trees_give_their_predicted_ratio(clock: Clock) -> None:
    """The predicted ratio is used until autoregressive steps are timed."""
    prompts, texts = known(1)
    predictor = fake(1, lambda n, i: True)
    for step, timed in ((1.5, 0), (6.0, TIMED)):
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
    assert engine.graphs is None or len(engine.graphs._replays) >= 2


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
