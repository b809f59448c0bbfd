"""Machines and cores for ranks: hostfiles, Slurm variables and node lists, and the cores that ranks share."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from firp_cli.errors import ClusterError
from firp_cli.machine import usable_cores

LOG = logging.getLogger("firp")  # commands print it on stderr
MOST_RANKS_OF_A_CORE = 8

FIRST_PORT, PORTS = 12000, 20000  # below the ports that Linux assigns to outgoing connections
INTERACTIVE_STEP = 0xFFFF_FFF0  # first number of Slurm's batch and interactive steps, which are one shell each


def read_hostfile(path: Path | str) -> dict[str, int]:
    """Return the slots of each machine of a hostfile, in the order of its lines `HOST slots=N`; `#` begins a comment.

    Raises ClusterError naming file and line: another form, no slot, or a machine that is listed twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise ClusterError(f"no hostfile {path}{reason}: it has a line `HOST slots=N` for each machine") from None
    slots: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", content)
        if not match:
            raise ClusterError(f"{path}:{number}: {content!r} is not of the form `HOST slots=N`")
        host, count = match[1], int(match[2])
        if not count:
            raise ClusterError(f"{path}:{number}: {host} has no slot; remove the line")
        if host in slots:
            raise ClusterError(
                f"{path}:{number}: {host} is listed twice (first on line {lines[host]}); add up its slots"
            )
        slots[host], lines[host] = count, number
    if not slots:
        raise ClusterError(f"{path} names no machine: it has a line `HOST slots=N` for each")
    return slots


def ranks_by_host(path: Path | str, each: int | None) -> dict[str, int]:
    """Return the ranks to start on each machine of a hostfile: `each`, or all its slots.

    Raises ClusterError as `read_hostfile` does, and for a machine with fewer slots than `each`.
    """
    slots = read_hostfile(path)
    for host, count in slots.items():
        if each is not None and each > count:
            raise ClusterError(f"--gpus {each}: {host} has {count} slots in {path}")
    return slots if each is None else dict.fromkeys(slots, each)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task that `srun` started with others.

    Empty when there is no group to join: RANK is set already (torchrun, DeepSpeed), no Slurm step, a step of one task,
    the script of `sbatch`, the shell of `salloc`, or a step with a terminal.
    """
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    size = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""))
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_PTY_PORT" in environment:
        return {}
    if not step.isdigit() or int(step) >= INTERACTIVE_STEP or not size.isdigit() or int(size) < 2:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "")
    job = re.sub(r"\D", "", environment.get("SLURM_JOB_ID", environment.get("SLURM_JOBID", ""))) or "0"
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": expand_nodes(nodes)[0],
        # Steps of one job may run at the same time: each has its own port.
        "MASTER_PORT": str(FIRST_PORT + (int(job) * 7 + int(step)) % PORTS),
    }
    return {name: environment.get(name, value) for name, value in variables.items()}


def expand_nodes(text: str) -> list[str]:
    """Return the machines of a Slurm node list: `gpu[01-03,7],head` is gpu01, gpu02, gpu03, gpu7 and head.

    Raises ClusterError for a text that is no node list.
    """
    entries = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text)  # commas within brackets belong to one entry
    if not entries or ",".join(entries) != text:
        raise ClusterError(f"the node list {text!r} cannot be parsed; set MASTER_ADDR to the first machine")
    return [node for entry in entries for node in _expand_entry(entry)]


def _expand_entry(entry: str) -> list[str]:
    head, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    inside, closing, tail = rest.partition("]")
    nodes: list[str] = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        if not closing or not first.isdigit() or (dash and not last.isdigit()):
            raise ClusterError(f"the node list entry {entry!r} cannot be parsed; set MASTER_ADDR to the first machine")
        for number in range(int(first), int(last if dash else first) + 1):
            nodes += [f"{head}{number:0{len(first)}d}{after}" for after in _expand_entry(tail)]
    return nodes


def check_cores(ranks: int) -> None:
    """Log that ranks share cores. Raises ClusterError for so many that they would be too slow."""
    cores = usable_cores()
    advice = f"--gpus {cores} or fewer works faster"
    if ranks > MOST_RANKS_OF_A_CORE * cores:
        raise ClusterError(f"--gpus {ranks}: {ranks} ranks on {cores} CPU cores would be too slow; {advice}")
    if ranks > cores:
        LOG.info(f"{ranks} ranks share {cores} CPU cores; {advice}")
