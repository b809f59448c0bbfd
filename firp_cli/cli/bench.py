"""`firp bench`: accepted length and speedup of predictors, against autoregressive decoding and transformers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import (
    Attention,
    Backend,
    Compiled,
    DataDir,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Seed,
    SkipLong,
    Split,
    Temperature,
    Threads,
    TopP,
    Tree,
    Verbose,
    command_line,
    decoding_options,
    default_folder,
    interruption,
    progress_bar,
    publish,
    quiet_libraries,
    say,
    teacher_options,
)
from firp_cli.config import TeacherConfig
from firp_cli.errors import INTERRUPTED
from firp_cli.files import check_output, reserved_folder
from firp_cli.machine import is_main, rank, world_size

if TYPE_CHECKING:
    from firp_cli.results import BenchReport

NOTHING_KEPT = "firp: interrupted before the first repeat was whole: nothing is kept"
Predictors = Annotated[
    list[str] | None, typer.Argument(help="Predictor folders or embedded names. Default: the embedded ones.")
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods with commas: ar (autoregressive decoding), hf and hf-static (transformers' generate with its "
        "dynamic and its static cache), prompt-lookup and suffix (drafts copied from the text), assisted:MODEL and "
        "early-exit:LAYER (transformers' assisted generation), and predictors by kind or folder name. Default: ar, hf, "
        "prompt-lookup, suffix and all predictors."
    ),
]
Turns = Annotated[
    str, typer.Option(help="User turns of a conversation: all, each after the method's own answers, or first.")
]


@teacher_options
def bench(
    predictors: Predictors = None,
    *,
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="Known name, hub id (ID:CONFIG), file or folder; several with commas.")],
    methods: Methods = None,
    teacher: TeacherConfig | None = None,
    data_dir: DataDir = None,
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each data set. Default: 40.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a prompt.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 1,
    tree: Tree = None,
    turns: Turns = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of all measurements; medians are reported.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/bench-...")] = None,
    skip_long: SkipLong = False,
    threads: Threads = None,
    backend: Backend = "lean",
    attention: Attention = "auto",
    graphs: Graphs = True,
    compiled: Compiled = False,
    gpus: Gpus = 1,
    guard: Guarded = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure accepted length and speedup; write bench.json, .csv, .md and .html."""
    quiet_libraries(verbose)
    from firp_cli.api.bench_run import bench as measure
    from firp_cli.data.readers import dataset_label
    from firp_cli.distributed.launch import launch, relayed_errors, start
    from firp_cli.evaluation.methods import BenchSettings

    layers, options = decoding_options(backend, compiled, attention, graphs, threads)
    default = default_folder("bench", dataset_label(dataset))
    settings = BenchSettings(
        max_new_tokens, batch_size, temperature, top_p, repeats, seed=seed, guard=guard, turns=turns, engine=options
    )
    check_output(output or default)
    if launch(gpus, None, command_line(context)):
        return
    settings = replace(settings, rank=rank(), ranks=world_size())
    loading: dict[str, Any] = {"teacher": teacher, "backend": layers, "force": force, "tree": tree}
    measuring: dict[str, Any] = {"dataset": dataset, "methods": _names(methods), "data_dir": data_dir, "split": split}
    measuring |= {"limit": limit, "skip_long": skip_long, "settings": settings, "progress": progress_bar}
    reserved = reserved_folder(output, default) if is_main() else nullcontext(default)
    with interruption(NOTHING_KEPT), relayed_errors(), reserved as folder:
        if world_size() > 1:
            start()
        report = measure(predictors, **measuring, **loading)
        if is_main():
            _publish(report, folder, as_json)


def _names(methods: str | None) -> list[str] | None:
    return [name.strip() for name in methods.split(",") if name.strip()] if methods else None


def _publish(report: BenchReport, folder: Path, as_json: bool) -> None:
    """Write the report's files and print it; exit with 130 after an interruption."""
    publish(report, folder, as_json, lambda: _show(report, folder))
    if cut := report.settings.get("interrupted"):
        say(f"firp: {cut}; the report is of those")
        raise typer.Exit(INTERRUPTED)


def _show(report: BenchReport, folder: Path) -> None:
    """Print the tables and notes."""
    from rich.console import Console

    from firp_cli.reports.cells import TEACHERS_NOTE
    from firp_cli.reports.speed_tables import pipeline_note
    from firp_cli.reports.tables import bench_tables, lossless_note, settings_line

    console = Console(highlight=False, emoji=False)
    console.print(settings_line(report), markup=False)
    console.print(bench_tables(report))
    for note in (TEACHERS_NOTE if report.teachers else None, pipeline_note(report), lossless_note(report)):
        if note:
            console.print(note, markup=False)
    if (page := folder / "bench.html").is_file():
        console.print(f"report: {page}", markup=False, soft_wrap=True)
