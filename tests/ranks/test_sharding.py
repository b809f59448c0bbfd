"""Teachers sharded over ranks (gloo): states, stores and losses of the whole teacher, a part of its memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firp_cli.api.loading import teacher_line
from firp_cli.config import TeacherConfig
from firp_cli.distributed.sharding import load_for_ranks
from firp_cli.errors import RecipeError
from firp_cli.recipe import load_recipe
from helpers.chat import byte_tokenizer
from helpers.collecting import make_teacher
from helpers.faults import KILLED, shard_bytes
from helpers.rank_pool import RankPool
from helpers.training import losses

SHARED = ["teacher.sharding=zero3"]


@pytest.fixture(scope="module")
def place(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher in several files, a data set, and a store that one rank collected."""
    folder = tmp_path_factory.mktemp("sharding")
    make_teacher(hidden_size=64, intermediate_size=160).model.save_pretrained(
        folder / "teacher", max_shard_size="200KB"
    )
    byte_tokenizer().save_pretrained(folder / "teacher")
    lines = [{"question": f"What is {n} + {n * 7}?", "answer": f"It is {n * 8}. " * (1 + n % 7)} for n in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ranks.run(collecting(folder, folder / "store"), 1, folder / "log") == [0], (folder / "log").read_text()
    return folder


def collecting(place: Path, output: Path, *more: str) -> list[str]:
    settings = ["data.shard_tokens=700", "data.pack_tokens=200", f"teacher.model={place / 'teacher'}", *more]
    return ["collect", *settings, "--dataset", str(place / "sums.jsonl"), "--layers", "1", "--output", str(output)]


def training(place: Path, output: Path, *more: str) -> list[str]:
    settings = ["micro_batch_size=3", "anchors_per_sequence=6", "max_steps=4", "validate_every=2", "save_every=2"]
    settings += ["validation_fraction=0.1", "gate_prompts=1", "learning_rate=5e-3"]
    folders = [f"teacher.model={place / 'teacher'}", "--store", str(place / "store"), "--output", str(output)]
    return ["train", *(f"training.{setting}" for setting in settings), *folders, "--no-verify", *more]


def check_share(memory: dict[str, Any], count: int, unshared: int) -> None:
    """Each rank holds its share of the bytes that it would hold alone, and what is too small to cut up."""
    assert memory["kind"] == "zero3" and memory["ranks"] == count
    assert unshared / count <= memory["bytes"] <= 1.05 * unshared / count


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_sharded_store_equals_that_of_the_whole_teacher(ranks: RankPool, place: Path, tmp_path: Path, count: int):
    codes = ranks.run(collecting(place, tmp_path / "store", *SHARED), count, tmp_path / "log")
    assert codes == [0] * count, (tmp_path / "log").read_text()
    names = sorted(path.name for path in (place / "store").glob("shard-*"))
    for name in names:
        mine, whole = load_file(tmp_path / "store" / name), load_file(place / "store" / name)
        assert mine.keys() == whole.keys()
        for key, values in whole.items():  # lean layers round otherwise than the library's
            torch.testing.assert_close(mine[key], values, rtol=1e-4, atol=1e-4)
    run = json.loads((tmp_path / "store" / "provenance.json").read_text())["runs"][-1]
    alone = json.loads((place / "store" / "provenance.json").read_text())["runs"][-1]
    check_share(run["teacher_memory"], count, alone["teacher_memory"]["bytes"])
    assert len(set(run["rank_tokens"])) == count  # ranks that were done ran along with the others
    assert f"shared over {count} ranks" in (tmp_path / "log").read_text()


def test_sharded_collect_resumes_to_the_same_bytes(ranks: RankPool, place: Path, tmp_path: Path):
    folder, log = tmp_path / "store", tmp_path / "log"
    command = [*collecting(place, folder, *SHARED, "data.shard_tokens=120"), "--resume"]
    assert ranks.run(command, 2, log) == [0, 0], log.read_text()
    reference = shard_bytes(folder)
    assert len(reference) > 12
    for victim in (0, 1):
        for name in list(reference)[2:]:
            (folder / name).unlink()
        codes = ranks.start(command, 2, log).wait_unless_killed(victim, 0.0, lambda: len(shard_bytes(folder)) > 4)
        assert codes[victim] == KILLED and codes[1 - victim] not in (0, KILLED), log.read_text()
        assert 4 < len(shard_bytes(folder)) < len(reference) and shard_bytes(folder).items() < reference.items()
        assert ranks.run(command, 2, log) == [0, 0], log.read_text()
        assert shard_bytes(folder) == reference


PREDICTORS = {
    "hidden_transfer": ["predictor.layers=[1, 2, 2]"],  # the ridge start runs the layer between them
    "firp": ["predictor.layer=1", "predictor.steps=2", "training.zero_stage=3"],
    "medusa": ["predictor.steps=2", "training.init=identity"],  # its heads start as the teacher's
}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("firp", 2),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (("hidden_transfer", 3), ("medusa", 2))),
    ],
)
def test_sharded_losses_equal_those_of_the_whole_teacher(
    ranks: RankPool, place: Path, tmp_path: Path, kind: str, count: int
):
    settings = [f"predictor.kind={kind}", *PREDICTORS[kind]]
    log = tmp_path / "log"
    assert ranks.run(training(place, tmp_path / "whole", *settings), count, log) == [0] * count, log.read_text()
    command = training(place, tmp_path / "shared", *settings, *SHARED)
    assert ranks.run(command, count, log) == [0] * count, log.read_text()
    assert losses(tmp_path / "shared") == losses(tmp_path / "whole")
    record, whole = (json.loads((tmp_path / run / "training.json").read_text()) for run in ("shared", "whole"))
    assert whole["teacher_memory"]["layers"] == record["teacher_memory"]["layers"] == (0 if kind == "medusa" else 3)
    check_share(record["teacher_memory"], count, whole["teacher_memory"]["bytes"])
    assert record["gate"]["agree"] and record["gate"]["real"] == whole["gate"]["real"]

    if kind == "firp":  # once more from the checkpoint in the middle
        expected, checkpoints = losses(tmp_path / "shared"), tmp_path / "shared" / "checkpoints"
        assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-2", "step-4"]
        shutil.rmtree(checkpoints / "step-4")
        (checkpoints / "latest").write_text("step-2")
        assert ranks.run([*command, "--resume"], count, log) == [0] * count, log.read_text()
        assert "resuming after step 2 of 4" in log.read_text() and losses(tmp_path / "shared") == expected


