"""A pipeline's ticks and their record against a simulation of single tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.speed.tick_log import total
from firp_cli.metrics import accepted_length, ticks_per_token
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import PipelineTrace
from firp_cli.teacher.teacher import Teacher
from helpers.models import pipe_teacher, sequence_batch
from helpers.pipelines import TOKENS, fake_exits, random_exits, references, some_prompts


@dataclass
class Predicted:
    """Prediction of each loop for a token's prefix (None: no exit), and if a token may start from it."""

    tokens: list[int | None]
    sure: list[bool]


@dataclass
class Flying:
    prefix: tuple[int, ...]
    loop: int = 0
    expected: int | None = None  # the token that its successor was started from


Predict = Callable[[tuple[int, ...]], Predicted]


def simulate(
    predict: Predict, prompt: Iterable[int], tokens: int, exits: tuple[int, ...], loops: int, eos: tuple[int, ...] = ()
) -> tuple[list[int], list[int], PipelineTrace]:
    """Simulate the paper's pipeline; return the output, the tokens that left by tick, and the record."""
    prefix = tuple(prompt)
    output = [predict(prefix).tokens[-1]]
    trace = PipelineTrace(loops, list(exits), hits=[0] * len(exits))
    left_by_tick: list[int] = []
    pipe = [Flying((*prefix, output[0]))]  # the oldest first
    while len(output) < tokens and output[-1] not in eos:
        trace.ticks += 1
        trace.occupancy.append(len(pipe))
        trace.started += sum(token.loop == 0 for token in pipe)
        for token in pipe:
            token.loop += 1
        leaving = pipe[0] if pipe[0].loop == loops else None
        left_by_tick.append(int(leaving is not None))
        if leaving:
            predicted = predict(leaving.prefix).tokens
            output.append(predicted[-1])
            right = [predicted[loop - 1] == predicted[-1] for loop in exits]
            trace.left += 1
            trace.hits = [hits + hit for hits, hit in zip(trace.hits, right, strict=True)]
            trace.corrected += not all(right)
        for place, token in enumerate(pipe):
            predicted = predict(token.prefix)
            now = predicted.tokens[token.loop - 1]
            if now is None or now == token.expected:
                continue
            if token.expected is not None:
                trace.flushes += 1
                trace.flushed += len(pipe) - place - 1
            del pipe[place + 1 :]
            token.expected = now if predicted.sure[token.loop - 1] else None
            if token.expected is not None:
                pipe.append(Flying((*token.prefix, now)))
            break
        if leaving:
            pipe.remove(leaving)
    return output, left_by_tick, trace


def predictions(teacher: Teacher, predictor: SpeedPredictor) -> Predict:
    """Return the predictions of all exits and the last loop after a prefix, from whole forwards without a cache."""

    @cache
    def predict(prefix: tuple[int, ...]) -> Predicted:
        layers = list(predictor.required_layers)
        batch = sequence_batch(teacher, [list(prefix)], [1], layers)
        states = {place: batch.hidden[layer][:, -1] for place, layer in enumerate(layers)}
        logits = predictor.pipeline_logits(teacher, states, None)[:, 0]
        predicted = Predicted([None] * predictor.loops, [True] * predictor.loops)
        for loop, row in zip(predictor.exits, logits, strict=True):
            predicted.tokens[loop - 1] = int(row.argmax())
            predicted.sure[loop - 1] = predictor.threshold is None or bool(row.softmax(0).max() >= predictor.threshold)
        predicted.tokens[-1] = int(teacher.head(batch.final[0, -1]).argmax())
        return predicted

    return predict


