"""Arguments of small training runs."""

from __future__ import annotations

FIRP = ["predictor.kind=firp", "predictor.layer=2", "predictor.steps=3"]
SETTINGS = [
    "training.micro_batch_size=4",
    "training.anchors_per_sequence=6",
    "training.validation_fraction=0.2",
    "training.gate_prompts=2",
    "training.learning_rate=5e-3",
    "data.max_new_tokens=12",
]
