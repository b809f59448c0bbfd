"""`firp collect`: fills a hidden-state store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import (
    Json,
    Verbose,
    agreed,
    command_line,
    print_json,
    progress_bar,
    quiet_libraries,
    resumable,
    say,
    split_recipe,
)
from firp_cli.config import Recipe
from firp_cli.errors import UsageError
from firp_cli.machine import is_main, readable_bytes
from firp_cli.recipe import load_recipe

if TYPE_CHECKING:
    from firp_cli.teacher.teacher import Teacher


def collect(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and overrides of its fields."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder, hub id, .gguf file or known name.")] = None,
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
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks to start; on a CPU they share the cores.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Machines to start on, in DeepSpeed's format.")] = None,
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
    from firp_cli.distributed.launch import adopt_scheduler, launch, ranks_wanted, relayed_errors

    adopt_scheduler()
    with resumable(), relayed_errors():
        recipe = agreed(lambda: load_recipe(name, overrides))
        quiet_libraries(verbose)
        chosen = agreed(lambda: parse_layers(layers))
        folder = Path(recipe.store or default_store(recipe.data.dataset))
        agreed(lambda: _check_before_loading(recipe, folder, resume, estimate))
        if estimate:
            if is_main():
                figures = _estimate(recipe, chosen, folder, *ranks_wanted(gpus, hostfile))
                print_json(figures) if as_json else _print_estimate(figures, folder)
            return
        if launch(gpus, str(hostfile) if hostfile else None, command_line(context)):
            return
        summary = _collect(recipe, chosen, folder, resume)
        if is_main():
            print_json(summary) if as_json else _print_summary(summary, name)


def default_store(dataset: str) -> str:
    """`stores/NAME` for a data set's name, hub id or file."""
    from firp_cli.data.datasets import dataset_names

    names = [
        Path(name).stem if name.endswith((".jsonl", ".json")) else name.replace("/", "--")
        for name in dataset_names(dataset)
    ]
    return f"stores/{'-'.join(names)}"


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
    from firp_cli.collecting.vllm import check_responder
    from firp_cli.store.writer import check_target

    if not estimate and is_main():  # the others would find the lock that the first may hold by now
        check_target(folder, resume)
    check_responder(recipe)
    check_dataset(recipe.data)


def _load(recipe: Recipe, chosen: list[int] | None) -> tuple[Teacher, list[int]]:
    """The teacher, and the layers to be kept."""
    from firp_cli.api.loading import teacher_line
    from firp_cli.distributed.sharding import load_for_ranks
    from firp_cli.teacher.check import use_lean_layers

    teacher = load_for_ranks(recipe.teacher)
    say(teacher_line(teacher.loaded_weights))
    use_lean_layers(teacher)  # answers and states come faster; where it does not fit the library's layers stay
    return teacher, chosen if chosen is not None else default_layers(recipe, teacher)


def _estimate(recipe: Recipe, chosen: list[int] | None, folder: Path, ranks: int, neighbours: int) -> dict[str, Any]:
    """Figures for `ranks` ranks, `neighbours` on each machine: measured with the threads that one of them will have."""
    from firp_cli.collecting.collect_store import check_layers, stored_dtype
    from firp_cli.collecting.engine_responder import make_responder
    from firp_cli.collecting.estimate import estimate
    from firp_cli.machine import cores_of_rank, set_threads

    set_threads(cores_of_rank(neighbours) if neighbours > 1 else None)
    alone = recipe.teacher.model_copy(update={"sharding": "none"})  # no other rank takes part
    teacher, layers = _load(recipe.model_copy(update={"teacher": alone}), chosen)
    kept = check_layers(layers, teacher)
    dtype, responder = stored_dtype(teacher, recipe.data), make_responder(recipe, teacher)
    return estimate(teacher, recipe.data, kept, dtype, folder, responder, ranks)


def _collect(recipe: Recipe, chosen: list[int] | None, folder: Path, resume: bool) -> dict[str, Any]:
    from firp_cli.collecting.collect_store import collect_store
    from firp_cli.collecting.engine_responder import make_responder

    teacher, layers = agreed(lambda: _load(recipe, chosen))
    return collect_store(
        teacher,
        recipe.data,
        layers,
        folder,
        resume=resume,
        progress=progress_bar,
        recipe=recipe.model_dump(),
        responder=agreed(lambda: make_responder(recipe, teacher)),
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
        f"disk             {readable_bytes(figures['total_bytes'])} needed, "
        f"{readable_bytes(figures['free_bytes'])} free at {folder}"
    )
    answering = f", {duration(figures['answering_seconds'])} of it answering" if figures["answering_seconds"] else ""
    rate = f"{figures['rank_tokens_per_second']:,.0f} tokens/s measured on a sample"
    if figures["ranks"] > 1:
        rate += f", times {figures['ranks']} ranks: an estimate"
    typer.echo(f"time             {duration(figures['seconds'])}{answering} ({rate})")
    if figures["total_bytes"] > figures["free_bytes"]:
        typer.echo("this does not fit: lower data.limit, collect fewer layers, or set data.store_dtype=int8")
    typer.echo("nothing was started")


def _print_summary(summary: dict[str, Any], recipe: str | None) -> None:
    kept = ", ".join(map(str, summary["layers"])) or "none"
    typer.echo(
        f"{summary['store']}: {summary['conversations']:,} conversations, {summary['tokens']:,} tokens "
        f"({summary['response_tokens']:,} of answers), layers {kept} and the final state, {summary['dtype']}, "
        f"{readable_bytes(summary['bytes'])} in {summary['shards']} shards"
    )
    if summary["tokens_per_second"] is None:
        typer.echo("nothing was missing: every shard is there and its checksum is right")
    else:
        by = f" by {summary['ranks']} ranks" if summary["ranks"] > 1 else ""
        typer.echo(
            f"{summary['shards_written']} shards written{by}, {summary['tokens_per_second']:,.0f} tokens/s, "
            f"{duration(summary['seconds'])} in all"
        )
        if by:
            typer.echo("tokens by rank: " + ", ".join(f"{count:,}" for count in summary["rank_tokens"]))
    for reason, count in summary["skipped"].items():
        typer.echo(f"skipped {count:,}: {reason}")
    if "answers" in summary:
        from firp_cli.collecting.engine_responder import account_line

        typer.echo(account_line(summary["answers"]))
    typer.echo(f"next: firp train {recipe or 'RECIPE'} --store {summary['store']}")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
