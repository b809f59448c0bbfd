"""`firp bench`: accepted length and speedup of predictors, against plain decoding and against transformers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.cli.terminal import (
    Attention,
    Compiled,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Layers,
    Model,
    Threads,
    Tree,
    Verbose,
    command_line,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
)
from firp_cli.config import Precision
from firp_cli.errors import UsageError
from firp_cli.machine import is_main

if TYPE_CHECKING:
    from firp_cli.api.loading import LayerChoice
    from firp_cli.data.datasets import Prompt
    from firp_cli.evaluation.bench_groups import Group
    from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor
    from firp_cli.evaluation.run_bench import BenchPrompt
    from firp_cli.results import BenchReport
    from firp_cli.teacher.teacher import Teacher

DEFAULT_LIMIT = 40


def bench(
    predictors: Annotated[
        list[str] | None, typer.Argument(help="Predictor folders or embedded names. Default: the embedded ones.")
    ] = None,
    *,
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="Known name, hub id or .jsonl file; several with commas.")],
    methods: Annotated[
        str | None, typer.Option(help="Of ar, hf and the predictors; with commas. Default: all.")
    ] = None,
    teacher: Model = None,
    dtype: Annotated[Precision, typer.Option(help="The teacher's numbers. auto: as its config says.")] = "auto",
    data_dir: Annotated[str | None, typer.Option(help="Where NAME/test.jsonl lies. Default: $FIRP_DATA_DIR.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts of each data set. Default: {DEFAULT_LIMIT}.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Applied after temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 1,
    tree: Tree = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians are reported.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/bench-...")] = None,
    skip_long: Annotated[bool, typer.Option(help="Leave out and count prompts that do not fit the context.")] = False,
    threads: Threads = None,
    layers: Layers = "lean",
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
    from firp_cli.api.loading import LayerChoice
    from firp_cli.decoding.engine import EngineOptions
    from firp_cli.distributed.launch import launch, relayed_errors, start
    from firp_cli.evaluation.methods import BenchSettings
    from firp_cli.evaluation.run_bench import merge_reports
    from firp_cli.machine import rank, set_threads, world_size

    set_threads(threads)
    choice = LayerChoice(layers, compiled)
    wanted = [name.strip() for name in methods.split(",") if name.strip()] if methods else None
    found = _find_prompts(dataset, data_dir, limit)
    if launch(gpus, None, command_line(context)):
        return
    options = EngineOptions(attention=attention, graphs=graphs)
    settings = BenchSettings(
        max_new_tokens, batch_size, temperature, top_p, repeats, seed=seed, guard=guard, engine=options
    )
    settings = replace(settings, rank=rank(), ranks=world_size())
    reports = []
    with relayed_errors():
        if settings.ranks > 1:
            start()
        for group in _plan(predictors, wanted, teacher, settings):
            load = partial(_load, group, teacher, dtype, tree, force, settings, choice)
            report = _measure(load, group, found, settings, skip_long)
            if report is None:
                return
            reports.append(report)
    whole = merge_reports(reports)
    folder = output or default_output(dataset)
    write_report(whole, folder)
    if as_json:
        from firp_cli import results

        print_json(results.as_json(whole))
    else:
        _print(whole, folder)


def _plan(
    predictors: list[str] | None, wanted: list[str] | None, teacher: str | None, settings: BenchSettings
) -> list[Group]:
    """What to measure, by teacher. Raises UsageError, PredictorError."""
    from firp_cli.evaluation.bench_groups import choose_groups, embedded_folders, group_by_teacher
    from firp_cli.predictors.folder import predictor_folder

    if predictors:
        folders = [predictor_folder(name) for name in predictors]
    else:
        folders = embedded_folders(teacher, wanted)
        say(f"no predictor named: {'the embedded ones are measured' if folders else 'only the baselines are measured'}")
    groups = choose_groups(wanted, group_by_teacher(folders, teacher))
    if settings.ranks > 1:
        if len(groups) > 1:
            raise UsageError(
                f"--gpus takes predictors of one teacher, these have {len(groups)} "
                f"({', '.join(str(group.teacher) for group in groups)}): name some of them, or --methods"
            )
        for name in groups[0].methods:
            if groups[0].kinds.get(name, "speed") != "speed":
                raise UsageError(
                    f"--gpus spreads a pipeline over devices; {name} decodes on one: leave it out of --methods"
                )
        if "speed" not in groups[0].kinds.values():
            raise UsageError("--gpus spreads a pipeline over devices: name a speed predictor")
    return groups


def _load(
    group: Group,
    model: str | None,
    dtype: str,
    tree: str | None,
    force: bool,
    settings: BenchSettings,
    choice: LayerChoice,
) -> tuple[Teacher, dict[str, LoadedPredictor]]:
    """The teacher of a group, and the predictors that its methods need."""
    from firp_cli.api.loading import load_named_teacher, load_trees, share_teacher
    from firp_cli.evaluation.methods import LoadedPredictor
    from firp_cli.predictors.folder import load_predictor

    device = None if settings.rank == 0 else "cpu"  # other ranks keep a part only, which goes to their device
    teacher = load_named_teacher(model, next(iter(group.folders.values()), None), dtype, device, choice)
    if settings.rank > 0:
        pipeline = next(folder for name, folder in group.folders.items() if group.kinds[name] == "speed")
        share_teacher(teacher, pipeline, settings.rank, settings.ranks, choice)
    loaded = {}
    for name in group.methods:
        if name in group.folders:
            folder = group.folders[name]
            predictor = load_predictor(folder, teacher, force)
            trees = load_trees(tree, folder, predictor, teacher, settings.temperature, settings.engine)
            loaded[name] = LoadedPredictor(predictor, trees, folder)
    return teacher, loaded


def _measure(
    load: Callable[[], tuple[Teacher, dict[str, LoadedPredictor]]],
    group: Group,
    found: list[tuple[str, Prompt]],
    settings: BenchSettings,
    skip_long: bool,
) -> BenchReport | None:
    """A group's methods measured with its teacher, which is loaded and freed here; None on ranks but the first."""
    import gc

    import torch

    from firp_cli.evaluation.methods import make_methods
    from firp_cli.evaluation.run_bench import follow_bench, memory_line, run_bench

    teacher, loaded = load()
    methods = make_methods(teacher, loaded, group.methods, settings)
    prompts = _encode(found, teacher)
    if not is_main():
        follow_bench(prompts, methods, settings, teacher.max_positions, skip_long)
        return None
    said = f" with {group.label}" if group.label else ""
    say(memory_line(methods, prompts, settings, teacher.max_positions))
    say(f"warm-up{said}: each method decodes the longest batch once, uncounted")
    with progress_bar(f"measuring{said}") as progress:
        report = run_bench(teacher, prompts, methods, settings, skip_long=skip_long, progress=progress)
    del teacher, loaded, methods
    if group.label:  # another teacher may come, and find no room beside this one
        gc.collect()
        torch.cuda.empty_cache()
    return report


