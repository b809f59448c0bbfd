"""`firp eval`: quality of a predictor's drafts, without decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.cli.terminal import (
    NO_REPORT,
    DataDir,
    Force,
    Json,
    Predictor,
    Split,
    Tree,
    Verbose,
    default_folder,
    interruption,
    progress_bar,
    publish,
    quiet_libraries,
    teacher_options,
)
from firp_cli.config import TeacherConfig
from firp_cli.files import reserved_folder
from firp_cli.results import ANALYSES

if TYPE_CHECKING:
    from firp_cli.results import EvalReport

Analyses = Annotated[
    str,
    typer.Option(metavar="NAME,...", help=f"Analyses of the papers: {', '.join(ANALYSES)}; or all."),
]
Against = Annotated[
    list[str] | None,
    typer.Option(metavar="PREDICTOR", help="Another predictor for --analysis heads; may be repeated."),
]


@teacher_options
def evaluate(
    predictor: Predictor,
    *,
    store: Annotated[
        Path | None, typer.Option(help="Store made by `firp collect`. Default: the one it was trained on.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Known name, hub id, file or folder, whose prompts the teacher answers first."),
    ] = None,
    teacher: TeacherConfig | None = None,
    data_dir: DataDir = None,
    split: Split = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most conversations. Default: all of a store, 40 prompts.")
    ] = None,
    tree: Tree = None,
    analysis: Analyses = "",
    against: Against = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/eval-...")] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure top-1, top-5, KL, expected accepted length and similarity by step; write JSON, a page and figures."""
    quiet_libraries(verbose)
    from firp_cli.api.eval_run import evaluate as measure
    from firp_cli.predictors.folder import predictor_folder

    default = default_folder("eval", predictor_folder(predictor).resolve().name)
    with interruption(NO_REPORT), reserved_folder(output, default) as folder:
        report = measure(
            predictor,
            store=store,
            dataset=dataset,
            teacher=teacher,
            data_dir=data_dir,
            split=split,
            limit=limit,
            tree=tree,
            force=force,
            analyses=analysis,
            against=against or (),
            progress=progress_bar,
        )
        publish(report, folder, as_json, lambda: _print(report, folder))


def _print(report: EvalReport, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.analyses import analysis_table
    from firp_cli.reports.speed_tables import eval_pipeline_lines
    from firp_cli.reports.tables import eval_table

    console = Console(highlight=False, emoji=False)
    console.print(eval_table(report))
    chain, best = report.expected_accepted_length_chain, report.expected_accepted_length_tree
    if report.pipeline:
        console.print(f"expected: {chain:.2f} tokens in {report.pipeline.loops} ticks", markup=False)
        for line in eval_pipeline_lines(report):
            console.print(line, markup=False)
    else:
        text = f"expected accepted length: {chain:.2f} as a chain, {best:.2f} with tree {report.tree}"
        console.print(text, markup=False)
    for item in report.analyses:
        console.print(analysis_table(item))
    if (folder / "eval.json").is_file():
        console.print(f"report: {folder}", markup=False, soft_wrap=True)
