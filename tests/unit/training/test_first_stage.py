"""First stage of training: only the coupling learns, on draft states that do not change, over some tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.quality import evaluate
from firp_cli.predictors.anchors import Anchors, choose_anchors, target_states
from firp_cli.predictors.base import SequenceBatch, TreePredictor
from firp_cli.predictors.folder import build_predictor
from firp_cli.training import batches
from firp_cli.training.batches import anchor_seed, read_batch, split_validation
from firp_cli.training.draft_states import DraftStates, rounded
from firp_cli.training.first_stage import freeze_drafts, has_first_stage, stage_recipe
from firp_cli.training.local_trainer import train_local
from firp_cli.training.loop import TrainingLoop
from firp_cli.training.metrics_log import Listener
from firp_cli.training.objective import ObjectiveModule, loss_vocabulary, objective
from helpers.coupling import FORMS, UNCOUPLED, coupled, section
from helpers.models import VOCABULARY, random_prompts, sequence_batch, tiny_teacher
from helpers.pairwise import covered
from helpers.training import recipe, store

TEACHER = tiny_teacher("llama")
cases = pytest.mark.parametrize(("form", "share", "kind"), covered(FORMS, [True, False], list(UNCOUPLED)))


def settings(described: dict[str, Any], epochs: int = 2, **training: Any) -> TrainingConfig:
    stage = {
        "epochs": epochs,
        "micro_batch_size": 4,
        "anchors_per_sequence": 5,
        "learning_rate": 5e-3,
    }
    options = {"init": "identity", "vocabulary": 40, "coupling": stage | training.pop("coupling", {})}
    return recipe(described, **(options | training)).training


def micro_batch(predictor: TreePredictor) -> tuple[SequenceBatch, Anchors]:
    sequences = random_prompts(3, seed=3, low=9, high=20)
    batch = sequence_batch(TEACHER, sequences, [3, 5, 4], list(predictor.required_layers))
    return batch, choose_anchors(batch, predictor.offsets, 6, seeds=[5, 6, 7])


def slow_loss(predictor: TreePredictor, batch: SequenceBatch, anchors: Anchors, tokens: Tensor) -> Tensor:
    """Return the loss over a softmax of these tokens alone, one draft at a time, with step_decay 0.8."""
    path = predictor.path_states(batch, anchors.index, predictor.draft_states(TEACHER, batch, anchors.index))
    target = target_states(batch, anchors, predictor.offsets)
    total, weight = torch.zeros(()), 0.0
    for row, place, step in anchors.valid.nonzero().tolist():
        draft = TEACHER.head(path[row, place, step])[tokens].softmax(-1)
        wanted = TEACHER.head(target[row, place, step])[tokens].softmax(-1)
        total = total + 0.8**step * (wanted * (wanted / draft).log()).sum()
        weight += 0.8**step
    return total / weight


@cases
def test_loss_over_some_tokens_is_a_softmax_over_these(form: str, share: bool, kind: str) -> None:
    """Loss and gradients; a chunk holds a few drafts. All tokens in any order give the whole loss."""
    predictor = coupled(TEACHER, section(kind, form, share)).requires_grad_(True)
    batch, anchors = micro_batch(predictor)
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(VOCABULARY, generator=generator)
    config, found = TrainingConfig(), []
    for tokens in (None, shuffled, shuffled[:30]):
        for fast in (True, False):
            predictor.zero_grad()
            if fast:
                loss, _ = objective(
                    predictor, TEACHER, batch, anchors, config, budget=7 * VOCABULARY, vocabulary=tokens
                )
            else:
                loss = slow_loss(predictor, batch, anchors, torch.arange(VOCABULARY) if tokens is None else tokens)
            loss.backward()
            found.append((loss.detach(), [parameter.grad.clone() for parameter in predictor.parameters()]))
    for (loss, gradients), (expected, slow) in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for gradient, reference in zip(gradients, slow, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[2][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert (found[4][0] - found[0][0]).abs() > 1e-3
    assert all(gradient.any() for gradient in found[0][1]), "draft states and coupling both learn"


def test_vocabulary_has_the_tokens_of_the_micro_batch_and_frequent_ones() -> None:
    frequent = torch.tensor([9, 4, 7, 2, 8])
    assert loss_vocabulary(torch.tensor([[4, 30], [30, 11]]), frequent).tolist() == [4, 11, 30, 9, 7]
    many = loss_vocabulary(torch.tensor([[1, 2, 3, 4, 5, 6, 9]]), frequent)
    assert many.tolist() == [1, 2, 3, 4, 5, 6, 9], "the conversations' own tokens are never left out"
    own = loss_vocabulary(torch.tensor([[9, 9]]), frequent).tolist()
    assert own == [9, 4, 7, 2, 8] and len(set(own)) == 5


def test_frequent_tokens_are_those_of_the_training_conversations() -> None:
    described = section("firp_plus")
    predictor = coupled(TEACHER, described)

    def frequent(size: int | None) -> torch.Tensor | None:
        wanted = settings(described, vocabulary=size)
        return TrainingLoop(predictor, TEACHER, store(), wanted, Listener()).frequent

    chosen = frequent(10)
    assert chosen is not None and len(chosen) == 10
    counts = torch.zeros(VOCABULARY, dtype=torch.long)
    for item in store():
        counts += torch.bincount(item.input_ids, minlength=VOCABULARY)
    assert counts[chosen].min() > 0
    for size in (None, VOCABULARY, 4096):
        assert frequent(size) is None


def test_frequent_tokens_are_counted_over_all_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "COUNTED", 4)
    conversations = [
        SimpleNamespace(input_ids=torch.tensor([token] * 3), loss_mask=None) for token in (5, 5, 5, 5, 8, 8, 8, 8)
    ]
    found = batches.frequent_tokens(conversations, list(range(8)), 2, 10)  # type: ignore[arg-type]
    assert sorted(found.tolist()) == [5, 8]
    assert batches.frequent_tokens(conversations, [0, 7], 3, 10)[:2].tolist() == [5, 8]  # type: ignore[arg-type]


def test_stage_settings_are_those_of_the_coupling() -> None:
    wanted = recipe(section("firp_plus"), init="identity", max_steps=7, coupling={"epochs": 5, "learning_rate": 0.1})
    assert has_first_stage(wanted)
    training = stage_recipe(wanted).training
    assert (training.epochs, training.learning_rate, training.max_steps, training.validate_every) == (
        5,
        0.1,
        None,
        None,
    )
    assert (training.micro_batch_size, training.anchors_per_sequence) == (8, 48)
    assert (training.seed, training.loss, training.validation_fraction) == (0, "kl", 0.2)
    assert not has_first_stage(recipe(section("firp_plus"), init="identity", coupling={"epochs": 0}))
    assert not has_first_stage(recipe()) and not has_first_stage(recipe({**UNCOUPLED["medusa"]}))


@cases
def test_first_stage_changes_only_the_coupling(form: str, share: bool, kind: str) -> None:
    """The maps keep their bits; the last validation is that of the finished predictor, over all tokens."""
    described = section(kind, form, share)
    predictor = build_predictor(recipe(described, init="identity").predictor, TEACHER)  # type: ignore[arg-type]
    assert isinstance(predictor, TreePredictor)
    started = coupled(TEACHER, described)
    wanted = settings(described, epochs=4, max_steps=0)
    rows = train_local(predictor, TEACHER, store(), wanted)
    torch.manual_seed(wanted.seed)
    started.initialise("identity", TEACHER)
    before = started.state_dict()
    changed = {name for name, value in predictor.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(parameter.requires_grad for parameter in predictor.parameters())
    validations = [row for row in rows if row["split"] == "validation"]
    assert validations[0]["step"] == 0 and validations[-1]["loss"] < validations[0]["loss"]
    best = max(validations, key=lambda row: row["expected_accepted_length"])
    assert changed == ({name for name in before if name.startswith("coupling.")} if best["step"] else set())
    check_validation(predictor, wanted, best)


def check_validation(predictor: TreePredictor, wanted: TrainingConfig, row: dict[str, Any]) -> None:
    """Compare a validation of the first stage with an evaluation from scratch, on rounded states at its anchors."""
    _, held_out = split_validation(len(store()), wanted.validation_fraction, wanted.seed)
    batch = read_batch(store(), held_out)
    seeds = [anchor_seed(wanted.seed, 0, index) for index in held_out]
    anchors = choose_anchors(batch, predictor.offsets, 5, seeds)
    with torch.no_grad():
        states = rounded(predictor.draft_states(TEACHER, batch, anchors.index))
        loss, record = objective(predictor, TEACHER, batch, anchors, wanted, states=states)
    assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
    averages = record.averages()
    assert row["top1"] == pytest.approx(averages["top1"], abs=0.03)
    assert row["expected_accepted_length"] == pytest.approx(averages["expected_accepted_length"], abs=0.05)


def test_kept_states_give_the_losses_of_computed_ones() -> None:
    """The objective's module on a first epoch's states, and on the same ones after they were kept."""
    predictor = coupled(TEACHER, section("firp_plus", "recurrent"))
    freeze_drafts(predictor)
    batch, anchors = micro_batch(predictor)
    drafts = DraftStates((3, TEACHER.hidden_size))
    module = ObjectiveModule(predictor, TEACHER, settings(section("firp_plus")), frozen=True)
    first, _, states = module(batch, anchors)
    assert states is not None
    counts = anchors.valid[:, :, 0].sum(1).tolist()
    drafts.write([0, 1, 2], states, counts)
    kept = drafts.read([0, 1, 2])
    assert kept is not None
    again, _, _ = module(batch, anchors, kept.to(states.dtype))
    assert torch.equal(first, again)
    first.backward()
    learning = {name for name, parameter in predictor.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in predictor.named_parameters() if name.startswith("coupling.")}


def test_both_stages_train_locally() -> None:
    """Two stages end at a better validation than their starts; without a first stage all weights start anew."""
    described = section("firp_plus")
    predictor = build_predictor(recipe(described, init="identity").predictor, TEACHER)  # type: ignore[arg-type]
    rows = train_local(predictor, TEACHER, store(), settings(described))
    validations = [row for row in rows if row["split"] == "validation"]
    starts = [place for place, row in enumerate(validations) if row["step"] == 0]
    assert len(starts) == 2
    second = validations[starts[1] :]
    kept = max(row["expected_accepted_length"] for row in validations[: starts[1]])
    assert second[0]["expected_accepted_length"] == pytest.approx(kept, abs=0.3), "on other anchors"
    assert validations[-1]["loss"] < validations[0]["loss"]
    once = build_predictor(recipe(described, init="identity").predictor, TEACHER)  # type: ignore[arg-type]
    at_once = train_local(once, TEACHER, store(), settings(described, epochs=0))
    assert sum(row["step"] == 0 for row in at_once) == 1
    assert at_once[0]["loss"] == pytest.approx(validations[0]["loss"], rel=0.3)


@pytest.mark.parametrize("form", FORMS)
def test_quality_of_a_coupled_predictor_equals_the_objective(form: str) -> None:
    """`evaluate` and the training loss see the same path states, from every anchor of the conversations."""
    predictor = coupled(TEACHER, section("firp_plus", form, candidates=20), strength=1.0)
    chosen = list(store()[:5])
    found = evaluate(TEACHER, predictor, chosen, parse_tree("chain", 3))
    batch = read_batch(chosen, range(5))
    anchors = choose_anchors(batch, predictor.offsets)
    with torch.no_grad():
        _, record = objective(predictor, TEACHER, batch, anchors, TrainingConfig())
    averages = record.averages()
    assert [step.kl for step in found.steps] == pytest.approx(averages["loss_by_step"], rel=1e-3)
    assert [step.top1 for step in found.steps] == pytest.approx(averages["top1"], abs=1e-6)
    assert found.expected_accepted_length_chain == pytest.approx(averages["expected_accepted_length"], abs=1e-6)
