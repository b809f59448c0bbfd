"""Baselines of transformers: its own `generate` with a dynamic or a static cache, and with assisted generation. Times
and counts are defined as in this package's engine.

At temperature 0 all other methods must reproduce the token ids of `hf`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from firp_cli.errors import FirpError, MethodError, first_line
from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher

# a model's own settings of assisted generation; where it has none, the library's defaults hold: 20 drafted tokens in
# every step (schedule `constant`), fewer after a token that the assistant gives a probability below 0.4
ASSISTANT_SETTINGS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


class HuggingFaceGenerate:
    """Methods `hf`, `hf-static`, `assisted:MODEL` and `early-exit:LAYER`: `model.generate` with the given options only;
    the model's generation config is not used.

    In assisted generation the forward that reads the prompt also verifies the first draft. Its first token is
    prefill's, the others are those of a decoding step. The time of making that draft counts as decoding, the time of
    the forward and of the assistant's reading of the prompt as prefill.

    Args:
        temperature: 0 is greedy. top_p: applied after temperature.
        static: use the static cache. On CUDA devices the library then compiles the model's forward, which is what the
            static cache is for; batch sizes are compiled outside the measured time.
        assistant: model that drafts, with the teacher's vocabulary. early_exit: number of the teacher's first layers
            that draft. Both decode one prompt at a time.
    """

    def __init__(
        self,
        teacher: Teacher,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        static: bool = False,
        assistant: Teacher | None = None,
        early_exit: int | None = None,
    ) -> None:
        self.teacher = teacher
        self.temperature = temperature
        self.top_p = top_p
        self.static = static
        self.assistant = assistant
        self.early_exit = early_exit
        self._seed = seed
        self._longest = 0
        self._compiled: set[tuple[int, int]] = set()  # batch size and positions of the cache

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        """Decode the prompts (token ids) as one left-padded batch. Returned token ids include EOS.

        Prefill ends when the first new token is chosen; `decode_seconds` is the rest of the call, the same for all
        sequences of the batch. Raises MethodError where the library cannot decode with this model.
        """
        width = max(map(len, prompts))
        self._check_context(width + max_new_tokens)
        try:
            if self.static and self.teacher.device.type == "cuda":
                self._compile(prompts, max_new_tokens)
            output, watch = self._run(prompts, max_new_tokens)
        except FirpError:
            raise
        except Exception as error:  # of any kind, as the model's own code
            raise MethodError(f"transformers cannot decode with it: {first_line(error)}") from error
        growth = [length - before for before, length in zip([width, *watch.lengths], watch.lengths, strict=False)]
        times = {"prefill_seconds": watch.prefill_seconds, "decode_seconds": watch.decode_seconds}
        return [
            self._generation(prompt, row, growth, batch_size=len(prompts), **times)
            for prompt, row in zip(prompts, output, strict=True)
        ]

    def _run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[list[list[int]], _Watch]:
        """Return the new tokens of each prompt, padding included, and what was recorded meanwhile."""
        model, device, padding = self.teacher.model, self.teacher.device, self._padding()
        width = max(map(len, prompts))
        ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        watch = _Watch(device)
        with ExitStack() as stack:
            stack.enter_context(_bare_generation(model))
            if self.assistant is not None:
                stack.enter_context(_bare_generation(self.assistant.model))
                stack.enter_context(watch.drafting(model, self.assistant.model))
            elif self.early_exit is not None:
                stack.enter_context(kept_depth(model))
                stack.enter_context(watch.drafting(model))
            stack.enter_context(self._seeded(device))
            watch.began = time.perf_counter()
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(max_new_tokens),
                stopping_criteria=[watch],
                assistant_model=self.assistant.model if self.assistant is not None else None,
            )
            rows = output[:, width:].tolist()
            watch.ended = time.perf_counter()
        return rows, watch

    def _check_context(self, positions: int) -> None:
        """Raise MethodError where the assistant's context is shorter than the longest answer needs."""
        if self.assistant is not None and positions > self.assistant.max_positions:
            raise MethodError(
                f"the assistant's context of {self.assistant.max_positions} tokens is shorter than a prompt with its "
                f"new tokens ({positions})"
            )

    def _compile(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Let the library compile its forward for a batch of a new size, or for a longer cache, before times count.

        It keeps the longest length of its caches, so that shorter answers run the same code.
        """
        self._longest = max(self._longest, max(map(len, prompts)) + max_new_tokens)
        shape = len(prompts), self._longest
        if shape not in self._compiled:
            self._compiled.add(shape)
            self._run(prompts, max_new_tokens)

    def _padding(self) -> int:
        """Return a padding token; any will do, since the attention mask hides it."""
        padding = getattr(self.teacher.tokenizer, "pad_token_id", None)
        if padding is not None:
            return int(padding)
        return self.teacher.eos_token_ids[0] if self.teacher.eos_token_ids else 0

    def _config(self, max_new_tokens: int) -> Any:
        from transformers import GenerationConfig

        options: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            options = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.static:
            options["cache_implementation"] = "static"
        if self.early_exit is not None:
            options["assistant_early_exit"] = self.early_exit
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=list(self.teacher.eos_token_ids) or None,
            pad_token_id=self._padding(),
            use_cache=True,
            **options,
        )

    @contextmanager
    def _seeded(self, device: torch.device) -> Iterator[None]:
        """Seed torch's global generator, from which `generate` samples, and restore it afterwards."""
        if not self.temperature:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            self._seed += 1
            yield

    def _generation(self, prompt: Sequence[int], row: list[int], growth: list[int], **shared: Any) -> Generation:
        """Return a sequence's answer. `shared`: fields that the sequences of a batch have in common."""
        ends = [index for index, token in enumerate(row) if token in self.teacher.eos_token_ids]
        tokens = row[: ends[0] + 1] if ends else row
        lengths = accepted_lengths(growth, len(tokens))
        tokenizer = self.teacher.tokenizer
        return Generation(
            prompt_tokens=len(prompt),
            token_ids=tokens,
            steps=len(lengths),
            accepted_lengths=lengths,
            finish_reason="eos" if ends else "length",
            text=tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else "",
            **shared,
        )


def accepted_lengths(growth: Sequence[int], tokens: int) -> list[int]:
    """Return the tokens of each decoding step of an answer of `tokens` tokens.

    Args:
        growth: tokens by which each forward of the teacher lengthened the sequence. The first token of the first one is
            prefill's; those after the answer's end do not count.
    """
    lengths, left = [], tokens - 1
    for number, length in enumerate(growth):
        emitted = min(length - (number == 0), left)
        if emitted > 0:
            lengths.append(emitted)
            left -= emitted
    return lengths


class _Watch:
    """Stopping criterion that never stops: it records times, and the sequences' length after each of the teacher's
    forwards. The library calls it for the teacher only, not for an assistant's drafts.

    Attributes:
        lengths: of the padded sequences. began, ended: times of the call.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths: list[int] = []
        self.began = self.ended = self._first_token = self._forward_began = 0.0
        self._prompt_read: float | None = None
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.lengths:
            self._first_token = self._now()
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def prefill_seconds(self) -> float:
        """Time until the first new token is chosen, without that of drafting."""
        return self._first_token - self.began - self._draft_seconds

    @property
    def decode_seconds(self) -> float:
        """Time of drafting, and of all after the first new token."""
        return self.ended - self._first_token + self._draft_seconds

    @property
    def _draft_seconds(self) -> float:
        """Time of the first draft: between the assistant's forward over the prompt and the teacher's."""
        return 0.0 if self._prompt_read is None else max(0.0, self._forward_began - self._prompt_read)

    @contextmanager
    def drafting(self, *models: Any) -> Iterator[None]:
        """Record the times of the first draft: of forwards up to the first new token, the last one is the teacher's."""
        hooks = [model.register_forward_pre_hook(self._begin) for model in models]
        hooks += [model.register_forward_hook(self._end) for model in models]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, *_: Any) -> None:
        if not self.lengths:
            self._forward_began = self._now()

    def _end(self, *_: Any) -> None:
        if self._prompt_read is None:
            self._prompt_read = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def _bare_generation(model: Any) -> Iterator[None]:
    """Remove the model's generation config for the duration, but for the settings of assisted generation: `generate`
    takes unset options (penalties, suppressed tokens) from it.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in ASSISTANT_SETTINGS}
    model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def kept_depth(model: Any) -> Iterator[Any]:
    """Give the config whose number of layers is lowered for an early exit, and restore it, after errors too."""
    config = model.base_model.config
    depth = config.num_hidden_layers
    try:
        yield config
    finally:
        config.num_hidden_layers = depth


@torch.inference_mode()
def exits_early(teacher: Teacher, layer: int) -> bool:
    """Return True where a forward whose config is lowered to `layer` layers does not run the last one."""
    ran: list[bool] = []
    hook = teacher.layers[-1].register_forward_hook(lambda *_: ran.append(True))
    try:
        with kept_depth(teacher.model) as config:
            config.num_hidden_layers = layer
            teacher.model(torch.zeros(1, 2, dtype=torch.long, device=teacher.device), use_cache=False)
    finally:
        hook.remove()
    return not ran
