"""Rows of data files and of folders, by suffix.

A row is read with its place: `row 7`, of a .jsonl file its line. What is no row (broken JSON, a list) is read as the
OddRow that tells why.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from firp_cli.data.odd_rows import OddRow
from firp_cli.errors import DatasetError, first_line

FORMATS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet", ".csv", ".arrow")
LINES = (".jsonl", ".jsonl.gz", ".ndjson")
WHOLE = (".json", ".json.gz")
# A name with one of these endings is a file, never a data set of the hub.
OTHER_SUFFIXES = (
    *(".txt", ".tsv", ".md", ".yaml", ".yml", ".xml", ".html", ".xlsx", ".xls", ".pdf", ".py"),
    *(".pkl", ".pt", ".npy", ".h5", ".db", ".zst", ".gz", ".xz", ".bz2", ".zip", ".tar", ".tgz"),
)
LIST_KEYS = ("data", "rows", "train", "test", "examples", "instances", "items")  # of a .json file that is a mapping
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
READS = f"firp reads {', '.join(FORMATS)}, folders of them and save_to_disk folders: convert it"
Place = str
Read = tuple[Place, dict[str, Any] | OddRow]


def suffix_of(name: str) -> str:
    """Return the ending of a name by which it is read, or recognised as a file; '' for other names."""
    lower = name.lower()
    return next((end for end in (*FORMATS, *OTHER_SUFFIXES) if lower.endswith(end) and len(lower) > len(end)), "")


def dataset_label(name: str) -> str:
    """Return a data set's name for tables and folders: of a file or folder its own name, without suffix."""
    if suffix_of(name) or Path(name).is_dir():
        last = Path(name).name or Path(name).resolve().name
        return last[: -len(suffix_of(last))] if suffix_of(last) else last
    return name


