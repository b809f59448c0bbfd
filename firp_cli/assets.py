"""Teachers, predictors, data and recipes that travel with the package, by name."""

from __future__ import annotations

import difflib
import logging
from functools import cache
from pathlib import Path
from typing import Any

from firp_cli.errors import RecipeError
from firp_cli.machine import is_launched

DEFAULT_TEACHER = "arithmetic"
BASE_PREFIX = "base-"  # of recipes that lack a predictor and serve as a base
LOG = logging.getLogger("firp")  # the program prints it on stderr


def embedded_folder(name: str) -> Path:
    """Return the folder `data` or `recipes`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_embedded" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"this install lacks its embedded `{name}` folder; reinstall firp")


def teacher_source(model: str) -> str:
    """Return the argument of `from_pretrained`: an existing folder, an embedded teacher's folder, or the hub id."""
    if Path(model).is_dir():
        return model
    embedded = embedded_folder("data") / "teachers" / model
    return str(embedded) if embedded.is_dir() else model


def embedded_teachers() -> list[str]:
    """Return the names of the teachers whose weights travel with the package."""
    return sorted(path.parent.name for path in (embedded_folder("data") / "teachers").glob("*/config.json"))


def embedded_predictors() -> dict[str, Path]:
    """Return the predictor folders that travel with the package, by name."""
    folder = embedded_folder("data") / "predictors"
    return {path.name: path for path in sorted(folder.glob("*")) if (path / "config.json").is_file()}


def chat_templates() -> dict[str, Path]:
    """Return the Jinja files of the chat templates that travel with the package, by name."""
    return {path.stem: path for path in sorted((embedded_folder("data") / "templates").glob("*.jinja"))}


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipe files by name, without those that only serve as a base of others."""
    return {name: path for name, path in _recipe_files().items() if not name.startswith(BASE_PREFIX)}


def find_recipe(name: str) -> Path:
    """Return a recipe file: a path, or the name of a shipped one. Raises RecipeError with the nearest name."""
    return Path(name) if Path(name).is_file() else find_shipped_recipe(name)


def find_shipped_recipe(name: str) -> Path:
    """Return a shipped recipe file, bases included. Raises RecipeError with the nearest name.

    A name of the previous version, with `_`, is accepted with a warning that gives its new spelling.
    """
    files = _recipe_files()
    spelled = name.replace("_", "-")
    if name not in files and spelled in files:
        _note_new_name(name, spelled)
        name = spelled
    if name not in files:
        raise RecipeError(f"no recipe file {name!r} and no shipped recipe of that name{nearest(name, files)}")
    return files[name]


def _recipe_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(embedded_folder("recipes").glob("*.yaml"))}


def nearest(name: str, known: Any) -> str:
    """Return `; did you mean 'x'?` for a close known name, else `; known: a, b`."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


@cache
def _note_new_name(name: str, spelled: str) -> None:
    """Log the new name of a recipe, once per process and never on launched ranks."""
    if not is_launched():
        LOG.warning("the recipe %s is now named %s; the next version drops the old name", name, spelled)
