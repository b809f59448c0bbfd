"""Whether a run fits its devices, asked before its ranks start."""

from __future__ import annotations

from firp_cli.config import Recipe
from firp_cli.machine import readable_bytes
from firp_cli.training.memory_model import Line, remedies, total_bytes
from firp_cli.training.plan import planned_memory


def preflight(recipe: Recipe, ranks: int, room: int, of_what: str) -> tuple[list[Line], str] | None:
    """The lines of a rank's memory and what is wrong with them, in one or two lines of text ('' where it fits); None
    where the teacher's config is not at hand.
    """
    planned = planned_memory(recipe, ranks)
    if planned is None:
        return None
    teacher, parameters, lines = planned
    need = total_bytes(lines)
    if need <= room:
        return lines, ""
    found = remedies(recipe, teacher, parameters, ranks, room)
    what = f"a rank needs {readable_bytes(need)} and has {readable_bytes(room)} ({of_what})"
    if not found:
        return (
            lines,
            f"{what}\nno setting makes it fit: use more ranks or larger devices (training.preflight=ignore tries)",
        )
    return lines, f"{what}\nit fits with {', or '.join(found)} (training.preflight=ignore tries as it is)"
