"""A decoding step: its mask over the cache, attention, and the memory that a step allocates and moves."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.sampling import Sampler, largest
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import TeacherError
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft, most_probable_tokens
from firp_cli.predictors.forward import forward_rows
from firp_cli.teacher.attention import BACKENDS, attend, choose_backend
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import KernelMask, TreeRows, pseudo_positions, rows_allowed, step_mask
from firp_cli.teacher.teacher import Teacher
from helpers.launches import Launches
from helpers.models import VOCABULARY, generate_reference, make_predictor, random_prompts, tiny_teacher
from helpers.pairwise import covered, nightly_rest
from helpers.trees import foreseen, torch_accept, torch_build

CPU = torch.device("cpu")
SECTIONS: dict[str, dict[str, Any] | None] = {
    "ar": None,
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    "medusa": {"kind": "medusa", "steps": 3},
}
sections = pytest.mark.parametrize("section", list(SECTIONS))
SECTIONS["coupled"] = {"kind": "firp_plus", "layer": 2, "steps": 3, "coupling": {"form": "recurrent", "candidates": 20}}


@cache
def step_mask_case() -> tuple[Tensor, Tensor, Tensor]:
    """Return a mask among rows (B, M, M), positions (B, M) and prefix lengths (B,): none, some, all slots in view."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.rand(3, 5, 5, generator=generator) > 0.5
    lengths = torch.tensor([9, 0, 4])
    return rows, lengths[:, None] + torch.tensor([0, 1, 1, 2, 3]), lengths


@pytest.mark.parametrize(
    ("window", "present", "dtype"), covered([None, 1, 3, 6, 50], [1, 3, 5], [torch.float32, torch.bfloat16])
)
def test_step_mask_is_the_element_wise_rule(window: int | None, present: int, dtype: torch.dtype) -> None:
    """A row sees the committed prefix and its part of the rows, both no further back than the window."""
    rows, positions, lengths = step_mask_case()
    mask = step_mask(rows, positions, lengths, torch.arange(9), dtype).at(window, present)
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.dtype) == ((3, 1, present, 5 + 9), dtype)
    for b in range(3):
        for query in range(present):
            for key in range(5 + 9):
                position = int(positions[b, key]) if key < 5 else key - 5
                seen = bool(rows[b, query, key]) if key < 5 else position < int(lengths[b])
                if window is not None:
                    seen = seen and int(positions[b, query]) - position < window
                assert float(mask[b, 0, query, key]) == (0.0 if seen else torch.finfo(dtype).min), (b, query, key)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("present", [1, 5])
def test_exact_lengths_give_the_same_mask(window: int | None, present: int) -> None:
    """Every sequence is as long as the view, so the mask needs no lengths."""
    rows, positions, lengths = step_mask_case()
    positions, lengths = positions - lengths[:, None] + 9, torch.full_like(lengths, 9)
    masks = [
        step_mask(rows, positions, lengths, torch.arange(9), torch.float32, exact=exact) for exact in (True, False)
    ]
    first, second = (mask.at(window, present) for mask in masks)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    assert torch.equal(first, second)


def test_step_mask_serves_layers_with_and_without_window() -> None:
    rows, positions, lengths = step_mask_case()
    mask = step_mask(rows, positions, lengths, torch.arange(9), torch.float32)
    fresh = {window: step_mask(rows, positions, lengths, torch.arange(9), torch.float32) for window in (None, 3)}
    for window in (None, 3, None, 3):
        for present in (2, 5, 4):
            assert torch.equal(mask.at(window, present), fresh[window].at(window, present))  # type: ignore[arg-type]
    assert not torch.equal(mask.at(None, 5), mask.at(3, 5))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("present", [2, 5])
