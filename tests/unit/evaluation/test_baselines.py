"""Baselines: transformers' `generate` with a static cache and with assistants, n-gram drafts, names, and reasons."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from firp_cli.api.bench_run import groups_to_measure
from firp_cli.errors import MethodError, UsageError
from firp_cli.evaluation.baselines import assistant_reason, load_assistant, shown_names
from firp_cli.evaluation.bench_groups import Group, add_embedded, choose_groups
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate, accepted_lengths, exits_early
from firp_cli.evaluation.methods import BenchSettings, choose_methods, make_methods
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.folder import predictor_folder
from firp_cli.results import Generation
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML, with_template
from helpers.folders import save_teacher
from helpers.models import (
    SETTINGS,
    described_teacher,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    looped_teacher,
    random_prompts,
    tiny_teacher,
)


def one_by_one(method: HuggingFaceGenerate, prompts: list[list[int]], tokens: int) -> list[Generation]:
    return [answer for prompt in prompts for answer in method.generate([prompt], tokens)]


def assistant_of(model: Any, **settings: Any) -> Teacher:
    """Return a copy of a model with these settings of assisted generation."""
    model = copy.deepcopy(model)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return Teacher(model, name="assistant")


def long_prompt(teacher: Teacher, tokens: int) -> tuple[list[int], list[int]]:
    """Return a prompt whose greedy answer has all tokens, with the answer."""
    for prompt in random_prompts(20, seed=7, low=4):
        if len(answer := generate_reference(teacher.model, prompt, tokens)) == tokens:
            return prompt, answer
    raise AssertionError("every answer ends early")


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_library_baselines_decode_what_hf_decodes(family: str) -> None:
    teacher, prompts = tiny_teacher(family), random_prompts(2, seed=7, low=4)
    expected = [generate_reference(teacher.model, prompt, 14) for prompt in prompts]
    answers = {
        "static": HuggingFaceGenerate(teacher, static=True).generate(prompts, 14),
        "assistant": one_by_one(HuggingFaceGenerate(teacher, assistant=assistant_of(teacher.model)), prompts, 14),
        "exit": one_by_one(HuggingFaceGenerate(teacher, early_exit=2), prompts, 14),
    }
    for name, made in answers.items():
        assert [answer.token_ids for answer in made] == expected, name
        for answer in made:
            assert len(answer.token_ids) == 1 + sum(answer.accepted_lengths), name
            assert len(answer.accepted_lengths) == answer.steps and min(answer.accepted_lengths, default=1) >= 1
            assert answer.prefill_seconds > 0 and answer.decode_seconds > 0
    assert {length for answer in answers["static"] for length in answer.accepted_lengths} == {1}
    assert teacher.model.config.num_hidden_layers == teacher.num_layers


@pytest.mark.parametrize(
    ("drafted", "lengths"),
    [(5, [5, 6, 6, 6, 6]), (20, [20, 9]), (None, [20, 9])],
    ids=["five", "twenty", "default"],
)
def test_accepted_lengths_are_the_growth_of_each_forward(drafted: int | None, lengths: list[int]) -> None:
    """By hand: the first forward emits five drafted tokens and a bonus token, of which the first is prefill's; so does
    each later one, up to the 30 tokens. Each entry is one forward of the teacher.
    """
    teacher = tiny_teacher("llama")
    prompt, answer = long_prompt(teacher, 30)
    assistant = assistant_of(teacher.model, num_assistant_tokens=drafted, assistant_confidence_threshold=0.0)
    forwards: list[int] = []
    hook = teacher.model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        (made,) = HuggingFaceGenerate(teacher, assistant=assistant).generate([prompt], 30)
    finally:
        hook.remove()
    assert made.token_ids == answer and made.accepted_lengths == lengths
    assert made.steps == len(forwards) == len(lengths)


def test_assistants_that_are_never_right_emit_one_token_a_step() -> None:
    teacher = tiny_teacher("llama")
    prompt, answer = long_prompt(teacher, 12)
    wrong = copy.deepcopy(teacher.model)
    with torch.no_grad():
        wrong.lm_head.weight.copy_(wrong.lm_head.weight.roll(1, 0))
    (made,) = HuggingFaceGenerate(teacher, assistant=assistant_of(wrong)).generate([prompt], 12)
    assert made.token_ids == answer and made.accepted_lengths == [1] * 11


def test_accepted_lengths_end_with_the_answer() -> None:
    assert accepted_lengths([21, 9], 30) == [20, 9]
    assert accepted_lengths([21, 9], 23) == [20, 2], "cut at EOS"
    assert accepted_lengths([4, 5, 5], 3) == [2]
    assert accepted_lengths([1, 3, 1], 5) == [3, 1], "prefill's forward is no step where it only gives its token"
    assert accepted_lengths([1], 1) == accepted_lengths([6], 1) == []


def test_a_draft_ends_at_eos() -> None:
    """An assistant that is always right drafts past the end of the answer."""
    teacher = embedded_teacher()
    (prompt,) = embedded_prompts(1)
    text = generate_reference(teacher.model, prompt, 30)
    stop = text[12]
    ends = copy.copy(teacher)
    ends.eos_token_ids = (stop,)
    expected = text[: text.index(stop) + 1]
    assistant = assistant_of(teacher.model, assistant_confidence_threshold=0.0)
    for method in (HuggingFaceGenerate(ends, assistant=assistant), HuggingFaceGenerate(ends, early_exit=4)):
        (made,) = method.generate([prompt], 30)
        assert made.token_ids == expected and made.finish_reason == "eos"
        assert 1 + sum(made.accepted_lengths) == len(expected)


def test_the_first_draft_counts_as_decoding() -> None:
    """All tokens come from the forward that reads the prompt: its draft of 8 tokens is decoding, its reading is not."""
    teacher, pause = tiny_teacher("llama"), 0.02
    prompt, _ = long_prompt(teacher, 10)
    assistant = assistant_of(teacher.model, assistant_confidence_threshold=0.0)
    assistant.model.register_forward_hook(lambda *_: time.sleep(pause))
    (made,) = HuggingFaceGenerate(teacher, assistant=assistant).generate([prompt], 10)
    assert made.accepted_lengths == [9]
    assert made.decode_seconds >= 7 * pause and made.prefill_seconds >= pause


def test_library_baselines_sample_with_the_given_options() -> None:
    """A nucleus of one token is greedy; a high temperature is not, and a seed reproduces it."""
    teacher = tiny_teacher("llama")
    prompt, answer = long_prompt(teacher, 12)
    for options in ({"static": True}, {"assistant": assistant_of(teacher.model)}, {"early_exit": 2}):

        def made(temperature: float, top_p: float, seed: int = 3, **options: Any) -> list[int]:
            method = HuggingFaceGenerate(teacher, temperature, top_p, seed, **options)
            return method.generate([prompt], 12)[0].token_ids

        assert made(1.0, 1e-6, **options) == answer, options
        assert made(5.0, 1.0, **options) == made(5.0, 1.0, **options) != answer, options
        assert made(5.0, 1.0, 4, **options) != made(5.0, 1.0, **options), options


def refusals(teacher: Teacher, *names: str, batch_size: int = 1) -> dict[str, str | None]:
    methods = make_methods(teacher, {}, names, BenchSettings(batch_size=batch_size, max_new_tokens=8))
    for method in methods:
        if method.reason:
            with pytest.raises(MethodError):
                method.generate([[5]], 2)
    return {method.name: method.reason for method in methods}


def test_methods_that_cannot_run_have_a_reason(tmp_path: Path) -> None:
    plain, looped = tiny_teacher("llama"), looped_teacher(2, 3)
    found = refusals(plain, "hf-static", "early-exit:3", "early-exit:4", "early-exit:0", "medusa", "speed", "firp_plus")
    assert found["hf-static"] is found["early-exit:3"] is None
    assert found["early-exit:4"] == "drafts need 1 to 3 of the teacher's 4 layers, not 4"
    assert "not 0" in str(found["early-exit:0"])
    assert found["medusa"] == "no medusa predictor for this teacher: name its folder"
    assert "layers run once" in str(found["speed"]) and "name its folder" in str(found["firp_plus"])
    assert "run several times" in str(refusals(looped, "early-exit:2")["early-exit:2"])
    assert refusals(looped, "speed")["speed"] == "no speed predictor for this teacher: name its folder"
    assert refusals(looped, "hf-static") == {"hf-static": None}
    batched = refusals(plain, "hf-static", "early-exit:2", f"assisted:{tmp_path}/none", batch_size=2)
    assert "--batch-size 1" in str(batched.pop("early-exit:2")) and batched.pop("hf-static") is None
    assert "--batch-size 1" in str(batched["assisted:none"])
    assert refusals(described_teacher("ouro"), "hf") == {"hf": "OwnLoops has no `generate`"}


def test_models_without_an_early_exit_are_recognised() -> None:
    """GPT-OSS runs all layers whatever its config says; the library's drafts then fail, or are the teacher's text."""
    options = {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    teacher = wrap_model(GptOssForCausalLM(GptOssConfig(**(SETTINGS | options))).eval(), name="gpt-oss")
    assert not exits_early(teacher, 2) and exits_early(tiny_teacher("llama"), 2)
    assert "runs all of its layers" in str(refusals(teacher, "early-exit:2")["early-exit:2"])
    assert teacher.model.config.num_hidden_layers == 4


def test_failures_of_the_library_are_method_errors() -> None:
    """They leave the teacher as it was."""
    teacher = tiny_teacher("llama")
    own = teacher.model.generation_config
    with pytest.raises(MethodError, match="only supported for batch_size = 1"):
        HuggingFaceGenerate(teacher, early_exit=2).generate(random_prompts(2), 8)
    assistant = assistant_of(teacher.model)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted\nand more")

    hook = assistant.model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(MethodError, match=r"planted$"):
        HuggingFaceGenerate(teacher, assistant=assistant).generate([[5, 6]], 8)
    hook.remove()
    teacher_hook = teacher.layers[1].register_forward_hook(fail)
    try:
        with pytest.raises(MethodError, match=r"planted$"):
            HuggingFaceGenerate(teacher, early_exit=2).generate([[5, 6]], 8)
    finally:
        teacher_hook.remove()
    assert teacher.model.generation_config is own and teacher.model.config.num_hidden_layers == 4
    assistant.max_positions = 20
    with pytest.raises(MethodError, match="context of 20 tokens"):
        HuggingFaceGenerate(teacher, assistant=assistant).generate([[5] * 13], 8)


def test_assistants_need_the_teachers_vocabulary(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "small")
    teacher = embedded_teacher()
    reason = refusals(teacher, f"assisted:{folder}")["assisted:small"]
    assert reason == "small has a vocabulary of 97 tokens, the teacher one of 1024"
    same = load_assistant("arithmetic", teacher)
    assert assistant_reason(teacher, same) is None and same.dtype == teacher.dtype
    other = copy.copy(same)
    other.tokenizer = copy.deepcopy(same.tokenizer)
    other.tokenizer.add_tokens(["<|more|>"])
    assert assistant_reason(teacher, other) is None, "added tokens may differ"
    other.tokenizer = with_template(CHATML)
    assert "another tokenizer" in str(assistant_reason(teacher, other))


def test_assisted_teacher_accepts_its_own_drafts() -> None:
    (method,) = make_methods(embedded_teacher(), {}, ["assisted:arithmetic"], BenchSettings(max_new_tokens=24))
    (made,) = method.generate(embedded_prompts(1), 24)
    assert method.predictor == "arithmetic" and made.accepted_length is not None and made.accepted_length > 10


def test_ngram_methods_use_our_engine_and_their_own_tree() -> None:
    teacher = tiny_teacher("llama")
    prompt, answer = long_prompt(teacher, 12)
    methods = make_methods(teacher, {}, ["prompt-lookup", "suffix"], BenchSettings(max_new_tokens=12))
    for method in methods:
        (made,) = method.generate([[*prompt, *answer, *prompt]], 12)  # the answer stands in the text
        expected = generate_reference(teacher.model, [*prompt, *answer, *prompt], 12)
        assert made.token_ids == expected and 1 + sum(made.accepted_lengths) == len(expected)
        assert method.tree and method.predictor is None and method.engine is not None


def test_default_methods_are_our_engines_hf_and_the_predictors() -> None:
    assert choose_methods(None, ["firp"]) == ["ar", "hf", "prompt-lookup", "suffix", "firp"]
    wanted = ["hf-static", "assisted:org/model", "early-exit:4", "medusa", "ar", "ar"]
    assert choose_methods(wanted, ["firp"]) == wanted[:-1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hf-statik", "did you mean 'hf-static'"),
        ("prompt_lookup", "did you mean 'prompt-lookup'"),
        ("asisted:x", "did you mean 'assisted:MODEL'"),
        ("early_exit:4", "did you mean 'early-exit:LAYER'"),
        ("medua", "did you mean 'medusa'"),
        ("hf:4", "unknown method 'hf:4'"),
        ("assisted", "needs a folder, hub id, .gguf file or known name"),
        ("assisted: ", "needs a folder"),
        ("early-exit:", "needs a number of layers"),
        ("early-exit:four", "needs a number of layers"),
    ],
)
def test_misspelled_methods_are_refused_with_the_nearest_name(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text.replace(".", r"\.")):
        choose_methods([name], ["firp"])


def test_kinds_without_a_predictor_stay_among_the_methods(tmp_path: Path) -> None:
    folders = {"firp": tmp_path / "a"}
    groups = [Group("plain", folders, {"firp": "firp"}), Group("looped", {"speed": tmp_path}, {"speed": "speed"})]
    both = choose_groups(["ar", "medusa"], groups)
    assert [group.methods for group in both] == [["ar", "medusa"]] * 2
    (one,) = choose_groups(["ar", "firp", "medusa"], groups)
    assert one.methods == ["ar", "firp", "medusa"] and one.teacher == "plain"
    several = Group("plain", {"a": tmp_path, "b": tmp_path}, {"a": "firp", "b": "firp"})
    with pytest.raises(UsageError, match=r"several firp predictors: name them by folder \(a, b\)"):
        choose_groups(["firp"], [several])


def test_kinds_that_are_named_are_taken_from_the_embedded_predictors() -> None:
    firp = predictor_folder("firp")
    (group,) = groups_to_measure(["firp"], ["ar", "firp", "medusa"], None)
    assert list(group.folders) == ["firp", "medusa"] and group.methods == ["ar", "firp", "medusa"]
    (without,) = groups_to_measure(["firp"], ["ar", "speed"], None)
    assert list(without.folders) == ["firp"], "the embedded speed predictor is another teacher's"
    assert add_embedded([firp], "elsewhere", ["medusa"]) == add_embedded([firp], None, None) == [firp]


def test_an_unknown_assistant_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    for model in (str(tmp_path / "nowhere"), "./none.gguf", "aritmetic"):
        with pytest.raises(UsageError, match="give assisted: a folder, hub id") as refused:
            groups_to_measure(["firp"], ["ar", f"assisted:{model}"], None)
        text = str(refused.value)
        assert text.startswith(f"assisted:{model}: ") and len(text.splitlines()) == 2 and "--teacher" not in text
    (group,) = groups_to_measure(["firp"], ["ar", "assisted:arithmetic"], None)
    assert group.methods == ["ar", "assisted:arithmetic"]


def test_several_ranks_run_ar_hf_and_the_pipeline() -> None:
    (group,) = groups_to_measure(["speed"], None, None, ranks=2)
    assert group.methods == ["ar", "hf", "speed"]
    for name in ("suffix", "hf-static", "early-exit:2", "assisted:arithmetic"):
        with pytest.raises(UsageError, match=f"{name} decodes on one"):
            groups_to_measure(["speed"], ["speed", name], None, ranks=2)


def test_assistants_are_shown_by_their_last_part_where_unique() -> None:
    names = ["ar", "assisted:/a/one", "assisted:/a/two", "assisted:/b/two", "assisted:org/model"]
    shown = ["ar", "assisted:one", *names[2:4], "assisted:org/model"]
    assert list(shown_names(names).values()) == shown


def test_a_bench_has_rows_for_methods_that_cannot_run() -> None:
    teacher, settings = tiny_teacher("llama"), BenchSettings(max_new_tokens=10, repeats=1)
    names = ["hf", "ar", "hf-static", "early-exit:2", "early-exit:9", "medusa"]
    methods = make_methods(teacher, {}, names, settings)
    prompts = [BenchPrompt(prompt, "set") for prompt in random_prompts(2, seed=7, low=4)]
    report = run_bench(teacher, prompts, methods, settings)
    assert [row.method for row in report.rows] == names
    assert [bool(row.reason) for row in report.rows] == [False] * 4 + [True] * 2
    for row in report.rows[1:4]:
        assert row.lossless.identical == row.lossless.compared == 2, row.method
    assert report.rows[3].accepted_length > 1.0


def test_static_cache_is_compiled_before_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each batch size, and again for a longer cache; the device decides whether at all."""
    method = HuggingFaceGenerate(tiny_teacher("llama"), static=True)
    made: list[int] = []
    monkeypatch.setattr(method, "_run", lambda prompts, tokens: made.append(len(prompts)))
    for count, length in ((2, 9), (2, 9), (2, 4), (1, 4), (1, 9), (2, 9)):
        method._compile([[5] * length] * count, 8)
    assert made == [2, 1]
    method._compile([[5] * 10], 8)
    method._compile([[5] * 9] * 2, 8)
    assert made == [2, 1, 1, 2]
