"""kill -9 of one rank at random moments, in collect and in train: nothing that was finished is lost or changed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, nursery
from safetensors.torch import load_file
from test_collect import byte_tokenizer, make_teacher
from test_training import rows

from firp_cli.data.store import Store
from firp_cli.errors import StoreError
from firp_cli.training import checkpoint as checkpoints

KILLS = 20
KILLED = -9


@pytest.fixture(scope="module")
def ranks() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a data set."""
    folder = tmp_path_factory.mktemp("faults")
    make_teacher().model.save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    lines = [{"question": f"What is {n} + {n * 7}?", "answer": f"It is {n * 8}. " * (1 + n % 7)} for n in range(160)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def collecting(place: Path, output: Path) -> list[str]:
    settings = ["data.shard_tokens=700", "data.pack_tokens=200", f"teacher.model={place / 'teacher'}"]
    return ["collect", *settings, "--dataset", str(place / "sums.jsonl"), "--layers", "2", "--output", str(output)]


def training(place: Path, output: Path) -> list[str]:
    settings = ["micro_batch_size=4", "anchors_per_sequence=8", "epochs=2", "validate_every=6", "save_every=3"]
    settings += ["validation_fraction=0.1", "gate_prompts=0", "learning_rate=5e-3"]
    predictor = ["predictor.kind=firp", "predictor.layer=2", "predictor.steps=2", f"teacher.model={place / 'teacher'}"]
    folders = ["--store", str(place / "store"), "--output", str(output), "--no-verify"]
    return ["train", *predictor, *(f"training.{setting}" for setting in settings), *folders]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.safetensors")}


def check_store(folder: Path, reference: dict[str, bytes]) -> int:
    """What a kill leaves: whole shards alone, and a manifest that says so. Returns how many are entered."""
    found = shard_bytes(folder)
    assert found.items() <= reference.items()
    if not (folder / "manifest.json").is_file():
        assert not found
        return 0
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert hashlib.sha256(found[shard["file"]]).hexdigest() == shard["sha256"]
    if not manifest["complete"]:
        with pytest.raises(StoreError, match="--resume"):
            Store.open(folder)
    return len(found)


def test_collect_loses_nothing_when_a_rank_is_killed(ranks: Nursery, place: Path, tmp_path: Path) -> None:
    assert ranks.run(collecting(place, place / "store"), 1, tmp_path / "log") == [0]
    reference = shard_bytes(place / "store")
    assert len(reference) >= 10
    began = time.monotonic()
    assert ranks.run(collecting(place, tmp_path / "two"), 2, tmp_path / "log") == [0, 0]
    usual = time.monotonic() - began
    assert shard_bytes(tmp_path / "two") == reference
    chance, folder, kept = random.Random(6), tmp_path / "store", 0
    kills = middles = 0
    while kills < KILLS:
        count = chance.choice([2, 2, 3])
        group = ranks.start([*collecting(place, folder), "--resume"], count, tmp_path / "log")
        codes = group.wait_unless_killed_after(chance.uniform(0.1, 1.1) * usual, chance.randrange(count))
        if KILLED in codes:
            kills += 1
            now = check_store(folder, reference)
            assert now >= kept  # no shard that was there is gone
            middles += 0 < now < len(reference)
            kept = now
        else:
            assert codes == [0] * count, (tmp_path / "log").read_text()[-2000:]
            assert shard_bytes(folder) == reference
            shutil.rmtree(folder)
            kept = 0
    assert middles >= 3  # the kills came while shards were written, not only before and after
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
    }, "no temporary file and no sidecar is left"


def check_run(output: Path, reference: list[dict[str, Any]]) -> int:
    """What a kill leaves: checkpoints that are whole, and rows that an uninterrupted run has too. Returns the step."""
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


def test_train_loses_nothing_when_a_rank_is_killed(ranks: Nursery, place: Path, tmp_path: Path) -> None:
    if not (place / "store").is_dir():
        assert ranks.run(collecting(place, place / "store"), 1, tmp_path / "log") == [0]
    began = time.monotonic()
    assert ranks.run(training(place, tmp_path / "whole"), 2, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    usual = time.monotonic() - began
    reference = rows(tmp_path / "whole")
    predictor = (tmp_path / "whole" / "predictor.safetensors").read_bytes()
    assert len(reference) > 30
    chance, output, step = random.Random(6), tmp_path / "run", 0
    kills = middles = 0
    while kills < KILLS:
        group = ranks.start([*training(place, output), "--resume"], 2, tmp_path / "log")
        codes = group.wait_unless_killed_after(chance.uniform(0.2, 1.0) * usual, chance.randrange(2))
        if KILLED in codes:
            kills += 1
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
    assert middles >= 3
    assert ranks.run([*training(place, output), "--resume"], 2, tmp_path / "log") == [0, 0]
    assert rows(output) == reference
    assert (output / "predictor.safetensors").read_bytes() == predictor
