"""`firp tune`: measure decoding steps on this machine and choose the fastest draft tree of each batch size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import (
    NO_REPORT,
    Attention,
    Backend,
    Compiled,
    DataDir,
    Force,
    Graphs,
    Json,
    Predictor,
    Seed,
    Temperature,
    Threads,
    TopP,
    Verbose,
    decoding_options,
    default_folder,
    interruption,
    progress_bar,
    publish,
    quiet_libraries,
    teacher_options,
)
from firp_cli.config import TeacherConfig
from firp_cli.errors import OutputError, UsageError
from firp_cli.files import reserved_folder

if TYPE_CHECKING:
    from firp_cli.tune_results import TuneReport

LARGEST_BATCH = 65536
DEFAULT_BATCHES = "1,2,4,8,16,32"
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Calibration prompts: known name, hub id or .jsonl file. Default: the predictor's training data set."
    ),
]
Split = Annotated[
    str,
    typer.Option(help="Split of the calibration prompts, of which the last are used; not test, which bench decodes."),
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens in the K/V cache. Default: the middle of an answer.")]
MaxRows = Annotated[int | None, typer.Option(min=2, help="Most rows of a step. Default: 64, on CUDA 256.")]
Trial = Annotated[
    bool, typer.Option(help="Check predictions by decoding up to a quarter of the prompts, for about 90 s.")
]
TimingRounds = Annotated[
    int | None, typer.Option(min=1, help="Rounds of timing whole steps, by batch size. Default: 1 on CUDA, else more.")
]


@teacher_options
def tune(
    predictor: Predictor = "firp",
    *,
    dataset: Dataset = None,
    split: Split = "train",
    data_dir: DataDir = None,
    limit: Annotated[int, typer.Option(min=1, help="Calibration prompts.")] = 64,
    teacher: TeacherConfig | None = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, each of which gets a tree.")] = DEFAULT_BATCHES,
    context: Context = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="Most new tokens of a prompt.")] = 128,
    max_rows: MaxRows = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    trial: Trial = True,
    repeats: Annotated[int, typer.Option(min=1, help="Most repeats of the trial.")] = 2,
    timing_rounds: TimingRounds = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure this machine's costs again.")] = False,
    tree_file: Annotated[Path | None, typer.Option(help="Default: tree.json in the predictor's folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/tune-...")] = None,
    threads: Threads = None,
    backend: Backend = "lean",
    attention: Attention = "auto",
    graphs: Graphs = True,
    compiled: Compiled = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose the fastest draft trees on this machine; write tree.json and a report with figures."""
    quiet_libraries(verbose)
    sizes = _batches(batch_sizes)
    from firp_cli.tuning.calibration import TuneSettings

    layers, options = decoding_options(backend, compiled, attention, graphs, threads)
    settings = TuneSettings(
        batches=sizes,
        context=context,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        most_rows=max_rows,
        trial=trial,
        repeats=repeats,
        again=remeasure,
        timing_rounds=timing_rounds,
        engine=options,
    )
    prompts: dict[str, Any] = {"dataset": dataset, "split": split, "data_dir": data_dir, "limit": limit}
    loading: dict[str, Any] = {"teacher": teacher, "backend": layers, "force": force}
    _run(predictor, tree_file, output, as_json, {**prompts, **loading, "settings": settings})


def _run(predictor: str, tree_file: Path | None, output: Path | None, as_json: bool, arguments: dict[str, Any]) -> None:
    """Choose the trees and publish the report."""
    from firp_cli.api.tune_run import tune as choose_trees
    from firp_cli.predictors.folder import predictor_folder
    from firp_cli.tune_results import TuneReport

    default = default_folder("tune", predictor_folder(predictor).resolve().name)
    with interruption(NO_REPORT), reserved_folder(output, default) as folder:
        failure = None
        try:
            report = choose_trees(predictor, tree_file=tree_file, progress=progress_bar, **arguments)
        except OutputError as error:  # the trees cannot be written: the report has them too
            if not isinstance(error.result, TuneReport):
                raise
            report, failure = error.result, error
        publish(report, folder, as_json, lambda: _show(report, tree_file, folder, failure is None))
        if failure:
            raise failure


def _batches(text: str) -> tuple[int, ...]:
    """Return the numbers of `1,4,16`. Raises UsageError."""
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--batch-sizes takes numbers with commas, such as {DEFAULT_BATCHES}, not {text!r}") from None
    if sizes[0] < 1:
        raise UsageError(f"batch sizes must be at least 1, got {sizes[0]}")
    if sizes[-1] > LARGEST_BATCH:
        raise UsageError(f"batch sizes must be at most {LARGEST_BATCH}, got {str(sizes[-1])[:40]}")
    return sizes


def _show(report: TuneReport, tree_file: Path | None, output: Path, written: bool) -> None:
    """Print the tables, and the places of the trees, if these were `written`, and of the report."""
    from rich.console import Console

    from firp_cli.reports.tuning import tune_tables

    console = Console(highlight=False, emoji=False)
    console.print(tune_tables(report))
    if written:
        trees = tree_file or Path(report.predictor["folder"]) / "tree.json"
        console.print(f"trees: {trees}", markup=False, soft_wrap=True)
    if (page := output / "tune.html").is_file():
        console.print(f"report: {page}", markup=False, soft_wrap=True)
