#!/usr/bin/env python3
"""Ablation table: start values, one layer or staggered layers, k, transfer layer, static and dynamic trees.

Every predictor is trained on one store of the embedded teacher's own answers and decoded in one interleaved bench run,
so rows can be compared with each other. Takes about half an hour on two cores; --quick is a functional check.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firp_cli.cli.terminal import progress_bar, quiet_libraries
from firp_cli.config import Recipe
from firp_cli.recipe import load_recipe
from firp_cli.teacher.load import load_teacher

LAYER, STEPS, TREE = 4, 4, "dynamic:8"
TREES = ("chain", "static:2x2", "static:4x2x1", "dynamic:4", "dynamic:8", "dynamic:16", "dynamic:32")


@dataclass(frozen=True)
class Variant:
    """One row: a predictor section, its start values, and the tree it decodes with. `trained`: False keeps the start
    values.
    """

    group: str
    name: str
    predictor: dict[str, Any]
    init: str = "ridge"
    trained: bool = True
    tree: str = TREE

    @property
    def folder(self) -> str:
        """Folder of the predictor; variants that differ only in the tree share it."""
        shape = "-".join(str(value) for value in self.predictor.values()).replace(", ", "_").strip("[]")
        return f"{shape}-{self.init}-{'trained' if self.trained else 'start'}".replace("[", "").replace("]", "")


def firp(layer: int = LAYER, steps: int = STEPS) -> dict[str, Any]:
    return {"kind": "firp", "layer": layer, "steps": steps}


def staggered(*layers: int) -> dict[str, Any]:
    return {"kind": "hidden_transfer", "layers": list(layers)}


def variants(layers: int) -> list[Variant]:
    """Return all rows for a teacher of `layers` layers."""
    rows = [
        Variant("start", "identity", firp(), "identity", trained=False),
        Variant("start", "ridge only", firp(), trained=False),
        Variant("start", "identity, trained", firp(), "identity"),
        Variant("start", "ridge, trained", firp()),
    ]
    rows += [Variant("transfer layer", f"t = {layer}", firp(layer)) for layer in range(1, layers)]
    rows += [Variant("steps", f"k = {steps}", firp(steps=steps)) for steps in range(1, 6)]
    spreads = [(2, 3, 4, 5), (3, 4, 5, 5), (4, 4, 5, 5)]
    rows += [Variant("one layer or staggered", f"{LAYER} for all", firp())]
    rows += [Variant("one layer or staggered", str(list(spread)), staggered(*spread)) for spread in spreads]
    rows += [Variant("tree", tree, firp(), tree=tree) for tree in TREES]
    rows.append(Variant("baseline", "medusa heads", {"kind": "medusa", "steps": STEPS}, "identity"))
    return rows


def train_all(rows: list[Variant], base: Recipe, teacher: Any, folder: Path) -> None:
    """Train each distinct predictor once; results of an earlier run are kept."""
    from firp_cli.store.reader import Store
    from firp_cli.training.trainer import train

    todo = {row.folder: row for row in rows if not (folder / row.folder / "config.json").is_file()}
    with progress_bar("training predictors") as progress:
        for number, (name, row) in enumerate(todo.items()):
            progress(number, len(todo))
            values = base.model_dump() | {"predictor": row.predictor}
            values["training"] |= {"init": row.init} | ({} if row.trained else {"max_steps": 0})
            if row.predictor["kind"] == "medusa":
                values["training"]["learning_rate"] = load_recipe("demo-medusa").training.learning_rate
            recipe = Recipe.model_validate(values)
            assert recipe.predictor is not None and recipe.store is not None
            shutil.rmtree(folder / name, ignore_errors=True)
            train(
                recipe,
                teacher,
                Store.open(Path(recipe.store), layers=recipe.predictor.required_layers(teacher)),
                folder / name,
            )


def measure(rows: list[Variant], teacher: Any, folder: Path, prompts: int, repeats: int) -> list[dict[str, Any]]:
    """Decode the same prompts with every row, interleaved, and add the validation figures of its predictor."""
    from firp_cli.cli.bench import load_bench_prompts
    from firp_cli.decoding.tree_spec import parse_tree
    from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
    from firp_cli.evaluation.run_bench import run_bench
    from firp_cli.predictors.folder import load_predictor

    loaded = {}
    for row in rows:
        predictor = load_predictor(folder / row.folder, teacher)
        loaded[f"{row.group}: {row.name}"] = LoadedPredictor(
            predictor, parse_tree(row.tree, predictor.steps), folder / row.folder
        )
    settings = BenchSettings(repeats=repeats)
    methods = make_methods(teacher, loaded, ["ar", *loaded], settings)
    with progress_bar("decoding") as progress:
        report = run_bench(
            teacher, load_bench_prompts("arithmetic", None, prompts, teacher), methods, settings, progress=progress
        )
    found = {row.method: row for row in report.rows}
    table = []
    for row in rows:
        result = found[f"{row.group}: {row.name}"]
        training = json.loads((folder / row.folder / "training.json").read_text(encoding="utf-8"))
        table.append(
            {
                "group": row.group,
                "variant": row.name,
                "top1": training["validation"]["best"]["top1"],
                "accepted_length": result.accepted_length,
                "step_milliseconds": result.step_milliseconds,
                "relative_step": result.step_milliseconds / found["ar"].step_milliseconds,
                "speedup": result.speedup,
                "identical": f"{result.lossless.identical}/{result.lossless.compared}",
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["| | variant | top-1 by step | accepted length | step / ar step | speedup over ar | identical |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in table:
        top1 = " ".join(f"{value:.2f}" for value in row["top1"])
        figures = (
            f"{row['accepted_length']:.2f} | {row['relative_step']:.2f} | {row['speedup']:.2f} | {row['identical']}"
        )
        lines.append(f"| {row['group']} | {row['variant']} | {top1} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Collect, train, measure, print the table and write ablations.json and ablations.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--conversations", type=int, default=1000, help="answers of the teacher to train on")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few conversations and prompts: checks that the script runs, measures nothing",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.conversations, arguments.prompts, arguments.repeats = 40, 2, 1
    quiet_libraries(verbose=False)
    from firp_cli.collecting.collect_store import collect_store
    from firp_cli.collecting.engine_responder import make_responder

    overrides = [
        f"data.limit={arguments.conversations}",
        f"store={arguments.output / 'store'}",
        "training.gate_prompts=0",
    ]
    base = load_recipe("demo", overrides)
    teacher = load_teacher(base.teacher)
    rows = variants(teacher.num_layers)
    store = arguments.output / "store"
    collect_store(
        teacher,
        base.data,
        range(1, teacher.num_layers),
        store,
        resume=store.exists(),
        progress=progress_bar,
        responder=make_responder(base, teacher),
    )
    train_all(rows, base, teacher, arguments.output)
    table = measure(rows, teacher, arguments.output, arguments.prompts, arguments.repeats)
    (arguments.output / "ablations.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "ablations.md").write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    main()
