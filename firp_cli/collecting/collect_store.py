"""`collect_store`: from a data set and a teacher to a complete hidden-state store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from firp_cli.collecting.answer import respond
from firp_cli.collecting.corpus import Corpus, build_corpus, load_messages, longest_sequence
from firp_cli.collecting.estimate import check_space
from firp_cli.collecting.responders import Responder
from firp_cli.collecting.shards import (
    assign,
    check_alike,
    check_shared,
    finish,
    open_writer,
    plan_pending,
    write_shards,
)
from firp_cli.config import DataConfig
from firp_cli.data.chat import template_fingerprint, tokenizer_fingerprint
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import UsageError
from firp_cli.results import Progress, no_progress
from firp_cli.store.writer import ShardWriter, StoreWriter, check_target
from firp_cli.teacher.teacher import Teacher

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
    responder: Responder | None = None,
) -> dict[str, Any]:
    """Fill the store `folder` with the states of `layers` and the final state. Returns a summary of plain values.

    `progress("collecting")` opens a bar. With `resume` an unfinished store is finished and damaged shards are rebuilt;
    the bytes are those of an uninterrupted run. `recipe` is kept in the manifest. `responder` writes the answers where
    `data.regenerate` asks for them. All ranks of a run call this and share the work; the bytes are those of one rank.

    Raises UsageError (layers), DatasetError, LossMaskError, CapacityError (disk), StoreError, FingerprintError,
    NumericsError and LaunchError (ranks); what was finished before is kept.
    """
    assert (responder is not None) == data.regenerate
    began = time.perf_counter()
    group = RankGroup.join()
    folder = Path(folder)
    layers = group.run_on_all(lambda: check_layers(layers, teacher))
    group.run_on_main(lambda: check_target(folder, resume))
    check_shared(folder, group)
    rows = group.run_on_all(lambda: load_messages(data))
    check_alike(rows, teacher, group)
    with progress("tokenizing") as bar:
        corpus = build_corpus(rows, teacher, data, bar, group)
    dtype = stored_dtype(teacher, data)

    def lead() -> StoreWriter:
        return StoreWriter(
            folder,
            teacher=teacher.describe(),
            fingerprints=fingerprints(teacher),
            layers=layers,
            dtype=dtype,
            settings=_settings(data, corpus, responder),
            recipe=recipe,
            resume=resume,
        )

    with open_writer(lead, folder, layers, dtype, group) as writer:
        account: dict[str, Any] = {}
        if responder is not None:
            with progress("answering") as bar:
                longest = longest_sequence(teacher, data)
                corpus, answers = respond(teacher, corpus, data, longest, folder, responder, bar, group)
                account = {"answers": answers}
        counts = _counts(corpus) | account
        pending = plan_pending(writer, folder, corpus, counts, group)
        sizes = [sum(corpus.lengths[plan.first : plan.next]) for plan in pending]
        group.run_on_main(lambda: check_space(folder, teacher.hidden_size, len(layers), dtype, sum(sizes)))
        mine = assign(pending, sizes, group.size)[group.rank]
        start = time.perf_counter()
        with progress("collecting") as bar:
            entries = write_shards(teacher, corpus, layers, dtype, data.pack_tokens, writer, mine, sum(sizes), bar)
            finish(writer, entries, group)
        seconds = time.perf_counter() - start
        run = {
            "ranks": group.size,
            "teacher_memory": teacher.loaded_weights.describe(),
            "shards_written": len(pending),
            "tokens_written": sum(sizes),
            "rank_tokens": group.gather(sum(entry["tokens"] for entry in entries)),
            "tokens_per_second": sum(sizes) / seconds if sizes else None,
        }
        total = group.run_on_main(lambda: _record(writer, run, time.perf_counter() - began))
    return {
        "store": str(folder),
        "dataset": data.dataset,
        "teacher": teacher.name,
        "layers": layers,
        "dtype": dtype,
        **counts,
        **total,
    }


def _record(writer: ShardWriter, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """On rank 0: keep figures of the run beside the store; returns them, with the store's size."""
    assert isinstance(writer, StoreWriter)
    writer.record({**run, "seconds": seconds})
    shards = writer.manifest["shards"]
    return {"bytes": sum(shard["bytes"] for shard in shards), "shards": len(shards), **run, "seconds": seconds}


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


def _settings(data: DataConfig, corpus: Corpus, responder: Responder | None) -> dict[str, Any]:
    """Everything in the recipe that a byte of the store depends on, and a fingerprint of the text itself."""
    names = ["dataset", "split", "limit", "max_length", "regenerate", "pack_tokens", "shard_tokens"]
    settings = {name: getattr(data, name) for name in names}
    if responder is not None:
        settings |= {"max_new_tokens": data.max_new_tokens, "responder": responder.name}
    return {**settings, "data_fingerprint": corpus.fingerprint()}


def _counts(corpus: Corpus) -> dict[str, Any]:
    return {
        "conversations": len(corpus.input_ids),
        "tokens": sum(corpus.lengths),
        "response_tokens": corpus.response_tokens,
        "answers_cut": corpus.cut,
        "skipped": dict(sorted(corpus.skipped.items())),
    }
