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

from firp_cli.config import CouplingConfig, PredictorSection
from firp_cli.errors import PredictorError
from firp_cli.predictors.coupling import Coupling
from firp_cli.predictors.draft import Children, Draft, most_probable_tokens
from firp_cli.predictors.draft_kernel import DraftKernel
from firp_cli.teacher.packed_linear import PackedLinear
from firp_cli.teacher.teacher import Teacher

RowsHook = Callable[[int, Tensor, Tensor], None]
PseudoStateMaker = Callable[[int, int, Tensor], Tensor]


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


class Predictor(nn.Module, ABC):
    """A draft predictor of k steps: step i predicts a token from what is known at the anchor n."""

    def __init__(self, config: PredictorSection, steps: int) -> None:
        super().__init__()
        self.config = config
        self.steps = steps
        self.trained_prompts: Tensor | None = None  # (n,) int64: hashes of the prompts that it was trained on

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

    def path_states(self, batch: SequenceBatch, anchors: Tensor, states: Tensor) -> Tensor:
        """Return the states (B, A, k, d) that the head reads where each step's parent is the batch's own token, from
        those of `draft_states` (B, A, k, d) at `anchors` (B, A).
        """
        return states

    @abstractmethod
    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        """Return float32 logits (..., V) of step `step` (1..k) from its states (..., d)."""

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
    """A predictor that fills draft trees: step i drafts token n+i+1.

    With a `coupling` (FIRP+) the children of a node also depend on its token: predictors/coupling.py adjusts the step's
    state, and the teacher's head scores the M most probable tokens of the unadjusted one.

    `draft_tokens`: (S,) the tokens among which drafts are chosen, ascending, so that the head reads S rows of the
    vocabulary matrix; None: all.
    """

    def __init__(self, config: PredictorSection, steps: int) -> None:
        super().__init__(config, steps)
        self.coupling: Coupling | None = None
        self.draft_tokens: Tensor | None
        self.register_buffer("draft_tokens", None, persistent=False)
        self._draft_head: PackedLinear | None = None
        self.kernel: DraftKernel | None = None

    def couple(self, teacher: Teacher) -> None:
        """Add the head that the configuration's `coupling` describes, if it has one."""
        config: CouplingConfig | None = getattr(self.config, "coupling", None)
        if config is not None:
            self.coupling = Coupling(config, self.steps, teacher)

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        """Layer whose input step i enters, i = 1..k; empty for predictors without pseudo states."""
        return self.config.transfer_layers

    @property
    def parent_dependent(self) -> bool:
        """False if all nodes of a depth have the same candidates."""
        return self.coupling is not None

    @property
    def teachers_head(self) -> bool:
        """True if the logits of every step are the teacher's whole head on the states that `draft_hidden` returns. The
        head can then read them together with the nodes of a decoding step.
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
        limited = self._copy()
        limited._truncate(steps)
        if self.coupling is not None:
            limited.coupling = self.coupling.first_steps(steps)
        limited.steps = steps
        return limited

    def for_decoding(self, teacher: Teacher) -> TreePredictor:
        """Return the predictor prepared for decoding with `teacher`, where weights do not change."""
        prepared = self._copy()
        if self.coupling is not None:
            prepared.coupling = self.coupling.packed(teacher)
        if self.draft_tokens is not None:
            prepared._draft_head = teacher.draft_head(self.draft_tokens)
        if self.teachers_head or self.draft_tokens is not None:
            prepared.kernel = DraftKernel.of(teacher, prepared._draft_head, self.draft_tokens, prepared.coupling)
        return prepared

    def _copy(self) -> TreePredictor:
        other = copy(self)
        other._modules = dict(self._modules)  # a module's copy shares it
        return other

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

    def initialise(self, init: str, teacher: Teacher) -> None:
        super().initialise(init, teacher)
        if self.coupling is not None:
            self.coupling.initialise()

    def path_states(self, batch: SequenceBatch, anchors: Tensor, states: Tensor) -> Tensor:
        if self.coupling is None:
            return states
        ahead = anchors[:, :, None] + torch.arange(1, self.steps + 1, device=anchors.device)
        parents = batch.input_ids.gather(1, ahead.clamp(max=batch.input_ids.shape[1] - 1).flatten(1))
        final = batch.final.gather(1, anchors[:, :, None].expand(-1, -1, batch.final.shape[-1]))
        return self.coupling(parents.view(ahead.shape), states, final)

    def logits(self, teacher: Teacher, states: Tensor) -> Tensor:
        """Return `step_logits` of all steps: states (B, k, d) to (B, k, V)."""
        rows = [self.step_logits(teacher, states[:, step - 1], step) for step in range(1, self.steps + 1)]
        return torch.stack(rows, dim=1)

    def draft(
        self, teacher: Teacher, states: Tensor, breadth: int, kernel: bool = False, final: Tensor | None = None
    ) -> Draft:
        """Return the `width(breadth)` most probable tokens of each step, from states (B, k, d).

        Args:
            kernel: find them by Triton kernels.
            final: (B, d) the accepted node's normed final state. Only predictors with a coupling need it.
        """
        draft = self.most_probable(teacher, states, self.width(breadth, teacher.vocab_size), kernel)
        if self.coupling is not None:
            assert final is not None
            draft.context = self.coupling.context(states, final, draft.log_probs, None)
        return draft

    def most_probable(
        self, teacher: Teacher, states: Tensor, width: int, kernel: bool = False, logits: Tensor | None = None
    ) -> Draft:
        """Return the `width` most probable tokens of each step, without the coupling, from states (B, k, d) or, where
        they are known, from the logits (B, k, V).
        """
        if self.draft_tokens is None:
            logits = self.logits(teacher, states) if logits is None else logits
            return most_probable_tokens(logits, width, kernel)
        if self._draft_head is None:
            logits = teacher.partial_head(self.draft_tokens)(states)
        else:
            logits = teacher.capped(self._draft_head(states).float())
        draft = most_probable_tokens(logits, width, kernel)
        return Draft(self.draft_tokens[draft.tokens], draft.log_probs)

    def width(self, breadth: int, vocabulary: int) -> int:
        """Return the number of tokens of a step's draft, for trees that need `breadth` children of a node."""
        candidates = 0 if self.coupling is None else self.config.coupling.candidates  # type: ignore[attr-defined]
        known = vocabulary if self.draft_tokens is None else len(self.draft_tokens)
        return min(max(breadth, candidates), known, vocabulary)

    def narrowed(self, draft: Draft, width: int) -> Draft:
        """Return a draft with the first `width` tokens of each step."""
        tokens, log_probs, context = draft.tokens[:, :, :width], draft.log_probs[:, :, :width], draft.context
        if self.coupling is not None and context is not None:
            context = self.coupling.with_candidates(context, log_probs)
        return Draft(tokens, log_probs, context)

    def child_candidates(
        self, draft: Draft, depth: int, parents: Tensor, breadth: int, states: Tensor | None = None
    ) -> Children:
        """Return the `breadth` candidate children at `depth` (1..k) of nodes with the tokens `parents` (B, M), with
        log-probabilities (<= 0) given the parent, descending.

        Args:
            states: the nodes' own `Children.states` (B, M, d); None for the root.
        """
        tokens, log_probs = draft.tokens[:, depth - 1], draft.log_probs[:, depth - 1]
        if self.coupling is None:
            shape = (*parents.shape, breadth)
            return Children(tokens[:, None, :breadth].expand(shape), log_probs[:, None, :breadth].expand(shape))
        assert draft.context is not None
        context = draft.context[:, depth - 1]
        return self.coupling.best_children(parents, tokens, log_probs[:, 0], context, states, breadth)


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
        super().initialise(init, teacher)
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
