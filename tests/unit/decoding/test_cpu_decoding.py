"""Kernels around a step's forward on a CPU, against torch's operations: acceptance, the next draft, the K/V commit."""

from __future__ import annotations

import copy
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.decoding.accept import accept, next_draft
from firp_cli.decoding.cpu_accept import AcceptKernel
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_build import Tree, anchor_nodes, build, root_tree
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.draft_kernel import DraftKernel, DraftRows
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.packed_linear import PackedLinear, is_bfloat16
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import section
from helpers.models import HIDDEN, VOCABULARY, make_predictor, random_prompts, tiny_model, tiny_teacher
from helpers.pairwise import covered
from helpers.trees import random_draft

pytestmark = pytest.mark.skipif(cpu_kernels.missing() is not None, reason=f"no kernels: {cpu_kernels.missing()}")
CPU = torch.device("cpu")
SECTIONS: dict[str, dict[str, Any]] = {
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    "medusa": {"kind": "medusa", "steps": 3, "own_head": False},
    **{f"firp_plus-{form}": section("firp_plus", form) for form in ("mlp", "recurrent", "low_rank")},
    "medusa-coupled": section("medusa", "recurrent"),
}
TREES = ["dynamic:7", "dynamic:6/3@2", "dynamic:2", "static:3x2", "chain"]


def likely_targets(tree: Tree, generator: torch.Generator) -> Tensor:
    """Return targets (B, N) that follow some child of most nodes."""
    targets = torch.randint(VOCABULARY, tree.tokens.shape, generator=generator)
    for row in range(len(targets)):
        for child in torch.randperm(targets.shape[1] - 1, generator=generator).add(1).tolist():
            if torch.rand(1, generator=generator) < 0.8:
                targets[row, tree.parents[row, child]] = tree.tokens[row, child]
    return targets


