"""What every draft predictor offers to training, evaluation and decoding, and the forward that they share.

Shapes: B sequences, R real rows, A anchors, k steps, s candidates per node, d hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
LEAST_PARTS, MOST_PARTS = 8, 128  # of a vocabulary, each searched on its own


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
        """The batch on a device, floating states in the teacher's dtype."""
        return SequenceBatch(
            self.input_ids.to(device),
            self.lengths.to(device),
            self.loss_mask.to(device),
            self.final.to(device, dtype),
            {layer: states.to(device, dtype) for layer, states in self.hidden.items()},
        )


@dataclass
class Draft:
    """Candidates for the tokens behind a root: per depth the s most probable, in descending order.

    Attributes:
        tokens: (B, k, s) long. log_probs: (B, k, s) float32. Only a predictor may read them: the tree builder asks
        `Predictor.child_candidates`.
    """

    tokens: Tensor
    log_probs: Tensor


class Predictor(nn.Module, ABC):
    """A draft predictor of k steps: step i drafts token n+i+1 from what is known at the anchor n."""

    def __init__(self, config: PredictorSection, steps: int) -> None:
        super().__init__()
        self.config = config
        self.steps = steps

    @property
    def offsets(self) -> tuple[int, ...]:
        """For each step i the distance from the anchor n to the teacher's row that its draft is compared with."""
        return tuple(range(1, self.steps + 1))

    @property
    def pipeline(self) -> tuple[int, ...]:
        """Exit loops, then r: for predictors that feed a pipeline; empty for those that draft trees."""
        return ()

    @property
    def parent_dependent(self) -> bool:
        """True unless a predictor says that the candidates of a depth are the same below all its nodes."""
        return True

    def first(self, steps: int) -> Predictor:
        """The predictor of the first `steps` steps alone, on the same weights: it drafts what this one drafts for them.

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
        """Drop the modules and the configuration of the steps behind the first `steps`."""
        raise PredictorError(f"{self.kind} runs all of its steps")

    @property
    def own_vocabulary(self) -> bool:
        """Whether `step_logits` runs parameters of the predictor, and not the teacher's head alone."""
        return False

    @property
    def teachers_head(self) -> bool:
        """Whether the logits of every step are the teacher's head on the states that `draft_hidden` gives, and nothing else:
        then they may be made along with those of a step's nodes.
        """
        return False

    def loss_weights(self, decay: float) -> list[float]:
        """w_1..w_k of the training loss, not normalised: 1, decay, decay^2, ..."""
        return [decay**index for index in range(self.steps)]

    def accepted(self, hits: Tensor) -> Tensor:
        """Which steps count as accepted (..., k) from which hit (..., k): a chain ends at its first miss."""
        return hits.cumprod(dim=-1)

    @property
    def kind(self) -> str:
        return str(getattr(self.config, "kind", type(self).__name__))

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        """Layer whose input step i enters, i = 1..k; empty for predictors without pseudo states."""
        return self.config.transfer_layers

    @property
    def required_layers(self) -> tuple[int, ...]:
        """Hidden layers that a store must hold for training, beside the final state."""
        return self.transfer_layers[:1]

    def make_pseudo_states(self, first: int, last: int, hidden: Tensor) -> Tensor:
        """Pseudo states (B, (last - first + 1) * A, d) of steps first..last (1..k), step by step, from the anchors'
        states (B, A, d) at the layer where these steps enter.
        """
        raise NotImplementedError(f"{self.kind} has no pseudo states")

    def pseudo_state_maker(self) -> PseudoStateMaker:
        """`make_pseudo_states` for decoding, where the weights stay as they are."""
        return self.make_pseudo_states

    @abstractmethod
    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        """States that the head reads, for every anchor (B, A) and step: (B, A, k, d). Gradients reach the predictor
        alone. `on_layer(l, real (B, R, d), pseudo (B, A, k', d))` is called at each layer that has pseudo states.
        """

    @abstractmethod
    def draft_hidden(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        """States that the head reads: (B, k, d). Predictors with pseudo states read the accepted node's (B, k, d),
        after the last layer; others its normed final state (B, d).
        """

    @abstractmethod
    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        """float32 logits (..., V) of step `step` (1..k) from states (..., d) made by `draft_states` or `draft_hidden`."""

    @abstractmethod
    def initialise(self, init: str, teacher: Teacher) -> None:
        """Start values for `identity` or `random`; ridge is solved by training/ridge.py. Raises PredictorError."""

    def ridge_layers(self) -> tuple[int, ...]:
        """For each step the layer l of the least-squares problem h_n^l -> h_{n+i}^l; empty: no ridge start."""
        return ()

    def ridge_target(self, teacher: Teacher, batch: SequenceBatch, hidden: Tensor) -> Tensor:
        """(B, T, d): row n + offsets[i-1] is what step i's map should make of its layer's `hidden` row n."""
        return hidden

    def set_map(self, step: int, weight: Tensor, bias: Tensor | None) -> None:
        """Take a solved map: weight (d, d) with y = weight @ x, bias (d,)."""
        raise PredictorError(f"{self.kind} has no ridge start; use training.init=identity")

    def draft(self, teacher: Teacher, states: Tensor, breadth: int) -> Draft:
        """Candidates from states (B, k, d): the `breadth` most probable tokens of each step."""
        return self.candidates(self.logits(teacher, states), breadth)

    def candidates(self, logits: Tensor, breadth: int) -> Draft:
        """The `breadth` most probable tokens of each step, from float32 logits (B, k, V)."""
        if logits.is_cuda:  # one kernel where `logsumexp` is eight
            values, tokens = largest(logits.log_softmax(-1), breadth)
        else:
            values, tokens = logits.topk(breadth, dim=-1)
            values = values - logits.logsumexp(-1, keepdim=True)
        return Draft(tokens, values.clamp(max=0))  # rounding may leave a probability above 1

    def logits(self, teacher: Teacher, states: Tensor) -> Tensor:
        """`step_logits` of all steps at once: states (B, k, d) to (B, k, V)."""
        rows = [self.step_logits(teacher, states[:, step - 1], step) for step in range(1, self.steps + 1)]
        return torch.stack(rows, dim=1)

    def child_candidates(self, draft: Draft, depth: int, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate children at `depth` (1..k) of nodes that hold tokens `parents` (B, M).

        Returns tokens (B, M, s) and their log-probabilities (<= 0) given the parent (B, M, s), descending. Steps here
        do not look at the parent's token; a predictor whose steps do overrides this.
        """
        batch, nodes = parents.shape
        shape = (batch, nodes, draft.tokens.shape[-1])
        return draft.tokens[:, depth - 1, None].expand(shape), draft.log_probs[:, depth - 1, None].expand(shape)

    def describe(self) -> dict[str, Any]:
        """Kind, configuration and size."""
        return {
            "kind": self.kind,
            **self.config.model_dump(exclude={"kind"}),
            "steps": self.steps,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
        }


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (..., V), in descending order, and where they stand. As `topk`, in half of its kernels on
    a CUDA device: the largest of each of some parts, then of these.
    """
    size = values.shape[-1]
    parts = max(number for number in range(1, MOST_PARTS + 1) if size % number == 0)
    length = size // parts
    if parts < LEAST_PARTS or length < 4 * count:
        return values.topk(count, dim=-1)
    own, places = values.unflatten(-1, (parts, length)).topk(count, dim=-1, sorted=False)
    best, chosen = own.flatten(-2).topk(count, dim=-1)
    return best, places.flatten(-2).gather(-1, chosen) + chosen // count * length
