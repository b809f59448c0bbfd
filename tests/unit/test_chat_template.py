"""Chat templates: where they come from, their options, and a clock that stands still."""

from __future__ import annotations

import copy
import datetime
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from firp_cli.chat_template import at_fixed_time, find_template, set_chat_template, template_fingerprint
from firp_cli.config import TeacherConfig
from firp_cli.data.chat import encode, encode_prompt
from firp_cli.errors import TeacherError
from helpers.chat import CHATML, byte_tokenizer

QUESTION = [{"role": "user", "content": "Who are you?"}]
SWITCHED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'assistant:' + (' <think></think>' if enable_thinking is defined and enable_thinking is false else '') }}"
    "{% endif %}{% if style is defined %}{{ style|tojson }}{% endif %}"
)


def tokenizer_with(template: str | dict[str, str] | None, **config: Any) -> tuple[Any, dict[str, str]]:
    """Return a tokenizer with this own template, after the configuration was applied, and the record."""
    tokenizer = copy.copy(byte_tokenizer())
    tokenizer.chat_template = template
    return tokenizer, set_chat_template(tokenizer, TeacherConfig(**config), "tiny")


def prompt_text(tokenizer: Any, messages: list[dict[str, Any]] = QUESTION) -> str:
    return str(tokenizer.decode(encode_prompt(messages, tokenizer)))


def test_vicuna_has_the_format_of_its_training() -> None:
    tokenizer, record = tokenizer_with(None, chat_template="vicuna")
    turns = [
        *QUESTION,
        {"role": "assistant", "content": "A bird."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "A crow."},
    ]
    head = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    assert (
        prompt_text(tokenizer, turns[:3]) == head + "USER: Who are you? ASSISTANT: A bird.</s>USER: Which? ASSISTANT:"
    )
    made = encode(turns, tokenizer)
    answers = [token for token, inside in zip(made.input_ids, made.loss_mask, strict=True) if inside]
    assert tokenizer.decode(answers) == " A bird.</s> A crow.</s>"
    system = [{"role": "system", "content": "Be a crow."}, *QUESTION]
    assert prompt_text(tokenizer, system) == "<s>Be a crow. USER: Who are you? ASSISTANT:"
    assert record["source"] == "vicuna" and record["fingerprint"] == template_fingerprint(tokenizer)


def test_template_may_be_a_file_or_text_or_a_name(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("\ufeff" + CHATML, encoding="utf-8")  # editors on Windows begin files with a byte-order mark
    assert find_template(str(file)) == ("file own.jinja", CHATML)
    assert find_template(CHATML) == ("text", CHATML)
    by_file, by_text = (tokenizer_with(None, chat_template=value)[0] for value in (str(file), CHATML))
    assert (
        prompt_text(by_file)
        == prompt_text(by_text)
        == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vicunna", "did you mean 'vicuna'"),
        ("nowhere/x.jinja", "no such file"),
        ("{% for m in messages %}{{ m }}", "not valid Jinja"),
        ("{{ messages", "line 1"),
    ],
)
def test_template_that_cannot_be_used_is_refused(name: str, words: str) -> None:
    with pytest.raises(TeacherError, match=words):
        tokenizer_with(CHATML, chat_template=name)


@pytest.mark.parametrize(
    "text", ["{{ [1, 2]|random }}", "{{ [[1, 2]]|map('random')|list }}", "{% if false %}{{ lipsum(1) }}{% endif %}"]
)
def test_template_that_depends_on_chance_is_refused(text: str) -> None:
    for own, config in ((CHATML + text, {}), (CHATML, {"chat_template": CHATML + text})):
        with pytest.raises(TeacherError, match=r"uses `(random|lipsum)` \(line \d+\), so it renders"):
            tokenizer_with(own, **config)
    with pytest.raises(TeacherError, match="uses `random`"):
        tokenizer_with({"default": CHATML, "tool_use": "{{ messages|random }}"})
    tokenizer_with("{% set lipsum = 1 %}{% set random = 2 %}{{ lipsum + random }}" + CHATML)


@pytest.mark.parametrize("template", [5, ["{{ messages }}"], {"default": 5}])
def test_own_template_that_is_no_text_is_refused(template: Any) -> None:
    with pytest.raises(TeacherError, match=r"the chat template of tiny is no text but .*tokenizer_config.json"):
        tokenizer_with(template)


