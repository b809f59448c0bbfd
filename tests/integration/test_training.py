"""Training runs on tiny teachers: exact resuming, ranks, ZeRO stages, files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firp_cli.distributed.launch import launch, relayed_errors
from firp_cli.errors import FirpError, LaunchError, NumericsError, RecipeError, StoreError, UsageError
from firp_cli.machine import rank
from firp_cli.predictors.folder import load_predictor
from firp_cli.recipe import load_recipe
from firp_cli.training import checkpoint as checkpoints
from firp_cli.training.batches import Order, Prefetcher, Reader, anchor_seed, sequence_lengths, split_validation
from firp_cli.training.metrics_log import Listener
from firp_cli.training.pace import Pace, learning_rate_factor
from firp_cli.training.trainer import train
from helpers.models import HIDDEN, ROOT, tiny_teacher
from helpers.rank_pool import RankPool
from helpers.training import FIRP, MEDUSA, losses, recipe, rows, run, store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of 14 steps."""
    output = tmp_path_factory.mktemp("whole")
    outcome = run(output, recipe())
    assert (outcome.step, outcome.total_steps, outcome.stopped) == (14, 14, False)
    return output


def test_run_learns_and_writes_predictor_folder(whole: Path):
    found = rows(whole)
    train_rows = [row for row in found if row["split"] == "train"]
    validations = [row for row in found if row["split"] == "validation"]
    assert [row["step"] for row in train_rows] == list(range(1, 15))
    assert [row["step"] for row in validations] == [0, 4, 8, 12, 14]
    assert validations[-1]["loss"] < validations[0]["loss"]
    assert all(len(row["top1"]) == len(row["top5"]) == len(row["loss_by_step"]) == 3 for row in found)
    assert all(row["gradient_norm"] > 0 for row in train_rows)
    training = json.loads((whole / "training.json").read_text())
    best = max(validations, key=lambda row: row["expected_accepted_length"])
    assert training["best_step"] == best["step"]
    assert training["expected_accepted_length"] == best["expected_accepted_length"]
    assert 0 <= training["data_wait_share"] < 1 and training["environment"]["versions"]["deepspeed"]
    predictor = load_predictor(whole, tiny_teacher("llama"))
    saved = checkpoints.load_best(whole, best["step"])
    assert all(torch.equal(value, saved[name]) for name, value in predictor.state_dict().items())
    assert load_recipe(str(whole / "recipe.yaml")) == recipe()
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step-12", "step-14"] and (whole / "checkpoints" / "latest").read_text() == "step-14"
    assert list((whole / "tensorboard").glob("events*")) and not list(whole.glob(".*"))


def test_training_leaves_teacher_unchanged(whole: Path):
    assert all(parameter.grad is None for parameter in tiny_teacher("llama").model.parameters())
    assert not any(parameter.requires_grad for parameter in tiny_teacher("llama").model.parameters())


