#!/usr/bin/env python3
"""Ablations of a SPEED pipeline: fewer exits, thresholds, exits that are never right, with and without the guard.

Every variant decodes the same prompts in one interleaved run beside autoregressive decoding, with the trained weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from firp_cli.api.bench_run import load_bench_prompts
from firp_cli.api.loading import load_pair
from firp_cli.config import SpeedConfig
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.evaluation.methods import BenchSettings, Method, make_methods, pipeline_details
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.folder import build_predictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import BenchRow
from firp_cli.teacher.teacher import Teacher


@dataclass
class Variant:
    """A pipeline to measure. `start`: trained weights, or maps at their start values."""

    name: str
    exits: list[int]
    threshold: float | None = None
    start: str = "trained"
    guard: bool = False


def variants(loops: int) -> list[Variant]:
    """Return the variants: all exits, fewer, with thresholds; untrained, never right, and never right with the
    guard."""
    every = list(range(1, loops))
    rows = [Variant("all exits", every)]
    for exits in ([1], every[1:], every[-1:]):
        if exits and exits != every and exits not in [row.exits for row in rows]:
            rows.append(Variant(f"exits {exits}", exits))
    rows += [Variant(f"threshold {threshold}", every, threshold) for threshold in (0.5, 0.9)]
    rows.append(Variant(f"exits {every[-1:]}, guarded", every[-1:], guard=True))
    rows.append(Variant("identity maps", every, start="identity"))
    rows.append(Variant("never right", every, start="never"))
    rows.append(Variant("never right, guarded", every, start="never", guard=True))
    return rows


class NeverRight(SpeedPredictor):
    """Exits that predict the least probable token."""

    def pipeline_logits(
        self, teacher: Teacher, exits: Mapping[int, torch.Tensor], final: torch.Tensor | None, *arguments: Any
    ) -> torch.Tensor:
        logits = super().pipeline_logits(teacher, exits, final, *arguments)
        logits[: len(exits)] *= -1.0
        return logits


def build(variant: Variant, trained: SpeedPredictor, teacher: Teacher) -> SpeedPredictor:
    """Return the variant's predictor."""
    config = SpeedConfig(kind="speed", exits=variant.exits, threshold=variant.threshold, loops=trained.grouping)
    if variant.start == "never":
        predictor: SpeedPredictor = NeverRight(config, teacher)
    else:
        built = build_predictor(config, teacher)
        assert isinstance(built, SpeedPredictor)
        predictor = built
    predictor.initialise("identity", teacher)
    if variant.start != "identity":
        for exit_map, loop in zip(predictor.maps, predictor.exits, strict=True):
            exit_map.load_state_dict(trained.maps[trained.exits.index(loop)].state_dict())
    return predictor.to(teacher.device).eval().requires_grad_(False)


def cells(row: BenchRow) -> list[str]:
    """Return a line of the table."""
    speed = f"{row.speedup:.2f}" if row.speedup else "-"
    same = f"{row.lossless.identical}/{row.lossless.compared}" if row.lossless.compared else "reference"
    if row.pipeline is None:
        return [row.method, "-", "-", "-", f"{row.step_milliseconds:.2f}", speed, same]
    accuracy = " ".join(f"{rate:.2f}" for rate in row.pipeline.exit_accuracy) if row.pipeline.tokens else "-"
    rate = f"{row.pipeline.tokens_per_tick:.2f}" if row.pipeline.ticks else "-"
    plain = str(row.pipeline.plain_tokens)
    return [row.method, rate, accuracy, plain, f"{row.step_milliseconds:.2f}", speed, same]


def main() -> int:
    """Measure and print a Markdown table and the breakdown of a tick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictor", default="speed", help="trained speed predictor: folder or embedded name")
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--data-dir")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    teacher, trained, _ = load_pair(arguments.predictor, None, force=False)
    assert isinstance(trained, SpeedPredictor), f"{arguments.predictor} is no speed predictor"
    settings = BenchSettings(repeats=arguments.repeats)
    methods = make_methods(teacher, {}, ["ar"], settings)
    for variant in variants(trained.loops):
        predictor = build(variant, trained, teacher)
        engine = PipelineEngine(teacher, predictor, guard=variant.guard)
        details = pipeline_details(teacher, predictor)
        methods.append(Method(variant.name, engine.generate, add_details=details))
    prompts = load_bench_prompts(arguments.dataset, arguments.data_dir, arguments.prompts, teacher)
    report = run_bench(
        teacher,
        prompts,
        methods,
        settings,
        progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True),
    )
    headers = ["variant", "tokens per tick", "exit accuracy", "ar tokens", "ms per loop or step", "speedup", "same"]
    print("\n| " + " | ".join(headers) + " |\n|" + "---|" * len(headers))
    for row in report.rows:
        print("| " + " | ".join(cells(row)) + " |")
    cost = next(row.pipeline.cost for row in report.rows if row.pipeline)
    assert cost is not None
    print(
        f"\ntick {cost.tick:.2f} ms = layers {cost.layers:.2f} + heads {cost.heads:.2f} + decision "
        f"{cost.decision:.2f}; one loop of one token {cost.loop:.2f} ms ({cost.relative:.2f} x); layers for "
        f"1..{trained.loops} tokens " + " ".join(f"{value:.2f}" for value in cost.rows)
    )
    if arguments.output:
        from firp_cli.results import as_json

        arguments.output.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
