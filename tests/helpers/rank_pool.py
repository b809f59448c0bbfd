"""Ranks that start in no time: a process that has imported everything forks them, and ends a group of which one died.

Started as a program it reads one JSON request per line (see `RankPool.start`), answers with the ranks' process ids, and
once all have ended with their exit codes. It does what the launcher of a machine does, without its ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.models import ROOT

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.002


class Group:
    """The ranks of one command."""

    def __init__(self, rank_pool: RankPool, pids: list[int]) -> None:
        self.pids, self._nursery = pids, rank_pool

    def wait(self) -> list[int]:
        """Exit codes by rank; negative: the signal that ended it."""
        return self._nursery.read()["codes"]

    def wait_unless_killed(self, victim: int, seconds: float, reached: Callable[[], bool] = lambda: True) -> list[int]:
        """Exit codes, where rank `victim` was killed `seconds` after `reached` came true, unless all ended before."""
        ended = threading.Event()

        def kill() -> None:
            while not reached():
                if ended.wait(POLL_SECONDS):
                    return
            if not ended.wait(seconds):
                with contextlib.suppress(ProcessLookupError):  # it has ended: the rank_pool reaps at once
                    os.kill(self.pids[victim], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            return self.wait()
        finally:
            ended.set()
            killer.join()


class RankPool:
    """Talks to the forking process."""

    def __init__(self) -> None:
        values = {key: value for key, value in os.environ.items() if key != "FIRP_DATA_DIR"}
        values |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        values |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=values, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read() == {"ready": True}

    def start(
        self,
        argv: list[str],
        ranks: int,
        log: Path,
        *,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        script: Path | None = None,
        **faults: int,
    ) -> Group:
        """Run `firp argv` on `ranks` ranks; what they print goes to `log`.

        Args:
            script: a Python file that is run as a program instead of `firp`.
            environment: variables beside those of the test run.
            faults: `file_bytes`: no file may grow beyond it, as on a full disk. `renames`: rank 0 is killed at the
                rename of that number (from 1), before it, or with `renamed=1` right after it. `slurm=1` is no fault:
                the ranks are told who they are as `srun` tells it.
        """
        assert self._process.stdin
        request = {"argv": argv, "ranks": ranks, "log": str(log), "faults": faults}
        request |= {"cwd": str(cwd), "environment": dict(environment or {}), "script": script and str(script)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Group(self, self.read()["pids"])

    def run(self, argv: list[str], ranks: int, log: Path, **options: Any) -> list[int]:
        return self.start(argv, ranks, log, **options).wait()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the rank_pool has ended"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def rank_pool() -> Iterator[RankPool]:
    made = RankPool()
    try:
        yield made
    finally:
        made.close()


def _die_at_rename(number: int, renamed: bool) -> None:
    """Be killed at the rename of that number."""
    counted = 0

    def wrap(move: Callable[..., Any]) -> Callable[..., Any]:
        def moving(*arguments: Any, **options: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == number and not renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            result = move(*arguments, **options)
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return moving

    Path.replace, Path.rename = wrap(Path.replace), wrap(Path.rename)  # type: ignore[method-assign]


def _rank(request: dict[str, Any], rank: int, port: int) -> None:
    """What a forked rank does; never returns."""
    ranks, faults = request["ranks"], request["faults"]
    os.chdir(request["cwd"])
    os.environ |= request["environment"]
    if "renames" in faults and rank == 0:
        _die_at_rename(faults["renames"], bool(faults.get("renamed")))
    if "file_bytes" in faults:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_bytes"], faults["file_bytes"]))
    stream = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if ranks > 1 and faults.get("slurm"):
        os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(ranks)}
        os.environ |= {"SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    elif ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["firp", *request["argv"]]
    code = 1
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            from firp_cli.cli.app import main

            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tend(pids: list[int]) -> list[int]:
    """Wait for all; once one has failed tell the others to end, and make them after a while."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] and deadline == float("inf"):
                        deadline = time.monotonic() + GRACE_SECONDS
                        _send([other for other in pids if other not in codes], signal.SIGTERM)
        if time.monotonic() > deadline:
            _send([other for other in pids if other not in codes], signal.SIGKILL)
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _serve() -> None:
    """Import what commands import, then fork on request. Nothing is computed here: no thread may run at a fork."""
    import torch

    torch.set_num_threads(1)
    from firp_cli.distributed.launch import free_port, load_deepspeed

    load_deepspeed()
    import torch.utils.tensorboard
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    for module in pkgutil.walk_packages([str(ROOT / "firp_cli")], "firp_cli."):
        if not module.name.endswith("__main__") and ".triton_" not in module.name:
            importlib.import_module(module.name)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request, port, pids = json.loads(line), free_port(), []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if not pid:
                _rank(request, rank, port)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"codes": _tend(pids)}), flush=True)


if __name__ == "__main__":
    _serve()
