#!/usr/bin/env python3
"""Write and read a store against plain safetensors files on the same disk: MB/s, interleaved, medians.

Both write the same tensors into as many files and sync them. The store also scales states to its dtype, checks for NaN,
hashes, renames, and keeps its manifest; as in `firp collect`, a thread writes one shard while the next one is scaled.
Both read the files from end to end one conversation at a time, in order and shuffled, into one piece of memory, as the
trainer's reader fills a batch; a store of int8 or float8 returns floats. Files are synced and dropped from the page
cache before each reading; the last column gives the share of the bytes that came from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from firp_cli.provenance import environment
from firp_cli.store.reader import FLOATS, SCALED, Store, compress, expand
from firp_cli.store.writer import LEAST_SHARDS, ShardPlan, StoreWriter

LAYER = 8
NAMES = (f"hidden.{LAYER}", "hidden.final")
TARGET = 0.7


@dataclass(frozen=True)
class Corpus:
    """Conversations of random states: `states` are the rows that a teacher would give, by tensor name."""

    lengths: list[int]
    shards: int
    states: dict[str, Tensor]

    @property
    def shard_tokens(self) -> int:
        return sum(self.lengths)


def make_corpus(tokens: int, shards: int, hidden_size: int, dtype: torch.dtype) -> Corpus:
    """Return one shard's states, written `shards` times; conversations of 50 to 600 tokens."""
    generator = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(generator.randint(50, 600), tokens - sum(lengths)))
    torch.manual_seed(0)
    return Corpus(lengths, shards, {name: torch.randn(tokens, hidden_size).to(dtype) for name in NAMES})


def tensors_of(corpus: Corpus, dtype: str) -> dict[str, Tensor]:
    """Return a shard, its states converted to the store's dtype."""
    tensors = {
        "input_ids": torch.arange(corpus.shard_tokens, dtype=torch.int32),
        "loss_mask": torch.ones(corpus.shard_tokens, dtype=torch.bool),
        "sequence_offsets": torch.tensor([0, *accumulate(corpus.lengths)]),
    }
    for name, states in corpus.states.items():
        tensors |= {name + suffix: stored for suffix, stored in compress(states, dtype).items()}
    return tensors


def write_store(corpus: Corpus, dtype: str, folder: Path) -> None:
    """Write the states as `firp collect` does."""
    count, size = len(corpus.lengths), next(iter(corpus.states.values())).shape[1]
    with StoreWriter(
        folder,
        teacher={"name": "random", "hidden_size": size},
        fingerprints={"teacher": "none", "tokenizer": "none", "chat template": "none"},
        layers=[LAYER],
        dtype=dtype,
        settings={"dataset": "random", "shard_tokens": corpus.shard_tokens},
    ) as writer:
        plans = writer.plan(corpus.lengths * corpus.shards, {})
        if [plan.next for plan in plans] != [count * number for number in range(1, corpus.shards + 1)]:
            raise SystemExit(
                f"shards of {corpus.shard_tokens} tokens are cut differently: give {LEAST_SHARDS} or fewer"
            )
        with ThreadPoolExecutor(1) as pool:
            writing: Future[Any] | None = None
            for plan in plans:
                tensors = tensors_of(corpus, dtype)
                if writing:
                    writing.result()
                writing = pool.submit(writer.write, plan, tensors)
            if writing:
                writing.result()


def write_plain(tensors: dict[str, Tensor], shards: int, folder: Path) -> None:
    """Write the same tensors through `save_file`, synced."""
    folder.mkdir()
    for number in range(shards):
        path = folder / ShardPlan(number, 0, 0).file
        save_file(tensors, path)
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def read_store(folder: Path, order: Sequence[int]) -> None:
    """Read every conversation of `order` with all its states."""
    store, memory = Store.open(folder), Memory()
    for index in order:
        rows = store.stored(index)
        for name, stored in rows.items():
            scale = rows.get(f"{name}.scale")
            expand(stored, scale, out=memory.like(stored, stored.dtype if scale is None else torch.float32))


