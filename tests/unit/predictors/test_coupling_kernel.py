"""The kernels that find the children of nodes and build trees on a CPU give what torch's operations give."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from firp_cli.decoding.tree_build import Tree, build_by_level
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.coupling import Coupling
from firp_cli.predictors.draft import Draft
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.cpu_kernels import missing
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import FORMS, coupled, coupling_of, section
from helpers.models import HIDDEN, VOCABULARY, tiny_teacher
from helpers.pairwise import covered

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no CPU kernels: {missing()}")
STEPS = 3


def packed(teacher: Teacher, form: str, width: int, share: bool = True) -> Coupling:
    predictor = coupled(teacher, section("firp_plus", form, share, width=width))
    prepared = predictor.for_decoding(teacher)
    assert isinstance(prepared, TreePredictor)
    return coupling_of(prepared)


def with_bias_and_cap(teacher: Teacher) -> Teacher:
    model = copy.deepcopy(teacher.model)
    model.lm_head = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
    changed = wrap_model(model, name="headed", check=False)
    changed._softcap = 3.0
    return changed


def arguments(coupling: Coupling, batch: int, nodes: int, candidates: int) -> tuple[Tensor, ...]:
    """Return parents, candidates, first log-probabilities, a context, and states of the nodes that are no copy."""
    generator = torch.Generator().manual_seed(batch * 100 + nodes)
    drafted = torch.randn(batch, STEPS, VOCABULARY, generator=generator).log_softmax(-1)
    log_probs, tokens = drafted.topk(candidates, dim=-1)
    states = torch.randn(batch, STEPS, HIDDEN, generator=generator)
    final = torch.randn(batch, HIDDEN, generator=generator)
    context = coupling.context(states, final, log_probs, None)
    parents = torch.randint(VOCABULARY, (batch, nodes), generator=generator)
    previous = torch.randn(nodes, batch, HIDDEN, generator=generator).transpose(0, 1)
    return parents, tokens[:, 1], log_probs[:, 1, 0], context[:, 1], previous


class Scaled(nn.Embedding):
    """Embedding that is no look-up alone, like Gemma's."""


def known(first: Tensor, context: Tensor) -> Tensor:
    """Return the logarithm of the candidates' probability in all (B, 1, 1)."""
    return (first + context[:, -2])[:, None, None]


@pytest.mark.parametrize(
    ("form", "width", "batch", "nodes", "candidates", "root"),
    covered(FORMS, [5, HIDDEN, 50], [1, 3], [1, 7, 8, 19], [1, 12, 40], [True, False]),
)
@torch.inference_mode()
def test_children_are_those_of_torch(
    form: str, width: int, batch: int, nodes: int, candidates: int, root: bool
) -> None:
    coupling = packed(tiny_teacher("llama"), form, width)
    assert coupling._kernel is not None
    parents, tokens, first, context, previous = arguments(coupling, batch, nodes, candidates)
    given = (parents, tokens, first, context, None if root else previous)
    found = coupling.best_children(*given, breadth=6)
    assert (found.states is None) == (form != "recurrent")
    scores, adjusted = coupling.scores(parents, tokens, context, given[4])
    best, places = (scores + known(first, context)).topk(min(6, candidates), dim=-1)
    torch.testing.assert_close(found.log_probs, best, rtol=1e-5, atol=2e-5)
    assert torch.equal(found.tokens, tokens.gather(1, places.flatten(1)).view_as(places))
    if found.states is not None:
        torch.testing.assert_close(found.states, adjusted, rtol=1e-5, atol=2e-5)
    above = None if root else previous[:1, -1:]
    alone = coupling.best_children(parents[:1, -1:], tokens[:1], first[:1], context[:1], above, breadth=6)
    assert torch.equal(alone.log_probs, found.log_probs[:1, -1:]), "a node's children do not depend on other nodes"


@torch.inference_mode()
def test_bias_and_bound_of_the_head_are_respected() -> None:
    coupling = packed(with_bias_and_cap(tiny_teacher("llama")), "recurrent", HIDDEN)
    assert coupling._kernel is not None
    parents, tokens, first, context, previous = arguments(coupling, 2, 4, 12)
    found = coupling.best_children(parents, tokens, first, context, previous, 12)
    scores = coupling.scores(parents, tokens, context, previous)[0] + known(first, context)
    torch.testing.assert_close(found.log_probs, scores.sort(dim=-1, descending=True).values, rtol=1e-5, atol=2e-5)
    unbounded = packed(tiny_teacher("llama"), "recurrent", HIDDEN)
    assert not torch.allclose(unbounded.best_children(parents, tokens, first, context, previous, 12)[1], found[1])


