"""Sources of a teacher's weights: a folder, an embedded teacher, a GGUF file, a known name, or the hub.

Known teachers (`data/teachers/NAME.yaml`) are GGUF files in an installed Python package or in a hub repository.
`locate` resolves every source to a folder or hub id that `from_pretrained` reads.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from firp_cli.assets import embedded_folder, teacher_source
from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError, first_line
from firp_cli.machine import hub_reachable

SUFFIX = ".gguf"


@dataclass(frozen=True)
class KnownTeacher:
    """Teacher that is found by its name alone.

    Attributes:
        package: import name of the Python package that contains `file`. install: pip's arguments for it.
        hub: repository that contains `file`. file: the GGUF file. about: description in one line.
    """

    name: str
    package: str
    install: str
    hub: str
    file: str
    about: str

    def installed(self) -> Path | None:
        """Return the file in the installed package, without importing it; None where it is not installed."""
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError):
            return None
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        return None


def known_teachers() -> dict[str, KnownTeacher]:
    """Return the known teachers by name."""
    folder = embedded_folder("data") / "teachers"
    tables = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}
    return {name: KnownTeacher(name=name, **values) for name, values in tables.items()}


def locate(config: TeacherConfig) -> TeacherConfig:
    """Return the same teacher with a `model` that `from_pretrained` reads; a GGUF file is unpacked once.

    Raises TeacherError when a GGUF file cannot be found or read.
    """
    path = gguf_path(config)
    if path is None:
        return config.model_copy(update={"model": teacher_source(config.model)})
    from firp_cli.teacher.gguf import unpack

    return config.model_copy(
        update={"model": str(unpack(path, gguf_dtype(config))), "gguf_file": None, "revision": None}
    )


def locate_config(config: TeacherConfig) -> tuple[str, Any]:
    """Return the folder or hub id with a teacher's config, and for a GGUF file the config itself; unpacks nothing."""
    path = gguf_path(config)
    if path is None:
        return teacher_source(config.model), None
    from firp_cli.teacher.gguf import read_config

    model_config = read_config(path)
    model_config.dtype = gguf_dtype(config)
    return str(path), model_config


def local_path(config: TeacherConfig) -> Path | None:
    """Return the folder or GGUF file of a teacher that is named by its path; None for other teachers.

    A link keeps its name: a file in the hub's cache is a link to one that is named by a hash.
    """
    place = Path(config.model) / (config.gguf_file or "")
    if not place.exists():
        return None
    return place.resolve() if place.name in ("", "..") else place.parent.resolve() / place.name


def teacher_name(config: TeacherConfig) -> str:
    """Return the name under which records refer to a teacher: a known name, a hub id, or the last part of its path. A
    snapshot in the hub's cache has the name of its repository.
    """
    path = local_path(config)
    if path is None:
        return "/".join(filter(None, (config.model, config.gguf_file)))
    repository = _snapshot(path)
    return path.name if repository is None else repository[0]


def _snapshot(path: Path) -> tuple[str, str] | None:
    """Return repository and commit of a snapshot folder of the hub's cache; None for another path."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(/[^/]+\.gguf)?$", str(path))
    return None if match is None else (match[1].replace("--", "/", 1), match[2])


@dataclass(frozen=True)
class TeacherOrigin:
    """Record of how a teacher was loaded.

    Attributes:
        loading: the fields of a TeacherConfig that are needed beside its name to load it again.
        chat_template: record of `set_chat_template`. path: folder or GGUF file of a teacher that is named by its path.
    """

    loading: dict[str, Any]
    chat_template: dict[str, str]
    path: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Return a record for manifests, predictors and reports, without paths of this machine."""
        return {"loading": self.loading, "chat_template": self.chat_template}


