"""Allocations of a training step: no logits of all drafts, nothing quadratic in a length, near the memory model."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from firp_cli.config import Recipe
from firp_cli.predictors.anchors import choose_anchors
from firp_cli.predictors.base import SequenceBatch
from firp_cli.predictors.folder import build_predictor
from firp_cli.teacher.load import wrap_model
from firp_cli.training import objective as objectives
from firp_cli.training.memory_model import memory_lines
from firp_cli.training.objective import ObjectiveModule

SIZE, FEED, LAYERS, FIRST = 64, 160, 4, 1
STEP_LINES = (
    *("predictor gradients", "pseudo rows, for backward", "keys and values", "real rows in one layer"),
    *("attention mask", "drafts, targets, gradients", "logits of one piece"),
)


class Live(TorchDispatchMode):
    """Record of the live bytes of tensors that operations created, their peak, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, int] = {}

    def known(self, *modules: torch.nn.Module) -> None:
        """Register weights, which exist before: views of them are not counted."""
        for module in modules:
            for parameter in module.parameters():
                self._seen[parameter.untyped_storage().data_ptr()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if place and place not in self._seen:
                    self._seen[place] = size
                    self.live += size
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
                    weakref.finalize(storage, self._drop, place)
        return out

    def _drop(self, place: int) -> None:
        self.live -= self._seen.pop(place, 0)


def step(vocabulary: int, length: int, anchors: int = 32, window: int | None = None) -> tuple[Live, dict[str, int]]:
    """Run a forward and backward on a conversation of each kind; return the measurement and the memory model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=SIZE,
        intermediate_size=FEED,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    teacher = wrap_model(LlamaForCausalLM(config), check=False)
    teacher.windows = [window] * LAYERS
    assert teacher.standard_attention
    training = {"micro_batch_size": 2, "anchors_per_sequence": anchors, "init": "identity"}
    recipe = Recipe.model_validate(
        {
            "predictor": {"kind": "firp", "layer": FIRST, "steps": 4},
            "data": {"max_length": length},
            "training": training,
        }
    )
    assert recipe.predictor is not None
    predictor = build_predictor(recipe.predictor, teacher)
    predictor.initialise("identity", teacher)
    rows = (2, length)
    states = [torch.randn(*rows, SIZE) for _ in range(2)]
    mask = torch.ones(rows, dtype=torch.bool)
    batch = SequenceBatch(torch.zeros(rows).long(), torch.full((2,), length), mask, states[0], {FIRST: states[1]})
    chosen = choose_anchors(batch, 4, anchors, [0, 1])
    module = ObjectiveModule(predictor.requires_grad_(True), teacher, recipe.training)
    live = Live()
    live.known(teacher.model, predictor)
    with live:
        module(batch, chosen)[0].backward()
    parameters = sum(parameter.numel() for parameter in predictor.parameters())
    lines = {line.name: line.bytes for line in memory_lines(recipe, teacher, parameters, 1)}
    return live, {name: lines[name] for name in STEP_LINES}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Scale the bounds to a tiny model; return the bytes of a logit matrix."""
    monkeypatch.setattr(objectives, "LOGIT_BUDGET", (1 << 15, 1 << 15))
    return 4 << 15


def test_memory_is_independent_of_vocabulary_size(small_pieces: int):
    few, many = step(1024, 256)[0], step(16384, 256)[0]
    assert many.peak <= 1.2 * few.peak
    assert many.largest < 2 * 32 * 16384 * 4 / 2, "nobody has made the logits of a step's drafts at once"
    assert many.largest <= max(small_pieces, few.largest)


@pytest.mark.parametrize("window", [None, 200])
def test_memory_grows_linearly_with_length(small_pieces: int, window: int | None):
    short, long = step(256, 512, window=window)[0], step(256, 4096, window=window)[0]
    assert long.peak <= 8.2 * short.peak
    assert long.largest < 4096 * 4096, "not even a bool for each pair of positions"


@pytest.mark.parametrize(("vocabulary", "length", "anchors"), [(512, 256, 64), (8192, 512, 32), (512, 2048, 16)])
def test_memory_model_is_close_to_measurement(vocabulary: int, length: int, anchors: int):
    live, lines = step(vocabulary, length, anchors)
    assert 1.0 <= sum(lines.values()) / live.peak <= 2.0, "on the high side, by less than half of it"
