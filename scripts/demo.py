#!/usr/bin/env python3
"""Demo: the commands that a user types, and one table of the results.

1. collect, train, eval and bench FIRP on the embedded teacher, from nothing;
2. bench the shipped predictors on a real model, SmolLM2-135M-Instruct, where it is installed (`make smollm2`);
3. bench SPEED on the embedded looped teacher;
4. answer a prompt, drafted tokens coloured.

All files go to stores/demo and the output folder; a second run removes them first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from firp_cli.reports.cells import rich_table
from firp_cli.teacher.source import known_teachers

STORE = Path("stores/demo")
REAL = "smollm2-135m"
REAL_PREDICTORS = ["smollm2-firp-plus", "smollm2-firp", "smollm2-hidden-transfer", "smollm2-medusa"]
REAL_METHODS = "ar,hf,firp_plus,firp,hidden_transfer,medusa"  # without the n-gram drafts, to keep the demo short
QUESTION = "Mia has 12 shells. She finds 7 more. How many shells does she have?"
REAL_QUESTION = "Write a Python function that returns the largest of three numbers, and explain it in two sentences."
HEADERS = ["teacher", "method", "accepted", "tok/s", "x ar", "x hf", "same"]


@dataclass(frozen=True)
class Step:
    """A command, and the `bench.json` that it writes for the table."""

    command: list[str]
    report: Path | None = None


def steps(output: Path, real: bool, data: str | None, prompts: int) -> list[Step]:
    """Return the demo's commands in order. `real`: SmolLM2 is installed; `data`: folder of real data sets."""
    own = str(output / "firp")
    dataset = ["gsm8k", "--data-dir", data] if data else ["chat"]
    made = [
        Step(["collect", "demo", f"store={STORE}"]),
        Step(["train", "demo", f"store={STORE}", f"output={own}"]),
        Step(["eval", own, "--store", str(STORE), "--limit", "100", "--output", str(output / "eval")]),
        # rows are expensive on so small a teacher: a chain pays where a tree does not
        _bench([own], ["arithmetic"], 2 * prompts, 2, output / "bench", "--tree", "chain/3"),
    ]
    if real:
        options = ["--max-new-tokens", "96", "--methods", REAL_METHODS]
        made.append(_bench(REAL_PREDICTORS, dataset, prompts, 1, output / "bench-smollm2", *options))
    made.append(_bench(["speed"], ["arithmetic"], prompts, 2, output / "bench-speed"))
    predictor, question = ("smollm2-firp-plus", REAL_QUESTION) if real else (own, QUESTION)
    return [*made, Step(["generate", predictor, "--prompt", question, "--max-new-tokens", "160"])]


def _bench(predictors: list[str], dataset: list[str], limit: int, repeats: int, folder: Path, *more: str) -> Step:
    counts = ["--limit", str(limit), "--repeats", str(repeats), "--output", str(folder)]
    return Step(["bench", *predictors, "--dataset", *dataset, *counts, *more], folder / "bench.json")


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table lines of a bench: one for each method, all prompts together."""
    rows = []
    for row in report["rows"]:
        if row["category"] != "all":
            continue
        checked = row["lossless"]
        same = f"{checked['identical']}/{checked['compared']}" if checked["compared"] else "-"
        over, over_hf = (f"{row[key]:.2f}" if row[key] else "" for key in ("speedup", "speedup_hf"))
        length, rate = f"{row['accepted_length']:.2f}", f"{row['tokens_per_second']:.0f}"
        rows.append([Path(report["teacher"]["name"]).name, row["method"], length, rate, over, over_hf, same])
    return rows


def main() -> int:
    """Run the demo; return the exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--prompts", type=int, default=5, help="prompts of each bench (default 5)")
    arguments = parser.parse_args()
    for folder in (STORE, arguments.output):
        if folder.exists():
            print(f"removing {folder} of an earlier demo", flush=True)
            shutil.rmtree(folder)
    known = known_teachers()[REAL]
    real = known.installed() is not None
    if not real:
        print(f"{REAL} is not installed (no network?): its part is skipped; `make smollm2` installs it", flush=True)
    began = time.monotonic()
    reports = []
    for step in steps(arguments.output, real, os.environ.get("FIRP_DATA_DIR"), arguments.prompts):
        print(f"\n[{time.monotonic() - began:.0f} s] $ firp {shlex.join(step.command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "firp_cli", *step.command], check=False).returncode
        if status:
            return status
        if step.report:
            reports.append(json.loads(step.report.read_text(encoding="utf-8")))
    print()
    cells = [line for report in reports for line in table_rows(report)]
    console = Console(highlight=False)
    console.print(rich_table(HEADERS, cells, left=2))
    console.print(
        "accepted: tokens per decoding step; same: outputs equal to generate's. Do not compare different teachers.",
        markup=False,
    )
    page = (arguments.output / "bench" / "bench.html").resolve()
    print(f"done in {time.monotonic() - began:.0f} s; reports: {page} and its folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
