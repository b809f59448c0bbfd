#!/usr/bin/env python3
"""Ablation of FIRP+: what the pseudo states, the parent's token, the form and size of the coupling and its candidates
contribute to the accepted length.

All variants are trained on the same conversations of one store, the couplings on the same anchors for the same epochs,
and evaluated on the same held-out conversations. Variants that share their frozen drafts share the kept states. Writes
ablations.json, ablations.md and ablations.png.

    python scripts/coupling_ablations.py smollm2-firp-plus --store stores/smollm2 --conversations 600

takes about an hour on two cores; the embedded teacher's recipe (arithmetic-firp-plus) a quarter of that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firp_cli.config import KINDS, Recipe, TrainingConfig
from firp_cli.recipe import load_recipe
from firp_cli.reports.canvas import COLOURS, canvas, png
from firp_cli.reports.progress import console_progress

TREE = "dynamic:8"


@dataclass(frozen=True)
class Variant:
    """One row: a predictor section, and changes of the training section.

    `without_token`: the coupling does not see the parent's token. `candidates`: M in the evaluation, where it differs.
    """

    group: str
    name: str
    predictor: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    without_token: bool = False
    candidates: int | None = None


def variants(base: dict[str, Any], layers: Sequence[int]) -> list[Variant]:
    """Return all rows for a FIRP+ section `base` and the layers that the store holds."""
    base = base | {"draft_vocabulary": None}  # which only costs accepted tokens: it saves time
    steps, layer, coupling = base["steps"], base["layer"], base["coupling"]
    width = coupling["width"] or 0
    firp = {"kind": "firp", "layer": layer, "steps": steps}
    medusa = {"kind": "medusa", "steps": steps, "own_head": False}

    def plus(**changed: Any) -> dict[str, Any]:
        where: dict[str, Any] = {key: changed.pop(key) for key in ("layer", "steps") if key in changed}
        return {**base, **where, "coupling": {**coupling, **changed}}

    rows = [
        Variant("drafts", "ridge start alone", firp, {"max_steps": 0}),
        Variant("drafts", "maps trained", firp),
        Variant("drafts", "ridge start + coupling", plus()),
        Variant("drafts", "the same on the final state", {**medusa, "coupling": coupling}, {"init": "identity"}),
        Variant("drafts", "both stages", plus(), {"max_steps": None}),
        Variant("form", "without the token", plus(form="mlp"), without_token=True),
        Variant("form", "low rank", plus(form="low_rank", width=None)),
        Variant("form", "mlp", plus(form="mlp")),
        Variant("form", "recurrent", plus(form="recurrent")),
        Variant("form", "recurrent, one for each step", plus(form="recurrent", share=False)),
    ]
    rows += [Variant("width", name, plus(width=size)) for name, size in _widths(width)]
    rows += [Variant("candidates", f"M = {count}", plus(), candidates=count) for count in (16, 64, 256, 1024)]
    rows += [Variant("steps", f"k = {count}", plus(steps=count)) for count in (2, 4, 6, 8)]
    rows += [Variant("loss", name, plus(), {"loss": name}) for name in ("kl", "cross_entropy", "total_variation")]
    rows += [Variant("layer", f"t = {place}", plus(layer=place)) for place in layers]
    return rows


def _widths(width: int) -> list[tuple[str, int | None]]:
    """Return widths to compare: the hidden size d (None), and a recipe's own one."""
    return [("d", None), *([(str(width), width)] if width else []), ("128", 128), ("32", 32)]


