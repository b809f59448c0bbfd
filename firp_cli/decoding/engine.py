"""The decoding loop: plain, or by draft trees; greedy or sampled; one or several sequences; any device.

The host launches steps, reads what they emitted a few steps later, and decides only when to stop (decoding/step.py has
what the device does). On CUDA devices steps are captured as graphs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firp_cli.decoding.accept import Sampler
from firp_cli.decoding.graphs import CudaCapture, StepGraphs, bucket
from firp_cli.decoding.memory import check_fits
from firp_cli.decoding.ring import Rows
from firp_cli.decoding.sequences import OnTokens, Writer, Written, check_prompts
from firp_cli.decoding.step import Stepper, cache_shape
from firp_cli.decoding.tree import TreeSpec, default_tree
from firp_cli.errors import UsageError
from firp_cli.predictors.base import Predictor
from firp_cli.records import Generation
from firp_cli.teacher.attention import choose_backend
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.stack import Teacher

CAPACITY_STEP = 1024  # positions
READ_EVERY = 4  # steps between two reads on a device that runs ahead of the host


@dataclass(frozen=True)
class EngineOptions:
    """How steps are run; what they emit does not depend on it.

    Attributes:
        attention: `sdpa`, `triton`, or `auto` (the kernel on CUDA devices that have Triton).
        graphs: capture steps on CUDA devices.
        read_every: steps between two reads; None: READ_EVERY on CUDA devices, 1 elsewhere.
        prefill_chunk: prompt tokens per forward.

    Raises UsageError.
    """

    attention: str = "auto"
    graphs: bool = True
    read_every: int | None = None
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("read_every", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")


class Engine:
    """Decodes prompts with a teacher and, if given, a predictor's draft trees.

    Args:
        tree: None takes the default. temperature: 0 is greedy. top_p: applied after temperature, as transformers does.

    Raises UsageError, TeacherError on options that cannot be.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor | None = None,
        tree: TreeSpec | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        options: EngineOptions | None = None,
    ) -> None:
        self.teacher = teacher
        self.predictor = predictor
        self.tree = tree or (default_tree(None, predictor) if predictor else None)
        self._spawn = predictor.spawner() if predictor else None
        self.options = options = options or EngineOptions()
        self.sampler = Sampler(temperature, top_p, seed, teacher.device)
        device = teacher.device
        self._kernel = choose_backend(options.attention, device) == "triton"
        on_cuda = device.type == "cuda"
        self._every = options.read_every or (READ_EVERY if on_cuda else 1)
        self.graphs: StepGraphs | None = None
        if on_cuda and options.graphs:
            self.graphs = StepGraphs(CudaCapture(device, [] if self.sampler.greedy else [self.sampler.generator]))
        self._kept: Stepper | None = None  # graphs hold the addresses of its tensors

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Decode the prompts (token ids) as one batch; sequences that finish leave it.

        A sequence ends with an EOS token (kept), once its text holds a string of `stop`, or after `max_new_tokens`.
        `decode_seconds` runs from the end of the batch's prefill to when the host learned of the sequence's end.

        Raises CapacityError when a prompt and its answer exceed the teacher's context or the device's memory,
        UsageError on an empty prompt.
        """
        check_prompts(self.teacher, prompts, max_new_tokens)
        writer = Writer(self.teacher, max_new_tokens, stop, on_tokens)
        began = time.perf_counter()
        sequences = [Written(number, len(prompt), len(prompt) - 1) for number, prompt in enumerate(prompts)]
        stepper = self._stepper(len(prompts), max(map(len, prompts)) + max_new_tokens)
        stepper.prefill([list(prompt) for prompt in prompts], self.options.prefill_chunk)
        stepper.step(max(map(len, prompts)) - 1, drafted=False)
        live = list(sequences)
        for _, rows in stepper.ring.launched(live, drain=True):
            self._write(live, rows, writer, prefill=True)
        prefilled = time.perf_counter()
        while live := self._leave(stepper, live):
            self._launch(stepper, live)
            for held, rows in stepper.ring.launched(live):
                unfinished = [item for item in held if not item.finish_reason]
                self._write(held, rows, writer)
                now = time.perf_counter()
                for item in unfinished:
                    item.decode_seconds = now - prefilled
        return [writer.generation(item, prefilled - began) for item in sequences]

    def cache_bytes(self, batch: int, longest_prompt: int, max_new_tokens: int) -> int:
        """Memory of the K/V cache that such a batch allocates beforehand."""
        capacity = self._capacity(longest_prompt + max_new_tokens)
        return KVCache.bytes_needed(**cache_shape(self.teacher, self.predictor, self.tree, batch, capacity))

    def _capacity(self, positions: int) -> int:
        """Positions to allocate: with graphs somewhat more, so that the next batches fit as well."""
        return positions if self.graphs is None else -(-positions // CAPACITY_STEP) * CAPACITY_STEP

    def _stepper(self, batch: int, positions: int) -> Stepper:
        """The device's side for a batch: the last one's, whose graphs are captured, where it is large enough."""
        if self._kept is not None and batch <= self._kept.most and positions <= self._kept.capacity:
            return self._kept
        if self._kept is not None:
            batch, positions = max(batch, self._kept.most), max(positions, self._kept.capacity)
            self._kept = None
            if self.graphs is not None:
                self.graphs.forget()
        capacity = self._capacity(positions)
        shape = cache_shape(self.teacher, self.predictor, self.tree, batch, capacity)
        check_fits(KVCache.bytes_needed(**shape), batch, capacity, self.teacher.device)
        stepper = Stepper(
            self.teacher,
            self.predictor,
            self.tree,
            self.sampler,
            batch,
            capacity,
            self._every,
            self._kernel,
            self._spawn,
        )
        if self.graphs is not None:
            self._kept = stepper
        return stepper

    def _launch(self, stepper: Stepper, live: list[Written]) -> None:
        """Start the next step of all sequences, behind those that the host has not read yet."""
        ahead = stepper.ring.unread * stepper.width
        longest = min(max(item.committed for item in live) + ahead, stepper.capacity)
        drafted = self.predictor is not None
        if self.graphs is None:
            stepper.step(longest, drafted, exact=not ahead and len(live) == 1)
            return
        longest = min(bucket(longest), stepper.capacity)
        self.graphs.run((drafted, stepper.batch, longest), lambda: stepper.step(longest, drafted))

    def _leave(self, stepper: Stepper, live: list[Written]) -> list[Written]:
        """The sequences that are still decoded. Graphs are captured per batch size, so with them the finished ones
        leave when half of the batch has.
        """
        keep = [place for place, item in enumerate(live) if not item.finish_reason]
        if not keep:
            return []
        if len(keep) == len(live) or (self.graphs is not None and 2 * len(keep) > len(live)):
            return live
        stepper.select(torch.tensor(keep, device=self.teacher.device))
        return [live[place] for place in keep]

    def _write(self, held: list[Written], rows: Rows, writer: Writer, prefill: bool = False) -> None:
        """What steps emitted, for the sequences that the batch held then: cut, count, hand on."""
        for step in rows:
            for item, (count, *emitted) in zip(held, step, strict=False):  # a ring's row has room for more
                item.committed += count + 1
                if item.finish_reason:
                    continue  # decoded on until it left
                kept = writer.write(item, emitted[: count + 1], count)
                if not prefill:
                    item.accepted_lengths.append(count + 1)
                    item.emitted.append(kept)
