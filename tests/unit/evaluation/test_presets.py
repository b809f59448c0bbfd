"""Presets of published benches: their options, options beside them, and what a report says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.bench_run import find_prompts
from firp_cli.errors import UsageError
from firp_cli.evaluation.bench_prompts import spread
from firp_cli.evaluation.presets import PRESETS, apply_preset
from firp_cli.evaluation.spec_bench import MT_BENCH, OTHERS
from firp_cli.reports.html import bench_html
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.preset_lines import preset_lines, preset_title
from helpers.commands import invoke, succeed
from helpers.folders import save_teacher
from helpers.reports import bench_report

DEFAULTS: dict[str, Any] = {
    **{"dataset": None, "limit": None, "max_new_tokens": "128", "temperature": "0", "batch_size": "1", "turns": "all"},
    **{"split": "test", "warmup": 1, "seed": 0},
}


def save_spec_bench(path: Path) -> Path:
    """Save questions as Spec-Bench has them: two turns in MT-Bench's categories, three questions in each of the others
    and ten in MT-Bench's.
    """
    rows, number = [], 81
    for category in (*MT_BENCH, *OTHERS):
        for _ in range(10 if category in MT_BENCH else 3):
            turns = [f"w{5 + number % 20} w6", "w7"][: 2 if category in MT_BENCH else 1]
            rows.append({"question_id": number, "category": category, "turns": turns})
            number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spec-bench", ("spec_bench", 480, "1024", 3, 480)),
        ("speed-bench", ("speed_bench", 880, "4096", 1, 880)),
        ("eagle", ("mt_bench,humaneval,gsm8k,alpaca,cnn_dm", 80, "1024", 3, 400)),
    ],
)
def test_preset_sets_the_published_options(name: str, expected: tuple[Any, ...]) -> None:
    values, told = apply_preset(name, DEFAULTS, set())
    assert told is not None
    chosen = (*(values[key] for key in ("dataset", "limit", "max_new_tokens", "warmup")), told["prompts"])
    assert chosen == expected and told["changes"] == {}
    assert (values["batch_size"], values["temperature"], values["turns"], values["seed"]) == ("1", "0", "all", 0)


def test_given_options_win_and_are_named() -> None:
    given = {**DEFAULTS, "max_new_tokens": "128", "temperature": "0.0", "limit": 12}
    values, told = apply_preset("spec-bench", given, {"max_new_tokens", "temperature", "limit", "seed"})
    assert (values["max_new_tokens"], values["limit"], values["dataset"]) == ("128", 12, "spec_bench")
    assert told is not None and told["changes"] == {"max_new_tokens": "128", "limit": "12"}
    _, told = apply_preset("spec-bench", {**DEFAULTS, "batch_size": "1,4"}, {"batch_size"})
    assert told is not None and told["changes"] == {"batch_size": "1,4"}
    assert apply_preset(None, {**DEFAULTS, "dataset": "gsm8k"}, {"dataset"})[1] is None


def test_configuration_of_speed_bench_is_no_change() -> None:
    for dataset, prompts in (("speed_bench:qualitative", 880), ("speed_bench:throughput_16k", 1536)):
        values, told = apply_preset("speed-bench", {**DEFAULTS, "dataset": dataset}, {"dataset"})
        assert told is not None and (values["limit"], told["prompts"], told["changes"]) == (prompts, prompts, {})
    _, told = apply_preset("speed-bench", {**DEFAULTS, "dataset": "gsm8k"}, {"dataset"})
    assert told is not None and told["changes"] == {"dataset": "gsm8k"}


def test_unknown_preset_and_missing_data_set_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown preset 'specbench'; did you mean 'spec-bench'"):
        apply_preset("specbench", DEFAULTS, set())
    done = invoke("bench", "--preset", "egale")
    assert isinstance(done.exception, UsageError) and "did you mean 'eagle'" in str(done.exception)
    done = invoke("bench", "firp")
    assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2
    assert "--dataset" in str(done.exception) and "--preset spec-bench|speed-bench|eagle" in str(done.exception)


def test_ranks_get_options_that_are_given_at_their_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a rank would take the preset's value in place of the one that the user gave."""
    started: list[list[str]] = []

    def launch(gpus: int, hostfile: str | None, arguments: list[str]) -> bool:
        started.append(arguments)
        return True

    monkeypatch.setattr("firp_cli.distributed.launch.launch", launch)
    given = ["--max-new-tokens", "128", "--gpus", "2", "--output", str(tmp_path / "out")]
    succeed("bench", "speed", "--preset", "spec-bench", *given)
    succeed("bench", "speed", "--dataset", "arithmetic", "--output", str(tmp_path / "out"))
    assert "--max-new-tokens=128" in started[0] and "--preset=spec-bench" in started[0]
    assert not any("max-new-tokens" in word or "preset" in word for word in started[1])


