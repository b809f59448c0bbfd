"""Coupling: a head that adjusts the state of a draft step by the token of the parent node (FIRP+; ours, not a paper's).

Step i drafts token n+i+1 from a state z_i that was computed before token n+i, its parent in the tree, was known. With x
that token and e(x) the teacher's input embedding of it,

    mlp:        z_i' = z_i + B_i silu(A_i [z_i / rms(z_i) ; e(x) / std(e)] + b_i)
    recurrent:  the same, A_i also reads z_(i-1)' / rms(z_(i-1)') of the parent node; z_0' is the accepted node's state
    low_rank:   z_i' = z_i + B_i (A_i e(x) / std(e) + b_i)

and the children's scores are the teacher's head on z_i'. All B_i start at 0. With `share` A and B are the same for all
steps, and b_i differs. Only the M most probable tokens of the teacher's head on z_i are scored.

Shapes: B sequences, F nodes of one depth, k steps, M candidates, d hidden size, w width of the head.
"""

from __future__ import annotations

import math
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp_cli.config import CouplingConfig
from firp_cli.predictors.coupling_kernel import CouplingKernel
from firp_cli.predictors.draft import Children, Draft
from firp_cli.teacher.packed_linear import PackedLinear, is_bfloat16
from firp_cli.teacher.teacher import Teacher

if TYPE_CHECKING:
    from firp_cli.predictors.triton_coupling import CandidatePrefixes

SAMPLED_TOKENS = 4096  # embeddings that give std(e)
EPSILON = 1e-6  # in the root mean square
LOW_RANK = 64  # default width of a low-rank head


