"""Tiny teachers of every tested family, built in code, and fake predictors: always, never or sometimes right."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from firp_cli.predictors.base import Draft, Predictor, SequenceBatch
from firp_cli.predictors.registry import build_predictor
from firp_cli.recipe import KINDS, PredictorSection
from firp_cli.teacher.attention import causal_allowed
from firp_cli.teacher.stack import Teacher

VOCABULARY, HIDDEN, LAYERS = 97, 48, 4
ROOT = Path(__file__).resolve().parent.parent

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "mistral-window": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}


@lru_cache
def tiny_model(family: str) -> Any:
    """A random causal LM. Weights are wide, so that greedy text wanders instead of repeating one token."""
    name, options = FAMILIES[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**(settings | options))
    torch.manual_seed(sum(map(ord, family)))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@lru_cache
def tiny_teacher(family: str = "llama") -> Teacher:
    return Teacher(tiny_model(family), name=f"tiny-{family}")


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher("llama")


@pytest.fixture(params=list(FAMILIES))
def any_teacher(request: pytest.FixtureRequest) -> Teacher:
    """Every family in turn."""
    return tiny_teacher(request.param)


def make_predictor(teacher: Teacher, seed: int = 0, **section: Any) -> Predictor:
    """A predictor with random weights near the identity."""
    config = KINDS[section["kind"]].model_validate(section)
    predictor = build_predictor(config, teacher)
    torch.manual_seed(seed)
    predictor.initialise("identity", teacher)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return predictor.eval().requires_grad_(False)


def generate_reference(model: Any, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """What transformers' own greedy `generate` writes after one prompt, EOS included."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0} | options
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def sequence_batch(
    teacher: Teacher, sequences: list[list[int]], responses: list[int], layers: list[int]
) -> SequenceBatch:
    """Teacher-forced states of whole sequences; `responses[b]` is where the response of sequence b starts."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    positions = torch.arange(length).expand(len(sequences), length)
    states: dict[int, Tensor] = {}
    mask = teacher.sequence_mask(causal_allowed(lengths, length), positions)
    last = teacher.run(
        teacher.embed(ids), positions, mask, on_layer=lambda layer, hidden: states.update({layer: hidden})
    )
    place = torch.arange(length)[None]
    loss_mask = (place >= torch.tensor(responses)[:, None]) & (place < lengths[:, None])
    return SequenceBatch(ids, lengths, loss_mask, teacher.norm(last), {layer: states[layer] for layer in layers})


class FakePredictor(Predictor):
    """Drafts from known continuations: finds where a state stands in them and answers with what follows, or not.

    `right(position, step)` says whether the draft of that step is the true token; it is token+1 otherwise. Other
    candidates fill the breadth with lower probability.
    """

    def __init__(
        self, teacher: Teacher, sequences: list[list[int]], steps: int, right: Callable[[int, int], bool]
    ) -> None:
        super().__init__(PredictorSection(), steps)
        self.right = right
        batch = sequence_batch(teacher, sequences, [1] * len(sequences), [])
        rows = [(batch.final[b, n], b, n) for b in range(len(sequences)) for n in range(len(sequences[b]))]
        self.states = torch.stack([row[0] for row in rows])
        self.places = [(b, n) for _, b, n in rows]
        self.sequences = sequences

    def draft_states(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError

    def finish(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        return node_final[:, None].expand(-1, self.steps, -1)

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        distance = torch.cdist(states.float(), self.states.to(states.device).float())
        logits = torch.zeros(states.shape[0], teacher.vocab_size, device=states.device)
        for row, place in enumerate(distance.argmin(1).tolist()):
            b, n = self.places[place]
            sequence = self.sequences[b]
            token = sequence[n + step + 1] if n + step + 1 < len(sequence) else 5
            if not self.right(n, step):
                token = (token + 1) % teacher.vocab_size
                logits[row, sequence[min(n + step + 1, len(sequence) - 1)]] = -9.0
            logits[row, token] = 6.0
        return logits

    def initialise(self, init: str, teacher: Teacher) -> None:
        pass


class ParentPredictor(FakePredictor):
    """A predictor whose children depend on the parent's token: the true successor only below the true parent."""

    def child_candidates(self, draft: Draft, depth: int, parents: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs = super().child_candidates(draft, depth, parents)
        shift = (parents % 2)[:, :, None]
        return (tokens + shift) % VOCABULARY, log_probs - 0.1 * shift
