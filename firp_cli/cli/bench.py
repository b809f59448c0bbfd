"""`firp bench`: accepted length and speedup of predictors, against autoregressive decoding and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.bench_runs import matrix, measure_cells, measure_in_processes, temperature_of, whole_number
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
    Threads,
    TopP,
    Tree,
    Verbose,
    command_line,
    decoding_options,
    default_folder,
    given_options,
    interruption,
    print_json,
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
    from firp_cli.decoding.engine import EngineOptions
    from firp_cli.evaluation.methods import BenchSettings
    from firp_cli.reports.sweep import SweepCell
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
Dataset = Annotated[
    str | None, typer.Option(help="Known name, hub id (ID:CONFIG), file or folder; several with commas.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Published definition: spec-bench, speed-bench or eagle. Options beside it win, and are named."),
]
Turns = Annotated[
    str, typer.Option(help="User turns of a conversation: all, each after the method's own answers, or first.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the main table as Markdown.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print the main table as LaTeX, for the package booktabs.")]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="For the accuracy on HumanEval and MBPP: run the answers' code with the tests, each in a process of its "
        "own without network, with limits on time and memory, that can write only to a folder of its own. It can read "
        "your files. Linux.",
    ),
]
RequireLossless = Annotated[
    bool,
    typer.Option(
        "--require-lossless", help="Exit with status 1 if a method's answers are not the teacher's, ar and hf included."
    ),
]


@teacher_options
def bench(
    predictors: Predictors = None,
    *,
    context: typer.Context,
    dataset: Dataset = None,
    preset: Preset = None,
    methods: Methods = None,
    teacher: TeacherConfig | None = None,
    data_dir: DataDir = None,
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each data set. Default: 40.")] = None,
    max_new_tokens: Annotated[str, typer.Option(help="Most new tokens of a prompt.")] = "128",
    temperature: Annotated[str, typer.Option(help="Sampling temperature. 0: greedy.")] = "0",
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[str, typer.Option(help="Prompts decoded at once.")] = "1",
    tree: Tree = None,
    turns: Turns = "all",
    run_code: RunCode = False,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of all measurements; medians are reported.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes that measure all of it, one by one.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a matrix of settings in --output.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/bench-...")] = None,
    skip_long: SkipLong = False,
    require_lossless: RequireLossless = False,
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
    """Measure accepted length and speedup; write bench.json, .csv, .md, .tex and .html.

    --batch-size, --temperature, --tree and --max-new-tokens take several values with commas: each combination is
    measured, and one page (sweep.html) shows them all.
    """
    given = dict(locals())
    context = given.pop("context")
    _run(context, BenchOptions(**given).with_preset(given_options(context)))


@dataclass(frozen=True)
class BenchOptions:
    """Values of the command's options. `warmup`: as in BenchSettings. `told`: of the preset, for the report."""

    predictors: list[str] | None
    dataset: str | None
    preset: str | None
    methods: str | None
    teacher: TeacherConfig | None
    data_dir: str | None
    split: str
    limit: int | None
    max_new_tokens: str
    temperature: str
    top_p: float
    seed: int
    batch_size: str
    tree: str | None
    turns: str
    run_code: bool
    repeats: int
    processes: int
    resume: bool
    output: Path | None
    skip_long: bool
    require_lossless: bool
    threads: int | None
    backend: str
    attention: str
    graphs: bool
    compiled: bool
    gpus: Any
    guard: bool | None
    force: bool
    as_json: bool
    markdown: bool
    latex: bool
    verbose: bool
    warmup: int = 1
    told: dict[str, Any] | None = None

    def with_preset(self, given: set[str]) -> BenchOptions:
        """Return the options under the preset, if there is one; `given` are those that win over it. Raises
        UsageError.
        """
        from firp_cli.evaluation.presets import apply_preset

        values, told = apply_preset(self.preset, vars(self), given)
        return replace(self, **{**values, "told": told})

    @property
    def form(self) -> str:
        """Form of what is printed: `json`, `markdown`, `latex` or `table`. Raises UsageError."""
        wanted = {"json": self.as_json, "markdown": self.markdown, "latex": self.latex}
        chosen = [name for name, is_wanted in wanted.items() if is_wanted]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other: choose one form")
        return chosen[0] if chosen else "table"

    def cells(self) -> list[dict[str, str]]:
        """Return every combination of the settings that may have several values."""
        given = {"--batch-size": self.batch_size, "--temperature": self.temperature}
        return matrix({**given, "--max-new-tokens": self.max_new_tokens, "--tree": self.tree})

    def settings(self, cell: Mapping[str, str], engine: EngineOptions) -> BenchSettings:
        """Return the conditions of a combination. Raises UsageError."""
        from firp_cli.evaluation.methods import BenchSettings

        return BenchSettings(
            max_new_tokens=whole_number("--max-new-tokens", cell["--max-new-tokens"]),
            batch_size=whole_number("--batch-size", cell["--batch-size"]),
            temperature=temperature_of(cell["--temperature"]),
            top_p=self.top_p,
            repeats=self.repeats,
            seed=self.seed,
            guard=self.guard,
            turns=self.turns,
            run_code=self.run_code,
            warmup=self.warmup,
            engine=engine,
            preset=self.told,
        )

    def measuring(self) -> dict[str, Any]:
        """Return the arguments of `firp_cli.bench` that are options as they are."""
        names = ("dataset", "data_dir", "split", "limit", "skip_long", "teacher", "force", "tree")
        return {name: getattr(self, name) for name in names} | {"methods": _names(self.methods)}


