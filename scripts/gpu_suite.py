#!/usr/bin/env python3
"""Everything that only a GPU can tell, in one command under nine minutes (`--quick`: three).

It runs the tests marked `gpu`, measures the machine's ceilings and, on random teachers of 7 and 1 billion parameters,
plain decoding, transformers' `generate`, passes of many rows, steps, prompts and batches. It trains a teacher of about
100 million parameters and predictors of every kind for it, tunes the trees of those that have one, benches all and
compares them in fp32, and projects the trees' accepted lengths onto the large shape.

Every part has a share of the time; what does not fit is cut, what fails is noted, and the others go on. The output
folder holds gpu_suite.json and gpu_suite.md, written anew after every part.

It runs from a checkout, installed or not, and needs neither deepspeed nor datasets. `--device cpu` runs all parts at
toy size.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from suite import benches, gpu_tests, machine, predictors, replay, report, speed, steps, teacher  # noqa: E402
from suite.shapes import RANDOM  # noqa: E402
from suite.sizes import FULL, QUICK, TOY  # noqa: E402
from suite.work import Part, Shared, Table, allowed, run_part, select  # noqa: E402
from transformers.utils import logging  # noqa: E402

from firp_cli.provenance import environment  # noqa: E402

MINUTES, QUICK_MINUTES = 9.0, 3.0
SPARE = 8.0  # seconds at the end that no part gets
TRAINED = ("trained.teacher", "trained.predictors")


def of_shape(name: str, ar: int, passes: int, breakdown: int, prefill: int, batches: int, hf: int) -> list[Part]:
    """The parts that measure a random teacher, with their shares."""
    return [
        Part(f"{name}.ar", partial(speed.ar, name=name), ar),
        Part(f"{name}.passes", partial(steps.passes, name=name), passes),
        Part(f"{name}.breakdown", partial(steps.breakdown, name=name), breakdown),
        Part(f"{name}.prefill", partial(speed.prefill, name=name), prefill, least=2),
        Part(f"{name}.batches", partial(speed.batches, name=name), batches),
        Part(f"{name}.hf", partial(speed.hf, name=name), hf),
    ]


PARTS = [  # shares of the time: estimates, until a GPU has run them
    Part("bandwidth", machine.bandwidth, 4, least=2),
    Part("tests", gpu_tests.tests, 60, least=15),
    *of_shape("7b", ar=8, passes=28, breakdown=10, prefill=7, batches=18, hf=66),
    *of_shape("1b", ar=5, passes=14, breakdown=6, prefill=4, batches=12, hf=38),
    Part("trained.teacher", teacher.train_teacher, 75, least=15, gives="state"),
    Part("trained.predictors", predictors.train_predictors, 64, least=15, needs=TRAINED[:1], gives="predictors"),
    Part("trained.tune", benches.tune_trees, 80, least=10, needs=TRAINED),
    Part("trained.bench", benches.bench, 60, least=10, needs=TRAINED, gives="traces"),
    Part("trained.exact", benches.exact, 26, needs=TRAINED),
    Part("replay", replay.replay, 16, needs=("trained.bench",)),
    Part("speed", benches.looped, 16),
]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_suite"), help="folder of the report")
    parser.add_argument("--minutes", type=float, help=f"of the whole run ({MINUTES:g}, quick: {QUICK_MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help="fewer points, less text, fewer prompts")
    parser.add_argument("--parts", help=f"some of {', '.join(part.name for part in PARTS)}; `7b` is all of its parts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--data-dir", help="folder with gsm8k/train.jsonl, for more text")
    known = parser.parse_args(arguments)
    known.minutes = known.minutes or (QUICK_MINUTES if known.quick else MINUTES)
    if known.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu runs all parts at toy size")
    try:
        known.chosen = select(PARTS, [name.strip() for name in known.parts.split(",")] if known.parts else None)
    except ValueError as error:
        parser.error(str(error))
    return known


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The device as it tells of itself."""
    found: dict[str, Any] = {"type": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if device.type != "cuda":
        return found | {"name": environment()["processor"], "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
    }


def run(known: argparse.Namespace, parts: Sequence[Part], began: float) -> bool:
    """Run the parts and write what they find; returns whether none failed."""
    device = torch.device(known.device, 0) if known.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = TOY if device.type == "cpu" else QUICK if known.quick else FULL
    shared = Shared(device, dtype, sizes, ROOT, known.data_dir)
    settings = {"sizes": sizes.name, "minutes": known.minutes, "parts": [part.name for part in parts]}
    head = {"environment": environment(), "device": describe(device, dtype), "settings": settings}
    records: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[Table]] = {}
    until = began + 60 * known.minutes - SPARE
    for number, part in enumerate(parts):
        missing = [other.name for other in parts if other.name in part.needs and not shared.found.get(other.gives)]
        seconds = allowed(part, parts[number + 1 :], until - time.perf_counter())
        if not (part.name.split(".")[0] in sizes.shapes or part.name == "replay"):
            shared.free(RANDOM)
        work, record = run_part(part, shared, seconds, 0.0 if sizes is TOY else part.least, missing)
        shared.free()
        record["held_bytes"] = shared.held_bytes()
        records[part.name], tables[part.name] = record, work.tables
        report.write(known.output, head, time.perf_counter() - began, records, tables)
        print(report.line(part, record), flush=True)
    return all(record["status"] != "failed" for record in records.values())


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Run the suite; returns 1 if a part failed."""
    known = parse(arguments)
    logging.set_verbosity_error()
    began = time.perf_counter() if began is None else began
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, {"FIRP_CACHE_DIR": cache}):  # of this run alone
        whole = run(known, known.chosen, began)
    print(f"report: {known.output / report.NAME}.md", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
