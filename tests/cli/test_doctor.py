"""`firp doctor` lists what is installed and what is missing; only missing essentials fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firp_cli.cli import doctor
from firp_cli.errors import RecipeError
from helpers.commands import invoke


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An install whose embedded parts are whole: those have tests of their own."""
    fine = doctor.Check("embedded teacher", doctor.OK, "here", "", essential=True)
    monkeypatch.setattr(doctor, "_embedded", lambda: [fine])
    monkeypatch.setattr(doctor, "_recipes", lambda: [doctor.Check("recipes", doctor.OK, "demo", "", essential=True)])


def test_doctor_json_lists_every_check(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIRP_DATA_DIR", raising=False)
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["healthy"]
    assert {"python", "torch", "transformers", "deepspeed", "memory", "free disk", "threads"} <= set(checks)
    assert checks["torch"]["status"] == "ok" and checks["torch"]["detail"]
    assert checks["FIRP_DATA_DIR"]["status"] == "note" and "--data-dir" in checks["FIRP_DATA_DIR"]["remedy"]


def test_doctor_table_names_remedies(healthy: None) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and "firp can run here" in result.stdout and "purpose" in result.stdout


def test_doctor_fails_on_a_missing_essential_package(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "deepspeed" else version(name))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert (
        "pip install deepspeed" in result.stdout
        and "firp cannot run until these are repaired: deepspeed" in result.stdout
    )


def test_doctor_passes_without_optional_packages(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.installed_version
    missing = ("triton", "datasets")
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name in missing else version(name))
    assert invoke("doctor").exit_code == 0


def test_doctor_names_a_broken_recipe(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def refuse(name: str) -> None:
        raise RecipeError(f"{name}: key bad")

    monkeypatch.setattr(doctor, "shipped_recipes", lambda: {"demo": Path("demo.yaml")})
    monkeypatch.setattr(doctor, "load_recipe", refuse)
    (check,) = doctor._recipes()
    assert check.status == "broken" and "key bad" in check.detail and check.essential


def test_doctor_lists_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}\n")
    monkeypatch.setenv("FIRP_DATA_DIR", str(tmp_path))
    assert "gsm8k" in doctor._data()[0].detail
    monkeypatch.setenv("FIRP_DATA_DIR", str(tmp_path / "nowhere"))
    assert doctor._data()[0].status == "missing"


def test_doctor_reports_a_missing_embedded_teacher_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "teacher_source", lambda name: name)
    (check,) = doctor._embedded()
    assert check.status == "missing" and check.essential
