"""Cost of passes of many rows, and time of a decoding step by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher.attention import choose_backend
from firp_cli.tuning.cost import PARTS, CostProbe
from suite.probes import Timed, probe, time_plain, time_step
from suite.shapes import random_predictor, sections, shaped
from suite.sizes import Sizes
from suite.timing import Run, graphed, milliseconds, wait
from suite.work import Shared, Table, Work

POINT_SECONDS = 2.5  # seconds of one row count at one context on a GPU, compiling kernels included
TREE = "dynamic:16@4"
PROFILED = 5  # steps
OTHER = "norms, elementwise, masks, indices"
KERNELS = {  # parts of the names of kernels and operations
    "attention": ("_attend", "_combine", "attention", "flash", "fmha"),
    "matrix products": (
        "gemm",
        "gemv",
        "nvjet",
        "cutlass",
        "cublas",
        "splitk",
        "aten::mm",
        "aten::bmm",
        "linear",
        "addmm",
    ),
    "K/V, copies, gathers": ("copy", "index", "gather", "scatter", "cat", "memcpy", "memset"),
}


def passes(shared: Shared, work: Work, name: str) -> None:
    """Time CostProbe passes of M rows, by part, over M and the context, batch 1, as graphs."""
    teacher, sizes, device = shaped(shared, name), shared.sizes, shared.device
    kernel = choose_backend("auto", device) == "triton"
    split = max(1, teacher.num_layers // 3)
    work.values |= {"split": split, "layers": teacher.num_layers, "attention": "triton" if kernel else "sdpa"}
    points: list[dict[str, Any]] = []
    work.values["points"] = points
    for context in sizes.contexts:
        held = CostProbe(teacher, split, 1, context, max(sizes.rows), kernel)
        for rows in sizes.rows:
            if device.type == "cuda" and not work.clock.allows(POINT_SECONDS, f"{rows} rows after {context} tokens"):
                break
            points.append({"context": context, "rows": rows} | point(shared, held, rows))
            work.key, work.tables[:] = _ratios(points), [_passes_table(name, points, sizes)]
            work.save()
        del held
        shared.free()


def point(shared: Shared, held: CostProbe, rows: int) -> dict[str, Any]:
    """Time a pass of a number of rows, by part. Its graphs, which hold the cache, are freed on return."""
    runs = {part: graphed(run, shared.device) for part, run in held.parts(rows).items()}
    times = {part: milliseconds(run, shared.device, shared.sizes.repeats) for part, (run, _) in runs.items()}
    whole = {"milliseconds": sum(times.values()), "graphed": all(graph for _, graph in runs.values())}
    return whole | {f"{part}_milliseconds": times[part] for part in PARTS}


def _ratios(points: list[dict[str, Any]]) -> str:
    """Return the ratio of the largest pass of the first context to its smallest."""
    own = [point for point in points if point["context"] == points[0]["context"]] if points else []
    if len(own) < 2:
        return "nothing to compare"
    first, last = own[0], own[-1]
    ratio = last["milliseconds"] / first["milliseconds"]
    return (
        f"{first['milliseconds']:.3f} ms for 1 row, {last['rows']} rows {ratio:.2f} times that, at {own[0]['context']}"
    )


def _passes_table(name: str, points: list[dict[str, Any]], sizes: Sizes) -> Table:
    contexts, rows = sizes.contexts, sizes.rows
    found = {(point["context"], point["rows"]): point["milliseconds"] for point in points}

    def cell(context: int, count: int) -> str:
        if (context, count) not in found:
            return "cut"
        return f"{found[context, count]:.3f} ({found[context, count] / found[context, rows[0]]:.2f})"

    cells = [[str(count), *(cell(context, count) for context in contexts)] for count in rows]
    title = f"{name}: a pass of M rows, layers and head, in ms (over one row)"
    return Table(title, ["M", *(f"{context} tokens" for context in contexts)], cells)


def breakdown(shared: Shared, work: Work, name: str) -> None:
    """Time an `ar` step and a tree step: as a graph, without one, and their kernels by kind."""
    teacher, sizes = shaped(shared, name), shared.sizes
    predictor = random_predictor(teacher, sections(teacher.num_layers)["firp"])
    spec = parse_tree(TREE, predictor.steps)
    table = Table(f"{name}: a step, {sizes.context} tokens of context", ["step", "", "ms", "of kernels"])
    work.tables.append(table)
    steps: dict[str, Callable[..., Timed]] = {"plain": time_plain, f"firp {TREE}": time_step}
    for label, time in steps.items():
        engines = [
            Engine(teacher, predictor if label != "plain" else None, spec, options=EngineOptions(graphs=graphs))
            for graphs in (True, False)
        ]
        graph = time(shared, engines[0], 1, sizes.context)
        eager = time(shared, engines[1], 1, sizes.context)
        kinds, count = kernels(probe(engines[1], 1, sizes.context, plain=label == "plain"), shared.device)
        spent = max(sum(kinds.values()), 1e-9)
        work.values[label] = {
            "graph_milliseconds": graph.milliseconds,
            "eager_milliseconds": eager.milliseconds,
            "kernels": count,
            "kernel_milliseconds": spent,
            "by_kind": kinds,
        }
        table.cells += [
            [label, kind, f"{value:.3f}", f"{100 * value / spent:.1f}%"]
            for kind, value in sorted(kinds.items(), key=lambda item: -item[1])
        ]
        whole = {f"all {count} kernels": spent, "step": graph.milliseconds, "step without graphs": eager.milliseconds}
        table.cells += [[label, what, f"{value:.3f}", ""] for what, value in whole.items()]
        work.save()
    plain, tree = (work.values[label]["graph_milliseconds"] for label in work.values)
    work.key = f"ar {plain:.3f} ms, {TREE} {tree:.3f} ms ({tree / plain:.2f} times)"


def kernels(run: Run, device: torch.device) -> tuple[dict[str, float], int]:
    """Return milliseconds of a step's kernels (operations on a CPU) by kind, and their number, by torch's profiler."""
    run()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait(device)
    with profile(activities=activities, acc_events=True) as profiled:
        for _ in range(PROFILED):
            run()
        wait(device)
    found: dict[str, float] = defaultdict(float)
    count = 0
    for event in profiled.key_averages():
        on_device = event.device_type == DeviceType.CUDA
        if on_device != cuda or getattr(event, "is_user_annotation", False):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1e3 / PROFILED
        count += event.count
    return dict(found), round(count / PROFILED)


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), OTHER)
