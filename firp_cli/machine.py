"""Properties of this machine and process: ranks, processor, cores, threads, memory, network access.

Imports no heavy package; functions that need torch import it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firp_cli.errors import CapacityError

if TYPE_CHECKING:
    import torch

UNITS = ("", "K", "M", "G", "T")
CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
PROCESSORS, PROCESSOR_INFO = Path("/sys/devices/system/cpu"), Path("/proc/cpuinfo")
HUB_SECONDS = 3.0  # timeout of the connection
SMI_SECONDS = 20.0  # timeout of nvidia-smi


def rank() -> int:
    """Return the number of this process in its group, 0 outside a launched group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes in the group, 1 outside a launched group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of ranks on this machine, 1 where no launcher sets it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def is_launched() -> bool:
    """Return True in a process that a launcher started as a rank."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Return True in the process that writes files and prints (rank 0)."""
    return rank() == 0


def default_device() -> torch.device:
    """Return this rank's CUDA device, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def hub_disabled() -> bool:
    """Return True if one of the two variables of the hub's client disables requests to the hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in ("1", "true", "yes", "on")


def hub_reachable() -> bool:
    """Return True where the hub answers, with one short try: its client retries for half a minute without a network."""
    if hub_disabled():
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT"):
        return True
    try:
        socket.create_connection(("huggingface.co", 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def processor_name() -> str:
    """Return the processor's model name where the system reports one, else its architecture."""
    for line in _text(PROCESSOR_INFO).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads: to `threads`, else to OMP_NUM_THREADS, else to one per usable core.

    In a container the usable cores may be fewer than torch counts.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores())))


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Return the cores that this process may use, by its affinity and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cores_of_rank(ranks: int) -> int:
    """Return the CPU threads of each of `ranks` ranks that share this process's usable cores."""
    return max(1, usable_cores() // ranks)


def readable_bytes(count: float) -> str:
    """Return a number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def readable_seconds(seconds: float) -> str:
    """A duration as text, in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def parse_bytes(text: str) -> int:
    """Return the bytes in `80GB`, `80G`, `64GiB` or a number. Raises CapacityError."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    if match is None:
        raise CapacityError(f"{text!r} is not an amount of memory: write for example 80GB, 64GiB or a number of bytes")
    exponent = UNITS.index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes free for new allocations on `device`; None where the machine does not report them."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory()


def memory_of_rank(local_ranks: int) -> tuple[int, str] | None:
    """Return the bytes free for each of `local_ranks` ranks of this machine, and their source; None if unknown."""
    import torch

    if torch.cuda.is_available():
        free = _cuda_free(local_ranks)
        return None if free is None else (free, "free on the fullest CUDA device")
    known = [count for count in (available_memory(), _cgroup_memory_free()) if count is not None]
    if not known:
        return None
    shared = f"available memory, shared by {local_ranks} ranks" if local_ranks > 1 else "available memory"
    return min(known) // local_ranks, shared


def available_memory() -> int | None:
    """Return the system's bytes free for new allocations; None where it does not report them."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024


def _cuda_free(local_ranks: int) -> int | None:
    """Return free bytes by nvidia-smi: a query of CUDA itself would leave a context on the device."""
    visible = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    try:
        free = [int(value) << 20 for (value,) in query_gpus(["memory.free"], visible[:local_ranks])]
    except ValueError:
        return None
    return min(free[:local_ranks], default=None)


def query_gpus(fields: Sequence[str], devices: Sequence[str] = ()) -> list[list[str]]:
    """Return the values of nvidia-smi's `fields` for each device (numbers or UUIDs; none: all of them); empty where it
    does not answer.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if devices:
        command.append(f"--id={','.join(devices)}")
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in output.splitlines() if line.strip()]
    return [row for row in rows if len(row) == len(fields)]


def processor_state(root: Path = PROCESSORS, info: Path = PROCESSOR_INFO) -> dict[str, Any]:
    """Return the governor of this process's cores, and their present and greatest clock, as far as the system
    tells them.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    folders = [root / f"cpu{core}" / "cpufreq" for core in cores]
    governors = sorted({text for folder in folders if (text := _text(folder / "scaling_governor"))})
    state: dict[str, Any] = {"governor": ", ".join(governors)} if governors else {}
    for name, file in (("megahertz", "scaling_cur_freq"), ("megahertz_max", "cpuinfo_max_freq")):
        kilohertz = [int(text) for folder in folders if (text := _text(folder / file)).isdigit()]
        if kilohertz:
            state[name] = round(sum(kilohertz) / len(kilohertz) / 1000)
    megahertz = [float(number) for number in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _text(info), re.MULTILINE)]
    if megahertz and "megahertz" not in state:
        state["megahertz"] = round(sum(megahertz) / len(megahertz))
    return state


def _text(path: Path) -> str:
    """Return the stripped text of a small file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _cgroup_memory_free(root: Path = CGROUPS) -> int | None:
    """Return the free bytes of this process's control group; file pages that the kernel can drop count as free."""
    for limit, used, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed, current = (int((root / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = (root / limit).with_name("memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # no such group, or "max"
            continue
        droppable = [int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == inactive]
        return max(0, allowed - current + sum(droppable))
    return None


def _cpu_quota(root: Path) -> float | None:
    """Return the cores' worth of time that the control group (version 2 or 1) allows; None without a limit."""
    try:
        if (root / "cpu.max").is_file():
            share, period = (root / "cpu.max").read_text(encoding="ascii").split()
        else:
            share = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return None if share in ("max", "-1") else int(share) / int(period)
    except (OSError, ValueError):
        return None
