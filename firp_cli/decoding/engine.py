"""The decoding loop: autoregressive or with draft trees; greedy or sampled; one or several sequences; any device.

The host launches steps (decoding/step.py), reads the emitted tokens (decoding/batch.py), and only decides when to stop.
On CUDA devices steps are captured as graphs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from firp_cli.decoding.batch import DecodeBatch, halves
from firp_cli.decoding.cuda_graphs import SMALLEST_BUCKET, CudaCapture, StepGraphs, bucket
from firp_cli.decoding.fallback import UNKNOWN, AutoregressiveFallback, tree_fallback
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.sequences import Label, OnTokens, OutputSequence, Writer, check_prompts, prompt_label
from firp_cli.decoding.step import DecodeStep, Mode
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec, default_tree
from firp_cli.errors import NumericsError, UsageError
from firp_cli.machine import free_bytes
from firp_cli.predictors.base import PseudoStateMaker, TreePredictor
from firp_cli.results import Generation
from firp_cli.teacher.attention import BACKENDS, choose_backend
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.teacher import Teacher

CAPACITY_STEP = 1024  # positions
FREE_SHARE = 4  # buffers of another tree are kept beside the first ones where they take this part of the free memory


@dataclass(frozen=True)
class EngineOptions:
    """Execution of decoding steps. The emitted tokens do not depend on these options.

    Attributes:
        attention: `sdpa`, `triton`, or `auto` (the kernel on CUDA devices that have Triton).
        graphs: capture steps on CUDA devices.
        prefill_chunk: prompt tokens per forward.

    Raises UsageError.
    """

    attention: str = "auto"
    graphs: bool = True
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.attention not in BACKENDS:
            raise UsageError(f"unknown attention {self.attention!r}: choose from {', '.join(BACKENDS)}")
        if self.prefill_chunk < 1:
            raise UsageError(f"prefill_chunk must be at least 1, got {self.prefill_chunk}")


class Engine:
    """Decodes prompts with a teacher and, if given, a predictor's draft trees.

    Args:
        tree: None takes the default. With tuned trees every batch takes the one for its size and context.
        temperature: 0 is greedy. top_p: applied after temperature, as in transformers.
        guard: decode autoregressively while drafting is slower. The measured times are kept from call to call, for each
            tree and batch size. A fallback object decides for all of them.
        clock: seconds, for the fallback and the reported times.

    Raises UsageError, TeacherError on options that are not possible.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: TreePredictor | None = None,
        tree: TreeSpec | TunedTrees | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        options: EngineOptions | None = None,
        guard: bool | AutoregressiveFallback = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        teacher.need_whole("decoding")
        self.teacher = teacher
        self.predictor = predictor
        self.tree = tree or (default_tree(None, predictor) if predictor else None)
        self.options = options = options or EngineOptions()
        self.clock = clock
        device = teacher.device
        self._kernel = choose_backend(options.attention, device, teacher.own_masks) == "triton"
        self.sampler = Sampler(temperature, top_p, seed, device, self._kernel)
        self.graphs: StepGraphs | None = None
        if device.type == "cuda" and options.graphs:
            self.graphs = StepGraphs(CudaCapture(device, [] if self.sampler.greedy else [self.sampler.generator]))
        self._kept: dict[TreeSpec | None, DecodeStep] = {}  # graphs hold the addresses of their tensors
        self._limited: dict[int, tuple[TreePredictor, PseudoStateMaker]] = {}  # by draft steps
        self._guard = guard
        self.fallbacks: dict[tuple[TreeSpec, int], AutoregressiveFallback] = {}  # by tree and bits of the batch size

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
        label: Label = prompt_label,
    ) -> list[Generation]:
        """Decode the prompts (token ids) as one batch; sequences that finish leave it.

        A sequence ends with an EOS token (kept), when its text contains a string of `stop`, or after `max_new_tokens`.
        `decode_seconds` runs from the end of the batch's prefill until the host reads the sequence's end. `label` names
        a prompt in messages, by its place among these.

        Raises CapacityError when a prompt and its answer exceed the teacher's context or the device's memory,
        UsageError on an empty prompt, NumericsError where the teacher's logits are NaN or infinite.
        """
        check_prompts(self.teacher, prompts, max_new_tokens, label)
        writer = Writer(self.teacher, max_new_tokens, stop, on_tokens, label)
        began = self.clock()
        sequences = [OutputSequence(number, len(prompt), len(prompt) - 1) for number, prompt in enumerate(prompts)]
        longest = max(map(len, prompts))
        setup = self.setup(len(prompts), longest, max_new_tokens)
        stepper = self.stepper(setup, len(prompts), longest + max_new_tokens)
        run = DecodeBatch(stepper, sequences, writer, self.graphs, self._fallback(setup), self.clock)
        try:
            run.prefill(prompts, self.options.prefill_chunk)
            while run.leave():
                run.step(run.next_mode())
        except NumericsError:
            self.forget()  # the next batch must not see these K/V
            raise
        stepper.output.drain()  # waits for a step after all ends, so that the next call does not pay for it
        return [writer.generation(item, run.prefilled - began) for item in sequences]

    @property
    def attention(self) -> str:
        """Backend of attention under a step's mask: `triton` or `sdpa`."""
        return "triton" if self._kernel else "sdpa"

    @property
    def kept(self) -> DecodeStep | None:
        """Device side of the last batch, if it is kept."""
        return next(reversed(self._kept.values()), None)

    def forget(self) -> None:
        """Free the cache and the graphs that are kept for the next call."""
        self._kept.clear()
        if self.graphs is not None:
            self.graphs.forget()

    @torch.inference_mode()
    def capture(self, batch: int, longest_prompt: int, max_new_tokens: int) -> None:
        """Capture the steps of such a batch, of those with shorter prompts and of what remains of it, so that no answer
        takes the time of a capture. Does nothing without graphs. Raises CapacityError.
        """
        if self.graphs is None:
            return
        for setup in self._setups(batch, longest_prompt, max_new_tokens):
            self._capture(self.graphs, setup, batch, longest_prompt + max_new_tokens)

    def _setups(self, batch: int, longest_prompt: int, max_new_tokens: int) -> list[DraftSetup]:
        """Return the setups of such batches whose prompts have any length up to `longest_prompt`, that of the longest
        one at the end.
        """
        contexts = {entry.context for entry in self.tree.entries} if isinstance(self.tree, TunedTrees) else set()
        lengths = [context - max_new_tokens // 2 for context in contexts]
        made = [self.setup(batch, length, max_new_tokens) for length in lengths if 0 < length < longest_prompt]
        made = [self.setup(batch, 1, max_new_tokens), *made, self.setup(batch, longest_prompt, max_new_tokens)]
        return list({setup.tree: setup for setup in made}.values())

    def _capture(self, graphs: StepGraphs, setup: DraftSetup, batch: int, positions: int) -> None:
        """Capture the steps of a batch and of what remains of it."""
        stepper = self.stepper(setup, batch, positions)
        run = DecodeBatch(stepper, [], Writer(self.teacher, positions), graphs)
        modes: list[Mode] = ["drafted"] if setup.predictor else ["autoregressive"]
        if setup.predictor and self._guard is not False:
            modes.append("autoregressive")
        lengths = [stepper.capacity]
        while not stepper.kernel and lengths[-1] > SMALLEST_BUCKET:
            lengths.append(bucket(lengths[-1]) // 2)
        for size, mode, longest in itertools.product(halves(batch), modes, lengths):
            stepper.cache.use(size)
            for _ in range(2):  # the first run of a key is eager, the second one is captured
                run.replay(graphs, mode, longest)

    def setup(self, batch: int, longest_prompt: int, max_new_tokens: int) -> DraftSetup:
        """Return predictor, tree and sizes of a batch's steps. Of tuned trees it takes the one for the batch size and
        the mean context.
        """
        if not isinstance(self.tree, TunedTrees):
            return self.setup_of(self.tree)
        context = longest_prompt + max_new_tokens // 2
        entry = self.tree.entry(batch, context)
        predicted = entry.predicted if entry and entry.batch_size.bit_length() == batch.bit_length() else None
        ratio = predicted.step_milliseconds / predicted.ar_milliseconds if predicted else None
        return self.setup_of(self.tree.at(batch, context), ratio)

    def setup_of(self, tree: TreeSpec | None, ratio: float | None = None) -> DraftSetup:
        """Return predictor, tree and sizes of steps with this tree."""
        if self.predictor is None or tree is None or tree.kind == "none":
            return DraftSetup()
        steps = tree.drafting(self.predictor.steps)
        if steps not in self._limited:
            predictor = self.predictor.first_steps(steps).for_decoding(self.teacher)
            self._limited[steps] = predictor, predictor.pseudo_state_maker()
        predictor, make_pseudo_states = self._limited[steps]
        return DraftSetup.of(predictor, tree, make_pseudo_states, ratio)

    def stepper(self, setup: DraftSetup, batch: int, positions: int) -> DecodeStep:
        """Return the device side of a batch. With graphs it is kept, and serves later batches of the same tree that it
        is large enough for. Those of other trees stay beside it where memory is plentiful. Raises CapacityError.
        """
        kept = self._kept.pop(setup.tree, None)
        if kept is None or batch > kept.most or positions > kept.capacity:
            if kept is not None:
                batch, positions = max(batch, kept.most), max(positions, kept.capacity)
            capacity = self._capacity(positions)
            if kept is not None or self._crowded(setup, batch, capacity):
                self.forget()
            del kept  # its memory is free for the new one
            graphs = self.graphs is not None
            kept = DecodeStep(self.teacher, setup, self.sampler, batch, capacity, self._kernel, graphs)
        if self.graphs is not None:
            self.graphs.owner = setup.tree
            self._kept[setup.tree] = kept
        return kept

    def _crowded(self, setup: DraftSetup, batch: int, capacity: int) -> bool:
        """Return True where such buffers would take much of the memory that the kept ones leave free."""
        free = free_bytes(self.teacher.device) if self._kept else None
        needed = KVCache.bytes_needed(**setup.shape.cache(self.teacher, batch, capacity))
        return free is not None and FREE_SHARE * needed > free

    def cache_bytes(self, batch: int, longest_prompt: int, max_new_tokens: int) -> int:
        """Return the size of the K/V cache that such a batch allocates."""
        shape = self.setup(batch, longest_prompt, max_new_tokens).shape
        capacity = self._capacity(longest_prompt + max_new_tokens)
        return KVCache.bytes_needed(**shape.cache(self.teacher, batch, capacity))

    def _capacity(self, positions: int) -> int:
        """Return the positions to allocate: with graphs more than asked for, so that the next batches fit as well."""
        return positions if self.graphs is None else -(-positions // CAPACITY_STEP) * CAPACITY_STEP

    def _fallback(self, setup: DraftSetup) -> Callable[[int], AutoregressiveFallback] | None:
        """Return the fallbacks of a setup's tree, by batch size. Sizes up to twice as large share one: the cost of a
        step differs from size to size.
        """
        tree, guard = setup.tree, self._guard
        if guard is False or tree is None:
            return None

        def fallback(batch: int) -> AutoregressiveFallback:
            if isinstance(guard, AutoregressiveFallback):
                return guard
            size = batch.bit_length()
            if (tree, size) not in self.fallbacks:
                self.fallbacks[tree, size] = tree_fallback(setup.ratio or UNKNOWN)
            return self.fallbacks[tree, size]

        return fallback
