"""Whole decoding steps with torch's products and with the kernel of few rows: a basis for choosing between them."""

from __future__ import annotations

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher.lean_layers import LeanStack, runs_own_products
from suite.probes import time_plain, time_step
from suite.shapes import random_predictor, sections, shaped
from suite.work import Shared, Skipped, Table, Work

TREES = ("chain", "dynamic:8@3", "dynamic:16@4", "dynamic:24@10")  # 64 rows in the last
POINT_SECONDS = 3.0  # seconds of one tree on a GPU, compiling included


def kernels(shared: Shared, work: Work, name: str) -> None:
    """Measure milliseconds of `ar` steps and of FIRP's with several trees, batch 1, with either product."""
    teacher, sizes = shaped(shared, name), shared.sizes
    stack = teacher.stack
    if not isinstance(stack, LeanStack) or not runs_own_products(teacher.model.get_output_embeddings().weight):
        raise Skipped("the kernel of few rows does not run here")
    predictor = random_predictor(teacher, sections(teacher.num_layers)["firp"])
    table = Table(f"{name}: steps at {sizes.context} tokens of context, ms (over ar)", ["step", "torch", "kernel"])
    work.tables.append(table)
    chosen = stack.own_products
    columns: dict[str, dict[str, float]] = {"torch": {}, "kernel": {}}
    work.values |= columns
    try:
        for spec in ("plain", *TREES):
            if not work.clock.allows(POINT_SECONDS, spec):
                break
            for label, found in columns.items():
                stack.own_products = label == "kernel"
                tree = None if spec == "plain" else parse_tree(spec, predictor.steps)
                engine = Engine(teacher, predictor if tree else None, tree)
                step = time_plain if tree is None else time_step
                found[spec] = step(shared, engine, 1, sizes.context).milliseconds
                del engine
            cells = [f"{found[spec]:.3f} ({found[spec] / found['plain']:.2f})" for found in columns.values()]
            table.cells.append([spec, *cells])
            work.save()
            shared.free()
    finally:
        stack.own_products = chosen
    if columns["kernel"]:
        work.key = f"ar {columns['torch']['plain']:.3f} ms, with the kernel {columns['kernel']['plain']:.3f} ms"
