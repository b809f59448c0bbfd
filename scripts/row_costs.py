#!/usr/bin/env python3
"""Cost of a forward pass of M rows relative to one row.

A step that verifies a draft runs M rows where autoregressive decoding runs one. It pays where rows share the cost of
one row, above all the reading of the weights. Two teachers in float32, the embedded one and a random Llama whose
weights exceed a CPU's caches, run the rows of a tree over a committed context: layers, final norm, and head of all
rows, with masks and position embeddings made in advance. Row counts take turns within every round, so that a slow phase
of the machine affects all of them; ratios are taken within a round.

Where other processes use the cores, a forward is interrupted for milliseconds independent of its rows, which moves
ratios towards 1; the last column counts these interruptions.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.config import TeacherConfig
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.files import write_json
from firp_cli.machine import set_threads
from firp_cli.reports.cells import markdown_table
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.teacher import Teacher
from firp_cli.tuning.cost import CostProbe

RANDOM = "random"
RANDOM_LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
QUICK = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2}
BLOCK_SECONDS = 0.1  # duration of the iterations of one row in a round, if their number is not given
LEAST_ITERATIONS = 3
Forward = Callable[[], tuple[float, float]]  # seconds in the layers, and in norm and head
Times = list[tuple[float, float, float]]  # by round: seconds of the two parts, interruptions of a forward


@dataclass
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one value per round."""
        low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
        return cls(float(middle), float(low), float(high))

    def cell(self, digits: int = 2) -> str:
        """Return `median [low, high]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass
class RowCost:
    """Cost of a forward of `rows` rows: milliseconds in all and by part, and the ratio to the smallest row count of the
    same round. `interruptions`: involuntary context switches in a forward, mean.
    """

    stack: str
    rows: int
    milliseconds: Spread
    layers: Spread
    head: Spread
    ratio: Spread
    interruptions: float


def random_teacher(shape: dict[str, Any]) -> Teacher:
    """Return a Llama of that shape with random float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return wrap_model(LlamaForCausalLM(LlamaConfig(**shape)), name=RANDOM)


def load(name: str, quick: bool) -> Teacher:
    """Return the random teacher, or one by folder or embedded name, in float32 on the CPU."""
    if name == RANDOM:
        return random_teacher(RANDOM_LLAMA | (QUICK if quick else {}))
    return load_teacher(TeacherConfig(model=name, dtype="float32"), "cpu")


def stacks(teacher: Teacher, library: bool) -> list[Teacher]:
    """Return the teacher on the lean layers and, if asked, once more on the library's; both share the weights."""
    reason = use_lean_layers(teacher)
    if reason is not None:
        raise SystemExit(reason)
    return [teacher, wrap_model(teacher.model, name=teacher.name, check=False)] if library else [teacher]


def make_forward(passes: CostProbe, rows: int) -> Forward:
    """Return a step's forward of `rows` rows after the cache's prefix, which it does not change."""
    parts = passes.parts(rows)

    def forward() -> tuple[float, float]:
        began = time.perf_counter()
        parts["lower"]()
        between = time.perf_counter()
        parts["head"]()
        return between - began, time.perf_counter() - between

    return forward


def block(forward: Forward, iterations: int) -> tuple[float, float, float]:
    """Return the median seconds of `iterations` forwards by part, after an uncounted one, and the number of
    interruptions.
    """
    forward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    layers, head = zip(*(forward() for _ in range(iterations)), strict=True)
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    return float(np.median(layers)), float(np.median(head)), switches / iterations


def enough_iterations(forward: Forward) -> int:
    """Return the number of iterations that fill BLOCK_SECONDS."""
    return max(LEAST_ITERATIONS, round(BLOCK_SECONDS / sum(block(forward, LEAST_ITERATIONS)[:2])))


def measure(
    teachers: Sequence[Teacher], rows: Sequence[int], context: int, repeats: int, iterations: int | None
) -> list[RowCost]:
    """Time every row count on every stack, in turns, `repeats` rounds."""
    forwards = {}
    for teacher in teachers:
        passes = CostProbe(teacher, teacher.num_layers, 1, context, max(rows))
        forwards |= {(teacher.stack.name, count): make_forward(passes, count) for count in rows}
    iterations = iterations or enough_iterations(next(iter(forwards.values())))
    times: dict[tuple[str, int], Times] = {key: [] for key in forwards}
    keys = list(forwards)
    for repeat in range(repeats):
        turn = repeat % len(keys)
        for key in [*keys[turn:], *keys[:turn]]:
            times[key].append(block(forwards[key], iterations))
    return summarise(times)


