#!/usr/bin/env python3
"""Memory of training against the vocabulary and the length of conversations, each point in a process of its own.

    python scripts/memory_growth.py [--steps 2] [--vocabularies 8192,131072] [--lengths 512,1024,2048,4096] [--json]

A point trains a FIRP predictor of a random Llama through the trainer and its engine, on a CPU in float32, and reads the
kernel's peak of resident memory. There are three figures, because the vocabulary matrix (embedding and head in one)
belongs to the teacher and not to the loss: the whole process; the process without that matrix; and the memory that
training adds to the resident memory before it. The last is the strictest: its ratio is to stay at or below 1.2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE, FEED, LAYERS, FIRST, BATCH, ANCHORS = 256, 688, 8, 2, 4, 64


@dataclass
class Conversation:
    """The fields of a store that the trainer reads."""

    input_ids: Any
    loss_mask: Any
    final: Any
    hidden: dict[int, Any]


def measure(vocabulary: int, length: int, steps: int) -> dict[str, int]:
    """Train `steps` steps in this process; return bytes: the peak, and the resident memory before training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from firp_cli.config import Recipe
    from firp_cli.distributed.launch import load_deepspeed
    from firp_cli.teacher.load import wrap_model
    from firp_cli.training.trainer import train

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=SIZE,
        intermediate_size=FEED,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 14,
        tie_word_embeddings=True,
    )
    teacher = wrap_model(LlamaForCausalLM(config), name=f"random-{vocabulary}")
    store = [
        Conversation(
            torch.randint(0, vocabulary, (length,)),
            torch.ones(length, dtype=torch.bool),
            torch.randn(length, SIZE),
            {FIRST: torch.randn(length, SIZE)},
        )
        for _ in range(2 * BATCH)
    ]
    recipe = Recipe.model_validate(
        {
            "predictor": {"kind": "firp", "layer": FIRST, "steps": 4},
            "data": {"max_length": length},
            "training": {
                "init": "identity",
                "micro_batch_size": BATCH,
                "anchors_per_sequence": ANCHORS,
                "epochs": steps,
                "max_steps": steps,
                "validation_fraction": 0.0,
                "gate_prompts": 0,
            },
        }
    )
    load_deepspeed()
    with tempfile.TemporaryDirectory() as folder:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # restarts the peak from here
        train(recipe, teacher, store, Path(folder) / "run")
        return {"peak": _status("VmHWM"), "before": before}


def _status(field: str) -> int:
    """Return a memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def point(vocabulary: int, length: int, steps: int) -> dict[str, Any]:
    """Measure one point in a fresh process. Raises RuntimeError with that process's error output."""
    command = [sys.executable, __file__, "--point", f"{vocabulary},{length}", "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"vocabulary {vocabulary}, length {length}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    matrix = vocabulary * SIZE * 4
    return {
        "vocabulary": vocabulary,
        "length": length,
        "peak_bytes": found["peak"],
        "vocabulary_matrix_bytes": matrix,
        "peak_without_matrix_bytes": found["peak"] - matrix,
        "training_bytes": found["peak"] - found["before"],
    }


def growth(points: list[dict[str, Any]], by: str) -> dict[str, Any]:
    """Return for each figure the last point's ratio to the first one's, and the exponent in the varied size."""
    first, last = points[0], points[-1]
    span = math.log(last[by] / first[by])
    figures = ("peak_bytes", "peak_without_matrix_bytes", "training_bytes")
    ratios = {name: last[name] / first[name] for name in figures}
    return {"ratio": ratios, "exponent": {name: math.log(ratio) / span for name, ratio in ratios.items()}}


def show(title: str, points: list[dict[str, Any]], found: dict[str, Any]) -> None:
    print(f"\n{title}")
    print(
        f"{'vocabulary':>10} {'length':>7} {'process':>10} {'its matrix':>11} {'without it':>11} {'training':>10}  MiB"
    )
    for row in points:
        columns = ("peak_bytes", "vocabulary_matrix_bytes", "peak_without_matrix_bytes", "training_bytes")
        cells = [f"{row[name] / 2**20:.0f}" for name in columns]
        print(f"{row['vocabulary']:>10} {row['length']:>7} {cells[0]:>10} {cells[1]:>11} {cells[2]:>11} {cells[3]:>10}")
    for kind, values in found.items():
        process, without, training = values.values()
        print(f"{kind:>18} {process:>10.2f} {'':>11} {without:>11.2f} {training:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", default="8192,131072")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        vocabulary, length = map(int, given.point.split(","))
        print(json.dumps(measure(vocabulary, length, given.steps)))
        return
    vocabularies, lengths = ([int(part) for part in text.split(",")] for text in (given.vocabularies, given.lengths))
    by_vocabulary = [point(vocabulary, lengths[0], given.steps) for vocabulary in vocabularies]
    by_length = [by_vocabulary[0], *(point(vocabularies[0], length, given.steps) for length in lengths[1:])]
    results = {
        "vocabulary": {"points": by_vocabulary, **growth(by_vocabulary, "vocabulary")},
        "length": {"points": by_length, **growth(by_length, "length")},
    }
    if given.json:
        print(json.dumps(results, indent=2))
        return
    show("vocabulary", by_vocabulary, growth(by_vocabulary, "vocabulary"))
    show("length", by_length, growth(by_length, "length"))


if __name__ == "__main__":
    main()
