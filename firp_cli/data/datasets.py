"""Data sets by name: their sources, prompts and conversations.

The order of lookup is: a local file, the embedded sets, `NAME/SPLIT.jsonl` (or another format) in `--data-dir` (or
FIRP_DATA_DIR), a local folder, then the hub or its cache through `datasets`. `NAME:CONFIG` names a configuration. The
first place that has the name is read, or refused if it lacks the split; a data set or split is never replaced by
another one, and what exists locally is never sought on the hub.

One rule holds for all commands: a row that cannot be used is skipped and counted by reason (`odd_rows.py`). A data set
is refused when more than 5% of its rows, and more than ten, are odd, or when no row remains.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firp_cli.assets import embedded_folder, nearest
from firp_cli.data.formats import ACCEPTED, ID_FIELDS, UNKNOWN_FIELDS, Conversation, Message, read_conversation
from firp_cli.data.hub import UnreachableError, read_hub
from firp_cli.data.known_sets import KNOWN, KnownDataset, known_set, terms_of_row
from firp_cli.data.odd_rows import MAX_ODD, OddRow, OddRows
from firp_cli.data.readers import (
    FORMATS,
    Read,
    is_saved,
    missing_config,
    named_file,
    read_file,
    read_saved,
    split_files,
    suffix_of,
)
from firp_cli.data.references import Reference, read_reference
from firp_cli.errors import DatasetError

LOG = logging.getLogger("firp")
DATA_DIR_VARIABLE = "FIRP_DATA_DIR"


@dataclass
class Prompt:
    """Row of a data set: a conversation, and its category in the set.

    `dataset`, `row`: where it is from. `index`: number of its row, from 0; `id`: what the row calls itself, if it does.
    `reference`: what an answer is judged by, if the row has it.
    """

    conversation: Conversation
    category: str = ""
    dataset: str = ""
    row: str = ""
    index: int = 0
    id: Any = None
    reference: Reference | None = None

    @property
    def messages(self) -> list[Message]:
        """The messages before the first answer."""
        return self.conversation.turns()[0]


class Rows(list[Prompt]):
    """Usable rows of data sets. `odd`: the skipped rows of each set. `terms`: terms of use that forbid training, by
    set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.odd: list[OddRows] = []
        self.terms: dict[str, str] = {}

    def tell(self) -> None:
        """Log how many rows of each set were skipped, by reason, and terms of use."""
        for odd in self.odd:
            odd.tell()
        for dataset, terms in self.terms.items():
            LOG.info(f"{dataset}: {terms}")

    def refuse_training(self) -> None:
        """Raise DatasetError for a set whose terms of use forbid training."""
        for dataset, terms in self.terms.items():
            raise DatasetError(
                f"{dataset} is not for training ({terms}): collect from another data set; `firp bench` measures on it"
            )


@dataclass(frozen=True)
class Selection:
    """Rows of a data set that are read, and how.

    Attributes:
        limit: rows wanted; skipped rows do not count. None: all.
        columns: names of its columns, by the keys of `data.columns`. Empty: names as public sets have them.
        sample: seed of a random choice of `limit` rows. None: the first rows.
        max_odd: largest share of odd rows.
        whole: refuse a set with placeholders in place of texts, in place of skipping them.
    """

    split: str = "train"
    data_dir: str | None = None
    limit: int | None = None
    columns: Mapping[Any, str] = field(default_factory=dict)
    sample: int | None = None
    max_odd: float = MAX_ODD
    whole: bool = False


def load_prompts(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    split: str = "test",
    *,
    selection: Selection | None = None,
    tell: bool = True,
) -> Rows:
    """Return prompts for decoding; `name` may list several sets with commas.

    A known set with a single split serves that one.

    Args:
        limit: prompts of each data set; skipped rows do not count.
        selection: in place of `data_dir`, `limit` and `split`.
        tell: log the rows that were skipped.

    Raises DatasetError for a set or split that does not exist, and for one with too many odd rows or no usable one.
    """
    return _load(name, selection or Selection(split, data_dir, limit), tell, prompts=True)


def load_rows(name: str, selection: Selection, tell: bool = True) -> Rows:
    """Return the conversations of one split in the order of its rows; rows without an answer are among them.

    `name` may list several sets with commas. Raises DatasetError as `load_prompts` does.
    """
    return _load(name, selection, tell, prompts=False)


