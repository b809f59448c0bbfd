"""Teachers, predictors, data and recipes that travel with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from firp_cli.errors import RecipeError

DEFAULT_TEACHER = "arithmetic"


def embedded_folder(name: str) -> Path:
    """`data` or `recipes`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_embedded" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"this install lacks its embedded `{name}` folder; reinstall firp")


def teacher_source(model: str) -> str:
    """What `from_pretrained` gets: an existing folder as it is, an embedded teacher's folder, or the hub id."""
    if Path(model).is_dir():
        return model
    embedded = embedded_folder("data") / "teachers" / model
    return str(embedded) if embedded.is_dir() else model


def embedded_teachers() -> list[str]:
    """Names of the teachers whose weights travel with the package."""
    return sorted(path.parent.name for path in (embedded_folder("data") / "teachers").glob("*/config.json"))


def embedded_predictors() -> dict[str, Path]:
    """Predictor folders that travel with the package, by name."""
    folder = embedded_folder("data") / "predictors"
    return {path.name: path for path in sorted(folder.glob("*")) if (path / "config.json").is_file()}


def shipped_recipes() -> dict[str, Path]:
    """Shipped recipe files by name."""
    return {path.stem: path for path in sorted(embedded_folder("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file: a path, or the name of a shipped one. Raises RecipeError with the nearest name."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"no recipe file {name!r} and no shipped recipe of that name{nearest(name, shipped)}")


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` or `; known: a, b`."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
