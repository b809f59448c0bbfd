"""`firp store`: show and check hidden-state stores, and make stores from stores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.collect import parse_layers
from firp_cli.cli.command import Command
from firp_cli.cli.terminal import Json, Verbose, print_json, progress_bar, quiet_libraries
from firp_cli.errors import FingerprintError, StoreError, UsageError
from firp_cli.files import check_output
from firp_cli.machine import readable_bytes

if TYPE_CHECKING:
    from firp_cli.store.verify import StoreFault

MOST_PARTS = 1000

store = typer.Typer(help="Show and check stores, make stores from stores.", no_args_is_help=True)

StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `firp collect` filled.")]
Output = Annotated[Path, typer.Option("--output", help="Folder of the new store.")]
Kept = Annotated[str | None, typer.Option("--layers", help="Layers to keep, as 2,4, or none. Default: all.")]
Resume = Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")]


@contextmanager
def _refusing() -> Iterator[None]:
    """Let an unusable store exit with 2, like all bad input; `verify` exits with 1 for a store with faults."""
    try:
        yield
    except (StoreError, FingerprintError) as error:
        error.exit_code = 2
        raise


@store.command("info", cls=Command)
def info(folder: StoreFolder, as_json: Json = False, verbose: Verbose = False) -> None:
    """Show contents, size and origin of a store, also of an unfinished or damaged one."""
    quiet_libraries(verbose)
    from firp_cli.store.verify import describe_store

    with _refusing():
        found = describe_store(folder)
    if as_json:
        print_json(found)
        return
    for name, text in _info_lines(found):
        typer.echo(f"{name:<16} {text}")


def _info_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    marks, settings, lengths = found["fingerprints"], found["settings"], found["lengths"]
    kept = ", ".join(map(str, found["layers"])) or "none"
    answers = f", {found['response_tokens']:,} of answers" if found["response_tokens"] is not None else ""
    each = f", {found['bytes_per_token']:,.1f} bytes per token" if found["bytes_per_token"] else ""
    yield "store", f"{found['store']}, {'complete' if found['complete'] else 'not complete'}"
    yield "teacher", f"{found['teacher']['name']}, weights {marks['teacher']}"
    yield "tokenizer", f"{marks['tokenizer']}, chat template {marks['chat template']}"
    yield "states", f"layers {kept} and the final state, {found['hidden_size']} wide, {found['dtype']}"
    yield "conversations", f"{found['conversations']:,} of {settings['dataset']}"
    yield "tokens", f"{found['tokens']:,}{answers}"
    yield "disk", f"{readable_bytes(found['bytes'])} in {found['shards']} shards{each}"
    if lengths:
        shares = ", ".join(f"{name} {lengths[name]:,}" for name in ("shortest", "median", "p90", "longest"))
        yield "lengths", f"{shares} tokens, {lengths['mean']:,.1f} on average"
    sources = ", ".join(origin["folder"] for origin in settings.get("sources", []))
    yield "made by", f"{found['made_by']}{f' from {sources}' if sources else ''}"
    for line in found["missing"]:
        yield "missing", line


@store.command("verify", cls=Command)
def verify(
    folder: StoreFolder,
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher that should have made it: model folder, hub id, .gguf file or known name."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check a whole store: checksums, layout, offsets, NaN, loss masks. Exits with 1 when there are faults."""
    quiet_libraries(verbose)
    from firp_cli.store.reader import read_manifest
    from firp_cli.store.verify import verify_store

    with _refusing():
        manifest = read_manifest(folder)
        faults = _teacher_faults(folder, manifest, teacher) if teacher else []
        with progress_bar("verifying (bytes)") as progress:
            faults += verify_store(folder, progress)
    shards = manifest["shards"]
    if as_json:
        counts = {key: sum(shard[key] for shard in shards) for key in ("bytes", "sequences", "tokens")}
        listed = [asdict(fault) for fault in faults]
        print_json({"store": str(folder), "sound": not faults, "faults": listed, "shards": len(shards), **counts})
    elif faults:
        for fault in faults:
            typer.echo(f"{fault.file}: {fault.fault}")
        for remedy in dict.fromkeys(fault.remedy for fault in faults):
            typer.echo(f"firp: {remedy}", err=True)
    else:
        whose = f", made by {teacher}" if teacher else ""
        typer.echo(
            f"{folder}: sound, {len(shards)} shards, {readable_bytes(sum(shard['bytes'] for shard in shards))}{whose}"
        )
    if faults:
        raise typer.Exit(1)


