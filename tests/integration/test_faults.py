"""Kills, full disks, interrupted renames, damage, second processes: finished work is neither lost nor changed.

Every test compares the disk before and after; all run the command in separate processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from firp_cli.errors import StoreError
from firp_cli.files import lock_folder
from firp_cli.store.reader import Store
from firp_cli.training import checkpoint as checkpoints
from helpers.chat import byte_tokenizer
from helpers.collecting import make_teacher
from helpers.faults import KILLED, check_store, collecting, make_place, shard_bytes
from helpers.rank_pool import RankPool
from helpers.training import rows

KILLS = [5, pytest.param(20, marks=pytest.mark.nightly)]  # random kills
# First rename at which a run is killed, every how many, and 1 for a kill after it instead of before it. The normal run
# kills before every odd rename and after every even one, the nightly run also the other way round.
RENAMES = [(1, 2, 0), (2, 2, 1), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((2, 2, 0), (1, 2, 1)))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"), 160)


def training(place: Path, output: Path) -> list[str]:
    settings = ["micro_batch_size=4", "anchors_per_sequence=8", "epochs=2", "validate_every=6", "save_every=3"]
    settings += ["validation_fraction=0.1", "gate_prompts=0", "learning_rate=5e-3"]
    predictor = ["predictor.kind=firp", "predictor.layer=2", "predictor.steps=2", f"teacher.model={place / 'teacher'}"]
    folders = ["--store", str(place / "store"), "--output", str(output), "--no-verify"]
    return ["train", *predictor, *(f"training.{setting}" for setting in settings), *folders]


@pytest.fixture(scope="module")
def whole_store(ranks: RankPool, place: Path) -> Path:
    """A store that one rank collected without interruption."""
    assert ranks.run(collecting(place, place / "store"), 1, place / "log") == [0], (place / "log").read_text()
    return place / "store"


@pytest.mark.parametrize("number", KILLS)
def test_collect_survives_kills_of_ranks(
    ranks: RankPool, place: Path, whole_store: Path, tmp_path: Path, number: int
) -> None:
    reference = shard_bytes(whole_store)
    assert len(reference) >= 10
    began = time.monotonic()
    assert ranks.run(collecting(place, tmp_path / "two"), 2, tmp_path / "log") == [0, 0]
    usual = time.monotonic() - began
    assert shard_bytes(tmp_path / "two") == reference
    chance, folder, kept = random.Random(6), tmp_path / "store", 0
    kills = middles = 0
    while kills < number or middles < 3:  # some kills must come while files are written, not only before and after
        count = chance.choice([2, 2, 3])
        wanted = chance.choice([0, min(kept + chance.randint(1, 6), len(reference))])
        group = ranks.start([*collecting(place, folder), "--resume"], count, tmp_path / "log")
        codes = group.wait_unless_killed(  # by the clock, or when so many shards exist
            chance.randrange(count),
            0.0 if wanted else chance.uniform(0.0, 1.1) * usual,
            lambda wanted=wanted: len(list(folder.glob("shard-*.safetensors"))) >= wanted,
        )
        if KILLED in codes:
            kills += 1
            assert kills < 50, "no kill came while files were written"
            now = check_store(folder, reference)
            assert now >= kept  # no shard is lost
            middles += 0 < now < len(reference)
            kept = now
        else:
            assert codes == [0] * count, (tmp_path / "log").read_text()[-2000:]
            assert shard_bytes(folder) == reference
            shutil.rmtree(folder)
            kept = 0
    assert ranks.run([*collecting(place, folder), "--resume"], chance.choice([1, 2, 3]), tmp_path / "log") in (
        [0],
        [0, 0],
        [0, 0, 0],
    )
    assert shard_bytes(folder) == reference
    assert len(Store.open(folder, verify=True)) == 160
    assert {path.name for path in folder.iterdir()} == {
        *reference,
        "manifest.json",
        "provenance.json",
        ".lock",
    }, "no temporary file and no sidecar remains"


def check_run(output: Path, reference: list[dict[str, Any]]) -> int:
    """Check what a kill leaves: whole checkpoints, rows of an uninterrupted run. Returns the last checkpoint's step."""
    newest = checkpoints.latest_checkpoint(output)
    for folder in output.glob("checkpoints/step-*"):
        if (folder / "state.json").is_file():
            saved = json.loads((folder / "state.json").read_text())
            for name, digest in saved["parameters"].items():
                assert checkpoints.file_sha256(folder / f"{name}.safetensors") == digest
    for path in output.glob("checkpoints/best-*.safetensors"):
        assert load_file(path)
    assert not (output / "config.json").is_file() or load_file(output / "predictor.safetensors")
    if (output / "metrics.jsonl").is_file():
        whole = [line for line in (output / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]
        losses = [json.loads(line)["loss"] for line in whole]
        assert losses == [row["loss"] for row in reference[: len(losses)]]
    return int(newest.name.removeprefix("step-")) if newest else 0


def rows_written(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize("number", KILLS)
def test_train_survives_kills_of_ranks(
    ranks: RankPool, place: Path, whole_store: Path, tmp_path: Path, number: int
) -> None:
    began = time.monotonic()
    assert ranks.run(training(place, tmp_path / "whole"), 2, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    usual = time.monotonic() - began
    reference = rows(tmp_path / "whole")
    predictor = (tmp_path / "whole" / "predictor.safetensors").read_bytes()
    assert len(reference) > 30
    chance, output, step = random.Random(6), tmp_path / "run", 0
    kills = middles = 0
    while kills < number or middles < 3:  # some kills must come while files are written, not only before and after
        wanted = chance.choice([0, chance.randint(min(step + 1, len(reference)), len(reference))])
        group = ranks.start([*training(place, output), "--resume"], 2, tmp_path / "log")
        codes = group.wait_unless_killed(  # by the clock, or when so many rows are written
            chance.randrange(2),
            chance.uniform(0.0, 0.05 if wanted else 1.0) * usual,
            lambda wanted=wanted: rows_written(output) >= wanted,
        )
        if KILLED in codes:
            kills += 1
            assert kills < 50, "no kill came while files were written"
            now = check_run(output, reference)
            assert now >= step
            middles += now > step
            step = now
        else:
            assert codes == [0, 0], (tmp_path / "log").read_text()[-2000:]
            assert rows(output) == reference  # bit for bit
            assert (output / "predictor.safetensors").read_bytes() == predictor
            shutil.rmtree(output)
            step = 0
    assert ranks.run([*training(place, output), "--resume"], 2, tmp_path / "log") == [0, 0]
    assert rows(output) == reference
    assert (output / "predictor.safetensors").read_bytes() == predictor


def few(arguments: list[str]) -> list[str]:
    """The same collect over a few conversations."""
    return [*arguments, "--limit", "36"]


@pytest.fixture(scope="module")
def few_shards(ranks: RankPool, place: Path) -> dict[str, bytes]:
    assert ranks.run(few(collecting(place, place / "few")), 1, place / "log") == [0]
    found = shard_bytes(place / "few")
    assert 3 <= len(found) <= 8
    return found


@pytest.mark.parametrize(("first", "every", "renamed"), RENAMES)
def test_collect_survives_a_kill_at_every_rename(
    ranks: RankPool,
    place: Path,
    few_shards: dict[str, bytes],
    tmp_path: Path,
    first: int,
    every: int,
    renamed: int,
) -> None:
    arguments = few(collecting(place, tmp_path / "store"))
    for number in range(first, 100, every):
        codes = ranks.run(arguments, 1, tmp_path / "log", renames=number, renamed=renamed)
        if codes == [0]:
            break
        assert codes == [KILLED], (tmp_path / "log").read_text()
        there = check_store(tmp_path / "store", few_shards)
        assert ranks.run([*arguments, "--resume"], 1, tmp_path / "log") == [0]
        assert check_store(tmp_path / "store", few_shards) == len(few_shards) >= there
        assert shard_bytes(tmp_path / "store") == few_shards
        assert not list((tmp_path / "store").glob("*.tmp")) + list((tmp_path / "store").glob(".*.tmp"))
        shutil.rmtree(tmp_path / "store")
    assert number > len(few_shards) + 2  # provenance, manifests, shards and sidecars


@pytest.fixture(scope="module")
def trained(ranks: RankPool, place: Path, few_shards: dict[str, bytes]) -> Path:
    """An uninterrupted run on the few shards."""
    assert ranks.run(training_few(place, place / "trained"), 1, place / "log") == [0], (place / "log").read_text()
    return place / "trained"


def training_few(place: Path, output: Path) -> list[str]:
    arguments = [str(place / "few") if item == str(place / "store") else item for item in training(place, output)]
    return [*arguments, "training.save_every=2", "training.max_steps=5", "training.validate_every=4"]


def config_of(run: Path) -> dict[str, Any]:
    """Return a predictor's config, its teacher's path resolved: it is relative to the predictor's folder."""
    config = json.loads((run / "config.json").read_text())
    config["teacher"]["path"] = str((run / config["teacher"]["path"]).resolve())
    return config


@pytest.mark.parametrize(("first", "every", "renamed"), RENAMES)
def test_train_survives_a_kill_at_every_rename(
    ranks: RankPool, place: Path, trained: Path, tmp_path: Path, first: int, every: int, renamed: int
) -> None:
    reference = rows(trained)
    for number in range(first, 100, every):
        codes = ranks.run(training_few(place, tmp_path / "run"), 1, tmp_path / "log", renames=number, renamed=renamed)
        if codes == [0]:
            break
        assert codes == [KILLED], (tmp_path / "log").read_text()
        check_run(tmp_path / "run", reference)
        assert ranks.run([*training_few(place, tmp_path / "run"), "--resume"], 1, tmp_path / "log") == [0]
        assert rows(tmp_path / "run") == reference
        assert (tmp_path / "run/predictor.safetensors").read_bytes() == (trained / "predictor.safetensors").read_bytes()
        assert config_of(tmp_path / "run") == config_of(trained)
        shutil.rmtree(tmp_path / "run")
    assert number > 12


def test_collect_keeps_shards_on_a_full_disk(
    ranks: RankPool, place: Path, few_shards: dict[str, bytes], tmp_path: Path
) -> None:
    sizes = sorted(map(len, few_shards.values()))
    arguments = few(collecting(place, tmp_path / "store"))
    assert ranks.run(arguments, 1, tmp_path / "log", file_bytes=sizes[-1] - 1) == [1]
    printed = (tmp_path / "log").read_text()
    assert (
        "File too large" in printed and "make room" in printed and "--resume" in printed and "Traceback" not in printed
    )
    before = check_store(tmp_path / "store", few_shards)
    assert before < len(few_shards) and not list((tmp_path / "store").glob(".*.tmp"))
    assert ranks.run([*arguments, "--resume"], 1, tmp_path / "log") == [0]
    assert shard_bytes(tmp_path / "store") == few_shards


def test_train_keeps_the_last_checkpoint_on_a_full_disk(
    ranks: RankPool, place: Path, trained: Path, tmp_path: Path
) -> None:
    reference, output = rows(trained), tmp_path / "run"
    whole = sorted(path.stat().st_size for path in trained.glob("checkpoints/step-*/*.safetensors"))
    metrics = (trained / "metrics.jsonl").stat().st_size
    for limit in (whole[-1] - 1, whole[-1] + 1, metrics - 1):
        codes = ranks.run(training_few(place, output), 1, tmp_path / "log", file_bytes=limit)
        if codes != [0]:
            printed = (tmp_path / "log").read_text()
            assert codes == [1] and "make room" in printed and "Traceback" not in printed
            check_run(output, reference)
            assert not list(output.glob("checkpoints/saving-*"))
            assert ranks.run([*training_few(place, output), "--resume"], 1, tmp_path / "log") == [0]
        assert rows(output) == reference
        shutil.rmtree(output)
        (tmp_path / "log").unlink()


def test_collect_rebuilds_only_damaged_shards(
    ranks: RankPool, place: Path, few_shards: dict[str, bytes], tmp_path: Path
) -> None:
    folder, names = tmp_path / "store", sorted(few_shards)
    shutil.copytree(place / "few", folder)
    for damage in ("flip", "cut"):
        path = folder / names[1]
        content = bytearray(few_shards[names[1]])
        content[len(content) // 2] ^= 4
        path.write_bytes(content if damage == "flip" else content[:-7])
        untouched = {name: (folder / name).stat().st_mtime_ns for name in names if name != names[1]}
        with pytest.raises(StoreError, match=names[1]):
            Store.open(folder, verify=True)
        arguments = [item for item in training_few(place, tmp_path / "run") if item != "--no-verify"]
        arguments = [str(folder) if item == str(place / "few") else item for item in arguments]
        assert ranks.run(arguments, 1, tmp_path / "log") == [1]
        assert names[1] in (tmp_path / "log").read_text() and not (tmp_path / "run" / "config.json").exists()
        assert ranks.run([*few(collecting(place, folder)), "--resume"], 2, tmp_path / "log") == [0, 0]
        assert shard_bytes(folder) == few_shards
        assert untouched == {name: (folder / name).stat().st_mtime_ns for name in untouched}


def test_collect_writes_no_shard_with_nan(
    ranks: RankPool, place: Path, few_shards: dict[str, bytes], tmp_path: Path
) -> None:
    broken = make_teacher()
    tokenizer = byte_tokenizer()
    rare = tokenizer.encode("Z")[-1]
    broken.model.get_input_embeddings().weight.data[rare] = float("nan")
    broken.model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    lines = (place / "sums.jsonl").read_text().splitlines()[:36]
    lines[30] = lines[30].replace("It is", "It iZ")
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    for count in (1, 2):
        assert set(ranks.run(collecting(tmp_path, tmp_path / "store"), count, tmp_path / "log")) != {0}
        printed = (tmp_path / "log").read_text()
        assert "NaN or infinity" in printed and "conversation 30" in printed and "Traceback" not in printed
        manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
        assert not manifest["complete"]
        assert all(not shard["first"] <= 30 < shard["next"] for shard in manifest["shards"])
        assert not list((tmp_path / "store").glob(".*.tmp"))
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "log").unlink()


def test_second_process_on_a_folder_is_refused(
    ranks: RankPool, place: Path, few_shards: dict[str, bytes], trained: Path, tmp_path: Path
) -> None:
    for made, arguments, inside in (
        (place / "few", few(collecting(place, tmp_path / "few")), ""),
        (trained, training_few(place, tmp_path / "trained"), "checkpoints"),
    ):
        folder = tmp_path / made.name
        shutil.copytree(made, folder)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
        with lock_folder(folder / inside):
            assert set(ranks.run([*arguments, "--resume"], 1, tmp_path / "log")) <= {1, 2}
        printed = (tmp_path / "log").read_text()
        assert "is writing" in printed and f"process {os.getpid()}" in printed and "--output" in printed
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
        assert ranks.run([*arguments, "--resume"], 1, tmp_path / "log") == [0]
        (tmp_path / "log").unlink()