def test_byte_order_mark_of_own_template_is_no_part_of_prompts() -> None:
    plain, marked = (tokenizer_with(mark + CHATML)[0] for mark in ("", "\ufeff"))
    assert prompt_text(marked) == prompt_text(plain) and template_fingerprint(marked) == template_fingerprint(plain)
    assert tokenizer_with({"default": "\ufeff" + CHATML})[0].chat_template == {"default": CHATML}


def test_binary_file_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(TeacherError, match="cannot be read"):
        tokenizer_with(CHATML, chat_template=str(tmp_path / "x.jinja"))


def test_teacher_without_template_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.copy(byte_tokenizer())
    tokenizer.chat_template = None
    with caplog.at_level(logging.INFO, logger="firp"):
        records = [set_chat_template(tokenizer, TeacherConfig(), "no-template") for _ in range(2)]
    lines = [item.getMessage() for item in caplog.records if "no-template" in item.getMessage()]
    assert len(lines) == 1 and "teacher.chat_template" in lines[0] and "vicuna" in lines[0]
    assert records[0]["source"] == "plain" and prompt_text(tokenizer) == "<s>Who are you?"


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "assistant:"),
        ({"enable_thinking": False}, "assistant: <think></think>"),
        ({"enable_thinking": True}, "assistant:"),
    ],
)
def test_options_reach_the_template(options: dict[str, Any], ending: str) -> None:
    tokenizer, record = tokenizer_with(SWITCHED, template_options=options)
    assert prompt_text(tokenizer).endswith(ending)
    assert (record["fingerprint"] == tokenizer_with(SWITCHED)[1]["fingerprint"]) == (not options)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(JSON_VALUES)
def test_any_option_value_arrives_unchanged(value: Any) -> None:
    import json

    tokenizer, _ = tokenizer_with(
        "{{ messages[0].content }}{{ '\\x00' }}{{ style|tojson }}", template_options={"style": value}
    )
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert json.loads(text.partition("\x00")[2]) == value


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "add_generation_prompt", "strftime_now", "not a name", ""]
)
def test_option_that_the_template_does_not_read_is_refused(name: str) -> None:
    with pytest.raises(TeacherError, match="does not read"):
        tokenizer_with(SWITCHED, template_options={name: 1})


def test_misspelt_option_gets_the_nearest_name() -> None:
    with pytest.raises(TeacherError, match="did you mean 'enable_thinking'"):
        tokenizer_with(SWITCHED, template_options={"enable_thinkin": False})


@pytest.mark.parametrize("template", ["\n{{ style }}A", "  {% if style %}A{% endif %}\n", "{{- style }}\n\nB"])
def test_options_leave_the_blanks_at_the_head(template: str) -> None:
    plain, _ = tokenizer_with("{% set style = 'x' %}{{ '' }}" + template)
    given, _ = tokenizer_with(template, template_options={"style": "x"})
    expected = render(template, style="x")
    assert given.apply_chat_template(QUESTION, tokenize=False) == expected
    clocked = at_fixed_time("  {% if true %}" + template + "{% endif %}{{ strftime_now('%Y') if false }}")
    plain.chat_template = clocked
    assert plain.apply_chat_template(QUESTION, tokenize=False, style="x") == render(
        "  {% if true %}" + template + "{% endif %}", style="x"
    )


def render(template: str, **options: Any) -> str:
    """Render a template as transformers does, with its options as arguments."""
    tokenizer = copy.copy(byte_tokenizer())
    tokenizer.chat_template = template
    return str(tokenizer.apply_chat_template(QUESTION, tokenize=False, **options))


def test_a_date_that_nothing_reads_is_refused_beside_other_options() -> None:
    for options in ({"style": "x", "date": "2024-01-01"}, {"date": "2024-01-01", "style": "x"}):
        with pytest.raises(TeacherError, match="does not read 'date'"):
            tokenizer_with("{{ style }}", template_options=options)


