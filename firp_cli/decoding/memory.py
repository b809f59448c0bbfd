"""How much memory a request takes, said before it is taken."""

from __future__ import annotations

from pathlib import Path

import torch

from firp_cli.errors import CapacityError


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation may take; None where the machine does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024


def check_fits(needed: int, batch: int, positions: int, device: torch.device) -> None:
    """Raise CapacityError when the K/V cache of `batch` sequences of `positions` does not fit the device."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"the K/V cache of {batch} sequences of {positions} positions takes {readable_bytes(needed)}, {device} has "
            f"{readable_bytes(free)} free: decode fewer at once, or ask for fewer new tokens"
        )


def readable_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
