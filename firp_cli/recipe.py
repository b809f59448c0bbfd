"""Recipes: typed YAML that says which teacher, data, predictor and training a run uses.

Loading touches no device; unknown, duplicate and mistyped keys are refused with file, line, key and the nearest known
key. Embedded teachers, predictors, data and shipped recipes are found here too, in a checkout or inside a wheel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firp_cli.assets import find_recipe, nearest
from firp_cli.config import KINDS, LoopedSection, Recipe
from firp_cli.errors import RecipeError


def load_recipe(name: Recipe | str | Path | None, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a recipe by path or shipped name (or take a Recipe), apply `section.field=value` overrides, and validate.

    Raises RecipeError naming the file, line and key.
    """
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    origin = "command line"
    if isinstance(name, Recipe):
        if not overrides:
            return name
        values, origin = name.model_dump(), "recipe"
    elif name is not None:
        path = find_recipe(str(name))
        origin = str(path)
        values, lines = _read_yaml(path.read_text(encoding="utf-8"), origin)
    for override in overrides or []:
        _apply_override(values, lines, override)
    return validate_recipe(values, origin, lines)


def validate_recipe(
    values: dict[str, Any], origin: str = "recipe", lines: dict[tuple[str, ...], int] | None = None
) -> Recipe:
    """A Recipe from plain values. Raises RecipeError naming where the fault stands."""
    predictor = values.get("predictor")
    if isinstance(predictor, dict):
        kind = predictor.get("kind")
        if kind not in KINDS:
            where = _where(origin, lines, ("predictor", "kind") if "kind" in predictor else ("predictor",))
            raise RecipeError(f"{where}: unknown predictor kind {kind!r}{nearest(str(kind), KINDS)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin, lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def _where(origin: str, lines: dict[tuple[str, ...], int] | None, key: tuple[str, ...]) -> str:
    line = (lines or {}).get(key)
    if line == 0:
        return f"command line, key {'.'.join(key)}"
    return f"{origin}:{line}: key {'.'.join(key)}" if line else f"{origin}: key {'.'.join(key)}"


def _explain(error: ValidationError, origin: str, lines: dict[tuple[str, ...], int] | None) -> str:
    """The first fault of a validation error, in the words of the recipe."""
    fault = min(
        error.errors(), key=lambda item: item["type"] != "extra_forbidden"
    )  # a misspelt key explains a missing one
    key = tuple(str(part) for part in fault["loc"])
    if len(key) > 1 and key[0] == "predictor" and key[1] in KINDS:
        key = (key[0], *key[2:])  # pydantic puts the union's tag into the path
    where = _where(origin, lines, key)
    if fault["type"] == "extra_forbidden":
        section: Any = Recipe
        if key[0] in Recipe.model_fields and len(key) > 1:
            section = KINDS.get(str(fault["loc"][1])) or Recipe.model_fields[key[0]].annotation
        if key[:2] == ("teacher", "looped"):
            section = LoopedSection
        return f"{where}: unknown key{nearest(key[-1], section.model_fields)}"
    if fault["type"] == "missing":
        return f"{where}: required{' for this predictor kind' if key[0] == 'predictor' else ''}"
    if isinstance(fault["input"], dict) and fault["type"] == "value_error":  # the fields of a section do not fit
        return f"{where.removesuffix(': key ')}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where}: {fault['msg']} (got {fault['input']!r})"


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Plain values and the line of every key. Raises RecipeError on bad YAML and duplicate keys."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{origin}:{line}: not valid YAML: {error.problem}") from None
    if root is None:
        return {}, {}
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, got {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _walk(root, (), lines, origin)
    return values, lines


def _walk(node: yaml.Node, prefix: tuple[str, ...], lines: dict[tuple[str, ...], int], origin: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(f"{origin}:{line}: key {'.'.join(key)} stands twice (first on line {lines[key]})")
        lines[key] = line
        _walk(value_node, key, lines, origin)


def _apply_override(values: dict[str, Any], lines: dict[tuple[str, ...], int], override: str) -> None:
    name, separator, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not separator or not all(key):
        raise RecipeError(f"override {override!r} is not of the form section.field=value")
    target = values
    for part in key[:-1]:
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {part} is not a section")
        target = inner
    try:
        target[key[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None
    lines[key] = 0  # 0 marks the command line
