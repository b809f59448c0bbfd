"""Collecting: a data set and a teacher make a complete hidden-state store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from firp_cli.chat_template import template_fingerprint, tokenizer_fingerprint
from firp_cli.collecting.answer import respond
from firp_cli.collecting.corpus import Corpus, build_shared_corpus, longest_sequence
from firp_cli.collecting.estimate import check_space
from firp_cli.collecting.responders import Responder
from firp_cli.collecting.shards import (
    assign,
    check_shared,
    gather_entries,
    leader,
    open_writer,
    plan_pending,
    write_shards,
)
from firp_cli.config import DataConfig
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import UsageError
from firp_cli.provenance import fingerprint
from firp_cli.results import Progress, no_progress
from firp_cli.store.writer import ShardPlan, ShardWriter, StoreWriter, check_target
from firp_cli.teacher.teacher import Teacher

OpenProgress = Callable[[str], AbstractContextManager[Progress]]


def silent(_: str) -> AbstractContextManager[Progress]:
    """Return a progress bar that shows nothing."""
    return nullcontext(no_progress)


@dataclass(frozen=True)
class CollectSummary:
    """A complete store, and the run that completed it.

    Attributes:
        store: its folder. layers: those stored beside the final state. dtype: of the stored states.
        conversations, tokens, response_tokens: contents of the store. answers_cut: answers that a length limit ended.
        skipped: rows left out, by reason. answers: account of `respond`; None when the teacher wrote no answers.
        bytes, shards: size on disk.
        ranks, teacher_memory, seconds: of this run. shards_written, tokens_written: those that were missing.
        rank_tokens: tokens written by each rank. tokens_per_second: None when no shard was missing.
    """

    store: str
    dataset: str
    teacher: str
    layers: list[int]
    dtype: str
    conversations: int
    tokens: int
    response_tokens: int
    answers_cut: int
    skipped: dict[str, int]
    answers: dict[str, Any] | None
    bytes: int
    shards: int
    ranks: int
    teacher_memory: dict[str, Any]
    shards_written: int
    tokens_written: int
    rank_tokens: list[int]
    tokens_per_second: float | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `answers` where the teacher wrote none."""
        return {name: value for name, value in asdict(self).items() if name != "answers" or value is not None}


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
) -> CollectSummary:
    """Fill the store `folder` with the states of `layers` and the final state.

    All ranks of a run call this and share the work. The bytes of the store do not depend on the number of ranks.

    Args:
        resume: finish an unfinished store and rebuild damaged shards, to the bytes of an uninterrupted run.
        progress: opens a progress bar, as `progress("collecting")`.
        recipe: kept in the manifest.
        responder: writes the answers; required with `data.regenerate`, else None.

    Raises UsageError (layers), DatasetError, LossMaskError, CapacityError (disk), StoreError, FingerprintError,
    NumericsError and LaunchError (ranks). The shards finished before an error are kept.
    """
    assert (responder is not None) == data.regenerate
    began = time.perf_counter()
    group = RankGroup.join()
    folder, dtype = Path(folder), stored_dtype(teacher, data)
    kept = group.run_on_main(lambda: _check_request(layers, teacher, folder, resume))
    check_shared(folder, group)
    with progress("tokenizing") as bar:
        corpus = build_shared_corpus(teacher, data, bar, group)
    make_leader = partial(
        StoreWriter,
        folder,
        teacher=teacher.describe(),
        fingerprints=fingerprints(teacher),
        layers=kept,
        dtype=dtype,
        settings=_settings(data, corpus, responder),
        recipe=recipe,
        resume=resume,
    )
    with open_writer(make_leader, folder, kept, dtype, group) as writer:
        counts: dict[str, Any] = {}
        if responder is not None:
            with progress("answering") as bar:
                longest = longest_sequence(teacher, data)
                corpus, account = respond(teacher, corpus, data, longest, folder, responder, bar, group)
            counts["answers"] = account
        counts = _counts(corpus) | counts
        check_room = partial(check_space, folder, teacher.hidden_size, len(kept), dtype)
        pending = plan_pending(writer, corpus, counts, check_room, group)
        with progress("collecting") as bar:
            run = _write(teacher, data, corpus, kept, writer, pending, began, bar, group)
    names = {"store": str(folder), "dataset": data.dataset, "teacher": teacher.name, "layers": kept, "dtype": dtype}
    return CollectSummary(**{"answers": None, **names, **counts, **run})


