"""Answers from vLLM (extra `firp[vllm]`), in a process of its own: when it ends, all its memory is free again.

OutputSequence for the calls that vLLM documents from 0.11 to 0.26: `LLM(model, **engine arguments)`, `LLM.generate(prompts,
sampling_params, use_tqdm=)` with prompts of token ids and one `SamplingParams` each, `RequestOutput.outputs[0]`. It is
tested against a stand-in with these signatures, not against vLLM itself.

The two processes exchange lines of JSON over pipes: options, then batches of prompts; each is answered by one line.
This file is also the other process's program, so it imports neither torch nor vLLM at its top.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from firp_cli.collecting.responders import Answer, RetryingResponder, first_line, out_of_memory
from firp_cli.config import Recipe, TeacherConfig
from firp_cli.errors import TeacherError, UsageError
from firp_cli.machine import local_rank, local_world_size, world_size
from firp_cli.teacher.source import locate

if TYPE_CHECKING:
    from firp_cli.teacher.teacher import Teacher

AT_ONCE = 512  # prompts per batch: vLLM schedules them itself, and so many are lost by a kill at most
SHARE_OF_FREE = 0.9  # of the device memory that the teacher leaves free
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END_SECONDS = 10.0  # to end by itself, before it is made to


def check_responder(recipe: Recipe) -> None:
    """What of a recipe's responder can be refused before a teacher is loaded. Raises UsageError."""
    if recipe.data.regenerate and recipe.collect.responder == "vllm":
        check_vllm(recipe.teacher, recipe.collect.vllm)


def check_vllm(teacher: TeacherConfig, options: dict[str, Any]) -> None:
    """Whether vLLM is there and may be asked for this. Raises UsageError."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "collect.responder=vllm needs the package vllm: pip install 'firp[vllm]', or set collect.responder=engine"
        )
    if "model" in options:
        raise UsageError("collect.vllm.model is not for you to set: vLLM answers with teacher.model")
    if teacher.looped is not None:
        raise UsageError("vLLM does not run the loops of teacher.looped: set collect.responder=engine")


class VllmDied(RuntimeError):
    """vLLM's process ended, or said that a batch failed."""


class VllmResponder:
    """Has vLLM write the answers, greedily, with the teacher's weights, dtype and stop tokens.

    Among several ranks every group of as many neighbours on a machine as vLLM needs devices has one that answers.

    Args:
        options: engine arguments of `vllm.LLM`; they come before what is taken from the teacher.
        longest: tokens of a prompt and its answer at most.
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
        self._visible, self.active = _share(self.devices)
        self._steady = RetryingResponder(self._decode, AT_ONCE)
        self._process: subprocess.Popen[str] | None = None
        self._log: Any = None

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """As `Responder.reply`. Raises TeacherError when vLLM does not start."""
        return self._steady.reply(prompts, limits)

    def close(self) -> None:
        """End vLLM's process and those that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()  # which tells it to end
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers may have stayed
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
            [sys.executable, "-m", "firp_cli.collecting.vllm"],
            env=values,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # to be ended as a group; Ctrl-C reaches this process, which ends the other
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
        """Send a line and wait for its answer. On any fault the process is ended: what it still holds is unknown.

        Raises VllmDied, or MemoryError where fewer prompts may help.
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
            last = self._last_words()
            answer = {"error": f"its process ended (code {code}){f': {last}' if last else ''}", "memory": code == -9}
        self.close()
        raise (MemoryError if answer.get("memory") else VllmDied)(answer["error"])

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1][:300] if lines else ""


def _share(needed: int) -> tuple[list[str] | None, bool]:
    """The devices of this rank's vLLM (None: all that the process sees), and whether the rank has one.

    Raises UsageError when the ranks of a machine are fewer than the devices needed.
    """
    if world_size() == 1:
        return None, True
    rank, ranks = local_rank(), local_world_size()
    if needed > ranks:
        raise UsageError(f"collect.vllm asks for {needed} devices, and this machine has {ranks} ranks: start {needed}")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = (visible or [str(number) for number in range(ranks)])[rank : rank + needed]
    return devices, rank % needed == 0 and rank + needed <= ranks


def _free_share(devices: list[str] | None) -> float | None:
    """What part of each device's memory vLLM may take beside the teacher, which is loaded; None without devices."""
    import torch

    if not torch.cuda.is_available():
        return None
    first = local_rank() if devices is not None else 0
    count = torch.cuda.device_count() if devices is None else len(devices)
    torch.cuda.empty_cache()
    shares = [free / total for free, total in map(torch.cuda.mem_get_info, range(first, first + count))]
    return round(SHARE_OF_FREE * min(shares), 3)


# The other process.


class Answerer:
    """vLLM's side: an engine, asked batch by batch."""

    def __init__(self, options: dict[str, Any], stops: list[int]) -> None:
        from vllm import LLM

        self.stops = stops
        self.engine = LLM(**options)

    def answer(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Greedy answers of at most `limits` tokens, the stop token included."""
        from vllm import SamplingParams

        parameters = [
            # the teacher's own stop tokens, and no others
            SamplingParams(
                temperature=0.0, max_tokens=limit, stop_token_ids=self.stops, ignore_eos=True, detokenize=False
            )
            for limit in limits
        ]
        found = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        answers = []
        for prompt, output in zip(prompts, found, strict=True):
            if list(output.prompt_token_ids) != prompt:
                raise RuntimeError("vLLM answered another prompt than it was asked")
            answers.append(self._whole(output.outputs[0]))
        return answers

    def _whole(self, completion: Any) -> list[int]:
        """Its tokens up to the first stop token; one that vLLM left out is put back."""
        tokens = list(completion.token_ids)
        for place, token in enumerate(tokens):
            if token in self.stops:
                return tokens[: place + 1]
        if completion.finish_reason == "stop" and completion.stop_reason in self.stops:
            tokens.append(completion.stop_reason)
        return tokens


def main() -> None:
    """Read requests from stdin until it ends, which it does with the process that asked; answer on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os.killpg(os.getpid(), signal.SIGKILL)  # also in the middle of a batch, and with all workers

    threading.Thread(target=listen, name="requests", daemon=True).start()
    answerer: Answerer | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if answerer is None:
                answerer = Answerer(request["options"], request["stops"])
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = {"token_ids": answerer.answer(request["prompts"], request["limits"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {first_line(error)}", "memory": out_of_memory(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