def _run(context: typer.Context, given: BenchOptions) -> None:
    """Measure, in this process or in several, and publish the report."""
    _ = given.form  # refused before anything is loaded
    quiet_libraries(given.verbose)
    from firp_cli.api.bench_run import bench as measure
    from firp_cli.data.readers import dataset_label
    from firp_cli.distributed.launch import launch, relayed_errors, start

    layers, engine = decoding_options(given.backend, given.compiled, given.attention, given.graphs, given.threads)
    default = default_folder("bench", given.preset or dataset_label(str(given.dataset)))
    cells = given.cells()
    settings = [given.settings(cell, engine) for cell in cells]
    check_output(given.output or default)
    if given.resume and (len(cells) == 1 or given.output is None):
        raise UsageError("--resume goes on with a matrix of settings in --output: give both")
    if len(cells) > 1 or given.processes > 1:
        with reserved_folder(given.output, default) as folder:
            _several(context, given, cells, folder)
        return
    if launch(given.gpus, None, command_line(context)):
        return
    ranked = replace(settings[0], rank=rank(), ranks=world_size())
    reserved = reserved_folder(given.output, default) if is_main() else nullcontext(default)
    with interruption(NOTHING_KEPT), relayed_errors(), reserved as folder:
        if world_size() > 1:
            start()
        measuring = {**given.measuring(), "settings": ranked, "backend": layers, "progress": progress_bar}
        report = measure(given.predictors, **measuring)
        if is_main():
            _publish(report, folder, given)


def _several(context: typer.Context, given: BenchOptions, cells: list[dict[str, str]], folder: Path) -> None:
    """Measure in several processes, or a matrix of settings; write the report and print it."""
    if len(cells) == 1:
        _publish(measure_in_processes(context, given.processes, folder), folder, given)
        return
    from rich.console import Console

    from firp_cli.api.write_report import write_sweep
    from firp_cli.reports.cells import rich_table
    from firp_cli.reports.sweep import break_even_lines, sweep_cells, sweep_json, sweep_latex, sweep_markdown

    done: list[SweepCell] = []
    for done in measure_cells(context, cells, folder, given.processes, given.resume):
        write_sweep(done, folder)
    if given.form == "json":
        print_json(sweep_json(done))
    elif given.form != "table":
        typer.echo((sweep_markdown if given.form == "markdown" else sweep_latex)(done), nl=False)
    else:
        console = Console(highlight=False, emoji=False)
        headers, lines = sweep_cells(done)
        headers = [header.replace(" ", "\n", 1) for header in headers]
        console.print(rich_table(headers, lines, left=headers.index("method") + 1))
        for line in [*break_even_lines(done), f"report: {folder / 'sweep.html'}"]:
            console.print(line, markup=False, soft_wrap=True)
    reports = [cell.report for cell in done if cell.report]
    _need_lossless(reports, given)
    if not reports:
        raise typer.Exit(1)


def _names(methods: str | None) -> list[str] | None:
    return [name.strip() for name in methods.split(",") if name.strip()] if methods else None


def _publish(report: BenchReport, folder: Path, given: BenchOptions) -> None:
    """Write the report's files and print it; exit with 130 after an interruption."""
    publish(report, folder, given.as_json, lambda: _show(report, folder, given.form))
    if cut := report.settings.get("interrupted"):
        say(f"firp: {cut}; the report is of those")
        raise typer.Exit(INTERRUPTED)
    _need_lossless([report], given)


def _need_lossless(reports: Sequence[BenchReport], given: BenchOptions) -> None:
    """Exit with 1 where answers must be the teacher's and a method's are not; name the tokens."""
    from firp_cli.reports.verification import lossless_failures

    failures = [line for report in reports for line in lossless_failures(report)] if given.require_lossless else []
    for line in failures:
        say(f"firp: {line}")
    if failures:
        raise typer.Exit(1)


def _show(report: BenchReport, folder: Path, form: str) -> None:
    """Print the tables and notes."""
    from rich.console import Console

    from firp_cli.reports.latex import bench_latex
    from firp_cli.reports.markdown import main_markdown
    from firp_cli.reports.notes import bench_notes, settings_line
    from firp_cli.reports.preset_lines import preset_lines
    from firp_cli.reports.tables import bench_tables

    page = f"report: {folder / 'bench.html'}" if (folder / "bench.html").is_file() else ""
    if form != "table":
        typer.echo((main_markdown if form == "markdown" else bench_latex)(report), nl=False)
        say(page)
        return
    console = Console(highlight=False, emoji=False)
    for line in (settings_line(report), *preset_lines(report), ""):
        console.print(line, markup=False)
    console.print(bench_tables(report))
    for note in bench_notes(report):
        console.print(note, markup=False)
    if page:
        console.print(page, markup=False, soft_wrap=True)
