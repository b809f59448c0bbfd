"""`firp train --plan`: print what a run will need; nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from firp_cli.cli.terminal import print_json, say
from firp_cli.errors import StoreError
from firp_cli.machine import readable_bytes
from firp_cli.recipe import dump_recipe

if TYPE_CHECKING:
    from firp_cli.api.train_run import TrainRun
    from firp_cli.training.plan import Plan
    from firp_cli.training.time_model import RunTimes, Throughput


def print_plan(
    run: TrainRun,
    ranks: int,
    as_json: bool,
    device_memory: str | None = None,
    mean_tokens: int | None = None,
    device_tflops: float | None = None,
    utilisation: float | None = None,
) -> None:
    """Print recipe, sizes, memory per rank, disk and hours.

    Args:
        device_memory: memory of one device, as `80GB`; the plan then says if a rank fits, and which settings make it
            fit.
        mean_tokens: tokens per conversation, when there is no store yet.
        device_tflops, utilisation: a device's peak in 1e12 operations per second, and the share of it that is reached.
    """
    from firp_cli import results
    from firp_cli.machine import parse_bytes
    from firp_cli.training.plan import make_plan
    from firp_cli.training.preflight import preflight
    from firp_cli.training.time_model import PEAK_FLOPS, UTILISATION, Throughput

    recipe = run.recipe
    conversations, tokens = _count_stored(run.store)
    throughput = Throughput(device_tflops * 1e12 if device_tflops else PEAK_FLOPS, utilisation or UTILISATION)
    plan = make_plan(recipe, ranks, conversations, tokens, mean_tokens, throughput)
    room = None if device_memory is None else parse_bytes(device_memory)
    checked = None if room is None else preflight(recipe, ranks, room, "as --device-memory says")
    verdict = None
    if room is not None and checked is not None and plan.memory is not None:
        verdict = checked[1] or f"fits: a rank needs {readable_bytes(plan.memory['total'])} of {readable_bytes(room)}"
    if as_json:
        print_json(
            {"recipe": recipe.model_dump(), "plan": results.as_json(plan), "device_memory": room, "verdict": verdict}
        )
        return
    typer.echo(dump_recipe(recipe))
    _print_tables(run, plan, throughput, conversations is not None)
    if plan.missing:
        typer.echo(f"{plan.missing}; parameter and memory figures need it")
    if verdict:
        typer.echo(verdict)


def _print_tables(run: TrainRun, plan: Plan, throughput: Throughput, stored: bool) -> None:
    from rich.console import Console

    from firp_cli.reports.cells import rich_table
    from firp_cli.training.memory_model import RIDGE

    console = Console(highlight=False, emoji=False)
    console.print(rich_table(["plan", ""], _plan_cells(plan, run, stored), left=2))
    if plan.lines and plan.memory:
        remark = "the ridge start ends before training begins" if RIDGE in plan.memory else ""
        if len(plan.stages) > 1:
            remark = f"{max(plan.stages, key=lambda name: plan.stages[name])}, which needs most; {remark}".rstrip("; ")
        total = ["total", readable_bytes(plan.memory["total"]), remark]
        rows = [[line.name, readable_bytes(line.bytes), line.rule] for line in plan.lines]
        console.print(rich_table(["memory per rank", "", "arithmetic"], [*rows, total], left=1, remark=True))
        total = ["total", readable_bytes(sum(line.bytes for line in plan.collecting)), ""]
        rows = [[line.name, readable_bytes(line.bytes), line.rule] for line in plan.collecting]
        console.print(rich_table(["while collecting", "", "arithmetic"], [*rows, total], left=1, remark=True))
    if plan.chain:
        cells = _chain_cells(plan.chain, throughput, stored)
        console.print(rich_table(["all stages", "", ""], cells, left=1, remark=True))


def _chain_cells(chain: RunTimes, throughput: Throughput, stored: bool) -> list[list[str]]:
    reach = f"{throughput.peak_flops / 1e12:,.0f} TFLOP/s a rank"
    shares = {"answers": throughput.answer_utilisation}
    counted = "in the store" if stored else "conversations * tokens of each (--tokens, else data.max_length: at most)"
    rows = [["tokens", f"{chain.tokens:,}", counted]]
    rows += [[f"disk, {name}", readable_bytes(size), "tokens * bytes per token"] for name, size in chain.disk.items()]
    if chain.draft_states:
        rule = "conversations * anchors * k * d * 2 bytes, until the first stage ends"
        rows.append(["disk, draft states", readable_bytes(chain.draft_states), rule])
    for name, hours in chain.hours.items():
        if chain.flops[name]:
            share = shares.get(name, throughput.utilisation)
            rows.append([f"hours, {name}", f"{hours:,.2f}", f"{chain.flops[name]:.3g} FLOP at {share:.0%} of {reach}"])
    return rows


def _count_stored(folder: Path) -> tuple[int | None, int | None]:
    """Return the conversations and tokens of a complete store; None each when there is none."""
    from firp_cli.store.reader import MANIFEST, Store

    if not (folder / MANIFEST).is_file():
        return None, None
    try:
        store = Store.open(folder)
    except StoreError as error:
        say(f"{error}\nthe plan uses the recipe's limits instead of the store's counts")
        return None, None
    return len(store), sum(store.lengths)


def _plan_cells(plan: Plan, run: TrainRun, stored: bool) -> list[list[str]]:
    def count(value: int | None) -> str:
        return "needs the teacher's config" if value is None else f"{value:,}"

    source = "in the store" if stored else "at most (data.limit; no store yet)"

    def limit(minutes: float | None) -> str:
        return "" if minutes is None else f", or as many as {minutes:g} minutes allow"

    settings = run.recipe.training
    rows = [
        ["predictor parameters", count(plan.predictor_parameters)],
        ["  per step", count(plan.parameters_per_step)],
        ["frozen teacher parameters", count(plan.teacher_parameters)],
        ["  used by an optimizer step", count(plan.teacher_parameters_used)],
        ["ranks, ZeRO stage", f"{plan.ranks}, stage {settings.zero_stage}"],
        ["conversations", f"{plan.conversations:,} {source}" if plan.conversations else "needs the store"],
        [
            "optimizer steps",
            f"{plan.steps:,}{limit(settings.max_minutes)}" if plan.steps is not None else "needs the store",
        ],
    ]
    if plan.first_stage_steps is not None:
        text = f"{plan.first_stage_steps:,}{limit(settings.coupling.max_minutes)}"
        rows.insert(-1, ["optimizer steps, first stage", text])
    if plan.tokens is not None:
        rows.append(["tokens read, all epochs", f"{plan.tokens:,}"])
    if plan.memory:
        rows.append(["memory per rank: total", readable_bytes(plan.memory["total"])])
    if len(plan.stages) > 1:
        rows += [[f"  {name}", readable_bytes(size)] for name, size in plan.stages.items()]
    return rows
