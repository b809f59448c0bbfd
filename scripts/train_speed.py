#!/usr/bin/env python3
"""Optimizer steps per second of `firp train` against a bare loop over the same forward, backward and AdamW step.

Both take the same micro-batches of one store from the same start values, in turns. Bare: the micro-batches are in
memory before the clock starts, no DeepSpeed, no reading ahead, no metrics log. firp: the command's own trainer with its
defaults: conversations from the mapped store, metrics and TensorBoard; once without and once with the validations and
checkpoints of a run. Medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from firp_cli.collecting.collect_store import collect_store
from firp_cli.config import Recipe
from firp_cli.predictors.folder import build_predictor
from firp_cli.recipe import load_recipe
from firp_cli.store.reader import Store
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import Prefetcher, Reader, data_order, planned_steps, split_validation
from firp_cli.training.metrics_log import Listener
from firp_cli.training.objective import ObjectiveModule
from firp_cli.training.pace import ADAM_BETAS
from firp_cli.training.trainer import train


def bare_rate(recipe: Recipe, teacher: Teacher, store: Store, warm: int) -> tuple[float, list[float]]:
    """Return steps per second after `warm` of them, and the losses."""
    settings = recipe.training
    assert recipe.predictor is not None
    torch.manual_seed(settings.seed)
    predictor = build_predictor(recipe.predictor, teacher)
    predictor.initialise(settings.init, teacher)
    module = ObjectiveModule(predictor, teacher, settings)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=settings.weight_decay
    )
    training, _ = split_validation(len(store), settings.validation_fraction, settings.seed)
    order = data_order(settings, training, 1, store.lengths)
    reader = Reader(
        store, predictor.offsets, settings.anchors_per_sequence, settings.seed, teacher.device, teacher.dtype
    )
    wanted = (order.conversations(step, 0) for step in range(planned_steps(settings, order)))
    prefetcher = Prefetcher(reader, wanted)
    items = list(islice(prefetcher, planned_steps(settings, order)))
    prefetcher.close()
    losses, began = [], 0.0
    for number, item in enumerate(items):
        if number == warm:
            began = time.perf_counter()
        loss, *_ = module(item.batch, item.anchors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return (len(items) - warm) / (time.perf_counter() - began), losses


def firp_rate(recipe: Recipe, teacher: Teacher, store: Store, warm: int, output: Path) -> tuple[float, list[float]]:
    """Return the trainer's steps per second after `warm` of them, all of its work between them included; and the
    losses.
    """
    moments: list[float] = []
    losses: list[float] = []

    def step(done: int, total: int, row: dict[str, Any]) -> None:
        moments.append(time.perf_counter())
        losses.append(row["loss"])

    train(recipe, teacher, store, output, listener=Listener(step=step))
    return (len(moments) - warm) / (moments[-1] - moments[warm - 1]), losses


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("override", nargs="*", help="section.field=value")
    parser.add_argument("--limit", type=int, default=600, help="conversations collected")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=10, help="untimed steps at the start")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    fixed = [f"data.limit={arguments.limit}", f"training.max_steps={arguments.steps}"]
    fixed += ["training.init=identity", "data.regenerate=false"]  # neither belongs to a step
    recipe = load_recipe(arguments.recipe, [*fixed, *arguments.override])
    assert recipe.predictor is not None
    teacher = load_teacher(recipe.teacher)
    never = {"validate_every": 10**9, "save_every": 10**9, "validation_fraction": 0.0}
    alone = recipe.model_copy(update={"training": recipe.training.model_copy(update=never)})
    rates: dict[str, list[float]] = {"bare loop": [], "firp train, steps": [], "firp train, whole": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        collect_store(teacher, recipe.data, list(recipe.predictor.required_layers(teacher)), folder / "store")
        store = Store.open(folder / "store", layers=recipe.predictor.required_layers(teacher))
        for number in range(arguments.repeats):
            rate, expected = bare_rate(alone, teacher, store, arguments.warm)
            rates["bare loop"].append(rate)
            rate, losses = firp_rate(alone, teacher, store, arguments.warm, folder / f"alone-{number}")
            rates["firp train, steps"].append(rate)
            # the trainer's schedule warms the rate up, so the losses differ after the first step
            assert abs(losses[0] - expected[0]) < 1e-5 * abs(expected[0]), "both start with the same loss"
            rate, _ = firp_rate(recipe, teacher, store, arguments.warm, folder / f"whole-{number}")
            rates["firp train, whole"].append(rate)
    result = {
        name: {
            "steps_per_second": statistics.median(found),
            "ratio": statistics.median(own / bare for own, bare in zip(found, rates["bare loop"], strict=True)),
        }
        for name, found in rates.items()
    }
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "repeats": arguments.repeats, **result}))
        return
    print(f"{'':20} {'steps/s':>9} {'of bare':>8}   ({arguments.repeats} repeats, {torch.get_num_threads()} threads)")
    for name, found in result.items():
        print(f"{name:20} {found['steps_per_second']:9.3f} {found['ratio']:8.3f}")


if __name__ == "__main__":
    main()
