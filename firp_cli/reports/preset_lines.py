"""Lines of a bench's report on its preset: the published definition, and departures from it."""

from __future__ import annotations

from firp_cli.results import BenchReport


def preset_title(report: BenchReport) -> str:
    """Return `spec-bench with changes: max_new_tokens=64`; '' without a preset."""
    preset = report.settings.get("preset") or {}
    changes = ", ".join(f"{name}={value}" for name, value in preset.get("changes", {}).items())
    return f"{preset.get('name', '')} with changes: {changes}" if changes else preset.get("name", "")


def preset_lines(report: BenchReport) -> list[str]:
    """Return a line with the preset and its published definition, and one with the departures; none without one."""
    preset, settings = report.settings.get("preset"), report.settings
    if not preset:
        return []
    departures = list(preset["departures"])
    measured, missed = settings.get("prompts"), settings.get("turns_not_asked")
    if measured not in (None, preset["prompts"]):
        departures.insert(0, f"{measured} of {preset['prompts']} questions were measured")
    if missed:
        departures.insert(0, f"{missed} turns did not fit the context or the chat template")
    if not any(name.startswith("hf") for name in settings.get("methods", ["hf"])) and preset["name"] != "speed-bench":
        departures.insert(0, "hf, the published baseline, was not measured")
    return [
        f"preset {preset_title(report)}. Published definition: {preset['definition']}",
        f"departures from the published definition: {'; '.join(departures)}",
    ]
