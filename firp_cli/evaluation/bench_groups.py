"""Groups of predictors by teacher, and the methods that a bench measures with each. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from firp_cli.assets import DEFAULT_TEACHER, embedded_predictors, embedded_teachers
from firp_cli.config import KINDS
from firp_cli.errors import UsageError
from firp_cli.evaluation.answer_runs import teacher_labels
from firp_cli.evaluation.baselines import baseline
from firp_cli.evaluation.methods import choose_methods, predictor_names
from firp_cli.predictors.folder import read_config


@dataclass(frozen=True)
class Group:
    """Predictors of one teacher, and the methods to measure with it.

    Attributes:
        teacher: name from the user or from the predictors' config.json; None: the default teacher.
        folders, kinds: of its predictors, by method name. methods: names to measure.
        label: name of the teacher in reports of several teachers.
    """

    teacher: str | None
    folders: dict[str, Path] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    methods: list[str] = field(default_factory=list)
    label: str | None = None


def group_by_teacher(folders: Sequence[Path], teacher: str | None = None) -> list[Group]:
    """Group predictor folders by the teacher that they were trained for, in order of first appearance.

    All are in one group if `teacher` is given; without folders there is one group without predictors. A model folder
    and a hub id of the same teacher are recognised by the fingerprint. Raises PredictorError.
    """
    configs = {folder: read_config(folder) for folder in dict.fromkeys(folders)}
    if teacher is not None or not configs:
        return [_group(teacher, configs)]
    groups: list[dict[Path, dict[str, Any]]] = []
    for folder, config in configs.items():
        alike = (g for g in groups if any(_same(config["teacher"], member["teacher"]) for member in g.values()))
        group = next(alike, None)
        if group is None:
            groups.append(group := {})
        group[folder] = config
    return [_group(next(iter(group.values()))["teacher"].get("name"), group) for group in groups]


def _same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Return True for records of one teacher in one form: its weights, and what the predictors remember of loading it.

    Without fingerprints the names decide.
    """
    if "fingerprint" in one and "fingerprint" in two:
        return (one["fingerprint"], _form(one)) == (two["fingerprint"], _form(two))
    return one.get("name") == two.get("name")


def _form(teacher: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in teacher.get("loading", {}).items() if name != "revision"}


def _group(teacher: str | None, configs: dict[Path, dict[str, Any]]) -> Group:
    kinds = [str(config["predictor"].get("kind")) for config in configs.values()]
    names = predictor_names(list(zip(kinds, configs, strict=True)))
    return Group(teacher, dict(zip(names, configs, strict=True)), dict(zip(names, kinds, strict=True)))


def choose_groups(wanted: Sequence[str] | None, groups: Sequence[Group]) -> list[Group]:
    """Return the groups to measure, with their methods: the default baselines and all predictors of each, or those of
    `wanted`. A kind of predictor that no group has stays among the methods of all: it becomes a row with its reason.

    If `wanted` names predictors, groups without any of them are dropped. Raises UsageError with the nearest name when
    no method has that name.
    """
    known = list(dict.fromkeys(name for group in groups for name in group.folders))
    for name in wanted or ():
        alike = [own for group in groups for own, kind in group.kinds.items() if kind == name]
        if alike and name not in known:
            raise UsageError(f"several {name} predictors: name them by folder ({', '.join(alike)})")
    names = choose_methods(wanted, known)
    chosen = [
        replace(group, methods=[name for name in names if name not in known or name in group.folders])
        for group in groups
    ]
    if wanted is not None and any(name in known for name in names):
        chosen = [group for group in chosen if any(name in group.folders for name in group.methods)]
    if len(chosen) == 1:
        return chosen
    labels = teacher_labels([str(group.teacher) for group in chosen])
    return [replace(group, label=label) for group, label in zip(chosen, labels, strict=True)]


def add_embedded(folders: Sequence[Path], teacher: str | None, wanted: Sequence[str] | None) -> list[Path]:
    """Return the folders with the shipped predictors of kinds that `wanted` names and that none of them has, of the
    same teachers.
    """
    configs = [read_config(folder) for folder in folders]
    kinds = {config["predictor"].get("kind") for config in configs}
    missing = {name for name in wanted or () if name in KINDS and name not in kinds}

    def fits(config: dict[str, Any]) -> bool:
        if teacher is not None:
            return bool(config["teacher"].get("name") == teacher)
        return any(_same(config["teacher"], own["teacher"]) for own in configs)

    shipped = {folder: read_config(folder) for folder in embedded_predictors().values()} if missing else {}
    return [
        *folders,
        *(folder for folder, config in shipped.items() if config["predictor"]["kind"] in missing and fits(config)),
    ]


def embedded_folders(teacher: str | None, wanted: Sequence[str] | None) -> list[Path]:
    """Return the shipped predictors of `teacher`. Without `teacher`: those of all embedded teachers, or of the default
    one if `wanted` names only baselines. Predictors of other teachers must be named, or their teacher must be.
    """
    if teacher is None and wanted and all(baseline(name) for name in wanted):
        teacher = DEFAULT_TEACHER
    names = embedded_teachers() if teacher is None else [teacher]
    return [folder for folder in embedded_predictors().values() if read_config(folder)["teacher"].get("name") in names]
