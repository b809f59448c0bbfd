"""Answers of `firp generate`: streamed text of one prompt, lines of JSON for the prompts of a file."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from firp_cli.cli.terminal import interruption, print_json, progress_bar, say
from firp_cli.errors import OutputError
from firp_cli.files import open_lines, os_reason
from firp_cli.machine import is_main

if TYPE_CHECKING:
    from firp_cli.api.decoder import Decoder, OnText, Prompt
    from firp_cli.api.generate_run import GenerateSettings, Totals
    from firp_cli.data.datasets import Prompt as Row


@dataclass
class Lines:
    """Lines of JSON that are written as they come, to a file or to stdout.

    A line that the file does not take goes to stdout, and so do all after it; `failure` is the reason.

    Attributes:
        kept: lines of an interrupted run in the file; None: it is written anew. written: lines since then.
    """

    output: Path | None
    kept: int | None = None
    written: int = 0
    failure: str = ""

    def __post_init__(self) -> None:
        self._stream: TextIO | None = None
        if self.output is not None and is_main():
            try:
                self._stream = open_lines(self.output, self.kept is not None)
            except OSError as error:
                self.failure = os_reason(error)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; ranks other than the main one write nothing."""
        if not is_main():
            return
        if self._stream is not None:
            try:
                self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._stream.flush()
                self.written += 1
                return
            except OSError as error:
                self.failure, stream, self._stream = os_reason(error), self._stream, None
                with contextlib.suppress(OSError):  # it still holds the line
                    stream.close()
        readable = "utf" in (sys.stdout.encoding or "").lower()
        sys.stdout.write(json.dumps(line, ensure_ascii=not readable) + "\n")
        sys.stdout.flush()

    def release(self) -> None:
        """Close the file: every line in it is whole."""
        if self._stream is not None:
            self._stream.close()

    def close(self) -> None:
        """Close the file. Raises OutputError where it did not take all lines."""
        self.release()
        if self.failure:
            held = f"its first {self.held} lines are kept, " if self.held else ""
            raise OutputError(f"{self.output} cannot be written ({self.failure}): {held}the others are on stdout")

    @property
    def held(self) -> int:
        """Number of whole lines in the file."""
        return (self.kept or 0) + self.written


def answer_one(decoder: Decoder, prompt: str, settings: GenerateSettings, output: Path | None, as_json: bool) -> None:
    """Generate after one prompt: streamed, as JSON, or as a line of a file."""
    from rich.console import Console

    from firp_cli.api.generate_run import Totals, raw_tokens, record

    console = Console()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color

    def show(text: str, drafted: bool) -> None:
        """Write text as it is: rich would change tabs and some characters."""
        sys.stdout.write(typer.style(text, fg="green") if drafted and coloured else text)
        sys.stdout.flush()

    streamed = not as_json and output is None and is_main()
    on_text: OnText | None = show if streamed else None
    given: Prompt = raw_tokens(decoder, prompt) if settings.raw else prompt
    with interruption("\nfirp: interrupted" if streamed else "firp: interrupted"):
        result = decoder.generate(
            given,
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            stop=settings.stop,
            stream=on_text,
        )
    if not is_main():
        return
    if streamed:
        sys.stdout.write("\n")
    if as_json:
        print_json(record(result))
    totals = Totals()
    totals.add([result])
    typer.echo(summary(totals), err=True)
    if output is not None:
        lines = Lines(output)
        lines.write(record(result))
        lines.close()


def answer_file(
    decoder: Decoder,
    path: str,
    rows: list[Row],
    settings: GenerateSettings,
    output: Path | None,
    resume: bool,
    skip_long: bool,
) -> None:
    """Answer the prompts of a file; every line is written as soon as it is made."""
    from firp_cli.api.generate_run import FileRun

    run = FileRun(path, decoder, rows, settings)
    run.check_lengths(skip_long)
    if run.skipped and is_main():
        text = f"skipped {len(run.skipped)} of {len(rows)} prompts longer than {run.room} tokens"
        typer.echo(text, err=True)
    if resume and output is not None:
        run.read_kept(output)
        say(f"{run.kept} of {run.count} answers are kept from {output}")
    lines = Lines(output, run.kept if resume else None)

    def interrupted() -> str:
        if output is None:
            return f"firp: interrupted; {made} of {run.count} answers are on stdout"
        held = f"firp: interrupted; {lines.held} of {run.count} answers are in {output}"
        if lines.failure:
            return f"{held}, which cannot be written ({lines.failure}); the others are on stdout"
        return f"{held}, the same command with --resume continues it"

    made = 0

    try:
        with interruption(interrupted), progress_bar("generating") as progress:
            for batch in run.answers(progress):
                for line in batch:
                    lines.write(line)
                    made += 1
    finally:
        lines.release()
    if not is_main():
        return
    if run.cut:
        say(f"{run.cut} later turns are not answered: their history does not fit the context or the chat template")
    typer.echo(summary(run.totals), err=True)
    lines.close()


def summary(totals: Totals) -> str:
    """Return tokens, steps, accepted length, throughput and prefill time of all answers in one line."""
    decoded, steps, seconds = totals.decoded, totals.steps, totals.decode_seconds
    throughput = f"{decoded / seconds:.1f} tokens/s" if seconds and decoded else "no decoding step"
    name, length = "steps", f"accepted length {decoded / steps:.2f}" if steps else "accepted length -"
    how = f" ({totals.undrafted} of them autoregressive, chosen by the guard)"
    if totals.pipelines and steps:
        name, length = "ticks", f"{decoded / steps:.2f} tokens per tick"
        how = f" ({totals.undrafted} of them outside the pipeline, which was slower)"
    length += how if totals.undrafted else ""
    return f"{totals.tokens} tokens in {steps} {name}, {length}, {throughput}, prefill {totals.prefill_seconds:.2f} s"
