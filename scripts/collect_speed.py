#!/usr/bin/env python3
"""Collecting against the bare teacher forward: tokens per second, interleaved, medians.

Collecting is all of `collect_store`: template, tokenizing, forward, copying the states out, checksums, synced files.
Bare is the decoder's own forward over the same conversations in the same batches: no head, no cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from firp_cli.collecting.capture import collect_store
from firp_cli.collecting.forward import plan_batches
from firp_cli.data.store import Store
from firp_cli.recipe import DEFAULT_TEACHER, DataConfig, TeacherConfig
from firp_cli.teacher.stack import Teacher


@torch.inference_mode()
def bare_seconds(teacher: Teacher, sequences: list[torch.Tensor], pack_tokens: int) -> float:
    """Seconds of the decoder's forward over the batches that collecting makes."""
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
    """Seconds of a whole collect into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    collect_store(teacher, data, layers, folder)
    return time.perf_counter() - began


def main() -> None:
    """Print the two speeds and their ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEFAULT_TEACHER)
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--limit", type=int, default=600, help="conversations")
    parser.add_argument("--layer", type=int, default=4, help="layer that is kept beside the final state")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    teacher = Teacher.load(TeacherConfig(model=arguments.teacher))
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
