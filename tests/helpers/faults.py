"""Arguments of runs that are killed, and checks of the files that a kill leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from firp_cli.errors import StoreError
from firp_cli.store.reader import Store
from helpers.chat import byte_tokenizer
from helpers.collecting import make_teacher

KILLED = -9


def make_place(folder: Path, conversations: int) -> Path:
    """A folder with a teacher and a data set."""
    make_teacher().model.save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    lines = [
        {"question": f"What is {n} + {n * 7}?", "answer": f"It is {n * 8}. " * (1 + n % 7)}
        for n in range(conversations)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def collecting(place: Path, output: Path, dataset: Path | str | None = None) -> list[str]:
    dataset = dataset or place / "sums.jsonl"
    settings = ["data.shard_tokens=700", "data.pack_tokens=200", f"teacher.model={place / 'teacher'}"]
    return ["collect", *settings, "--dataset", str(dataset), "--layers", "2", "--output", str(output)]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.safetensors")}


def check_store(folder: Path, reference: dict[str, bytes]) -> int:
    """Check that only whole shards are left, and a manifest that lists no others. Returns the number of shards."""
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