def refuse_training(names: str) -> None:
    """Raise DatasetError for a known set whose terms of use forbid training, before it is sought."""
    rows = Rows()
    rows.terms = {name: known.terms for name in dataset_names(names) if (known := known_set(name)) and known.terms}
    rows.refuse_training()


def dataset_names(text: str) -> list[str]:
    """Return the data sets in a list with commas, each once; the path of a file or folder may contain commas, and begin
    with ~. Paths of one file are one data set.

    Raises DatasetError for an empty list.
    """
    parts, names = text.split(","), []
    while parts:
        joined = (",".join(parts[:count]).strip() for count in range(len(parts), 1, -1))
        name = next((name for name in joined if Path(name).exists()), parts[0].strip())
        parts = parts[name.count(",") + 1 :]
        names += [_at_home(name)] if name else []
    if not names:
        raise DatasetError(f"{text!r} names no data set; known: {', '.join(KNOWN)}")
    once = {str(Path(name).resolve()) if Path(name).exists() else name: name for name in reversed(names)}
    return list(reversed(once.values()))


def _at_home(name: str) -> str:
    """Return a path with the home folder in place of ~, which a shell leaves within a word."""
    return str(Path(name).expanduser()) if name.startswith("~/") else name


def _load(name: str, selection: Selection, tell: bool, prompts: bool) -> Rows:
    rows = Rows()
    for dataset in dataset_names(name):
        _read(rows, dataset, selection, prompts)
    if tell:
        rows.tell()
    return rows


def _read(rows: Rows, dataset: str, selection: Selection, prompts: bool) -> None:
    """Add the usable rows of one data set, and the count of the others. Raises DatasetError."""
    source: Iterator[tuple[int, Read]] = enumerate(_find(dataset, selection, any_single=prompts))
    if selection.sample is not None:
        everything = list(source)
        random.Random(selection.sample).shuffle(everything)
        source = iter(everything)
    odd, found = OddRows(dataset), list[Prompt]()
    known = known_set(dataset)
    terms = known.terms if known else ""
    for order, (place, row) in source:
        odd.rows += 1
        try:
            if isinstance(row, OddRow):
                raise row
            terms = terms or terms_of_row(row)
            conversation = read_conversation(row, selection.columns)
            if prompts and not conversation.messages:
                raise OddRow("token ids without a text")
        except OddRow as fault:
            odd.add(fault.reason, place, fault.place or str(fault))
            continue
        category = row.get(selection.columns.get("category", "category"))
        name = next((row[key] for key in ID_FIELDS if isinstance(row.get(key), str | int)), None)
        label = str(category).encode("utf-8", "replace").decode("utf-8") if isinstance(category, str | int) else ""
        named = {role: row.get(column) for role, column in selection.columns.items()}
        reference, used = read_reference({**row, **named} if named else row, conversation)
        conversation.left_out = tuple(name for name in conversation.left_out if name not in used)
        found.append(Prompt(conversation, label, dataset, place, order, name, reference))
        if len(found) == selection.limit:
            break
    if terms:
        rows.terms[dataset] = terms
    if selection.whole:
        odd.refuse_placeholders()
    if not odd.rows:
        raise DatasetError(f"no {'prompts' if prompts else 'conversations'} in {dataset}")
    if not found:
        unknown = any(reason.startswith(UNKNOWN_FIELDS) for reason in odd.counts)
        hint = (
            f"\naccepted: {ACCEPTED}\nother names: data.columns={{question: COLUMN, answer: COLUMN}}" if unknown else ""
        )
        raise DatasetError(f"no row can be used: {odd.line()}{hint}")
    odd.check(selection.max_odd)
    rows += sorted(found, key=lambda prompt: prompt.index)
    rows.odd.append(odd)


def _find(name: str, selection: Selection, any_single: bool) -> Iterator[Read]:
    """Return the rows of a data set from the first place that has it. `any_single`: a known set's only split serves."""
    path, split = Path(name), selection.split
    if name == "-" or name.startswith("/dev/") or (path.exists() and not path.is_file() and not path.is_dir()):
        raise DatasetError(
            f"{name}: a pipe can be read only once, a data set is read several times: write it to a file"
        )
    if path.is_file():
        return read_file(path)
    base, config = _split_config(name)
    known, folder = KNOWN.get(base), Path(base)
    if known and known.configs and config not in (None, *known.configs):
        raise missing_config(base, config, known.configs)
    if not folder.is_dir() and (suffix_of(name) or suffix_of(base) or _is_path(name)):
        raise DatasetError(f"no such file: {name}; check the path, or write prompts with `firp prompts`")
    if any_single and known and len(known.splits) == 1:
        split = next(iter(known.splits))
    tried: list[str] = []
    if known or not folder.is_dir():
        found = _local_file(base, config, split, selection.data_dir, known, tried)
        if found is not None:
            return read_file(found)
    if folder.is_dir() and (known is None or any(suffix_of(path.name) in FORMATS for path in folder.rglob("*"))):
        return _folder_rows(folder, split, config)
    if known and split not in known.splits:
        raise DatasetError(f"{base} has no split {split!r}; it has: {', '.join(known.splits)}")
    return _hub_rows(base, config, split, known, selection, tried)


