"""Tokens of conversations, with a mask over the tokens that the assistant writes.

The mask covers the assistant's text and the token that ends its turn (a predictor must learn where answers end), not
the line break after it. Templates with `{% generation %}` marks define the spans; for others the spans are located in
the rendered text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from firp_cli.chat_template import DAY, GENERATION_MARKS, at_fixed_time, template_of
from firp_cli.data.formats import Message
from firp_cli.errors import DatasetError, LossMaskError, first_line

# Llama 3's templates print today's date unless it is given; a store must render the same on every day.
RENDER_OPTIONS = {"date_string": f"{DAY:%d %b %Y}"}
SENTINEL = "\ue000\ue001\ue002"  # private-use characters: no template trims or splits them
SHOWN_CHARACTERS = 600


@dataclass
class EncodedConversation:
    """Token ids, and a mask that is True on those of the assistant."""

    input_ids: list[int]
    loss_mask: list[bool]


def encode(
    messages: Sequence[Message],
    tokenizer: Any,
    max_length: int | None = None,
    tools: Sequence[Any] | None = None,
    unlearned: Collection[int] = (),
) -> EncodedConversation:
    """Return tokens and loss mask of a conversation, cut to `max_length`: answers after the cut have no tokens.

    `tools`: functions that the assistant may call, as JSON schemas, for the template. `unlearned`: places of answers
    that the mask leaves out.

    Raises DatasetError when the template refuses the conversation (unknown roles, or roles in a forbidden order).
    """
    if not messages:
        return EncodedConversation([], [])
    if not getattr(tokenizer, "is_fast", False):
        raise DatasetError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; "
            "give a teacher folder with a tokenizer.json"
        )
    if GENERATION_MARKS.search(template_of(tokenizer, tools)):
        text, spans = _render_marked(messages, tokenizer, tools)
        answers = [place for place, item in enumerate(messages) if item["role"] == "assistant"]
        if unlearned and len(answers) != len(spans):
            raise DatasetError("the chat template's marks do not tell apart the answers of weight 0")
        if unlearned:
            spans = [span for place, span in zip(answers, spans, strict=True) if place not in unlearned]
    else:
        text = _render(messages, tokenizer, tools)
        spans = assistant_spans(messages, tokenizer, text, tools, unlearned)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    mask = _mask_spans(encoded["offset_mapping"], spans)
    _mask_turn_ends(ids, mask, tokenizer, lambda: _turn_end(messages, tokenizer, tools))
    return EncodedConversation(ids[:max_length], mask[:max_length])


def encode_prompt(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None = None) -> list[int]:
    """Return the tokens of a prompt, up to the start of the assistant's turn. Raises DatasetError as `encode` does."""
    return text_tokens(render_prompt(messages, tokenizer, tools), tokenizer)


def render_prompt(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """Return the text of a prompt, up to the start of the assistant's turn. Raises DatasetError as `encode` does, and
    for a template that leaves the last user message out.
    """
    text = _render(messages, tokenizer, tools, prompt=True)
    last = next((place for place in reversed(range(len(messages))) if messages[place]["role"] == "user"), None)
    if last is None or messages[last]["content"].strip() in text:
        return text
    if SENTINEL not in _render(_marked(messages, last), tokenizer, tools, prompt=True):
        raise DatasetError("the chat template does not write the user's message")
    return text


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of rendered text; no BOS is added to that of the template."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_forms(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None = None
) -> list[Sequence[int]]:
    """Return the tokens of a prompt as it is answered, and as it begins a conversation with an answer: some templates
    write them differently. Raises DatasetError as `encode` does.
    """
    answered = encode([*messages, {"role": "assistant", "content": "."}], tokenizer, None, tools)
    start = answered.loss_mask.index(True) if True in answered.loss_mask else 0
    return [encode_prompt(messages, tokenizer, tools), answered.input_ids[:start]]


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text that goes through no chat template. The special tokens that the tokenizer adds around
    it (BOS) are left out where the text has them already.
    """
    plain = text_tokens(text, tokenizer)
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    for start in reversed(range(len(whole) - len(plain) + 1)):
        end = start + len(plain)
        if whole[start:end] != plain:
            continue
        first, last = whole[:start], whole[end:]
        first = [] if plain[:start] == first else first
        return [*first, *plain, *([] if last and plain[-len(last) :] == last else last)]
    return whole


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends a turn of the assistant; None where it has none."""
    return _turn_end([{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}], tokenizer, None)


