"""Sample answers of a bench, cut into the pieces that each decoding step emitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from firp_cli.decoding.text_stream import TextStream
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.records import AnswerRecord, Sample
from firp_cli.teacher.teacher import Teacher

SAMPLES = 6  # prompts
MOST_TOKENS = 300  # of an answer that is shown
MOST_CHARACTERS = 1500  # of a question
SHOWN_END = 500  # of them from its end
CUT = "\ufffd"  # what a tokenizer writes for a part of a character


def make_samples(
    records: Sequence[AnswerRecord], prompts: Sequence[BenchPrompt], teacher: Teacher, count: int = SAMPLES
) -> list[Sample]:
    """Return every method's answer to at most `count` prompts of different data sets and categories, in the order of
    the prompts.

    The answers are those of the first repeat to the first turn: the methods asked the same there. Long ones end after
    the last step within MOST_TOKENS, long questions lose their middle. Empty for a teacher without tokenizer.

    Args:
        prompts: those measured, by the records' numbers.
    """
    if teacher.tokenizer is None:
        return []
    first = [item for item in records if (item.process, item.repeat, item.turn) == (0, 0, 0) and item.token_ids]
    numbers = sorted({item.prompt for item in first})
    places = spread_over_sets([(prompts[number].dataset, prompts[number].category) for number in numbers], count)
    return [
        Sample(
            method=item.method,
            dataset=item.dataset,
            category=item.category,
            prompt=item.prompt,
            asked=_question(prompts[item.prompt], teacher.tokenizer),
            pieces=step_pieces(item.token_ids or [], item.accepted_lengths, teacher.tokenizer),
            teacher=item.teacher,
        )
        for number in (numbers[place] for place in places)
        for item in first
        if item.prompt == number
    ]


def spread_over_sets(keys: Sequence[tuple[str, str]], count: int) -> list[int]:
    """Return at most `count` places, ascending: of each data set in turn one, each time of another of its categories
    while it has any.
    """
    seen: Counter[tuple[str, str]] = Counter()
    queues: dict[str, list[tuple[int, int]]] = {}
    for place, key in enumerate(keys):
        queues.setdefault(key[0], []).append((seen[key], place))
        seen[key] += 1
    rounds = zip_longest(*(sorted(queue) for queue in queues.values()))
    return sorted([item[1] for item in chain.from_iterable(rounds) if item is not None][:count])


def step_pieces(token_ids: Sequence[int], accepted_lengths: Sequence[int], tokenizer: Any) -> list[tuple[str, int]]:
    """Return the texts of an answer's first steps and their numbers of tokens, prefill's token first. They join to the
    text of these tokens; a character that several steps wrote belongs to the last of them.
    """
    counts = [1]
    for length in accepted_lengths:
        if sum(counts) + length > MOST_TOKENS:
            break
        counts += [length] if length else []  # a pipeline's tick may emit none
    shown = list(token_ids[: sum(counts)])
    text = tokenizer.decode(shown, skip_special_tokens=True)
    if len(shown) < len(token_ids):
        text = text.rstrip(CUT)
    decided: list[str] = []
    stream = TextStream(tokenizer, lambda piece, _: decided.append(piece))
    pieces, start, end = [], 0, 0
    for count in counts:
        stream.on_tokens(0, shown[start : start + count], 0)
        # the pieces are cut from the text, which some tokenizers write otherwise than token by token
        known = max(end, min(len(text), sum(map(len, decided))))
        pieces.append((text[end:known], count))
        start, end = start + count, known
    last, tokens = pieces[-1]
    pieces[-1] = (last + text[end:], tokens)
    return pieces


def _question(prompt: BenchPrompt, tokenizer: Any) -> str:
    """Return the text of a prompt's question; of a prompt without one all of its tokens."""
    text = prompt.question or tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
    if len(text) <= MOST_CHARACTERS:
        return text
    mark = " [...] "
    return text[: MOST_CHARACTERS - SHOWN_END - len(mark)] + mark + text[-SHOWN_END:]
