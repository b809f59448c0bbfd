"""Ranks: one process per device, started through the DeepSpeed launcher, talking over NCCL or, on a CPU, gloo.

`launch` starts the ranks of a command; inside a rank `start` joins them. A single process is a group of one and needs
neither launcher nor port nor MPI.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from firp_cli.errors import FirpError, LaunchError

FAILURE_FILE = "FIRP_FAILURE_FILE"  # where the first rank that fails leaves its message for the launching process


def rank() -> int:
    """This process's number, 0 outside a launched group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in the group, 1 outside a launched group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True in the process that writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks; nothing to wait for in a single process."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def load_deepspeed() -> Any:
    """The deepspeed module, quiet, and without the CPU extension that it would compile on first use."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        operations = importlib.import_module("deepspeed.ops")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    operations.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo serves as well
    return deepspeed


def start() -> None:
    """Join the ranks that `launch` (or torchrun, or SLURM) started, or form a group of one. Safe to call again."""
    import torch
    import torch.distributed

    if torch.distributed.is_initialized():
        return
    if world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        load_deepspeed().init_distributed(verbose=False)
        atexit.register(_leave)
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed reads it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(gpus: int | None, hostfile: str | None, argv: list[str], module: str = "firp_cli") -> bool:
    """Run `python -m module argv` (by default: `firp argv`) as a group of ranks, if one is asked for.

    Returns False at once where this process is a rank already or should do the work itself. Otherwise waits for the
    ranks and returns True. A CPU serves any number of ranks, which share its cores.

    Raises:
        LaunchError: there are fewer devices than ranks, or a rank failed; its message and exit code are passed on.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the ranks were told and have ended.
    """
    if "RANK" in os.environ or (hostfile is None and (gpus is None or gpus == 1)):
        return False
    if gpus is not None and gpus < 1:
        raise LaunchError(f"--gpus {gpus}: at least one device is needed")
    if hostfile is not None and not Path(hostfile).is_file():
        raise LaunchError(f"no hostfile {hostfile}: it has a line `HOST slots=N` for each machine")
    environment = dict(os.environ)
    command = _local_command(gpus, environment) if hostfile is None else _cluster_command(gpus, hostfile)
    with tempfile.TemporaryDirectory(prefix="firp-launch-") as folder:
        failure = Path(folder) / "failure.json"
        environment[FAILURE_FILE] = str(failure)
        code, interrupted = _wait([*command, module, *argv], environment)
        if interrupted:
            raise KeyboardInterrupt
        if code:
            raise _failure(failure, code)
    return True


@contextlib.contextmanager
def relayed_errors() -> Iterator[None]:
    """Inside a launched rank: leave a user error for the launching process, which prints it once for all ranks.

    What other ranks raise afterwards (their peer is gone) is noise and stays silent.
    """
    path = Path(os.environ.get(FAILURE_FILE) or os.devnull)
    try:
        yield
    except FirpError as error:
        if not path.parent.is_dir() or path == Path(os.devnull):  # no launcher, or one on another machine
            raise
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as stream:
            json.dump({"rank": rank(), "message": str(error), "exit_code": error.exit_code}, stream)
        _exit(error.exit_code)
    except Exception:
        if path.is_file():
            _exit(1)
        raise


def _exit(code: int) -> None:
    """Leave without the goodbyes of the process group: other ranks may still wait in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failure(path: Path, code: int) -> LaunchError:
    if not path.is_file():
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return LaunchError(f"a rank failed ({reason}); what it printed stands above, the last checkpoint is kept")
    told = json.loads(path.read_text(encoding="utf-8"))
    error = LaunchError(f"rank {told['rank']}: {told['message']}")
    error.exit_code = told["exit_code"]
    return error


def _local_command(gpus: int | None, environment: dict[str, str]) -> list[str]:
    """The per-machine DeepSpeed launcher over this machine's devices; sets OMP_NUM_THREADS where ranks share cores."""
    import torch

    assert gpus is not None
    devices: list[int | str] = list(range(gpus))
    if torch.cuda.is_available():
        visible = [item for item in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
        count = torch.cuda.device_count()
        if gpus > count:
            raise LaunchError(f"--gpus {gpus}: this machine shows {count} CUDA devices")
        if visible:
            devices = [int(item) if item.isdigit() else item for item in visible[:gpus]]
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // gpus))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *(*options, "--module", "--no_local_rank", "--log_level=critical"),
    ]


def _cluster_command(gpus: int | None, hostfile: str) -> list[str]:
    """DeepSpeed's runner over the machines of a hostfile (pdsh and ssh without password)."""
    options = [f"--hostfile={hostfile}", f"--master_port={free_port()}"]
    if gpus is not None:
        options.append(f"--num_gpus={gpus}")
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *(*options, "--module", "--no_local_rank", "--log_level=critical"),
    ]


def _wait(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run a launcher in a process group of its own; returns its exit code and whether the user interrupted it.

    The signals that end a program are passed on once, as SIGTERM: the launcher passes it to the ranks and waits for
    their checkpoint.
    """
    interrupted = False
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(*_: Any) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            process.terminate()

    with handling_signals(pass_on):
        return process.wait(), interrupted


@contextlib.contextmanager
def handling_signals(handler: Callable[..., None]) -> Iterator[None]:
    """Call `handler(number, frame)` on Ctrl-C, SIGTERM and a closed terminal (unless nohup ignores it)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