class Trials:
    """Trains and evaluates variants on one store."""

    def __init__(self, recipe: Recipe, store: Path, conversations: int | None, held_out: int, epochs: int) -> None:
        from firp_cli.distributed.sharding import load_for_ranks
        from firp_cli.store.reader import Store

        assert recipe.predictor is not None
        self.recipe = recipe
        layers = Store.open(store).layers
        self.teacher = load_for_ranks(recipe.teacher, min(layers), embedding=True)
        opened = Store.open(store)
        size = len(opened) if conversations is None else min(len(opened), conversations + held_out)
        sequences = [opened[place * len(opened) // size] for place in range(size)]
        self.layers, self.held_out, self.training = layers, sequences[:held_out], sequences[held_out:]
        settings = recipe.training.model_dump()
        settings["coupling"] |= {"epochs": epochs, "max_minutes": None}
        fixed = {"max_steps": 0, "max_minutes": None, "zero_stage": 0, "precision": "fp32", "epochs": epochs}
        self.settings = settings | fixed
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._trained: dict[str, Any] = {}

    def run(self, variant: Variant) -> dict[str, Any]:
        """Return a variant's row of the table."""
        from firp_cli.decoding.tree_spec import parse_tree
        from firp_cli.evaluation.quality import evaluate

        began = time.monotonic()
        predictor = self._train(variant)
        seconds = time.monotonic() - began
        if variant.candidates is not None:
            changed = predictor.config.coupling.model_copy(update={"candidates": variant.candidates})
            predictor = copy(predictor)  # the trained one serves other rows
            predictor.config = predictor.config.model_copy(update={"coupling": changed})
        found = evaluate(self.teacher, predictor, self.held_out, parse_tree(TREE, predictor.steps))
        return {
            "group": variant.group,
            "variant": variant.name,
            "top1": [step.top1 for step in found.steps],
            "top5": [step.top5 for step in found.steps],
            "chain": found.expected_accepted_length_chain,
            "tree": found.expected_accepted_length_tree,
            "parameters": sum(parameter.numel() for parameter in predictor.parameters()),
            "seconds": seconds,
        }

    def _train(self, variant: Variant) -> Any:
        """Return a variant's predictor; those that differ only in the evaluation are trained once."""
        from firp_cli.predictors.folder import build_predictor
        from firp_cli.training.draft_states import DraftStates
        from firp_cli.training.local_trainer import train_local

        section = variant.predictor
        name = json.dumps([section, variant.training, variant.without_token], sort_keys=True)
        if name not in self._trained:
            predictor: Any = build_predictor(KINDS[section["kind"]].model_validate(section), self.teacher)
            if variant.without_token:
                predictor.coupling.scale = 0.0
            frozen = (section["kind"], section.get("layer"), section["steps"])
            kept = self._kept.setdefault(frozen, DraftStates((section["steps"], self.teacher.hidden_size)))
            changed = dict(variant.training)
            if section["kind"] == "firp":
                changed.setdefault("max_steps", None)
            settings = TrainingConfig.model_validate(self.settings | changed)
            train_local(predictor, self.teacher, self.training, settings, kept=kept)
            self._trained[name] = predictor
        return self._trained[name]


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = [f"| | variant | top-1 by step | chain | {TREE} | parameters | seconds |", "|---|---|---|---|---|---|---|"]
    for row in table:
        top1 = " ".join(f"{value:.3f}" for value in row["top1"])
        size, seconds = f"{row['parameters'] / 1e6:.2f} M", f"{row['seconds']:.0f}"
        cells = [row["group"], row["variant"], top1, f"{row['chain']:.3f}", f"{row['tree']:.3f}", size, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(table: list[dict[str, Any]]) -> bytes:
    """Return bars of the accepted lengths of a tree, by group, as a PNG."""
    groups = list(dict.fromkeys(row["group"] for row in table))
    with canvas(7.5, 0.24 * len(table) + 1.2) as drawn:
        axes = drawn.subplots()
        for place, row in enumerate(table):
            axes.barh(place, row["tree"] - 1, left=1, color=COLOURS[groups.index(row["group"]) % len(COLOURS)])
            axes.text(row["tree"] + 0.02, place, f"{row['tree']:.2f}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(table)), [f"{row['group']}: {row['variant']}" for row in table], fontsize=7.5)
        axes.invert_yaxis()
        axes.margins(x=0.08, y=0.01)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"expected accepted length, {TREE}, bonus token included")
        axes.set_title("Ablation of FIRP+ on held-out conversations")
        return png(drawn)


def main() -> None:
    """Train and evaluate all variants; print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of kind firp_plus")
    parser.add_argument("overrides", nargs="*", help="section.field=value each")
    parser.add_argument("--store", type=Path, help="default: the recipe's")
    parser.add_argument("--output", type=Path, default=Path("runs/coupling-ablations"))
    parser.add_argument("--conversations", type=int, help="to train on; default: all but the held-out ones")
    parser.add_argument("--held-out", type=int, default=24, help="conversations to evaluate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--groups", help="comma-separated groups of rows; default: all")
    parser.add_argument("--resume", action="store_true", help="keep the rows of ablations.json in --output")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    store = arguments.store or Path(recipe.store or "")
    trials = Trials(recipe, store, arguments.conversations, arguments.held_out, arguments.epochs)
    assert recipe.predictor is not None
    rows = variants(recipe.predictor.model_dump(), trials.layers)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path, table = arguments.output / "ablations.json", list[dict[str, Any]]()
    kept = json.loads(path.read_text(encoding="utf-8")) if arguments.resume and path.is_file() else []
    known = {(row["group"], row["variant"]): row for row in kept}
    if arguments.groups:
        wanted = arguments.groups.split(",")
        rows = [row for row in rows if row.group in wanted or (row.group, row.name) in known]
    with console_progress("variants") as progress:
        for number, row in enumerate(rows):
            progress(number, len(rows))
            table.append(known.get((row.group, row.name)) or trials.run(row))
            path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "ablations.md").write_text(markdown(table), encoding="utf-8")
    (arguments.output / "ablations.png").write_bytes(figure(table))
    print(markdown(table))


if __name__ == "__main__":
    main()
