"""Check of every emitted token: planted faults are found at their place, honest decoding raises no alarm."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from firp_cli.config import TeacherConfig
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sampling import Sampler
from firp_cli.evaluation import token_check as verify
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.evaluation.library_forward import library_logits, measured_noise, normed_states
from firp_cli.evaluation.token_check import Tolerance, sampled_figures, sign_flip_p_value, verified, verify_answers
from firp_cli.records import AnswerRecord, Verified
from firp_cli.reports.verification import fault, is_lossless, verified_cell
from firp_cli.results import Generation
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.models import (
    described_teacher,
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    looped_teacher,
    random_prompts,
    tiny_model,
    tiny_teacher,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS, PLACE = 40, 9
Generate = Callable[[Sequence[Sequence[int]], int], list[Generation]]


@lru_cache
def embedded(dtype: str) -> Teacher:
    if dtype == "float32":
        return embedded_teacher()
    with torch.inference_mode(False):
        teacher = load_teacher(TeacherConfig(model="arithmetic", dtype=dtype), "cpu")  # type: ignore[arg-type]
    use_lean_layers(teacher)
    return teacher


@lru_cache
def random_teacher(family: str, dtype: str) -> Teacher:
    with torch.inference_mode(False):
        teacher = wrap_model(copy.deepcopy(tiny_model(family)).to(DTYPES[dtype]), name=family)
    use_lean_layers(teacher)
    return teacher


def record(method: str, prompt: int, token_ids: Sequence[int], reason: str = "length") -> AnswerRecord:
    return AnswerRecord(
        method, "set", "", prompt, 0, 0, 0, prompt, 5, len(token_ids), 1, [1], 0.1, 0.1, reason, token_ids=[*token_ids]
    )


def answers(method: str, generate: Generate, prompts: list[list[int]], tokens: int = TOKENS) -> list[AnswerRecord]:
    made = [generate([prompt], tokens)[0] for prompt in prompts]
    return [record(method, number, item.token_ids, item.finish_reason) for number, item in enumerate(made)]


def check(
    teacher: Teacher,
    prompts: list[list[int]],
    methods: dict[str, list[AnswerRecord]],
    limit: int = TOKENS,
    **how: float,
) -> dict[str, Verified]:
    """Verify the answers of several methods together, and return the check of each."""
    everything = [item for each in methods.values() for item in each]
    tolerance = verify_answers(teacher, everything, lambda item: prompts[item.prompt], max_new_tokens=limit, **how)
    found = {}
    for name, each in methods.items():
        made = verified(
            each, None if name == "ar" else methods.get("ar"), tolerance, lambda item: f"line {item.prompt}"
        )
        assert made is not None
        found[name] = made
    return found


@lru_cache
def decoded(dtype: str, temperature: float, top_p: float) -> list[AnswerRecord]:
    return answers("ar", Engine(embedded(dtype), None, None, temperature, top_p).generate, embedded_prompts(3))


def embedded_answers(dtype: str, temperature: float, top_p: float) -> list[AnswerRecord]:
    return [replace(item) for item in decoded(dtype, temperature, top_p)]


def unlikely(teacher: Teacher, prompt: list[int], answer: list[int], place: int, kind: str) -> int:
    """Return a wrong token: the second most probable one, one far down, the token before it, or the end token."""
    state = normed_states(teacher, [*prompt, *answer[:place]])[-1:]
    order = library_logits(teacher, state)[0].argsort(descending=True).tolist()
    return {"second": order[1], "random": order[200], "repeated": answer[place - 1], "end": teacher.eos_token_ids[0]}[
        kind
    ]


def clear_place(teacher: Teacher, prompt: list[int], answer: list[int]) -> int:
    """Return the place, of the first 30, at which the second most probable token is furthest below the first one, and
    which repeats no token.
    """
    logits = library_logits(teacher, normed_states(teacher, [*prompt, *answer])[len(prompt) - 1 : -1])
    top = logits[:30].topk(2).values
    gaps = top[:, 0] - top[:, 1]
    for place in range(1, len(gaps)):
        if answer[place] == answer[place - 1]:
            gaps[place] = 0
    gaps[0] = 0
    return int(gaps.argmax())


@pytest.mark.parametrize("kind", ["second", "random", "repeated", "end"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_token_is_found_at_its_place(dtype: str, kind: str) -> None:
    teacher, prompts = embedded(dtype), embedded_prompts(3)
    honest = embedded_answers(dtype, 0.0, 1.0)
    planted = [replace(item, method="medusa", token_ids=[*(item.token_ids or [])]) for item in honest]
    ids = planted[1].token_ids or []
    place = clear_place(teacher, prompts[1], ids)
    ids[place] = unlikely(teacher, prompts[1], ids, place, kind)
    if kind == "end":
        planted[1] = replace(planted[1], token_ids=ids[: place + 1], finish_reason="eos")
    found = check(teacher, prompts, {"ar": honest, "medusa": planted})
    assert is_lossless(found["ar"]) and found["ar"].worst and found["ar"].gap is not None
    wrong = found["medusa"]
    assert wrong.worst is not None and not is_lossless(wrong) and wrong.above >= 1
    assert (wrong.worst.prompt, wrong.worst.position, wrong.worst.emitted) == (1, place, ids[place])
    assert wrong.worst.best == (honest[1].token_ids or [])[place]
    assert wrong.gap is not None and wrong.worst.value is not None and wrong.gap >= wrong.worst.value > wrong.tolerance
    assert f"line 1 (prompt 1), turn 1, token {place}" in str(fault(wrong))
    assert f"prompt 1, token {place}, gap" in verified_cell(wrong)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_token_is_found_when_sampling(dtype: str, top_p: float) -> None:
    teacher, prompts = embedded(dtype), embedded_prompts(3)
    honest = embedded_answers(dtype, 1.0, top_p)
    planted = [replace(item, method="medusa", token_ids=[*(item.token_ids or [])]) for item in honest]
    ids = planted[2].token_ids or []
    place = clear_place(teacher, prompts[2], ids)
    ids[place] = unlikely(teacher, prompts[2], ids, place, "random")
    found = check(teacher, prompts, {"ar": honest, "medusa": planted}, temperature=1.0, top_p=top_p)
    assert is_lossless(found["ar"]) and found["ar"].gap is None and found["ar"].log_prob is not None
    wrong = found["medusa"]
    assert wrong.worst and (wrong.worst.prompt, wrong.worst.position) == (2, place) and not is_lossless(wrong)
    assert wrong.tail is not None and wrong.tail < wrong.tolerance < 1e-3
    assert "drawn with probability" in str(fault(wrong)) and "tail" in verified_cell(wrong)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_that_goes_on_or_ends_early_is_wrong(temperature: float) -> None:
    teacher, prompts = embedded("float32"), embedded_prompts(3)
    whole = embedded_answers("float32", temperature, 1.0)
    end = teacher.eos_token_ids[0]

    def worst(change: Callable[[list[int]], list[int]], reason: str = "length") -> tuple[int, int] | None:
        ids = change([*(whole[0].token_ids or [])])
        made = check(teacher, prompts, {"firp": [record("firp", 0, ids, reason)]}, temperature=temperature)["firp"]
        assert is_lossless(made) == (made.above == 0)
        return (made.worst.position, made.worst.emitted) if made.worst and made.above else None

    ids = whole[0].token_ids or []
    assert worst(lambda ids: ids) is None
    assert worst(lambda ids: ids[:PLACE]) == (PLACE, -1)
    assert worst(lambda ids: ids[:PLACE], "eos") == (PLACE, -1)
    assert worst(lambda ids: ids[:PLACE], "stop") is None
    assert worst(lambda ids: []) == (0, -1)
    full = ids if ids[-1] == end else [*ids[:-1], end]
    position = worst(lambda _: [*full, 3])
    assert position is not None and position[0] in (len(full), len(full) - 1)
    assert worst(lambda ids: [*ids[:PLACE], teacher.vocab_size + 7, *ids[PLACE + 1 :]]) == (
        PLACE,
        teacher.vocab_size + 7,
    )


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-tied", "float32"), ("qwen2-window", "bfloat16"), ("qwen3", "float16")]
)
def test_honest_decoding_raises_no_alarm(family: str, dtype: str) -> None:
    teacher, prompts = random_teacher(family, dtype), random_prompts(8, 3)
    for temperature, top_p in ((0.0, 1.0), (0.8, 0.9)):
        how = {"temperature": temperature, "top_p": top_p}
        methods = {
            name: answers(name, make(teacher, seed=seed, **how).generate, prompts, 16)
            for seed, (name, make) in enumerate((("ar", Engine), ("hf", HuggingFaceGenerate)))
        }
        found = check(teacher, prompts, methods, 16, **how)
        assert all(is_lossless(made) and abs(made.deviation or 0.0) < 4 for made in found.values())
    assert found["ar"].p_value is None and (found["hf"].p_value or 0.0) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draft_trees_raise_no_alarm(dtype: str) -> None:
    teacher, prompts = embedded(dtype), embedded_prompts(3)
    engine = Engine(teacher, embedded_predictor("firp").to(teacher.dtype))  # type: ignore[arg-type]
    found = check(teacher, prompts, {"firp": answers("firp", engine.generate, prompts)})["firp"]
    assert is_lossless(found) and found.tokens > 50 and found.above == 0
    assert verified_cell(found) == f"all {found.tokens:,}"


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "loop", "ouro", "raven"])
def test_library_forward_gives_the_logits_of_the_model(name: str) -> None:
    teacher = (
        looped_teacher(2, 3)
        if name == "loop"
        else described_teacher(name)
        if name in ("ouro", "raven")
        else tiny_teacher(name, True)
    )
    ids = random_prompts(1, 5, 20, 20)[0]
    with torch.inference_mode():
        expected = teacher.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        got = library_logits(teacher, normed_states(teacher, ids))
    assert torch.equal(got, expected.float()) and not teacher.model.get_output_embeddings()._forward_pre_hooks
    noise = measured_noise(teacher, [ids])
    assert 0 < noise < 1e-4 and noise == measured_noise(teacher, [ids])
    assert not any(layer._forward_pre_hooks for layer in teacher.layers.children())


def test_each_distinct_answer_is_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = embedded("float32"), embedded_prompts(3)
    honest = embedded_answers("float32", 0.0, 1.0)
    fed: list[Sequence[int]] = []
    monkeypatch.setattr(verify, "measured_noise", lambda *_: 1e-5)
    monkeypatch.setattr(verify, "normed_states", lambda teacher, ids: fed.append(ids) or normed_states(teacher, ids))
    seen: list[tuple[int, int | None]] = []
    records = [replace(item, method=name) for name in ("ar", "hf", "firp") for item in honest]
    records.append(replace(honest[0], repeat=1, token_ids=None))
    verify_answers(teacher, records, lambda item: prompts[item.prompt], progress=lambda *pair: seen.append(pair))
    assert len(fed) == 3 and seen == [(1, 3), (2, 3), (3, 3)]
    assert [item.above for item in records] == [0] * 9 + [None]
    assert verify_answers(teacher, [], lambda item: []) is None and verified([], None, None) is None


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = embedded("float32"), embedded_prompts(3)
    whole, parts = ([replace(item) for item in embedded_answers("float32", 1.0, 0.9)] for _ in range(2))
    for records, chunk in ((whole, 1 << 22), (parts, 7 * teacher.vocab_size)):
        monkeypatch.setattr("firp_cli.evaluation.library_forward.CHUNK", chunk)
        verify_answers(teacher, records, lambda item: prompts[item.prompt], 1.0, 0.9)
    for one, two in zip(whole, parts, strict=True):
        assert one.worst == two.worst and one.log_prob == pytest.approx(two.log_prob, rel=1e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_sampled_figures_match_enumeration(top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 11, generator=generator) * 2
    logits[:, 5] = -torch.inf
    tokens = torch.randint(0, 5, (40,), generator=generator)
    tails, log_probs, excess, variance = sampled_figures(logits, logits.gather(1, tokens[:, None]), 0.0, 0.7, top_p)
    for row in range(40):
        weights = np.exp(logits[row].double().numpy() / 0.7)
        weights /= weights.sum()
        order = np.argsort(-weights)
        count = int((np.cumsum(weights[order]) < top_p).sum()) + 1
        kept = np.zeros(11)
        kept[order[:count]] = weights[order[:count]]
        kept /= kept.sum()
        own, used = int(tokens[row]), kept > 0
        surprisal = -np.log(kept[used])
        entropy = (kept[used] * surprisal).sum()
        assert tails[row].item() == pytest.approx(kept[used][kept[used] <= kept[own] + 1e-12].sum(), abs=1e-5)
        if kept[own]:
            assert log_probs[row].item() == pytest.approx(math.log(kept[own]), abs=1e-4)
            assert excess[row].item() == pytest.approx(-math.log(kept[own]) - entropy, abs=1e-4)
        expected = (kept[used] * (surprisal - entropy) ** 2).sum()
        assert variance[row].item() == pytest.approx(expected, abs=1e-4)


def drawn(
    seed: int, temperature: float, top_p: float, noise: float, rows: int, own_temperature: float
) -> list[Verified]:
    """Return checks of tokens drawn by `Sampler` from random logits that rounding separates from the verified ones."""
    generator = torch.Generator().manual_seed(seed)
    exact = 4 * torch.rand(rows, 1, generator=generator) * torch.randn(rows, 200, generator=generator)
    own, checked = (exact + noise / 2**0.5 * torch.randn(rows, 200, generator=generator) for _ in range(2))
    tokens = Sampler(own_temperature, top_p, seed, torch.device("cpu"))(own[None])[0]
    bias = (verify.BIAS + verify.TOP_P_BIAS * (1 - top_p)) * (noise / temperature) ** 2
    tolerance = Tolerance(verify.FACTOR * noise + 1e-5, verify.ALPHA / rows, bias)
    tails, log_probs, excess, variance = sampled_figures(
        checked, checked.gather(1, tokens[:, None]), tolerance.gap, temperature, top_p
    )
    item = record("firp", 0, tokens.tolist())
    item.above, item.tail = int((tails < (tolerance.tail or 0)).sum()), tails.min().item()
    item.log_prob, item.excess, item.variance = (part.double().sum().item() for part in (log_probs, excess, variance))
    made = verified([item], None, tolerance)
    return [made] if made else []


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.5), (0.3, 0.9)])
def test_exact_sampling_raises_no_alarm(temperature: float, top_p: float, noise: float) -> None:
    checks = [made for seed in range(20) for made in drawn(seed, temperature, top_p, noise, 500, temperature)]
    assert len(checks) == 20 and all(is_lossless(made) for made in checks)
    assert max(abs(made.deviation or 9.0) for made in checks) < 4.5


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("own", [0.9, 1.12])
def test_sampling_at_another_temperature_is_found(own: float, top_p: float) -> None:
    (made,) = drawn(0, 1.0, top_p, 0.05, 8000, own)
    assert made.deviation is not None and (made.deviation > 0) == (own > 1)
    assert "standard deviations" in str(fault(replace(made, above=0)))


def test_two_samples_are_paired_by_prompt() -> None:
    def made(method: str, shift: float, count: int) -> list[AnswerRecord]:
        values = np.random.default_rng(len(method)).normal(size=count)
        return [
            replace(record(method, number, [1]), excess=3 * (value + shift), variance=8.0, above=0)
            for number, value in enumerate(values)
        ]

    base = made("ar", 0.0, 40)
    assert (verify.two_sample_p_value(made("firp", 0.0, 40), base) or 0.0) > 0.01
    assert (verify.two_sample_p_value(made("firp", 2.0, 40), base) or 1.0) < 1e-4
    assert verify.two_sample_p_value(made("firp", 2.0, 7), base) is None
    assert verify.two_sample_p_value(base, base) == 1.0
    generator = np.random.default_rng(0)
    values = [sign_flip_p_value(generator.normal(size=12)) for _ in range(60)]
    assert 0.3 < float(np.mean(values)) < 0.7 and min(values) > 5e-4
