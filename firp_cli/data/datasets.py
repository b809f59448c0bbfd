"""Data sets by name: their sources, prompts and conversations.

The order of lookup is: a local .jsonl file, the embedded sets, `NAME/SPLIT.jsonl` in `--data-dir` (or FIRP_DATA_DIR),
then the hub or its cache through `datasets`. The first place that has the name is read, or refused if it lacks the
split; a data set or split is never replaced by another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from firp_cli.assets import embedded_folder, nearest
from firp_cli.data.formats import Conversation, Message, prompt_of, to_messages
from firp_cli.errors import DatasetError
from firp_cli.machine import hub_disabled

DATA_DIR_VARIABLE = "FIRP_DATA_DIR"
ID_FIELDS = ("id", "question_id", "task_id")


@dataclass(frozen=True)
class KnownDataset:
    """Source of a named set. `splits`: our split names to the hub's.

    A set with a single split serves prompts from it for any requested split; several splits are never exchanged.
    """

    hub: str | None
    splits: dict[str, str]
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    files: tuple[str, ...] = ()  # other local file names of the only split
    source: str = ""  # origin of a file that is not on the hub


KNOWN: dict[str, KnownDataset] = {
    "arithmetic": KnownDataset(None, {"train": "train", "test": "test"}),
    "chat": KnownDataset(None, {"train": "train", "test": "test"}),
    "gsm8k": KnownDataset("openai/gsm8k", {"train": "train", "test": "test"}, config="main"),
    "humaneval": KnownDataset("openai/openai_humaneval", {"test": "test"}),
    "mbpp": KnownDataset(
        "google-research-datasets/mbpp",
        {"train": "train", "validation": "validation", "test": "test"},
        config="full",
    ),
    "self_instruct": KnownDataset(
        None,
        {"train": "train"},
        source="seed_tasks.jsonl and user_oriented_instructions.jsonl of https://github.com/yizhongw/self-instruct",
    ),
    "mt_bench": KnownDataset("HuggingFaceH4/mt_bench_prompts", {"test": "train"}, files=("question",)),
    "spec_bench": KnownDataset(
        None,
        {"test": "question"},
        files=("question",),
        source="data/spec_bench/question.jsonl of https://github.com/hemingkx/Spec-Bench",
    ),
    "xsum": KnownDataset(
        "EdinburghNLP/xsum",
        {"train": "train", "validation": "validation", "test": "test"},
        revision="refs/convert/parquet",
    ),
    "cnn_dm": KnownDataset(
        "abisee/cnn_dailymail", {"train": "train", "validation": "validation", "test": "test"}, config="3.0.0"
    ),
    "alpaca": KnownDataset("tatsu-lab/alpaca", {"train": "train"}),
    "sharegpt": KnownDataset(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        {"train": "train"},
        data_files="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "ultrachat": KnownDataset("HuggingFaceH4/ultrachat_200k", {"train": "train_sft", "test": "test_sft"}),
}


@dataclass
class Prompt:
    """Conversation to answer, its category in the set, and the reference answer of its first turn if there is one.

    `row`: its row in the set, from 0; `id`: what the row calls itself, if it does.
    """

    conversation: Conversation
    category: str = ""
    reference: str | None = None
    row: int = 0
    id: Any = None

    @property
    def messages(self) -> list[Message]:
        """The messages before the first answer."""
        return self.conversation.turns()[0]


def load_records(
    name: str, split: str = "train", data_dir: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one split of one data set, at most `limit`.

    Raises DatasetError when the set or the split does not exist or a line is not a JSON object.
    """
    return _load(name, split, data_dir, limit, any_single=False)


def load_prompts(name: str, data_dir: str | None = None, limit: int | None = None, split: str = "test") -> list[Prompt]:
    """Return prompts for decoding, at most `limit` of each data set; `name` may list several sets with commas.

    Of multi-turn sets (MT-Bench, Spec-Bench) only the first turn is used. A known set with a single split serves that
    one. Raises DatasetError as `load_records` does.
    """
    prompts = []
    for dataset in dataset_names(name):
        for number, row in enumerate(_load(dataset, split, data_dir, limit, any_single=True), 1):
            messages = to_messages(row, f"{dataset} row {number}")
            prompt = prompt_of(messages)
            if not any(item["role"] == "user" for item in prompt):
                raise DatasetError(f"{dataset} row {number}: no user turn to answer")
            reference = messages[len(prompt)]["content"] if len(messages) > len(prompt) else None
            name_of_row = next((row[key] for key in ID_FIELDS if row.get(key) is not None), None)
            category = str(row.get("category") or "")
            prompts.append(Prompt(Conversation(messages), category, reference, number - 1, name_of_row))
    return prompts


