"""Training in two stages: files, the better stage, stopping and resuming in either of them, two ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firp_cli.api.train_run import train
from firp_cli.config import Recipe
from firp_cli.distributed.launch import relayed_errors
from firp_cli.errors import UsageError
from firp_cli.predictors.folder import load_predictor
from firp_cli.training.draft_states import DraftStates
from firp_cli.training.local_trainer import train_local
from firp_cli.training.metrics_log import Listener
from helpers.coupling import section
from helpers.models import make_predictor, tiny_teacher
from helpers.rank_pool import RankPool
from helpers.train_command import SETTINGS
from helpers.training import losses, recipe, rows, run, store

STAGE = {"epochs": 2, "micro_batch_size": 3, "anchors_per_sequence": 5, "learning_rate": 5e-3}
EXPORTED = ["config.json", "predictor.safetensors", "recipe.yaml", "training.json"]
TWO_RANKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlp": (section("firp_plus", width=20), {"max_steps": 2}),
    "recurrent-zero3": (section("medusa", "recurrent", False, width=20), {"zero_stage": 3, "max_steps": 2}),
}


def wanted(described: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, **training: Any) -> Recipe:
    described = described or section("firp_plus") | {"draft_vocabulary": 60}
    init = "ridge" if described["kind"] == "firp_plus" else "identity"
    return recipe(
        described, **({"init": init, "epochs": 1, "vocabulary": 40, "coupling": STAGE | (stage or {})} | training)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run: 14 steps of the first stage, 7 of the second."""
    output = tmp_path_factory.mktemp("whole")
    outcome = run(output, wanted())
    assert (outcome.step, outcome.total_steps, outcome.stopped) == (7, 7, False)
    return output


def stop_at(step: int, stage: int) -> Listener:
    """Return a listener that stops at a step of the first (0) or second (1) stage."""
    begun: list[int] = []

    def stop(done: int) -> bool:
        if done == 1:
            begun.append(done)
        return len(begun) == stage + 1 and done == step

    return Listener(stop=stop)


def check_equal(one: Path, other: Path) -> None:
    for stage in ("coupling", "."):
        assert rows(one / stage) == rows(other / stage)
        for name in ("predictor.safetensors", "config.json"):
            assert (one / stage / name).read_bytes() == (other / stage / name).read_bytes(), (stage, name)


def test_both_stages_write_their_files(whole: Path) -> None:
    stage = whole / "coupling"
    assert all((folder / name).is_file() for folder in (whole, stage) for name in EXPORTED)
    assert not (stage / "draft-states").exists()
    first, second = (json.loads((folder / "training.json").read_text()) for folder in (stage, whole))
    assert first["steps"] == 14 and second["steps"] == 7 and first["first_stage"] is None
    assert second["first_stage"] == {
        key: first[key] for key in ("steps", "best_step", "validation", "tokens", "seconds")
    }
    found = [row for row in rows(stage) if row["split"] == "train"]
    assert [row["step"] for row in found] == list(range(1, 15))
    validations = [row for row in rows(stage) if row["split"] == "validation"]
    assert validations[0]["step"] == 0 and validations[-1]["loss"] < validations[0]["loss"]
    assert second["predictor"]["kind"] == "firp_plus"


def test_second_stage_goes_on_from_the_first(whole: Path) -> None:
    """Its start is the first stage's predictor, and the maps of that one are the start values."""
    teacher = tiny_teacher("llama")
    values = load_predictor(whole / "coupling", teacher).state_dict()
    started = load_file(whole / "coupling" / "start.safetensors")
    assert started.keys() == values.keys() and not started["coupling.output_weight"].any()
    assert all(torch.equal(values[name], started[name]) for name in values if not name.startswith("coupling."))
    validated = [row for row in rows(whole) if row["split"] == "validation"]
    best = json.loads((whole / "coupling" / "training.json").read_text())["expected_accepted_length"]
    assert validated[0]["step"] == 0 and validated[0]["expected_accepted_length"] == pytest.approx(best, abs=0.3)
    changed = load_predictor(whole, teacher).state_dict()
    if json.loads((whole / "training.json").read_text())["best_step"]:
        assert any(not torch.equal(changed[name], values[name]) for name in values if name.startswith("maps."))


