"""Whether a run fits its devices, asked before its ranks start."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch

from firp_cli.errors import CapacityError
from firp_cli.recipe import Recipe
from firp_cli.training.memory import Line, remedies, total_bytes
from firp_cli.training.plan import planned_memory

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """`80GB`, `80G`, `64GiB` or a number of bytes. Raises CapacityError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    try:
        assert found
        power = UNITS[found[2].upper()]
        return int(float(found[1]) * (1024 ** (len(str(power)) // 3) if found[3] else power))
    except (AssertionError, ValueError):
        raise CapacityError(f"{text!r} is no amount of memory: write 80GB, 64GiB or a number of bytes") from None


def readable(count: float) -> str:
    """Bytes for people, in powers of 1000 as devices are sold."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def device_room(local_ranks: int) -> tuple[int, str] | None:
    """Bytes that one of `local_ranks` ranks of this machine may take, and of what; None where nobody says."""
    if torch.cuda.is_available():
        free = _cuda_free(local_ranks)
        return None if free is None else (free, "free on the fullest CUDA device")
    known = [count for count in (_available(), _cgroup_free(Path("/sys/fs/cgroup"))) if count is not None]
    if not known:
        return None
    return min(known) // local_ranks, f"available memory, shared by {local_ranks} ranks" if local_ranks > 1 else (
        "available memory"
    )


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
    what = f"a rank needs {readable(need)} and has {readable(room)} ({of_what})"
    if not found:
        return (
            lines,
            f"{what}\nno setting makes it fit: use more ranks or larger devices (training.preflight=ignore tries)",
        )
    return lines, f"{what}\nit fits with {', or '.join(found)} (training.preflight=ignore tries as it is)"


def _cuda_free(local_ranks: int) -> int | None:
    """Through nvidia-smi: asking CUDA itself would leave a context of this process on the device."""
    visible = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={','.join(visible[:local_ranks])}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        free = [int(line) << 20 for line in answer.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return min(free[:local_ranks], default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def _cgroup_free(root: Path) -> int | None:
    """What the limit of this process's control group leaves; file pages that the kernel would drop count as free."""
    for limit, used, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (int((root / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = (root / limit).with_name("memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # no such group, or "max"
            continue
        droppable = [int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == inactive]
        return max(0, most - now + sum(droppable))
    return None
