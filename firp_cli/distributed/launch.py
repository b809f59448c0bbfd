"""Ranks: one process per device, started by the DeepSpeed launcher; they communicate over NCCL, on a CPU over gloo.

`launch` starts the ranks of a command; inside a rank `start` joins them. Ranks started by torchrun, srun or DeepSpeed
join in the same way. A single process is a group of one rank and needs no launcher, port or MPI.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firp_cli.distributed.cluster import check_cores, ranks_by_host, slurm_ranks
from firp_cli.distributed.exports import ENVIRONMENT_FILE, EXPORTS, exported_environment
from firp_cli.distributed.signals import end_process, run_program
from firp_cli.errors import INTERRUPTED, ClusterError, FirpError, LaunchError, PeerLostError
from firp_cli.machine import (
    cores_of_rank,
    is_launched,
    is_main,
    local_rank,
    local_world_size,
    rank,
    world_size,
)

SIGNALS = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGTERM)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
RANK_MARK = "running-"  # name of the file that exists while a rank runs, before the rank's number
FAILURE_FILE = "FIRP_FAILURE_FILE"  # variable: file in which the first failing rank writes its message


def barrier() -> None:
    """Wait until all ranks are here. Does nothing in a single process."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def load_deepspeed() -> Any:
    """Return the deepspeed module, without log output and without the CPU extension that it compiles on first use."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        operations = importlib.import_module("deepspeed.ops")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    operations.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo is used instead
    return deepspeed


def adopt_scheduler() -> None:
    """Set the rank variables from Slurm's when `srun` started this process with others; else change nothing."""
    os.environ.update(slurm_ranks(os.environ))


def start() -> None:
    """Join the ranks that `launch`, torchrun, srun or DeepSpeed started, or form a group of one.

    A second call does nothing. Raises LaunchError when the other ranks cannot be reached.
    """
    import torch
    import torch.distributed

    if torch.distributed.is_initialized():
        return
    adopt_scheduler()
    if world_size() > 1:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank() % torch.cuda.device_count())
                load_deepspeed().init_distributed(verbose=False)
            else:
                torch.distributed.init_process_group("gloo")  # deepspeed uses this group where it is needed
        except (RuntimeError, ValueError) as error:  # errors of torch's store are RuntimeErrors
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LaunchError(
                f"rank {rank()} of {world_size()} cannot reach the other ranks at {where}: {error}"
            ) from error
        atexit.register(_leave)
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed reads it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def ranks_wanted(gpus: int | None, hostfile: Path | str | None) -> tuple[int, int]:
    """Return the number of ranks that `launch` starts, or that this rank belongs to, and the most on one machine.

    Raises ClusterError as `ranks_by_host` does.
    """
    if is_launched():
        return world_size(), local_world_size()
    counts = [gpus or 1] if hostfile is None else list(ranks_by_host(hostfile, gpus).values())
    return sum(counts), max(counts)


def launch(gpus: int | None, hostfile: str | None, argv: list[str], module: str = "firp_cli") -> bool:
    """Run `python -m module argv` (by default: `firp argv`) as a group of ranks, if one is requested.

    Returns False at once when this process is a rank already or does the work itself. Otherwise waits for the ranks and
    returns True. On a CPU any number of ranks share its cores.

    Raises:
        ClusterError: fewer devices than ranks, or a wrong hostfile.
        LaunchError: a rank failed; the error has its message and exit code.
        KeyboardInterrupt: Ctrl-C or SIGTERM was received and passed on; the ranks have ended.
    """
    adopt_scheduler()
    if is_launched() or (hostfile is None and (gpus is None or gpus == 1)):
        return False
    command, environment = launch_command(gpus, hostfile)
    with tempfile.TemporaryDirectory(prefix="firp-launch-") as folder:
        failure = Path(folder) / "failure.json"
        environment[FAILURE_FILE] = str(failure)
        if exports := environment.pop(EXPORTS, None):
            (Path(folder) / "environment").write_text(exports, encoding="utf-8")
            environment[ENVIRONMENT_FILE] = str(Path(folder) / "environment")
        code, interrupted = run_program([*command, module, *argv], environment)
        if interrupted or code == INTERRUPTED:  # the signal may have been sent to a rank alone
            raise KeyboardInterrupt
        if code:
            raise _failure(failure, code)
    return True