def read_file(path: Path) -> Iterator[Read]:
    """Yield the rows of a file. Raises DatasetError for a format that firp does not read, or a damaged file."""
    suffix = suffix_of(path.name)
    if suffix not in FORMATS:
        raise DatasetError(f"{path}: {READS}")
    try:
        if suffix in LINES:
            with _open(path) as stream:
                yield from _lines(stream, path)
        elif suffix in WHOLE:
            yield from _json_file(path)
        elif suffix == ".csv":
            yield from _csv(path)
        else:
            yield from _arrow_file(path, suffix)
    except UnicodeError:
        raise DatasetError(f"{path} is not UTF-8: save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, csv.Error, ImportError) as error:
        raise DatasetError(f"{path} cannot be read: {first_line(error)}") from None


def is_saved(folder: Path) -> bool:
    """Return True for a folder that `save_to_disk` of `datasets` wrote."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, split: str) -> Iterator[Read]:
    """Yield the rows of a `save_to_disk` folder; of one with splits those of `split`. Raises DatasetError."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise missing_split(str(folder), split, loaded)
            loaded = loaded[split]
        yield from numbered(loaded)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DatasetError(f"{folder} cannot be read: {first_line(error)}") from None


def named_file(folder: Path, split: str) -> Path | None:
    """Return SPLIT with the ending of a format in a folder, if it is there. Raises DatasetError for several ones."""
    found = [path for path in (folder / f"{split}{suffix}" for suffix in FORMATS) if path.is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DatasetError(f"{folder} has both {names}: name one of these files, or remove the others")
    return found[0] if found else None


def split_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Return the files of one split of a folder with data files, as `datasets.load_dataset` assigns them.

    Raises DatasetError that lists the folder's configurations or splits.
    """
    import datasets

    paths = [path for path in folder.rglob("*") if path.is_file()]
    if not any(suffix_of(path.name) in FORMATS for path in paths):
        found = sorted({path.suffix for path in paths if path.suffix})[:6]
        raise DatasetError(f"{folder} has no data file (it has: {', '.join(found) or 'nothing'}); {READS}")
    if config is None and (named := named_file(folder, split)):
        return [named]
    parts = _part_folders(folder, paths)
    if config not in (None, *parts) and parts:
        raise missing_config(str(folder), config, parts)
    if config is None and len(parts) > 1:  # `datasets` would join them
        raise missing_config(str(folder), None, parts)
    try:
        configs = datasets.get_dataset_config_names(str(folder))
        if config not in (None, *configs) and (folder / str(config)).is_dir():
            return split_files(folder / str(config), split)
        chosen = config or datasets.get_dataset_default_config_name(str(folder))
        if chosen not in configs:
            raise missing_config(str(folder), config, configs)
        builder = datasets.load_dataset_builder(str(folder), name=chosen)
        files = {str(name): list(found) for name, found in (builder.config.data_files or {}).items()}
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        raise DatasetError(f"{folder} cannot be read: {first_line(error)}") from None
    if split not in files:
        raise missing_split(str(folder), split, files)
    if config is None:
        _check_formats(folder, paths, [Path(path) for found in files.values() for path in found])
    return [Path(path) for path in sorted(files[split])]


def _check_formats(folder: Path, paths: Iterable[Path], read: Sequence[Path]) -> None:
    """Raise DatasetError where `datasets`, which reads the files of one format, leaves out another one's beside them.

    A .json file may describe the others, and a card (YAML at the head of README.md) may name the files.
    """
    card = folder / "README.md"
    if card.is_file() and card.read_bytes().startswith(b"---"):
        return
    kinds, beside = {suffix_of(path.name) for path in read}, {path.resolve().parent for path in read}
    for path in sorted(paths):
        suffix = suffix_of(path.name)
        if suffix in FORMATS and suffix not in (*kinds, *WHOLE) and path.resolve().parent in beside:
            raise DatasetError(f"{folder} has both {read[0].name} and {path.name}: name files, or keep one format")


def _part_folders(folder: Path, paths: Iterable[Path]) -> list[str]:
    """Return the subfolders that hold all data files of a folder, one configuration each; none where they are its
    splits, or where a card names the configurations.
    """
    files = [path.relative_to(folder) for path in paths if suffix_of(path.name) in FORMATS]
    parts = sorted({path.parts[0] for path in files if len(path.parts) > 1})
    apart = len(parts) > 1 and all(len(path.parts) > 1 for path in files) and not (folder / "README.md").is_file()
    return parts if apart and not {"train", "test", "validation", "data"} & set(parts) else []


def missing_split(name: str, split: str, existing: Iterable[str]) -> DatasetError:
    """Return the error about a split that a data set lacks."""
    return DatasetError(
        f"{name} has no split {split!r}; it has: {', '.join(sorted(map(str, existing))) or 'none'}\n"
        "name one with --split, in a recipe with data.split"
    )


def missing_config(name: str, config: str | None, existing: Iterable[str]) -> DatasetError:
    """Return the error about a configuration that is not named, or does not exist."""
    known = sorted(map(str, existing))
    fault = f"has no configuration {config!r}" if config else "has several configurations"
    return DatasetError(f"{name} {fault}: {', '.join(known)}\nname one as {name}:{known[0] if known else 'CONFIG'}")


def numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[Read]:
    """Yield rows of `datasets` with their places. Null fields of nested values are left out: Arrow adds them."""
    for number, row in enumerate(rows, 1):
        yield f"row {number}", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], Mapping | list | None):
        return [_without_nulls(inner) for inner in value]
    return value


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(stream: Iterable[bytes], path: Path) -> Iterator[Read]:
    """Yield the objects of JSON lines, each with the number of its line."""
    for number, line in enumerate(stream, 1):
        text = _unmarked(line, path) if number == 1 else line
        if text.strip():
            yield f"row {number}", _parsed(text)


def _parsed(line: bytes) -> dict[str, Any] | OddRow:
    try:
        return _object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return OddRow("text that is not UTF-8")
    except RecursionError:
        return OddRow("broken JSON", "not valid JSON (nested too deeply)")
    except ValueError as error:  # also for whole numbers of thousands of digits
        return OddRow("broken JSON", f"not valid JSON ({getattr(error, 'msg', first_line(error))})")


def _object(value: Any) -> dict[str, Any] | OddRow:
    if isinstance(value, dict):
        return value
    return OddRow(
        f"a {type(value).__name__} in place of an object", f"expected a JSON object, got {type(value).__name__}"
    )


def _unmarked(data: bytes, path: Path) -> bytes:
    """Return the bytes without a byte-order mark. Raises DatasetError for UTF-16."""
    if data.startswith(UTF_16):
        raise DatasetError(f"{path} is UTF-16: save it as UTF-8")
    return data.removeprefix(BYTE_ORDER_MARK)


def _json_file(path: Path) -> Iterator[Read]:
    """Yield the objects of a list in a .json file; a file of JSON lines may have this suffix too."""
    with _open(path) as stream:
        data = _unmarked(stream.read(), path)
    try:
        values = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise DatasetError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        lines = data.split(b"\n")
        if len(lines) > 1 and isinstance(_parsed(lines[0]), dict):
            yield from _lines(lines, path)
            return
        raise DatasetError(f"{path}: not valid JSON ({getattr(error, 'msg', first_line(error))})") from None
    if isinstance(values, dict):
        values = next((values[key] for key in LIST_KEYS if isinstance(values.get(key), list)), values)
    if not isinstance(values, list):
        raise DatasetError(f"{path}: expected a list of objects, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield f"row {number}", _object(value)


def _csv(path: Path) -> Iterator[Read]:
    csv.field_size_limit(sys.maxsize)  # conversations are longer than the default
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = stream.readline()
        separator = next((mark for mark in ",;\t|" if mark in header), ",")
        stream.seek(0)
        reader = csv.DictReader(stream, delimiter=separator, skipinitialspace=True)
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                yield f"row {number}", OddRow("another number of fields than the header")
            else:
                yield f"row {number}", row


def _arrow_file(path: Path, suffix: str) -> Iterator[Read]:
    """Yield the rows of a Parquet file, or of an Arrow file or stream."""
    import pyarrow as arrow

    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                batches = (batch.to_pylist() for batch in file.iter_batches(1024))
                yield from numbered(chain.from_iterable(batches))
            return
        with arrow.memory_map(str(path)) as source:
            try:
                reader: Any = arrow.ipc.open_stream(source)
            except arrow.ArrowInvalid:
                file = arrow.ipc.open_file(source)
                reader = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from numbered(chain.from_iterable(batch.to_pylist() for batch in reader))
    except (arrow.ArrowException, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {first_line(error)}") from None
