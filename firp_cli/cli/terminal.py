"""Parts that commands share: messages, progress bars, reports, recipes with overrides and common options."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from firp_cli.config import Precision, TeacherConfig, check_sampling
from firp_cli.errors import INTERRUPTED, OutputError, UsageError
from firp_cli.machine import is_main, world_size
from firp_cli.recipe import yaml_value
from firp_cli.results import Progress

if TYPE_CHECKING:
    from firp_cli.api.loading import LayerBackend
    from firp_cli.decoding.engine import EngineOptions

T = TypeVar("T")
INTERRUPTION = "firp: interrupted; finished work is kept, --resume goes on from there"
NO_REPORT = "firp: interrupted; no report is written"
LONGEST_NAME = 60  # characters of a name in that of a folder
OVERRIDE = re.compile(r"[\w.-]+=")  # how an override of a recipe begins


def _possible(name: str) -> Callable[[T], T]:
    """Return the check of a sampling option while the command line is parsed. It raises UsageError."""

    def check(value: T) -> T:
        values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, name: value}
        check_sampling(**values)
        return value

    return check


Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and library warnings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[
    str | None,
    typer.Option(help="Model folder, hub id, .gguf file or known name. Default: the teacher of each predictor."),
]
Dtype = Annotated[
    Precision, typer.Option(help="Number format of the teacher. auto: as the predictor was trained, or of its config.")
]
Revision = Annotated[
    str | None, typer.Option(help="Teacher's branch, tag or commit on the hub. Default: the predictor's.")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Jinja file, vicuna or plain. Default: the predictor's, else the tokenizer's."),
]
TemplateOptions = Annotated[
    str | None,
    typer.Option(help="Variables of the chat template as YAML: '{enable_thinking: false}'. Default: the predictor's."),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code of the teacher's repository.")]
TEACHER_OPTIONS: dict[str, tuple[Any, Any]] = {  # type and default, by name
    "teacher": (Model, None),
    "dtype": (Dtype, "auto"),
    "revision": (Revision, None),
    "chat_template": (ChatTemplate, None),
    "template_options": (TemplateOptions, None),
    "trust_remote_code": (RemoteCode, False),
}
DataDir = Annotated[str | None, typer.Option(help="Folder that contains NAME/SPLIT.jsonl. Default: $FIRP_DATA_DIR.")]
Split = Annotated[str, typer.Option(help="Split of the data set; a file has none.")]
SkipLong = Annotated[bool, typer.Option(help="Skip and count prompts that do not fit the context.")]
Predictor = Annotated[str, typer.Argument(help="Predictor folder or embedded name.")]
Gpus = Annotated[int, typer.Option(min=1, help="Devices that share a speed predictor's pipeline; on a CPU: processes.")]
Guarded = Annotated[
    bool | None,
    typer.Option(
        "--guard/--no-guard",
        help="Fall back to autoregressive decoding while drafting is slower. Default: on for greedy generate and for "
        "SPEED; off when sampling, so that a seed reproduces its text.",
    ),
]
Tree = Annotated[
    str | None,
    typer.Option(
        help="Draft tree: dynamic:N (N nodes), chain or static:4x2x1; /K after it limits the draft steps, @B the nodes "
        "with pseudo states; none: autoregressive decoding. Or a tree.json. Default: the predictor's tree.json."
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, callback=_possible("temperature"), help="Sampling temperature. 0: greedy.")
]
TopP = Annotated[
    float,
    typer.Option(
        callback=_possible("top_p"), help="Top-p of sampling, above 0 and at most 1, applied after the temperature."
    ),
]
Seed = Annotated[int, typer.Option(min=0, callback=_possible("seed"), help="Seed of sampling.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends the text; may be repeated.")]
Backend = Annotated[
    str,
    typer.Option(
        help="Decoder layers: lean (joined matrices, used where they give the library's logits) or library "
        "(transformers' modules)."
    ),
]
Attention = Annotated[
    str, typer.Option(help="auto, sdpa (torch) or triton (a kernel for trees over long caches; CUDA only).")
]
Graphs = Annotated[bool, typer.Option(help="Capture decoding steps as CUDA graphs, on CUDA devices.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Run the lean layers through torch.compile.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, help="CPU threads. Default: the cores that this process may use.")
]
Force = Annotated[bool, typer.Option("--force", help="Accept a store or predictor made for another teacher.")]


def agreed(work: Callable[[], T]) -> T:
    """Run `work` on every rank. A user error of one rank is raised on all of them, so that it is printed once."""
    if world_size() == 1:
        return work()
    from firp_cli.distributed.rank_group import RankGroup

    return RankGroup.join().run_on_all(work)


def teacher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that describe a teacher to a command, in place of its parameter `teacher`: the command gets them
    as one configuration.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        given = {name: values.pop(name) for name in TEACHER_OPTIONS}
        command(*arguments, teacher=teacher_choice(**given), **values)

    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in TEACHER_OPTIONS.items()
    ]
    parameters = [
        item for old in signature.parameters.values() for item in (options if old.name == "teacher" else [old])
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def teacher_choice(
    teacher: str | None,
    dtype: Precision,
    revision: str | None,
    chat_template: str | None,
    template_options: str | None,
    trust_remote_code: bool,
) -> TeacherConfig | None:
    """Return the teacher as the options give it, only the given fields set; None where none is. Raises UsageError."""
    given: dict[str, Any] = {"model": teacher, "revision": revision, "chat_template": chat_template}
    given |= {"dtype": None if dtype == "auto" else dtype, "trust_remote_code": trust_remote_code or None}
    if template_options is not None:
        try:
            given["template_options"] = yaml_value(template_options)
        except ValueError:
            given["template_options"] = template_options
        if not isinstance(given["template_options"], dict):
            raise UsageError(
                "--template-options takes variables and values, as '{enable_thinking: false}', "
                f"not {template_options!r}"
            )
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return TeacherConfig.model_validate(given) if given else None
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(
            f"--{str(fault['loc'][0]).replace('_', '-')}: {fault['msg'].removeprefix('Value error, ')}"
        ) from None


def decoding_options(
    backend: str, compiled: bool, attention: str, graphs: bool, threads: int | None
) -> tuple[LayerBackend, EngineOptions]:
    """Set the CPU threads and return the options of the decoder layers and of the engine. Raises UsageError."""
    from firp_cli.api.loading import LayerBackend
    from firp_cli.decoding.engine import EngineOptions
    from firp_cli.machine import set_threads

    set_threads(threads)
    return LayerBackend(backend, compiled), EngineOptions(attention=attention, graphs=graphs)


@contextmanager
def interruption(text: str | Callable[[], str] = INTERRUPTION) -> Iterator[None]:
    """End the enclosed work on Ctrl-C, SIGTERM or a closed terminal, and print what became of it."""
    from firp_cli.distributed.signals import interruptible

    with interruptible():
        try:
            yield
        except KeyboardInterrupt:
            say(text if isinstance(text, str) else text())
            raise typer.Exit(INTERRUPTED) from None


def publish(report: Any, folder: Path, as_json: bool, show: Callable[[], None]) -> None:
    """Write a report and print it, as JSON or by `show`. One that cannot be written is printed all the same.

    Raises OutputError after printing where it cannot be written.
    """
    from firp_cli import results
    from firp_cli.api.write_report import write_report

    failure = None
    try:
        write_report(report, folder)
    except OutputError as error:
        failure = error
    print_json(results.as_json(report)) if as_json else show()
    if failure:
        raise failure


def default_folder(command: str, name: str) -> Path:
    """Return `runs/COMMAND-NAME-TIME` for a report on something of that name."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:LONGEST_NAME]
    return Path("runs") / f"{command}-{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def say(text: str) -> None:
    """Print a line on stderr, on the main rank only."""
    if is_main():
        typer.echo(text, err=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Show a progress bar on stderr: `with progress_bar("collecting") as progress: work(progress=progress)`.

    Where stderr is not a terminal, print a line every ten seconds. Ranks other than the main one print nothing.
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
    """Split the arguments `[RECIPE] [key=value ...]` into the recipe, or None, and the overrides.

    An existing file is the recipe, also where its path holds a `=`. Of a key that is given twice the last value is
    taken, and a line says so. Raises UsageError for several recipes.
    """
    overrides = [item for item in arguments if OVERRIDE.match(item) and not _is_file(item)]
    names = [item for item in arguments if item not in overrides]
    if len(names) > 1:
        raise UsageError(f"one recipe expected, got {', '.join(names)}")
    _note_repeated(overrides)
    return (names[0] if names else None), overrides


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # longer than a file's name
        return False


def _note_repeated(overrides: Sequence[str]) -> None:
    given: dict[str, str] = {}
    for item in overrides:
        key, _, value = item.partition("=")
        if given.get(key, value) != value:
            say(f"firp: {key} is given twice, as {given[key]} and as {value}: {value} is taken")
        given[key] = value


def refuse_both(options: dict[str, Any], overrides: Sequence[str]) -> None:
    """Raise UsageError for a field of the recipe that an option and an override both set."""
    for key in (item.partition("=")[0] for item in overrides):
        if options.get(key) is not None:
            raise UsageError(f"{key} is given twice, by an option and as an override: leave one out")


def override(key: str, value: Any) -> str:
    """Return `key=value` as an override of a recipe that is read as that value."""
    try:
        plain = isinstance(value, str) and yaml_value(value) == value
    except ValueError:
        plain = False
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def given_options(context: typer.Context) -> set[str]:
    """Return the names of the parameters that the user gave on the command line, also those equal to their default."""
    sources = {str(item.name): context.get_parameter_source(str(item.name)) for item in context.command.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def command_text(*words: object) -> str:
    """Return `firp WORDS` as a line that a shell reads as these words."""
    return shlex.join(["firp", *map(str, words)])


def command_line(context: typer.Context) -> list[str]:
    """Return the command's name, then every argument and option that was given or differs from its default."""
    typed, given = [str(context.command.name)], given_options(context)
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value is None or value == () or (value == parameter.get_default(context) and parameter.name not in given):
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
    """Print JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def quiet_libraries(verbose: bool) -> None:
    """Print the messages of the logger `firp`; unless `verbose`, silence the progress bars and advice of libraries."""
    _show_notes()
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _show_notes() -> None:
    """Print the messages of the logger `firp` on stderr."""
    log = logging.getLogger("firp")
    if not log.handlers:
        log.addHandler(_Notes())
        log.setLevel(logging.INFO)
        log.propagate = False


class _Notes(logging.Handler):
    """Prints each message as a line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
