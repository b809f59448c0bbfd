"""The training loss: how far each step's draft is from the teacher's own next-token distribution.

    loss = sum_i w_i sum_n D(p_teacher(. | x_<=n+i), q_i(n)) / sum_i w_i N_i,    w_i = step_decay^(i-1)

over the anchors n at which step i counts (N_i of them): a mean over drafts in which later steps weigh less. D is the KL
divergence, the cross-entropy with the teacher's argmax, or the total variation; a smooth-L1 term between draft and
teacher final states can be added. The logits are made piece by piece and made again in the backward pass, so that a
large vocabulary never stands in memory for all drafts at once.

Shapes: B sequences, A anchors, k steps, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from firp_cli.metrics import accepted_length
from firp_cli.predictors.anchors import Anchors, compare_rows, target_states
from firp_cli.predictors.base import Predictor, SequenceBatch
from firp_cli.recipe import TrainingConfig
from firp_cli.teacher.stack import Teacher

LOGIT_BUDGET = 1 << 25  # elements (drafts x vocabulary) of one logit matrix; a handful of such matrices live at once
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
        """Per-step means and the expected accepted length, of a greedy chain or of a `Predictor.pipeline`, as plain
        numbers.
        """
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


def count_pieces(rows: int, vocabulary: int, budget: int = LOGIT_BUDGET) -> int:
    """Pieces that `rows` drafts of one step are cut into so that a piece has at most `budget` logits."""
    return max(1, math.ceil(rows / max(1, budget // vocabulary)))


def objective(
    predictor: Predictor,
    teacher: Teacher,
    batch: SequenceBatch,
    anchors: Anchors,
    settings: TrainingConfig,
    rows: int | None = None,
    budget: int = LOGIT_BUDGET,
) -> tuple[Tensor, StepRecord]:
    """Loss (scalar float32) and step record of one micro-batch. Gradients reach the predictor alone.

    Args:
        rows: drafts per step that the pieces are sized for, at least B * A. Ranks that share their parameters (ZeRO-3)
            must all use one number: a piece that runs a head of the predictor gathers its weights on every rank.
        budget: logits of one piece at most.
    """
    steps = predictor.steps
    draft = predictor.draft_states(teacher, batch, anchors.index)
    target = target_states(batch, anchors, predictor.offsets)
    rows = rows or anchors.index.numel()
    pieces = count_pieces(rows, teacher.vocab_size, budget)
    keep_logits = steps * rows * teacher.vocab_size <= budget
    weights = predictor.loss_weights(settings.step_decay)
    total = draft.new_zeros((), dtype=torch.float32)
    weight = torch.zeros((), dtype=torch.float32, device=draft.device)
    record = StepRecord.empty(steps, draft.device)
    hits_BAk = torch.zeros_like(anchors.valid)
    for step in range(1, steps + 1):
        counted_BA = anchors.valid[:, :, step - 1]
        drafts = draft[:, :, step - 1][counted_BA].tensor_split(pieces)
        targets = target[:, :, step - 1][counted_BA].tensor_split(pieces)
        hits = []
        for draft_piece, target_piece in zip(drafts, targets, strict=True):
            arguments = (predictor, teacher, draft_piece, target_piece, step, settings)
            loss, top1, top5 = (
                _compare(*arguments)
                if keep_logits
                # ZeRO-3 hands the same weights out in other storage the second time: no check for equal metadata
                else checkpoint(
                    _compare, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
                )
            )
            total = total + weights[step - 1] * loss
            record.sums[0, step - 1] += loss.detach()
            record.sums[2, step - 1] += top5
            hits.append(top1)
        hits_BAk[:, :, step - 1][counted_BA] = torch.cat(hits)
        weight = weight + weights[step - 1] * counted_BA.sum()
    chain = predictor.accepted(hits_BAk)  # valid is cumulative in the steps: a chain ends where a step does not count
    record.sums[1] += hits_BAk.sum(dim=(0, 1))
    record.sums[3] += chain.sum(dim=(0, 1))
    record.sums[4] += anchors.valid.sum(dim=(0, 1))
    return total / weight.clamp(min=1e-9), record


def _compare(
    predictor: Predictor, teacher: Teacher, draft: Tensor, target: Tensor, step: int, settings: TrainingConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts (M, d) of one step against the teacher's states (M, d): loss sum, top-1 hits (M,), top-5 hits sum."""
    with torch.no_grad():
        teacher_logits = teacher.head(target)
    agreement = compare_rows(predictor.step_logits(teacher, draft, step), teacher_logits)
    loss = getattr(agreement, settings.loss).sum()
    if settings.hidden_weight:
        distance = functional.smooth_l1_loss(draft.float(), target.float(), reduction="none").mean(dim=-1)
        loss = loss + settings.hidden_weight * distance.sum()
    return loss, agreement.top1, agreement.top5.sum()


class ObjectiveModule(nn.Module):
    """What DeepSpeed wraps: its parameters are the predictor's, its forward is the objective. The teacher is no
    submodule: nobody moves, casts, shards or saves it.
    """

    def __init__(self, predictor: Predictor, teacher: Teacher, settings: TrainingConfig) -> None:
        super().__init__()
        self.predictor = predictor
        self.teacher = teacher
        self.settings = settings

    def forward(self, batch: SequenceBatch, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Loss and the record's sums (5, k)."""
        rows = self.settings.micro_batch_size * self.settings.anchors_per_sequence
        loss, record = objective(self.predictor, self.teacher, batch, anchors, self.settings, rows)
        return loss, record.sums
