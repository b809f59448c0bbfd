"""Answers from vLLM (the extra `firp[vllm]`), in a separate process: when it ends, all its memory is free again.

Uses the calls that vLLM documents from 0.11 to 0.26: `LLM(model, **engine arguments)`, `LLM.generate(prompts,
sampling_params, use_tqdm=)` with prompts of token ids and one `SamplingParams` each, `RequestOutput.outputs[0]`. The
tests use a stand-in with these signatures, not vLLM itself.

The two processes exchange lines of JSON over pipes: first the options, then batches of prompts; each request has one
line of response. `collecting/vllm_process.py` is the program of the vLLM process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from firp_cli.collecting.responders import Answer, RetryingResponder
from firp_cli.config import Recipe, TeacherConfig
from firp_cli.errors import TeacherError, UsageError
from firp_cli.machine import local_rank, local_world_size, world_size
from firp_cli.teacher.source import locate

if TYPE_CHECKING:
    from firp_cli.teacher.teacher import Teacher

AT_ONCE = 512  # prompts per batch: vLLM schedules them, and a kill loses at most one batch
SHARE_OF_FREE = 0.9  # part of the free device memory that vLLM may take
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END_SECONDS = 10.0  # after which a process that does not end is killed


def check_responder(recipe: Recipe) -> None:
    """Check the recipe's responder before a teacher is loaded. Raises UsageError."""
    if recipe.data.regenerate and recipe.collect.responder == "vllm":
        check_vllm(recipe.teacher, recipe.collect.vllm)


def check_vllm(teacher: TeacherConfig, options: dict[str, Any]) -> None:
    """Check that vLLM is installed and that its options fit the teacher. Raises UsageError."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "collect.responder=vllm needs the package vllm: pip install 'firp[vllm]', or set collect.responder=engine"
        )
    if "model" in options:
        raise UsageError("collect.vllm.model cannot be set: vLLM answers with teacher.model")
    if teacher.looped is not None:
        raise UsageError("vLLM does not run the loops of teacher.looped: set collect.responder=engine")


class VllmDied(RuntimeError):
    """vLLM's process ended, or reported that a batch failed."""


class VllmResponder:
    """Writes greedy answers with vLLM, from the teacher's weights, dtype and stop tokens.

    When vLLM needs D devices, D neighbouring ranks of a machine share one vLLM process; the first of them answers.

    Args:
        options: engine arguments of `vllm.LLM`; they override those taken from the teacher.
        longest: most tokens of a prompt and its answer.
    Raises UsageError when vLLM is missing or cannot run this teacher, or has too few devices.
    """

    name = "vllm"

    def __init__(self, config: TeacherConfig, teacher: Teacher, options: dict[str, Any], longest: int) -> None:
        check_vllm(config, options)
        if teacher.looped is not None:
            raise UsageError(f"vLLM does not run {teacher.name}, whose layers loop: set collect.responder=engine")
        self.stops = list(teacher.eos_token_ids)
        located = locate(config)
        self.options = {
            "model": located.model,
            "revision": located.revision,
            "trust_remote_code": config.trust_remote_code,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "max_model_len": longest,
            "seed": 0,
            "generation_config": "vllm",  # no penalties from the model's own file
            **options,
        }
        self.devices = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
        self._visible, self.active = _assign_devices(self.devices)
        self._retrying = RetryingResponder(self._decode, AT_ONCE)
        self._process: subprocess.Popen[str] | None = None
        self._log: Any = None

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """Answer as `Responder.reply` describes. Raises TeacherError when vLLM does not start."""
        return self._retrying.reply(prompts, limits)

    def close(self) -> None:
        """End vLLM's process and its workers."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()  # the process ends when its input does
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers may still run
            process.wait()
            process.stdout.close()
            self._log.close()

    def _decode(self, prompts: list[Sequence[int]], limits: list[int], width: int) -> Iterator[Answer]:
        for start in range(0, len(prompts), width):
            part = slice(start, start + width)
            request = {"prompts": [list(prompt) for prompt in prompts[part]], "limits": limits[part]}
            if self._process is None:
                self._start()
            for number, tokens in enumerate(self._ask(request)["token_ids"], start):
                yield Answer(number, tokens)

    def _start(self) -> None:
        values = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        if self._visible is not None:
            values["CUDA_VISIBLE_DEVICES"] = ",".join(self._visible)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "firp_cli.collecting.vllm_process"],
            env=values,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # to end it as a group; Ctrl-C reaches this process only, which ends the other
        )
        options = {"gpu_memory_utilization": _free_share(self._visible), **self.options}
        options = {name: value for name, value in options.items() if value is not None}
        try:
            self._ask({"options": options, "stops": self.stops})
        except (VllmDied, MemoryError) as error:
            raise TeacherError(
                f"vLLM does not start with {self.options['model']}: {error}\n"
                "change its engine arguments in collect.vllm, or set collect.responder=engine"
            ) from error

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the response. After any error the process is ended, since its state is unknown.

        Raises VllmDied, or MemoryError when fewer prompts may help.
        """
        process = self._process
        assert process is not None and process.stdin and process.stdout
        line = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            answer = json.loads(line) if line.endswith("\n") else {}
        except BaseException:
            self.close()
            raise
        if "error" not in answer and line.endswith("\n"):
            return answer
        if "error" not in answer:
            code = process.wait()
            last = self._last_line()
            answer = {"error": f"its process ended (code {code}){f': {last}' if last else ''}", "memory": code == -9}
        self.close()
        raise (MemoryError if answer.get("memory") else VllmDied)(answer["error"])

    def _last_line(self) -> str:
        """Return the last line of the process's log."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1][:300] if lines else ""


def _assign_devices(needed: int) -> tuple[list[str] | None, bool]:
    """Return the devices of this rank's vLLM (None: all visible ones), and True if this rank starts it.

    Raises UsageError when a machine has fewer ranks than `needed` devices.
    """
    if world_size() == 1:
        return None, True
    rank, ranks = local_rank(), local_world_size()
    if needed > ranks:
        raise UsageError(f"collect.vllm needs {needed} devices, and this machine has {ranks} ranks: start {needed}")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = (visible or [str(number) for number in range(ranks)])[rank : rank + needed]
    return devices, rank % needed == 0 and rank + needed <= ranks


def _free_share(devices: list[str] | None) -> float | None:
    """Return the share of each device's memory that vLLM may take beside the loaded teacher; None without devices."""
    import torch

    if not torch.cuda.is_available():
        return None
    first = local_rank() if devices is not None else 0
    count = torch.cuda.device_count() if devices is None else len(devices)
    torch.cuda.empty_cache()
    shares = [free / total for free, total in map(torch.cuda.mem_get_info, range(first, first + count))]
    return round(SHARE_OF_FREE * min(shares), 3)
