"""Training loss: the distance of each step's draft from the teacher's own next-token distribution.

    loss = sum_i w_i sum_n D(p_teacher(. | x_<=n+i), q_i(n)) / sum_i w_i N_i,    w_i = step_decay^(i-1)

over the anchors n at which step i counts (N_i of them): a mean over drafts in which later steps weigh less. D is the KL
divergence, the cross-entropy with the teacher's argmax, or the total variation; a smooth-L1 term between draft and
teacher final states can be added. The logits are computed in chunks, and each chunk's gradient before the next chunk:
a large vocabulary never occupies memory for all drafts at once. Where the vocabulary matrix belongs to the predictor
(Medusa) and needs a gradient too, chunks are recomputed in the backward pass.

Shapes: B sequences, A anchors, k steps, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from firp_cli.config import TrainingConfig
from firp_cli.metrics import accepted_length
from firp_cli.predictors.anchors import DIVERGENCES, Anchors, hits, target_states
from firp_cli.predictors.base import Predictor, SequenceBatch
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.draft_states import rounded

LOGIT_BUDGET = (1 << 21, 1 << 25)  # smallest and largest number of logits in a chunk
LOGITS_PER_ELEMENT = 2  # logits per element of the drafts' states, between these bounds: both then grow alike
LIVE_LOGITS = 7  # matrices of that size at once: logits, log-probabilities, temporaries of the divergence
Compared = tuple[Tensor, Tensor, Tensor]  # loss sum, top-1 hits (M,), top-5 hits sum
Compare = Callable[[Tensor, Tensor], Compared]  # arguments: drafts (M, d) and the teacher's states (M, d)
FIELDS = ("loss", "top1", "top5", "joint", "count")


@dataclass
class StepRecord:
    """Sums over anchors by step, (5, k) float64, in the order of FIELDS: loss, top-1 hits, top-5 hits, anchors
    whose steps 1..i all hit, and anchors at which step i counts. Sums of records are records.
    """

    sums: Tensor

    @staticmethod
    def empty(steps: int, device: torch.device | str = "cpu") -> StepRecord:
        return StepRecord(torch.zeros(len(FIELDS), steps, dtype=torch.float64, device=device))

    def add(self, other: StepRecord) -> None:
        self.sums += other.sums

    def averages(self, pipeline: Sequence[int] = ()) -> dict[str, list[float] | float]:
        """Return per-step means and the expected accepted length, of a greedy chain or of a `Predictor.pipeline`."""
        rows = dict(zip(FIELDS, self.sums.tolist(), strict=True))
        counts = rows.pop("count")
        joint = rows.pop("joint")
        means: dict[str, list[float] | float] = {
            f"{name}_by_step" if name == "loss" else name: [
                total / count if count else 0.0 for total, count in zip(row, counts, strict=True)
            ]
            for name, row in rows.items()
        }
        means["expected_accepted_length"] = accepted_length(joint, counts, pipeline)
        return means


def count_chunks(rows: int, vocabulary: int, budget: int) -> int:
    """Return the number of chunks of `rows` drafts of one step so that a chunk has at most `budget` logits."""
    return max(1, math.ceil(rows / max(1, budget // vocabulary)))


def logit_budget(steps: int, rows: int, size: int) -> int:
    """Return the number of logits that a chunk may have, for `rows` drafts (d,) of each of k steps.

    It is in proportion to the drafts' own states: with a large vocabulary or a small model logits would dominate.
    """
    least, most = LOGIT_BUDGET
    return min(most, max(least, LOGITS_PER_ELEMENT * steps * rows * size))


def objective(
    predictor: Predictor,
    teacher: Teacher,
    batch: SequenceBatch,
    anchors: Anchors,
    settings: TrainingConfig,
    rows: int | None = None,
    budget: int | None = None,
    states: Tensor | None = None,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, StepRecord]:
    """Return loss (scalar float32) and step record of one micro-batch. Only the predictor gets gradients.

    Args:
        rows: drafts per step that the chunks are sized for, at least B * A. Ranks that shard their parameters (ZeRO-3)
            must all use one number: a chunk that runs a head of the predictor gathers its weights on every rank.
        budget: maximum number of logits in a chunk; None: `logit_budget`.
        states: the draft states (B, A, k, d), where they are known already.
        vocabulary: (S,) tokens that distributions are over, of predictors with the teacher's head; None: all.
    """
    steps = predictor.steps
    if states is None:
        states = predictor.draft_states(teacher, batch, anchors.index)
    draft = predictor.path_states(batch, anchors.index, states)
    head = None if vocabulary is None else teacher.partial_head(vocabulary)
    size = teacher.vocab_size if vocabulary is None else len(vocabulary)
    target = target_states(batch, anchors, predictor.offsets)
    rows = rows or anchors.index.numel()
    budget = budget or logit_budget(steps, rows, draft.shape[-1])
    chunks = count_chunks(rows, size, budget)
    small = steps * rows * size <= budget
    weights = predictor.loss_weights(settings.step_decay)
    total = draft.new_zeros((), dtype=torch.float32)
    weight = torch.zeros((), dtype=torch.float32, device=draft.device)
    record = StepRecord.empty(steps, draft.device)
    hits_BAk = torch.zeros_like(anchors.valid)
    for step in range(1, steps + 1):
        counted_BA = anchors.valid[:, :, step - 1]
        compare = partial(_compare, predictor, teacher, settings, step, head)
        run = _immediate if not predictor.own_vocabulary else _whole if small else _recomputed
        loss, top1, top5 = run(compare, draft[:, :, step - 1][counted_BA], target[:, :, step - 1][counted_BA], chunks)
        total = total + weights[step - 1] * loss
        weight = weight + weights[step - 1] * counted_BA.sum()
        record.sums[0, step - 1] += loss.detach()
        record.sums[2, step - 1] += top5
        hits_BAk[:, :, step - 1][counted_BA] = top1
    chain = predictor.accepted(hits_BAk)  # valid is cumulative in the steps: a chain ends where a step does not count
    record.sums[1] += hits_BAk.sum(dim=(0, 1))
    record.sums[3] += chain.sum(dim=(0, 1))
    record.sums[4] += anchors.valid.sum(dim=(0, 1))
    return total / weight.clamp(min=1e-9), record


def _compare(
    predictor: Predictor,
    teacher: Teacher,
    settings: TrainingConfig,
    step: int,
    head: Callable[[Tensor], Tensor] | None,
    draft: Tensor,
    target: Tensor,
) -> Compared:
    """Compare drafts (M, d) of one step with the teacher's states (M, d). `head`: replaces the predictor's and the
    teacher's.
    """
    draft_logits = predictor.step_logits(teacher, draft, step) if head is None else head(draft)
    with torch.no_grad():
        teacher_logits = teacher.head(target) if head is None else head(target)
        top1, top5 = hits(draft_logits, teacher_logits.argmax(-1))
        likely = teacher_logits.log_softmax(-1)
        del teacher_logits
    loss = DIVERGENCES[settings.loss](draft_logits.log_softmax(-1), likely).sum()
    if settings.hidden_weight:
        distance = functional.smooth_l1_loss(draft.float(), target.float(), reduction="none").mean(dim=-1)
        loss = loss + settings.hidden_weight * distance.sum()
    return loss, top1, top5.sum()


def _immediate(compare: Compare, draft: Tensor, target: Tensor, chunks: int) -> Compared:
    """Run `compare` in chunks; each chunk's gradient is computed before the next chunk, so no logits stay in memory."""
    wanted = torch.is_grad_enabled() and draft.requires_grad
    # Allocated before the first chunk: tensors that remain between freed logits fragment a CPU's heap.
    gradient, top1 = torch.empty_like(draft, requires_grad=False), draft.new_empty(len(draft), dtype=torch.bool)
    loss, top5 = draft.new_zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.long, device=draft.device)
    parts = (part.tensor_split(chunks) for part in (draft.detach(), target, gradient, top1))
    for draft_part, target_part, gradient_part, top1_part in zip(*parts, strict=True):
        leaf = draft_part.detach().requires_grad_(wanted)
        compared = compare(leaf, target_part)
        if wanted:
            gradient_part.copy_(torch.autograd.grad(compared[0], leaf)[0])
        loss += compared[0].detach()
        top1_part.copy_(compared[1])
        top5 += compared[2]
        del compared
    return (_KnownGradient.apply(draft, loss, gradient) if wanted else loss), top1, top5


