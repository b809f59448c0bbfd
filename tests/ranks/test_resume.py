"""Resuming on other numbers of ranks and ZeRO stages; checkpoints and weights that are kept; early stopping."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firp_cli.config import Recipe
from firp_cli.distributed.launch import relayed_errors
from firp_cli.errors import FirpError, UsageError
from firp_cli.predictors.folder import load_predictor
from firp_cli.recipe import load_recipe
from firp_cli.training import checkpoint as checkpoints
from firp_cli.training import metrics_log as journals
from firp_cli.training import resuming
from firp_cli.training.batches import Order, Prefetcher, Reader
from firp_cli.training.metrics_log import Listener, check_trackers
from firp_cli.training.random_state import random_state, restore_random_state, seed_rank
from firp_cli.training.trainer import train
from helpers.models import tiny_teacher
from helpers.rank_pool import RankPool
from helpers.training import FIRP, losses, recipe, rows, run, store

STAGES = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
STOP = Listener(stop=lambda done: done == 4)


def wanted(stage: int, precision: str, accumulation: int) -> Recipe:
    return recipe(FIRP, zero_stage=stage, precision=precision, gradient_accumulation=accumulation, epochs=4)


@pytest.fixture(scope="module")
def moved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that began on one rank and ended on two, and the other way round."""
    folder = tmp_path_factory.mktemp("moved")
    for stage, precision in STAGES:
        settings = wanted(stage, precision, 2)
        assert run(folder / f"one-two-{stage}-{precision}", settings, listener=STOP).stopped
    codes = ranks.run([str(folder)], 2, folder / "log", script=Path(__file__))
    assert codes == [0, 0], (folder / "log").read_text()
    for stage, precision in STAGES:
        assert not run(folder / f"two-one-{stage}-{precision}", wanted(stage, precision, 1), resume=True).stopped
    return folder


def worker(folder: str) -> None:
    """Run on each of two ranks. The recipe of a run is unchanged; its steps are distributed over the new ranks."""
    with relayed_errors():
        for stage, precision in STAGES:
            run(Path(folder) / f"one-two-{stage}-{precision}", wanted(stage, precision, 2), resume=True)
            assert run(
                Path(folder) / f"two-one-{stage}-{precision}", wanted(stage, precision, 1), listener=STOP
            ).stopped


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_resume_with_another_number_of_ranks(moved: Path, tmp_path: Path, stage: int, precision: str):
    run(tmp_path, wanted(stage, precision, 2))
    expected = losses(tmp_path)
    assert len(expected) == 12
    tolerance = 2e-5 if precision == "fp32" else 2e-2
    for way in ("one-two", "two-one"):
        output = moved / f"{way}-{stage}-{precision}"
        assert losses(output) == pytest.approx(expected, rel=tolerance), way
        mine, theirs = (load_predictor(side, tiny_teacher()).state_dict() for side in (tmp_path, output))
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=20 * tolerance, atol=20 * tolerance)
    assert losses(moved / f"one-two-{stage}-{precision}")[:4] == expected[:4]


def test_resume_with_another_zero_stage(tmp_path: Path):
    run(tmp_path / "whole", recipe())
    assert run(tmp_path / "run", recipe(), listener=STOP).stopped
    assert not run(tmp_path / "run", recipe(zero_stage=3), resume=True).stopped
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_resume_refuses_indivisible_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = recipe(gradient_accumulation=6)
    run(tmp_path, settings, listener=Listener(stop=lambda done: done == 1))
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None
    for count in (1, 2, 3, 6):
        monkeypatch.setattr(resuming, "world_size", lambda count=count: count)
        assert resuming.check_resumable(found, settings, {"conversations": len(store())}) == 6
    monkeypatch.setattr(resuming, "world_size", lambda: 4)
    with pytest.raises(UsageError, match=r"6 micro-batches, which 4 ranks .* resume with --gpus 1, 2, 3, 6"):
        resuming.check_resumable(found, settings, {"conversations": len(store())})


def test_checkpoint_has_no_pickle_and_survives_kill_while_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, recipe(), listener=Listener(stop=lambda done: done == 6))
    files = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json", ""}
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
    for path in checkpoints._checkpoints(tmp_path):
        with pytest.raises(KeyError):
            checkpoints._discard(path)
    assert checkpoints.latest_checkpoint(tmp_path) is None


def test_keep_last_and_keep_best_limit_files(tmp_path: Path):
    run(tmp_path, recipe(keep_last=3, keep_best=2, save_every=2, validate_every=2))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-10", "step-12", "step-14"]
    validations = [row for row in rows(tmp_path) if row["split"] == "validation"]
    ranked = sorted(validations, key=lambda row: (-row["expected_accepted_length"], row["step"]))
    state = json.loads((folder / "step-14" / "state.json").read_text())["state"]
    assert [step for _, step in state["kept"]] == [row["step"] for row in ranked[:2]]
    kept = {int(path.stem.removeprefix("best-")) for path in folder.glob("best-*")}
    assert {row["step"] for row in ranked[:2]} <= kept < {row["step"] for row in validations}


