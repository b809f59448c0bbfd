#!/usr/bin/env python3
"""Cost of a store's dtype: bytes, error of the states, and accepted length of predictors trained on it.

One float32 store is split. The larger part is converted to each dtype and trained on with the same seed and optimizer
steps; all predictors are judged on the float32 states of the smaller part and decode its prompts.
Takes about five minutes with the embedded teacher on two threads; --quick is a functional check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firp_cli.cli.terminal import progress_bar, quiet_libraries, say
from firp_cli.config import Recipe
from firp_cli.recipe import load_recipe
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher

if TYPE_CHECKING:
    from firp_cli.store.reader import Store
    from firp_cli.teacher.teacher import Teacher

DTYPES = ("float32", "bfloat16", "int8", "float8")
REFERENCE = "float32"
TREE = "dynamic:8"
HELD_OUT = 0.15
NEW_TOKENS = 96
MOST_LOST, MOST_BYTES = 0.02, 0.52  # shares of accepted length, and of the bytes of bfloat16


def prepare(recipe: Recipe, teacher: Teacher, dtypes: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return stores by dtype, all of the same conversations, and `held out`: float32 states of others."""
    from firp_cli.collecting.collect_store import collect_store
    from firp_cli.collecting.engine_responder import make_responder
    from firp_cli.store.tools import convert_store, split_store

    assert recipe.predictor is not None
    stores = {REFERENCE: folder / "stores" / REFERENCE, "held out": folder / "stores" / "held-out"}
    layers = recipe.predictor.required_layers(teacher)
    responder = make_responder(recipe, teacher)
    whole = folder / "stores" / "all"
    collect_store(teacher, recipe.data, layers, whole, progress=progress_bar, responder=responder)
    split_store(whole, list(stores.values()), [1 - HELD_OUT, HELD_OUT])
    for dtype in dtypes:
        if dtype != REFERENCE:
            stores[dtype] = folder / "stores" / dtype
            convert_store(stores[REFERENCE], stores[dtype], dtype=dtype)
    return stores


def state_error(exact: Store, rounded: Store) -> dict[str, float]:
    """Return ||rounded - exact|| / ||exact|| of a state: the mean over all states, and the largest."""
    import torch

    total = count = worst = 0.0
    for one, two in zip(exact, rounded, strict=True):
        for mine, theirs in [(one.final, two.final), *((one.hidden[layer], two.hidden[layer]) for layer in one.hidden)]:
            mine = mine.double()
            errors = torch.linalg.vector_norm(theirs.double() - mine, dim=-1) / torch.linalg.vector_norm(mine, dim=-1)
            total, count = total + errors.sum().item(), count + len(errors)
            worst = max(worst, errors.max().item())
    return {"mean": total / count, "largest": worst}


