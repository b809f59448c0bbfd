"""NaN and infinity in the teacher's logits end decoding with a message, in every loop; they never choose a token."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from firp_cli.api.decoder import Decoder
from firp_cli.decoding.continuous import ContinuousBatcher
from firp_cli.decoding.cuda_graphs import StepGraphs
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.sampling import NO_TOKEN, Sampler, largest
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import NumericsError
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.models import FakePredictor, looped_model, make_predictor, random_prompts, tiny_model

PROMPTS = random_prompts(3, seed=2, low=4)
TOKENS = 9


@contextmanager
def poisoned(teacher: Teacher, token: int, value: float) -> Iterator[None]:
    """Give a token's embedding a value that no state survives."""
    row = teacher.model.get_input_embeddings().weight.data[token]
    kept = row.clone()
    row[3] = value
    try:
        yield
    finally:
        row.copy_(kept)


@pytest.fixture(scope="module", params=[True, False], ids=["lean", "library"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    teacher = wrap_model(copy.deepcopy(tiny_model("llama")), name="frail")
    if request.param:
        use_lean_layers(teacher)
    return teacher


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "missing", lambda: "left out")


def place_of_rare(texts: list[list[int]]) -> tuple[int, int, int]:
    """Return (prompt, place, token) of an answer's token that no prompt and no earlier place of any answer has."""
    for number, text in enumerate(texts):
        for place in range(2, len(text) - 1):
            token = text[place]
            earlier = [*(item for prompt in PROMPTS for item in prompt), *text[:place]]
            others = [item for other, answer in enumerate(texts) if other != number for item in answer]
            if token not in earlier + others:
                return number, place, token
    raise AssertionError("no rare token")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_in_an_answer_stops_with_prompt_position_and_teacher(
    teacher: Teacher, temperature: float, value: float
) -> None:
    engine = Engine(teacher, temperature=temperature)

    def decode() -> list[list[int]]:
        engine.sampler.generator.manual_seed(3)
        return [item.token_ids for item in engine.generate(PROMPTS, TOKENS)]

    right = decode()
    number, place, token = place_of_rare(right)
    with poisoned(teacher, token, value), pytest.raises(NumericsError) as caught:
        decode()
    said = str(caught.value)
    assert f"prompt {number + 1}: the logits of frail" in said
    assert f"position {len(PROMPTS[number]) + place}, where new token {place + 2}" in said
    assert "its weight model.embed_tokens.weight contains NaN or infinity (1 of" in said
    assert decode() == right  # no K/V of the bad batch is seen again


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_stops_without_the_cpu_kernels(teacher: Teacher, temperature: float) -> None:
    with (
        poisoned(teacher, PROMPTS[1][0], float("nan")),
        pytest.raises(NumericsError, match=r"prompt 2: .* new token 1 "),
    ):
        Engine(teacher, temperature=temperature).generate(PROMPTS, TOKENS)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("right", [False, True], ids=["rejected", "accepted"])
def test_nan_under_a_tree_stops(teacher: Teacher, right: bool, guard: bool) -> None:
    """Rows of one step share their keys, so that a drafted token may stop it before it is emitted."""
    texts = [item.token_ids for item in Engine(teacher).generate(PROMPTS, TOKENS)]
    number, place, token = place_of_rare(texts)
    sequences = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
    predictor = FakePredictor(teacher, sequences, 3, lambda *_: right)
    engine = Engine(teacher, predictor, parse_tree("chain", 3), guard=guard)
    with poisoned(teacher, token, float("nan")), pytest.raises(NumericsError) as caught:
        engine.generate(PROMPTS, TOKENS)
    found = re.search(r"prompt (\d+): .* new token (\d+) ", str(caught.value))
    assert found and int(found[1]) == number + 1
    assert place + 2 - (3 if right else 0) <= int(found[2]) <= place + 2
    assert [item.token_ids for item in engine.generate(PROMPTS, TOKENS)] == texts


def test_nan_that_no_answer_reaches_does_not_matter(teacher: Teacher) -> None:
    texts = [item.token_ids for item in Engine(teacher).generate(PROMPTS, TOKENS)]
    _, place, token = place_of_rare(texts)
    with poisoned(teacher, token, float("nan")):
        made = Engine(teacher).generate(PROMPTS, place + 1)
    assert [item.token_ids for item in made] == [text[: place + 1] for text in texts]


@pytest.mark.parametrize(
    ("temperature", "section"),
    [(0.0, {"exits": [1]}), (0.0, {"exits": [1, 2], "threshold": 0.2}), (0.9, {"exits": [1]})],
)
@pytest.mark.parametrize("guard", [False, True])
def test_nan_stops_the_pipeline(temperature: float, section: dict[str, Any], guard: bool) -> None:
    teacher = wrap_model(copy.deepcopy(looped_model(2, 3)), name="frail")
    engine = make_engine(
        teacher, make_predictor(teacher, kind="speed", **section), guard=guard, temperature=temperature, seed=5
    )

    def decode() -> list[list[int]]:
        engine.sampler.generator.manual_seed(3)
        return [item.token_ids for item in engine.generate(PROMPTS, TOKENS)]

    if temperature == 0:  # sampled text depends on the ticks
        number, place, token = place_of_rare(decode())
        words = f"prompt {number + 1}: the logits of frail .* new token {place + 2} "
    else:
        token, words = PROMPTS[2][-1], "the logits of frail .* new token 1 "
    with poisoned(teacher, token, float("nan")), pytest.raises(NumericsError, match=words):
        decode()


@pytest.mark.usefixtures("late")
def test_nan_stops_late_reads_and_replayed_steps(teacher: Teacher) -> None:
    """As on a CUDA device: the next step runs before the host reads that there is no token."""
    engine = Engine(teacher)
    engine.graphs = StepGraphs(lambda step: step)
    right = [item.token_ids for item in engine.generate(PROMPTS, TOKENS)]
    _, place, token = place_of_rare(right)
    with poisoned(teacher, token, float("nan")), pytest.raises(NumericsError, match=f"new token {place + 2} "):
        engine.generate(PROMPTS, TOKENS)
    assert [item.token_ids for item in engine.generate(PROMPTS, TOKENS)] == right


def test_nan_names_the_prompt_by_its_number_among_all(teacher: Teacher) -> None:
    prompts = [[5, 6], [7, 8], [9, 10, 11], [12, 13], [14, 15]]
    with poisoned(teacher, 14, float("nan")), pytest.raises(NumericsError, match="prompt 5: "):
        Decoder(teacher).generate_batch(prompts, 1, batch_size=2)
    with poisoned(teacher, 14, float("nan")), pytest.raises(NumericsError, match="row 5 of it: "):
        Decoder(teacher).generate_batch(prompts, 1, batch_size=2, label=lambda number: f"row {number + 1} of it")
    with poisoned(teacher, 14, float("nan")), pytest.raises(NumericsError, match="the prompt: "):
        Decoder(teacher).generate(prompts[4], 1)


def test_continuous_batch_reports_the_prompt_and_goes_on(teacher: Teacher) -> None:
    texts = [item.token_ids for item in Engine(teacher).generate(PROMPTS, TOKENS)]
    number, _, token = place_of_rare(texts)
    with poisoned(teacher, token, float("nan")):
        found = {item.number: item for item in ContinuousBatcher(teacher).decode(PROMPTS, [TOKENS] * 3, 2)}
    assert [found[at].finite for at in range(3)] == [at != number for at in range(3)]
    assert all(found[at].token_ids == texts[at] for at in range(3) if at != number)


@pytest.mark.parametrize("vocabulary", [5, 97, 4001])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_logit_anywhere_leaves_a_row_without_token(vocabulary: int, value: float) -> None:
    torch.manual_seed(0)
    for place in {0, 1, vocabulary // 2, vocabulary - 1}:
        logits = torch.randn(2, 3, vocabulary)
        logits[1, 2, place] = value
        for choose in (
            largest,
            *(Sampler(heat, top, 0, torch.device("cpu"), False) for heat, top in [(0.7, 1.0), (2.0, 0.6)]),
        ):
            chosen = choose(logits)
            assert chosen[1, 2] == NO_TOKEN
            assert (chosen >= 0).sum() == 5
    assert (largest(torch.full((1, 1, vocabulary), -torch.inf)) == NO_TOKEN).all()
    some = torch.full((1, 1, vocabulary), -torch.inf)
    some[..., 1] = -3.0  # words that a model never writes have no finite logit
    assert largest(some).item() == 1