def test_worse_second_stage_is_not_exported(tmp_path: Path) -> None:
    run(tmp_path, wanted(stage={"epochs": 6, "learning_rate": 2e-2}, learning_rate=50.0, max_grad_norm=0.0))
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["best_step"] == 0
    validated = [row for row in rows(tmp_path) if row["split"] == "validation"]
    assert validated[-1]["expected_accepted_length"] < validated[0]["expected_accepted_length"]
    for name in ("predictor.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "coupling" / name).read_bytes()


@pytest.mark.parametrize(("step", "stage"), [(5, 0), (13, 0), (4, 1)])
def test_resume_is_exact(whole: Path, tmp_path: Path, step: int, stage: int) -> None:
    """Stopped in the first stage, before and after its first epoch, and in the second."""
    outcome = run(tmp_path, wanted(), listener=stop_at(step, stage))
    assert outcome.stopped and outcome.step == step and not (tmp_path / "config.json").exists()
    assert (tmp_path / "coupling" / "config.json").exists() == bool(stage)
    assert (tmp_path / "coupling" / "draft-states").exists() == (not stage)
    notes: list[str] = []
    assert not run(tmp_path, wanted(), resume=True, listener=Listener(note=notes.append)).stopped
    assert [note for note in notes if "resuming" in note] == [f"resuming after step {step} of {(14, 7)[stage]}"]
    check_equal(tmp_path, whole)


def test_killed_first_stage_goes_on(whole: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, then with lost draft states: the start values are kept, states made anew."""

    def kill(at: int) -> Listener:
        def step(done: int, *_: Any) -> None:
            if done == at:
                raise KeyError("killed")

        return Listener(step=step)

    with pytest.raises(KeyError, match="killed"):
        run(tmp_path, wanted(), listener=kill(2))
    with pytest.raises(KeyError, match="killed"):
        run(tmp_path, wanted(), resume=True, listener=kill(8))
    for path in (tmp_path / "coupling" / "draft-states").glob("states-*.bin"):
        path.write_bytes(path.read_bytes()[:1000])
    assert not run(tmp_path, wanted(), resume=True).stopped
    for stage in ("coupling", "."):
        assert losses(tmp_path / stage) == pytest.approx(losses(whole / stage), rel=1e-4)
    started = [load_file(folder / "coupling" / "start.safetensors") for folder in (tmp_path, whole)]
    assert all(torch.equal(value, started[1][name]) for name, value in started[0].items())


def test_resume_after_the_first_stage_skips_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "coupling", tmp_path / "run" / "coupling")
    written = (tmp_path / "run" / "coupling" / "metrics.jsonl").read_bytes()
    seen: list[int] = []
    listener = Listener(step=lambda done, total, row: seen.append(total))
    assert not run(tmp_path / "run", wanted(), resume=True, listener=listener).stopped
    assert seen == [7] * 7
    assert (tmp_path / "run" / "coupling" / "metrics.jsonl").read_bytes() == written
    check_equal(tmp_path / "run", whole)


def test_folder_of_a_first_stage_is_not_overwritten(tmp_path: Path) -> None:
    assert run(tmp_path, wanted(), listener=stop_at(1, 0)).stopped
    shutil.rmtree(tmp_path / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["coupling"]
    with pytest.raises(UsageError, match=r"contains the checkpoints of a run: add --resume"):
        run(tmp_path, wanted())


@pytest.mark.parametrize("init", ["identity", "ridge"])
def test_training_without_a_first_stage(tmp_path: Path, init: str) -> None:
    run(tmp_path, wanted(stage={"epochs": 0}, init=init))
    assert not (tmp_path / "coupling").exists()
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["first_stage"] is None and training["steps"] == 7
    validated = [row for row in rows(tmp_path) if row["split"] == "validation"]
    assert validated[-1]["loss"] < validated[0]["loss"]
    predictor = load_predictor(tmp_path, tiny_teacher("llama"))
    assert training["best_step"] == 0 or predictor.state_dict()["coupling.output_weight"].any()


@pytest.mark.parametrize("form", ["mlp", "recurrent", "low_rank"])
def test_local_training_has_the_losses_of_both_stages(form: str, tmp_path: Path) -> None:
    described = section("firp_plus", form, form == "recurrent", width=20)
    options = wanted(described, vocabulary=None if form == "mlp" else 40, validate_every=None)
    run(tmp_path, options)
    predictor = make_predictor(tiny_teacher("llama"), **described)
    history = train_local(predictor, tiny_teacher("llama"), store(), options.training)
    expected = [*rows(tmp_path / "coupling"), *rows(tmp_path)]
    assert [(row["split"], row["step"]) for row in history] == [(row["split"], row["step"]) for row in expected]
    found = [row["loss"] for row in history]
    assert found == pytest.approx([row["loss"] for row in expected], rel=2e-4)


def test_kept_states_do_not_change_the_losses(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps nothing costs time only; other batches round the states of a conversation differently."""
    monkeypatch.setattr(DraftStates, "write", lambda *_: None)
    run(tmp_path, wanted())
    assert losses(tmp_path / "coupling") == pytest.approx(losses(whole / "coupling"), rel=1e-4)


def test_train_command_ends_with_the_gate(teacher_folder: Path, store_folder: Path, tmp_path: Path) -> None:
    """`api.train` on a store on disk, which loads a part of the teacher: its embedding too."""
    overrides = ["predictor.kind=firp-plus", "predictor.layer=2", "predictor.steps=3", *SETTINGS]
    overrides += [f"teacher.model={teacher_folder}", "training.coupling.epochs=2", "training.vocabulary=50"]
    result = train(Recipe(), [*overrides], store=store_folder, output=tmp_path / "run")
    assert result.training["first_stage"]["steps"] > 0 and not result.stopped
    assert result.gate is not None and result.gate["agree"] and result.gate["prompts"] == 2
    assert load_predictor(tmp_path / "run", tiny_teacher("llama")).kind == "firp_plus"
    with pytest.raises(UsageError, match="add --resume"):
        train(Recipe(), [*overrides], store=store_folder, output=tmp_path / "run")


@pytest.mark.parametrize("name", ["mlp", pytest.param("recurrent-zero3", marks=pytest.mark.nightly)])
def test_two_ranks_equal_one_rank_with_doubled_accumulation(ranks: RankPool, tmp_path: Path, name: str) -> None:
    codes = ranks.run([str(tmp_path / "two"), name], 2, tmp_path / "log", script=Path(__file__))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    described, training = TWO_RANKS[name]
    run(tmp_path / "one", wanted(described, **training, gradient_accumulation=2))
    for stage in ("coupling", "."):
        one, two = (rows(tmp_path / side / stage) for side in ("one", "two"))
        assert len(one) == len(two) >= 3
        for expected, got in zip(one, two, strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=5e-4), stage
            assert got["expected_accepted_length"] == pytest.approx(expected["expected_accepted_length"], abs=0.05)


def worker(folder: str, name: str) -> None:
    """Run on each launched rank."""
    with relayed_errors():
        described, training = TWO_RANKS[name]
        run(Path(folder), wanted(described, **training))


if __name__ == "__main__":
    worker(*sys.argv[1:])
