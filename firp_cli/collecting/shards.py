"""The shards of a store, shared out over the ranks: who writes which, writing them, entering them.

Rank 0 leads: it holds the folder's lock and writes the manifest. What every rank must know (which shards are missing)
goes over the control group; what must survive a kill lies on the disk beside each shard.
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
from firp_cli.data.formats import Message
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import LaunchError, StoreError
from firp_cli.results import Progress
from firp_cli.store.reader import compress, room, state_names
from firp_cli.store.writer import FOLD_SECONDS, ShardPlan, ShardWriter, StoreWriter, is_whole, text_fingerprint
from firp_cli.teacher.teacher import Teacher

SEEN_SECONDS = 60.0  # a network file system may show a new file late


def check_shared(folder: Path, group: RankGroup) -> None:
    """Refuse ranks that do not see one and the same output folder. Raises StoreError with the remedy."""
    if group.size == 1:
        return

    def put() -> bool:
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()
        except OSError as error:
            raise StoreError(f"cannot write {folder}: {error}; give another --output") from error
        return made

    def seen() -> bool:
        until = time.monotonic() + SEEN_SECONDS
        while not (found := (folder / token).is_file()) and time.monotonic() < until:
            time.sleep(0.2)
        return found

    token = group.run_on_main(lambda: f".{os.urandom(8).hex()}.tmp")
    made = group.run_on_main(put)
    blind = [number for number, found in enumerate(group.gather(seen())) if not found]
    if group.main:
        (folder / token).unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
    if blind:
        error = StoreError(
            f"rank {', '.join(map(str, blind))} does not see the {folder.absolute()} of rank 0; "
            "give an --output on a file system that all machines share, under one path"
        )
        error.agreed = True
        raise error


def check_alike(rows: Sequence[Sequence[Message]], teacher: Teacher, group: RankGroup) -> None:
    """Refuse ranks that read different data or different teachers. Raises LaunchError saying which rank."""
    if group.size == 1:
        return
    size = sum(len(item["content"]) for messages in rows for item in messages)
    seen = group.gather({"data set": (len(rows), size), "teacher": teacher.fingerprint})
    for number, values in enumerate(seen):
        for name, value in values.items():
            if value != seen[0][name]:
                error = LaunchError(
                    f"rank {number} reads another {name} than rank 0 ({value} against {seen[0][name]}); "
                    "give all machines the same files"
                )
                error.agreed = True
                raise error


@contextmanager
def open_writer(
    lead: Callable[[], StoreWriter], folder: Path, layers: Sequence[int], dtype: str, group: RankGroup
) -> Iterator[ShardWriter]:
    """This rank's writer: rank 0 leads, and the others join what it leads."""
    writer: ShardWriter | None = None

    def start() -> None:
        nonlocal writer
        writer = leader = lead()
        if group.size > 1:
            leader.share()

    def join() -> None:
        nonlocal writer
        writer = writer or ShardWriter(folder, layers, dtype)

    try:
        group.run_on_main(start)
        group.run_on_all(join)
        assert writer is not None
        yield writer
    finally:
        if writer is not None:
            writer.close()


def plan_pending(
    writer: ShardWriter, folder: Path, corpus: Corpus, counts: dict[str, Any], group: RankGroup
) -> list[ShardPlan]:
    """The shards to be written. The ranks share the checking of those that are there: that reads all their bytes."""

    def text(plan: ShardPlan) -> str:
        ids, masks = corpus.input_ids[plan.first : plan.next], corpus.loss_mask[plan.first : plan.next]
        return text_fingerprint(torch.cat(ids), torch.cat(masks))

    def claims() -> list[tuple[ShardPlan, dict[str, Any]]]:
        assert isinstance(writer, StoreWriter)
        return writer.claims(corpus.lengths)

    def settle() -> list[ShardPlan]:
        assert isinstance(writer, StoreWriter)
        return writer.settle([entry for part in whole for entry in part], counts)

    mine = group.run_on_main(claims)[group.rank :: group.size]
    whole = group.gather([entry for plan, entry in mine if is_whole(folder, plan, entry, text)])
    return group.run_on_main(settle)


def assign(plans: Sequence[ShardPlan], sizes: Sequence[int], ranks: int) -> list[list[ShardPlan]]:
    """Each rank's shards, in order, so that all ranks have about as many tokens: the largest that is left goes to the
    rank that has least.
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
    """Capture shard by shard; while one is computed the one before it is written. At most two are in memory.

    `bar` is told the tokens that all ranks have done of `total`, as far as their shards are entered.
    Returns the manifest's entries of the shards written.
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


def finish(writer: ShardWriter, entries: Sequence[dict[str, Any]], group: RankGroup) -> None:
    """Wait for all ranks and enter what they wrote; meanwhile rank 0 enters what is finished."""

    def fold() -> None:
        if isinstance(writer, StoreWriter):
            writer.fold(FOLD_SECONDS)

    def enter() -> None:
        assert isinstance(writer, StoreWriter)
        # Their own word counts: a network file system may show their files late.
        writer.fold(entries=[entry for part in told for entry in part])
        assert writer.manifest["complete"]

    group.wait(fold)
    told = group.gather(list(entries))
    group.run_on_main(enter)


def _shard_tensors(
    teacher: Teacher,
    corpus: Corpus,
    plan: ShardPlan,
    layers: Sequence[int],
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
            tensors[name + suffix] = room((starts[-1], sample.shape[1]), sample.dtype)

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
