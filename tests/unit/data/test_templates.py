"""Loss masks of chat templates of public model families over many shapes of conversations, against an oracle.

The oracle renders each conversation again with a marker in place of one answer at a time. What the marker replaces is
the answer's text; the token that ends its turn belongs to it.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from firp_cli.chat_template import GENERATION_MARKS
from firp_cli.data.chat import encode, encode_prompt
from firp_cli.data.prompt_text import PromptTexts
from firp_cli.errors import DatasetError

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("[INST]", "[/INST]", "<bos>", "<|endoftext|>"),
]

# Written from the published form of each family's prompts.
FAMILIES = {
    "llama-3": (
        "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content']|trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ 'Cutting Knowledge Date: December 2023\n' }}"
        "{{ 'Today Date: ' + (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' }}"
        "{{ system + '<|eot_id|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']|trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "qwen-3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% set text = m['content'] %}{% set thought = m['reasoning_content'] or '' %}"
        "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
        "{% for m in loop_messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
        "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content']|trim + '</s>' }}"
        "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content']|trim"
        " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "phi-3": (
        "{% for m in messages %}{% if m['content'] %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}


ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end|>")
OPENINGS = ("", "<think>", "<think>\n\n</think>")


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """Return messages of user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


SHAPES = {
    "one turn": turns("What is 2 + 2?", "It is 4."),
    "answer within the question": turns("Is it 4? 4 or user?", "4"),
    "several turns": turns("a b", "c d", "c d", "a b", "again", "c d"),
    "system text": turns("hello", "hi", system="Be brief. hi"),
    "system and turns": turns("one", "two", "three", "four", system="assistant"),
    "line breaks": turns("x\n\ny", "first\n\nsecond\n- third"),
    "outer white space": turns(" padded ", "  padded  ", "more", "\nend\n"),
    "not ASCII": turns("Größe? 你好", "naïve \N{GRINNING FACE}é", "π?", "≈ 3,14"),
    "repeated text": turns("same", "same", "same", "same"),
    "names of roles": turns("assistant user", "user: assistant"),
    "thinking": turns("2 + 2?", "<think>\nadd\n</think>\n\n4", "and 1?", "<think>\nadd again\n</think>\n\n5"),
    "question last": turns("one", "two", "three"),
}


