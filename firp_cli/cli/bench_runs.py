"""`firp bench` that runs itself several times: in several processes, or for each setting of a matrix."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from firp_cli.cli.terminal import command_line, say
from firp_cli.config import check_sampling
from firp_cli.errors import INTERRUPTED, OutputError, UsageError
from firp_cli.files import read_json
from firp_cli.provenance import environment, portable

if TYPE_CHECKING:
    from firp_cli.reports.sweep import SweepCell
    from firp_cli.results import BenchReport

OWN = ("--output", "--processes", "--json", "--resume", "--require-lossless", "--markdown", "--latex")  # of the parent


def whole_number(option: str, text: str, least: int = 1) -> int:
    """Return the value of an option that takes whole numbers. Raises UsageError."""
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"{option} takes whole numbers, not {text!r}") from None
    if value < least:
        raise UsageError(f"{option} must be at least {least}, got {value}")
    return value


def temperature_of(text: str) -> float:
    """Return a sampling temperature. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"--temperature takes numbers, not {text!r}") from None
    check_sampling(value, 1.0)
    return value


def matrix(options: Mapping[str, str | None]) -> list[dict[str, str]]:
    """Return every combination of the options' values; several are given with commas. Options that are not given are
    left out.
    """
    given = {name: _values(text) for name, text in options.items() if text is not None}
    return [dict(zip(given, combination, strict=True)) for combination in itertools.product(*given.values())]


def _values(text: str) -> list[str]:
    if Path(text).exists():
        return [text]
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def child_arguments(context: typer.Context, values: Mapping[str, str], folder: Path) -> list[str]:
    """Return the arguments of a `firp bench` with these values of its options that writes into `folder`."""
    replaced = {*OWN, *values}
    kept = [item for item in command_line(context) if item.partition("=")[0] not in replaced]
    return [*kept, *(f"{name}={value}" for name, value in values.items()), f"--output={folder}"]


def run_child(arguments: Sequence[str]) -> int:
    """Run `firp` with these arguments and without its tables; return its status. A signal is passed on, and gives
    INTERRUPTED.
    """
    from firp_cli.distributed.signals import run_program

    status, interrupted = run_program([sys.executable, "-m", "firp_cli", *arguments], stdout=subprocess.DEVNULL)
    return INTERRUPTED if interrupted else status


def read_bench(folder: Path) -> BenchReport:
    """Return the report that a child wrote, with its records. Raises OutputError."""
    from firp_cli.records import ANSWERS, read_answers
    from firp_cli.results import BenchReport

    try:
        report = BenchReport.from_json(read_json(folder / "bench.json"))
        report.records = read_answers(folder / ANSWERS)
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{folder} has no whole bench.json and {ANSWERS}: {error}") from error
    return report


def measure_in_processes(context: typer.Context, processes: int, folder: Path) -> BenchReport:
    """Run the bench in `processes` fresh processes, one after the other, and return their pooled report.

    An interruption leaves the processes that are complete. Raises typer.Exit with the status of one that fails.
    """
    from firp_cli.evaluation.merge import merge_processes

    reports: list[BenchReport] = []
    cut = False
    for number in range(1, processes + 1):
        place = folder / f"process-{number}"
        say(f"firp: process {number} of {processes}")
        status = run_child(child_arguments(context, {}, place))
        if status == INTERRUPTED and reports:
            cut = True
            break
        if status:
            raise typer.Exit(status)
        reports.append(read_bench(place))
    report = merge_processes(reports)
    report.environment = {**report.environment, "argv": environment()["argv"]}
    if cut:
        report.settings["interrupted"] = f"interrupted after {len(reports)} of {processes} processes"
    return report


def measure_cells(
    context: typer.Context, cells: Sequence[Mapping[str, str]], folder: Path, processes: int, resume: bool
) -> Iterator[list[SweepCell]]:
    """Run the bench for each cell of a matrix, each in its own process and folder, and yield the cells so far.

    With `resume`, cells that the same command has finished are read instead. A cell that fails has a reason in place of
    its report. Raises typer.Exit on an interruption.
    """
    from firp_cli.reports.sweep import SWEEP, SweepCell

    if not resume and (folder / SWEEP).exists():
        raise UsageError(
            f"{folder} has a matrix of settings already: --resume goes on with it, or give another --output"
        )
    done: list[SweepCell] = []
    varied = {name for name in cells[0] if len({cell[name] for cell in cells}) > 1}
    extra = [f"--processes={processes}"] if processes > 1 else []
    for number, cell in enumerate(cells, 1):
        values = {name: value for name, value in cell.items() if name in varied}
        place = folder / _folder_name(values)
        arguments = [*child_arguments(context, cell, place), *extra]
        label = " ".join(f"{name} {value}" for name, value in values.items())
        if resume and _finished(place, arguments):
            say(f"firp: {number} of {len(cells)}: {label}: finished before")
            done.append(SweepCell(values, place.name, read_bench(place)))
            yield done
            continue
        say(f"firp: {number} of {len(cells)}: {label}")
        status = run_child(arguments)
        if status == INTERRUPTED:
            say(f"firp: interrupted; the same command with --output {folder} --resume goes on")
            raise typer.Exit(INTERRUPTED)
        if status:
            done.append(SweepCell(values, place.name, reason=f"firp bench failed with status {status}"))
        else:
            done.append(SweepCell(values, place.name, read_bench(place)))
        yield done


def _folder_name(values: Mapping[str, str]) -> str:
    """Return a name such as `batch-size=4,temperature=0`."""
    return ",".join(f"{name.strip('-')}={re.sub(r'[^A-Za-z0-9_.@-]+', '-', value)}" for name, value in values.items())


def _finished(folder: Path, arguments: Sequence[str]) -> bool:
    """Return True if this command has written a whole report into the folder."""
    try:
        value: dict[str, Any] = read_json(folder / "bench.json")
        argv = value["environment"]["argv"][1:]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not value["settings"].get("interrupted") and argv == portable(list(arguments))
