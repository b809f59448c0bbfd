"""Stand-in for vLLM: its public signatures (0.11 to 0.26), no keyword that it lacks, answers by a rule.

It has only the parts that firp uses; its errors have vLLM's texts. The JSON file `$VLLM_STAND_IN` lists the faults that
it simulates; the file with `.asked` appended records its calls.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP = 7
ENGINE_ARGUMENTS = {  # the arguments of vllm.EngineArgs that users of LLM pass most
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_prefix_caching",
    "generation_config",
    "disable_log_stats",
    "kv_cache_dtype",
    "load_format",
}


def notes() -> dict[str, Any]:
    return json.loads(Path(os.environ["VLLM_STAND_IN"]).read_text())


def note(**what: Any) -> None:
    with Path(os.environ["VLLM_STAND_IN"] + ".asked").open("a") as stream:
        stream.write(json.dumps(what) + "\n")


class SamplingParams:
    """Stand-in for vllm.SamplingParams, with its defaults."""

    def __init__(
        self,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        detokenize: bool = True,
        skip_special_tokens: bool = True,
    ) -> None:
        if temperature < 0 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        if stop and not detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")
        self.temperature, self.max_tokens, self.ignore_eos = temperature, max_tokens, ignore_eos
        self.stop_token_ids, self.detokenize = stop_token_ids or [], detokenize


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


class LLM:
    """Stand-in for vllm.LLM: keywords except for the model; unknown ones go to EngineArgs, which is strict."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        print("INFO: a chatty start")  # on stdout, as libraries do
        unknown = set(kwargs) - ENGINE_ARGUMENTS
        if unknown:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{min(unknown)}'")
        if not Path(model).is_dir():
            raise OSError(f"{model} is not a local folder")
        seen = {name: value for name, value in os.environ.items() if name in ("RANK", "CUDA_VISIBLE_DEVICES")}
        options = {"tensor_parallel_size": tensor_parallel_size, "dtype": dtype, "seed": seed, **kwargs}
        note(model=model, pid=os.getpid(), environment=seen, options=options)
        if notes().get("no_start"):
            os.write(2, b"the driver is too old\n")
            os._exit(3)
        self.longest = kwargs.get("max_model_len", 1 << 30)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: list[int] | None = None,
    ) -> list[RequestOutput]:
        assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
        found = []
        faults = notes()
        note(batch=len(prompts))
        if len(prompts) > faults.get("room", 1 << 30):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        for number, (prompt, parameters) in enumerate(zip(prompts, sampling_params, strict=True)):
            assert set(prompt) == {"prompt_token_ids"} and parameters.temperature == 0.0
            assert parameters.ignore_eos and not parameters.detokenize
            ids = prompt["prompt_token_ids"]
            if len(ids) + parameters.max_tokens > self.longest:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
            if faults.get("refuse") in ids:
                raise ValueError("Token id is out of vocabulary")
            if faults.get("die") in ids:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(faults.get("seconds", 0))
            tokens = answer(ids)[: parameters.max_tokens]
            stopped = tokens[-1] in parameters.stop_token_ids
            if stopped and faults.get("drop_stop"):
                tokens = tokens[:-1]
            output = CompletionOutput(
                0, "", tokens, None, None, "stop" if stopped else "length", STOP if stopped else None
            )
            found.append(RequestOutput(str(number), None, ids, None, [output], True))
        return found


def answer(prompt: Sequence[int]) -> list[int]:
    """Return the stand-in's answer to a prompt: tokens computed from it, then the stop token."""
    return [20 + (sum(prompt) + place) % 60 for place in range(1 + sum(prompt) % 5)] + [STOP]
