"""`firp prompts`: user messages that a chat model writes itself, as a .jsonl file to collect from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firp_cli.cli.terminal import (
    Seed,
    Threads,
    TopP,
    Verbose,
    command_text,
    interruption,
    progress_bar,
    quiet_libraries,
)
from firp_cli.machine import set_threads


def prompts(
    teacher: Annotated[str, typer.Argument(help="Model folder, hub id, .gguf file or known name.")],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write; it must not exist.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts to write.")] = 1000,
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of a prompt; longer ones are left out.")
    ] = 256,
    system: Annotated[
        str | None, typer.Option(help="System message that names a subject, to write prompts on it; not kept in them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts written at once.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    threads: Threads = None,
    verbose: Verbose = False,
) -> None:
    """Let a chat model write prompts, for training data without a data set."""
    quiet_libraries(verbose)
    set_threads(threads)
    from firp_cli.api.collect_run import write_prompts
    from firp_cli.collecting.own_prompts import PromptSettings

    following = command_text("collect", "--teacher", teacher, "--dataset", output, "--regenerate")
    settings = PromptSettings(max_new_tokens, temperature, top_p, seed, batch_size, system)

    def interrupted() -> str:
        if not output.exists():
            return "firp: interrupted before the first prompt; nothing is kept"
        kept = output.read_bytes().count(b"\n")
        return f"firp: interrupted; {kept} of {count} prompts are in {output}\nnext: {following}"

    with interruption(interrupted), progress_bar("writing prompts") as progress:
        written = write_prompts(teacher, output, count, settings, progress)
    short = "" if written == count else f" of {count}: the others were empty, cut or the same"
    typer.echo(f"{written}{short} prompts -> {output}\nnext: {following}")