@torch.inference_mode()
def test_equal_scores_keep_the_order_of_the_candidates() -> None:
    coupling = packed(tiny_teacher("llama"), "mlp", 8)
    parents, tokens, first, context, _ = arguments(coupling, 1, 2, 12)
    same = tokens[:, :1].expand(-1, 12).contiguous()
    found = coupling.best_children(parents, same, first, context, None, 5)
    assert (found.tokens == tokens[0, 0]).all() and (found.log_probs == found.log_probs[:, :, :1]).all()
    nothing = torch.full_like(first, -torch.inf)  # steps that draft nothing
    impossible = coupling.best_children(parents, tokens, nothing, context, None, 5)
    assert (impossible.log_probs == -torch.inf).all()
    assert torch.equal(impossible.tokens, coupling.best_children(parents, tokens, first, context, None, 5).tokens)


def test_heads_of_each_step_and_half_precision_have_no_kernel() -> None:
    assert packed(tiny_teacher("llama"), "mlp", 8, share=False)._kernel is None
    half = wrap_model(copy.deepcopy(tiny_teacher("llama").model).bfloat16(), name="half", check=False)
    assert packed(half, "mlp", 8)._kernel is None


def drafted(coupling: Coupling, batch: int, sharpness: float, seed: int) -> tuple[Draft, Tensor]:
    """Return a draft, of views as decoding has them, and root tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(batch, STEPS, VOCABULARY, generator=generator)
    log_probs, tokens = logits.log_softmax(-1).topk(20, dim=-1)
    states, final = (
        torch.randn(batch, STEPS, HIDDEN, generator=generator),
        torch.randn(batch, HIDDEN, generator=generator),
    )
    draft = Draft(tokens, log_probs, coupling.context(states, final, log_probs, None))
    return draft.map(lambda part: part[:, :STEPS]), torch.randint(VOCABULARY, (batch,), generator=generator)


@pytest.mark.parametrize(
    ("form", "batch", "nodes", "sharpness", "cut"),
    covered(FORMS, [1, 3], [2, 5, 9, 21], [0.3, 2.0, 8.0], [False, True]),
)
@torch.inference_mode()
def test_trees_are_those_of_torch(form: str, batch: int, nodes: int, sharpness: float, cut: bool) -> None:
    predictor = coupled(tiny_teacher("llama"), section("firp_plus", form, width=24)).for_decoding(tiny_teacher("llama"))
    coupling = coupling_of(predictor)
    draft, root = drafted(coupling, batch, sharpness, seed=nodes)
    if cut:  # the steps that an anchor does not reach draft nothing
        draft.log_probs[:, -1] = -torch.inf
    made = coupling.dynamic_tree(draft, root, nodes)
    assert made is not None
    found = Tree(*made)
    coupling._kernel = None
    expected = build_by_level(nodes, predictor, draft, root)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=5e-5)
    likely = expected.scores.isfinite()  # of impossible nodes any will do
    for name in ("tokens", "depth", "parents"):
        assert torch.equal(getattr(found, name)[likely], getattr(expected, name)[likely]), name
    if likely.all():
        assert torch.equal(found.ancestors, expected.ancestors) and torch.equal(found.paths, expected.paths)
    for row in range(batch):
        for node in range(1, nodes):
            above = int(found.parents[row, node])
            assert above < node and found.depth[row, node] == found.depth[row, above] + 1
            assert found.paths[row, node, : found.depth[row, node]].tolist() == (
                found.paths[row, above, : found.depth[row, node]].tolist()
            )
            own = found.ancestors[row, above].clone()
            own[node] = True
            assert torch.equal(found.ancestors[row, node], own)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these flags are for x86")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
@pytest.mark.parametrize("form", ["mlp", "recurrent"])
@torch.inference_mode()
def test_short_registers_give_the_same_trees(form: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coupling = packed(tiny_teacher("llama"), form, 37)
    draft, root = drafted(coupling, 2, 2.0, seed=4)
    other = cpu_kernels.load([flag])
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: other)
    short = packed(tiny_teacher("llama"), form, 37)
    expected, found = coupling.dynamic_tree(draft, root, 9), short.dynamic_tree(draft, root, 9)
    assert expected is not None and found is not None and other.firp_lanes() in (4, 8)
    assert all(torch.equal(one, two) for one, two in zip(expected[:5], found[:5], strict=True))
    torch.testing.assert_close(found[5], expected[5], rtol=1e-5, atol=5e-5)


@torch.inference_mode()
def test_trees_that_no_kernel_builds() -> None:
    """More nodes than candidates, embeddings that are scaled, and a counter of operations."""
    coupling = packed(tiny_teacher("llama"), "recurrent", HIDDEN)
    draft, root = drafted(coupling, 1, 2.0, seed=0)
    assert coupling.dynamic_tree(draft, root, 21) is not None and coupling.dynamic_tree(draft, root, 22) is None
    with FlopCounterMode(display=False):
        assert coupling.dynamic_tree(draft, root, 5) is None
    scaled = copy.copy(tiny_teacher("llama"))
    scaled._embed = Scaled.from_pretrained(tiny_teacher("llama")._embed.weight)
    assert packed(scaled, "recurrent", HIDDEN).dynamic_tree(draft, root, 5) is None
