"""`firp collect`: fill a hidden-state store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.cli.terminal import (
    Json,
    Verbose,
    agreed,
    command_line,
    command_text,
    interruption,
    override,
    print_json,
    progress_bar,
    quiet_libraries,
    refuse_both,
    split_recipe,
)
from firp_cli.errors import UsageError
from firp_cli.machine import cores_of_rank, is_main, readable_bytes, readable_seconds, set_threads
from firp_cli.recipe import load_recipe

if TYPE_CHECKING:
    from firp_cli.api.collect_run import CollectRun
    from firp_cli.collecting.collect_store import CollectSummary
    from firp_cli.collecting.estimate import CollectEstimate


def collect(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and overrides of its fields."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder, hub id, .gguf file or known name.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Known name, hub id (ID:CONFIG), file or folder.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with NAME/SPLIT.jsonl (or FIRP_DATA_DIR).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most conversations.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to keep, as 2,4, or none. Default: those the recipe's predictor reads.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the store. Default: the recipe's, else stores/DATASET.")
    ] = None,
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
    refuse_both(options, overrides)
    overrides += [override(key, value) for key, value in options.items() if value is not None]
    from firp_cli.distributed.launch import adopt_scheduler, launch, ranks_wanted, relayed_errors

    adopt_scheduler()
    with interruption(), relayed_errors():
        run = agreed(lambda: _prepare(name, overrides, layers, resume, estimate, verbose))
        if estimate:
            if is_main():
                _estimate(run, *ranks_wanted(gpus, hostfile), as_json)
            return
        if launch(gpus, str(hostfile) if hostfile else None, command_line(context)):
            return
        from firp_cli.api.collect_run import run_collect

        summary = run_collect(run, resume, progress_bar)
        if is_main():
            print_json(summary.as_json()) if as_json else _print_summary(summary, _next(run, summary, name, overrides))


def parse_layers(text: str | None) -> list[int] | None:
    """Return the layers of `2,4` or `none`; None for no text. Raises UsageError."""
    if text == "none":
        return []
    try:
        return None if text is None else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--layers takes numbers separated by commas, as 2,4; got {text!r}") from None


def _prepare(
    name: str | None, overrides: list[str], layers: str | None, resume: bool, estimating: bool, verbose: bool
) -> CollectRun:
    """Resolve the recipe and check what can be checked before a teacher is loaded."""
    recipe, kept = load_recipe(name, overrides), parse_layers(layers)
    quiet_libraries(verbose)
    from firp_cli.api.collect_run import check_collect, resolve_collect

    run = resolve_collect(recipe, layers=kept)
    check_collect(run, resume, estimating)
    return run


def _estimate(run: CollectRun, ranks: int, local_ranks: int, as_json: bool) -> None:
    """Print an estimate for `ranks` ranks, measured with the threads of one of `local_ranks` on a machine."""
    from firp_cli.api.estimate_run import run_estimate

    set_threads(cores_of_rank(local_ranks) if local_ranks > 1 else None)
    figures = run_estimate(run, ranks)
    print_json(figures.as_json()) if as_json else _print_estimate(figures, run.store)


def _print_estimate(figures: CollectEstimate, folder: Path) -> None:
    if not figures.sampled_conversations:
        counted = "at most: not counted"
    elif figures.upper_bound:
        counted = f"at most, from {figures.sampled_conversations} prompts and answers of full length"
    elif figures.exact:
        counted = "counted"
    else:
        counted = f"extrapolated from {figures.sampled_conversations}"
    typer.echo(f"teacher          {figures.teacher}, {_layer_names(figures.layers)}, {figures.dtype}")
    typer.echo(f"conversations    {figures.conversations:,} of {figures.dataset}")
    typer.echo(f"tokens           {figures.tokens:,} ({counted})")
    typer.echo(f"bytes per token  {figures.bytes_per_token:,}")
    typer.echo(
        f"disk             {readable_bytes(figures.total_bytes)} needed, "
        f"{readable_bytes(figures.free_bytes)} free at {folder}"
    )
    answering = f", {readable_seconds(figures.answering_seconds)} of it answering" if figures.answering_seconds else ""
    how = "computed" if figures.computed else "measured on a sample"
    rate = f"{figures.rank_tokens_per_second:,.0f} tokens/s {how}"
    if figures.ranks > 1:
        rate += f", times {figures.ranks} ranks: an estimate"
    typer.echo(f"time             {readable_seconds(figures.seconds)}{answering} ({rate})")
    for way in figures.ways:
        typer.echo(f"  {way.name:<15}{'-' if way.seconds is None else readable_seconds(way.seconds)} ({way.note})")
    known = [way for way in figures.ways if way.seconds is not None]
    if len(known) > 1:
        typer.echo(f"cheapest         {min(known, key=lambda way: way.seconds or 0).name}")
    if figures.computed:
        typer.echo(figures.computed)
    if figures.total_bytes > figures.free_bytes:
        typer.echo("this does not fit: lower data.limit, collect fewer layers, or set data.store_dtype=int8")
    typer.echo("nothing was started")


def _next(run: CollectRun, summary: CollectSummary, name: str | None, overrides: list[str]) -> str:
    """Return the command that trains on the new store. It names a predictor that fits where the recipe's does not."""
    words = [*([name] if name else []), *(item for item in overrides if not item.startswith("store="))]
    predictor = run.recipe.predictor
    if predictor is None or not set(predictor.transfer_layers) <= set(summary.layers):
        fitting = ["predictor.kind=medusa", "training.init=random"]
        if summary.layers:
            fitting = ["predictor.kind=firp", f"predictor.layer={summary.layers[0]}"]
        words = [*(words if predictor is None else ()), *fitting]
    return command_text("train", *words, "--store", summary.store)


def _print_summary(summary: CollectSummary, following: str) -> None:
    typer.echo(
        f"{summary.store}: {summary.conversations:,} conversations, {summary.tokens:,} tokens "
        f"({summary.response_tokens:,} of answers), {_layer_names(summary.layers)}, {summary.dtype}, "
        f"{readable_bytes(summary.bytes)} in {summary.shards} shards"
    )
    if summary.tokens_per_second is None:
        typer.echo("nothing was missing: all shards exist and their checksums are right")
    else:
        by = f" by {summary.ranks} ranks" if summary.ranks > 1 else ""
        typer.echo(
            f"{summary.shards_written} shards written{by}, {summary.tokens_per_second:,.0f} tokens/s, "
            f"{readable_seconds(summary.seconds)} in all"
        )
        if by:
            typer.echo("tokens by rank: " + ", ".join(f"{count:,}" for count in summary.rank_tokens))
    for reason, count in summary.skipped.items():
        typer.echo(f"skipped {count:,}: {reason}")
    if summary.answers is not None:
        from firp_cli.collecting.answer import account_line

        typer.echo(account_line(summary.answers))
    typer.echo(f"next: {following}")


def _layer_names(layers: Sequence[int]) -> str:
    return f"layers {', '.join(map(str, layers)) or 'none'} and the final state"