def load_bench_prompts(datasets: str, data_dir: str | None, limit: int | None, teacher: Teacher) -> list[BenchPrompt]:
    """Encoded prompts of one data set, or of several named with commas; at most `limit` of each."""
    return _encode(_find_prompts(datasets, data_dir, limit), teacher)


def _find_prompts(datasets: str, data_dir: str | None, limit: int | None) -> list[tuple[str, Prompt]]:
    """(data set, prompt) pairs: the first ones, or, where they have categories, as many of each category."""
    from firp_cli.data.datasets import dataset_names, load_prompts
    from firp_cli.evaluation.run_bench import spread

    count = limit or DEFAULT_LIMIT
    prompts = []
    for name in dataset_names(datasets):
        found = load_prompts(name, data_dir, count)
        if any(prompt.category for prompt in found):
            everything = load_prompts(name, data_dir, None)
            found = [everything[place] for place in spread([prompt.category for prompt in everything], count)]
        if limit is None and len(found) == count:
            say(f"{name}: {count} prompts are measured; --limit N for another number")
        label = Path(name).stem if name.endswith(".jsonl") else name
        prompts += [(label, prompt) for prompt in found]
    return prompts


def _encode(prompts: list[tuple[str, Prompt]], teacher: Teacher) -> list[BenchPrompt]:
    from firp_cli.data.chat import encode_prompt
    from firp_cli.evaluation.run_bench import BenchPrompt

    return [
        BenchPrompt(encode_prompt(prompt.messages, teacher.tokenizer), name, prompt.category)
        for name, prompt in prompts
    ]


def default_output(dataset: str) -> Path:
    """`runs/bench-DATASET-TIME`."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset.removesuffix(".jsonl")).strip("-.")
    return Path("runs") / f"bench-{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_report(report: BenchReport, folder: Path) -> None:
    """bench.json, bench.csv, bench.md, bench.html and the figures as PNG, each whole or absent."""
    from firp_cli.files import write_atomically, write_json
    from firp_cli.reports.figures import bench_figures
    from firp_cli.reports.html import bench_html
    from firp_cli.reports.tables import bench_csv, bench_markdown
    from firp_cli.results import as_json

    write_json(folder / "bench.json", as_json(report))
    figures = bench_figures(report)
    files = {f"{name}.png": image for name, image in figures.items()}
    files["bench.csv"] = bench_csv(report).encode()
    files["bench.md"] = bench_markdown(report, list(figures)).encode()
    files["bench.html"] = bench_html(report, figures).encode()
    for name, content in files.items():
        write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]


def _print(report: BenchReport, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.cells import TEACHERS_NOTE
    from firp_cli.reports.speed_tables import pipeline_note
    from firp_cli.reports.tables import bench_tables, lossless_note, settings_line

    console = Console(highlight=False)
    console.print(settings_line(report), markup=False)
    console.print(bench_tables(report))
    for note in (TEACHERS_NOTE if report.teachers else None, pipeline_note(report), lossless_note(report)):
        if note:
            console.print(note, markup=False)
    console.print(f"report: {folder / 'bench.html'}", markup=False, soft_wrap=True)