def check_against_simulation(name: str, predictor: SpeedPredictor, prompts: list[list[int]]) -> list[PipelineTrace]:
    """Assert that tokens, steps and the whole record of a batch equal each prompt's simulation."""
    teacher = pipe_teacher(name)[0]
    predict = predictions(teacher, predictor)
    got = PipelineEngine(teacher, predictor, guard=False).generate(prompts, TOKENS)
    for prompt, item, text in zip(prompts, got, references(name, prompts), strict=True):
        output, left_by_tick, trace = simulate(
            predict, prompt, TOKENS, predictor.exits, predictor.loops, teacher.eos_token_ids
        )
        assert output == item.token_ids == text
        assert item.accepted_lengths == left_by_tick
        assert item.pipeline == trace
        assert item.steps == trace.ticks
    return [item.pipeline for item in got if item.pipeline]


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("1x4", {}),
        ("2x3", {}),
        ("4x2", {}),
        ("3x4", {"exits": [2]}),
        ("1x4", {"exits": [1, 3]}),
        ("raven", {"exits": [2]}),
        ("ouro", {}),
        ("raven-norms", {"exits": [1, 3]}),
        ("qwen2-window/3", {}),
        ("llama/4", {"exits": [3]}),
    ],
    ids=str,
)
def test_every_tick_equals_the_simulation(name: str, section: dict[str, Any]) -> None:
    prompts = some_prompts(seed=3)
    traces = check_against_simulation(name, fake_exits(name, prompts, "sometimes", **section), prompts)
    whole = total(traces)
    assert whole is not None
    assert whole.flushed > 0
    assert whole.corrected > 0
    assert sum(whole.hits) > 0
    check_against_simulation(name, random_exits(*pipe_teacher(name), **section), prompts[:2])


@pytest.mark.parametrize(("name", "exits"), [("1x4", [1, 3]), ("2x3", None), ("qwen2-window/3", [2])], ids=str)
def test_threshold_starts_only_sure_predictions(name: str, exits: list[int] | None) -> None:
    """A random exit is sometimes above the threshold; a fake one predicts with probability 0.81."""
    prompts = some_prompts(seed=4)[:4]
    teacher, loops = pipe_teacher(name)
    unsure, free = (
        total(check_against_simulation(name, random_exits(teacher, loops, exits=exits, threshold=threshold), prompts))
        for threshold in (0.25, None)
    )
    assert unsure is not None
    assert free is not None
    assert unsure.left < unsure.started < free.started
    assert free.ticks < unsure.ticks < unsure.loops * unsure.left
    free, sure, unsure = (
        total(
            check_against_simulation(
                name, fake_exits(name, prompts, "always", exits=exits, threshold=threshold), prompts
            )
        )
        for threshold in (None, 0.8, 0.9)
    )
    assert sure == free
    assert unsure is not None
    assert unsure.ticks == unsure.loops * unsure.left
    assert unsure.started == unsure.left


def test_ticks_per_token_equals_the_simulation() -> None:
    """With random predictions at every exit the value is exact between the first token and the last."""
    generator = np.random.default_rng(0)
    for exits, loops in [((1, 2, 3), 4), ((2,), 4), ((1, 3), 5), ((1,), 2), ((1, 2), 3), ((4,), 6)]:
        rates, tokens = generator.uniform(0.2, 0.9, len(exits)), 120
        hits = generator.random((tokens + loops, len(exits))) < rates

        def predict(prefix: tuple[int, ...], hits: Any = hits, exits: Any = exits, loops: int = loops) -> Predicted:
            """The true text is 0, 0, 0, ...; a wrong prefix predicts random tokens."""
            draw = random.Random(str(prefix))
            predicted = Predicted([None] * loops, [True] * loops)
            for place, loop in enumerate(exits):
                wrong = draw.randrange(1, 4)
                right = not any(prefix) and hits[len(prefix) - 2, place]
                predicted.tokens[loop - 1] = (0 if right else wrong) if not any(prefix) else draw.randrange(4)
            predicted.tokens[-1] = draw.randrange(4) if any(prefix) else 0
            return predicted

        output, left_by_tick, trace = simulate(predict, (0,), tokens + 1, exits, loops)
        assert output == [0] * (tokens + 1)
        settled = np.flip(np.logical_and.accumulate(np.flip(hits, 1), axis=1), 1)[: tokens - 1].sum(0)
        between = (trace.ticks - loops) / (tokens - 1)  # the first token always takes r ticks
        expected = ticks_per_token(settled, [tokens - 1] * len(exits), (*exits, loops))
        assert between == pytest.approx(expected)
        assert sum(left_by_tick) == trace.left == tokens
        assert accepted_length(settled, [tokens - 1] * len(exits), (*exits, loops)) == pytest.approx(loops / between)
        assert trace.hits == hits[:tokens].sum(0).tolist()