def launch_command(gpus: int | None, hostfile: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the launcher's command line, up to the module to run, and its environment. A hostfile that names only this
    machine needs no ssh. Raises ClusterError.
    """
    if gpus is not None and gpus < 1:
        raise ClusterError(f"--gpus {gpus}: at least one device is needed")
    environment = dict(os.environ)
    if hostfile is None:
        return _local_command(gpus or 1, environment), environment
    ranks = ranks_by_host(hostfile, gpus)
    host, count = next(iter(ranks.items()))
    if len(ranks) == 1 and host in (*LOCAL_NAMES, socket.gethostname()):
        return _local_command(count, environment), environment
    if shutil.which("pdsh") is None:
        raise ClusterError(
            f"the ranks on the machines of {hostfile} are started with pdsh, which is not installed: "
            "install it, or start firp on every machine with torchrun or srun"
        )
    return _cluster_command(gpus, hostfile), exported_environment(environment)


@contextlib.contextmanager
def relayed_errors() -> Iterator[None]:
    """Print the error of a group of ranks once: in one rank, or in the launching process.

    A failing rank writes its message for the launching process. Without one on this machine (torchrun, srun, other
    machines) the first failing rank prints it. Later errors of other ranks, which have lost a peer, and interruptions
    are not printed. A killed rank writes nothing; the launching process finds its mark.
    """
    if world_size() == 1:
        yield
        return
    mark = _mark(rank())
    if mark:
        mark.touch()
    try:
        yield
    except KeyboardInterrupt:
        if mark or not is_main():
            _exit(INTERRUPTED)
        atexit.unregister(_leave)
        raise
    except FirpError as error:
        if not _prints_error(error):
            _exit(error.exit_code)
        atexit.unregister(_leave)  # it would wait for the other ranks
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):  # a command that ends early
            raise
        if not _prints_error(error):
            _exit(1)
        atexit.unregister(_leave)
        raise
    finally:
        _clear_mark()


def _mark(number: int) -> Path | None:
    """Return the file that exists while rank `number` runs; None when no launching process can see it."""
    return Path(os.environ[FAILURE_FILE]).with_name(f"{RANK_MARK}{number}") if _launched_here() else None


def _clear_mark() -> None:
    if mark := _mark(rank()):
        mark.unlink(missing_ok=True)


def _exit(code: int) -> None:
    _clear_mark()
    end_process(code)


def _launched_here() -> bool:
    """Return True when the process that launched this rank waits for messages on this machine."""
    path = os.environ.get(FAILURE_FILE)
    return path is not None and Path(path).parent.is_dir()


def _prints_error(error: Exception) -> bool:
    """Return True when this rank prints its error; a launching process gets a FirpError as a message instead."""
    if _launched_here():
        message = {
            "rank": None if getattr(error, "agreed", False) else rank(),
            "message": str(error),
            "exit_code": getattr(error, "exit_code", 1),
            "peer_lost": isinstance(error, PeerLostError),
        }
        if not isinstance(error, FirpError):
            return not Path(os.environ[FAILURE_FILE]).is_file()
        with contextlib.suppress(FileExistsError), Path(os.environ[FAILURE_FILE]).open("x", encoding="utf-8") as stream:
            json.dump(message, stream)
        return False
    if getattr(error, "agreed", False):
        return is_main()
    import torch.distributed

    if not torch.distributed.is_initialized():
        return True
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("firp/failed", 1) == 1
    except RuntimeError:  # rank 0, which serves the store, has ended: the loss of a peer is known
        return not isinstance(error, PeerLostError)


def _failure(path: Path, code: int) -> LaunchError:
    """Return the error that ended a launched group: the first failing rank's message, or which rank was killed."""
    message = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    silent = [item.name.removeprefix(RANK_MARK) for item in path.parent.glob(f"{RANK_MARK}*")]
    who = f"rank {silent[0]}" if len(silent) == 1 else "a rank"  # several: the launcher ended the others
    number = -code if code < 0 else 256 - code  # the launcher's exit code for a rank that a signal ended
    if message is None or (message["peer_lost"] and silent):
        if number == signal.SIGKILL:
            reason = "was killed (SIGKILL; the system does that when memory runs out)"
        elif message is not None:  # the launcher saw the end of a surviving rank first
            reason = "ended without a message (killed, out of memory, or crashed)"
        else:
            named = f"signal {number}" if number in SIGNALS else f"exit code {code}"
            return LaunchError(f"{who} failed ({named}); see its output above; what was finished is kept")
        return LaunchError(f"{who} {reason}; what was finished is kept: run again with --resume")
    source, text = message["rank"], message["message"]
    error = LaunchError(text if source is None else f"rank {source}: {text}")
    error.exit_code = message["exit_code"]
    return error


def _local_command(gpus: int, environment: dict[str, str]) -> list[str]:
    """Return the command of DeepSpeed's launcher for this machine; set OMP_NUM_THREADS where ranks share cores."""
    import torch

    devices: list[int | str] = list(range(gpus))
    if torch.cuda.is_available():
        visible = [item for item in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
        count = torch.cuda.device_count()
        if gpus > count:
            raise ClusterError(f"--gpus {gpus}: this machine shows {count} CUDA devices")
        if visible:
            devices = [int(item) if item.isdigit() else item for item in visible[:gpus]]
    else:
        check_cores(gpus)
        environment["OMP_NUM_THREADS"] = str(cores_of_rank(gpus))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *(*options, "--module", "--no_local_rank", "--log_level=critical"),
    ]


def _cluster_command(gpus: int | None, hostfile: str) -> list[str]:
    """Return the command of DeepSpeed's runner for the machines of a hostfile (pdsh, ssh without password)."""
    options = [f"--hostfile={hostfile}", "--force_multi", f"--master_port={free_port()}"]
    if gpus is not None:
        options.append(f"--num_gpus={gpus}")
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *(*options, "--module", "--no_local_rank", "--log_level=critical"),
    ]


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
