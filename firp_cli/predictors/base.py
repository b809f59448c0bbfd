"""Interfaces of draft predictors: to training a `Predictor`, to decoding a `TreePredictor` that fills draft trees or an
`ExitPredictor` that starts tokens early in a pipeline.

Shapes: B sequences, R real rows, A anchors, k steps, s candidates per node, d hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.config import PredictorSection
from firp_cli.errors import PredictorError
from firp_cli.teacher.teacher import Teacher

RowsHook = Callable[[int, Tensor, Tensor], None]
PseudoStateMaker = Callable[[int, int, Tensor], Tensor]
LEAST_PARTS, MOST_PARTS = 8, 128  # parts of a vocabulary that `largest` searches separately
KERNEL_BREADTH = 32  # the kernel searches one token at a time


@dataclass
class SequenceBatch:
    """Right-padded conversations with their cached states.

    Attributes:
        input_ids: (B, T) long. lengths: (B,) long. loss_mask: (B, T) bool, True on response tokens.
        hidden: layer -> (B, T, d), for the layers that the predictor requires.
        final: (B, T, d), the normed last states.
    """

    input_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor
    final: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> SequenceBatch:
        """Return the batch on a device, floating states in the teacher's dtype."""
        return SequenceBatch(
            self.input_ids.to(device),
            self.lengths.to(device),
            self.loss_mask.to(device),
            self.final.to(device, dtype),
            {layer: states.to(device, dtype) for layer, states in self.hidden.items()},
        )


@dataclass
class Draft:
    """Candidates for the tokens after a root: for each depth the s most probable, in descending order.

    Attributes:
        tokens: (B, k, s) long. log_probs: (B, k, s) float32. Only a predictor may read them: the tree builder asks
        `TreePredictor.child_candidates`.
    """

    tokens: Tensor
    log_probs: Tensor


class Predictor(nn.Module, ABC):
    """A draft predictor of k steps: step i predicts a token from what is known at the anchor n."""

    def __init__(self, config: PredictorSection, steps: int) -> None:
        super().__init__()
        self.config = config
        self.steps = steps

    @property
    def kind(self) -> str:
        return str(getattr(self.config, "kind", type(self).__name__))

    @property
    def offsets(self) -> tuple[int, ...]:
        """For each step i the distance from the anchor n to the teacher's row that its draft is compared with."""
        return tuple(range(1, self.steps + 1))

    @property
    def pipeline(self) -> tuple[int, ...]:
        """Exit loops, then r, of predictors that feed a pipeline; empty for those that draft trees."""
        return ()

    @property
    def required_layers(self) -> tuple[int, ...]:
        """Hidden layers that a store must hold for training, beside the final state."""
        return self.config.transfer_layers[:1]

    @property
    def own_vocabulary(self) -> bool:
        """True if `step_logits` uses parameters of the predictor, not the teacher's head alone."""
        return False

    def loss_weights(self, decay: float) -> list[float]:
        """Return w_1..w_k of the training loss, not normalised: 1, decay, decay^2, ..."""
        return [decay**index for index in range(self.steps)]

    def accepted(self, hits: Tensor) -> Tensor:
        """Return which steps count as accepted (..., k), given which hit (..., k): a chain ends at its first miss."""
        return hits.cumprod(dim=-1)

    @abstractmethod
    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        """Return the states that the head reads, for every anchor (B, A) and step: (B, A, k, d). Gradients reach the
        predictor alone. `on_layer(l, real (B, R, d), pseudo (B, A, k', d))` is called at each layer with pseudo states.
        """

    @abstractmethod
    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        """Return float32 logits (..., V) of step `step` (1..k) from its states (..., d)."""

    @abstractmethod
    def initialise(self, init: str, teacher: Teacher) -> None:
        """Set the start values for `identity` or `random`; training/ridge.py solves `ridge`. Raises PredictorError."""

    def ridge_layers(self) -> tuple[int, ...]:
        """Return for each step the layer l of the least-squares problem h_n^l -> h_{n+i}^l; empty: no ridge start."""
        return ()

    def ridge_target(self, teacher: Teacher, batch: SequenceBatch, hidden: Tensor) -> Tensor:
        """Return (B, T, d): row n + offsets[i-1] is the target of step i's map for row n of its layer's `hidden`."""
        return hidden

    def set_map(self, step: int, weight: Tensor, bias: Tensor | None) -> None:
        """Set a solved map: weight (d, d) with y = weight @ x, bias (d,)."""
        raise PredictorError(f"{self.kind} has no ridge start; use training.init=identity")

    def describe(self) -> dict[str, Any]:
        """Return kind, configuration and size."""
        return {
            "kind": self.kind,
            **self.config.model_dump(exclude={"kind"}),
            "steps": self.steps,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
        }


