"""What commands share: consoles, progress bars, and the options that all of them take."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from firp_cli.errors import INTERRUPTED
from firp_cli.machine import is_main, world_size
from firp_cli.results import Progress

T = TypeVar("T")

Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and library warnings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[
    str | None, typer.Option(help="Model folder, hub id, .gguf file or known name. Default: each predictor's own.")
]
Gpus = Annotated[
    int, typer.Option(min=1, help="Devices that share a speed predictor's pipeline; on a CPU ranks share the cores.")
]
Guarded = Annotated[
    bool | None,
    typer.Option(
        "--guard/--no-guard",
        help="Decode plainly for a while where drafting does not pay. Default: bench guards pipelines alone; generate "
        "also trees, unless it samples: the text would follow from times as well as from the seed.",
    ),
]
Tree = Annotated[
    str | None,
    typer.Option(
        help="dynamic:N, chain or static:4x2x1, each with /K for K draft steps and @B for pseudo rows of B nodes; none "
        "for plain decoding; or a tree.json. Default: the predictor's tree.json."
    ),
]
Layers = Annotated[
    str, typer.Option(help="lean: joined matrices, where their logits are the library's; library: its own modules.")
]
Attention = Annotated[str, typer.Option(help="auto, sdpa (torch) or triton (the kernel for trees over long caches).")]
Graphs = Annotated[bool, typer.Option(help="Capture decoding steps as CUDA graphs.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Run the lean layers through torch.compile.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the cores that this process may use.")]
Force = Annotated[bool, typer.Option("--force", help="Use artefacts of another teacher all the same.")]


def agreed(work: Callable[[], T]) -> T:
    """Every rank's `work()`; a user error of one is raised by all, so that it is told once."""
    if world_size() == 1:
        return work()
    from firp_cli.distributed.rank_group import RankGroup

    return RankGroup.join().run_on_all(work)


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the work within, and the user is told that it can go on."""
    from firp_cli.distributed.launch import interruptible

    with interruptible():
        try:
            yield
        except KeyboardInterrupt:
            say("firp: interrupted; what was finished is kept, --resume goes on")
            raise typer.Exit(INTERRUPTED) from None


def say(text: str) -> None:
    """A line to stderr for the user, once per job."""
    if is_main():
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar on stderr: `with progress_bar("collecting") as progress: work(progress=progress)`. Silent on other ranks.

    Where stderr is no terminal a line is printed every ten seconds instead.
    """
    from firp_cli.reports.progress import console_progress

    if not is_main():
        yield _silent
        return
    with console_progress(description) as progress:
        yield progress


def _silent(done: int, total: int | None = None) -> None:
    pass


def split_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`[RECIPE] [key=value ...]` as typed: the recipe if there is one, and the overrides."""
    names = [item for item in arguments if "=" not in item]
    if len(names) > 1:
        raise typer.BadParameter(f"one recipe expected, got {', '.join(names)}")
    return (names[0] if names else None), [item for item in arguments if "=" in item]


def command_line(context: typer.Context) -> list[str]:
    """This command as it could be typed again: its name, then every argument and option that is not at its default."""
    typed = [str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value is None or value == parameter.get_default(context) or value == ():
            continue
        names = parameter.opts
        if isinstance(value, bool):
            typed.append(names[0] if value else parameter.secondary_opts[0])
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        for item in values:
            typed += [str(item)] if parameter.param_type_name == "argument" else [f"{names[-1]}={item}"]
    return typed


def print_json(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def quiet_libraries(verbose: bool) -> None:
    """Keep the libraries' own bars and advice off the terminal unless `-v`, and show firp's own notes."""
    _show_notes()
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _show_notes() -> None:
    """Print what the library logs under `firp`: work that takes long and was not asked for, such as unpacking."""
    log = logging.getLogger("firp")
    if not log.handlers:
        log.addHandler(_Notes())
        log.setLevel(logging.INFO)
        log.propagate = False


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