def teacher_origin(config: TeacherConfig, model: Any, chat_template: dict[str, str]) -> TeacherOrigin:
    """Return the origin of a loaded model.

    Args:
        config: its `chat_template` is a shipped name or the text that is used, not a file.
        chat_template: record of its tokenizer's template.
    """
    loading: dict[str, Any] = {} if config.dtype == "auto" else {"dtype": config.dtype}
    path = local_path(config)
    snapshot = None if path is None else _snapshot(path)
    revision = snapshot[1] if snapshot else getattr(model.config, "_commit_hash", None) or config.revision
    if revision and (path is None or snapshot):
        loading["revision"] = revision
    if config.chat_template is not None:
        loading["chat_template"] = config.chat_template
    if config.template_options:
        loading["template_options"] = config.template_options
    if has_own_code(model):
        loading["trust_remote_code"] = True
    return TeacherOrigin(loading, chat_template, path)


def has_own_code(model: Any) -> bool:
    """Return True for a model whose class comes from its repository, not from the library."""
    return type(model).__module__.startswith("transformers_modules")


def gguf_dtype(config: TeacherConfig) -> torch.dtype:
    """Return the dtype of dequantised weights: the recipe's; `auto` is bfloat16 with a CUDA device, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def gguf_path(config: TeacherConfig) -> Path | None:
    """Return a teacher's GGUF file, fetched from the hub if it is there; None for other teachers.

    Raises TeacherError when the file cannot be found.
    """
    model, file = config.model, config.gguf_file
    place = Path(model)
    if is_missing_path(model):
        raise TeacherError(
            f"no such {'file' if model.endswith(SUFFIX) else 'folder'}: {model}; give the model's place as --teacher "
            "(teacher.model in a recipe)"
        )
    if place.is_file():
        if file is not None or place.suffix != SUFFIX:
            raise TeacherError(f"{model} is a file: a teacher is a folder, a {SUFFIX} file, a hub id or a known name")
        return place
    if place.is_dir():
        return _in_folder(place, file)
    known = known_teachers().get(model)
    if known is not None and file is None:
        return known.installed() or _known_from_hub(known)
    if file is None and model.endswith(SUFFIX) and model.count("/") == 2 and not place.is_absolute():
        model, file = model.rsplit("/", 1)  # OWNER/REPOSITORY/FILE
    if file is None:
        if model.endswith(SUFFIX):
            raise TeacherError(f"no such file: {model}; a file of a hub repository is OWNER/REPOSITORY/FILE{SUFFIX}")
        return None
    return _from_hub(model, file, config.revision)


def is_missing_path(model: str) -> bool:
    """Return True for the path of a file or folder that does not exist; a hub id has no more than one `/`, a file on
    the hub two.
    """
    local = model.startswith(("/", "./", "../", "~")) or model.endswith("/") or "\\" in model
    local = local or model.count("/") > (2 if model.endswith(SUFFIX) else 1)
    return local and not Path(model).exists()


def _in_folder(folder: Path, file: str | None) -> Path | None:
    """Return `file` in a folder; without a name, the only GGUF file of a folder without another model."""
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if file is None:
        if (folder / "config.json").is_file() or not names:
            return None
        if len(names) > 1:
            raise TeacherError(f"{folder} has several GGUF files: name one in teacher.gguf_file: {', '.join(names)}")
        return folder / names[0]
    if not (folder / file).is_file():
        raise TeacherError(f"{folder} has no file {file!r} (teacher.gguf_file); it has: {', '.join(names) or 'none'}")
    return folder / file


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    try:
        path = cached_file(repository, file, revision=revision, local_files_only=not hub_reachable())
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"cannot fetch {file} of the hub repository {repository}: {first_line(error)}\n"
            "give a local .gguf file or a reachable repository as teacher.model"
        ) from error
    assert path is not None
    return Path(path)


def _known_from_hub(known: KnownTeacher) -> Path:
    try:
        return _from_hub(known.hub, known.file, None)
    except TeacherError as error:
        raise TeacherError(
            f"the teacher {known.name} is not installed: {first_line(error)}\n"
            f"install it: pip install {known.install} && pip install 'firp[gguf]'; with a network it is fetched from "
            f"the hub as {known.hub}"
        ) from error