def read_plain(folder: Path, order: Sequence[int], lengths: Sequence[int]) -> None:
    """Read the same rows by name and position from open safetensors files, as they are stored."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*"))]
    tensors = [{name: file.get_tensor(name) for name in file.keys()} for file in files]  # noqa: SIM118
    bounds, memory = list(pairwise([0, *accumulate(lengths)])), Memory()
    for index in order:
        shard, place = divmod(index, len(bounds))
        start, end = bounds[place]
        for name, tensor in tensors[shard].items():
            if name != "sequence_offsets":
                memory.like(tensor[start:end], tensor.dtype).copy_(tensor[start:end])


class Memory:
    """Memory that is used again: mapped bytes are read from the disk only when they are copied."""

    def __init__(self) -> None:
        self._bytes = torch.zeros(1 << 24, dtype=torch.uint8)

    def like(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return room for as many numbers of a type."""
        size = rows.numel() * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = torch.zeros(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(rows.shape)


def drop_from_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next reading comes from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int | None:
    """Return the bytes that this process has read from disks so far; None where the system does not count them."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return None
    counts = dict(line.split(": ") for line in path.read_text(encoding="ascii").splitlines())
    return int(counts["read_bytes"])


def timed(work: Callable[[], None]) -> tuple[float, int | None]:
    """Return seconds, and bytes read from disk."""
    before, began = disk_bytes(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, disk_bytes()
    return seconds, None if before is None or after is None else after - before


def measure(dtype: str, tokens: int, shards: int, hidden_size: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Return median MB/s of both for one dtype, and medians of the ratios of neighbouring runs."""
    corpus = make_corpus(tokens, shards, hidden_size, FLOATS.get(dtype, torch.bfloat16))
    tensors = tensors_of(corpus, dtype)
    size = shards * sum(tensor.nbytes for tensor in tensors.values())
    count = shards * len(corpus.lengths)
    shuffled = random.Random(1).sample(range(count), count)
    folders = {"store": scratch / "store", "plain": scratch / "plain"}
    jobs: dict[str, dict[str, Callable[[], None]]] = {
        "write": {
            "store": lambda: write_store(corpus, dtype, folders["store"]),
            "plain": lambda: write_plain(tensors, shards, folders["plain"]),
        },
        "read in order": {
            "store": lambda: read_store(folders["store"], range(count)),
            "plain": lambda: read_plain(folders["plain"], range(count), corpus.lengths),
        },
        "read shuffled": {
            "store": lambda: read_store(folders["store"], shuffled),
            "plain": lambda: read_plain(folders["plain"], shuffled, corpus.lengths),
        },
    }
    found: dict[str, dict[str, list[float]]] = {job: {side: [] for side in folders} for job in jobs}
    from_disk: list[float] = []
    for repeat in range(repeats + 1):  # the first is a warm-up
        for job, sides in jobs.items():
            for side in sorted(sides, reverse=bool(repeat % 2)):
                if job == "write":
                    shutil.rmtree(folders[side], ignore_errors=True)
                else:
                    drop_from_cache(folders[side])
                seconds, read = timed(sides[side])
                if repeat:
                    found[job][side].append(size / seconds / 1e6)
                    if job != "write" and read is not None:
                        from_disk.append(read / size)
    row: dict[str, Any] = {
        "dtype": dtype,
        "bytes_per_token": size / shards / corpus.shard_tokens,
        "megabytes": size / 1e6,
        "from_disk": min(from_disk) if from_disk else None,
    }
    for job, speeds in found.items():
        ratios = [mine / theirs for mine, theirs in zip(speeds["store"], speeds["plain"], strict=True)]
        medians = {side: statistics.median(values) for side, values in speeds.items()}
        row[job] = medians | {"ratio": statistics.median(ratios), "ratios": ratios}
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table: MB/s of the store, of plain safetensors, and their ratio."""
    lines = ["| dtype | bytes per token | write | read in order | read shuffled | from disk |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            f"{row[job]['store']:,.0f} / {row[job]['plain']:,.0f} = {row[job]['ratio']:.2f}"
            for job in ("write", "read in order", "read shuffled")
        ]
        share = "unknown" if row["from_disk"] is None else f"{row['from_disk']:.0%}"
        lines.append(f"| {row['dtype']} | {row['bytes_per_token']:,.1f} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every dtype and print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the current one")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", *SCALED], choices=[*FLOATS, *SCALED])
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per shard")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the trainer's readers have one each")
    parser.add_argument("--json", action="store_true", help="print JSON with every repeat instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory(prefix=".store-speed-", dir=arguments.folder or Path.cwd()) as scratch:
            sizes = (arguments.tokens, arguments.shards, arguments.hidden_size, arguments.repeats)
            rows.append(measure(dtype, *sizes, Path(scratch)))
            print(f"{dtype} measured", file=sys.stderr)
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")}
        print(json.dumps({"environment": environment(), "settings": settings, "rows": rows}, indent=2))
    else:
        print(f"MB/s of the store / of plain safetensors = ratio; medians of {arguments.repeats}, target {TARGET}\n")
        print(markdown(rows))


if __name__ == "__main__":
    main()
