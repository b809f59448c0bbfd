"""Kernels of coupled drafts against torch: the same prefixes, trees, anchors and rows."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.decoding.triton_tree import build_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.triton_coupling import MOST_KEYS, CandidatePrefixes, CoupledHead
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import FORMS, coupled, coupling_of, section
from helpers.launches import Launches
from helpers.models import random_prompts, sequence_batch, tiny_model, tiny_teacher
from helpers.pairwise import covered
from helpers.trees import torch_build
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
BATCH = 3


def teacher_of(family: str, dtype: torch.dtype) -> Teacher:
    return wrap_model(deepcopy(tiny_model(family)).to(DEVICE, dtype), name=f"tiny-{family}")


@torch.no_grad()
def case(family: str, form: str, dtype: torch.dtype, candidates: int) -> tuple[TreePredictor, Draft, Tensor]:
    """Return a predictor, its drafts of three sequences at one position of each, and their roots."""
    given = section("firp_plus", form, candidates=candidates)
    sequences = random_prompts(BATCH, seed=41, low=12, high=15)
    first, teacher = tiny_teacher(family, lean=True), teacher_of(family, dtype)
    source, predictor = coupled(first, given, strength=8.0), coupled(teacher, given, strength=8.0).to(DEVICE, dtype)
    batch = sequence_batch(first, sequences, [1] * BATCH, list(source.required_layers))
    states = source.draft_states(first, batch, torch.tensor([[4], [7], [9]]))[:, 0].to(DEVICE, dtype)
    final = torch.stack([batch.final[row, place] for row, place in enumerate((4, 7, 9))]).to(DEVICE, dtype)
    roots = [row[place + 1] for row, place in zip(sequences, (4, 7, 9), strict=True)]
    return predictor, predictor.draft(teacher, states, candidates, final=final), torch.tensor(roots, device=DEVICE)


def head_of(predictor: TreePredictor) -> CoupledHead:
    coupling = coupling_of(predictor)
    teacher, activated = coupling.teacher, coupling.form != "low_rank"
    embedding = teacher.embedding_matrix()
    assert embedding is not None
    matrices = (coupling.node_weight[0].detach(), coupling.output_weight[0].detach(), embedding, *teacher.head_parts())
    return CoupledHead(*matrices, coupling.scale, coupling.recurrent, activated, 1e-6)


class TestPrefixes:
    """On the CUDA device if there is one, else in the interpreter, which test_triton_interpreter.py starts."""

    __test__ = INTERPRETED or DEVICE.type == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

    @pytest.mark.parametrize(
        ("family", "form", "text", "candidates"),
        covered(["llama", "qwen2-window", "qwen3"], FORMS, ["dynamic:2", "dynamic:8", "dynamic:19/2@3"], [5, 12, 40]),
    )
    @torch.inference_mode()
    def test_trees_are_those_of_torch(self, family: str, form: str, text: str, candidates: int) -> None:
        """Scores are those of the nodes; a tie of two prefixes would show as another tree."""
        predictor, draft, root = case(family, form, torch.float32, candidates)
        spec, lengths = parse_tree(text, 3), torch.tensor([5, 0, 31], device=DEVICE)
        given = (spec, draft, root, lengths, spec.budget or 0, 3, predictor.coupling)
        built, wanted = build_tree(*given), torch_build(*given)
        assert built is not None and (built.anchors is None) == (spec.budget is None)
        for name in ("tokens", "parents", "anchors", "bits", "positions"):
            one, other = getattr(built, name), getattr(wanted, name)
            assert (one is other is None) or torch.equal(one, other), name

    @torch.inference_mode()
    def test_rows_of_several_blocks(self) -> None:
        """Three sequences of 32 nodes of a depth are more than a block of rows."""
        predictor, draft, root = case("llama", "recurrent", torch.float32, 40)
        given = (parse_tree("dynamic:33", 3), draft, root, root, 0, 3, predictor.coupling)
        built, wanted = build_tree(*given), torch_build(*given)
        assert built is not None and torch.equal(built.tokens, wanted.tokens) and torch.equal(built.bits, wanted.bits)

    @pytest.mark.parametrize(("form", "dtype"), covered(FORMS, [torch.float32, torch.bfloat16]))
    @torch.inference_mode()
    def test_scores_are_those_of_the_coupling(self, form: str, dtype: torch.dtype) -> None:
        """Each prefix's score is its parent's and its own log-probability; a depth has the best ones."""
        predictor, draft, root = case("llama", form, dtype, 12)
        limit, tolerance = 5, 1e-4 if dtype == torch.float32 else 0.08
        found = CandidatePrefixes.of(head_of(predictor), draft, root, limit)
        assert found is not None and found.tokens.shape == (BATCH, 1 + 3 * limit)
        assert torch.equal(found.tokens[:, 0], root) and (found.scores[:, 0] == 0).all()
        facts, states, above = found.facts.tolist(), None, slice(0, 1)
        for depth in range(1, 4):
            level = slice(1 + (depth - 1) * limit, 1 + depth * limit)
            made = predictor.child_candidates(draft, depth, found.tokens[:, above], 12, states)
            joint = (found.scores[:, above, None] + made.log_probs).flatten(1)
            best = joint.topk(limit).values
            torch.testing.assert_close(found.scores[:, level], best, atol=tolerance, rtol=tolerance)
            parents = found.facts[:, level, 4] - above.start
            for row in range(BATCH):
                for place, parent in enumerate(parents[row].tolist()):
                    number = level.start + place
                    way = [*facts[row][above.start + parent][:depth], *[number] * (4 - depth)]
                    assert facts[row][number] == [*way, above.start + parent, depth, number]
                    children = made.tokens[row, parent].tolist()
                    own = children.index(int(found.tokens[row, number]))
                    assert float(found.scores[row, number]) == pytest.approx(
                        float(joint[row].view(-1, len(children))[parent, own]), abs=tolerance
                    )
            if made.states is not None:
                states = made.states.gather(1, parents[:, :, None].expand(-1, -1, made.states.shape[2]))
            above = level

    @torch.inference_mode()
    def test_drafts_without_probability_give_a_tree(self) -> None:
        """As after prefill; and with NaN, whose prefixes come last."""
        predictor, draft, root = case("llama", "recurrent", torch.float32, 12)
        for value in (-torch.inf, torch.nan):
            draft.log_probs[1].fill_(value)
            built = build_tree(parse_tree("dynamic:6", 3), draft, root, root * 0, 0, 3, predictor.coupling)
            assert built is not None and built.tokens[:, 0].tolist() == root.tolist()
            assert all(0 <= parent < node for row in built.parents.tolist() for node, parent in enumerate(row) if node)

    @torch.inference_mode()
    def test_bias_and_cap_are_those_of_the_head(self) -> None:
        predictor, draft, root = case("llama", "mlp", torch.float32, 12)
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(len(head_of(predictor).vocabulary), generator=generator).to(DEVICE)
        found = CandidatePrefixes.of(replace(head_of(predictor), bias=bias, cap=2.0), draft, root, 12)
        assert found is not None
        _, adjusted = coupling_of(predictor).scores(root[:, None], draft.tokens[:, 0], draft.context[:, 0], None)  # type: ignore[index]
        rows = head_of(predictor).vocabulary[draft.tokens[:, 0]]
        logits = torch.einsum("bmd,bd->bm", rows, adjusted[:, 0]) + bias[draft.tokens[:, 0]]
        known = (draft.log_probs[:, 0, 0] + draft.context[:, 0, -2]).clamp(max=0)  # type: ignore[index]
        expected = (2 * (logits / 2).tanh()).log_softmax(-1) + known[:, None]
        torch.testing.assert_close(found.scores[:, 1:13], expected.sort(descending=True).values, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_drafts_are_left_to_torch() -> None:
    """Those of a head for each step, of static trees, and of too many prefixes."""
    predictor, draft, root = case("llama", "mlp", torch.float32, 40)
    assert build_tree(parse_tree("static:2x2", 3), draft, root, root, 0, 3, predictor.coupling) is None
    assert CandidatePrefixes.of(head_of(predictor), draft, root, 65) is None
    wide = Draft(draft.tokens.repeat(1, 1, 10), draft.log_probs.repeat(1, 1, 10), draft.context)
    assert CandidatePrefixes.of(head_of(predictor), wide, root, MOST_KEYS // 512 + 1) is None
    apart = coupled(teacher_of("llama", torch.float32), section("firp_plus", share=False, candidates=40))
    assert coupling_of(apart).candidate_prefixes(draft, root, 4) is None


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="interpreted, or compiled for the device here")
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
@torch.inference_mode()
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four launches for each depth and no other one, then that of the tree."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 7000 + architecture)
    predictor, draft, root = case("llama", "recurrent", torch.bfloat16, 40)
    spec = parse_tree("dynamic:8", 3)
    build_tree(spec, draft, root, root, 0, 3, predictor.coupling)  # makes the constants
    assert loaded[:4] == ["_hidden", "_adjusted", "_score", "_select"] and loaded[-1] == "_build_tree"
    variants = len(loaded)
    with Launches() as launches:
        build_tree(spec, draft, root, root, 0, 3, predictor.coupling)
    assert launches.names == [] and len(loaded) == variants <= 9