def turn_end_warning(tokenizer: Any, stops: Sequence[int], name: str) -> str | None:
    """Return a line where the chat template ends turns with a token that does not end an answer (`stops`), else None.

    Such answers run on to their limit. The line names the token and the remedy.
    """
    end = None if tokenizer is None else turn_end(tokenizer)
    if end is None or end in stops:
        return None
    known = ", ".join(map(str, stops)) or "none"
    return (
        f"{name}: its chat template ends turns with {tokenizer.convert_ids_to_tokens(end)!r} ({end}), which does not "
        f"end an answer, so answers may run to their limit: add {end} to eos_token_id in its generation_config.json "
        f"(now {known})"
    )


def prompt_warning(tokenizer: Any, name: str) -> str | None:
    """Return a line where the chat template writes a head before an answer, but not at the end of a prompt, else None.

    Templates without such a head, as Mistral's, need no generation prompt.
    """
    if tokenizer is None:
        return None
    messages: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}]
    try:
        prompt, closed = (_render(messages[:1], tokenizer, prompt=asked).rstrip() for asked in (True, False))
        head, found, _ = _render(messages, tokenizer).partition(SENTINEL)
    except DatasetError:
        return None
    missing = head.removeprefix(prompt).strip()
    if not found or prompt != closed or missing in ("", head.strip()):
        return None
    return (
        f"{name}: its chat template has no generation prompt: a prompt does not end with {missing!r}, which begins the "
        "assistant's turn, so the teacher writes that itself; teacher.chat_template (--chat-template) takes another"
    )


def special_tokens(tokenizer: Any) -> set[int]:
    """Return the special tokens, those included that have no role of their own, such as a turn's opening."""
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return added | set(tokenizer.all_special_ids)


def around_user_text(tokenizer: Any, system: str | None = None) -> tuple[str, str]:
    """Return what the chat template writes before and after the text of a first user message, which may follow a system
    message, up to the start of the assistant's turn. Raises DatasetError as `encode` does.
    """
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    before, _, after = _render([*first, {"role": "user", "content": SENTINEL}], tokenizer, prompt=True).partition(
        SENTINEL
    )
    return before, after


def check_masks(first: Sequence[Message], tokenizer: Any, masked: int, total: int) -> None:
    """Refuse a data set in which no token, or every token, belongs to an answer.

    Raises LossMaskError with the template's rendering of the conversation `first`, answers between double brackets.
    """
    if 0 < masked < total:
        return
    which = "none" if masked == 0 else "all"
    raise LossMaskError(
        f"the loss mask is useless: {which} of the data set's {total} tokens belong to an answer of the assistant\n"
        f"the chat template renders the first conversation, answers in [[ ]], as {show_spans(first, tokenizer)}\n"
        "check the roles of the messages, the tokenizer's chat template, and data.max_length"
    )


def show_spans(messages: Sequence[Message], tokenizer: Any) -> str:
    """Return a conversation as the template renders it, answers between double brackets, on one line."""
    encoded = encode(messages, tokenizer)
    parts = []
    for start, end, inside in _runs(encoded.loss_mask):
        text = tokenizer.decode(encoded.input_ids[start:end])
        parts.append(f"[[{text}]]" if inside else text)
    line = json.dumps("".join(parts), ensure_ascii=False)
    return (
        line
        if len(line) <= SHOWN_CHARACTERS
        else line[: SHOWN_CHARACTERS // 2] + " ... " + line[-SHOWN_CHARACTERS // 2 :]
    )


def _render(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None = None, prompt: bool = False
) -> str:
    with _refusals():
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            chat_template=at_fixed_time(template_of(tokenizer, tools)),
            tokenize=False,
            add_generation_prompt=prompt,
            **RENDER_OPTIONS,
        )


def _marked(messages: Sequence[Message], place: int) -> list[Message]:
    """Return the messages with the sentinel as the text of one."""
    return [{**item, "content": SENTINEL} if number == place else item for number, item in enumerate(messages)]


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise DatasetError where a template refuses a conversation, or cannot render its values."""
    try:
        yield
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise DatasetError(f"the chat template refuses the conversation: {first_line(error)}") from error


def _render_marked(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendering by a template that marks the assistant's text, and the marked character spans."""
    stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
    with _refusals():
        rendered: Any = render_jinja_template(
            conversations=[stated],
            tools=list(tools) if tools else None,
            chat_template=at_fixed_time(template_of(tokenizer, tools)),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **RENDER_OPTIONS},
        )
    texts, spans = rendered
    return texts[0], spans[0]


