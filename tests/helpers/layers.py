"""Teachers and states for comparisons of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.teacher import Teacher
from helpers.models import DESCRIBED, FAMILIES, SETTINGS, VOCABULARY, described_model, looped_model, tiny_model

LOOPED = {"3x4": (3, 4), "1x4": (1, 4)}
LOOPS = {f"{name}-loops": DESCRIBED[name] for name in DESCRIBED if name != "raven-norms"}  # it differs by 1.6e-5


def new_teacher(name: str) -> Teacher:
    """Return a teacher on the library's layers with its own weights; no norm or bias is 1 or 0."""
    if name in FAMILIES:
        return wrap_model(varied(copy.deepcopy(tiny_model(name))))
    if name in LOOPED:
        return wrap_model(varied(copy.deepcopy(looped_model(*LOOPED[name]))))
    return wrap_model(varied(described_model(name.removesuffix("-loops"))), looped=LOOPS[name][1])


@torch.no_grad()
def varied(model: Any) -> Any:
    """Give a model random norms and biases."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def small_llama(**options: Any) -> Any:
    torch.manual_seed(3)
    return varied(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SETTINGS | options))).eval())


def some_ids(rows: int = 2, length: int = 30) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states_of(teacher: Teacher, ids: Tensor, stop: int | None = None) -> list[Tensor]:
    """Return h^0..h^stop of sequences of different lengths and, without `stop`, the normed states and the logits."""
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    allowed = causal_allowed(length - 5 * torch.arange(batch), length)
    states: list[Tensor] = []
    mask = teacher.sequence_mask(allowed, positions)
    last = teacher.run(teacher.embed(ids), positions, mask, stop=stop, on_layer=lambda _, hidden: states.append(hidden))
    if stop is None:
        states += [teacher.norm(last), teacher.head(teacher.norm(last))]
    return states


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    """Compare up to rounding, relative to the size: the operations are the same in another order."""
    for place, (state, reference) in enumerate(zip(got, expected, strict=True)):
        difference = (state - reference).abs().max().item()
        assert difference <= tolerance * max(1.0, reference.abs().max().item()), (place, difference)


def tolerance_of(teacher: Teacher) -> float:
    """Return the tolerance of `assert_equal`: a norm after every loop magnifies small states and their rounding."""
    return 5e-5 if teacher.looped and teacher.looped.norm_each_loop else 2e-5