def measure(recipe: Recipe, dtypes: Sequence[str], folder: Path, prompts: int) -> list[dict[str, Any]]:
    """Return a row for each dtype; losses are relative to the predictor trained on float32 states."""
    from firp_cli.decoding.tree_spec import parse_tree
    from firp_cli.evaluation.gate import gate
    from firp_cli.evaluation.quality import evaluate
    from firp_cli.predictors.folder import load_predictor
    from firp_cli.store.reader import Store
    from firp_cli.store.verify import describe_store
    from firp_cli.training.trainer import train

    teacher, lean = load_teacher(recipe.teacher), load_teacher(recipe.teacher)
    use_lean_layers(lean)  # for all but training
    stores = {name: Store.open(path, verify=True) for name, path in prepare(recipe, lean, dtypes, folder).items()}
    held_out = stores["held out"]
    starts = [int(item.loss_mask.int().argmax()) for item in held_out]
    chosen = [held_out[index].input_ids[:start].tolist() for index, start in enumerate(starts[:prompts])]
    rows = []
    for number, dtype in enumerate(dtypes):
        say(f"{dtype}: training and decoding, {number + 1} of {len(dtypes)}")
        train(recipe, teacher, stores[dtype], folder / dtype)
        predictor = load_predictor(folder / dtype, lean)
        tree = parse_tree(TREE, predictor.steps)
        quality = evaluate(lean, predictor, held_out, tree)
        decoded = gate(lean, predictor, chosen, tree, NEW_TOKENS)
        rows.append(
            {
                "dtype": dtype,
                "bytes_per_token": describe_store(stores[dtype].folder)["bytes_per_token"],
                "state_error": state_error(stores[REFERENCE], stores[dtype]),
                "expected_accepted_length_chain": quality.expected_accepted_length_chain,
                "expected_accepted_length_tree": quality.expected_accepted_length_tree,
                "decoded_accepted_length": decoded["real"],
                "decoded_prompts": decoded["prompts"],
                "kl_step_1": quality.steps[0].kl,
            }
        )
    return compare(rows)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `bytes_ratio` to bfloat16, and `lost_*` against float32: the lost shares of accepted length."""
    by_dtype = {row["dtype"]: row for row in rows}
    best = by_dtype[REFERENCE]
    for row in rows:
        if "bfloat16" in by_dtype:
            row["bytes_ratio"] = row["bytes_per_token"] / by_dtype["bfloat16"]["bytes_per_token"]
        for length in ("expected_accepted_length_chain", "expected_accepted_length_tree", "decoded_accepted_length"):
            row["lost_" + length.removesuffix("_accepted_length")] = 1 - row[length] / best[length]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table; losses are in percent of the float32 row."""
    lines = [
        "| dtype | bytes per token | of bfloat16 | error of a state, mean (largest) | expected, chain | expected, tree "
        "| decoded | lost: expected, decoded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = row["state_error"]
        cells = [
            row["dtype"],
            f"{row['bytes_per_token']:,.1f}",
            f"{row['bytes_ratio']:.3f}" if "bytes_ratio" in row else "",
            f"{error['mean']:.2%} ({error['largest']:.2%})",
            f"{row['expected_accepted_length_chain']:.3f}",
            f"{row['expected_accepted_length_tree']:.3f}",
            f"{row['decoded_accepted_length']:.3f}",
            f"{row['lost_expected_accepted_length_tree']:+.2%}, {row['lost_decoded']:+.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Collect, convert, train, measure; print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/store-dtypes"), help="a new folder")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="float32 is always measured")
    parser.add_argument("--conversations", type=int, default=480, help="conversations of the arithmetic data set")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts to decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--regenerate", action="store_true", help="let the teacher answer; default: the data set's answers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--quick", action="store_true", help="a few of everything: checks that the script runs, measures nothing"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.conversations, arguments.steps, arguments.prompts = 40, 3, 2
    if arguments.output.exists():
        parser.error(f"{arguments.output} is there already: give another --output, or delete it")
    quiet_libraries(verbose=False)
    from firp_cli.provenance import environment

    settings = {
        "data.limit": arguments.conversations,
        "data.store_dtype": REFERENCE,
        "data.regenerate": arguments.regenerate,
        "training.max_steps": arguments.steps,
        "training.epochs": 1000,  # as many as the optimizer steps take
        "training.validation_fraction": 0.0,
        "training.gate_prompts": 0,
        "training.seed": arguments.seed,
    }
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in settings.items()])
    dtypes = [REFERENCE, *(dtype for dtype in arguments.dtypes if dtype != REFERENCE)]
    rows = measure(recipe, dtypes, arguments.output, arguments.prompts)
    if arguments.json:
        described = {key: str(value) for key, value in settings.items()}
        print(json.dumps({"environment": environment(), "settings": described, "rows": rows}, indent=2))
    else:
        print(markdown(rows))
        print(
            f"target of int8: at most {MOST_BYTES} of bfloat16's bytes, at most {MOST_LOST:.0%} of accepted length lost"
        )


if __name__ == "__main__":
    main()
