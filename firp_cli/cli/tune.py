"""`firp tune`: measures what steps cost on this machine and which draft trees pay, and writes them beside the
predictor.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.cli.terminal import (
    Attention,
    Compiled,
    Force,
    Graphs,
    Json,
    Layers,
    Model,
    Threads,
    Verbose,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
)
from firp_cli.config import Precision
from firp_cli.errors import UsageError

if TYPE_CHECKING:
    from firp_cli.predictors.base import Predictor
    from firp_cli.teacher.teacher import Teacher
    from firp_cli.tune_results import TuneReport
    from firp_cli.tuning.calibration import TuneSettings

DEFAULT_LIMIT = 64
DEFAULT_BATCHES = "1,2,4,8,16,32"


def tune(
    predictor: Annotated[str, typer.Argument(help="Predictor folder or embedded name.")] = "firp",
    *,
    dataset: Annotated[
        str | None,
        typer.Option(help="Calibration prompts: known name, hub id, .jsonl file. Default: what it was trained on."),
    ] = None,
    split: Annotated[str, typer.Option(help="Its last prompts are taken; never the split that bench decodes.")] = (
        "train"
    ),
    data_dir: Annotated[str | None, typer.Option(help="Where NAME/SPLIT.jsonl lies. Default: $FIRP_DATA_DIR.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Calibration prompts.")] = DEFAULT_LIMIT,
    teacher: Model = None,
    dtype: Annotated[Precision, typer.Option(help="The teacher's numbers. auto: as its config says.")] = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Each gets a tree of its own.")] = DEFAULT_BATCHES,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the K/V cache. Default: the middle of an answer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="New tokens of a prompt at most.")] = 128,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Rows of a step at most. Default: 64, on CUDA 256.")] = (
        None
    ),
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Applied after temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    trial: Annotated[
        bool, typer.Option(help="Decode up to a quarter of the prompts, for about 90 s, to check predictions.")
    ] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Times that the trial decodes, at most.")] = 2,
    sittings: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of timing whole steps, for each batch size. Default: on a CPU several."),
    ] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure this machine's costs anew.")] = False,
    tree_file: Annotated[Path | None, typer.Option(help="Default: tree.json in the predictor's folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/tune-...")] = None,
    threads: Threads = None,
    layers: Layers = "lean",
    attention: Attention = "auto",
    graphs: Graphs = True,
    compiled: Compiled = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose the draft trees that pay on this machine; write tree.json and a report with figures."""
    quiet_libraries(verbose)
    sizes = _batches(batch_sizes)
    from firp_cli.api.loading import LayerChoice, load_pair
    from firp_cli.decoding.engine import EngineOptions
    from firp_cli.machine import set_threads
    from firp_cli.predictors.folder import predictor_folder
    from firp_cli.tuning.calibration import TuneSettings

    set_threads(threads)
    choice = LayerChoice(layers, compiled)
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
        timing_rounds=sittings,
        engine=EngineOptions(attention=attention, graphs=graphs),
    )
    folder = predictor_folder(predictor)
    name = dataset or _trained_on(folder)
    target = tree_file or folder / "tree.json"
    _check_writable(target)
    prompts = _prompts(name, split, data_dir, limit)
    loaded, drafting, _ = load_pair(predictor, teacher, force, dtype, choice=choice)
    report = _tuned(loaded, drafting, folder, prompts, f"{name}, {split}", settings)
    _write_trees(target, report, folder)
    _publish(report, target, output or Path("runs") / f"tune-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}", as_json)


def _publish(report: TuneReport, target: Path, output: Path, as_json: bool) -> None:
    """Write the report's files and print it."""
    write_report(report, output)
    if as_json:
        from firp_cli import results

        print_json(results.as_json(report))
    else:
        _print(report, target, output)


def _tuned(
    teacher: Teacher,
    predictor: Predictor,
    folder: Path,
    prompts: list[list[dict[str, str]]],
    dataset: str,
    settings: TuneSettings,
) -> TuneReport:
    """Measure and choose, telling the user how far it is."""
    from firp_cli.data.chat import encode_prompt
    from firp_cli.decoding.tree_spec import default_tree
    from firp_cli.tuning.tuner import tune as choose

    with progress_bar("measuring passes") as progress:
        report = choose(
            teacher,
            predictor,
            [encode_prompt(messages, teacher.tokenizer) for messages in prompts],
            settings,
            dataset=dataset,
            default=default_tree(folder, predictor),
            tell=say,
            progress=progress,
        )
    report.predictor["folder"] = str(folder)
    return report


def _batches(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers. Raises UsageError."""
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--batch-sizes takes numbers with commas, such as {DEFAULT_BATCHES}, not {text!r}") from None
    if sizes[0] < 1:
        raise UsageError(f"batch sizes must be at least 1, got {sizes[0]}")
    return sizes


def _trained_on(folder: Path) -> str:
    """The data set of the predictor's recipe, else the embedded one."""
    from firp_cli.recipe import load_recipe

    path = folder / "recipe.yaml"
    return (load_recipe(str(path)).data.dataset if path.is_file() else None) or DEFAULT_TEACHER


def _check_writable(path: Path) -> None:
    """Refuse before anything is measured what could not be written in the end. Raises UsageError."""
    import os

    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {why}: --tree-file FILE writes the trees elsewhere")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: --tree-file takes a file")


def _prompts(name: str, split: str, data_dir: str | None, limit: int) -> list[list[dict[str, str]]]:
    """The last prompts of the split: training takes the first ones, and a bench the first ones of another split.

    Raises UsageError for sets that have nothing but what bench decodes, DatasetError.
    """
    from firp_cli.data.datasets import KNOWN, dataset_names, load_prompts

    names = dataset_names(name)
    for one in names:
        testing = one in KNOWN and "train" not in KNOWN[one].splits
        if split == "test" or testing:
            have = f"{one} has test prompts only" if testing else "--split test"
            raise UsageError(
                f"{have}: a tree that is tuned on what bench decodes proves nothing; take other prompts (--dataset)"
            )
    share = -(-limit // len(names))
    return [prompt.messages for one in names for prompt in load_prompts(one, data_dir, None, split)[-share:]]


def _write_trees(path: Path, report: TuneReport, folder: Path) -> None:
    """Put the entries into tree.json; those of other machines and batch sizes stay."""
    from firp_cli.decoding.tree_file import update_trees
    from firp_cli.files import write_json

    old = path if path.is_file() else folder / "tree.json"
    write_json(path, update_trees(old, report.entries))


def write_report(report: TuneReport, folder: Path) -> None:
    """tune.json, tune.md, tune.html and the figures as PNG, each whole or absent."""
    from firp_cli.files import write_atomically, write_json
    from firp_cli.reports.tuning import tune_figures, tune_html, tune_markdown
    from firp_cli.results import as_json

    write_json(folder / "tune.json", as_json(report))
    figures = tune_figures(report)
    files = {f"{name}.png": image for name, image in figures.items()}
    files["tune.md"] = tune_markdown(report, list(figures)).encode()
    files["tune.html"] = tune_html(report, figures).encode()
    for name, content in files.items():
        write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]


def _print(report: TuneReport, trees: Path, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.tuning import tune_tables

    console = Console(highlight=False)
    console.print(tune_tables(report))
    console.print(f"trees: {trees}", markup=False, soft_wrap=True)
    console.print(f"report: {folder / 'tune.html'}", markup=False, soft_wrap=True)
