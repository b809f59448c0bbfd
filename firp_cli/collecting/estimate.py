"""What a store will take, before anything is started: bytes per token, tokens, disk and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firp_cli.collecting.corpus import Corpus, build_corpus, load_messages, longest_sequence
from firp_cli.collecting.forward import capture, plan_batches
from firp_cli.collecting.respond import greedy, plan_prompts
from firp_cli.data.store import bytes_per_token
from firp_cli.data.store_file import free_bytes
from firp_cli.errors import CapacityError
from firp_cli.recipe import DataConfig
from firp_cli.teacher.stack import Teacher

SAMPLE_CONVERSATIONS = 256
TIMED_TOKENS = 8192  # positions of the timed forwards at most
TIMED_STEPS = 16  # tokens of the timed answers


def estimate(
    teacher: Teacher, data: DataConfig, layers: Sequence[int], dtype: str, folder: Path, ranks: int = 1
) -> dict[str, Any]:
    """Figures for collecting `data` into `folder` with `ranks` ranks; writes and starts nothing.

    Tokens are counted in an evenly spaced sample and extrapolated; for answers that the teacher will write itself
    `max_new_tokens` each is taken, an upper bound. Times come from short forwards of this process; more ranks are
    taken to be as many times faster.
    """
    rows = load_messages(data)
    step = max(1, len(rows) // SAMPLE_CONVERSATIONS)
    sample = build_corpus(rows[::step][:SAMPLE_CONVERSATIONS], teacher, data)
    sampled = len(sample.input_ids) + sum(sample.skipped.values())
    scale = len(rows) / sampled
    conversations = round(len(sample.input_ids) * scale)
    longest = longest_sequence(teacher, data)
    room = data.max_new_tokens if data.regenerate else 0
    tokens = round(sum(min(longest, length + room) for length in sample.lengths) * scale)
    rate = _forward_rate(teacher, sample, layers, data.pack_tokens)
    answering = (
        _answering_seconds(teacher, sample, data) * conversations / len(sample.input_ids) if data.regenerate else 0.0
    )
    each = bytes_per_token(teacher.hidden_size, len(layers), dtype)
    return {
        "dataset": data.dataset,
        "teacher": teacher.name,
        "layers": list(layers),
        "dtype": dtype,
        "conversations": conversations,
        "tokens": tokens,
        "sampled_conversations": sampled,
        "exact": sampled == len(rows) and not data.regenerate,
        "upper_bound": data.regenerate,
        "bytes_per_token": each,
        "total_bytes": tokens * each,
        "free_bytes": free_bytes(folder),
        "ranks": ranks,
        "rank_tokens_per_second": rate,
        "tokens_per_second": rate * ranks,
        "answering_seconds": answering / ranks,
        "seconds": (tokens / rate + answering) / ranks,
    }


def check_space(folder: Path, hidden_size: int, layers: int, dtype: str, tokens: int) -> None:
    """Raises CapacityError when `tokens` more tokens do not fit the disk under `folder`."""
    needed, free = tokens * bytes_per_token(hidden_size, layers, dtype), free_bytes(folder)
    if needed > free:
        raise CapacityError(
            f"the store needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free\n"
            "lower data.limit, collect fewer layers, store in int8 (data.store_dtype=int8), or give another --output"
        )


def _forward_rate(teacher: Teacher, sample: Corpus, layers: Sequence[int], pack_tokens: int) -> float:
    """Tokens per second of collecting, from the forwards in the middle of the sample's range of lengths."""
    batches = plan_batches(sample.lengths, pack_tokens)
    count = max(1, min(len(batches), TIMED_TOKENS // pack_tokens))
    middle = (len(batches) - count) // 2
    picks = [sample.input_ids[index] for batch in batches[middle : middle + count] for index in batch]
    capture(teacher, picks[:1], layers, pack_tokens, lambda *_: None)  # warm-up
    began = time.perf_counter()
    capture(teacher, picks, layers, pack_tokens, lambda *_: None)
    return sum(map(len, picks)) / (time.perf_counter() - began)


def _answering_seconds(teacher: Teacher, sample: Corpus, data: DataConfig) -> float:
    """Seconds to answer the sample's prompts with `max_new_tokens` each, from a few steps of one batch."""
    batches = plan_prompts(sample.lengths, data.batch_size)
    prompts = [sample.input_ids[index] for index in batches[len(batches) // 2]]
    steps = min(TIMED_STEPS, data.max_new_tokens)
    greedy(teacher, prompts, 1)
    began = time.perf_counter()
    greedy(teacher, prompts, steps)
    return (time.perf_counter() - began) / steps * data.max_new_tokens * len(batches)