def test_report_names_preset_changes_and_departures() -> None:
    report = bench_report()
    assert preset_lines(report) == [] and preset_title(report) == ""
    given = {**DEFAULTS, "max_new_tokens": "64", "limit": 40}
    report.settings["preset"] = apply_preset("spec-bench", given, {"max_new_tokens", "limit"})[1]
    report.settings |= {"methods": ["ar", "firp"], "turns_not_asked": 2}
    first, second = preset_lines(report)
    assert first.startswith("preset spec-bench with changes: limit=40, max_new_tokens=64. Published definition: 480")
    for words in ("40 of 480 questions", "hf, the published", "2 turns did not fit", "FastChat's", "its first one"):
        assert words in second
    for text in (bench_markdown(report), bench_html(report, {}).replace("&#x27;", "'")):
        assert first in text and second in text
    report.settings |= {"methods": ["ar", "hf"], "turns_not_asked": 0, "prompts": 480}
    assert not any(words in preset_lines(report)[1] for words in ("questions were", "hf, the", "did not fit"))


def test_spec_bench_has_six_categories_and_every_part_of_mt_bench(tmp_path: Path) -> None:
    """By name, and by its thirteen categories in a file of another name."""
    save_spec_bench(tmp_path / "spec_bench" / "question.jsonl")
    other = save_spec_bench(tmp_path / "mine.jsonl")
    for name in ("spec_bench", str(other)):
        pairs = find_prompts(name, str(tmp_path), 18)
        counts = {prompt.category: 0 for _, prompt in pairs}
        for _, prompt in pairs:
            counts[prompt.category] += 1
        assert counts == {"mt_bench": 3, **dict.fromkeys(OTHERS, 3)}
        assert [prompt.id for _, prompt in pairs][:3] == [81, 91, 101]  # writing, roleplay, reasoning
    assert spread(["a"] * 6 + ["b"], 4, ["x", "x", "y", "y", "z", "z", "b"]) == [0, 2, 4, 6]


def test_preset_command_measures_its_set_and_writes_its_files(tmp_path: Path) -> None:
    save_spec_bench(tmp_path / "data" / "spec_bench" / "question.jsonl")
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    options = ["--max-new-tokens", "4", "--limit", "12", "--repeats", "1", "--methods", "ar,hf", "--output", out]
    done = succeed(
        "bench", "--preset", "spec-bench", "--teacher", teacher, "--data-dir", tmp_path / "data", *map(str, options)
    )
    assert "spec-bench with changes: limit=12, max_new_tokens=4." in " ".join(done.stdout.split())
    report = json.loads((out / "bench.json").read_text())
    settings = report["settings"]
    assert (settings["warmup"], settings["max_new_tokens"], settings["prompts"]) == (3, 4, 12)
    assert settings["preset"]["name"] == "spec-bench" and settings["preset"]["definition"]
    categories = {row["category"]: row["prompts"] for row in report["rows"] if row["method"] == "ar"}
    assert categories == {"all": 12, "mt_bench": 2, **dict.fromkeys(OTHERS, 2)}
    lines = [json.loads(line) for line in (out / "spec-bench" / "hf.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["category"]) for line in lines][:3] == [
        (81, "writing"),
        (91, "roleplay"),
        (161, "translation"),
    ]
    assert (out / "spec-bench" / "ar.jsonl").is_file() and len(PRESETS) == 3
