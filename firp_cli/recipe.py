"""Recipes: typed YAML that defines the teacher, data, predictor and training of a run.

Loading touches no device. Unknown, duplicate and mistyped keys are refused with file, line, key and the nearest known
key. A recipe with `base: NAME-or-path` inherits the settings of another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firp_cli.assets import find_recipe, find_shipped_recipe, nearest
from firp_cli.config import KINDS, CouplingConfig, CouplingTraining, LoopedSection, Recipe
from firp_cli.errors import RecipeError, first_line
from firp_cli.provenance import portable

BASE = "base"
COMMAND_LINE = "command line, "
MOST = 2**63 - 1  # largest number of an override
NUMBERS = {  # YAML 1.1 also reads 010 as 8 and 1:30 as 90
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
Key = tuple[str, ...]
Locations = dict[Key, str]  # where a key is written: `FILE:LINE: ` or COMMAND_LINE
NESTED: dict[Key, Any] = {  # sections within sections
    ("teacher", "looped"): LoopedSection,
    ("predictor", "coupling"): CouplingConfig,
    ("training", "coupling"): CouplingTraining,
}


class _Loader(yaml.SafeLoader):
    """YAML without numbers of base 8 and 60: they stay text, of which a field for numbers takes decimal ones."""

    yaml_implicit_resolvers = {
        first: [(tag, NUMBERS.get(tag, pattern)) for tag, pattern in found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_recipe(name: Recipe | str | Path | None, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a recipe by path or shipped name (or take a Recipe), resolve its base, apply overrides, and validate.

    `overrides`: `section.field=value` each.

    Raises RecipeError naming the file, line and key.
    """
    values: dict[str, Any] = {}
    locations: Locations = {}
    origin = "command line"
    if isinstance(name, Recipe):
        if not overrides:
            return name
        values, origin = name.model_dump(), "recipe"
    elif name is not None:
        path = find_recipe(str(name))
        origin = str(path)
        values, locations = _read_with_base(path, ())
    for override in overrides or []:
        _apply_override(values, locations, override)
    return validate_recipe(values, origin, locations)


def validate_recipe(values: dict[str, Any], origin: str = "recipe", locations: Locations | None = None) -> Recipe:
    """Return a Recipe from JSON values. Raises RecipeError naming the location of the fault.

    Args:
        origin: location to name where `locations` has none.
    """
    locations = locations or {}
    predictor = values.get("predictor")
    if isinstance(predictor, dict):
        kind = str(predictor.get("kind")).replace("-", "_")
        if kind in KINDS:  # written firp-plus or firp_plus
            values = {**values, "predictor": {**predictor, "kind": kind}}
        else:
            where = _where(origin, locations, ("predictor", "kind") if "kind" in predictor else ("predictor",))
            raise RecipeError(f"{where}: unknown predictor kind {predictor.get('kind')!r}{nearest(kind, KINDS)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin, locations)) from None


def dump_recipe(recipe: Recipe, published: bool = False) -> str:
    """Return the resolved recipe as YAML. `published`: paths are relative to the working directory."""
    values = recipe.model_dump()
    sections = {"teacher": ("model",), "data": ("dataset", "data_dir"), "": ("store", "output")}
    for section, names in sections.items() if published else ():
        part = values[section] if section else values
        part.update({name: portable(part[name]) for name in names})
    template = recipe.teacher.chat_template
    if published and template and "{" not in template:  # a file's name, not the template itself
        values["teacher"]["chat_template"] = portable(template)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _where(origin: str, locations: Locations, key: Key) -> str:
    """Location and name of a key; a key that is not written itself has the location of its section."""
    written = next((key[:length] for length in range(len(key), 0, -1) if key[:length] in locations), None)
    if written is None and key:
        written = next((inner for inner in locations if inner[: len(key)] == key), None)
    return (f"{origin}: " if written is None else locations[written]) + f"key {'.'.join(key)}"


def _explain(error: ValidationError, origin: str, locations: Locations) -> str:
    """Return one line about the first fault of a validation error."""
    # a misspelt key is reported first: it explains a missing one
    fault = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    key = tuple(str(part) for part in fault["loc"])
    if len(key) > 1 and key[0] == "predictor" and key[1] in KINDS:
        key = (key[0], *key[2:])  # pydantic puts the union's tag into the path
    where = _where(origin, locations, key)
    if fault["type"] == "extra_forbidden":
        section: Any = Recipe
        if key[0] in Recipe.model_fields and len(key) > 1:
            section = KINDS.get(str(fault["loc"][1])) or Recipe.model_fields[key[0]].annotation
        section = NESTED.get(key[:2], section)
        return f"{where}: unknown key{nearest(key[-1], section.model_fields)}"
    if fault["type"] == "missing":
        return f"{where}: required{' for this predictor kind' if key[0] == 'predictor' else ''}"
    if fault["type"] == "string_type" and isinstance(fault["input"], (bool, int, float, date)):
        kind, quoted = type(fault["input"]).__name__, f"""{".".join(key)}='"{fault["input"]}"'"""
        return f"{where}: expected a text, and YAML reads a {kind}: quote it (in a shell {quoted})"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault["input"], dict) and fault["type"] == "value_error":  # fields of a section contradict each other
        overridden = any(written[: len(key)] == key and at == COMMAND_LINE for written, at in locations.items())
        where = _where(origin, {key: COMMAND_LINE} if overridden else locations, key)
        return f"{where.removesuffix(': key ')}: {message}"
    return f"{where}: {message} (got {fault['input']!r})"


