"""Special tokens at the ends of texts: BOS once, and the token with which the chat template ends a turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from firp_cli.assets import chat_templates
from firp_cli.data.chat import encode_text, prompt_warning, turn_end, turn_end_warning
from helpers.chat import CHATML, byte_tokenizer, with_template

LLAMA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def adding(template: str) -> Any:
    """Return a tokenizer that adds special tokens around every text."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<|im_start|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<s> $A", "<s>It is", "<s>It is"),
        ("<s> $A", "It is", "<s>It is"),
        ("<s> $A", "<s><s>It", "<s><s>It"),  # two that the user wrote
        ("<s> $A", "It <s>is", "<s>It <s>is"),
        ("<s> $A", "<s>", "<s>"),
        ("<s> $A", "", "<s>"),
        ("<s> <|im_start|> $A", "<s><|im_start|>It", "<s><|im_start|>It"),
        ("<s> <|im_start|> $A", "It", "<s><|im_start|>It"),
        ("<s> $A </s>", "<s>It</s>", "<s>It</s>"),
        ("$A", "<s>It", "<s>It"),
        ("$A", "", ""),
    ],
)
def test_text_has_the_tokenizers_special_tokens_once(template: str, text: str, expected: str) -> None:
    ids = encode_text(text, adding(template))
    assert ids == byte_tokenizer()(expected, add_special_tokens=False)["input_ids"]


MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
HEADED = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        (CHATML, False),
        (LLAMA, True),
        (None, False),
        (MISTRAL, False),
        ("{{ raise_exception('no') }}", False),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", False),
        (HEADED + "{% if add_generation_prompt %}<assistant>{% endif %}", False),
        (HEADED, True),
    ],
)
def test_template_without_generation_prompt_is_told(template: str | None, warned: bool) -> None:
    warning = prompt_warning(with_template(template), "toy")
    assert (warning is not None) == warned and prompt_warning(None, "toy") is None
    assert not warned or (warning and "prompt does not end with '<" in warning)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA, "</s>"),
        (chat_templates()["plain"].read_text(), "</s>"),
        (None, "</s>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}### {% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_turn_end_is_the_special_token_after_an_answer(template: str | None, end: str | None) -> None:
    tokenizer = with_template(template)
    ident = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert turn_end(tokenizer) == ident
    warning = turn_end_warning(tokenizer, (350,), "toy")
    if ident is None:
        assert warning is None
    else:
        assert warning and f"'{end}' ({ident})" in warning and "add" in warning and "(now 350)" in warning
        assert turn_end_warning(tokenizer, (350, ident), "toy") is None
    assert turn_end_warning(None, (), "toy") is None
