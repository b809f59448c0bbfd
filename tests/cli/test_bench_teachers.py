"""Benches of several teachers: predictors are grouped by teacher, measured with it, and reported together."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.bench_run import groups_to_measure
from firp_cli.config import TeacherConfig
from firp_cli.errors import FingerprintError, UsageError
from firp_cli.evaluation.answer_runs import teacher_labels
from firp_cli.evaluation.bench_groups import choose_groups, embedded_folders, group_by_teacher
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.merge import merge_teachers
from firp_cli.evaluation.methods import BenchSettings, make_methods
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.folder import read_config, save_predictor
from firp_cli.results import BenchReport, as_json
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from helpers.commands import invoke
from helpers.folders import save_prompts, save_teacher
from helpers.models import looped_model, looped_teacher, make_predictor, random_prompts, tiny_teacher

DEFAULT = ["ar", "hf", "prompt-lookup", "suffix"]


def short_bench(teacher: Teacher, methods: list[str], skip_long: bool = False) -> BenchReport:
    settings = BenchSettings(max_new_tokens=6, repeats=1, warmup=0)
    prompts = [BenchPrompt(prompt, "set") for prompt in [*random_prompts(2, seed=9), [5] * 507]]
    return run_bench(teacher, prompts, make_methods(teacher, {}, methods, settings), settings, skip_long=skip_long)


def test_merged_report_names_the_teacher_of_each_row() -> None:
    one = short_bench(tiny_teacher("llama"), ["ar", "hf"], skip_long=True)
    two = short_bench(looped_teacher(2, 3), ["hf"], skip_long=True)
    assert merge_teachers([one]) is one and one.teachers == [] and one.rows[0].teacher is None
    merged = merge_teachers([one, two])
    labels = [("tiny-llama", "ar"), ("tiny-llama", "hf"), ("looped-2x3", "hf")]
    assert [(row.teacher, row.method) for row in merged.rows] == labels
    assert [replace(row, teacher=None) for row in merged.rows] == [*one.rows, *two.rows]
    assert merged.teacher == one.teacher and merged.teachers == [one.teacher, two.teacher]
    assert merged.skipped_long == 2 and merged.settings["methods"] == ["ar", "hf"]
    assert merged.settings["methods_by_teacher"] == {"tiny-llama": ["ar", "hf"], "looped-2x3": ["hf"]}
    assert merged.settings["prompts"] == 2 and merged.settings["reference"] == "hf"
    again = BenchReport.from_json(json.loads(json.dumps(as_json(merged))))
    assert again.teachers == merged.teachers and [row.teacher for row in again.rows] == [name for name, _ in labels]
    old = as_json(one)
    del old["teachers"]
    assert BenchReport.from_json(old).teachers == []


def test_teacher_labels_shorten_folders_where_unique() -> None:
    assert teacher_labels(["arithmetic", "/models/looped"]) == ["arithmetic", "looped"]
    assert teacher_labels(["org/looped", "/a/x", "/b/x"]) == ["org/looped", "/a/x", "/b/x"]


Save = Callable[[str, str, str, str], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """Writes a predictor folder that contains only config.json."""

    def save(folder: str, kind: str, teacher: str, fingerprint: str) -> Path:
        (tmp_path / folder).mkdir()
        identity = {"name": teacher, "fingerprint": fingerprint}
        config = {"format": 1, "predictor": {"kind": kind}, "teacher": identity}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        return tmp_path / folder

    return save


def test_predictors_are_grouped_by_teacher(saved: Save) -> None:
    folders = [
        saved("a", "firp", "plain", "f1"),
        saved("b", "speed", "looped", "f2"),
        saved("c", "firp", "/models/plain", "f1"),
        saved("d", "medusa", "looped", "f2"),
    ]
    plain_group, looped = group_by_teacher([*folders, folders[0]])
    assert (plain_group.teacher, looped.teacher) == ("plain", "looped")
    assert list(plain_group.folders) == ["a", "c"] and plain_group.kinds == {"a": "firp", "c": "firp"}
    assert looped.folders == {"speed": folders[1], "medusa": folders[3]}
    (together,) = group_by_teacher(folders, "plain")
    assert together.teacher == "plain" and list(together.folders) == ["a", "speed", "c", "medusa"]
    (nothing,) = group_by_teacher([])
    assert nothing.teacher is None and choose_groups(None, [nothing])[0].methods == DEFAULT


def test_methods_filter_every_group(saved: Save) -> None:
    groups = group_by_teacher([saved("a", "firp", "plain", "f1"), saved("b", "speed", "/models/looped", "f2")])

    def chosen(*wanted: str) -> dict[str | None, list[str]]:
        return {group.label or group.teacher: group.methods for group in choose_groups(wanted or None, groups)}

    assert chosen() == {"plain": [*DEFAULT, "firp"], "looped": [*DEFAULT, "speed"]}
    assert chosen("ar", "speed") == {"/models/looped": ["ar", "speed"]}
    assert chosen("speed", "firp", "hf") == {"plain": ["firp", "hf"], "looped": ["speed", "hf"]}
    assert chosen("ar") == {"plain": ["ar"], "looped": ["ar"]}
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        chosen("ar", "sped")


def embed(monkeypatch: pytest.MonkeyPatch, default: str, *folders: Path) -> None:
    """Make these folders the embedded predictors, their teachers the embedded ones, and `default` the teacher that is
    taken where none is named.
    """
    names = [str(read_config(folder)["teacher"]["name"]) for folder in folders]
    monkeypatch.setattr("firp_cli.evaluation.bench_groups.embedded_teachers", lambda: names)
    monkeypatch.setattr(
        "firp_cli.evaluation.bench_groups.embedded_predictors", lambda: {each.name: each for each in folders}
    )
    monkeypatch.setattr("firp_cli.evaluation.bench_groups.DEFAULT_TEACHER", default)


def test_bench_takes_embedded_predictors_of_all_teachers_by_default(
    saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [saved("firp", "firp", "plain", "f1"), saved("speed", "speed", "looped", "f2")]
    embed(monkeypatch, "plain", *folders)
    assert embedded_folders(None, None) == embedded_folders(None, ["ar", "speed"]) == folders
    assert embedded_folders(None, ["ar", "hf"]) == folders[:1]
    assert embedded_folders("looped", ["ar"]) == folders[1:] and embedded_folders("elsewhere", None) == []
    monkeypatch.setattr("firp_cli.evaluation.bench_groups.embedded_teachers", lambda: ["plain"])
    assert embedded_folders(None, None) == folders[:1]  # the looped teacher may not be here
    assert embedded_folders("looped", None) == folders[1:]


@pytest.fixture
def two_teachers(tmp_path: Path) -> Path:
    """A folder with a teacher and its predictor `one`, a looped teacher and its predictor `early`, and a data set."""
    for folder, model, name, section in (
        ("teacher", None, "one", {"kind": "firp", "layer": 2, "steps": 3}),
        ("looped", looped_model(2, 3), "early", {"kind": "speed"}),
    ):
        saved = save_teacher(tmp_path / folder, model)
        loaded = load_teacher(TeacherConfig(model=str(saved)), device="cpu")
        save_predictor(make_predictor(loaded, **section), tmp_path / name, loaded)
    save_prompts(tmp_path / "words.jsonl")
    return tmp_path


SHORT = ["--limit", "2", "--max-new-tokens", "8", "--repeats", "1"]


def bench_of(work: Path, *arguments: str) -> tuple[Any, BenchReport]:
    words = str(work / "words.jsonl")
    result = invoke("bench", *arguments, "--dataset", words, *SHORT, "--output", str(work / "report"))
    assert result.exit_code == 0, (result.output, result.exception)
    return result, BenchReport.from_json(json.loads((work / "report" / "bench.json").read_text()))


def test_bench_measures_two_teachers_one_after_the_other(two_teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, load = two_teachers, load_teacher
    living: list[weakref.ref[Teacher]] = []

    def load_alone(*arguments: Any, **options: Any) -> Teacher:
        assert all(teacher() is None for teacher in living), "an earlier teacher is still in memory"
        teacher = load(*arguments, **options)
        living.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr("firp_cli.api.loading.load_teacher", load_alone)
    result, report = bench_of(work, str(work / "one"), str(work / "early"))
    rows = [(row.teacher, row.method) for row in report.rows]
    expected = {"teacher": [*DEFAULT, "firp"], "looped": [*DEFAULT, "speed"]}
    assert rows == [(teacher, method) for teacher, methods in expected.items() for method in methods]
    assert report.settings["methods_by_teacher"] == expected
    assert [teacher["name"] for teacher in report.teachers] == ["teacher", "looped"]
    for row in report.rows:
        assert row.method == "hf" or row.lossless.identical == row.lossless.compared == 2, row
        assert row.method != "ar" or row.speedup == 1.0
    assert "teacher looped" in result.stdout and "must not be compared" in " ".join(result.stdout.split())
    assert "measuring with looped" in result.output or "warm-up with looped" in result.output
    csv_header = (work / "report" / "bench.csv").read_text().splitlines()[0]
    assert csv_header.startswith("teacher,dataset,")


def test_bench_loads_only_teachers_of_the_methods(two_teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = two_teachers
    _, report = bench_of(work, str(work / "one"), str(work / "early"), "--methods", "ar,speed")
    assert report.teachers == [] and report.teacher["name"] == "looped"
    assert [(row.teacher, row.method) for row in report.rows] == [(None, "ar"), (None, "speed")]
    embed(monkeypatch, "teacher", work / "one", work / "early")
    _, report = bench_of(work, "--methods", "ar")
    assert report.teacher["name"] == "teacher" and [row.method for row in report.rows] == ["ar"]
    _, report = bench_of(work, "--methods", "speed,firp")
    assert [(row.teacher, row.method) for row in report.rows] == [("teacher", "firp"), ("looped", "speed")]


def test_named_teacher_is_used_for_all_predictors(two_teachers: Path) -> None:
    folders = [str(two_teachers / name) for name in ("early", "one")]
    words = str(two_teachers / "words.jsonl")
    result = invoke("bench", *folders, "--dataset", words, "--teacher", str(two_teachers / "looped"), *SHORT)
    assert isinstance(result.exception, FingerprintError) and "one was trained for" in str(result.exception)


def test_several_ranks_need_one_teacher_and_a_speed_predictor(two_teachers: Path) -> None:
    early, one = (str(two_teachers / name) for name in ("early", "one"))
    (group,) = groups_to_measure([early, one], ["ar", "speed"], None, 2)
    assert group.methods == ["ar", "speed"] and group.label is None
    with pytest.raises(UsageError, match="--gpus takes predictors of one teacher"):
        groups_to_measure([early, one], None, None, 2)
    with pytest.raises(UsageError, match="firp decodes on one"):
        groups_to_measure([one], None, None, 2)
    with pytest.raises(UsageError, match="name a speed predictor"):
        groups_to_measure([one], ["ar"], None, 2)
