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
from firp_cli.errors import INTERRUPTED, UsageError
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
        help="Methods with commas: ar (autoregressive decoding), hf (transformers' generate) and predictors by kind or "
        "folder name. Default: all."
    ),
]
Turns = Annotated[
    str, typer.Option(help="User turns of a conversation: all, each after the method's own answers, or first.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the main table as Markdown.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print the main table as LaTeX, for the package booktabs.")]


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
    markdown: Markdown = False,
    latex: Latex = False,
    verbose: Verbose = False,
) -> None:
    """Measure accepted length and speedup; write bench.json, .csv, .md, .tex and .html."""
    form = _form({"json": as_json, "markdown": markdown, "latex": latex})
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
            _publish(report, folder, form)


def _names(methods: str | None) -> list[str] | None:
    return [name.strip() for name in methods.split(",") if name.strip()] if methods else None


def _form(wanted: dict[str, bool]) -> str:
    """Return the form of what is printed: `json`, `markdown`, `latex` or `table`."""
    chosen = [name for name, is_wanted in wanted.items() if is_wanted]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other: choose one form")
    return chosen[0] if chosen else "table"


def _publish(report: BenchReport, folder: Path, form: str) -> None:
    """Write the report's files and print it; exit with 130 after an interruption."""
    publish(report, folder, form == "json", lambda: _show(report, folder, form))
    if cut := report.settings.get("interrupted"):
        say(f"firp: {cut}; the report is of those")
        raise typer.Exit(INTERRUPTED)


def _show(report: BenchReport, folder: Path, form: str) -> None:
    """Print the tables and notes."""
    from rich.console import Console

    from firp_cli.reports.latex import bench_latex
    from firp_cli.reports.markdown import main_markdown
    from firp_cli.reports.notes import bench_notes, settings_line
    from firp_cli.reports.tables import bench_tables

    page = f"report: {folder / 'bench.html'}" if (folder / "bench.html").is_file() else ""
    if form != "table":
        typer.echo((main_markdown if form == "markdown" else bench_latex)(report), nl=False)
        say(page)
        return
    console = Console(highlight=False, emoji=False)
    console.print(settings_line(report) + "\n", markup=False)
    console.print(bench_tables(report))
    for note in bench_notes(report):
        console.print(note, markup=False)
    if page:
        console.print(page, markup=False, soft_wrap=True)