def family_tokenizer(template: str) -> Any:
    """Return a byte-level tokenizer that knows every family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["assistant user system same again", "What is it? It is so."] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizers_of_families() -> dict[str, Any]:
    return {name: family_tokenizer(template) for name, template in FAMILIES.items()}


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024"))


def masked(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """Return the text of each run of trained tokens."""
    made = encode(messages, tokenizer)
    edges = [
        0,
        *(place for place in range(1, len(made.loss_mask)) if made.loss_mask[place] != made.loss_mask[place - 1]),
    ]
    return [
        tokenizer.decode(made.input_ids[start:end])
        for start, end in pairwise([*edges, len(made.input_ids)])
        if made.loss_mask[start]
    ]


def shared_length(one: str, two: str) -> int:
    """Return the number of first characters that two texts share."""
    return next(
        (at for at, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
    )


def expected(tokenizer: Any, messages: list[dict[str, Any]], ends: tuple[str, ...]) -> list[str]:
    """Return the answers as the template renders them, by the text between what does not change with the answer."""
    text, spans, cursor = rendered(tokenizer, messages), [], 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        others = [
            rendered(tokenizer, [*messages[:place], {**message, "content": mark}, *messages[place + 1 :]])
            for mark in ("\ue000", "\ue001")
        ]
        same = min(shared_length(text, other) for other in others)
        first = shared_length(*others)
        start, end = max(cursor, same), len(text) - (len(others[0]) - first - 1)
        for token in ends:
            if text.startswith(token, end):
                end += len(token)
        spans.append(text[start:end])
        cursor = end
    return spans


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_families_are_exact(family: str, shape: str, tokenizers_of_families: dict[str, Any]) -> None:
    tokenizer, messages = tokenizers_of_families[family], SHAPES[shape]
    refused = (family == "gemma") and messages[0]["role"] == "system"
    if refused:
        with pytest.raises(DatasetError, match="System role not supported"):
            encode(messages, tokenizer)
        return
    made = encode(messages, tokenizer)
    assert tokenizer.decode(made.input_ids) == rendered(tokenizer, messages)
    found = masked(tokenizer, messages)
    wanted = expected(tokenizer, messages, ("<|eot_id|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|end|>"))
    for got, right in zip(found, wanted, strict=True):
        text = right.lstrip()  # the teacher writes white space and thinking that the generation prompt leaves to it
        assert got.endswith(text) and got.removesuffix(text).strip() in OPENINGS


# Parts of made-up templates: what stands around a turn, and what is done to its text.
BEFORE = st.sampled_from(
    [
        "<|im_start|>{role}\n",
        "<|{role}|>\n",
        "[{role}] ",
        "### {role}:\n",
        "{role}: ",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
    ]
)
OPENED = (
    *("<|im_start|>assistant", "<|assistant|>", "[assistant]", "### assistant:", "assistant:"),
    "<|start_header_id|>assistant<|end_header_id|>",
)
AFTER = st.sampled_from(["<|im_end|>\n", "<|eot_id|>", "</s>", "<|end|>\n", "<|end|>\n\n", "\n", " </s>"])
FILTERS = st.sampled_from(["", "|trim"])
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Co"], exclude_characters="\x00"), min_size=1, max_size=12
).filter(lambda text: bool(text.strip()) and "<" not in text)


@st.composite
def made_up_templates(draw: st.DrawFn) -> str:
    """Return a template of random parts, with or without marks and a generation prompt."""
    before, after, how = draw(BEFORE), draw(AFTER), draw(FILTERS)
    opening = "'" + before.replace("{role}", "' + m['role'] + '").replace("\n", "\\n") + "'"
    closing = "'" + after.replace("\n", "\\n") + "'"
    text = f"m['content']{how}"
    if draw(st.booleans()):
        body = (
            "{% if m['role'] == 'assistant' %}{% generation %}{{ " + f"{text} + {closing}" + " }}{% endgeneration %}"
            "{% else %}{{ " + f"{text} + {closing}" + " }}{% endif %}"
        )
    else:
        body = "{{ " + f"{text} + {closing}" + " }}"
    prompt = "{% if add_generation_prompt %}{{ " + opening.replace("m['role']", "'assistant'") + " }}{% endif %}"
    head = draw(st.sampled_from(["", "{{ bos_token }}", "{{ messages|length|string + '\\n' }}"]))
    return (
        head
        + "{% for m in messages %}{{ "
        + opening
        + " }}"
        + body
        + "{% endfor %}"
        + draw(st.sampled_from(["", prompt]))
    )


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(made_up_templates(), st.lists(TEXTS, min_size=2, max_size=6))
def test_masks_of_made_up_templates_agree_with_the_oracle(
    tokenizers_of_families: dict[str, Any], template: str, texts: list[str]
) -> None:
    tokenizer = copy.copy(tokenizers_of_families["phi-3"])
    tokenizer.chat_template = template
    messages = turns(*(f"QQ {text}" if place % 2 == 0 else text for place, text in enumerate(texts)))
    found, wanted = masked(tokenizer, messages), expected(tokenizer, messages, ())
    assert len(found) == len(wanted)
    for got, right in zip(found, wanted, strict=True):
        assert right.strip() in got and "QQ" not in got
        # a template without a generation prompt leaves the opening of the turn to the teacher
        openings = ("", *(OPENED if "add_generation_prompt" not in template else ()))
        assert any(
            got[:at].strip() in openings and got[at + len(right.strip()) :].strip() in ("", *ENDS)
            for at in range(len(got))
            if got.startswith(right.strip(), at)
        ), (got, right)


MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNMARKED = GENERATION_MARKS.sub("", MARKED)


@pytest.mark.parametrize("odd", ["strips", "trims offsets", "plain"])
@pytest.mark.parametrize("pair", [("4 ", " 4"), ("4", " 5"), (" 4 ", " 5 "), ("4", "4"), ("a b", " \n ")])
def test_marks_hold_with_tokenizers_that_drop_white_space(odd: str, pair: tuple[str, str]) -> None:
    made = family_tokenizer(MARKED)
    if odd == "strips":
        made.backend_tokenizer.normalizer = normalizers.Strip()
    if odd == "trims offsets":
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = turns("QQ one", pair[0], "QQ two", pair[1])
    marked = masked(made, messages)
    made.chat_template = UNMARKED
    texts = [["".join(text.split()) for text in found] for found in (marked, masked(made, messages))]
    assert texts[0] == texts[1] == ["".join(text.split()) + "<|end|>" for text in pair]


def test_answer_that_the_template_leaves_out_is_sought_nowhere() -> None:
    made = family_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<|assistant|>' + m['content'] + '<|end|>' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    for texts in (("q one", "4", "q two 4", "5"), ("same", "same", "same", "same"), ("a", "r", "b", "c")):
        assert masked(made, turns(*texts)) == [f"{texts[-1]}<|end|>"]


@pytest.mark.parametrize(
    "template",
    ["hello", "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"],
)
def test_template_without_the_users_text_is_refused(template: str) -> None:
    with pytest.raises(DatasetError, match="does not write the user's message"):
        encode_prompt(turns("q"), family_tokenizer(template))


def test_text_of_a_prompt_is_the_same_under_every_template() -> None:
    asked = turns("  What is  2 + 2?\n")
    for template in (*FAMILIES.values(), UNMARKED, None):
        made = family_tokenizer(template or "")
        made.chat_template = template
        texts = PromptTexts(made)
        assert texts.of_messages(asked) >= {"whatis2+2?"}
        conversation = encode([*asked, {"role": "assistant", "content": "4"}], made)
        assert texts.of_tokens(conversation.input_ids[: conversation.loss_mask.index(True)]) == "whatis2+2?", template
