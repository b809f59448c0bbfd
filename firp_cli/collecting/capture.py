"""`collect_store`: from a data set and a teacher to a complete hidden-state store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.corpus import Corpus, Progress, build_corpus, load_messages, longest_sequence, no_progress
from firp_cli.collecting.estimate import check_space
from firp_cli.collecting.forward import capture
from firp_cli.collecting.respond import respond
from firp_cli.data.conversations import template_fingerprint, tokenizer_fingerprint
from firp_cli.data.store import compress, state_names
from firp_cli.data.store_writer import ShardPlan, StoreWriter, check_target
from firp_cli.errors import UsageError
from firp_cli.recipe import DataConfig
from firp_cli.teacher.stack import Teacher

OpenProgress = Callable[[str], AbstractContextManager[Progress]]


def silent(_: str) -> AbstractContextManager[Progress]:
    """Progress that nobody sees."""
    return nullcontext(no_progress)


def collect_store(
    teacher: Teacher,
    data: DataConfig,
    layers: Sequence[int],
    folder: Path,
    *,
    resume: bool = False,
    progress: OpenProgress = silent,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill the store `folder` with the states of `layers` and the final state. Returns a summary of plain values.

    `progress("collecting")` opens a bar. With `resume` an unfinished store is finished and damaged shards are rebuilt;
    the bytes are those of an uninterrupted run. `recipe` is kept in the manifest.

    Raises UsageError (layers), DatasetError, LossMaskError, CapacityError (disk), StoreError, FingerprintError and
    NumericsError; what was finished before is kept.
    """
    began = time.perf_counter()
    layers = check_layers(layers, teacher)
    folder = Path(folder)
    check_target(folder, resume)
    rows = load_messages(data)
    with progress("tokenizing") as bar:
        corpus = build_corpus(rows, teacher, data, bar)
    dtype = stored_dtype(teacher, data)
    writer = StoreWriter(
        folder,
        teacher=teacher.describe(),
        fingerprints=fingerprints(teacher),
        layers=layers,
        dtype=dtype,
        settings=_settings(data, corpus),
        recipe=recipe,
        resume=resume,
    )
    with writer:
        if data.regenerate:
            with progress("answering") as bar:
                corpus = respond(teacher, corpus, data, longest_sequence(teacher, data), folder, bar)
        counts = _counts(corpus)
        pending = writer.plan(corpus.lengths, counts)
        sizes = [sum(corpus.lengths[plan.first : plan.next]) for plan in pending]
        check_space(folder, teacher.hidden_size, len(layers), dtype, sum(sizes))
        start = time.perf_counter()
        with progress("collecting") as bar:
            _write_shards(teacher, corpus, layers, dtype, data.pack_tokens, writer, pending, bar)
        seconds = time.perf_counter() - start
        shards = writer.manifest["shards"]
    return {
        "store": str(folder),
        "dataset": data.dataset,
        "teacher": teacher.name,
        "layers": layers,
        "dtype": dtype,
        **counts,
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": len(shards),
        "shards_written": len(pending),
        "tokens_written": sum(sizes),
        "tokens_per_second": sum(sizes) / seconds if sizes else None,
        "seconds": time.perf_counter() - began,
    }


def check_layers(layers: Sequence[int], teacher: Teacher) -> list[int]:
    """Ascending, without repeats. Raises UsageError for a layer that no predictor can use."""
    outside = [layer for layer in layers if not 1 <= layer < teacher.num_layers]
    if outside:
        raise UsageError(
            f"no transfer layer {', '.join(map(str, outside))} in {teacher.name}: layers 1 to {teacher.num_layers - 1} "
            "can be collected (the final state always is)"
        )
    return sorted(set(layers))


def fingerprints(teacher: Teacher) -> dict[str, str]:
    """What a store is checked against: weights, tokenizer, chat template."""
    return {
        "teacher": teacher.fingerprint,
        "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
        "chat template": template_fingerprint(teacher.tokenizer),
    }


def stored_dtype(teacher: Teacher, data: DataConfig) -> str:
    """The store's dtype by name; `auto` is the teacher's."""
    return str(teacher.dtype).removeprefix("torch.") if data.store_dtype == "auto" else data.store_dtype


def _settings(data: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """Everything in the recipe that a byte of the store depends on, and a fingerprint of the text itself."""
    names = ["dataset", "split", "limit", "max_length", "regenerate", "pack_tokens", "shard_tokens"]
    if data.regenerate:
        names += ["max_new_tokens", "batch_size"]
    return {**{name: getattr(data, name) for name in names}, "data_fingerprint": corpus.fingerprint()}


def _counts(corpus: Corpus) -> dict[str, Any]:
    return {
        "conversations": len(corpus.input_ids),
        "tokens": sum(corpus.lengths),
        "response_tokens": corpus.response_tokens,
        "answers_cut": corpus.cut,
        "skipped": dict(sorted(corpus.skipped.items())),
    }


def _write_shards(
    teacher: Teacher,
    corpus: Corpus,
    layers: list[int],
    dtype: str,
    pack_tokens: int,
    writer: StoreWriter,
    pending: list[ShardPlan],
    bar: Progress,
) -> None:
    """Capture shard by shard; while one is computed the one before it is written. At most two are in memory."""
    total = sum(sum(corpus.lengths[plan.first : plan.next]) for plan in pending)
    done = 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        bar(done, total)

    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as pool:
        writing: Future[None] | None = None
        for plan in pending:
            tensors = _shard_tensors(teacher, corpus, plan, layers, dtype, pack_tokens, on_tokens)
            if writing:
                writing.result()
            writing = pool.submit(writer.write, plan, tensors)
            del tensors
        if writing:
            writing.result()


def _shard_tensors(
    teacher: Teacher,
    corpus: Corpus,
    plan: ShardPlan,
    layers: list[int],
    dtype: str,
    pack_tokens: int,
    on_tokens: Callable[[int], None],
) -> dict[str, Tensor]:
    """Everything that one shard holds. It depends on the shard's own conversations alone: one shard can be rebuilt."""
    sequences = corpus.input_ids[plan.first : plan.next]
    offsets = torch.tensor([0, *(len(ids) for ids in sequences)]).cumsum(0)
    starts = offsets.tolist()
    tensors = {
        "input_ids": torch.cat(sequences),
        "loss_mask": torch.cat(corpus.loss_mask[plan.first : plan.next]),
        "sequence_offsets": offsets,
    }
    for name in state_names(layers):
        for suffix, sample in compress(torch.zeros(1, teacher.hidden_size), dtype).items():
            tensors[name + suffix] = torch.empty(starts[-1], sample.shape[1], dtype=sample.dtype)

    def sink(batch: list[int], states: dict[str, Tensor]) -> None:
        for name, rows in states.items():
            for suffix, stored in compress(rows, dtype).items():
                place = 0
                for index in batch:
                    length = starts[index + 1] - starts[index]
                    tensors[name + suffix][starts[index] : starts[index + 1]] = stored[place : place + length]
                    place += length

    capture(teacher, sequences, layers, pack_tokens, sink, on_tokens)
    return tensors