def _recomputed(compare: Compare, draft: Tensor, target: Tensor, chunks: int) -> Compared:
    """Run `compare` in chunks whose logits are recomputed in the backward pass."""
    compared = [
        # ZeRO-3 gathers the same weights in other storage the second time: no check for equal metadata
        checkpoint(compare, *pair, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        for pair in zip(draft.tensor_split(chunks), target.tensor_split(chunks), strict=True)
    ]
    losses, top1, top5 = zip(*compared, strict=True)
    return torch.stack(losses).sum(), torch.cat(top1), torch.stack(top5).sum()


def _whole(compare: Compare, draft: Tensor, target: Tensor, chunks: int) -> Compared:
    """Run `compare` at once; all logits stay in memory for the backward pass."""
    return compare(draft, target)


class _KnownGradient(torch.autograd.Function):
    """Scalar whose gradient with respect to a tensor is known already."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[0] * gradient).to(gradient.dtype), None, None


class ObjectiveModule(nn.Module):
    """Module for the optimizer backend: its parameters are the predictor's, its forward is the objective.

    The teacher is no submodule: DeepSpeed neither moves, casts, shards nor saves it.

    Args:
        frozen: draft states do not change: only the coupling learns.
        frequent: (S,) the most frequent tokens, which complete those of a micro-batch to the vocabulary of its loss.
            None: losses are over all tokens. Validations always are.
    """

    def __init__(
        self,
        predictor: Predictor,
        teacher: Teacher,
        settings: TrainingConfig,
        frozen: bool = False,
        frequent: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.teacher = teacher
        self.settings = settings
        self.frozen = frozen
        self.frequent = frequent

    def forward(
        self, batch: SequenceBatch, anchors: Anchors, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss, the record's sums (5, k), and frozen draft states (B, A, k, d)."""
        rows = self.settings.micro_batch_size * self.settings.anchors_per_sequence
        if self.frozen and states is None:
            with torch.no_grad():
                states = rounded(self.predictor.draft_states(self.teacher, batch, anchors.index))
        vocabulary = None
        if self.training and self.frequent is not None:
            vocabulary = loss_vocabulary(batch.input_ids, self.frequent)
        loss, record = objective(
            self.predictor, self.teacher, batch, anchors, self.settings, rows, states=states, vocabulary=vocabulary
        )
        return loss, record.sums, states


def loss_vocabulary(input_ids: Tensor, frequent: Tensor) -> Tensor:
    """Return the tokens of conversations (B, T), and as many of `frequent` (S,) as make S in all."""
    own = input_ids.unique()
    others = frequent[torch.isin(frequent, own, invert=True)]
    return torch.cat([own, others[: max(0, len(frequent) - len(own))]])
