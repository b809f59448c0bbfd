"""Decoding with n-gram drafts: lossless, long where the text repeats itself, and autoregressive where it does not."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.text_drafts import ngram_predictor
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.ngram import RULES
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.decoding import TOKENS, references, watch_steps
from helpers.graphs import with_graphs
from helpers.models import VOCABULARY, generate_reference, random_prompts, tiny_model, tiny_teacher
from helpers.pairwise import covered

CPU = torch.device("cpu")
NAMES = list(RULES)
names = pytest.mark.parametrize("name", NAMES)


def counting_teacher(period: int, logit: float = 1.0) -> Teacher:
    """Return a teacher that writes 10, 11, ... and, after `period` tokens, again from 10. These have `logit`, others
    0.
    """
    teacher = wrap_model(tiny_model("llama"), name="counting", check=False)
    teacher.eos_token_ids = ()
    known = teacher._embed.weight.detach()
    following = 10 + (torch.arange(VOCABULARY) - 9) % period

    def run(first: int, last: int, rows: torch.Tensor, *_: Any) -> torch.Tensor:
        return rows

    def head(states: torch.Tensor) -> torch.Tensor:
        tokens = torch.cdist(states, known).argmin(-1)
        return torch.nn.functional.one_hot(following[tokens], VOCABULARY).float() * logit

    teacher.layers_between, teacher.norm, teacher.head = run, lambda rows: rows, head  # type: ignore[method-assign]
    return teacher


def repeated_prompts(count: int, seed: int) -> list[list[int]]:
    """Return prompts that contain their last tokens once before."""
    return [prompt + prompt[:4] for prompt in random_prompts(count, seed=seed)]


@pytest.mark.parametrize(
    ("name", "family", "stack", "batch"),
    covered(NAMES, ["llama", "qwen2-window", "qwen3"], ["lean", "library"], [1, 3]),
)
def test_ngram_drafts_are_lossless(name: str, family: str, stack: str, batch: int) -> None:
    teacher = tiny_teacher(family, stack == "lean")
    prompts = [*repeated_prompts(2, seed=1), *random_prompts(1, seed=2)]
    expected = references(teacher, prompts)
    engine = make_engine(teacher, *ngram_predictor(name, teacher))
    got = [item for start in range(0, 3, batch) for item in engine.generate(prompts[start : start + batch], TOKENS)]
    assert [item.token_ids for item in got] == expected
    assert all(sum(item.accepted_lengths) + 1 == len(item.token_ids) for item in got)


@names
def test_sequences_leave_at_eos_and_keep_their_own_text(name: str) -> None:
    """The answers before were decoded by the same engine; the same prompt twice drafts from its own text."""
    teacher = tiny_teacher("llama", lean=True)
    prompts = repeated_prompts(3, seed=6)
    prompts.append(prompts[0])
    texts = references(teacher, prompts, 40)
    ending = texts[1][7]
    shortened = wrap_model(tiny_model("llama"), name="tiny-llama", check=False)
    shortened.eos_token_ids = (ending,)
    expected = [text[: text.index(ending) + 1] if ending in text else text for text in texts]
    assert len(set(map(len, expected))) > 1
    engine = Engine(shortened, *ngram_predictor(name, shortened))
    once = engine.generate(prompts, 40)
    again = engine.generate(prompts[::-1], 40)[::-1]
    assert [item.token_ids for item in once] == expected
    assert [item.accepted_lengths for item in once] == [item.accepted_lengths for item in again]
    assert once[0].accepted_lengths == once[3].accepted_lengths


@names
def test_repetition_is_accepted_at_full_length(name: str) -> None:
    teacher = counting_teacher(period=20)
    predictor, spec = ngram_predictor(name, teacher)
    item = Engine(teacher, predictor, spec).generate([[10]], 90)[0]
    assert item.token_ids == [10 + place % 20 for place in range(1, 91)]
    assert set(item.accepted_lengths[:19]) == {1}, "the first round holds no token twice"
    full = item.accepted_lengths.index(predictor.steps + 1)
    assert full < 22, "a longer match lets `suffix` draft more"
    assert set(item.accepted_lengths[full:-1]) == {predictor.steps + 1}


@names
def test_text_without_repetition_costs_autoregressive_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = counting_teacher(period=80)
    rows: list[int] = []
    embed = teacher.embed
    monkeypatch.setattr(teacher, "embed", lambda ids: rows.append(ids.shape[1]) or embed(ids))
    engine = Engine(teacher, *ngram_predictor(name, teacher))
    item = engine.generate([[10]], 60)[0]
    assert item.accepted_lengths == [1] * 59
    assert rows == [1] * len(rows)


@names
def test_sampling_is_plain_sampling(name: str) -> None:
    """Chi-square over what follows each token of sampled texts that repeat themselves often."""
    from scipy.stats import chi2

    period, logit = 12, 5.5
    teacher = counting_teacher(period, logit)
    engine = Engine(teacher, *ngram_predictor(name, teacher), temperature=1.0, seed=3)
    right, wrong = 0, torch.zeros(VOCABULARY)
    items = engine.generate([[10, 11, 12]] * 30, 120)
    for item in items:
        for before, after in itertools.pairwise([12, *item.token_ids]):
            follows = after == 10 + (before - 9) % period
            right, wrong[after] = right + follows, wrong[after] + (not follows)
    lengths = [length for item in items for length in item.accepted_lengths]
    assert sum(lengths) > 1.5 * len(lengths), "most tokens are drafted"
    chance = math.exp(logit) / (math.exp(logit) + VOCABULARY - 1)
    total = right + int(wrong.sum())
    deviation = (right - total * chance) ** 2 / (total * chance * (1 - chance))
    assert deviation < chi2.ppf(0.999, 1), (right, total, chance)
    others = wrong[period + 10 :]  # tokens that are never the right ones
    expected = others.sum() / len(others)
    assert ((others - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(others) - 1)


@pytest.mark.parametrize("guard", [False, True])
@names
def test_graphs_and_guard_do_not_change_the_text(name: str, guard: bool) -> None:
    """Replayed steps have one shape; those without a draft append to the text as well."""
    teacher = tiny_teacher("llama", lean=True)
    prompts = repeated_prompts(3, seed=3)
    expected = references(teacher, prompts, 40)
    predictor, spec = ngram_predictor(name, teacher)
    plain = Engine(teacher, predictor, spec).generate(prompts, 40)
    engine = Engine(teacher, predictor, spec, guard=guard)
    graphs, tapes = with_graphs(engine)
    got = engine.generate(prompts, 40)
    assert [item.token_ids for item in got] == expected
    assert tapes.replayed > 5
    if guard:
        assert len({mode for mode, *_ in graphs.keys}) == 2
    else:
        assert [item.accepted_lengths for item in got] == [item.accepted_lengths for item in plain]


@names
def test_step_of_fixed_shape_reads_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("qwen2-window", lean=True)
    engine = Engine(teacher, *ngram_predictor(name, teacher))
    with_graphs(engine)
    engine.generate([[5, 6, 7], [8, 9]], 12)
    reads, steps = watch_steps(monkeypatch)
    engine = Engine(teacher, *ngram_predictor(name, teacher))
    with_graphs(engine)
    engine.generate([[5, 6, 5, 6], [8, 9]], 12)
    assert len(steps) > 2
    assert reads == []


class TestNgramsByTheKernel:
    """Tests for the interpreter, in a separate process: Triton chooses it at its first import."""

    __test__ = os.environ.get("TRITON_INTERPRET") == "1"

    @pytest.mark.parametrize(
        ("name", "tree", "steps"),
        [("prompt-lookup", "chain/2", 3), pytest.param("suffix", "dynamic:5/3", 6, marks=pytest.mark.nightly)],
    )
    @torch.inference_mode()
    def test_drafts_are_accepted(self, name: str, tree: str, steps: int) -> None:
        """The start of a text is replaced by what will follow, after its last token."""
        teacher, prompts = tiny_teacher("llama"), random_prompts(2, seed=33, low=8, high=12)
        texts = [generate_reference(teacher.model, prompt, 40, eos_token_id=-1) for prompt in prompts]
        predictor = ngram_predictor(name, teacher)[0]
        spec = parse_tree(tree, predictor.steps)
        setup = DraftSetup.of(predictor.first_steps(spec.drafting(predictor.steps)), spec)
        stepper = DecodeStep(teacher, setup, Sampler(0.0, 1.0, 0, CPU), 2, 64, kernel=True, graphs=True)
        stepper.prefill(prompts, 512)
        emitted, counts = [0, 0], set()
        for number in range(steps):
            drafts = stepper._text
            assert drafts is not None
            drafts.tokens.clamp_(max=0)  # nothing that was written is found
            for row, start in enumerate(emitted):
                known = torch.tensor([prompts[row][-1], *texts[row]][start : start + 3 + row])
                first = predictor.rule.longest - 1  # tokens before the text
                drafts.tokens[row, first : first + len(known)] = known
                drafts.tokens[row, first + int(stepper.cache.lengths[row])] = known[0]
            stepper.step(63, "drafted", first=number == 0)
            ((_, rows),) = stepper.output.launched(None)
            for row, (count, *tokens) in enumerate(rows):
                assert tokens[: count + 1] == texts[row][emitted[row] :][: count + 1]
                emitted[row] += count + 1
                counts.add(count)
        assert counts >= {0, spec.depth(predictor.steps)}