def test_kernel_rows_equal_the_dense_mask(window: int | None, present: int) -> None:
    rows, positions, lengths = step_mask_case()
    mask = KernelMask(rows, positions, lengths, 9)
    tree_rows = mask.at(window, present)
    assert mask.at(window, present) is tree_rows, "made once, for all layers"
    dense = step_mask(rows, positions, lengths, torch.arange(9), torch.float32).at(window, present)
    assert isinstance(tree_rows, TreeRows)
    assert isinstance(dense, Tensor)
    assert (tree_rows.scratch, tree_rows.longest, tree_rows.window) == (5, 9, window)
    assert torch.equal(tree_rows.lengths, lengths)
    assert torch.equal(tree_rows.positions, positions[:, :present])
    assert tree_rows.bits.is_contiguous()
    assert tree_rows.positions.is_contiguous() or window is None
    assert (tree_rows.bits.shape, tree_rows.bits.dtype) == ((3, present, 1), torch.int32)
    seen = (tree_rows.bits >> torch.arange(5)) & 1
    assert torch.equal(seen == 1, dense[:, 0, :, :5] == 0)
    whole = KernelMask(rows, positions, lengths, 9).at(None, 5).bits
    given = KernelMask(None, positions, lengths, 9, whole).at(window, 5).bits
    assert torch.equal(given[:, :present], tree_rows.bits)
    assert (given is whole) == (window in (None, 5)), "a window of all rows hides none"


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_is_the_definition(heads: tuple[int, int], scaling: float | None) -> None:
    """Query head h reads key head h // group; one query, head and sequence at a time, in float64."""
    torch.manual_seed(0)
    batch, rows, slots, size = 2, 3, 7, 8
    queries = torch.randn(batch, heads[0], rows, size)
    keys, values = torch.randn(2, batch, heads[1], slots, size)
    seen = torch.rand(batch, 1, rows, slots) > 0.4
    seen[..., 0] = True
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for mask in (additive, None):
        got = attend(queries, keys, values, mask, scaling)
        for b in range(batch):
            for head in range(heads[0]):
                group = head // (heads[0] // heads[1])
                for row in range(rows):
                    scores = keys[b, group].double() @ queries[b, head, row].double()
                    scores = scores * (size**-0.5 if scaling is None else scaling)
                    if mask is not None:
                        scores[~seen[b, 0, row]] = -torch.inf
                    expected = scores.softmax(0) @ values[b, group].double()
                    torch.testing.assert_close(got[b, head, row].double(), expected, rtol=1e-5, atol=1e-5)


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU) == choose_backend("sdpa", CPU) == "sdpa"
    with pytest.raises(TeacherError, match=f"unknown attention 'flash': choose from {', '.join(BACKENDS)}"):
        choose_backend("flash", CPU)
    with pytest.raises(TeacherError, match="CUDA devices"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        choose_backend("triton", CPU)
    cuda = torch.device("cuda")
    for installed, chosen in ((True, "triton"), (False, "sdpa")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, spec=installed: spec or None)
        assert choose_backend("auto", cuda) == chosen
        assert choose_backend("sdpa", cuda) == "sdpa"
    with pytest.raises(TeacherError, match=r"pip install 'firp\[triton\]'"):
        choose_backend("triton", cuda)


@pytest.mark.parametrize("layers", [(2, 2, 2), (1, 3, 3)])
@torch.no_grad()
def test_pseudo_rows_do_not_depend_on_other_anchors(any_stack: str, layers: tuple[int, ...]) -> None:
    """Real rows see no pseudo rows, and a node's pseudo rows none of another node."""
    teacher = tiny_teacher("mistral-window", any_stack == "lean")
    predictor = make_predictor(teacher, kind="hidden_transfer", layers=list(layers))
    ids = torch.tensor(random_prompts(2, seed=3, low=16, high=16))
    anchors = torch.tensor([[0, 7, 15], [4, 5, 15]])
    every = torch.arange(16).expand(2, -1)
    real, pseudo = rows_of(teacher, predictor, ids, every)
    some_real, some_pseudo = rows_of(teacher, predictor, ids, anchors)
    torch.testing.assert_close(some_real, real, rtol=1e-4, atol=1e-4)
    picked = pseudo.gather(2, anchors[:, None, :, None].expand(-1, 3, -1, pseudo.shape[3]))
    torch.testing.assert_close(some_pseudo, picked, rtol=1e-4, atol=1e-4)


def rows_of(teacher: Teacher, predictor: TreePredictor, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return real rows and pseudo states of one step over an empty prefix, a chain of nodes."""
    batch, count = ids.shape
    rows = rows_allowed(torch.ones(count, count, dtype=torch.bool).tril().expand(batch, -1, -1), anchors, 3)
    positions = torch.arange(count).expand(batch, -1)
    positions = torch.cat([positions, pseudo_positions(positions, anchors, 3)], dim=1)
    present = rows.shape[1]
    setup = DraftSetup.of(predictor, parse_tree(f"dynamic:{count}", 3))
    cache = KVCache(**setup.shape.cache(teacher, batch, capacity=1), device=CPU)
    cache.begin(present, 0)
    real, pseudo = forward_rows(
        teacher,
        teacher.embed(ids),
        positions,
        step_mask(rows, positions, cache.lengths, cache.prefix_slots(0), torch.float32),
        transfer_layers=predictor.transfer_layers,
        make_pseudo_states=predictor.make_pseudo_states,
        anchors=anchors,
        cache=cache,
    )
    assert pseudo is not None
    return real, pseudo


def new_stepper(
    teacher: Teacher, section: str, batch: int, capacity: int, tree: str = "dynamic:5", kernel: bool = False
) -> DecodeStep:
    """Return a stepper after the prefill and the first two steps of prompts of five tokens."""
    given = SECTIONS[section]
    predictor = make_predictor(teacher, **given) if given else None
    setup = DraftSetup.of(predictor, parse_tree(tree, predictor.steps)) if predictor else DraftSetup()
    stepper = DecodeStep(teacher, setup, Sampler(0.0, 1.0, 0, CPU), batch, capacity, kernel)
    stepper.prefill(random_prompts(batch, seed=5, low=5, high=5), 512)
    stepper.step(4, "drafted", first=True)
    stepper.step(8, "drafted")
    return stepper


def largest_allocation(work: Callable[[], object]) -> int:
    """Return the bytes of the largest block that is allocated during `work`, also inside operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def test_largest_allocation_sees_inside_operations() -> None:
    assert largest_allocation(lambda: torch.zeros(1000, 10)) == 40_000
    rows = torch.zeros(100, 64)
    assert largest_allocation(lambda: (rows.t().contiguous().sum(), rows.new_zeros(3))) == 25_600
    scattered = torch.zeros(300, 300).t()[::2]
    assert largest_allocation(lambda: torch.nn.functional.layer_norm(scattered, (300,))) >= 180_000


@pytest.mark.parametrize(
    ("section", "family", "stack", "batch"),
    covered(list(SECTIONS), ["llama", "mistral-window"], ["lean", "library"], [1, 3]),
)
@torch.inference_mode()
def test_step_copies_no_cache(section: str, family: str, stack: str, batch: int) -> None:
    """No allocation of a step grows with the cache's capacity."""
    stepper = new_stepper(tiny_teacher(family, stack == "lean"), section, batch, capacity=4000)
    layer = stepper.cache.bytes() // (2 * stepper.teacher.num_layers)
    assert largest_allocation(lambda: stepper.step(12, "drafted")) < layer // 10


@pytest.mark.parametrize(("section", "family", "batch"), covered(list(SECTIONS), ["llama", "mistral-window"], [1, 3]))
@torch.inference_mode()
def test_lean_step_copies_no_prefix(section: str, family: str, batch: int) -> None:
    """With thousands of tokens in view no allocation is as large as a layer's keys: grouped heads are not repeated."""
    stepper = new_stepper(tiny_teacher(family, lean=True), section, batch, capacity=4000, tree="dynamic:2")
    keys = 4 * 3900 * batch * stepper.teacher.kv_heads * stepper.teacher.head_size
    stepper.cache.set_lengths(torch.full((batch,), 3900))
    assert largest_allocation(lambda: stepper.step(3900, "drafted")) < keys


@torch.inference_mode()
def test_select_copies_one_layer_at_a_time() -> None:
    stepper = new_stepper(tiny_teacher("llama", lean=True), "firp", 4, capacity=1000)
    largest = largest_allocation(lambda: stepper.select(torch.tensor([0, 3])))
    assert largest <= stepper.cache.bytes() // stepper.teacher.num_layers // 2


def addresses(stepper: DecodeStep) -> list[int]:
    keys, values = stepper.cache.update(*torch.zeros(2, 1, stepper.teacher.kv_heads, 0, stepper.teacher.head_size), 0)
    state = (keys, values, stepper.cache.lengths, stepper._root, stepper._draft.tokens, stepper._draft.log_probs)
    return [tensor.data_ptr() for tensor in (*state, stepper.output.row)]


@sections
@torch.inference_mode()
def test_tensors_of_a_batch_keep_their_addresses(section: str) -> None:
    """During steps, when sequences leave, and for the next prompts: a captured step uses the same memory."""
    stepper = new_stepper(tiny_teacher("llama", lean=True), section, 3, capacity=64)

    def places() -> list[int]:
        stepper.cache.begin(1, 8)
        return addresses(stepper)

    first = places()
    stepper.step(12, "drafted")
    assert places() == first
    stepper.select(torch.tensor([0, 2]))
    stepper.step(16, "drafted")
    assert places() == first
    stepper.prefill(random_prompts(2, seed=6), 7)
    stepper.step(29, "drafted", first=True)
    assert places() == first


@sections
@torch.inference_mode()
def test_remaining_sequences_go_on_unchanged(section: str) -> None:
    """Roots, drafts and K/V move together: the remaining sequences emit the tokens of the whole batch."""
    teacher = tiny_teacher("qwen2-window", lean=True)
    whole, selected = (new_stepper(teacher, section, 4, capacity=120) for _ in range(2))
    kept = torch.tensor([1, 3])
    emitted: list[list[list[int]]] = [[], []]
    whole.output.launched(None)
    selected.output.launched(None)
    selected.select(kept)
    for _ in range(6):
        for rows, stepper in zip(emitted, (whole, selected), strict=True):
            stepper.step(100, "drafted")
            ((_, read),) = stepper.output.launched(None)
            rows.append(read)
    assert [[step[1], step[3]] for step in emitted[0]] == [step[:2] for step in emitted[1]]
    assert all(0 <= token < VOCABULARY for step in emitted[1] for row in step[:2] for token in row[1 : row[0] + 2])


@sections
@torch.inference_mode()
def test_equal_prompts_run_once(section: str) -> None:
    """Their batch goes on as that of prompts of which one differs, and prefill has the rows of one prompt."""
    teacher = tiny_teacher("qwen2-window", lean=True)
    stepper = new_stepper(teacher, section, 3, capacity=120)
    prompt, other = list(range(3, 40)), list(range(2, 39))
    rows: list[int] = []
    run = teacher.layers_between

    def noting(first: int, last: int, states: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(states.shape[0] * states.shape[1])
        return run(first, last, states, *rest)

    emitted = []
    for prompts in ([prompt] * 3, [prompt, other, prompt]):
        rows.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher, "layers_between", noting)
            stepper.prefill(prompts, 10)
        assert sum(rows) == 36 * (1 if prompts[1] == prompt else 3)
        assert stepper.cache.lengths.tolist() == [36] * 3
        stepper.step(36, "drafted", first=True)
        stepper.output.launched(None)
        read = []
        for _ in range(5):
            stepper.step(100, "drafted")
            read += [stepper.output.launched(None)[0][1]]
        emitted.append([[step[0], step[2]] for step in read])
    assert emitted[0] == emitted[1]


@sections
@torch.inference_mode()
def test_exact_length_needs_no_mask(section: str) -> None:
    """For one sequence of known length the step without a mask emits the masked step's tokens."""
    teacher = tiny_teacher("llama", lean=True)
    masked, exact = (new_stepper(teacher, section, 1, capacity=60) for _ in range(2))
    for stepper in (masked, exact):
        stepper.output.launched(None)
    for _ in range(8):
        length = int(masked.cache.lengths)
        masked.step(length + 5, "drafted")
        exact.step(length, "drafted", exact=True)
        assert masked.output.launched(None) == exact.output.launched(None)
        assert torch.equal(masked.cache.lengths, exact.cache.lengths)


# Launches of a step beside those of its layers, of which test_triton_layer.py counts each. A Triton kernel counts as
# one: its stand-in does. The largest logits are one launch more on a CUDA device.
LAUNCHES = {
    ("ar", "", 0.0): 7,
    ("firp", "chain", 0.0): 19,
    ("firp", "dynamic:8", 0.0): 18,
    ("firp", "dynamic:8", 0.7): 23,
    ("firp", "dynamic:8@3", 0.0): 19,
    ("hidden_transfer", "static:3x2@2", 0.0): 23,
    ("medusa", "dynamic:8", 0.0): 27,
    ("coupled", "dynamic:8@3", 0.0): 36,  # and four kernels for each depth (test_triton_coupling.py)
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("section", "tree", "temperature"), list(LAUNCHES))
@torch.no_grad()
def test_step_launches_no_more_kernels(
    section: str, tree: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step of a kind, whose constants exist."""
    teacher, given = tiny_teacher("llama", lean=True), SECTIONS[section]
    predictor = make_predictor(teacher, **given) if given else None
    engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps) if predictor else None)
    launches = Launches()  # a choice is Triton's search and merge, which mark rows without a token themselves
    monkeypatch.setattr("firp_cli.decoding.sampling.largest", launches.counting("largest", largest))
    stepper = DecodeStep(teacher, engine.setup(1, 20, 40), Sampler(temperature, 1.0, 0, CPU), 1, 60, kernel=True)
    monkeypatch.setattr(Teacher, "layers_between", lambda *given: launches.counted("layers", lambda: given[3]))
    monkeypatch.setattr(Teacher, "norm", lambda _, rows: launches.counted("norm", lambda: rows))
    for name, work in (("build_tree", torch_build), ("accept_tree", torch_accept)):  # one Triton kernel each
        monkeypatch.setattr(f"firp_cli.decoding.triton_tree.{name}", launches.counting(name, work))
    stepper.cache._kernel = False  # commits are one kernel (test_triton_commit.py), candidates two
    monkeypatch.setattr(KVCache, "commit", launches.counting("commit", KVCache.commit))

    def merged(*given: Any) -> Draft:
        launches.names.append("merged candidates")
        return most_probable_tokens(*given[:2])

    monkeypatch.setattr("firp_cli.predictors.base.most_probable_tokens", launches.counting("candidates", merged))
    stepper.step(20, "drafted")
    launches.names.clear()
    with launches:
        stepper.step(20, "drafted")
    names = [name for name in launches.names if name != "layers"]
    assert len(names) <= LAUNCHES[section, tree, temperature], names


DECODED = [("ar", "llama", "library"), ("firp", "mistral-window", "lean"), ("coupled", "llama", "lean")]


class TestDecodingByTheKernel:
    """Tests for the interpreter, in a separate process: Triton chooses it at its first import."""

    __test__ = os.environ.get("TRITON_INTERPRET") == "1"

    @pytest.mark.parametrize(
        ("section", "family", "stack"),
        nightly_rest(DECODED, ["ar", "firp", "coupled"], ["llama", "mistral-window"], ["lean", "library"]),
    )
    def test_tokens_are_those_of_generate(self, section: str, family: str, stack: str) -> None:
        given, teacher = SECTIONS[section], tiny_teacher(family, stack == "lean")
        predictor = make_predictor(teacher, **given) if given else None
        spec = parse_tree("dynamic:3@2", 3) if predictor else None
        prompts = [random_prompts(1, seed=7, low=length, high=length)[0] for length in (20, 3)]
        engine = Engine(teacher, predictor, spec, options=EngineOptions(attention="triton"))
        for prompt, item in zip(prompts, engine.generate(prompts, 5), strict=True):
            assert item.token_ids == generate_reference(teacher.model, prompt, 5)

    @pytest.mark.parametrize(
        ("section", "tree"),
        [
            ("firp", "chain@1"),
            pytest.param("medusa", "dynamic:6", marks=pytest.mark.nightly),
            pytest.param("firp", "dynamic:9", marks=pytest.mark.nightly),
            pytest.param("hidden_transfer", "dynamic:12@3", marks=pytest.mark.nightly),
            pytest.param("hidden_transfer", "static:3x2", marks=pytest.mark.nightly),
        ],
    )
    @torch.inference_mode()
    def test_steps_are_those_without_the_kernel(self, section: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With drafts that hold true tokens, so that paths of all lengths are accepted, also after one sequence left,
        and whether the head reads nodes and drafts in one pass or in two.
        """
        teacher = tiny_teacher("llama", lean=True)
        prompts = random_prompts(2, seed=33, low=5, high=9)
        texts = [generate_reference(teacher.model, prompt, 60, eos_token_id=-1) for prompt in prompts]
        steppers = [new_stepper(teacher, section, 2, 100, tree, kernel) for kernel in (False, True)]
        for stepper in steppers:
            stepper.prefill(prompts, 512)
            stepper.step(8, "drafted", first=True)
        emitted, counts = [1, 1], set()
        for seed in range(8):
            draft = foreseen(texts, emitted, 3, steppers[0]._breadth, seed)
            read = []
            for stepper in steppers:
                stepper.output.launched(None)
                stepper._one_pass = 1000 * (seed % 2)
                stepper._draft.tokens[: len(texts)].copy_(draft.tokens)
                stepper._draft.log_probs[: len(texts)].copy_(draft.log_probs)
                stepper.step(50, "drafted" if seed != 3 else "autoregressive")
                ((_, rows),) = stepper.output.launched(None)
                read.append([row[: row[0] + 2] for row in rows[: len(texts)]])
            assert read[0] == read[1]
            for one, other in zip(*(stepper.buffers() for stepper in steppers), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            for number, (count, *tokens) in enumerate(read[0]):
                counts.add(count)
                assert tokens == texts[number][emitted[number] :][: count + 1]
                emitted[number] += count + 1
            if seed == 5:
                texts, emitted = texts[1:], emitted[1:]
                for stepper in steppers:
                    stepper.select(torch.tensor([1]))
        assert counts >= {0, 1, 2}
