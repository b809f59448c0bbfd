"""Program of the vLLM process that `collecting/vllm.py` starts: one line of JSON per request and per response.

It imports vLLM once it has its options, and neither torch nor transformers itself.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from firp_cli.collecting.responders import out_of_memory
from firp_cli.errors import first_line


class Answerer:
    """vLLM's engine, which answers one batch at a time."""

    def __init__(self, options: dict[str, Any], stops: list[int]) -> None:
        from vllm import LLM

        self.stops = stops
        self.engine = LLM(**options)

    def answer(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Return greedy answers of at most `limits` tokens, stop token included."""
        from vllm import SamplingParams

        parameters = [
            # only the teacher's own stop tokens
            SamplingParams(
                temperature=0.0, max_tokens=limit, stop_token_ids=self.stops, ignore_eos=True, detokenize=False
            )
            for limit in limits
        ]
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != prompt:
                raise RuntimeError("vLLM answered a different prompt")
            answers.append(self._complete(output.outputs[0]))
        return answers

    def _complete(self, completion: Any) -> list[int]:
        """Return the tokens up to the first stop token, which vLLM may have left out."""
        tokens = list(completion.token_ids)
        for place, token in enumerate(tokens):
            if token in self.stops:
                return tokens[: place + 1]
        if completion.finish_reason == "stop" and completion.stop_reason in self.stops:
            tokens.append(completion.stop_reason)
        return tokens


def main() -> None:
    """Read requests from stdin and respond on the original stdout, until stdin is closed by the asking process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that libraries print must not mix with responses
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os.killpg(os.getpid(), signal.SIGKILL)  # even during a batch, with all workers

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
