"""Messages of rows, tokens of messages, and loss masks of templates that mark, append, rewrite and merge."""

from __future__ import annotations

import os
from typing import Any

import pytest

from firp_cli.chat_template import template_fingerprint, tokenizer_fingerprint
from firp_cli.data.chat import EncodedConversation, assistant_spans, check_masks, encode, encode_prompt, show_spans
from firp_cli.data.datasets import Selection, load_rows
from firp_cli.errors import DatasetError, LossMaskError
from helpers.chat import CHATML, byte_tokenizer, with_template

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The marks leave the end of the turn out, or take the line break in.
MARKED_SHORT = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
MARKED_LONG = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
)
# Like Qwen3's: thinking is opened in the last answer and dropped from those before it.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}{{ '<think>' + (parts[0].replace('<think>', '') if parts|length > 1 else '') + '</think>' }}"
    "{% endif %}"
    "{{ parts[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No prefix of itself (the number of messages comes first), and a generation prompt that no rendered turn holds.
COUNTING = (
    "{{ messages|length|string + ' messages\n' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content']|trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "marked short": MARKED_SHORT,
    "marked long": MARKED_LONG,
    "rewriting": REWRITING,
    "counting": COUNTING,
}

# "4" and "user" stand in questions too: a search for the answer's text alone would hit the wrong place.
TURNS = [
    {"role": "system", "content": "Be brief. 4 is a number."},
    {"role": "user", "content": "What is 2 + 2? Not 5, user."},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 4 + 4? 8 or 9?"},
    {"role": "assistant", "content": "It is 8,\n\nnaïve user \N{GRINNING FACE}!"},
]


def answers(conversation: EncodedConversation, tokenizer: Any) -> list[str]:
    """Return the text of every run of masked tokens."""
    runs: list[list[int]] = []
    before = False
    for token, inside in zip(conversation.input_ids, conversation.loss_mask, strict=True):
        if inside and not before:
            runs.append([])
        if inside:
            runs[-1].append(token)
        before = inside
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_covers_exactly_the_answers(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    conversation = encode(TURNS, tokenizer)
    last = TURNS[4]["content"] + "<|im_end|>"
    expected = ["4<|im_end|>", ("<think></think>" if name == "rewriting" else "") + last]
    assert answers(conversation, tokenizer) == expected
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(conversation.input_ids) == text


def test_marks_and_rendering_give_the_same_mask() -> None:
    marked = encode(TURNS, with_template(MARKED))
    assert marked == encode(TURNS, with_template(CHATML))
    assert sum(marked.loss_mask) not in (0, len(marked.loss_mask))


def test_thinking_block_is_masked_only_where_rendered() -> None:
    tokenizer = with_template(REWRITING)
    turns = [
        TURNS[1],
        {"role": "assistant", "content": "<think>two and two</think>4"},
        TURNS[3],
        {"role": "assistant", "content": "<think>four and four</think>8"},
    ]
    expected = ["4<|im_end|>", "<think>four and four</think>8<|im_end|>"]
    assert answers(encode(turns, tokenizer), tokenizer) == expected


def test_template_without_generation_prompt_or_system_role() -> None:
    tokenizer = with_template(LLAMA2)
    conversation = encode(TURNS[1:], tokenizer)
    assert answers(conversation, tokenizer) == [" 4 </s>", f" {TURNS[4]['content']} </s>"]
    with pytest.raises(DatasetError, match="only user and assistant"):
        encode(TURNS, tokenizer)


def test_template_without_end_of_turn_masks_only_text() -> None:
    tokenizer = with_template(NO_END)
    assert [text.strip() for text in answers(encode(TURNS, tokenizer), tokenizer)] == ["4", TURNS[4]["content"]]


def test_default_template_renders_text() -> None:
    tokenizer = with_template(None)
    conversation = encode(TURNS[1:3], tokenizer)
    assert tokenizer.decode(conversation.input_ids) == f"<s>{TURNS[1]['content']}\n4</s>"
    assert answers(conversation, tokenizer) == ["\n4</s>"]
    assert tokenizer.decode(encode_prompt(TURNS[1:2], tokenizer)) == f"<s>{TURNS[1]['content']}"


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_prompt_is_prefix_of_its_conversation(template: str | None) -> None:
    tokenizer = with_template(template)
    prompt = encode_prompt(TURNS[:2], tokenizer)
    whole = encode(TURNS[:3], tokenizer)
    assert whole.input_ids[: len(prompt)] == prompt
    assert whole.loss_mask.index(True) == len(prompt)


def test_assistant_spans_locate_the_text() -> None:
    tokenizer = with_template(COUNTING)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    spans = assistant_spans(TURNS, tokenizer, text)
    assert [text[start:end] for start, end in spans] == ["4", TURNS[4]["content"] + "<|im_end|>"]
    assert text[: spans[0][0]].endswith("assistant\n")


def test_encode_truncates_the_end() -> None:
    tokenizer = with_template(CHATML)
    whole = encode(TURNS, tokenizer)
    first = whole.loss_mask.index(True)
    cut = encode(TURNS, tokenizer, first + 1)
    assert cut == EncodedConversation(whole.input_ids[: first + 1], whole.loss_mask[: first + 1])
    assert not any(encode(TURNS, tokenizer, first).loss_mask)


def test_useless_masks_are_refused_with_rendered_spans() -> None:
    tokenizer = with_template(CHATML)
    check_masks(TURNS, tokenizer, 5, 20)
    with pytest.raises(LossMaskError, match="none of the data set's") as caught:
        check_masks(TURNS, tokenizer, 0, 20)
    assert "[[4<|im_end|>]]" in str(caught.value)
    with pytest.raises(LossMaskError, match="all of the data set's"):
        check_masks(TURNS, tokenizer, 20, 20)
    assert show_spans(TURNS[:2], tokenizer).count("[[") == 0


def test_fingerprints_follow_vocabulary_and_template() -> None:
    tokenizer = with_template(CHATML)
    before = tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)
    tokenizer("longer text", padding="max_length", truncation=True, max_length=3)
    assert (tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)) == before
    assert template_fingerprint(with_template(MARKED)) != before[1]
    wider = byte_tokenizer.__wrapped__()
    wider.add_tokens(["<new>"])
    assert tokenizer_fingerprint(wider) != before[0]
    assert tokenizer_fingerprint(byte_tokenizer.__wrapped__()) == before[0]


@pytest.mark.skipif(not os.environ.get("FIRP_DATA_DIR"), reason="FIRP_DATA_DIR names no folder of real data sets")
def test_real_gsm8k_is_encoded() -> None:
    tokenizer = with_template(CHATML)
    for row in load_rows("gsm8k", Selection("test", limit=60)):
        (answer,) = answers(encode(row.conversation.messages, tokenizer), tokenizer)
        assert answer == f"{row.conversation.messages[1]['content']}<|im_end|>" and "<<" not in answer