def summarise(times: dict[tuple[str, int], Times]) -> list[RowCost]:
    """Return medians over rounds; ratios are to the same layers' smallest row count in the same round."""
    costs = []
    for (stack, rows), rounds in times.items():
        base = times[stack, min(count for name, count in times if name == stack)]
        whole = [layers + head for layers, head, _ in rounds]
        ones = [layers + head for layers, head, _ in base]
        costs.append(
            RowCost(
                stack=stack,
                rows=rows,
                milliseconds=Spread.of([1e3 * value for value in whole]),
                layers=Spread.of([1e3 * layers for layers, _, _ in rounds]),
                head=Spread.of([1e3 * head for _, head, _ in rounds]),
                ratio=Spread.of([value / one for value, one in zip(whole, ones, strict=True)]),
                interruptions=float(np.mean([switches for _, _, switches in rounds])),
            )
        )
    return costs


def table(costs: Sequence[RowCost]) -> str:
    """Return a Markdown table with a line per kind of layers and row count. The final norm counts to the head."""
    least = min(cost.rows for cost in costs)
    compared = f"over {least} row" if least == 1 else f"over {least} rows"
    headers = [
        "stack",
        "rows",
        "ms [quartiles]",
        f"{compared} [quartiles]",
        "ms a row",
        "layers",
        "head",
        "interrupted",
    ]
    cells = [
        [
            cost.stack,
            str(cost.rows),
            cost.milliseconds.cell(),
            cost.ratio.cell(),
            f"{cost.milliseconds.median / cost.rows:.2f}",
            f"{cost.layers.median:.2f}",
            f"{cost.head.median:.2f}",
            f"{cost.interruptions:.2f}",
        ]
        for cost in costs
    ]
    return markdown_table(headers, cells)


def size(teacher: Teacher) -> dict[str, Any]:
    """Return the number of parameters and the bytes that one forward reads: an embedding that is no head is only looked
    up.
    """
    parameters = {id(value): value for value in teacher.model.parameters()}
    looked_up = teacher.model.get_input_embeddings().weight
    tied = looked_up is teacher.model.get_output_embeddings().weight
    read = sum(value.nbytes for value in parameters.values()) - (0 if tied else looked_up.nbytes)
    return {
        "parameters": sum(value.numel() for value in parameters.values()),
        "mebibytes": sum(value.nbytes for value in parameters.values()) / 2**20,
        "mebibytes_read": read / 2**20,
    }


def cache_sizes() -> dict[str, str]:
    """Return the first processor's data caches where the system lists them, e.g. {"L3": "32768K"}."""
    found = {}
    for file in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        kind, level, amount = (file.with_name(name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = amount
    return found


def row_counts(text: str) -> list[int]:
    """Parse `1,4,8` into ascending numbers."""
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError("row counts are at least 1")
    return counts


def names(text: str) -> list[str]:
    """Parse `a,b` into a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `--quick` reduces every size that was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=names, default=[DEFAULT_TEACHER, RANDOM], help=f"names, or {RANDOM}")
    parser.add_argument("--rows", type=row_counts, help="row counts, with commas (1,4,8,16,32)")
    parser.add_argument("--context", type=int, help="committed positions (160)")
    parser.add_argument("--repeats", type=int, help="rounds (9)")
    parser.add_argument("--iterations", type=int, help=f"forwards of a round (those of one row in {BLOCK_SECONDS} s)")
    parser.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, else the usable cores")
    parser.add_argument("--library", action="store_true", help="measure the library's layers too")
    parser.add_argument("--quick", action="store_true", help="a random teacher of two layers, few rows and rounds")
    parser.add_argument("--output", type=Path, help="JSON file")
    known = parser.parse_args(arguments)
    defaults = {"rows": [1, 4, 8, 16, 32], "context": 160, "repeats": 9}
    if known.quick:
        defaults = {"rows": [1, 4], "context": 16, "repeats": 2, "iterations": LEAST_ITERATIONS}
    for name, value in defaults.items():
        if getattr(known, name) is None:
            setattr(known, name, value)
    if min(known.context, known.repeats, known.iterations or 1, known.threads or 1) < 1:
        parser.error("--context, --repeats, --iterations and --threads are at least 1")
    return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, write JSON."""
    known = parse(arguments)
    set_threads(known.threads)
    results = []
    for name in known.teachers:
        teachers = stacks(load(name, known.quick), known.library)
        costs = measure(teachers, known.rows, known.context, known.repeats, known.iterations)
        weights = size(teachers[0])
        results.append({"teacher": teachers[0].describe(), **weights, "rows": [asdict(cost) for cost in costs]})
        print(
            f"{name}: {weights['parameters']:,} parameters, {weights['mebibytes']:.1f} MiB, of which a forward reads "
            f"{weights['mebibytes_read']:.1f}; {known.context} positions committed, "
            f"threads: {torch.get_num_threads()}, caches: {json.dumps(cache_sizes())}\n\n{table(costs)}",
            flush=True,
        )
    if known.output:
        settings = {name: value for name, value in vars(known).items() if name != "output"}
        write_json(
            known.output,
            {
                "environment": measurement_environment(teachers[0]),
                "caches": cache_sizes(),
                "settings": settings,
                "teachers": results,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