def _teacher_faults(folder: Path, manifest: dict[str, Any], name: str) -> list[StoreFault]:
    """Return the differences between the fingerprints of a store and those of a teacher in the store's dtype."""
    from firp_cli.collecting.collect_store import fingerprints
    from firp_cli.config import TeacherConfig
    from firp_cli.store.reader import MANIFEST
    from firp_cli.store.verify import StoreFault
    from firp_cli.teacher.load import load_teacher

    made_by = manifest["teacher"]
    config = {"model": name, "dtype": made_by.get("dtype", "auto"), "looped": made_by.get("looped")}
    loading = made_by.get("loading", {})
    config |= {key: loading[key] for key in ("chat_template", "template_options") if key in loading}
    now = fingerprints(load_teacher(TeacherConfig.model_validate(config), "cpu", check=False))
    remedy = f"name the teacher that made {folder} ({made_by['name']}), or collect a store for {name}"
    return [
        StoreFault(MANIFEST, f"made with another {mark} (store: {value}, {name}: {now.get(mark)})", remedy)
        for mark, value in manifest["fingerprints"].items()
        if now.get(mark) != value
    ]


@store.command("merge", cls=Command)
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="STORE STORE...", help="Stores of one teacher and dtype.")],
    output: Output,
    layers: Kept = None,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Join the conversations of several stores in one, in the order of the stores."""
    kept = parse_layers(layers)
    quiet_libraries(verbose)
    from firp_cli.store.tools import merge_stores

    check_output(output)
    with _refusing(), progress_bar("merging") as progress:
        summary = merge_stores(output, sources, layers=kept, resume=resume, progress=progress)
    _print([summary], as_json)


@store.command("split", cls=Command)
def split(
    folder: StoreFolder,
    parts: Annotated[
        str, typer.Option(help="Shares as 0.9,0.1, numbers of conversations as 900,100, or N for N equal parts.")
    ],
    output: Annotated[
        list[Path], typer.Option(help="Folder in which part-0, part-1, ... are made; or one folder for each part.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the random assignment of conversations to parts.")] = 0,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Divide the conversations of a store among several stores."""
    shares = _parse_parts(parts)
    quiet_libraries(verbose)
    from firp_cli.store.reader import MANIFEST
    from firp_cli.store.tools import split_store

    for place in output:
        check_output(place)
    with _refusing(), progress_bar("splitting (tokens)") as progress:
        if len(output) == 1:
            if (output[0] / MANIFEST).is_file():
                raise StoreError(f"{output[0]} is a store itself; give another --output for the parts")
            output = [output[0] / f"part-{number}" for number in range(len(shares))]
        summaries = split_store(folder, output, shares, seed=seed, resume=resume, progress=progress)
    _print(summaries, as_json)


def _parse_parts(text: str) -> list[float]:
    """Return two or more shares or numbers, as `assign_parts` takes them."""
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(math.isfinite(part) and part > 0 for part in parts):
        raise UsageError(f"--parts takes shares as 0.9,0.1, numbers of conversations, or N equal parts; got {text!r}")
    if len(parts) > 1:
        return parts
    if parts[0] != int(parts[0]) or not 2 <= parts[0] <= MOST_PARTS:
        raise UsageError(f"--parts {text}: one number is the count of equal parts, 2 to {MOST_PARTS}")
    return [1 / parts[0]] * int(parts[0])


@store.command("convert", cls=Command)
def convert(
    folder: StoreFolder,
    output: Output,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, int8 or float8. Default: the store's.")
    ] = None,
    layers: Kept = None,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the same conversations in another dtype, with fewer layers, or both."""
    kept = parse_layers(layers)
    quiet_libraries(verbose)
    from firp_cli.store.tools import convert_store

    check_output(output)
    with _refusing(), progress_bar("converting (tokens)") as progress:
        summary = convert_store(folder, output, dtype=dtype, layers=kept, resume=resume, progress=progress)
    _print([summary], as_json)


def _print(summaries: list[dict[str, Any]], as_json: bool) -> None:
    """Print one summary, or a list of them."""
    if as_json:
        print_json(summaries[0] if len(summaries) == 1 else summaries)
        return
    for summary in summaries:
        kept = ", ".join(map(str, summary["layers"])) or "none"
        written = summary["shards_written"]
        how = "nothing was missing" if not written else f"{written} of {summary['shards']} shards written"
        typer.echo(
            f"{summary['store']}: {summary['conversations']:,} conversations, {summary['tokens']:,} tokens, "
            f"layers {kept} and the final state, {summary['dtype']}, {readable_bytes(summary['bytes'])}; {how}"
        )