def _split_config(name: str) -> tuple[str, str | None]:
    """Return name and configuration of `NAME:CONFIG`."""
    base, colon, config = name.rpartition(":")
    if not colon or not base or not config or Path(name).exists():
        return name, None
    if Path(base).is_file():
        raise DatasetError(f"{base} is a file and has no configurations: leave :{config} out")
    return base, config


def _is_path(name: str) -> bool:
    """Return True for a name that is no hub id, known name or comma list: absolute, relative, or in a deeper folder."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _local_file(
    name: str, config: str | None, split: str, data_dir: str | None, known: KnownDataset | None, tried: list[str]
) -> Path | None:
    """Return NAME/SPLIT of the embedded sets or of the data folder; a folder without that split is an error."""
    root = _at_home(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "")
    if root and not Path(root).is_dir():
        raise DatasetError(f"the data folder {root} does not exist")
    embedded = embedded_folder("data") / "datasets" / name
    places = [embedded] if embedded.is_dir() else []
    if root:
        places.append(Path(root) / name)
    stems = (split, *(known.files if known and split in known.splits else ()))
    for place in places:
        folder = place / config if config else place
        for stem in stems:
            if file := named_file(folder, stem):
                return file
        chosen = (config or known.config) if known and known.configs else None
        if chosen and (file := named_file(place / chosen, split) or named_file(place, chosen)):
            return file
        existing = sorted(path.name[: -len(suffix_of(path.name))] for path in _data_files(folder))
        if chosen and known and not set(existing) - set(known.configs):
            tried.append(f"{place}/{chosen}.jsonl")
        elif existing:
            raise DatasetError(f"{name} has no split {split!r} in {folder}; it has: {', '.join(existing)}")
        else:
            tried.append(f"{folder}/{split}.jsonl")
    if not root:
        tried.append(f"no --data-dir and no {DATA_DIR_VARIABLE}")
    return None


def _data_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_file() and suffix_of(path.name) in FORMATS]


def _folder_rows(folder: Path, split: str, config: str | None) -> Iterator[Read]:
    """Return the rows of a `save_to_disk` folder, or of the files of a split."""
    if is_saved(folder):
        return read_saved(folder, split)
    files = split_files(folder, split, config)
    named = ((file, f"{file.name} " if len(files) > 1 else "") for file in files)
    return ((f"{prefix}{place}", row) for file, prefix in named for place, row in read_file(file))


def _hub_rows(
    name: str, config: str | None, split: str, known: KnownDataset | None, selection: Selection, tried: list[str]
) -> Iterator[Read]:
    """Yield the rows of a set on the hub. Raises DatasetError that lists the places where the set was sought."""
    hub = known.hub if known else name
    if hub is None:
        assert known is not None
        raise _not_found(name, split, tried, known.source)
    options: dict[str, Any] = {"name": config} if config else {}
    if known:
        options = {"name": known.config, "revision": known.revision, "data_files": known.data_files, **options}
    part = selection.limit is not None and selection.sample is None
    try:
        yield from read_hub(hub, known.splits[split] if known else split, options, config, part, name)
    except UnreachableError as error:
        stem = (config or known.config or split) if known and known.configs else split
        raise _not_found(name, stem, [*tried, str(error)], known.source if known else "") from error


def _not_found(name: str, stem: str, tried: list[str], source: str) -> UnreachableError:
    hint = "" if name in KNOWN else nearest(name, KNOWN).removesuffix("?")
    origin = f" ({source})" if source else ""
    return UnreachableError(
        f"data set {name!r} not found{hint}; tried: {'; '.join(tried)}\n"
        f"put it{origin} at DIR/{name}/{stem}.jsonl and give --data-dir DIR, or name a .jsonl file"
    )