@pytest.mark.parametrize("predictor, training", [(FIRP, {}), (MEDUSA, {"precision": "bf16", "zero_stage": 2})])
def test_resume_is_exact(whole: Path, tmp_path: Path, predictor: dict[str, Any], training: dict[str, Any]):
    wanted = recipe(predictor, **training)
    reference = whole
    if predictor is not FIRP:
        reference = tmp_path / "reference"
        run(reference, wanted)
    stopped = tmp_path / "stopped"
    # SIGTERM between two checkpoints, then a stop on a step with a validation of its own, then a kill: no goodbye
    first = run(stopped, wanted, listener=Listener(step=lambda done, *_: done == 5 and os.kill(os.getpid(), 15)))
    assert first.stopped and first.step in (5, 6) and first.training is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(stopped, wanted, resume=True, listener=Listener(stop=lambda done: done == 8)).step == 8

    def kill(done: int, *_: Any) -> None:
        if done == 11:
            raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        run(stopped, wanted, resume=True, listener=Listener(step=kill))
    shutil.copytree(stopped / "checkpoints" / "step-9", stopped / "checkpoints" / "saving-step-12")
    (stopped / "checkpoints" / "saving-step-12" / "state.json").unlink()
    notes: list[str] = []
    assert not run(stopped, wanted, resume=True, listener=Listener(note=notes.append)).stopped
    assert notes == ["resuming after step 9 of 14"]
    assert rows(stopped) == rows(reference)
    for name in ("predictor.safetensors", "config.json", "recipe.yaml"):
        assert (stopped / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.parametrize(
    "launcher", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["forked", "deepspeed"]
)
def test_two_ranks_equal_one_rank_with_doubled_accumulation(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: bool
):
    """Ranks talk over gloo; forked, or started through the DeepSpeed launcher. Stages 0 and 3, shared and own heads.

    At the end rank 1 fails with an error of its own.
    """
    if launcher:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]))
        with pytest.raises(LaunchError, match="rank 1: a fault of rank 1 alone") as caught:
            launch(2, None, [str(tmp_path)], module="test_training")
        assert caught.value.exit_code == 2
    else:
        codes = ranks.run([str(tmp_path)], 2, tmp_path / "log", script=Path(__file__))
        assert codes[0] == 0 and codes[1] != 0 and "a fault of rank 1 alone" in (tmp_path / "log").read_text()
    for name, (predictor, training) in TWO_RANKS.items():
        run(tmp_path / "one" / name, recipe(predictor, **(training | {"gradient_accumulation": 2})))
        one, two = rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)
        assert len(one) == len(two) > 3
        for expected, got in zip(one, two, strict=True):
            assert got.keys() == expected.keys()
            assert got["loss"] == pytest.approx(expected["loss"], rel=2e-4)
            assert got["expected_accepted_length"] == pytest.approx(expected["expected_accepted_length"], abs=0.05)
        teacher = tiny_teacher("llama")
        mine, theirs = (load_predictor(tmp_path / side / name, teacher).state_dict() for side in ("one", "two"))
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=2e-3, atol=2e-4)
    first, second = (json.loads((tmp_path / f"timed-{number}.json").read_text()) for number in (0, 1))
    assert first == second and not first["stopped"] and len(first["rates"]) == first["step"] > 1


TWO_RANKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage0": (FIRP, {"max_steps": 3}),
    # three groups of held-out conversations: one rank has none in the second round
    "stage3-own-heads": (MEDUSA, {"max_steps": 3, "zero_stage": 3, "validation_fraction": 0.3}),
}


@pytest.mark.parametrize("predictor", [FIRP, MEDUSA], ids=["firp", "medusa"])
def test_zero_stages_have_equal_losses(tmp_path: Path, predictor: dict[str, Any]):
    found = {}
    for stage in (0, 1, 2, 3):
        output = tmp_path / str(stage)
        run(output, recipe(predictor, zero_stage=stage, max_steps=3, gradient_accumulation=2))
        found[stage] = losses(output)
        assert json.loads((output / "training.json").read_text())["predictor"]["parameters"] >= HIDDEN**2
    for stage in (1, 2, 3):
        assert found[stage] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_losses_are_close_to_fp32(tmp_path: Path, whole: Path, stage: int):
    run(tmp_path, recipe(precision="bf16", zero_stage=stage))
    found = losses(tmp_path)
    assert found == pytest.approx(losses(whole), rel=0.05) and found != losses(whole)
    assert load_predictor(tmp_path, tiny_teacher("llama")).maps[0].weight.dtype == torch.float32


def test_last_weights_are_exported_without_validation(tmp_path: Path):
    outcome = run(tmp_path, recipe(validation_fraction=0.0, max_steps=2))
    assert outcome.training is not None and outcome.training["best_step"] == 2
    assert {row["split"] for row in rows(tmp_path)} == {"train"}
    load_predictor(tmp_path, tiny_teacher("llama"))


