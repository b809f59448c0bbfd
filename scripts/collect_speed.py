#!/usr/bin/env python3
"""Throughput of collecting against the bare teacher forward, or of N ranks against one: interleaved, medians.

Against the forward: collecting is all of `collect_store`: template, tokenizing, forward, copying the states to the
host, checksums, synced files. The bare forward is the decoder's own over the same conversations in the same batches: no
head, no cache.

With --ranks N: `firp collect --gpus N`, a core and a thread for each rank, against one rank of one thread on one core
and against one rank of N threads on N cores. "Collecting" is forwards and writing; "whole" includes tokenizing.
Start-up (imports, launcher, loading the teacher) is listed separately: it does not grow with the data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.teacher_states import plan_batches
from firp_cli.config import DataConfig, TeacherConfig
from firp_cli.store.reader import Store
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher


@torch.inference_mode()
def bare_seconds(teacher: Teacher, sequences: list[torch.Tensor], pack_tokens: int) -> float:
    """Return the seconds of the decoder's forward over the batches that collecting makes."""
    lengths = [len(ids) for ids in sequences]
    decoder = teacher.model.get_decoder()
    began = time.perf_counter()
    for batch in plan_batches(lengths, pack_tokens):
        ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : lengths[index]] = sequences[index]
        decoder(ids.to(teacher.device), use_cache=False)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def collect_seconds(teacher: Teacher, data: DataConfig, layers: list[int], folder: Path) -> float:
    """Return the seconds of a whole collect into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    collect_store(teacher, data, layers, folder)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Arrangement:
    """A number of ranks with a number of threads each, on as many cores as there are threads."""

    ranks: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} x {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Run:
    """Times of one `firp collect`: seconds and tokens per second."""

    collecting: float
    whole: float
    start: float
    tokens: int
    busiest: int  # tokens of the rank that had the most


def run_command(arrangement: Arrangement, command: list[str], folder: Path) -> Run:
    """Run `firp collect` with an arrangement, into an empty folder. Raises CalledProcessError when it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    cores = sorted(os.sched_getaffinity(0))[: arrangement.ranks * arrangement.threads]
    ranks = ["--gpus", str(arrangement.ranks)] if arrangement.ranks > 1 else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "firp_cli", "collect", *command, *ranks, "--output", str(folder), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": str(arrangement.threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        check=True,
    )
    wall = time.perf_counter() - began
    summary = json.loads(done.stdout)
    return Run(
        collecting=summary["tokens_per_second"],
        whole=summary["tokens"] / summary["seconds"],
        start=wall - summary["seconds"],
        tokens=summary["tokens"],
        busiest=max(summary["rank_tokens"]),
    )


def compare_ranks(ranks: int, command: list[str], repeats: int) -> None:
    """Print a table of the arrangements and the ratios of N ranks to the other two."""
    cores = len(os.sched_getaffinity(0))
    if cores < ranks:
        sys.exit(f"--ranks {ranks} needs as many cores; this process may use {cores}")
    arrangements = [Arrangement(1, 1), Arrangement(1, ranks), Arrangement(ranks, 1)]
    found: dict[Arrangement, list[Run]] = {arrangement: [] for arrangement in arrangements}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            for arrangement in arrangements:
                found[arrangement].append(run_command(arrangement, command, Path(scratch) / "store"))
    columns = "{:<22}{:>22}{:>16}{:>14}{:>30}"
    print(columns.format("", "collecting, tokens/s", "whole, tokens/s", "start-up, s", "each run, collecting tokens/s"))
    for arrangement, runs in found.items():
        speed = statistics.median(run.collecting for run in runs)
        whole = statistics.median(run.whole for run in runs)
        start = statistics.median(run.start for run in runs)
        each = ", ".join(f"{run.collecting:,.0f}" for run in runs)
        print(columns.format(arrangement.name, f"{speed:,.0f}", f"{whole:,.0f}", f"{start:.1f}", each))
    shared = found[arrangements[2]]
    for other, what in ((arrangements[0], "one core each"), (arrangements[1], "same total threads")):
        pairs = list(zip(shared, found[other], strict=True))
        ratio = statistics.median(mine.collecting / theirs.collecting for mine, theirs in pairs)
        whole = statistics.median(mine.whole / theirs.whole for mine, theirs in pairs)
        print(f"{ranks} ranks / {other.name} ({what}): {ratio:.2f} collecting, {whole:.2f} whole")
    print(
        f"{shared[0].tokens:,} tokens; {shared[0].tokens / shared[0].busiest:.2f} is the limit by the split into shards"
    )


def main() -> None:
    """Print the two rates and their ratio as JSON, or the table of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEFAULT_TEACHER)
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--limit", type=int, default=1100, help="conversations")
    parser.add_argument("--layer", type=int, default=4, help="layer to keep beside the final state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="compare this many ranks with one")
    arguments = parser.parse_args()
    if arguments.ranks > 1:
        command = ["--teacher", arguments.teacher, "--dataset", arguments.dataset, "--limit", str(arguments.limit)]
        compare_ranks(arguments.ranks, [*command, "--layers", str(arguments.layer)], arguments.repeats)
        return
    teacher = load_teacher(TeacherConfig(model=arguments.teacher))
    data = DataConfig(dataset=arguments.dataset, limit=arguments.limit)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        collect_seconds(teacher, data, [arguments.layer], folder)
        store = Store.open(folder, layers=())
        sequences = [store[index].input_ids for index in range(len(store))]
        bare_seconds(teacher, sequences, data.pack_tokens)
        pairs = []
        for _ in range(arguments.repeats):
            bare = bare_seconds(teacher, sequences, data.pack_tokens)
            pairs.append((bare, collect_seconds(teacher, data, [arguments.layer], folder)))
    tokens = sum(map(len, sequences))
    result = {
        "tokens": tokens,
        "bare_tokens_per_second": round(tokens / statistics.median(bare for bare, _ in pairs)),
        "collect_tokens_per_second": round(tokens / statistics.median(collect for _, collect in pairs)),
        "ratio_median": round(statistics.median(bare / collect for bare, collect in pairs), 3),
        "ratios": [round(bare / collect, 3) for bare, collect in pairs],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
