"""`firp eval`: quality of a predictor's drafts, without decoding."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.cli.terminal import (
    ChatTemplate,
    DataDir,
    Dtype,
    Force,
    Json,
    Model,
    RemoteCode,
    Revision,
    TemplateOptions,
    Tree,
    Verbose,
    print_json,
    progress_bar,
    quiet_libraries,
    teacher_choice,
)

if TYPE_CHECKING:
    from firp_cli.results import EvalReport


def evaluate(
    predictor: Annotated[str, typer.Argument(help="Predictor folder or embedded name.")],
    store: Annotated[
        Path | None, typer.Option(help="Store made by `firp collect`. Default: the one it was trained on.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Known name, hub id, file or folder, whose prompts the teacher answers first."),
    ] = None,
    teacher: Model = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    template_options: TemplateOptions = None,
    trust_remote_code: RemoteCode = False,
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="Split of the data set; a file has none.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most conversations. Default: all of a store, 40 prompts.")
    ] = None,
    tree: Tree = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/eval-...")] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure top-1, top-5, KL, expected accepted length and similarity by step; write eval.json and figures."""
    quiet_libraries(verbose)
    from firp_cli import results
    from firp_cli.api.eval_run import evaluate as measure
    from firp_cli.api.write_report import write_report

    report = measure(
        predictor,
        store=store,
        dataset=dataset,
        teacher=teacher_choice(teacher, dtype, revision, chat_template, template_options, trust_remote_code),
        data_dir=data_dir,
        split=split,
        limit=limit,
        tree=tree,
        force=force,
        progress=progress_bar,
    )
    name = Path(report.predictor["folder"]).resolve().name
    folder = output or Path("runs") / f"eval-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    write_report(report, folder)
    if as_json:
        print_json(results.as_json(report))
    else:
        _print(report, folder)


def _print(report: EvalReport, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.speed_tables import eval_pipeline_lines
    from firp_cli.reports.tables import eval_table

    console = Console(highlight=False)
    console.print(eval_table(report))
    chain, best = report.expected_accepted_length_chain, report.expected_accepted_length_tree
    if report.pipeline:
        console.print(f"expected: {chain:.2f} tokens in {report.pipeline.loops} ticks", markup=False)
        for line in eval_pipeline_lines(report):
            console.print(line, markup=False)
    else:
        text = f"expected accepted length: {chain:.2f} as a chain, {best:.2f} with tree {report.tree}"
        console.print(text, markup=False)
    console.print(f"report: {folder}", markup=False, soft_wrap=True)