def _mask_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return the mask of tokens at character `offsets`: a token is inside if any of its characters is."""
    mask = [False] * len(offsets)
    place = 0
    for start, end in spans:
        while place < len(offsets) and offsets[place][1] <= start:
            place += 1
        while start < end and place < len(offsets) and offsets[place][0] < end:
            mask[place] = True
            place += 1
    return mask


def assistant_spans(
    messages: Sequence[Message],
    tokenizer: Any,
    text: str,
    tools: Sequence[Any] | None = None,
    unlearned: Collection[int] = (),
) -> list[tuple[int, int]]:
    """Return the character spans of the assistant's turns in `text`, the rendered conversation, in order.

    A turn starts where the generation prompt for it ends and ends where the rendering up to it ends. Templates that
    rewrite earlier turns (Qwen3 drops their thinking) have no such prefixes: there the rendering around a sentinel in
    place of the turn locates its text. A turn that the template omits has no span,
    nor have those at the places `unlearned`.
    """
    spans: list[tuple[int, int]] = []
    cursor = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _prefix_length(messages[:turn], tokenizer, tools, text, prompt=True)
        upto = _prefix_length(messages[: turn + 1], tokenizer, tools, text, prompt=False)
        start = before if before is not None and before >= cursor else None
        end = upto if upto is not None and upto > (cursor if start is None else start) else None
        if start is None or end is None:
            content = _content_span(messages, turn, tokenizer, tools, text, cursor if start is None else start)
            if content is None:
                continue
            start = content[0] if start is None else start
            end = content[1] if end is None else end
        spans += [] if turn in unlearned else [(start, end)]
        cursor = end
    return spans


def _prefix_length(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None, text: str, prompt: bool
) -> int | None:
    """Return the length of the rendering of the first messages if it is a prefix of the text, else None.

    Line breaks after a finished turn do not count.
    """
    try:
        rendered = _render(messages, tokenizer, tools, prompt)
    except DatasetError:
        return None
    if not text.startswith(rendered):
        return None
    return len(rendered) if prompt else len(rendered.rstrip())


def _content_span(
    messages: Sequence[Message], turn: int, tokenizer: Any, tools: Sequence[Any] | None, text: str, cursor: int
) -> tuple[int, int] | None:
    """Return the span of one turn's text, by the rendering around a sentinel; where that differs elsewhere too, the
    first match after `cursor`. A turn that the template leaves out has none: its text may stand in other turns.
    """
    try:
        head, sentinel, tail = _render(_marked(messages, turn), tokenizer, tools).partition(SENTINEL)
    except DatasetError:
        return None
    if not sentinel:
        return None
    if SENTINEL not in tail and text.startswith(head) and text.endswith(tail) and len(head) >= cursor:
        return len(head), max(len(head), len(text) - len(tail))
    content = messages[turn]["content"].strip()
    start = text.find(content, cursor) if content else -1
    return None if start < 0 else (start, start + len(content))


def _mask_turn_ends(ids: list[int], mask: list[bool], tokenizer: Any, turn_end: Callable[[], int | None]) -> None:
    """Extend or cut every run of masked tokens to the token that ends the turn, in place.

    Marks and sentinels may cover only the text: the special token `turn_end()` directly after a run is part of it.
    White space after a special token is not.
    """
    special = special_tokens(tokenizer)
    for start, end, inside in list(_runs(mask)):
        if not inside:
            continue
        last = _last_of_turn(ids, start, end, special, tokenizer)
        if ids[last] in special:
            mask[last + 1 : end] = [False] * (end - last - 1)
        elif end < len(ids) and ids[end] in special and ids[end] == turn_end():
            mask[end] = True


def _turn_end(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None) -> int | None:
    """Return the first special token that the template writes after the text of a last answer: it ends the turn. None
    where there is none; what follows an answer in the middle may open the next turn.
    """
    last = max(place for place, item in enumerate(messages) if item["role"] == "assistant")
    try:
        text = _render(_marked(messages[: last + 1], last), tokenizer, tools)
    except DatasetError:
        return None
    special = special_tokens(tokenizer)
    return next((token for token in text_tokens(text.rpartition(SENTINEL)[2], tokenizer) if token in special), None)


def _last_of_turn(ids: list[int], start: int, end: int, special: set[int], tokenizer: Any) -> int:
    """Return the place of the last token of a turn within a run, without white space after it. A special token that
    white space follows ends the turn: Phi-3's template writes the end of the text after that of the last turn.
    """
    text = end - 1  # the last token of the text
    while text > start and (ids[text] in special or not tokenizer.decode([ids[text]]).strip()):
        text -= 1
    last = next((place for place in range(text + 1, end) if ids[place] in special), text)
    while last > text and last + 1 < end and ids[last + 1] in special:
        last += 1
    return last


def _runs(mask: list[bool]) -> list[tuple[int, int, bool]]:
    """Return (start, end, value) of each run of equal entries."""
    runs: list[tuple[int, int, bool]] = []
    start = 0
    for place in range(1, len(mask) + 1):
        if place == len(mask) or mask[place] != mask[start]:
            runs.append((start, place, mask[start]))
            start = place
    return runs
