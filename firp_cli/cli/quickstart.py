"""`firp quickstart`: a predictor, a tree and a table for any model, in the minutes that one has.

Runs the commands that a user would type, one after the other, and shows them. The maps start at the ridge solution on
as much of the teacher's own text as its share of the time allows, and are trained for what is left before tuning.
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

from firp_cli.cli.terminal import Verbose, quiet_libraries, say
from firp_cli.errors import DatasetError, TeacherError, UsageError

if TYPE_CHECKING:
    from firp_cli.config import Recipe

STEPS = 4
COLLECTING = 0.4  # share of the minutes at most
MEASURING = 0.35  # share of the minutes that is left for tuning and the bench
AROUND_TRAINING = 0.75  # minutes of loading, ridge start, first and last validation and gate
LEAST_TRAINING = 1.0  # minutes; shorter training is left out
MOST_EPOCHS = 20  # of training, however many minutes are left
SAMPLE_LIMIT = 64  # prompts of the estimate that the limit is worked out from
FEWEST_PROMPTS = 24  # with fewer there is nothing to fit maps on
HELD_OUT = 0.1  # share of a file's prompts that is measured on
MEASURED = (4, 8)  # prompts of the bench, in few minutes and in many
CALIBRATING, SITTINGS = 16, "4"  # prompts and sittings of tuning


@dataclass(frozen=True)
class Prompts:
    """Data sets, as other commands take them, to learn from and to measure on; `count`: prompts to learn from."""

    train: str
    test: str
    count: int


def quickstart(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, .gguf file or known name.")],
    minutes: Annotated[float, typer.Option(min=2, help="Time that it may take, about.")] = 15,
    prompts: Annotated[
        str, typer.Option(help="Prompts like those that will be decoded: a .jsonl file or a data set's name.")
    ] = "chat",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with NAME/SPLIT.jsonl (or FIRP_DATA_DIR).")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for everything. Default: runs/quickstart-MODEL.")] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Transfer layer. Default: at two thirds.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Future tokens that are drafted.")] = STEPS,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Length of the answers to learn from.")] = 256,
    verbose: Verbose = False,
) -> None:
    """Make a model faster in one command: collect, train, tune, bench; ends with a recipe to go on."""
    quiet_libraries(verbose)
    until = time.monotonic() + 60 * minutes
    folder = output or Path("runs") / f"quickstart-{_stem(model)}"
    if (folder / "predictor").exists() or (folder / "store").exists():
        raise UsageError(f"{folder} holds an earlier quickstart: remove it, or give another --output")
    found = find_prompts(prompts, data_dir, folder)
    recipe = make_recipe(model, found, data_dir, folder, layer or transfer_layer(model), steps, max_new_tokens)
    path = folder / "recipe.yaml"
    limit = _affordable(path, recipe, found.count, COLLECTING * (until - time.monotonic()))
    say(f"{limit} of {found.count} prompts fit into the time")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": limit})})
    _write_recipe(path, recipe)
    predictor = str(folder / "predictor")
    where = ["--data-dir", str(data_dir)] if data_dir else []
    run("collect", str(path))
    training = training_overrides((until - time.monotonic()) / 60, minutes)
    run("train", str(path), *training, "training.gate_prompts=2", f"output={predictor}")
    tuning = ["--batch-sizes", "1", "--limit", str(CALIBRATING), "--sittings", SITTINGS, "--no-trial"]
    run("tune", predictor, "--dataset", found.train, *where, *tuning, "--output", str(folder / "tune"))
    measured = min(MEASURED[1], max(MEASURED[0], round(minutes / 2)))
    measuring = ["--limit", str(measured), "--repeats", "1", "--output", str(folder / "bench")]
    run("bench", predictor, "--dataset", found.test, *where, *measuring)
    spent = (time.monotonic() - until) / 60 + minutes
    typer.echo(f"\n{spent:.1f} minutes. The predictor: {predictor}")
    typer.echo(f"try it:  firp generate {shlex.quote(predictor)} --prompt TEXT")
    typer.echo(f"train it on from here (longer drafts are accepted):  firp train {shlex.quote(str(path))}")


def find_prompts(name: str, data_dir: Path | None, folder: Path) -> Prompts:
    """Prompts to learn from, and others to measure on: a data set's own splits; of a file, or a set that has no test
    split, the last tenth is kept back. Raises DatasetError.
    """
    from firp_cli.data.datasets import KNOWN, load_prompts
    from firp_cli.files import write_atomically

    where = str(data_dir) if data_dir else None
    found = load_prompts(name, where, None, "train")
    known = KNOWN.get(name)
    if known is not None and "train" not in known.splits:
        raise DatasetError(f"{name} has test prompts only: nothing may be learnt from them; take other --prompts")
    if known is not None and "test" in known.splits:
        return Prompts(name, name, len(found))
    kept = max(1, round(HELD_OUT * len(found)))
    if len(found) - kept < FEWEST_PROMPTS:
        raise DatasetError(f"{name} has {len(found)} prompts; a quickstart needs {FEWEST_PROMPTS + kept} or more")
    paths = []
    for split, part in (("train", found[:-kept]), ("test", found[-kept:])):
        text = "".join(json.dumps({"messages": prompt.messages}) + "\n" for prompt in part)
        paths.append(folder / f"prompts-{split}.jsonl")
        write_atomically(paths[-1], lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return Prompts(str(paths[0]), str(paths[1]), len(found) - kept)


def transfer_layer(model: str) -> int:
    """Two thirds of the way up: below, pseudo states cost more rows of layers; above, they are guessed worse.

    Raises TeacherError where the model's config cannot be had.
    """
    from firp_cli.config import TeacherConfig
    from firp_cli.training.plan import skeleton

    teacher, reason = skeleton(TeacherConfig(model=model))
    if teacher is None:
        raise TeacherError(f"{reason}\ngive a model folder, a .gguf file, a known name or a reachable hub id")
    if teacher.num_layers < 2:
        raise TeacherError(f"{model} has one layer: pseudo states enter between two")
    return max(1, round(2 * teacher.num_layers / 3))


def make_recipe(
    model: str, prompts: Prompts, data_dir: Path | None, folder: Path, layer: int, steps: int, max_new_tokens: int
) -> Recipe:
    """The recipe that the quickstart begins with and a longer training goes on with."""
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
            "predictor": {"kind": "firp", "layer": layer, "steps": steps},
            "training": {"ridge_lambda": 1e-4, "epochs": 4, "anchors_per_sequence": 32},
            "store": str(folder / "store"),
            "output": str(folder / "trained"),
        }
    )


def training_overrides(left: float, minutes: float) -> list[str]:
    """Recipe overrides for training when `left` of the `minutes` are left: gradient steps until tuning has to begin, or
    the ridge start alone where there is no time for them.
    """
    steps = left - MEASURING * minutes - AROUND_TRAINING
    if steps < LEAST_TRAINING:
        return ["training.max_steps=0"]
    return [f"training.max_minutes={steps:.1f}", f"training.epochs={MOST_EPOCHS}"]


def fast_dtype() -> str:
    """The teacher's dtype for collecting and training: bfloat16 where this machine has units for it, else `auto`."""
    from firp_cli.machine import default_device
    from firp_cli.teacher.packed_linear import fast_bfloat16

    return "bfloat16" if fast_bfloat16(default_device()) else "auto"


def run(*arguments: str) -> None:
    """Run a firp command in a process of its own and show it. Raises typer.Exit with its status if that is not 0."""
    typer.echo(f"\n$ firp {shlex.join(arguments)}")
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", "firp_cli", *arguments], check=False).returncode
    if status:
        raise typer.Exit(status)


def _affordable(path: Path, recipe: Recipe, count: int, seconds: float) -> int:
    """Prompts that the teacher can answer and cache in the time, by the speed that `collect --estimate` measures.

    Raises UsageError where they are too few to learn anything from.
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
            f"{figures['seconds'] / sample:.1f} s a prompt leave time for {limit} prompts: give more --minutes, or a "
            "smaller --max-new-tokens"
        )
    return limit


def _write_recipe(path: Path, recipe: Recipe) -> None:
    from firp_cli.files import write_atomically
    from firp_cli.recipe import dump_recipe

    write_atomically(path, lambda temporary: temporary.write_text(dump_recipe(recipe), encoding="utf-8"))


def _stem(model: str) -> str:
    """A model's name in a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