def load_conversations(
    name: str, split: str = "train", data_dir: str | None = None, limit: int | None = None
) -> list[list[Message]]:
    """Return the conversations of one split in the order of its rows, at most `limit` of each data set.

    `name` may list several sets with commas. Empty conversations are kept, so that numbers are row numbers.
    """
    return [
        to_messages(row, f"{dataset} row {number}")
        for dataset in dataset_names(name)
        for number, row in enumerate(load_records(dataset, split, data_dir, limit), 1)
    ]


def dataset_names(text: str) -> list[str]:
    """Return the data sets in a list with commas, each once; a file's path may contain commas.

    Raises DatasetError for an empty list.
    """
    if Path(text).is_file():
        return [text]
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise DatasetError(f"{text!r} names no data set; known: {', '.join(KNOWN)}")
    return names


def _load(name: str, split: str, data_dir: str | None, limit: int | None, any_single: bool) -> list[dict[str, Any]]:
    path = Path(name)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise DatasetError(f"no such file: {name}; check the path, or write prompts with `firp prompts`")
        return _read(path, limit)
    known = KNOWN.get(name)
    if any_single and known and len(known.splits) == 1:
        split = next(iter(known.splits))
    tried: list[str] = []
    found = _local_file(name, split, data_dir, known, tried)
    if found is not None:
        return _read(found, limit)
    if known and split not in known.splits:
        raise DatasetError(f"{name} has no split {split!r}; it has: {', '.join(known.splits)}")
    return _from_hub(name, split, known, limit, tried)


def _local_file(
    name: str, split: str, data_dir: str | None, known: KnownDataset | None, tried: list[str]
) -> Path | None:
    """Return NAME/SPLIT.jsonl of the embedded sets or of the data folder; a folder without that split is an error."""
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if root and not Path(root).is_dir():
        raise DatasetError(f"the data folder {root} does not exist")
    embedded = embedded_folder("data") / "datasets" / name
    places = [embedded] if embedded.is_dir() else []
    if root:
        places.append(Path(root) / name)
    stems = (split, *(known.files if known and split in known.splits else ()))
    for folder in places:
        for stem in stems:
            if (folder / f"{stem}.jsonl").is_file():
                return folder / f"{stem}.jsonl"
        existing = sorted(path.stem for path in folder.glob("*.jsonl"))
        if existing:
            raise DatasetError(f"{name} has no split {split!r} in {folder}; it has: {', '.join(existing)}")
        tried.append(f"{folder}/{split}.jsonl")
    if not root:
        tried.append(f"no --data-dir and no {DATA_DIR_VARIABLE}")
    return None


def _from_hub(
    name: str, split: str, known: KnownDataset | None, limit: int | None, tried: list[str]
) -> list[dict[str, Any]]:
    hub = known.hub if known else name
    if hub is None:
        assert known is not None
        raise _not_found(name, split, tried, known.source)
    import datasets

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"split": known.splits[split] if known else split}
    if known:
        options |= {"name": known.config, "revision": known.revision, "data_files": known.data_files}
    offline = " (offline: HF_HUB_OFFLINE is set)" if hub_disabled() else ""
    try:
        loaded = datasets.load_dataset(hub, **options)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        tried.append(f"hub or its cache as {hub!r}{offline}: {reason}")
        raise _not_found(name, split, tried, "") from error
    count = len(loaded) if limit is None else min(limit, len(loaded))
    return [dict(row) for row in loaded.select(range(count))]


def _not_found(name: str, split: str, tried: list[str], source: str) -> DatasetError:
    hint = "" if name in KNOWN else nearest(name, KNOWN).removesuffix("?")
    origin = f" ({source})" if source else ""
    return DatasetError(
        f"data set {name!r} not found{hint}; tried: {'; '.join(tried)}\n"
        f"put it{origin} at DIR/{name}/{split}.jsonl and give --data-dir DIR, or name a .jsonl file"
    )


def _read(path: Path, limit: int | None) -> list[dict[str, Any]]:
    return list(islice(_lines(path), limit))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file, or of a .json file with a list of them."""
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, list):
                raise DatasetError(f"{path}: expected a list of objects, got {type(values).__name__}")
            yield from (_object(value, path, number) for number, value in enumerate(values, 1))
            return
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _object(json.loads(line), path, number)
    except json.JSONDecodeError as error:
        where = f"{path}" if path.suffix == ".json" else f"{path} line {number}"
        raise DatasetError(f"{where}: not valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _object(value: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{path} line {number}: expected a JSON object, got {type(value).__name__}")
    return value