def _write(
    teacher: Teacher,
    data: DataConfig,
    corpus: Corpus,
    layers: list[int],
    writer: ShardWriter,
    pending: list[ShardPlan],
    began: float,
    bar: Progress,
    group: RankGroup,
) -> dict[str, Any]:
    """Write the pending shards on all ranks, complete the manifest and record the run; return the run's figures."""
    start = time.perf_counter()
    lengths = corpus.lengths
    sizes = [sum(lengths[plan.first : plan.next]) for plan in pending]
    mine = assign(pending, sizes, group.size)[group.rank]
    dtype = stored_dtype(teacher, data)
    entries = write_shards(teacher, corpus, layers, dtype, data.pack_tokens, writer, mine, sum(sizes), bar)
    written = gather_entries(writer, entries, group)

    def complete() -> dict[str, Any]:
        store = leader(writer)
        # The ranks' entries are needed too: a network file system may show their sidecars late.
        store.fold(entries=[entry for part in written for entry in part])
        assert store.manifest["complete"]
        now = time.perf_counter()
        run = {
            "ranks": group.size,
            "teacher_memory": teacher.loaded_weights.describe(),
            "shards_written": len(pending),
            "tokens_written": sum(sizes),
            "rank_tokens": [sum(entry["tokens"] for entry in part) for part in written],
            "tokens_per_second": sum(sizes) / (now - start) if sizes else None,
            "seconds": now - began,
        }
        store.record(run)
        shards = store.manifest["shards"]
        return {"bytes": sum(shard["bytes"] for shard in shards), "shards": len(shards), **run}

    return group.run_on_main(complete)


def _check_request(layers: Sequence[int], teacher: Teacher, folder: Path, resume: bool) -> list[int]:
    """Return the layers to store. Raises UsageError (layers) and StoreError (folder)."""
    kept = check_layers(layers, teacher)
    check_target(folder, resume)
    return kept


def check_layers(layers: Sequence[int], teacher: Teacher) -> list[int]:
    """Return the layers in ascending order, without repeats. Raises UsageError for a layer that cannot be stored."""
    outside = [layer for layer in layers if not 1 <= layer < teacher.num_layers]
    if outside:
        raise UsageError(
            f"no transfer layer {', '.join(map(str, outside))} in {teacher.name}: layers 1 to {teacher.num_layers - 1} "
            "can be collected (the final state always is)"
        )
    return sorted(set(layers))


def fingerprints(teacher: Teacher) -> dict[str, str]:
    """Return the fingerprints of weights, tokenizer and chat template, which a store is checked against."""
    return {
        "teacher": teacher.fingerprint,
        "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
        "chat template": template_fingerprint(teacher.tokenizer),
    }


def stored_dtype(teacher: Teacher, data: DataConfig) -> str:
    """Return the name of the store's dtype; `auto` is the teacher's."""
    return str(teacher.dtype).removeprefix("torch.") if data.store_dtype == "auto" else data.store_dtype


def _settings(data: DataConfig, corpus: Corpus, responder: Responder | None) -> dict[str, Any]:
    """Return the recipe fields that decide the bytes of the store, and a fingerprint of its text."""
    names = ["dataset", "split", "limit", "max_length", "regenerate", "pack_tokens", "shard_tokens"]
    settings = {name: getattr(data, name) for name in names}
    settings |= {name: value for name in ("sample", "columns") if (value := getattr(data, name)) not in (None, {})}
    if responder is not None:
        settings |= {"max_new_tokens": data.max_new_tokens, "responder": responder.name}
    later = [turns[1:] for row in corpus.conversations if len(turns := row.turns()) > 1] if data.turns == "all" else []
    if not later:
        return {**settings, "data_fingerprint": corpus.fingerprint()}
    return {**settings, "turns": data.turns, "data_fingerprint": fingerprint([corpus.fingerprint(), later])}


def _counts(corpus: Corpus) -> dict[str, Any]:
    return {
        "conversations": len(corpus.input_ids),
        "tokens": sum(corpus.lengths),
        "response_tokens": corpus.response_tokens,
        "answers_cut": corpus.cut,
        "skipped": dict(sorted(corpus.skipped.items())),
    }
