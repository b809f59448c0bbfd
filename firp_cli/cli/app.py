"""The `firp` program: commands, error messages, exit codes. Heavy imports happen inside commands."""

from __future__ import annotations

import sys

import typer

from firp_cli import __version__
from firp_cli.cli.bench import bench
from firp_cli.cli.collect import collect
from firp_cli.cli.doctor import doctor
from firp_cli.cli.eval import evaluate
from firp_cli.cli.generate import generate
from firp_cli.cli.quickstart import quickstart
from firp_cli.cli.store import store
from firp_cli.cli.train import train
from firp_cli.cli.tune import tune
from firp_cli.errors import INTERRUPTED, FirpError

app = typer.Typer(
    name="firp",
    help="Decode faster without changing one token: train draft predictors on a frozen LLM's hidden states.",
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


app.command("quickstart")(quickstart)
app.command("collect")(collect)
app.add_typer(store, name="store")
app.command("train")(train)
app.command("eval")(evaluate)
app.command("tune")(tune)
app.command("bench")(bench)
app.command("generate")(generate)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point: user errors are one or two lines on stderr, `-v` shows the traceback."""
    try:
        app()
    except FirpError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        typer.echo(f"firp: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("firp: interrupted; what was finished is kept, --resume goes on", err=True)
        sys.exit(INTERRUPTED)