def test_nan_loss_names_step_and_conversations(tmp_path: Path):
    wanted = recipe(init="identity", epochs=1, validate_every=100, save_every=2)
    items = [SimpleNamespace(**vars(item)) for item in store()]
    order = Order(split_validation(len(items), 0.2, 0)[0], 3, 1, 0, sequence_lengths(items))
    poisoned = order.conversations(4, 0)[0][1]
    items[poisoned].hidden = {layer: states * float("nan") for layer, states in items[poisoned].hidden.items()}
    with pytest.raises(NumericsError, match=rf"optimizer step 5 .*{poisoned}.*; checkpoint step-4 is kept"):
        train(wanted, tiny_teacher("llama"), items, tmp_path)
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-4"
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "predictor.safetensors").exists()


def test_output_of_a_run_is_not_overwritten(whole: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"contains the checkpoints of a run: add --resume"):
        run(whole, recipe())
    shutil.copytree(whole, tmp_path / "trained", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UsageError, match="contains a trained predictor"):
        run(tmp_path / "trained", recipe())


def test_resume_with_other_settings_is_refused(whole: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"training.learning_rate=0.005, now it is 0.001"):
        run(whole, recipe(learning_rate=1e-3), resume=True)
    with pytest.raises(RecipeError, match=r"predictor.layer=2, now it is 1"):
        run(whole, recipe({"kind": "firp", "layer": 1, "steps": 3}), resume=True)
    with pytest.raises(UsageError, match="26 conversations when this run began, now it has 20"):
        train(recipe(), tiny_teacher("llama"), store()[:20], whole, resume=True)
    with pytest.raises(StoreError, match="no conversation"):
        train(recipe(), tiny_teacher("llama"), [], tmp_path)


def test_resume_of_a_predictor_without_checkpoints_needs_the_same_recipe_and_store(tmp_path: Path):
    output, notes = tmp_path / "run", list[str]()
    summary = {"counts": {"tokens": 500}, "dtype": "float32", "settings": {"data_fingerprint": "aa"}}
    run(output, recipe(max_steps=0), resume=True, listener=Listener(note=notes.append), store_summary=summary)
    assert notes[0] == f"nothing to resume: {output} has no checkpoint; training starts at the beginning"
    before = (output / "predictor.safetensors").read_bytes()
    with pytest.raises(UsageError, match="26 conversations when this run began, now it has 20"):
        train(recipe(max_steps=0), tiny_teacher("llama"), store()[:20], output, resume=True)
    other = {**summary, "settings": {"data_fingerprint": "bb"}}
    with pytest.raises(UsageError, match="data_fingerprint aa when this run began, now it has bb"):
        run(output, recipe(max_steps=0), resume=True, store_summary=other)
    with pytest.raises(RecipeError, match=r"training.epochs=2, now it is 3"):
        run(output, recipe(max_steps=0, epochs=3), resume=True, store_summary=summary)
    notes.clear()
    run(output, recipe(max_steps=0), resume=True, store_summary=summary, listener=Listener(note=notes.append))
    assert (output / "predictor.safetensors").read_bytes() == before and not any("nothing" in note for note in notes)
    (output / "training.json").write_text("[")
    with pytest.raises(FirpError, match=r"training.json cannot be read"):
        run(output, recipe(max_steps=0), resume=True, store_summary=summary)


def test_checkpoint_and_trained_predictor_know_their_store(whole: Path, tmp_path: Path):
    summary = {"settings": {"data_fingerprint": "aa"}}
    run(tmp_path / "run", recipe(), listener=Listener(stop=lambda done: done == 1), store_summary=summary)
    with pytest.raises(UsageError, match="data_fingerprint aa when this run began, now it has bb"):
        run(tmp_path / "run", recipe(), resume=True, store_summary={"settings": {"data_fingerprint": "bb"}})
    shutil.copytree(whole, tmp_path / "trained", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UsageError, match="without checkpoints, so there is nothing to continue from"):
        run(tmp_path / "trained", recipe(), resume=True)


