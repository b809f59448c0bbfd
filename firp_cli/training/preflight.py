"""Comparison of a run's memory with its devices, before its ranks start."""

from __future__ import annotations

from firp_cli.config import Recipe
from firp_cli.machine import readable_bytes
from firp_cli.training.memory_model import MemoryLine, remedies, total_bytes
from firp_cli.training.plan import planned_memory


def preflight(recipe: Recipe, ranks: int, available: int, source: str) -> tuple[list[MemoryLine], str] | None:
    """Return the lines of a rank's memory and an error text ('' where they fit in `available` bytes).

    Returns None where the teacher's config is not available.

    Args:
        source: origin of `available`, for the text.
    """
    planned = planned_memory(recipe, ranks)
    if planned is None:
        return None
    teacher, parameters, lines = planned
    need = total_bytes(lines)
    if need <= available:
        return lines, ""
    settings = remedies(recipe, teacher, parameters, ranks, available)
    what = f"a rank needs {readable_bytes(need)} and has {readable_bytes(available)} ({source})"
    if not settings:
        return (
            lines,
            f"{what}\nno setting makes it fit: use more ranks or larger devices (training.preflight=ignore tries)",
        )
    return lines, f"{what}\nit fits with {', or '.join(settings)} (training.preflight=ignore tries as it is)"
