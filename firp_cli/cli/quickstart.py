"""`firp quickstart`: make a predictor, a tree and a table of speedups for any model in a given number of minutes.

Runs and shows the commands that a user would type: collect, train, tune, bench. The predictor is FIRP+: its maps are
the ridge solution on as much of the teacher's own text as the time allows, and its coupling is trained in the time
that remains before tuning.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import Verbose, command_text, quiet_libraries, say
from firp_cli.errors import INTERRUPTED, DatasetError, TeacherError, UsageError
from firp_cli.files import check_output

if TYPE_CHECKING:
    from firp_cli.config import Recipe

STEPS = 6
KIND = "firp_plus"  # of the predictor
DRAFT_VOCABULARY = 16384  # tokens drafted of vocabularies at least twice as large: the head reads fewer rows
COLLECTING = 0.4  # largest share of the minutes for collecting
MEASURING = 0.35  # share of the minutes for tuning and the bench
AROUND_TRAINING = 0.75  # minutes of loading, ridge start, first and last validation and gate
LEAST_TRAINING = 1.0  # minutes; shorter training is skipped
LONGER_EPOCHS = 5  # epochs of the recipe for a longer training
MOST_EPOCHS = 20  # epochs of training, however many minutes remain
SAMPLE_LIMIT = 64  # prompts of the estimate that determines the limit
FEWEST_PROMPTS = 24  # fewer prompts are too few to fit maps
HELD_OUT = 0.1  # share of a file's prompts kept for measuring
MEASURED = (4, 8)  # prompts of the bench, fewest and most
CALIBRATING, TIMING_ROUNDS = 16, "4"  # prompts and rounds of tuning
RESUMABLE = ("collect", "train")  # commands that keep what was finished


@dataclass(frozen=True)
class Prompts:
    """Data sets, as other commands take them, to train on and to measure on. `count`: prompts to train on."""

    train: str
    test: str
    count: int


def quickstart(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, .gguf file or known name.")],
    minutes: Annotated[float, typer.Option(min=2, help="Approximate duration.")] = 15.0,
    prompts: Annotated[
        str, typer.Option(help="Prompts like those that will be decoded: a file or folder, or a data set's name.")
    ] = "chat",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with NAME/SPLIT.jsonl (or FIRP_DATA_DIR).")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for all results. Default: runs/quickstart-MODEL.")] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Transfer layer. Default: two thirds of the layers.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Draft steps.")] = STEPS,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Longest answer to train on, in tokens.")] = 256,
    verbose: Verbose = False,
) -> None:
    """Make a model faster in one command: collect, train, tune, bench. Ends with a recipe for longer training."""
    quiet_libraries(verbose)
    until = time.monotonic() + 60 * minutes
    folder = output or Path("runs") / f"quickstart-{_stem(model)}"
    if (folder / "predictor").exists() or (folder / "store").exists():
        raise UsageError(f"{folder} contains an earlier quickstart: remove it, or give another --output")
    check_output(folder)
    data = find_prompts(prompts, data_dir, folder)
    shape = {**default_predictor(model, layer), "steps": steps}
    recipe = make_recipe(model, data, data_dir, folder, shape, max_new_tokens)
    path = folder / "recipe.yaml"
    limit = _affordable(path, recipe, data.count, COLLECTING * (until - time.monotonic()))
    say(f"{limit} of {data.count} prompts fit into the time")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": limit})})
    _write_recipe(path, recipe)
    predictor = str(folder / "predictor")
    where = ["--data-dir", str(data_dir)] if data_dir else []
    run("collect", str(path))
    training = training_overrides((until - time.monotonic()) / 60, minutes)
    run("train", str(path), *training, "training.gate_prompts=2", f"output={predictor}")
    tuning = ["--batch-sizes", "1", "--limit", str(CALIBRATING), "--timing-rounds", TIMING_ROUNDS, "--no-trial"]
    where += decoding_dtype()
    run("tune", predictor, "--dataset", data.train, *where, *tuning, "--output", str(folder / "tune"))
    measured = min(MEASURED[1], max(MEASURED[0], round(minutes / 2)))
    measuring = ["--limit", str(measured), "--repeats", "1", "--output", str(folder / "bench")]
    run("bench", predictor, "--dataset", data.test, "--methods", f"ar,hf,{KIND}", *where, *measuring)
    spent = (time.monotonic() - until) / 60 + minutes
    typer.echo(f"\n{spent:.1f} minutes. Predictor: {predictor}")
    typer.echo(f"try it:  {command_text('generate', predictor, '--prompt', 'TEXT', *decoding_dtype())}")
    typer.echo(f"train longer, for longer accepted drafts:  {command_text('train', path)}")


def find_prompts(name: str, data_dir: Path | None, folder: Path) -> Prompts:
    """Return prompts to train on and others to measure on. Raises DatasetError.

    They are the data set's own splits. Of a file, or a data set without test split, the last tenth is for measuring.
    """
    from firp_cli.data.datasets import load_prompts
    from firp_cli.data.known_sets import known_set
    from firp_cli.files import write_atomically

    where = str(data_dir) if data_dir else None
    rows = load_prompts(name, where, None, "train")
    rows.refuse_training()
    known = known_set(name)
    if known is not None and "train" not in known.splits:
        raise DatasetError(f"{name} has test prompts only: these prompts have no training split; give other --prompts")
    if known is not None and "test" in known.splits:
        return Prompts(name, name, len(rows))
    kept = max(1, round(HELD_OUT * len(rows)))
    if len(rows) - kept < FEWEST_PROMPTS:
        raise DatasetError(f"{name} has {len(rows)} prompts; a quickstart needs {FEWEST_PROMPTS + kept} or more")
    paths = []
    for split, part in (("train", rows[:-kept]), ("test", rows[-kept:])):
        text = "".join(json.dumps(prompt.conversation.row()) + "\n" for prompt in part)
        paths.append(folder / f"prompts-{split}.jsonl")
        write_atomically(paths[-1], lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return Prompts(str(paths[0]), str(paths[1]), len(rows) - kept)


def default_predictor(model: str, layer: int | None = None) -> dict[str, Any]:
    """Return the transfer layer, by default at two thirds of the model's layers, and the draft vocabulary.

    At a lower layer pseudo states run through more layers; at a higher one they are predicted worse.

    Raises TeacherError when the model's config cannot be found, UsageError for a layer that the model lacks.
    """
    from firp_cli.config import TeacherConfig
    from firp_cli.training.plan import skeleton

    teacher, reason = skeleton(TeacherConfig(model=model))
    if teacher is None:
        raise TeacherError(f"{reason}\ngive a model folder, a .gguf file, a known name or a reachable hub id")
    if teacher.num_layers < 2:
        raise TeacherError(f"{model} has one layer, and pseudo states enter between two layers: use a deeper model")
    if layer is not None and layer >= teacher.num_layers:
        raise UsageError(f"--layer {layer}: a transfer layer of {model} is between 1 and {teacher.num_layers - 1}")
    return {
        "layer": layer or max(1, round(2 * teacher.num_layers / 3)),
        "draft_vocabulary": DRAFT_VOCABULARY if teacher.vocab_size >= 2 * DRAFT_VOCABULARY else None,
    }


def make_recipe(
    model: str, prompts: Prompts, data_dir: Path | None, folder: Path, predictor: dict[str, Any], max_new_tokens: int
) -> Recipe:
    """Return the recipe of the quickstart, and of a longer training after it. `predictor`: its fields beside the kind
    and the coupling.
    """
    from firp_cli.recipe import validate_recipe

    return validate_recipe(
        {
            "teacher": {"model": model, "dtype": fast_dtype()},
            "data": {
                "dataset": prompts.train,
                "data_dir": str(data_dir) if data_dir else None,
                "regenerate": True,
                "max_new_tokens": max_new_tokens,
                "max_length": 2048,
            },
            "predictor": {"kind": KIND, "coupling": {"form": "recurrent"}, **predictor},
            "training": {
                "ridge_lambda": 1e-4,
                "coupling": {"epochs": LONGER_EPOCHS, "learning_rate": 2e-3},
                "vocabulary": 4096,
                "max_steps": 0,  # the first stage alone: it needs no gradients through the teacher
            },
            "store": str(folder / "store"),
            "output": str(folder / "trained"),
        }
    )


def training_overrides(remaining: float, minutes: float) -> list[str]:
    """Return recipe overrides for training when `remaining` of the `minutes` remain.

    The coupling is trained until tuning has to begin; without time for that only the ridge start is computed.
    """
    training = remaining - MEASURING * minutes - AROUND_TRAINING
    if training < LEAST_TRAINING:
        return ["training.coupling.epochs=0"]
    return [f"training.coupling.max_minutes={training:.1f}", f"training.coupling.epochs={MOST_EPOCHS}"]


def fast_dtype() -> str:
    """Return the teacher's dtype for collecting and training: bfloat16 if it is fast on this machine, else `auto`."""
    from firp_cli.machine import default_device
    from firp_cli.teacher.packed_linear import fast_bfloat16

    return "bfloat16" if fast_bfloat16(default_device()) else "auto"