def test_damaged_checkpoint_is_named(whole: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    newest = copy / "checkpoints" / "step-14"
    damaged = newest / "maps.1.weight.safetensors"
    whole_bytes = damaged.read_bytes()
    flipped = bytearray(whole_bytes)
    flipped[-5] ^= 1
    for content in (whole_bytes[:100], bytes(flipped), None):
        damaged.unlink() if content is None else damaged.write_bytes(content)
        with pytest.raises(FirpError, match=r"step-14 cannot be read .*; remove it to resume from the one before"):
            run(copy, recipe(), resume=True)
    shutil.rmtree(newest)
    assert run(copy, recipe(), resume=True).step == 14
    assert rows(copy) == rows(whole)


def test_order_depends_only_on_the_seed():
    order = Order(range(23), 2, 4, seed=1)
    assert order.steps_per_epoch == 2
    seen = [order.conversations(step, place) for step in range(4) for place in range(4)]
    again = Order(range(23), 2, 4, seed=1)
    assert seen[::-1] == [again.conversations(step, place) for step in (3, 2, 1, 0) for place in (3, 2, 1, 0)]
    first = [index for indices, epoch in seen if epoch == 0 for index in indices]
    second = [index for indices, epoch in seen if epoch == 1 for index in indices]
    assert len(set(first)) == len(first) == len(set(second)) == 16 and first != second
    small = Order(range(3), 2, 4, seed=1)
    assert [len(small.conversations(0, place)[0]) for place in range(4)] == [2, 2, 2, 2]


def test_validation_split_is_stable_when_store_grows():
    train_part, held = split_validation(200, 0.1, seed=3)
    assert len(held) == 20 and sorted(train_part + held) == list(range(200))
    assert len(set(held) & set(split_validation(220, 0.1, seed=3)[1])) >= 17
    assert split_validation(1, 0.5, 0) == ([0], []) and len(split_validation(2, 0.01, 0)[1]) == 1
    assert len({anchor_seed(0, epoch, index) for epoch in range(20) for index in range(20)}) == 400


def test_prefetcher_keeps_order_and_raises_errors():
    items = list(store()[:4])
    reader = Reader(items, 3, 6, 0, torch.device("cpu"), torch.float32)
    wanted = [([0, 1], 0), ([2], 0), ([3, 0], 1), ([9], 1)]
    prefetcher = Prefetcher(reader, iter(wanted))
    assert [next(prefetcher).indices for _ in range(3)] == [[0, 1], [2], [3, 0]]
    with pytest.raises(IndexError):
        next(prefetcher)
    prefetcher.close()
    endless = Prefetcher(reader, iter([([0], 0)] * 10_000))
    next(endless)
    endless.close()


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate_factor(0, 1, 0.0) == 1.0


def worker(folder: str) -> None:
    """Run on each launched rank."""
    with relayed_errors():
        for name, (predictor, training) in TWO_RANKS.items():
            run(Path(folder) / "two" / name, recipe(predictor, **training))
        timed_worker(Path(folder))
        if rank() == 1:
            raise UsageError("a fault of rank 1 alone")


def timed_worker(folder: Path) -> None:
    """Train until the minutes are over, with a clock on rank 1 that is far ahead of rank 0's."""
    rates: list[float] = []
    listener = Listener(step=lambda done, total, row: rates.append(row["learning_rate"]))
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(Pace, "clock", lambda self: 1e6)
        outcome = run(folder / "timed", recipe(epochs=100_000, max_minutes=0.03), listener=listener)
    found = {"step": outcome.step, "stopped": outcome.stopped, "rates": rates}
    (folder / f"timed-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    worker(*sys.argv[1:])


@pytest.mark.parametrize(("step", "remedy"), [(3, "there is none before it"), (6, "the one before it")])
def test_checkpoint_on_a_full_disk_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, remedy: str
) -> None:
    write = checkpoints.write_json

    def full(path: Path, value: Any) -> None:
        if f"step-{step}" in str(path):
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(FirpError, match=f"checkpoint of step {step} cannot be written .*No space.*; {remedy}"):
        run(tmp_path, recipe())
    assert not list((tmp_path / "checkpoints").glob("saving-*"))