class TreePredictor(Predictor):
    """A predictor that fills draft trees: step i drafts token n+i+1."""

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        """Layer whose input step i enters, i = 1..k; empty for predictors without pseudo states."""
        return self.config.transfer_layers

    @property
    def parent_dependent(self) -> bool:
        """False if all nodes of a depth have the same candidates."""
        return True

    @property
    def teachers_head(self) -> bool:
        """True if the logits of every step are the teacher's head on the states that `draft_hidden` returns. The head
        can then read them together with the nodes of a decoding step.
        """
        return False

    def first_steps(self, steps: int) -> TreePredictor:
        """Return the predictor of the first `steps` steps, on the same weights: its drafts equal this one's.

        Raises PredictorError where `steps` is not in 1..k, or where later steps cannot be left out.
        """
        if not 1 <= steps <= self.steps:
            raise PredictorError(f"this {self.kind} predictor has 1 to {self.steps} steps, not {steps}")
        if steps == self.steps:
            return self
        limited = copy(self)
        limited._modules = dict(self._modules)  # a module's copy shares it
        limited._truncate(steps)
        limited.steps = steps
        return limited

    def _truncate(self, steps: int) -> None:
        """Drop the modules and the configuration of the steps after the first `steps`."""
        raise PredictorError(f"{self.kind} cannot leave out its later steps")

    def make_pseudo_states(self, first: int, last: int, hidden: Tensor) -> Tensor:
        """Return the pseudo states (B, (last - first + 1) * A, d) of steps first..last (1..k), step by step, from the
        anchors' states (B, A, d) at the layer that these steps enter.
        """
        raise PredictorError(f"{self.kind} has no pseudo states")

    def pseudo_state_maker(self) -> PseudoStateMaker:
        """Return `make_pseudo_states` for decoding, where the weights do not change."""
        return self.make_pseudo_states

    @abstractmethod
    def draft_hidden(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        """Return the states that the head reads: (B, k, d). Predictors with pseudo states read the accepted node's
        `pseudo` (B, k, d), after the last layer; others its normed final state `node_final` (B, d).
        """

    def logits(self, teacher: Teacher, states: Tensor) -> Tensor:
        """Return `step_logits` of all steps: states (B, k, d) to (B, k, V)."""
        rows = [self.step_logits(teacher, states[:, step - 1], step) for step in range(1, self.steps + 1)]
        return torch.stack(rows, dim=1)

    def draft(self, teacher: Teacher, states: Tensor, breadth: int, kernel: bool = False) -> Draft:
        """Return the `breadth` most probable tokens of each step, from states (B, k, d)."""
        return self.candidates(self.logits(teacher, states), breadth, kernel)

    def candidates(self, logits: Tensor, breadth: int, kernel: bool = False) -> Draft:
        """Return the `breadth` most probable tokens of each step, from float32 logits (B, k, V). `kernel`: find them by
        Triton kernels.
        """
        if kernel and breadth <= KERNEL_BREADTH:
            from firp_cli.predictors.triton_candidates import most_probable

            return Draft(*most_probable(logits, breadth))
        if logits.is_cuda:  # one kernel, `logsumexp` takes eight
            values, tokens = largest(logits.log_softmax(-1), breadth)
        else:
            values, tokens = logits.topk(breadth, dim=-1)
            values = values - logits.logsumexp(-1, keepdim=True)
        return Draft(tokens, values.clamp(max=0))  # rounding may give a probability above 1

    def child_candidates(self, draft: Draft, depth: int, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidate children at `depth` (1..k) of nodes with the tokens `parents` (B, M): tokens (B, M, s)
        and their log-probabilities (<= 0) given the parent, descending. A predictor whose steps depend on the parent's
        token overrides this method.
        """
        batch, nodes = parents.shape
        shape = (batch, nodes, draft.tokens.shape[-1])
        return draft.tokens[:, depth - 1, None].expand(shape), draft.log_probs[:, depth - 1, None].expand(shape)


class ExitPredictor(Predictor):
    """A predictor of early exits, its steps: after an exit loop it predicts the next token, which a pipeline starts.

    Attributes:
        loops: r. exits: the loops after which it predicts. grouping: loops of a teacher without sharing.
        threshold: least probability at which a predicted token starts; None: every one starts.
    """

    loops: int
    exits: tuple[int, ...]
    grouping: int | None
    threshold: float | None

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0,) * self.steps

    @property
    def pipeline(self) -> tuple[int, ...]:
        return (*self.exits, self.loops)

    def accepted(self, hits: Tensor) -> Tensor:
        """Return which exits' predictions hold (..., E): the exit and all later ones are right."""
        return hits.flip(-1).cumprod(dim=-1).flip(-1)

    @abstractmethod
    def pipeline_logits(
        self, teacher: Teacher, exits: Mapping[int, Tensor], final: Tensor | None, normed: bool = False
    ) -> Tensor:
        """Return float32 logits of exits and of the last loop, from one pass through norm and head.

        Args:
            exits: by j the states (B, d) after the exit loop `self.exits[j]`, in order.
            final: (B, d) state after the last layer, or None where that layer ran elsewhere.
            normed: True if `final` went through the final norm already.

        Returns (E', B, V) or, with `final`, (E' + 1, B, V), the last loop's at the end.
        """


class LinearMapPredictor(Predictor):
    """A predictor with one linear map (d, d) per step, started at the identity, at random or at its ridge solution."""

    def __init__(self, config: PredictorSection, steps: int, size: int, bias: bool) -> None:
        super().__init__(config, steps)
        self.maps = nn.ModuleList(nn.Linear(size, size, bias=bias) for _ in range(steps))

    def initialise(self, init: str, teacher: Teacher) -> None:
        for linear in self.maps:
            assert isinstance(linear, nn.Linear)
            if init == "random":
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            else:
                nn.init.eye_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def set_map(self, step: int, weight: Tensor, bias: Tensor | None) -> None:
        linear = self.maps[step - 1]
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(weight)
        if linear.bias is not None and bias is not None:
            linear.bias.copy_(bias)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of (..., V), in descending order, and their indices. Equals `topk` with half of its
    kernels on a CUDA device: it takes the largest of each part, then of these.
    """
    size = values.shape[-1]
    parts = max(number for number in range(1, MOST_PARTS + 1) if size % number == 0)
    length = size // parts
    if parts < LEAST_PARTS or length < 4 * count:
        return values.topk(count, dim=-1)
    part_values, places = values.unflatten(-1, (parts, length)).topk(count, dim=-1, sorted=False)
    best, chosen = part_values.flatten(-2).topk(count, dim=-1)
    return best, places.flatten(-2).gather(-1, chosen) + chosen // count * length
