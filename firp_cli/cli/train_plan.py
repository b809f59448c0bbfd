"""What a run would take: `firp train --plan`, and the look at the devices before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from firp_cli.cli.terminal import print_json, say
from firp_cli.config import Recipe
from firp_cli.errors import CapacityError, StoreError
from firp_cli.machine import is_main
from firp_cli.recipe import dump_recipe

if TYPE_CHECKING:
    from firp_cli.training.memory_model import MemoryLine
    from firp_cli.training.plan import Plan
    from firp_cli.training.time_model import RunTimes

SHOWN_SHARE = 0.02  # of a rank's memory, from which on a line is worth printing before a run


def print_plan(
    recipe: Recipe,
    ranks: int,
    as_json: bool,
    device_memory: str | None = None,
    mean_tokens: int | None = None,
    device_tflops: float | None = None,
    utilisation: float | None = None,
) -> None:
    """Print recipe, sizes, memory per rank and the chain's disk and hours.

    Args:
        device_memory: of one device, as `80GB`; the plan then says whether a rank fits, and what would make it.
        mean_tokens: of a conversation, where there is no store yet.
        device_tflops, utilisation: a device's peak in 1e12 operations per second, and the share of it that is reached.
    """
    from firp_cli import results
    from firp_cli.machine import parse_bytes, readable_bytes
    from firp_cli.training.plan import make_plan
    from firp_cli.training.preflight import preflight
    from firp_cli.training.time_model import PEAK_FLOPS, UTILISATION, Throughput

    conversations, tokens = _stored(recipe)
    reached = Throughput(device_tflops * 1e12 if device_tflops else PEAK_FLOPS, utilisation or UTILISATION)
    found = make_plan(recipe, ranks, conversations, tokens, mean_tokens, reached)
    room = None if device_memory is None else parse_bytes(device_memory)
    checked = None if room is None else preflight(recipe, ranks, room, "as --device-memory says")
    verdict = None
    if room is not None and checked is not None and found.memory is not None:
        verdict = checked[1] or f"fits: a rank needs {readable_bytes(found.memory['total'])} of {readable_bytes(room)}"
    if as_json:
        plan = results.as_json(found)
        print_json({"recipe": recipe.model_dump(), "plan": plan, "device_memory": room, "verdict": verdict})
        return
    from rich.console import Console

    from firp_cli.reports.cells import rich_table

    typer.echo(dump_recipe(recipe))
    console = Console(highlight=False)
    console.print(rich_table(["plan", ""], _plan_cells(found, recipe, conversations is not None), left=2))
    if found.lines and found.memory:
        rows = [[line.name, readable_bytes(line.bytes), line.rule] for line in found.lines]
        rows.append(
            ["total", readable_bytes(found.memory["total"]), "ridge start and training come one after the other"]
        )
        console.print(rich_table(["memory per rank", "", "arithmetic"], rows, left=1, remark=True))
        rows = [[line.name, readable_bytes(line.bytes), line.rule] for line in found.collecting]
        rows.append(["total", readable_bytes(sum(line.bytes for line in found.collecting)), ""])
        console.print(rich_table(["while collecting", "", "arithmetic"], rows, left=1, remark=True))
    if found.chain:
        console.print(
            rich_table(["chain", "", ""], _chain_cells(found.chain, reached, tokens is not None), left=1, remark=True)
        )
    if found.missing:
        typer.echo(f"{found.missing}; parameter and memory figures need it")
    if verdict:
        typer.echo(verdict)


def check_devices(recipe: Recipe, ranks: int, local_ranks: int) -> None:
    """Compare what each rank will need with what this machine's devices have, before any rank starts.

    Raises CapacityError with settings that fit, where `training.preflight` says so.
    """
    from firp_cli.machine import memory_of_rank, readable_bytes
    from firp_cli.training.memory_model import total_bytes
    from firp_cli.training.preflight import preflight

    mode = recipe.training.preflight
    if mode == "ignore" or not is_main():
        return
    room = memory_of_rank(local_ranks)
    checked = None if room is None else preflight(recipe, ranks, *room)
    if room is None or checked is None:
        return
    lines, fault = checked
    if not fault:
        say(f"memory per rank: about {readable_bytes(total_bytes(lines))} of {readable_bytes(room[0])} ({room[1]})")
        return
    _show(lines)
    if mode == "refuse":
        raise CapacityError(fault)
    say(fault)


def _show(lines: list[MemoryLine]) -> None:
    from firp_cli.machine import readable_bytes
    from firp_cli.training.memory_model import total_bytes

    total = total_bytes(lines)
    shown = [line for line in lines if line.bytes > SHOWN_SHARE * total]
    width = max(len(line.name) for line in shown)
    for line in sorted(shown, key=lambda line: -line.bytes):
        say(f"{line.name:<{width}}  {readable_bytes(line.bytes):>12}  {line.rule}")


def _chain_cells(chain: RunTimes, throughput: Any, stored: bool) -> list[list[str]]:
    reach = f"{throughput.peak_flops / 1e12:,.0f} TFLOP/s a rank"
    shares = {"answers": throughput.answer_utilisation}
    counted = "in the store" if stored else "conversations * tokens of each (--tokens, else data.max_length: at most)"
    rows = [["tokens", f"{chain.tokens:,}", counted]]
    rows += [
        [f"disk, {name}", f"{size / 1e9:,.1f} GB", "tokens * bytes per token"] for name, size in chain.disk.items()
    ]
    for name, hours in chain.hours.items():
        if chain.flops[name]:
            share = shares.get(name, throughput.utilisation)
            rows.append([f"hours, {name}", f"{hours:,.2f}", f"{chain.flops[name]:.3g} FLOP at {share:.0%} of {reach}"])
    return rows


def _stored(recipe: Recipe) -> tuple[int | None, int | None]:
    """Conversations and tokens of the recipe's store, if it is there."""
    folder = Path(str(recipe.store))
    if not (folder / "manifest.json").is_file():
        return None, None
    from firp_cli.store.reader import Store

    try:
        store = Store.open(folder)
    except StoreError as error:
        say(f"{error}\nthe plan counts what the recipe asks for instead")
        return None, None
    return len(store), sum(store.lengths)


def _plan_cells(plan: Plan, recipe: Recipe, stored: bool) -> list[list[str]]:
    def count(value: int | None, unit: str = "") -> str:
        return "needs the teacher's config" if value is None else f"{value:,}{unit}"

    source = "in the store" if stored else "at most (data.limit; no store yet)"
    minutes = recipe.training.max_minutes
    limit = "" if minutes is None else f", or as many as {minutes:g} minutes allow"
    rows = [
        ["predictor parameters", count(plan.predictor_parameters)],
        ["  per step", count(plan.parameters_per_step)],
        ["frozen teacher parameters", count(plan.teacher_parameters)],
        ["  run through by a step", count(plan.teacher_parameters_used)],
        ["ranks, ZeRO stage", f"{plan.ranks}, stage {recipe.training.zero_stage}"],
        ["conversations", f"{plan.conversations:,} {source}" if plan.conversations else "needs the store"],
        ["optimizer steps", f"{plan.steps:,}{limit}" if plan.steps is not None else "needs the store"],
    ]
    if plan.tokens is not None:
        rows.append(["tokens read, all epochs", f"{plan.tokens:,}"])
    if plan.memory:
        rows.append(["memory per rank: total", f"{plan.memory['total'] / 1e9:,.2f} GB"])
    return rows
