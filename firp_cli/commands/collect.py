"""`firp collect`: fills a hidden-state store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.commands.terminal import (
    Json,
    Verbose,
    main_process,
    print_json,
    progress_bar,
    quiet_libraries,
    split_recipe,
)
from firp_cli.errors import UsageError
from firp_cli.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from firp_cli.teacher.stack import Teacher


def collect(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and overrides of its fields."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder, hub id or embedded teacher.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set name, hub id or .jsonl file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with NAME/SPLIT.jsonl (or FIRP_DATA_DIR).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Conversations at most.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to keep, as 2,4. Default: those the recipe's predictor reads.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The store. Default: the recipe's, else stores/DATASET.")] = None,
    regenerate: Annotated[bool, typer.Option("--regenerate", help="Let the teacher write the answers.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Finish an unfinished store, rebuild damaged shards.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print disk and time needed; start nothing.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Devices. One, for now.")] = 1,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the teacher over conversations and keep its hidden states in a store."""
    options = {
        "teacher.model": teacher,
        "data.dataset": dataset,
        "data.data_dir": str(data_dir) if data_dir else None,
        "data.limit": limit,
        "data.regenerate": regenerate or None,
        "store": str(output) if output else None,
    }
    name, overrides = split_recipe(arguments or [])
    overrides += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    recipe = load_recipe(name, overrides)
    if gpus > 1:
        raise UsageError(f"collect runs on one device for now, not {gpus}; leave --gpus out")
    quiet_libraries(verbose)
    chosen = parse_layers(layers)
    folder = Path(recipe.store or default_store(recipe.data.dataset))
    _check_before_loading(recipe, folder, resume, estimate)
    from firp_cli.teacher.stack import Teacher

    model = Teacher.load(recipe.teacher)
    model.fuse()  # answers and states come faster; where it does not fit the library's layers stay
    wanted = chosen if chosen is not None else default_layers(recipe, model)
    if estimate:
        figures = _estimate(model, recipe, wanted, folder)
        print_json(figures) if as_json else _print_estimate(figures, folder)
        return
    summary = _collect(model, recipe, wanted, folder, resume)
    print_json(summary) if as_json else _print_summary(summary, name)


def default_store(dataset: str) -> str:
    """`stores/NAME` for a data set's name, hub id or file."""
    return f"stores/{Path(dataset).stem if dataset.endswith(('.jsonl', '.json')) else dataset.replace('/', '--')}"


def default_layers(recipe: Recipe, teacher: Teacher) -> list[int]:
    """What the recipe's predictor reads; the middle layer where there is no predictor."""
    if recipe.predictor is None:
        return [max(1, teacher.num_layers // 2)]
    return list(recipe.predictor.required_layers(teacher))


def parse_layers(text: str | None) -> list[int] | None:
    """`2,4` or `none` as typed; None where nothing was. Raises UsageError."""
    if text == "none":
        return []
    try:
        return None if text is None else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--layers takes numbers with commas between them, as 2,4; got {text!r}") from None


def _check_before_loading(recipe: Recipe, folder: Path, resume: bool, estimate: bool) -> None:
    """What can be refused before a large teacher is read from disk."""
    from firp_cli.collecting.corpus import check_dataset
    from firp_cli.collecting.vllm_process import check_responder
    from firp_cli.data.store_writer import check_target

    if not estimate and main_process():  # the others would find the lock that the first may hold by now
        check_target(folder, resume)
    check_responder(recipe)
    check_dataset(recipe.data)


def _estimate(teacher: Teacher, recipe: Recipe, layers: list[int], folder: Path) -> dict[str, Any]:
    from firp_cli.collecting.capture import check_layers, stored_dtype
    from firp_cli.collecting.estimate import estimate
    from firp_cli.commands.responders import make_responder

    kept = check_layers(layers, teacher)
    dtype, responder = stored_dtype(teacher, recipe.data), make_responder(recipe, teacher)
    return estimate(teacher, recipe.data, kept, dtype, folder, responder=responder)


def _collect(teacher: Teacher, recipe: Recipe, layers: list[int], folder: Path, resume: bool) -> dict[str, Any]:
    from firp_cli.collecting.capture import collect_store
    from firp_cli.commands.responders import make_responder

    return collect_store(
        teacher,
        recipe.data,
        layers,
        folder,
        resume=resume,
        progress=progress_bar,
        recipe=recipe.model_dump(),
        responder=make_responder(recipe, teacher),
    )


def _print_estimate(figures: dict[str, Any], folder: Path) -> None:
    if figures["upper_bound"]:
        counted = f"at most, from {figures['sampled_conversations']} prompts and answers of full length"
    elif figures["exact"]:
        counted = "counted"
    else:
        counted = f"extrapolated from {figures['sampled_conversations']}"
    kept = ", ".join(map(str, figures["layers"])) or "none"
    typer.echo(f"teacher          {figures['teacher']}, layers {kept} and the final state, {figures['dtype']}")
    typer.echo(f"conversations    {figures['conversations']:,} of {figures['dataset']}")
    typer.echo(f"tokens           {figures['tokens']:,} ({counted})")
    typer.echo(f"bytes per token  {figures['bytes_per_token']:,}")
    typer.echo(
        f"disk             {size(figures['total_bytes'])} needed, {size(figures['free_bytes'])} free at {folder}"
    )
    answering = f", {duration(figures['answering_seconds'])} of it answering" if figures["answering_seconds"] else ""
    rate = f"{figures['tokens_per_second']:,.0f} tokens/s measured on a sample"
    typer.echo(f"time             {duration(figures['seconds'])}{answering} ({rate})")
    if figures["total_bytes"] > figures["free_bytes"]:
        typer.echo("this does not fit: lower data.limit, collect fewer layers, or set data.store_dtype=int8")
    typer.echo("nothing was started")


def _print_summary(summary: dict[str, Any], recipe: str | None) -> None:
    kept = ", ".join(map(str, summary["layers"])) or "none"
    typer.echo(
        f"{summary['store']}: {summary['conversations']:,} conversations, {summary['tokens']:,} tokens "
        f"({summary['response_tokens']:,} of answers), layers {kept} and the final state, {summary['dtype']}, "
        f"{size(summary['bytes'])} in {summary['shards']} shards"
    )
    if summary["tokens_per_second"] is None:
        typer.echo("nothing was missing: every shard is there and its checksum is right")
    else:
        typer.echo(
            f"{summary['shards_written']} shards written, {summary['tokens_per_second']:,.0f} tokens/s, "
            f"{duration(summary['seconds'])} in all"
        )
    for reason, count in summary["skipped"].items():
        typer.echo(f"skipped {count:,}: {reason}")
    if "answers" in summary:
        from firp_cli.commands.responders import account_line

        typer.echo(account_line(summary["answers"]))
    typer.echo(f"next: firp train {recipe or 'RECIPE'} --store {summary['store']}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
