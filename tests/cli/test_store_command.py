"""`firp store` in this process: output, JSON, exit codes and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from firp_cli.cli.app import main
from firp_cli.collecting.collect_store import collect_store
from firp_cli.config import DataConfig
from firp_cli.files import file_sha256
from firp_cli.store import shard_file as store_file
from firp_cli.store.reader import Store
from helpers.models import embedded_teacher
from helpers.stores import FINGERPRINTS, LENGTHS, fill, shard, writer

Firp = Callable[..., SimpleNamespace]


@pytest.fixture
def firp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Firp:
    """Runs `firp store` in this process through the program's entry point."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["firp", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    fill(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the embedded teacher."""
    folder = tmp_path_factory.mktemp("collected") / "store"
    collect_store(embedded_teacher(), DataConfig(dataset="arithmetic", limit=6), [3], folder)
    return folder


def tamper(folder: Path, name: str, row: int, value: float) -> None:
    """Put a value into a shard as if the teacher had made it: checksum and manifest agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][0]
    tensors = load_file(folder / entry["file"])
    tensors[name][row] = value
    save_file(tensors, folder / entry["file"])
    entry |= {"sha256": file_sha256(folder / entry["file"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_store_info(firp: Firp, made: Path) -> None:
    shown = firp("info", made)
    assert shown.code == 0 and shown.err == ""
    assert f"{made}, complete" in shown.out and "layers 1, 3 and the final state, 8 wide, float32" in shown.out
    assert "shortest 2, median 4, p90 7, longest 9 tokens, 5.0 on average" in shown.out
    found = json.loads(firp("info", made, "--json").out)
    assert (found["conversations"], found["tokens"], found["shards"]) == (len(LENGTHS), sum(LENGTHS), 4)
    assert found["bytes"] == sum(path.stat().st_size for path in made.glob("shard-*"))
    assert found["fingerprints"] == FINGERPRINTS and sum(found["lengths"]["histogram"].values()) == len(LENGTHS)
    (made / "shard-00002.safetensors").unlink()
    shown = firp("info", made)
    assert shown.code == 0 and "not complete" in shown.out and "shard-00002.safetensors: missing" in shown.out


def test_store_verify_names_every_fault_and_exits_with_1(firp: Firp, made: Path) -> None:
    sound = firp("verify", made)
    assert sound.code == 0 and f"{made}: sound, 4 shards" in sound.out
    tamper(made, "hidden.3", 6, float("nan"))
    flipped = made / "shard-00003.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 16
    flipped.write_bytes(data)
    faulty = firp("verify", made)
    assert faulty.code == 1
    assert faulty.out.splitlines() == [
        "shard-00000.safetensors: NaN or infinity in hidden.3, token 1 of conversation 1",
        "shard-00003.safetensors: its checksum differs",
    ]
    assert faulty.err.splitlines() == [
        "firp: delete the file and run the same `firp collect` with --resume",
        "firp: run the same `firp collect` with --resume: it rebuilds just that shard",
    ]
    told = firp("verify", made, "--json")
    found = json.loads(told.out)
    assert told.code == 1 and not found["sound"] and found["tokens"] == sum(LENGTHS)
    assert [fault["file"] for fault in found["faults"]] == ["shard-00000.safetensors", "shard-00003.safetensors"]


def test_store_verify_compares_the_teacher(firp: Firp, made: Path, collected: Path) -> None:
    own = firp("verify", collected, "--teacher", "arithmetic")
    assert own.code == 0 and own.out.endswith("made by arithmetic\n")
    other = firp("verify", collected, "--teacher", "arithmetic-looped")
    assert other.code == 1 and len(other.out.splitlines()) == 1
    assert other.out.startswith("manifest.json: made with another teacher (store: ")
    assert len(firp("verify", made, "--teacher", "arithmetic").out.splitlines()) == 3


def test_store_convert_split_and_merge(firp: Firp, collected: Path, tmp_path: Path) -> None:
    small, parts, merged = tmp_path / "small", tmp_path / "parts", tmp_path / "merged"
    converted = json.loads(firp("convert", collected, "--dtype", "int8", "--output", small, "--json").out)
    whole = json.loads(firp("info", collected, "--json").out)
    assert converted["dtype"] == "int8" and converted["tokens"] == whole["tokens"]
    assert 0.2 * whole["bytes"] < converted["bytes"] < 0.27 * whole["bytes"]
    assert converted["shards"] == converted["shards_written"] > 0
    dealt = firp("split", small, "--parts", "3", "--seed", 4, "--output", parts)
    assert [f"part-{number}: 2 conversations" in line for number, line in enumerate(dealt.out.splitlines())] == [
        True
    ] * 3
    named = firp("split", small, "--parts", "4,2", "--output", tmp_path / "a", "--output", tmp_path / "b", "--json")
    assert [summary["conversations"] for summary in json.loads(named.out)] == [4, 2]
    done = firp("merge", *sorted(parts.iterdir()), "--output", merged, "--layers", "none")
    assert done.code == 0 and f"{merged}: 6 conversations" in done.out and "layers none and the final state" in done.out
    texts = [sorted(tuple(item.input_ids.tolist()) for item in Store.open(folder)) for folder in (merged, collected)]
    assert texts[0] == texts[1]
    assert firp("verify", merged, "--teacher", "arithmetic").code == 0
    again = firp("merge", *sorted(parts.iterdir()), "--output", merged, "--layers", "none", "--resume")
    assert again.code == 0 and "nothing was missing" in again.out


BAD: list[tuple[list[str], str]] = [
    (["info", "nothing"], "no store in nothing; make one: firp collect"),
    (["verify", "nothing"], "no store in nothing"),
    (["verify", "made", "--teacher", "./other"], "./other"),
    (["convert", "made", "--dtype", "bf16", "--output", "new"], "unknown dtype 'bf16'; did you mean 'bfloat16'?"),
    (["convert", "made", "--dtype", "fp64", "--output", "new"], "known: float32, bfloat16, float16, int8, float8"),
    (["convert", "made", "--output", "new"], "give --dtype or --layers"),
    (["convert", "made", "--layers", "1,x", "--output", "new"], "--layers takes numbers"),
    (["convert", "made", "--layers", "2", "--output", "new"], "holds layers [1, 3], not [2]"),
    (["convert", "made", "--dtype", "int8", "--output", "other"], "other already holds a complete store"),
    (["convert", "made", "--dtype", "int8", "--output", "made"], "made already holds a complete store"),
    (["convert", "unfinished", "--dtype", "int8", "--output", "new"], "is unfinished (1 of 4 shards)"),
    (["convert", "damaged", "--dtype", "int8", "--output", "new"], "is damaged: shard-00002.safetensors (missing)"),
    (["merge", "made", "stranger", "--output", "new"], "another teacher (made: t1, stranger: t2)"),
    (["merge", "made", "small", "--output", "new"], "firp store convert small --dtype float32 --output small-float32"),
    (["merge", "made", "--output", "new"], "two or more different stores"),
    (["merge", "made", "made", "--output", "new"], "two or more different stores"),
    (["split", "made", "--parts", "half", "--output", "new"], "got 'half'"),
    (["split", "made", "--parts", "nan,1", "--output", "new"], "got 'nan,1'"),
    (["split", "made", "--parts", "1", "--output", "new"], "one number is the count of equal parts"),
    (["split", "made", "--parts", "7", "--output", "new"], "one of them is empty"),
    (["split", "made", "--parts", "0.5,0.6", "--output", "new"], "sum to 1.1"),
    (["split", "made", "--parts", "3", "--output", "new", "--output", "new2"], "3 parts and 2 outputs"),
    (["split", "made", "--parts", "2", "--output", "other"], "other is a store itself"),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores that do not go together."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("made", "other", "damaged"):
        fill(folder / name)
    (folder / "damaged" / "shard-00002.safetensors").unlink()
    fill(folder / "small", "int8")
    for name, marks, count in (("stranger", FINGERPRINTS | {"teacher": "t2"}, 4), ("unfinished", FINGERPRINTS, 1)):
        with writer(folder / name, fingerprints=marks) as store:
            for plan in store.plan(LENGTHS, {})[:count]:
                store.write(plan, shard(plan, "float32"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_store_bad_input_exits_with_2_and_a_remedy(
    firp: Firp, stores: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(stores)
    before = sorted(stores.rglob("*"))
    refused = firp(*arguments)
    assert refused.code == 2 and words in refused.err and refused.out == ""
    assert refused.err.startswith("firp: ") and len(refused.err.splitlines()) <= 2
    assert sorted(stores.rglob("*")) == before


def test_store_convert_of_a_damaged_store_exits_with_2(firp: Firp, made: Path, tmp_path: Path) -> None:
    victim = made / "shard-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    refused = firp("convert", made, "--dtype", "int8", "--output", tmp_path / "new")
    assert refused.code == 2 and "shard-00001.safetensors (its checksum differs)" in refused.err
    assert firp("info", tmp_path / "new").out.count("not complete") == 1
    assert firp("convert", tmp_path / "new", "--dtype", "float32", "--output", tmp_path / "newer").code == 2


def test_store_convert_checks_the_disk_first(firp: Firp, made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(store_file, "free_bytes", lambda _: 100)
    refused = firp("convert", made, "--dtype", "int8", "--output", tmp_path / "new")
    assert refused.code == 2 and "100 B free\nmake room" in refused.err
    assert not (tmp_path / "new").exists()


def test_store_convert_names_the_conversation_that_overflows_float16(firp: Firp, made: Path, tmp_path: Path) -> None:
    tamper(made, "hidden.final", 5, 1e6)
    assert torch.isfinite(Store.open(made)[1].final).all() and firp("verify", made).code == 0
    refused = firp("convert", made, "--dtype", "float16", "--output", tmp_path / "new")
    assert refused.code == 1 and "hidden.final, token 0 of conversation 1" in refused.err
