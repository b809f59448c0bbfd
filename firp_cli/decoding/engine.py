"""The decoding loop: plain, or by draft trees; greedy or sampled; one or several sequences; any device.

The host launches steps, reads what they emitted a few steps later, and decides only when to stop (decoding/step.py has
what the device does). On CUDA devices steps are captured as graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.cuda_graphs import CudaCapture, StepGraphs
from firp_cli.decoding.fallback import PlainFallback, tree_fallback
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.sequences import OnTokens, OutputSequence, Writer, check_fits, check_prompts
from firp_cli.decoding.step import DecodeStep, cache_shape, step_width
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec, default_tree
from firp_cli.errors import UsageError
from firp_cli.predictors.base import Predictor, PseudoStateMaker
from firp_cli.results import Generation
from firp_cli.teacher.attention import BACKENDS, choose_backend
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.teacher import Teacher

CAPACITY_STEP = 1024  # positions
READ_EVERY = 1  # steps between two reads on a device that runs ahead of the host: it reads one step behind


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
        if self.attention not in BACKENDS:
            raise UsageError(f"unknown attention {self.attention!r}: choose from {', '.join(BACKENDS)}")
        for name in ("read_every", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Plan:
    """What a batch's steps are made with; without a predictor they decode plainly.

    Attributes:
        predictor: of the draft steps that the tree needs. make_pseudo_states: its maps, made ready for decoding.
        ratio: what a drafted step was foretold to cost in plain ones.
    """

    predictor: Predictor | None = None
    tree: TreeSpec | None = None
    make_pseudo_states: PseudoStateMaker | None = None
    ratio: float | None = None


class Engine:
    """Decodes prompts with a teacher and, if given, a predictor's draft trees.

    Args:
        tree: None takes the default. Of tuned trees every batch takes its own.
        temperature: 0 is greedy. top_p: applied after temperature, as transformers does.
        guard: decode plainly for a while where drafting does not pay. What it learns it keeps from call to call.

    Raises UsageError, TeacherError on options that cannot be.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor | None = None,
        tree: TreeSpec | TunedTrees | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        options: EngineOptions | None = None,
        guard: bool = False,
    ) -> None:
        teacher.need_whole("decoding")
        self.teacher = teacher
        self.predictor = predictor
        self.tree = tree or (default_tree(None, predictor) if predictor else None)
        self.options = options = options or EngineOptions()
        self.sampler = Sampler(temperature, top_p, seed, teacher.device)
        self.clock: Callable[[], float] = time.perf_counter  # seconds; what a guard goes by
        device = teacher.device
        self._kernel = choose_backend(options.attention, device) == "triton"
        on_cuda = device.type == "cuda"
        self._every = options.read_every or (READ_EVERY if on_cuda else 1)
        self.graphs: StepGraphs | None = None
        if on_cuda and options.graphs:
            self.graphs = StepGraphs(CudaCapture(device, [] if self.sampler.greedy else [self.sampler.generator]))
        self.kept: DecodeStep | None = None  # graphs hold the addresses of its tensors
        self._limited: dict[int, tuple[Predictor, PseudoStateMaker]] = {}  # by draft steps
        self._guarded = guard
        self._guards: dict[tuple[TreeSpec, int], PlainFallback] = {}

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
        began = self.clock()
        sequences = [OutputSequence(number, len(prompt), len(prompt) - 1) for number, prompt in enumerate(prompts)]
        longest = max(map(len, prompts))
        plan = self.plan(len(prompts), longest, max_new_tokens)
        stepper = self.stepper(plan, len(prompts), longest + max_new_tokens)
        run = DecodeBatch(stepper, sequences, writer, self.graphs, self._guards_of(plan), self.clock)
        run.prefill(prompts, self.options.prefill_chunk)
        while run.leave():
            run.advance()
        stepper.ring.reset()  # waits for steps behind all ends: the next call's time is its own
        return [writer.generation(item, run.prefilled - began) for item in sequences]

    def plan(self, batch: int, longest_prompt: int, max_new_tokens: int) -> Plan:
        """What a batch's steps are made with: of tuned trees the one for its size and its middle length."""
        if not isinstance(self.tree, TunedTrees):
            return self.plan_of(self.tree)
        context = longest_prompt + max_new_tokens // 2
        entry = self.tree.entry(batch, context)
        foretold = entry.predicted if entry and entry.batch_size.bit_length() == batch.bit_length() else None
        ratio = foretold.step_milliseconds / foretold.ar_milliseconds if foretold else None
        return self.plan_of(self.tree.at(batch, context), ratio)

    def plan_of(self, tree: TreeSpec | None, ratio: float | None = None) -> Plan:
        """What steps with this tree are made with."""
        if self.predictor is None or tree is None or tree.kind == "none":
            return Plan()
        steps = tree.drafting(self.predictor.steps)
        if steps not in self._limited:
            predictor = self.predictor.first(steps)
            self._limited[steps] = predictor, predictor.pseudo_state_maker()
        predictor, make_pseudo_states = self._limited[steps]
        return Plan(predictor, tree, make_pseudo_states, ratio)

    def cache_bytes(self, batch: int, longest_prompt: int, max_new_tokens: int) -> int:
        """Memory of the K/V cache that such a batch allocates beforehand."""
        plan = self.plan(batch, longest_prompt, max_new_tokens)
        capacity = self._capacity(longest_prompt + max_new_tokens)
        return KVCache.bytes_needed(**cache_shape(self.teacher, plan.predictor, plan.tree, batch, capacity))

    def ahead(self, plan: Plan) -> int:
        """Positions that the device may write before the host has read any: two groups of steps, and one."""
        return (2 * self._every + 1) * step_width(plan.predictor, plan.tree)

    def _capacity(self, positions: int) -> int:
        """Positions to allocate: with graphs somewhat more, so that the next batches fit as well."""
        return positions if self.graphs is None else -(-positions // CAPACITY_STEP) * CAPACITY_STEP

    def stepper(self, plan: Plan, batch: int, positions: int) -> DecodeStep:
        """The device's side for a batch: the last one's, whose graphs are captured, where it has the same tree and is
        large enough. Raises CapacityError.
        """
        kept, self.kept = self.kept, None
        if kept is not None and kept.tree == plan.tree:
            if batch <= kept.most and positions <= kept.capacity:
                self.kept = kept
                return kept
            batch, positions = max(batch, kept.most), max(positions, kept.capacity)
        if kept is not None and self.graphs is not None:
            self.graphs.forget()
        del kept  # its memory is free for the new one
        capacity = self._capacity(positions)
        shape = cache_shape(self.teacher, plan.predictor, plan.tree, batch, capacity)
        check_fits(KVCache.bytes_needed(**shape), batch, capacity, self.teacher.device)
        stepper = DecodeStep(
            self.teacher,
            plan.predictor,
            plan.tree,
            self.sampler,
            batch,
            capacity,
            self._every,
            self._kernel,
            plan.make_pseudo_states,
        )
        if self.graphs is not None:
            self.kept = stepper
        return stepper

    def _guards_of(self, plan: Plan) -> Callable[[int], PlainFallback] | None:
        """The guards of a plan's tree, by batch size: one for sizes up to twice as large, since what a step costs
        differs from one to the other.
        """
        tree = plan.tree
        if not self._guarded or tree is None:
            return None

        def guard(batch: int) -> PlainFallback:
            size = batch.bit_length()
            if (tree, size) not in self._guards:
                self._guards[tree, size] = tree_fallback(plan.ratio)
            return self._guards[tree, size]

        return guard