def _read_with_base(path: Path, derived: tuple[Path, ...]) -> tuple[dict[str, Any], Locations]:
    """Read a recipe file merged over its base, without the key `base`.

    Args:
        derived: the files that name this one as their base, outermost first.
    """
    if path.resolve() in [file.resolve() for file in derived]:
        files = " -> ".join(map(str, (*derived, path)))
        raise RecipeError(f"the bases of recipes form a circle: {files}; remove one `base`")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    values, locations = _read_yaml(text, str(path))
    if BASE not in values:
        return values, locations
    name, where = values.pop(BASE), f"{locations.pop((BASE,))}key {BASE}"
    if not isinstance(name, str):
        raise RecipeError(f"{where}: name a shipped recipe or a file (got {name!r})")
    try:
        base_path = beside if (beside := path.parent / name).is_file() else find_shipped_recipe(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    base, base_locations = _read_with_base(base_path, (*derived, path))
    _merge(base, base_locations, values, locations)
    return base, base_locations


def _merge(base: dict[str, Any], base_locations: Locations, values: dict[str, Any], locations: Locations) -> None:
    """Put the keys of each section of `values` over those of `base`, in place.

    Values are replaced whole, and so is a predictor section of another kind.
    """
    for section, content in values.items():
        below, merged = base.get(section), content
        replaced: list[Key] = [(section,)]
        same_kind = section != "predictor" or _kind(content) in (None, _kind(below))
        if isinstance(below, dict) and isinstance(content, dict) and same_kind:
            merged, replaced = {**below, **content}, [(section, key) for key in content]
        for key in list(base_locations):
            if key[:2] in replaced or key[:1] in replaced:
                del base_locations[key]
        base[section] = merged
    base_locations |= locations


def _kind(section: Any) -> Any:
    kind = section.get("kind") if isinstance(section, dict) else None
    return kind.replace("-", "_") if isinstance(kind, str) else kind


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], Locations]:
    """Return the values and the location of every key. Raises RecipeError on bad YAML and duplicate keys."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _parse(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{origin}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, or a date that does not exist
        raise RecipeError(f"{origin}: not valid YAML: {first_line(error)}") from None
    if root is None or values == {}:
        raise RecipeError(f"{origin}: the recipe is empty; leave it out for a run with the default of every field")
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, got {type(values).__name__}")
    lines: dict[Key, int] = {}
    _find_lines(root, (), lines, origin)
    return values, {key: f"{origin}:{line}: " for key, line in lines.items()}


def _parse(text: str) -> Any:
    """Return the value of YAML text. Raises yaml.YAMLError, also for a value that contains itself, and ValueError."""
    value = yaml.load(text, Loader=_Loader)
    try:
        json.dumps(value, default=str, skipkeys=True)
    except ValueError:
        raise yaml.YAMLError("an alias (*) stands inside its own anchor (&)") from None
    return value


def _find_lines(node: yaml.Node, prefix: Key, lines: dict[Key, int], origin: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(f"{origin}:{line}: duplicate key {'.'.join(key)} (first on line {lines[key]})")
        lines[key] = line
        _find_lines(value_node, key, lines, origin)


def _apply_override(values: dict[str, Any], locations: Locations, override: str) -> None:
    name, separator, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not separator or not all(key):
        raise RecipeError(f"override {override!r} is not of the form section.field=value")
    if not text.strip():
        raise RecipeError(f"override {override!r} has no value; {name}=null stands for none")
    target = values
    for place, part in enumerate(key[:-1]):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
            locations.setdefault(key[: place + 1], COMMAND_LINE)
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {part} is not a section")
        target = inner
    try:
        value = yaml_value(text)
    except ValueError as error:
        raise RecipeError(f"override {override!r}: {error}") from None
    target[key[-1]] = value
    locations[key] = COMMAND_LINE


def yaml_value(text: str) -> Any:
    """Return the value that YAML text stands for. Raises ValueError."""
    try:
        value = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2024-13-01
        raise ValueError("the value is not valid YAML") from None
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError("the number is out of range")
    return value
