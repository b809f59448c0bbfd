"""Shards of a store, shared by the ranks: assign them, write them, enter them in the manifest.

Rank 0 leads: it holds the folder's lock and writes the manifest. Small values, such as the list of missing shards, are
sent through the rank group; what must survive a kill is on the disk beside each shard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.corpus import Corpus
from firp_cli.collecting.teacher_states import accompany, capture
from firp_cli.distributed.rank_group import RankGroup, raise_on_all_ranks
from firp_cli.errors import StoreError
from firp_cli.results import Progress
from firp_cli.store.reader import allocate, encode_states, state_names
from firp_cli.store.writer import FOLD_SECONDS, ShardPlan, ShardWriter, StoreWriter, is_whole, text_fingerprint
from firp_cli.teacher.teacher import Teacher

SEEN_SECONDS = 60.0  # a network file system may show a new file late


def check_shared(folder: Path, group: RankGroup) -> None:
    """Check that all ranks see the same output folder. Raises StoreError naming the ranks that do not."""
    if group.size == 1:
        return

    def put() -> tuple[Path, bool]:
        made = not folder.exists()
        mark = folder / f".{os.urandom(8).hex()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise StoreError(f"cannot write {folder}: {error}; give another --output") from error
        return mark, made

    mark, made = group.run_on_main(put)
    until = time.monotonic() + SEEN_SECONDS
    while not (seen := mark.is_file()) and time.monotonic() < until:
        time.sleep(0.2)
    blind = [rank for rank, visible in enumerate(group.gather(seen)) if not visible]
    if group.main:
        mark.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
    if blind:
        raise_on_all_ranks(
            StoreError(
                f"rank {', '.join(map(str, blind))} does not see the {folder.absolute()} of rank 0; "
                "give an --output on a file system that all machines share, under one path"
            )
        )


@contextmanager
def open_writer(
    make_leader: Callable[[], StoreWriter], folder: Path, layers: Sequence[int], dtype: str, group: RankGroup
) -> Iterator[ShardWriter]:
    """Yield this rank's writer: on rank 0 the leader, on other ranks a writer that joins it."""
    writer: ShardWriter | None = None

    def lead() -> None:
        nonlocal writer
        writer = store = make_leader()
        if group.size > 1:
            store.share()

    def join() -> None:
        nonlocal writer
        writer = writer or ShardWriter(folder, layers, dtype)

    try:
        group.run_on_main(lead)
        group.run_on_all(join)
        assert writer is not None
        yield writer
    finally:
        if writer is not None:
            writer.close()


def leader(writer: ShardWriter) -> StoreWriter:
    """Return the writer of rank 0, which leads the others."""
    assert isinstance(writer, StoreWriter)
    return writer


def plan_pending(
    writer: ShardWriter,
    corpus: Corpus,
    counts: dict[str, Any],
    check_room: Callable[[int], None],
    group: RankGroup,
) -> list[ShardPlan]:
    """Return the shards to be written, and enter the others in the manifest with `counts`.

    The ranks share the check of existing shards, which reads all their bytes. Rank 0 calls `check_room` with the number
    of tokens to be written.
    """

    def text(plan: ShardPlan) -> str:
        ids, masks = corpus.input_ids[plan.first : plan.next], corpus.loss_mask[plan.first : plan.next]
        return text_fingerprint(torch.cat(ids), torch.cat(masks))

    def settle() -> list[ShardPlan]:
        pending = leader(writer).settle([entry for part in whole for entry in part], counts)
        check_room(sum(sum(lengths[plan.first : plan.next]) for plan in pending))
        return pending

    lengths = corpus.lengths
    claims = group.run_on_main(lambda: leader(writer).claims(lengths))[group.rank :: group.size]
    whole = group.gather([entry for plan, entry in claims if is_whole(writer.folder, plan, entry, text)])
    return group.run_on_main(settle)


def assign(plans: Sequence[ShardPlan], sizes: Sequence[int], ranks: int) -> list[list[ShardPlan]]:
    """Return each rank's shards, in order, with about equally many tokens for each rank.

    The largest remaining shard goes to the rank with the fewest tokens.
    """
    load = [0] * ranks
    taken: list[list[ShardPlan]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(plans)), key=lambda place: -sizes[place]):
        least = load.index(min(load))
        load[least] += sizes[place]
        taken[least].append(plans[place])
    return [sorted(mine, key=lambda plan: plan.number) for mine in taken]


def write_shards(
    teacher: Teacher,
    corpus: Corpus,
    layers: Sequence[int],
    dtype: str,
    pack_tokens: int,
    writer: ShardWriter,
    plans: list[ShardPlan],
    total: int,
    bar: Progress,
) -> list[dict[str, Any]]:
    """Compute and write the shards `plans`; return their entries for the manifest.

    A shard is written while the next one is computed, so at most two are in memory. `bar` gets the tokens of `total`
    that are done: this rank's, and those of other ranks' shards in the manifest.
    """
    mine = {plan.file for plan in plans}
    entries: list[dict[str, Any]] = []
    before = writer.entered() if isinstance(writer, StoreWriter) else {}
    done = 0

    def others() -> int:
        if not isinstance(writer, StoreWriter):
            return 0
        return sum(tokens for file, tokens in writer.entered().items() if file not in mine and file not in before)

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        bar(done + others(), total)

    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as pool:
        writing: Future[dict[str, Any]] | None = None
        for plan in plans:
            tensors = _shard_tensors(teacher, corpus, plan, layers, dtype, pack_tokens, on_tokens)
            if writing:
                entries.append(writing.result())
            writing = pool.submit(writer.write, plan, tensors)
            del tensors
        accompany(teacher)
        if writing:
            entries.append(writing.result())
    return entries


def gather_entries(writer: ShardWriter, entries: list[dict[str, Any]], group: RankGroup) -> list[list[dict[str, Any]]]:
    """Wait until all ranks have written their shards; return the entries of each rank.

    While it waits, rank 0 enters finished shards in the manifest.
    """

    def fold() -> None:
        if isinstance(writer, StoreWriter):
            writer.fold(FOLD_SECONDS)

    group.wait(fold)
    return group.gather(entries)


def _shard_tensors(
    teacher: Teacher,
    corpus: Corpus,
    plan: ShardPlan,
    layers: Sequence[int],
    dtype: str,
    pack_tokens: int,
    on_tokens: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return the tensors of one shard. They depend on its conversations alone, so a single shard can be rebuilt."""
    sequences = corpus.input_ids[plan.first : plan.next]
    offsets = torch.tensor([0, *(len(ids) for ids in sequences)]).cumsum(0)
    starts = offsets.tolist()
    tensors = {
        "input_ids": torch.cat(sequences),
        "loss_mask": torch.cat(corpus.loss_mask[plan.first : plan.next]),
        "sequence_offsets": offsets,
    }
    for name in state_names(layers):
        for suffix, sample in encode_states(torch.zeros(1, teacher.hidden_size), dtype).items():
            tensors[name + suffix] = allocate((starts[-1], sample.shape[1]), sample.dtype)

    def sink(batch: list[int], states: dict[str, Tensor]) -> None:
        for name, rows in states.items():
            for suffix, stored in encode_states(rows, dtype).items():
                place = 0
                for index in batch:
                    length = starts[index + 1] - starts[index]
                    tensors[name + suffix][starts[index] : starts[index + 1]] = stored[place : place + length]
                    place += length

    capture(teacher, sequences, layers, pack_tokens, sink, on_tokens)
    return tensors
