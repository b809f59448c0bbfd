"""Training loss: its definition, its chunks, and the parameters that get gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from firp_cli.config import TrainingConfig
from firp_cli.metrics import chain_length_of_hits
from firp_cli.predictors.anchors import Anchors, choose_anchors, compare_rows, target_states
from firp_cli.predictors.base import Predictor, SequenceBatch
from firp_cli.training.objective import count_chunks, objective
from helpers.models import HIDDEN, VOCABULARY, make_predictor, random_prompts, sequence_batch, tiny_teacher

TEACHER = tiny_teacher("llama")
PREDICTORS = {
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 2, 3], "bias": True},
    "medusa": {"kind": "medusa", "steps": 3},
    "medusa-shared-head": {"kind": "medusa", "steps": 3, "own_head": False},
    "speed": {"kind": "speed", "loops": 4, "exits": [1, 2, 3], "exit_weights": [1.0, 3.0, 4.0]},
}
LOSSES = ["kl", "cross_entropy", "total_variation"]


def trainable(name: str) -> Predictor:
    return make_predictor(TEACHER, **PREDICTORS[name]).requires_grad_(True)


def micro_batch(name: str = "firp", limit: int | None = None) -> tuple[SequenceBatch, Anchors]:
    sequences = random_prompts(4, seed=3, low=9, high=24)
    batch = sequence_batch(TEACHER, sequences, [3, 5, 8, 4], [1, 2, 3])
    return batch, choose_anchors(batch, trainable(name).offsets, limit, seeds=[5, 6, 7, 8])


def gradients(predictor: Predictor) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in predictor.named_parameters() if parameter.grad is not None}


def reference(
    predictor: Predictor, batch: SequenceBatch, anchors: Anchors, settings: TrainingConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss by its definition, one draft at a time; hits and validity of every anchor."""
    draft = predictor.draft_states(TEACHER, batch, anchors.index)
    target = target_states(batch, anchors)
    total, weight = torch.zeros(()), 0.0
    hits = torch.zeros(anchors.valid.shape, dtype=torch.bool)
    for sequence in range(anchors.index.shape[0]):
        for anchor in range(anchors.index.shape[1]):
            for step in range(1, predictor.steps + 1):
                if not anchors.valid[sequence, anchor, step - 1]:
                    continue
                row, wanted = draft[sequence, anchor, step - 1], target[sequence, anchor, step - 1]
                agreement = compare_rows(predictor.step_logits(TEACHER, row[None], step), TEACHER.head(wanted[None]))
                loss = getattr(agreement, settings.loss)[0]
                loss = loss + settings.hidden_weight * torch.nn.functional.smooth_l1_loss(row, wanted)
                total = total + settings.step_decay ** (step - 1) * loss
                weight += settings.step_decay ** (step - 1)
                hits[sequence, anchor, step - 1] = agreement.top1[0]
    return total / weight, hits, anchors.valid


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", list(PREDICTORS))
def test_chunked_loss_and_gradients_equal_the_whole(name: str, loss: str):
    settings = TrainingConfig(loss=loss, hidden_weight=0.3)
    batch, anchors = micro_batch(name)
    results = []
    for budget in (1 << 30, 5 * VOCABULARY):
        predictor = trainable(name)
        value, record = objective(predictor, TEACHER, batch, anchors, settings, budget=budget)
        value.backward()
        results.append((value.detach(), record.sums, gradients(predictor)))
    (whole, whole_sums, whole_gradients), (chunked, chunked_sums, chunked_gradients) = results
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked_sums, whole_sums, rtol=1e-6, atol=1e-6)
    assert whole_gradients.keys() == chunked_gradients.keys() == dict(trainable(name).named_parameters()).keys()
    for key, gradient in whole_gradients.items():
        torch.testing.assert_close(chunked_gradients[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["firp", "medusa"])
def test_loss_and_record_match_definition(name: str):
    settings = TrainingConfig(loss="kl", hidden_weight=0.5, step_decay=0.6)
    batch, anchors = micro_batch()
    predictor = trainable(name)
    expected, hits, valid = reference(predictor, batch, anchors, settings)
    value, record = objective(predictor, TEACHER, batch, anchors, settings)
    torch.testing.assert_close(value, expected)
    averages = record.averages()
    assert record.sums[4].tolist() == valid.sum(dim=(0, 1)).tolist()
    assert record.sums[1].tolist() == hits.sum(dim=(0, 1)).tolist()
    every = valid.any(dim=-1)
    length = chain_length_of_hits(hits[every].numpy(), valid[every].numpy())
    assert averages["expected_accepted_length"] == pytest.approx(length)
    assert all(one <= five for one, five in zip(averages["top1"], averages["top5"], strict=True))


def test_exits_are_compared_at_their_own_position():
    """KL(p_n || q_n^g) of every response position n and exit g, weighted by exit; and the accepted exits."""
    batch, anchors = micro_batch("speed")
    predictor = trainable("speed")
    value, record = objective(predictor, TEACHER, batch, anchors, TrainingConfig(step_decay=0.1))
    weights, layers = (1.0, 3.0, 4.0), (1, 2, 3)
    total, weight, positions = 0.0, 0.0, 0
    hits, settled, likely = [0] * 3, [0] * 3, [0] * 3
    with torch.no_grad():
        for b, n in batch.loss_mask.nonzero().tolist():
            truth = TEACHER.head(batch.final[b, n - 1]).double().softmax(0)  # position n - 1 predicts response token n
            right = []
            for exit_weight, layer, linear in zip(weights, layers, predictor.maps, strict=True):
                logits = TEACHER.head(TEACHER.norm(linear(batch.hidden[layer][b, n - 1])))
                early = logits.double().softmax(0)
                total += exit_weight * float((truth * (truth / early).log()).sum())
                weight += exit_weight
                right.append(int(early.argmax() == truth.argmax()))
                likely[len(right) - 1] += int(truth.argmax() in early.topk(5).indices)
            hits = [hit + one for hit, one in zip(hits, right, strict=True)]
            settled = [count + all(right[place:]) for place, count in enumerate(settled)]
            positions += 1
    assert value.item() == pytest.approx(total / weight, rel=1e-5)
    assert record.sums[1].tolist() == hits
    assert record.sums[2].tolist() == likely
    assert record.sums[3].tolist() == settled
    assert record.sums[4].tolist() == [positions] * 3
    assert 0 < settled[0] < settled[2] == hits[2], "else this compares little"
    averages = record.averages(predictor.pipeline)
    late = [1 - count / positions for count in settled]
    assert averages["expected_accepted_length"] == pytest.approx(4 / (1 + sum(late)))
    assert averages["top1"] == pytest.approx([count / positions for count in hits])


def test_exit_is_accepted_when_later_ones_agree():
    hits = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    settled = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert trainable("speed").accepted(hits).tolist() == settled
    chain = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert trainable("firp").accepted(hits).tolist() == chain


def test_gradients_reach_only_the_predictor():
    batch, anchors = micro_batch()
    predictor = trainable("firp")
    objective(predictor, TEACHER, batch, anchors, TrainingConfig())[0].backward()
    assert all(parameter.grad is None for parameter in TEACHER.model.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients(predictor).values())
    assert set(gradients(predictor)) == {"maps.0.weight", "maps.1.weight", "maps.2.weight"}


def test_perfect_draft_has_zero_loss():
    batch, anchors = micro_batch()
    predictor = trainable("medusa-shared-head")
    predictor.draft_states = lambda *_: target_states(batch, anchors)  # type: ignore[method-assign]
    value, record = objective(predictor, TEACHER, batch, anchors, TrainingConfig())
    assert value.abs() < 1e-6
    assert record.averages()["expected_accepted_length"] == pytest.approx(4.0)
    batch, anchors = micro_batch("speed")
    exits = trainable("speed")
    exits.draft_states = lambda *_: target_states(batch, anchors, exits.offsets)  # type: ignore[method-assign]
    value, record = objective(exits, TEACHER, batch, anchors, TrainingConfig())
    assert value.abs() < 1e-6
    assert record.averages(exits.pipeline)["expected_accepted_length"] == pytest.approx(4.0), "a token every tick"


class Largest(TorchDispatchMode):
    """Record of the most elements of any vocabulary-wide tensor that an operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            rows = item.shape[0] if isinstance(item, torch.Tensor) and item.dim() == 2 else HIDDEN
            if rows != HIDDEN and item.shape[1] == VOCABULARY:  # HIDDEN rows: the head's weight, transposed
                self.elements = max(self.elements, item.numel())
        return out


@pytest.mark.parametrize("name", ["firp", "medusa-shared-head", "speed"])
def test_logits_stay_within_budget_in_both_passes(name: str):
    batch, anchors = micro_batch(name)
    budget = 7 * VOCABULARY
    predictor = trainable(name)
    with Largest() as largest:
        objective(predictor, TEACHER, batch, anchors, TrainingConfig(), budget=budget)[0].backward()
    assert 0 < largest.elements <= budget < anchors.valid[:, :, 0].sum() * VOCABULARY


def test_chunk_count_depends_only_on_the_recipe():
    """Ranks that shard a head's weights run the same number of chunks for any conversations."""
    batch, anchors = micro_batch(limit=2)
    calls = []
    predictor = trainable("medusa")
    original = predictor.step_logits
    predictor.step_logits = lambda *arguments: calls.append(1) or original(*arguments)  # type: ignore[method-assign]
    objective(predictor, TEACHER, batch, anchors, TrainingConfig(), rows=100, budget=10 * VOCABULARY)
    assert len(calls) == 3 * 10
    assert count_chunks(100, VOCABULARY, 10 * VOCABULARY) == 10
    assert count_chunks(3, 200_000, 1000) == 3, "one row a chunk at least"


def test_batch_without_anchors_has_zero_loss():
    batch, _ = micro_batch()
    batch = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    predictor = trainable("medusa")
    value, record = objective(predictor, TEACHER, batch, choose_anchors(batch, 3), TrainingConfig(), budget=500)
    value.backward()
    assert value == 0 and not record.sums.any()
    assert all(not gradient.any() for gradient in gradients(predictor).values())
    assert gradients(predictor).keys() == dict(predictor.named_parameters()).keys(), "every rank reduces the same"


def test_loss_weights_fall_by_step_and_rise_by_exit():
    assert trainable("firp").loss_weights(0.5) == trainable("medusa").loss_weights(0.5) == [1.0, 0.5, 0.25]
    assert trainable("speed").loss_weights(0.5) == [1.0, 3.0, 4.0]
    assert make_predictor(TEACHER, kind="speed", loops=4, exits=[1, 3]).loss_weights(0.5) == [1.0, 3.0]
    assert make_predictor(TEACHER, kind="speed", loops=4).loss_weights(0.5) == [1.0, 2.0, 3.0]