def logits_of(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return logits (B, N, V) with these largest."""
    logits = torch.randn(*targets.shape, VOCABULARY, generator=generator)
    return logits.scatter(2, targets[:, :, None], 9.0)


@pytest.mark.parametrize(("spec", "batch", "anchors"), covered([*TREES, "none"], [1, 3], [None, 1, 2]))
def test_accepted_path_equals_torch(spec: str, batch: int, anchors: int | None) -> None:
    generator, tree_spec = torch.Generator().manual_seed(batch), parse_tree(spec, 3)
    for seed in range(10):
        draft, root = random_draft(batch, 3, VOCABULARY, 7, seed), torch.arange(batch)
        fake: Any = SimpleNamespace(parent_dependent=False, coupling=None)
        tree = root_tree(root) if spec == "none" else build(tree_spec, fake, draft, root)
        depth = 0 if spec == "none" else tree_spec.depth(3)
        if anchors is not None and (spec == "none" or tree.scores is None):
            pytest.skip("this tree has no chosen anchors")
        chosen = None if anchors is None else anchor_nodes(tree, anchors)
        targets, strides = likely_targets(tree, generator), (3, 1)
        roots, row = torch.zeros(5, dtype=torch.long), torch.zeros(5, depth + 2, dtype=torch.long)
        kernel = AcceptKernel(roots, row)
        expected = accept(tree, targets, depth)
        rows = next_draft(tree, expected, chosen, 3, strides)
        for given in (targets, logits_of(targets, generator)):
            roots.fill_(-1)
            taken, following = kernel(tree, given, depth, chosen, 3, strides)
            assert roots.tolist() == [*expected.bonus.tolist(), *[-1] * (5 - batch)]
            width = expected.tokens.shape[1]
            assert row[:batch, 0].equal(expected.count) and row[:batch, 1 : 1 + width].equal(expected.tokens)
            assert taken.kept.equal(expected.count + 1) and taken.path.equal(expected.path)
            assert following is not None and following.picks is not None and following.node.equal(expected.node)
            assert following.picks.equal(rows.picks)
            floor = torch.zeros(batch, 3) if rows.floor is None else rows.floor
            assert following.floor.equal(floor) and following.ahead.equal(rows.picks - 3 * rows.place[:, None])


@pytest.mark.parametrize("count", [1, 5, 16, 31, 96, 1003])
def test_largest_logit_equals_torch(count: int) -> None:
    """Of equal logits the first one is taken, as with `max`."""
    generator, roots, row = torch.Generator().manual_seed(count), torch.zeros(4, dtype=torch.long), torch.zeros(4, 2)
    kernel, tree = AcceptKernel(roots, row.long()), root_tree(torch.zeros(4, dtype=torch.long))
    for _ in range(20):
        logits = torch.randint(-5, 5, (4, 1, count), generator=generator).float()
        kernel(tree, logits, 0, None, 0, (1, 1))
        assert roots.equal((logits[:, 0] == logits.amax(-1)).int().argmax(-1))


def stepper_of(teacher: Teacher, predictor: TreePredictor, tree: str, batch: int, temperature: float) -> DecodeStep:
    setup = Engine(teacher, predictor, parse_tree(tree, predictor.steps)).setup(batch, 20, 20)
    return DecodeStep(teacher, setup, Sampler(temperature, 1.0, 0, CPU), batch, 80)


@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these flags are for x86")
@torch.inference_mode()
def test_steps_with_short_registers_equal_torch(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = cpu_kernels.load([flag])
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: other)
    teacher = wrap_model(copy.deepcopy(tiny_model("llama")), name="short", check=False)
    use_lean_layers(teacher)
    predictor = make_predictor(teacher, **SECTIONS["firp_plus-recurrent"])
    compare_steps(teacher, predictor, "dynamic:6/3@2", 3, 0.0)


@pytest.mark.parametrize("draft_tokens", [None, 40])
@pytest.mark.parametrize(("kind", "tree", "batch", "temperature"), covered(list(SECTIONS), TREES, [1, 3], [0.0, 0.7]))
@torch.inference_mode()
def test_steps_equal_torch(
    kind: str, tree: str, batch: int, temperature: float, draft_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher("llama", lean=True)
    predictor = make_predictor(teacher, **SECTIONS[kind])
    if draft_tokens is not None:
        predictor.draft_tokens = torch.randperm(VOCABULARY)[:draft_tokens].sort().values
    written: list[int] = []
    monkeypatch.setattr(DraftKernel, "write", counted(DraftKernel.write, written))
    compare_steps(teacher, predictor, tree, batch, temperature)
    assert len(written) == 6


def compare_steps(teacher: Teacher, predictor: TreePredictor, tree: str, batch: int, temperature: float) -> None:
    """Compare outputs, drafts, what the coupling reads, and K/V of six steps with those of torch's operations."""
    kernels, plain = (stepper_of(teacher, predictor, tree, batch, temperature) for _ in range(2))
    assert kernels.predictor is not None and kernels.predictor.kernel is not None
    plain._accept_kernel, plain.cache._packed = None, None
    prompts = random_prompts(batch, seed=2, low=4, high=9)
    longest = max(map(len, prompts)) - 1
    for number in range(6):
        for stepper in (kernels, plain):
            if not number:
                stepper.prefill([list(prompt) for prompt in prompts], 512)
            stepper.step(min(longest, 80), "drafted", first=not number)
        assert kernels.output.row.equal(plain.output.row)
        for got, expected in zip(kernels.buffers(), plain.buffers(), strict=True):
            if got.dtype == torch.long:
                assert got.equal(expected)
            else:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        for sequence, length in enumerate(plain.cache.lengths.tolist()):
            scratch = plain.cache.scratch
            got, expected = (
                stepper.cache._store[:, :, sequence, :, scratch : scratch + length] for stepper in (kernels, plain)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        longest += int(plain.output.row[:batch, 0].max()) + 1


def counted(function: Any, calls: list[int]) -> Any:
    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return counting


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@torch.inference_mode()
def test_states_that_are_not_numbers_draft_known_tokens(share: float) -> None:
    """NaN has no place in an order; whatever is drafted, the kernels stay within their memory."""
    teacher = tiny_teacher("llama", lean=True)
    predictor = make_predictor(teacher, **SECTIONS["firp_plus-recurrent"]).for_decoding(teacher)
    assert predictor.kernel is not None and predictor.coupling is not None
    generator = torch.Generator().manual_seed(3)
    states, logits = torch.randn(2, 3, HIDDEN, generator=generator), torch.randn(2, 3, VOCABULARY, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < share] = float("nan")
    context = torch.zeros(2, 3, predictor.coupling.context_columns)
    draft = Draft(torch.full((2, 3, 5), -1), torch.zeros(2, 3, 5), context)
    rows = DraftRows(torch.zeros(2, dtype=torch.long), None, torch.arange(3).repeat(2, 1), torch.zeros(2, 3))
    predictor.kernel.write(draft, rows, states, False, states[:, :1].contiguous(), logits)
    assert all(len(set(tokens)) == 5 for tokens in draft.tokens.flatten(0, 1).tolist())
    tree = predictor.coupling.dynamic_tree(draft, torch.tensor([1, 2]), 6)
    assert tree is not None
    for tokens in (draft.tokens, tree[0]):
        assert tokens.min() >= 0 and tokens.max() < VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_commit_keeps_the_path_and_stops_at_the_capacity(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    kernel, plain = (KVCache(3, 4, 6, 20, 2, 5, dtype, CPU, spread=4) for _ in range(2))
    assert kernel._packed is not None
    plain._packed = None
    kernel._store.normal_(generator=generator)
    plain._store.copy_(kernel._store)
    lengths, path = torch.tensor([0, 7, 18, 20]), torch.tensor([[0, 2, 4, 4], [0, 1, 1, 1], [0, 3, 4, 4], [0, 1, 2, 3]])
    for cache in (kernel, plain):
        cache.begin(5, 20)
        cache.set_lengths(lengths)
        cache.commit(path, torch.tensor([3, 2, 3, 4]))
    assert kernel.lengths.tolist() == plain.lengths.tolist() == [3, 9, 20, 20]
    for sequence, length in enumerate(kernel.lengths.tolist()):
        got, expected = (cache._store[:, :, sequence, :, : 6 + length] for cache in (kernel, plain))
        assert got.equal(expected)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_halved_matrix_of_bfloat16_values_has_the_same_products(rows: int) -> None:
    weight = torch.randn(50, 37).bfloat16().float()
    assert is_bfloat16(weight) and not is_bfloat16(weight + 1e-4)
    hidden, bias = torch.randn(rows, 37), torch.randn(50)
    whole, halved = PackedLinear(weight, bias), PackedLinear(weight, bias, half=True)
    assert halved.kernel is not None and halved.kernel.bytes == weight.nbytes // 2
    assert halved(hidden).equal(whole(hidden))


def test_a_predictor_with_its_own_logits_drafts_by_them() -> None:
    """Only predictors whose drafts are the teacher's head's are drafted in the kernel."""
    teacher = tiny_teacher("llama", lean=True)
    own = make_predictor(teacher, kind="medusa", steps=2)
    assert own.for_decoding(teacher).kernel is None
    assert make_predictor(teacher, **section("firp_plus", share=False)).for_decoding(teacher).kernel is None
    assert make_predictor(teacher, **SECTIONS["firp"]).for_decoding(tiny_teacher("llama")).kernel is None
