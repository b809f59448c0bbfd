#!/usr/bin/env python3
"""Accepted length and throughput by the size of the tree and the number of its nodes that get pseudo rows.

Every tree decodes the same prompts in one interleaved run beside transformers' `generate` and autoregressive decoding.
With `--brute-force` these are thirty trees of all kinds and the one that `firp tune` chose for this machine, and the
last line compares that one with the best of all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from firp_cli.api.bench_run import load_bench_prompts
from firp_cli.api.loading import load_pair
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.tree_file import read_trees, spec_of
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.answer_runs import ALL
from firp_cli.evaluation.environment import machine_key
from firp_cli.evaluation.methods import BenchSettings, Method, make_methods
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.machine import set_threads
from firp_cli.reports.cells import markdown_table
from firp_cli.results import BenchRow

NODES, BUDGETS = (4, 6, 8, 12), (1, 2, 3, 4)
TUNED = "tuned"
BRUTE_FORCE = [
    "chain/1",
    "chain/2",
    "chain/3",
    "chain",
    "chain@1",
    "chain@2",
    "chain@3",
    "static:2",
    "static:3",
    "static:2x1",
    "static:2x2",
    "static:3x1",
    "static:3x2",
    "static:2x1x1",
    "static:2x1x1x1",
    "static:3x1x1x1",
    "static:3x2x1x1",
    "static:2x2x1@2",
    "static:4x2x1x1@2",
    "dynamic:3",
    "dynamic:4",
    "dynamic:5",
    "dynamic:6",
    "dynamic:8",
    "dynamic:10",
    "dynamic:12",
    "dynamic:16",
    "dynamic:8@2",
    "dynamic:8@3",
    "dynamic:12@3",
]


def specs(nodes: list[int], budgets: list[int]) -> list[str]:
    """Return dynamic trees of each size, with each budget below it and without a budget."""
    return [
        f"dynamic:{size}{suffix}"
        for size in nodes
        for suffix in (*(f"@{budget}" for budget in budgets if budget < size), "")
    ]


def measure(arguments: argparse.Namespace) -> dict[str, BenchRow]:
    """Return a row for each tree, and those of the baselines."""
    teacher, predictor, folder = load_pair(arguments.predictor, None, force=False)
    settings = BenchSettings(arguments.max_new_tokens, repeats=arguments.repeats)
    methods = make_methods(teacher, {}, ["hf", "ar"], settings)
    names = arguments.trees or (BRUTE_FORCE if arguments.brute_force else specs(arguments.nodes, arguments.budgets))
    trees = {name: parse_tree(name, predictor.steps) for name in names}
    if arguments.brute_force:
        known = read_trees(arguments.tuned or folder / "tree.json", predictor.steps)
        entry = known.fitting(machine_key(teacher), teacher.fingerprint, 0.0).entry(1, 1)
        if entry is None:
            raise SystemExit(f"{folder} has no tree for this machine: run `firp tune {arguments.predictor}` first")
        trees[TUNED] = spec_of(entry, predictor.steps)
    for name, tree in trees.items():
        engine = make_engine(teacher, predictor, tree)
        methods.append(Method(name, engine.generate, str(folder), str(tree), engine=engine))
    prompts = load_bench_prompts(arguments.dataset, arguments.data_dir, arguments.prompts, teacher)
    report = run_bench(teacher, prompts, methods, settings)
    return {row.method: row for row in report.rows if row.category == ALL}


def verdict(rows: dict[str, BenchRow]) -> str:
    """Compare the tuned tree with the best measured one."""
    others = {name: row.tokens_per_second for name, row in rows.items() if row.tree is not None and name != TUNED}
    best = max(others, key=lambda name: others[name])
    share = rows[TUNED].tokens_per_second / others[best]
    return f"tuned: {rows[TUNED].tree}, {100 * share:.1f}% of the best of {len(others)} others, {best}"


def table(rows: dict[str, BenchRow]) -> str:
    """Return Markdown: accepted length, time of a step, speedup over both baselines, equality of the output."""
    lines = [
        [
            name,
            f"{row.accepted_length:.2f}",
            f"{row.step_milliseconds:.2f}",
            f"{row.speedup:.2f}" if row.speedup else "-",
            f"{row.speedup_hf:.2f}" if row.speedup_hf else "-",
            f"{row.lossless.identical}/{row.lossless.compared}" if row.lossless else "reference",
        ]
        for name, row in rows.items()
    ]
    return markdown_table(["tree", "accepted length", "ms a step", "over ar", "over hf", "identical"], lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write it if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--predictor", default="firp", help="folder or embedded name")
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--trees", nargs="+", default=None, help="these trees in place of nodes x budgets")
    parser.add_argument("--brute-force", action="store_true", help="thirty trees and the tuned one")
    parser.add_argument("--tuned", type=Path, default=None, help="tree.json of the tuned one; default: the predictor's")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the rows")
    arguments = parser.parse_args(argv)
    set_threads(arguments.threads)
    rows = measure(arguments)
    sys.stdout.write(table(rows) + "\n")
    if arguments.brute_force:
        sys.stdout.write(verdict(rows) + "\n")
    if arguments.output:
        from firp_cli.results import as_json

        arguments.output.write_text(json.dumps({name: as_json(row) for name, row in rows.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
