"""The `firp` program: its commands, error messages and exit codes. Commands import heavy modules when they run."""

from __future__ import annotations

import io
import os
import sys

import typer

from firp_cli import __version__
from firp_cli.cli.bench import bench
from firp_cli.cli.collect import collect
from firp_cli.cli.command import Command
from firp_cli.cli.compare import compare
from firp_cli.cli.doctor import doctor
from firp_cli.cli.eval import evaluate
from firp_cli.cli.generate import generate
from firp_cli.cli.prompts import prompts
from firp_cli.cli.quickstart import quickstart
from firp_cli.cli.store import store
from firp_cli.cli.train import train
from firp_cli.cli.tune import tune
from firp_cli.errors import INTERRUPTED, FirpError
from firp_cli.files import os_reason

app = typer.Typer(
    name="firp",
    help="Lossless speculative decoding: train draft predictors on a frozen LLM's hidden states, and decode with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"firp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("quickstart", cls=Command)(quickstart)
app.command("prompts", cls=Command)(prompts)
app.command("collect", cls=Command)(collect)
app.add_typer(store, name="store")
app.command("train", cls=Command)(train)
app.command("eval", cls=Command)(evaluate)
app.command("tune", cls=Command)(tune)
app.command("bench", cls=Command)(bench)
app.command("compare", cls=Command)(compare)
app.command("generate", cls=Command)(generate)
app.command("doctor", cls=Command)(doctor)


def main() -> None:
    """Run the program. A user error prints one to three lines on stderr; with `-v` its traceback.

    A character that the terminal's encoding lacks is printed as a question mark.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except (FirpError, OSError) as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        if isinstance(error, FirpError):
            typer.echo(f"firp: {error}", err=True)
            sys.exit(error.exit_code)
        what = error.filename or "stdout, a pipe or a file"
        typer.echo(f"firp: {what} cannot be read or written: {os_reason(error)} (-v shows where)", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        sys.exit(FirpError.exit_code)
    except KeyboardInterrupt:
        typer.echo("firp: interrupted", err=True)
        sys.exit(INTERRUPTED)
