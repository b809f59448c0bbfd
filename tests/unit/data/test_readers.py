"""Files and folders of every format, their splits and configurations, and what is refused at once."""

from __future__ import annotations

import csv
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from firp_cli.api.collect_run import default_store
from firp_cli.data import hub
from firp_cli.data.datasets import Selection, dataset_names, load_prompts, load_rows
from firp_cli.data.formats import Conversation
from firp_cli.errors import DatasetError

ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(5)]
NESTED = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "n"}]}]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything local is sought on the hub."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("sought on the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.delenv("FIRP_DATA_DIR", raising=False)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def asked(name: Path | str, split: str = "test", limit: int | None = None) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in load_prompts(str(name), None, limit, split)]


def make(folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows in a format, by suffix."""
    path = folder / f"rows{suffix}"
    table = pyarrow.Table.from_pylist(rows)
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress((lines(rows) if "jsonl" in suffix else json.dumps(rows)).encode()))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        datasets.Dataset(table).to_parquet(str(path))
    elif suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".arrow":
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    else:
        path.write_text(lines(rows))
    return path


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".arrow", ".ndjson"]
)
def test_files_are_read_by_suffix(suffix: str, tmp_path: Path) -> None:
    path = make(tmp_path, suffix)
    rows = load_rows(str(path), Selection(limit=4))
    assert [row.conversation.messages[1]["content"] for row in rows] == ["a0", "a1", "a2", "a3"]
    assert [row.row for row in rows] == ["row 1", "row 2", "row 3", "row 4"]
    assert default_store(str(path)) == "stores/rows"


def test_arrow_stream_and_null_fields_are_read(tmp_path: Path) -> None:
    path, table = tmp_path / "cache.arrow", pyarrow.Table.from_pylist(NESTED)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert load_rows(str(path), Selection())[0].conversation == Conversation(NESTED[0]["messages"])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_and_line_ends_are_read(suffix: str, tmp_path: Path) -> None:
    path = make(tmp_path, suffix)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert asked(path) == ["q0", "q1", "q2", "q3", "q4"]


def test_json_files_of_other_shapes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (json.dumps({"version": 1, "data": ROWS}), lines(ROWS)):
        path.write_text(text)
        assert len(asked(path)) == 5
    path.write_text(json.dumps({"question": "q"}))
    with pytest.raises(DatasetError, match="expected a list of objects, got dict"):
        asked(path)


def test_what_is_not_read_is_refused_with_the_formats(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello")
    (tmp_path / "plain").write_text("hello")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    for name in ("p.txt", "plain", "texts"):
        with pytest.raises(DatasetError, match=r"firp reads \.jsonl, .*convert it"):
            asked(tmp_path / name)
    for name in ("absent.jsonl.gz", "absent.parquet", "absent.txt", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(DatasetError, match=f"no such file: {name}"):
            asked(name)
    for suffix in (".jsonl.gz", ".parquet", ".arrow"):
        (tmp_path / f"broken{suffix}").write_bytes(b"\x00\x01broken")
        with pytest.raises(DatasetError, match="cannot be read"):
            asked(tmp_path / f"broken{suffix}")
    (tmp_path / "wide.jsonl").write_bytes('{"question": "q"}'.encode("utf-16"))
    with pytest.raises(DatasetError, match="UTF-16: save it as UTF-8"):
        asked(tmp_path / "wide.jsonl")


def test_saved_folders_are_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    assert len(asked(tmp_path / "one")) == len(asked(tmp_path / "splits", "train")) == 5
    with pytest.raises(DatasetError, match=r"splits has no split 'test'; it has: train\nname one with --split"):
        asked(tmp_path / "splits")


def test_folder_of_files_is_read_by_split(tmp_path: Path) -> None:
    for number in range(2):
        make(tmp_path, ".parquet").rename(tmp_path / f"train-0000{number}-of-00002.parquet")
    rows = load_rows(str(tmp_path), Selection())
    assert len(rows) == 10 and rows[5].row == "train-00001-of-00002.parquet row 1"
    with pytest.raises(DatasetError, match=r"no split 'test'; it has: train"):
        asked(tmp_path)
    (tmp_path / "test.jsonl").write_text(lines(ROWS[:1]) + "{broken\n")
    assert len(asked(tmp_path)) == 1


def test_configurations_of_a_folder_are_named(tmp_path: Path) -> None:
    for name, count in (("easy", 1), ("hard", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines(ROWS[:count]))
    head = [f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("easy", "hard")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(head)}---\n")
    assert len(asked(f"{tmp_path}:hard", "train")) == 2
    for name in (f"{tmp_path}", f"{tmp_path}:soft"):
        with pytest.raises(DatasetError, match=rf"configuration.*: easy, hard\nname one as {tmp_path}.*:easy"):
            asked(name, "train")
    assert len(asked(f"{tmp_path / 'hard'}", "train")) == 2
    (tmp_path / "README.md").unlink()
    assert len(asked(f"{tmp_path}:hard", "train")) == 2
    for name in (f"{tmp_path}", f"{tmp_path}:soft"):
        with pytest.raises(DatasetError, match=rf"configuration.*: easy, hard\nname one as {tmp_path}.*:easy"):
            asked(name, "train")
    with pytest.raises(DatasetError, match="is a file and has no configurations"):
        asked(f"{make(tmp_path, '.jsonl')}:easy")


def test_data_folder_may_hold_other_formats(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    make(tmp_path, ".parquet").rename(tmp_path / "gsm8k" / "test.parquet")
    assert len(load_prompts("gsm8k", str(tmp_path))) == 5


def test_missing_file_of_a_list_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, ".jsonl")
    assert len(load_prompts(f"arithmetic,{path}", limit=2)) == 4
    with pytest.raises(DatasetError, match=r"^no such file: d/own\.jsonl;"):
        load_prompts("arithmetic,d/own.jsonl")
    comma = path.rename(tmp_path / "a,b.jsonl")
    assert dataset_names(f"gsm8k,{comma}, mbpp") == ["gsm8k", str(comma), "mbpp"]


def test_one_file_under_two_names_is_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = make(tmp_path, ".jsonl")
    (tmp_path / "link.jsonl").symlink_to(path)
    other = tmp_path / "x" / ".." / path.name
    (tmp_path / "x").mkdir()
    assert dataset_names(f"{path},{other},~/rows.jsonl,{tmp_path}/link.jsonl,gsm8k,gsm8k") == [str(path), "gsm8k"]


@pytest.mark.parametrize(
    "names", [("train.jsonl", "train.csv"), ("train-00.jsonl", "train-01.csv"), ("a.parquet", "b.jsonl", "c.jsonl")]
)
def test_files_of_two_formats_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        make(tmp_path, Path(name).suffix).rename(tmp_path / name)
    with pytest.raises(DatasetError, match=rf"has both .*{names[1].replace('.jsonl', '')}"):
        asked(tmp_path, "train")
    if names[0] == "train.jsonl":
        with pytest.raises(DatasetError, match=r"has both train\.jsonl and train\.csv"):
            load_prompts(tmp_path.name, str(tmp_path.parent), split="train")


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for name in ("-", "/dev/stdin", "/dev/fd/63", str(tmp_path / "rows.jsonl")):
        with pytest.raises(DatasetError, match="a pipe can be read only once"):
            asked(name)


def test_hub_names_configurations_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[Any] = []

    def answer(*arguments: Any, **options: Any) -> Any:
        asked_for.append((*arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    load_prompts("someone/set:hard", limit=2)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    load_prompts("someone/set", limit=2)
    load_prompts("someone/set", selection=Selection("test", None, 2, sample=1))
    options = {"split": "test"}
    assert asked_for == [
        ("someone/set", {**options, "name": "hard"}),
        ("someone/set", {**options, "streaming": True}),
        ("someone/set", options),
    ]
    texts = {
        "Config name is missing.\nPlease pick one among: ['easy', 'hard']": "several configurations: easy",
        "BuilderConfig 'x' not found. Available: ['easy', 'hard']": "configuration.*: easy, hard",
        "Unknown split \"test\". Should be one of ['train'].": "no split 'test'; it has: train",
        "Bad split: test. Available splits: ['train']": "no split 'test'; it has: train",
    }
    for text, words in texts.items():

        def fail(*_: Any, text: str = text, **__: Any) -> Any:
            raise ValueError(text)

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DatasetError, match=words):
            load_prompts("someone/set")


def test_misspelt_set_is_answered_without_waiting_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, whose requests are tried again for half a minute where the hub cannot be reached."""
    monkeypatch.undo()
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(DatasetError, match=r"did you mean 'gsm8k'.*\(.*\): Couldn't reach"):
        load_prompts("gsm9k")
    assert time.monotonic() - began < 10 and datasets.config.HF_HUB_OFFLINE is False