def test_sharding_on_one_rank_has_a_note():
    teacher = load_for_ranks(TeacherConfig(sharding="zero3"), 2)
    assert teacher.first == 2 and teacher.peers is None
    assert (
        "has no effect on one rank" in teacher_line(teacher.loaded_weights) and "--gpus" in teacher.loaded_weights.note
    )


def test_teacher_that_cannot_be_sharded_is_refused_by_all_ranks(ranks: RankPool, place: Path, tmp_path: Path):
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    for path in (tmp_path / "teacher").glob("model*"):
        path.unlink()
    command = collecting(place, tmp_path / "store", *SHARED, f"teacher.model={tmp_path / 'teacher'}")
    codes = ranks.run(command, 2, tmp_path / "log")
    assert 2 in codes and set(codes) <= {
        2,
        -15,
    }  # a rank that is asked to end after the other failed may exit by SIGTERM
    log = (tmp_path / "log").read_text()
    assert "cannot be sharded over ranks: " in log and "no safetensors weights" in log and "device_map=auto" in log
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.device_map=auto"], "remove one of them"),
        (["teacher.looped={block: 2, loops: 2}"], "remove teacher.sharding"),
        (["data.mode=online"], "set data.mode=cached"),
        (["data.regenerate=true"], "set collect.responder=vllm"),
    ],
)
def test_sharding_refuses_settings_that_do_not_fit(overrides: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as found:
        load_recipe("demo", [*SHARED, *overrides])
    assert len(str(found.value)) < 260
