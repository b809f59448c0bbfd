"""Predictors of every kind for the trained teacher, on answers that it wrote itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.forward import capture
from firp_cli.data.conversations import encode_prompt
from firp_cli.data.store import FINAL
from firp_cli.decoding.engine import Engine
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.registry import build_predictor
from firp_cli.recipe import KINDS, TrainingConfig
from firp_cli.teacher.stack import Teacher
from firp_cli.training.plain import train_plain
from suite.shapes import sections
from suite.teacher import trained
from suite.work import Shared, Table, Work

AT_ONCE = 64  # answers
PACK_TOKENS = 16_384  # of a forward that captures states
EPOCHS = 100_000  # the clock ends a run
PIPELINE_SHARE = 0.25  # of the training time of a kind that drafts trees: what an exit learns, it learns in seconds


@dataclass
class Written:
    """An answer of the teacher's with its states: what training reads of a store."""

    input_ids: Tensor
    loss_mask: Tensor
    final: Tensor
    hidden: dict[int, Tensor]


def train_predictors(shared: Shared, work: Work) -> None:
    """Answers, their states, and each kind trained: those that draft trees for an equal part of the time, then those
    that feed a pipeline for a small one. Later parts find `predictors`, kind to predictor.
    """
    sizes, clock = shared.sizes, work.clock
    teacher = trained(shared)
    wanted = sections(teacher.num_layers)
    made: dict[str, Predictor] = {}
    for kind, section in wanted.items():
        with torch.inference_mode(False):
            made[kind] = build_predictor(KINDS[kind].model_validate(section), teacher)
    order = sorted(made, key=lambda kind: share(made[kind]), reverse=True)
    layers = sorted({layer for predictor in made.values() for layer in predictor.required_layers})
    sequences = written(shared, teacher, layers)
    work.values["answers"] = {
        "number": len(sequences),
        "tokens": int(sum(item.loss_mask.sum() for item in sequences)),
        "seconds": clock.spent(),
    }
    shared.found["predictors"] = {}
    headers = [
        "kind",
        "parameters",
        "steps",
        "seconds",
        "top-1 by step, start",
        "top-1 by step, best",
        "expected length",
    ]
    table = Table("Predictors, on held-out answers of the teacher", headers)
    work.tables.append(table)
    for number, kind in enumerate(order):
        predictor = made[kind]
        waiting = sum(share(made[other]) for other in order[number:])
        seconds = 0.9 * clock.left() * share(predictor) / waiting
        settings = TrainingConfig(
            init="ridge" if predictor.ridge_layers() else "identity",
            epochs=EPOCHS,
            micro_batch_size=min(sizes.conversations, len(sequences)),
            anchors_per_sequence=sizes.anchors,
            max_steps=min(sizes.train_steps, 10_000),
        )
        history = train_plain(predictor, teacher, stored(sequences, predictor), settings, seconds)
        found = summary(predictor, history)
        work.values[kind] = found | {"settings": settings.model_dump()}
        table.cells.append(_cells(kind, found))
        work.key = "expected accepted length: " + ", ".join(f"{line[0]} {line[-1]}" for line in table.cells)
        dtype = torch.float32 if shared.device.type == "cpu" else teacher.dtype
        shared.found["predictors"][kind] = predictor.to(dtype)


def share(predictor: Predictor) -> float:
    """Of the training time, relative to the other kinds."""
    return PIPELINE_SHARE if predictor.pipeline else 1.0


def stored(sequences: list[Written], predictor: Predictor) -> list[Written]:
    """The answers as a store for this predictor holds them: no step moves states that it does not read."""
    layers = predictor.required_layers
    return [replace(item, hidden={layer: item.hidden[layer] for layer in layers}) for item in sequences]


def written(shared: Shared, teacher: Teacher, layers: list[int]) -> list[Written]:
    """The teacher's greedy answers to questions of all sources in turn, with the states of `layers`."""
    sizes, corpus = shared.sizes, shared.found["corpus"]
    share = -(-sizes.answers // len(corpus.conversations))
    asked = [encode_prompt(item[:1], teacher.tokenizer) for item in corpus.mixed(2 * share)]
    prompts = [ids for ids in asked if len(ids) <= sizes.question_tokens][: sizes.answers]
    prompts.sort(key=len)
    engine = Engine(teacher)
    sequences, masks = [], []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        for prompt, answer in zip(part, engine.generate(part, sizes.answer_tokens), strict=True):
            ids = torch.tensor([*prompt, *answer.token_ids])
            sequences.append(ids)
            masks.append(torch.arange(len(ids)) >= len(prompt))
    states = captured_states(teacher, sequences, layers)
    return [
        Written(ids, mask, own[FINAL], {layer: own[f"hidden.{layer}"] for layer in layers})
        for ids, mask, own in zip(sequences, masks, states, strict=True)
    ]


def captured_states(teacher: Teacher, sequences: list[Tensor], layers: list[int]) -> list[dict[str, Tensor]]:
    """The states of every sequence, in memory."""
    found: list[dict[str, Tensor]] = [{} for _ in sequences]

    def sink(indices: list[int], states: dict[str, Tensor]) -> None:
        lengths = [len(sequences[index]) for index in indices]
        for name, rows in states.items():
            for index, part in zip(indices, rows.cpu().split(lengths), strict=True):
                found[index][name] = part

    capture(teacher, sequences, layers, PACK_TOKENS, sink)
    return found


def summary(predictor: Predictor, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run: its size, and its first and best measurement on held-out answers."""
    held_out = [row for row in history if row["split"] == "validation"]
    best = max(held_out, key=lambda row: row["expected_accepted_length"])
    return {
        "predictor": predictor.describe(),
        "steps": history[-1]["step"],
        "seconds": history[-1]["seconds"],
        "start": held_out[0],
        "best": best,
        "expected_accepted_length": best["expected_accepted_length"],
    }


def _cells(kind: str, found: dict[str, Any]) -> list[str]:
    return [
        kind,
        f"{found['predictor']['parameters'] / 1e6:.1f} M",
        str(found["steps"]),
        f"{found['seconds']:.0f}",
        " ".join(f"{share:.2f}" for share in found["start"]["top1"]),
        " ".join(f"{share:.2f}" for share in found["best"]["top1"]),
        f"{found['expected_accepted_length']:.2f}",
    ]
