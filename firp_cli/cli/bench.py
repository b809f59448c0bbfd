"""`firp bench`: accepted length and speedup of predictors, against autoregressive decoding and transformers."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import (
    Attention,
    Backend,
    ChatTemplate,
    Compiled,
    DataDir,
    Dtype,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Model,
    RemoteCode,
    Revision,
    Seed,
    Temperature,
    TemplateOptions,
    Threads,
    TopP,
    Tree,
    Verbose,
    command_line,
    decoding_options,
    print_json,
    progress_bar,
    quiet_libraries,
    teacher_choice,
)
from firp_cli.machine import is_main, rank, world_size

if TYPE_CHECKING:
    from firp_cli.results import BenchReport

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


def bench(
    predictors: Predictors = None,
    *,
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="Known name, hub id (ID:CONFIG), file or folder; several with commas.")],
    methods: Methods = None,
    teacher: Model = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    template_options: TemplateOptions = None,
    trust_remote_code: RemoteCode = False,
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="Split of the data set; a file has none.")] = "test",
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
    skip_long: Annotated[bool, typer.Option(help="Skip and count prompts that do not fit the context.")] = False,
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
    from firp_cli.distributed.launch import launch, relayed_errors, start
    from firp_cli.evaluation.methods import BenchSettings

    choice = teacher_choice(teacher, dtype, revision, chat_template, template_options, trust_remote_code)
    layers, options = decoding_options(backend, compiled, attention, graphs, threads)
    if launch(gpus, None, command_line(context)):
        return
    settings = BenchSettings(
        max_new_tokens, batch_size, temperature, top_p, repeats, seed=seed, guard=guard, turns=turns, engine=options
    )
    loading: dict[str, Any] = {"teacher": choice, "backend": layers, "force": force, "tree": tree}
    loading |= {"data_dir": data_dir, "split": split, "limit": limit, "skip_long": skip_long}
    with relayed_errors():
        if world_size() > 1:
            start()
        report = measure(
            predictors,
            dataset=dataset,
            methods=_names(methods),
            **loading,
            settings=replace(settings, rank=rank(), ranks=world_size()),
            progress=progress_bar,
        )
    if is_main():
        _publish(report, output or _default_output(dataset), as_json)


def _names(methods: str | None) -> list[str] | None:
    return [name.strip() for name in methods.split(",") if name.strip()] if methods else None


def _default_output(dataset: str) -> Path:
    """Return `runs/bench-DATASET-TIME`."""
    from firp_cli.data.readers import dataset_label

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset_label(dataset)).strip("-.")
    return Path("runs") / f"bench-{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _publish(report: BenchReport, folder: Path, as_json: bool) -> None:
    """Write the report's files and print it."""
    from rich.console import Console

    from firp_cli import results
    from firp_cli.api.write_report import write_report
    from firp_cli.reports.cells import TEACHERS_NOTE
    from firp_cli.reports.speed_tables import pipeline_note
    from firp_cli.reports.tables import bench_tables, lossless_note, settings_line

    write_report(report, folder)
    if as_json:
        print_json(results.as_json(report))
        return
    console = Console(highlight=False)
    console.print(settings_line(report), markup=False)
    console.print(bench_tables(report))
    for note in (TEACHERS_NOTE if report.teachers else None, pipeline_note(report), lossless_note(report)):
        if note:
            console.print(note, markup=False)
    console.print(f"report: {folder / 'bench.html'}", markup=False, soft_wrap=True)
