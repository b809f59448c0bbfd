"""`firp bench`: accepted length and speedup of predictors, against plain decoding and against transformers."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.commands.terminal import (
    Force,
    Gpus,
    Guarded,
    Json,
    Verbose,
    command_line,
    main_process,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
)
from firp_cli.errors import UsageError
from firp_cli.recipe import DEFAULT_TEACHER, Precision, embedded_predictors

if TYPE_CHECKING:
    from firp_cli.data.prompts import Prompt
    from firp_cli.evaluation.bench import BenchPrompt, BenchSettings, LoadedPredictor
    from firp_cli.records import BenchReport
    from firp_cli.teacher.stack import Teacher

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
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub id. Default: the predictor's.")] = None,
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
    tree: Annotated[str | None, typer.Option(help="dynamic:N, chain, static:4x2x1, or a tree.json.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians are reported.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/bench-...")] = None,
    skip_long: Annotated[bool, typer.Option(help="Leave out and count prompts that do not fit the context.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    gpus: Gpus = 1,
    guard: Guarded = True,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure accepted length and speedup; write bench.json, .csv, .md and .html."""
    quiet_libraries(verbose)
    import torch

    from firp_cli.distributed.launch import launch, rank, relayed_errors, start, world_size
    from firp_cli.evaluation.bench import BenchSettings, follow_bench, make_methods, run_bench

    if threads:
        torch.set_num_threads(threads)
    wanted = [name.strip() for name in methods.split(",") if name.strip()] if methods else None
    found = _find_prompts(dataset, data_dir, limit)
    if launch(gpus, None, command_line(context)):
        return
    settings = BenchSettings(max_new_tokens, batch_size, temperature, top_p, repeats, seed=seed, guard=guard)
    settings = replace(settings, rank=rank(), ranks=world_size())
    with relayed_errors():
        if settings.ranks > 1:
            start()
        names, model, loaded = _load(predictors, wanted, teacher, dtype, tree, force, settings)
        chosen = make_methods(model, loaded, names, settings)
        prompts = _encode(found, model)
        if not main_process():
            follow_bench(prompts, chosen, settings, model.max_positions, skip_long)
            return
        say("warm-up: each method decodes the first batch once, uncounted")
        with progress_bar("measuring") as progress:
            report = run_bench(model, prompts, chosen, settings, skip_long=skip_long, progress=progress)
    folder = output or default_output(dataset)
    write_report(report, folder)
    if as_json:
        from firp_cli.records import plain

        print_json(plain(report))
    else:
        _print(report, folder)


def _load(
    predictors: list[str] | None,
    wanted: list[str] | None,
    model: str | None,
    dtype: str,
    tree: str | None,
    force: bool,
    settings: BenchSettings,
) -> tuple[list[str], Teacher, dict[str, LoadedPredictor]]:
    """Method names to measure, the teacher, and the predictors that they need. Raises UsageError before loading one."""
    from firp_cli.commands.loading import load_teacher, share_teacher
    from firp_cli.decoding.tree import default_tree, parse_tree
    from firp_cli.evaluation.bench import LoadedPredictor, choose_methods, predictor_names
    from firp_cli.predictors.registry import load_predictor, predictor_folder, read_config

    if predictors:
        folders = list(dict.fromkeys(predictor_folder(name) for name in predictors))
    else:
        folders = _embedded_for(model, wanted)
        say(f"no predictor named: {'the embedded ones are measured' if folders else 'only the baselines are measured'}")
    configs = [read_config(folder) for folder in folders]
    kinds = [str(config["predictor"].get("kind")) for config in configs]
    by_name = dict(zip(predictor_names(list(zip(kinds, folders, strict=True))), folders, strict=True))
    names = choose_methods(wanted, list(by_name))
    for name, kind in zip(by_name, kinds, strict=True):
        if settings.ranks > 1 and name in names and kind != "speed":
            raise UsageError(
                f"--gpus spreads a pipeline over devices; {name} decodes on one: leave it out of --methods"
            )
    pipelines = [folder for kind, folder in zip(kinds, folders, strict=True) if kind == "speed"]
    device = None if settings.rank == 0 else "cpu"  # other ranks keep a part only, which goes to their device
    loaded_teacher = load_teacher(model, folders[0] if folders else None, dtype, device)
    if settings.rank > 0:
        share_teacher(loaded_teacher, pipelines[0], settings.rank, settings.ranks)
    loaded = {}
    for name in names:
        if name in by_name:
            folder = by_name[name]
            predictor = load_predictor(folder, loaded_teacher, force)
            spec = None
            if not predictor.pipeline:
                spec = parse_tree(tree, predictor.steps) if tree else default_tree(folder, predictor)
            loaded[name] = LoadedPredictor(predictor, spec, folder)
    return names, loaded_teacher, loaded


def _embedded_for(model: str | None, wanted: list[str] | None) -> list[Path]:
    """The embedded predictors to measure where none is named: all of the teacher's; the default teacher's, or the one's
    whose predictors the methods name, where no teacher is named either.
    """
    from firp_cli.predictors.registry import read_config

    by_teacher: dict[str, dict[str, Path]] = {}
    for kind, folder in embedded_predictors().items():
        by_teacher.setdefault(str(read_config(folder)["teacher"]["name"]), {})[kind] = folder
    if model is None and wanted:
        asked = [name for name in wanted if name not in ("ar", "hf")]
        fitting = [name for name, kinds in by_teacher.items() if asked and set(asked) <= set(kinds)]
        model = fitting[0] if fitting else None
    return list(by_teacher.get(model or DEFAULT_TEACHER, {}).values())


def load_bench_prompts(datasets: str, data_dir: str | None, limit: int | None, teacher: Teacher) -> list[BenchPrompt]:
    """Encoded prompts of one data set, or of several named with commas; at most `limit` of each."""
    return _encode(_find_prompts(datasets, data_dir, limit), teacher)


def _find_prompts(datasets: str, data_dir: str | None, limit: int | None) -> list[tuple[str, Prompt]]:
    """(data set, prompt) pairs: the first ones, or, where they have categories, as many of each category."""
    from firp_cli.data.prompts import load_prompts
    from firp_cli.evaluation.bench import spread

    count = limit or DEFAULT_LIMIT
    prompts = []
    for name in dict.fromkeys(part.strip() for part in datasets.split(",") if part.strip()):
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
    from firp_cli.data.conversations import encode_prompt
    from firp_cli.evaluation.bench import BenchPrompt

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
    from firp_cli.provenance import write_atomically, write_json
    from firp_cli.records import plain
    from firp_cli.reports.figures import bench_figures
    from firp_cli.reports.html import bench_html
    from firp_cli.reports.tables import bench_csv, bench_markdown

    write_json(folder / "bench.json", plain(report))
    figures = bench_figures(report)
    files = {f"{name}.png": image for name, image in figures.items()}
    files["bench.csv"] = bench_csv(report).encode()
    files["bench.md"] = bench_markdown(report, list(figures)).encode()
    files["bench.html"] = bench_html(report, figures).encode()
    for name, content in files.items():
        write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]


def _print(report: BenchReport, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.pipeline import pipeline_note
    from firp_cli.reports.tables import bench_tables, lossless_note, settings_line

    console = Console(highlight=False)
    console.print(settings_line(report), markup=False)
    console.print(bench_tables(report))
    for note in (pipeline_note(report), lossless_note(report)):
        if note:
            console.print(note, markup=False)
    console.print(f"report: {folder / 'bench.html'}", markup=False, soft_wrap=True)