def decoding_dtype() -> list[str]:
    """Return the option of the teacher's dtype for decoding, where it differs from that of training: on a CPU bfloat16
    is fast for many rows, and float32 for few.
    """
    from firp_cli.machine import default_device

    return ["--dtype", "float32"] if fast_dtype() == "bfloat16" and default_device().type == "cpu" else []


def run(*arguments: str) -> None:
    """Show a firp command and run it in a separate process. Raises typer.Exit with its status unless that is 0.

    A signal that ends the quickstart is passed on, and the command that goes on from there is printed.
    """
    from firp_cli.distributed.signals import run_program

    typer.echo(f"\n$ firp {shlex.join(arguments)}")
    sys.stdout.flush()
    status, interrupted = run_program([sys.executable, "-m", "firp_cli", *arguments])
    if interrupted or status == INTERRUPTED:
        going_on = [*arguments, "--resume"] if arguments[0] in RESUMABLE else arguments
        say(f"firp: quickstart interrupted; go on with the commands one by one, next: {command_text(*going_on)}")
        raise typer.Exit(INTERRUPTED)
    if status:
        raise typer.Exit(status)


def _affordable(path: Path, recipe: Recipe, count: int, seconds: float) -> int:
    """Return the number of prompts that can be collected in `seconds`, from the time that `collect --estimate` prints.

    Raises UsageError when they are too few to train on.
    """
    sample = min(count, SAMPLE_LIMIT)
    sampled = recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": sample})})
    _write_recipe(path, sampled)
    command = [sys.executable, "-m", "firp_cli", "collect", str(path), "--estimate", "--json"]
    typer.echo(f"$ firp {shlex.join(command[3:])}")
    sys.stdout.flush()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    figures: dict[str, Any] = json.loads(done.stdout)
    limit = min(count, int(seconds / figures["seconds"] * sample))
    if limit < min(count, FEWEST_PROMPTS):
        raise UsageError(
            f"at {figures['seconds'] / sample:.1f} s a prompt there is time for {limit} prompts: "
            "give more --minutes, or a smaller --max-new-tokens"
        )
    return limit


def _write_recipe(path: Path, recipe: Recipe) -> None:
    from firp_cli.files import write_atomically
    from firp_cli.recipe import dump_recipe

    write_atomically(path, lambda temporary: temporary.write_text(dump_recipe(recipe), encoding="utf-8"))


def _stem(model: str) -> str:
    """Return a model's name in a form that a folder's name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