class Coupling(nn.Module):
    """Adjustment of k steps. The head's input is split: `state_weight` reads z_i, `node_weight` what a node adds.

    `teacher`: embeds tokens and scores candidates. It is no submodule, so its weights are not the predictor's.
    """

    def __init__(self, config: CouplingConfig, steps: int, teacher: Teacher) -> None:
        super().__init__()
        size, heads = teacher.hidden_size, 1 if config.share else steps
        width = config.width or (min(LOW_RANK, size) if config.form == "low_rank" else size)
        self.form, self.size, self.teacher = config.form, size, teacher
        self.scale = embedding_scale(teacher)
        inputs = 2 * size if config.form == "recurrent" else size
        self.node_weight = nn.Parameter(torch.empty(heads, width, inputs))
        self.state_weight = None if config.form == "low_rank" else nn.Parameter(torch.empty(heads, width, size))
        self.bias = nn.Parameter(torch.empty(steps, width))
        self.output_weight = nn.Parameter(torch.empty(heads, size, width))
        self._packed: tuple[PackedLinear, PackedLinear] | None = None  # of node_weight and output_weight
        self.states_matrix: PackedLinear | None = None  # `state_weight` prepared for decoding, if there is one
        self._kernel: CouplingKernel | None = None

    @property
    def shared(self) -> bool:
        return len(self.output_weight) == 1

    @property
    def recurrent(self) -> bool:
        return self.form == "recurrent"

    @torch.no_grad()
    def initialise(self) -> None:
        """Set random inputs and zero outputs: the head then changes nothing."""
        inputs = self.node_weight.shape[2] + (0 if self.state_weight is None else self.size)
        for weight in (self.node_weight, self.state_weight):
            if weight is not None:
                nn.init.normal_(weight, std=inputs**-0.5)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.output_weight)

    def first_steps(self, steps: int) -> Coupling:
        """Return the coupling of the first `steps` steps, on the same weights."""
        limited = copy(self)
        limited._parameters = dict(self._parameters)
        limited.bias = nn.Parameter(self.bias[:steps], requires_grad=self.bias.requires_grad)
        if not self.shared:
            for name in ("node_weight", "state_weight", "output_weight"):
                weight = getattr(self, name)
                if weight is not None:
                    setattr(limited, name, nn.Parameter(weight[:steps], requires_grad=weight.requires_grad))
        return limited

    def __deepcopy__(self, memo: dict[int, Any]) -> Coupling:
        memo[id(self.teacher)] = self.teacher  # a copy shares it
        other = copy(self)
        other.__dict__ = deepcopy(self.__dict__, memo)
        return other

    def packed(self, teacher: Teacher) -> Coupling:
        """Return the coupling for decoding with `teacher`, where the weights do not change and few rows read them."""
        prepared = copy(self)
        prepared.teacher = teacher
        if self.shared:
            prepared._packed = _packed(self.node_weight[0]), _packed(self.output_weight[0])
            if self.state_weight is not None:
                prepared.states_matrix = _packed(self.state_weight[0])
            node, output = (product.kernel for product in prepared._packed)
            if node is not None and output is not None and CouplingKernel.serves(teacher):
                activated = self.form != "low_rank"
                prepared._kernel = CouplingKernel(node, output, teacher, self.scale, self.recurrent, activated, EPSILON)
        return prepared

    def forward(self, parents: Tensor, states: Tensor, final: Tensor) -> Tensor:
        """Return the adjusted states of paths (B, A, k, d).

        Args:
            parents: (B, A, k) tokens. states: (B, A, k, d). final: (B, A, d) z_0'.
        """
        steps = states.shape[-2]
        embedded = self.teacher.embed(parents.flatten(1)).view_as(states)
        features = self.features(states.flatten(0, -3), None).view(*states.shape[:-1], -1)
        previous, adjusted = final, []
        for step in range(steps if self.recurrent else 0):
            inputs = self._node_inputs(embedded[..., step, :], previous)
            product = functional.linear(inputs, self.node_weight[0 if self.shared else step])
            previous = self._adjust(states[..., step, :], features[..., step, :] + product, step)
            adjusted.append(previous)
        if adjusted:
            return torch.stack(adjusted, dim=-2)
        inputs = self._node_inputs(embedded, None)
        if self.shared:
            return self._adjust(states, features + functional.linear(inputs, self.node_weight[0]), 0)
        product = torch.einsum("...ki,kwi->...kw", inputs, self.node_weight[:steps])
        hidden = self._activate(features + product)
        change = torch.einsum("...kw,kdw->...kd", hidden, self.output_weight[:steps])
        return states + change.to(states.dtype)

    def features(self, states: Tensor, steps: Tensor | None) -> Tensor:
        """Return what the head reads from the states alone, (B, k, w), from states (B, k, d) of steps `steps` (B, k)
        (from 0; None: in their order).
        """
        bias = self.bias[: states.shape[1]] if steps is None else self.bias[steps]
        if self.state_weight is None:
            return bias.expand(*states.shape[:2], -1)
        inputs = unit(states).to(self.state_weight.dtype)
        if self.states_matrix is not None:
            return self.states_matrix(inputs) + bias
        if self.shared:
            return functional.linear(inputs, self.state_weight[0]) + bias
        if steps is None:
            return torch.einsum("bki,kwi->bkw", inputs, self.state_weight[: states.shape[1]]) + bias
        return torch.einsum("bki,bkwi->bkw", inputs, self.state_weight[steps]) + bias

    @property
    def context_columns(self) -> int:
        """Columns of `context`."""
        return self.size + self.bias.shape[1] + (self.size if self.recurrent else 0) + 2

    def context(self, states: Tensor, final: Tensor, log_probs: Tensor, steps: Tensor | None) -> Tensor:
        """Return what `scores` reads of each step (B, k, c), in the dtype of the states (B, k, d): the state, its
        features, z_0' = `final` (B, d) of recurrent heads, the logarithm of the candidates' probability in all over
        that of the first one, and the step's number, from 0.

        Args:
            log_probs: (B, k, M) of the candidates, without the head. steps: see `features`.
        """
        parts = [states, self.features(states, steps)]
        if self.recurrent:
            parts.append(final[:, None].expand_as(states))
        parts.append(_over_first(log_probs))
        numbers = torch.arange(states.shape[1], device=states.device) if steps is None else steps
        parts.append(numbers.expand(states.shape[:2])[:, :, None])
        return torch.cat([part.to(states.dtype) for part in parts], dim=-1)

    def with_candidates(self, context: Tensor, log_probs: Tensor) -> Tensor:
        """Return a context (B, k, c) for other candidates, of log-probabilities (B, k, M')."""
        changed = context.clone()
        changed[..., -2:-1] = _over_first(log_probs)
        return changed

    def with_final(self, context: Tensor, source: Tensor) -> Tensor:
        """Return a context with the final states of another one, `source`, both (B, k, c)."""
        if not self.recurrent:
            return context
        final = slice(-self.size - 2, -2)
        changed = context.clone()
        changed[..., final] = source[..., final]
        return changed

    def best_children(
        self, parents: Tensor, tokens: Tensor, first: Tensor, context: Tensor, previous: Tensor | None, breadth: int
    ) -> Children:
        """Return the `breadth` most probable of the candidates `tokens` (B, M) as children of F nodes, in descending
        order, and the nodes' adjusted states if their children depend on them. Tokens that are no candidates keep the
        probability that they have without the head.

        Args:
            parents: (B, F) the nodes' tokens. first: (B,) the first candidate's log-probability without the head.
            context: (B, c) of their children's step. previous: (B, F, d) the nodes' own adjusted states; None for the
                root.
        """
        breadth = min(breadth, tokens.shape[1])
        if self._kernel is not None:
            embedded = self.teacher.embed(parents)
            if self._kernel.takes(embedded, context):
                made = self._kernel.children(embedded, tokens, first, context, previous, breadth)
                return made if self.recurrent else Children(*made[:2])
        scores, adjusted = self.scores(parents, tokens, context, previous)
        best, places = scores.topk(breadth, dim=-1)  # before `known`, which is -inf where a step drafts nothing
        known = (first + context[:, -2]).clamp(max=0)  # rounding may give a probability above 1
        chosen = tokens.gather(1, places.flatten(1)).view_as(places)
        return Children(chosen, best + known[:, None, None], adjusted if self.recurrent else None)

    def candidate_prefixes(self, draft: Draft, root: Tensor, limit: int) -> CandidatePrefixes | None:
        """Return the `limit` most probable prefixes of every depth below root tokens (B,), by Triton kernels; None
        where these cannot make them.
        """
        from firp_cli.predictors.triton_coupling import CandidatePrefixes, CoupledHead

        embedding = self.teacher.embedding_matrix()
        if not self.shared or embedding is None:
            return None
        node, output = self.node_weight[0], self.output_weight[0]
        vocabulary = self.teacher.head_parts()
        recurrent, activated = self.recurrent, self.form != "low_rank"
        head = CoupledHead(node, output, embedding, *vocabulary, self.scale, recurrent, activated, EPSILON)
        return CandidatePrefixes.of(head, draft, root, limit) if head.serves() else None

    def dynamic_tree(self, draft: Draft, root: Tensor, nodes: int) -> tuple[Tensor, ...] | None:
        """Return the dynamic trees of `nodes` nodes below root tokens (B,), as the fields of a
        `decoding.tree_build.Tree`; None where no kernel builds them.
        """
        return None if self._kernel is None else self._kernel.tree(draft, root, nodes)

    def scores(
        self, parents: Tensor, tokens: Tensor, context: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (B, F, M) of the candidates `tokens` (B, M), given that it is one of them, as
        children of F nodes, and the nodes' adjusted states (B, F, d). Arguments: see `best_children`.
        """
        adjusted = self._adjusted(self.teacher.embed(parents), context, previous)
        return self.teacher.head_at(adjusted, tokens).log_softmax(-1), adjusted

    def _adjusted(self, embedded: Tensor, context: Tensor, previous: Tensor | None) -> Tensor:
        width = self.bias.shape[1]
        state, features = context[:, : self.size], context[:, self.size : self.size + width]
        if self.recurrent and previous is None:
            previous = context[:, None, -self.size - 2 : -2].expand_as(embedded)
        inputs, steps = self._node_inputs(embedded, previous), context[:, -1].long()
        if self._packed is not None:
            node, output = self._packed
            hidden = self._activate(features[:, None] + node(inputs))
            return state[:, None] + output(hidden).to(state.dtype)
        if self.shared:
            product = functional.linear(inputs, self.node_weight[0])
            return self._adjust(state[:, None], features[:, None] + product, 0)
        product = torch.bmm(inputs, self.node_weight[steps].transpose(1, 2))
        hidden = self._activate(features[:, None] + product)
        return state[:, None] + torch.bmm(hidden, self.output_weight[steps].transpose(1, 2)).to(state.dtype)

    def _node_inputs(self, embedded: Tensor, previous: Tensor | None) -> Tensor:
        inputs = embedded if self.scale == 1.0 else embedded * self.scale
        if self.recurrent:
            assert previous is not None
            inputs = torch.cat([inputs, unit(previous).to(inputs.dtype)], dim=-1)
        return inputs.to(self.node_weight.dtype)

    def _activate(self, hidden: Tensor) -> Tensor:
        return hidden if self.form == "low_rank" else functional.silu(hidden)

    def _adjust(self, states: Tensor, hidden: Tensor, step: int) -> Tensor:
        weight = self.output_weight[0 if self.shared else step]
        return states + functional.linear(self._activate(hidden), weight).to(states.dtype)


def _packed(weight: Tensor) -> PackedLinear:
    return PackedLinear(weight, half=is_bfloat16(weight))


def _over_first(log_probs: Tensor) -> Tensor:
    """Return the logarithm of the candidates' probability in all over that of the first one: (B, k, M) to (B, k, 1)."""
    return log_probs.logsumexp(-1, keepdim=True) - log_probs[..., :1]


def unit(states: Tensor) -> Tensor:
    """Return float32 states (..., d) divided by their root mean square."""
    return functional.rms_norm(states.float(), states.shape[-1:], eps=EPSILON)


@torch.no_grad()
def embedding_scale(teacher: Teacher) -> float:
    """Return 1 / std of the teacher's input embeddings, over evenly spaced tokens; 1 for a teacher without weights."""
    tokens = torch.linspace(0, teacher.vocab_size - 1, min(SAMPLED_TOKENS, teacher.vocab_size), device=teacher.device)
    deviation = teacher.embed(tokens.long()[None]).float().std()
    if deviation.is_meta:
        return 1.0
    value = float(deviation)
    return 1 / value if value > 0 and math.isfinite(value) else 1.0