def test_templates_that_cannot_be_used_are_refused() -> None:
    deep = "{% if true %}" * 3000 + "{% endif %}" * 3000
    for text in (deep, "{% if %}"):
        with pytest.raises(TeacherError, match="is not valid Jinja"):
            tokenizer_with(text)
    with pytest.raises(TeacherError, match="cannot be read"):
        find_template("a\0b")
    with pytest.raises(TeacherError, match=r"several chat templates \(rag, tool_use\), none of them named default"):
        tokenizer_with({"tool_use": SWITCHED, "rag": SWITCHED})
    looped: list[Any] = []
    looped.append(looped)
    with pytest.raises(ValidationError, match="no JSON value"):
        TeacherConfig(template_options={"style": looped})


def test_a_template_that_sets_its_own_date_has_no_date_in_its_record() -> None:
    _, record = tokenizer_with("{% set date_string = '1 May 2020' %}{{ date_string }}")
    assert "date" not in record


def test_a_given_date_string_needs_no_notice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "firp")
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    tokenizer, record = tokenizer_with(template, template_options={"date_string": "01 Jan 2020"})
    assert record["date"] == "01 Jan 2020" and prompt_text(tokenizer).startswith("01 Jan 2020 ")
    assert not any("prints the date" in line for line in caplog.messages)


def test_an_option_of_one_of_several_named_templates_is_accepted() -> None:
    tokenizer, _ = tokenizer_with({"default": SWITCHED, "rag": "{{ documents }}"}, template_options={"style": "x"})
    assert prompt_text(tokenizer).endswith('"x"')


def test_options_apply_to_each_of_several_named_templates() -> None:
    tokenizer, _ = tokenizer_with(
        {"default": SWITCHED, "tool_use": "{{ messages[0].content + ' tools' if enable_thinking is false }}"},
        template_options={"enable_thinking": False},
    )
    assert prompt_text(tokenizer).endswith("<think></think>")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert tokenizer.decode(encode_prompt(QUESTION, tokenizer, tools)) == "Who are you? tools"


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%A, %B %d", "%-d.%-m.%y %H:%M:%S.%f", "%j %F %T %p %%"])
def test_clock_of_a_template_stands_still(form: str) -> None:
    template = (
        "{% set now = strftime_now('" + form + "') %}{{ now }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tokenizer, record = tokenizer_with(template)
    midnight = datetime.datetime(2024, 7, 26)
    assert prompt_text(tokenizer) == midnight.strftime(form) + "Who are you?"
    assert record["date"] == "2024-07-26"
    chosen, record = tokenizer_with(template, template_options={"date": "2025-01-03"})
    assert prompt_text(chosen) == datetime.datetime(2025, 1, 3).strftime(form) + "Who are you?"
    assert record["date"] == "2025-01-03" and template_fingerprint(chosen) != template_fingerprint(tokenizer)


def test_day_that_is_passed_as_text_is_fixed_too() -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    assert prompt_text(tokenizer_with(template)[0]).startswith("26 Jul 2024")
    config = TeacherConfig(template_options={"date": datetime.date(2025, 1, 31)})  # as YAML reads 2025-01-31
    assert config.model_dump(mode="json")["template_options"] == {"date": "2025-01-31"}
    assert prompt_text(tokenizer_with(template, **config.model_dump())[0]).startswith("31 Jan 2025")


def test_clock_works_inside_macros_and_marks() -> None:
    template = (
        "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + day() }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    )
    tokenizer, _ = tokenizer_with(template)
    made = encode([*QUESTION, {"role": "assistant", "content": "me"}], tokenizer)
    answer = [token for token, inside in zip(made.input_ids, made.loss_mask, strict=True) if inside]
    assert tokenizer.decode(answer) == "me2024"
    own = "{% macro strftime_now(form) %}{{ 'noon' }}{% endmacro %}{{ strftime_now('%H') }}"
    assert at_fixed_time(own) == own


@pytest.mark.parametrize("value", ["31.1.2025", "tomorrow", "2025-13-01", 5])
def test_date_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(TeacherError, match="YYYY-MM-DD"):
        tokenizer_with("{{ strftime_now('%Y') }}{{ messages }}", template_options={"date": value})


def test_template_options_are_a_mapping() -> None:
    with pytest.raises(ValidationError):
        TeacherConfig.model_validate({"template_options": ["enable_thinking"]})
    with pytest.raises(ValidationError, match="needs a space after its colon: enable_thinking: false"):
        TeacherConfig.model_validate({"template_options": {"enable_thinking:false": None}})