def test_patience_ends_run(tmp_path: Path):
    settings = recipe(patience=2, min_improvement=9.0, validate_every=2, save_every=100)
    outcome = run(tmp_path, settings)
    assert (outcome.step, outcome.stopped) == (4, False) and outcome.training is not None
    assert outcome.training["steps"] == 4 and outcome.training["planned_steps"] == 14
    assert [row["step"] for row in rows(tmp_path) if row["split"] == "validation"] == [0, 2, 4]
    load_predictor(tmp_path, tiny_teacher())
    again = run(tmp_path, settings, resume=True)
    assert (again.step, again.stopped) == (4, False)
    further = run(tmp_path, recipe(validate_every=2, save_every=100), resume=True)  # patience may be changed
    assert further.step == 14


def test_balanced_steps_have_the_same_conversations():
    lengths = [int(value) for value in np.random.default_rng(0).integers(5, 400, size=200)]
    unsorted, balanced = Order(range(200), 4, 8, seed=3), Order(range(200), 4, 8, seed=3, lengths=lengths)
    for step in range(9):
        one = [unsorted.conversations(step, place)[0] for place in range(8)]
        two = [balanced.conversations(step, place)[0] for place in range(8)]
        assert sorted(chain(*one)) == sorted(chain(*two))
        padded = [sum(max(lengths[index] for index in micro) * len(micro) for micro in part) for part in (one, two)]
        assert padded[1] < 0.85 * padded[0]
    for ranks in (1, 2, 4, 8):
        places = [[balanced.place(micro, rank, ranks) for micro in range(8 // ranks)] for rank in range(ranks)]
        assert sorted(chain(*places)) == list(range(8))
        if ranks == 2:
            work = [sum(max(lengths[index] for index in two[place]) for place in mine) for mine in places]
            assert max(work) < 1.1 * min(work)


def test_losses_are_independent_of_readers(tmp_path: Path):
    run(tmp_path / "one", recipe(max_steps=6))
    run(tmp_path / "four", recipe(max_steps=6, readers=4))
    assert rows(tmp_path / "one") == rows(tmp_path / "four")
    reader = Reader(store(), 3, 6, 0, torch.device("cpu"), torch.float32)
    prefetcher = Prefetcher(reader, iter([([number % 26], 0) for number in range(40)]), readers=5)
    assert [item.indices[0] for item in prefetcher] == [number % 26 for number in range(40)]
    prefetcher.close()


def test_random_state_is_restored():
    seed_rank(0, 5, 1)
    state = json.loads(json.dumps(random_state()))
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    restore_random_state(state)
    assert drawn == (random.random(), np.random.rand(), torch.rand(3).tolist())
    seed_rank(0, 5, 2)
    assert drawn[0] != random.random()


def test_full_disk_for_metrics_is_reported_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(done: int, *_: Any) -> None:
        if done == 4:
            monkeypatch.setattr(journals.json, "dumps", full)

    with pytest.raises(FirpError, match=r"metrics.jsonl cannot be written .*No space left.* --resume"):
        run(tmp_path, recipe(), listener=Listener(step=fill))
    monkeypatch.undo()
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-3"
    assert not run(tmp_path, recipe(), resume=True).stopped


def test_missing_tracker_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journals.importlib.util, "find_spec", lambda _: None)
    check_trackers(load_recipe("demo"))
    with pytest.raises(UsageError, match=r"pip install 'firp\[wandb\]'"):
        check_trackers(load_recipe("demo", ["training.wandb=drafts"]))


def test_wandb_gets_rows_and_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wanted = recipe(FIRP, wandb="drafts", log_every=1, max_steps=4)
    assert run(tmp_path, wanted, listener=Listener(stop=lambda done: done == 2)).stopped
    time.sleep(1)  # wandb names a folder by the second: a run in the same one would write into it
    assert not run(tmp_path, wanted, resume=True).stopped
    known = json.loads((tmp_path / "wandb.json").read_text())

    def sent() -> list[bytes]:
        return [path.read_bytes() for path in (tmp_path / "wandb").glob(f"offline-run-*-{known['id']}/run-*.wandb")]

    def complete() -> bool:
        trained = [b"train/gradient_norm" in content for content in sent()]
        return trained == [True, True] and b"validation/expected_accepted_length" in b"".join(sent())

    assert known["project"] == "drafts" and len(sent()) == 2
    until = time.monotonic() + 30
    while not complete() and time.monotonic() < until:  # wandb's own process still writes after `finish` has returned
        time.sleep(0.05)
    assert complete()


def test_wandb_failure_is_reported_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match=r"No API key.*\n.*WANDB_MODE=offline"):
        run(tmp_path, recipe(wandb="drafts", max_steps=1))


def test_metrics_rows_have_throughput_memory_and_gradients(tmp_path: Path):
    train(recipe(max_steps=2), tiny_teacher(), store(), tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert row["split"] == "train" and row["tokens_per_second"] > 0 and row["step_seconds"] > 0
    assert 0 <= row["data_wait"] <= 1 and row["gradient_norm"] > 0
    assert 50e6 < row["memory_bytes"] < 24e9


def test_second_run_in_a_folder_is_refused(tmp_path: Path):
    def begin_another(*_: Any) -> None:
        before = sorted(path.name for path in tmp_path.rglob("*"))
        with pytest.raises(
            UsageError, match=rf"another `firp train` is writing .*process {os.getpid()} on .* --output"
        ):
            run(tmp_path, recipe(), resume=True)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        seen.append(True)

    seen: list[bool] = []
    run(tmp_path, recipe(max_steps=1), listener=Listener(step=begin_another))
    assert seen
    assert run(tmp_path, recipe(max_steps=1), resume=True).step == 1


if __name__ == "__main__":
    worker(*sys.argv[1:])
