"""Kernels of a step's tree against torch: the same nodes, order, anchors, rows and accepted paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from firp_cli.decoding.tree_build import Nodes
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.decoding.triton_tree import MOST_RANKED, accept_tree, build_tree
from firp_cli.predictors.draft import Draft
from helpers.launches import Launches
from helpers.pairwise import covered
from helpers.trees import torch_accept, torch_build
from helpers.triton_offline import compile_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
TREES = ["dynamic:2", "dynamic:5", "dynamic:9", "dynamic:33", "dynamic:8/2", "static:3x2x1", "chain", "static:15x1"]
KINDS = ["random", "ties", "certain", "ended", "none"]


def make_draft(kind: str, batch: int, steps: int, breadth: int, seed: int) -> Draft:
    """Return a draft of distinct tokens, in part of equal probabilities; sums of `ties` are exact."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(breadth + 5, generator=generator)[:breadth] for _ in range(batch * steps)])
    log_probs = (2 * torch.randn(batch, steps, breadth, generator=generator)).log_softmax(-1).clamp(max=0)
    if kind == "ties":
        log_probs = -torch.randint(0, 4, log_probs.shape, generator=generator) / 2.0
    elif kind == "certain":
        log_probs[:, :, 0], log_probs[:, :, 1:] = 0.0, -torch.inf
    elif kind == "ended":
        log_probs[:, -1] = -torch.inf
    elif kind == "none":
        log_probs.fill_(-torch.inf)
    return Draft(tokens.view(batch, steps, breadth), log_probs.sort(dim=-1, descending=True).values)


def on_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def tree_case(text: str, kind: str, batch: int, steps: int = 3) -> tuple[TreeSpec, Draft, Tensor, Tensor]:
    """Return a tree, the draft of the first of several sequences, roots and lengths."""
    spec = parse_tree(text, steps)
    draft = make_draft(kind, batch + 1, steps, spec.breadth(20), seed=batch + spec.nodes)
    generator = torch.Generator().manual_seed(batch)
    root, lengths = (torch.randint(0, 100, (batch,), generator=generator) for _ in range(2))
    return spec, Draft(draft.tokens[:batch], draft.log_probs[:batch]), root, lengths


def check_build(spec: TreeSpec, draft: Draft, root: Tensor, lengths: Tensor, anchors: int, pseudo: int) -> None:
    given = Draft(draft.tokens.to(DEVICE), draft.log_probs.to(DEVICE))
    built = build_tree(spec, given, root.to(DEVICE), lengths.to(DEVICE), anchors, pseudo)
    assert built is not None
    expected = torch_build(spec, draft, root, lengths, anchors, pseudo)
    for name in ("tokens", "parents", "anchors", "positions", "bits"):
        got, wanted = getattr(built, name), getattr(expected, name)
        assert (got is None) == (wanted is None), name
        assert got is None or (got.dtype == wanted.dtype and torch.equal(got.cpu(), wanted)), name


class TestKernels:
    """On the CUDA device if there is one, else in the interpreter, which test_triton_interpreter.py starts."""

    __test__ = INTERPRETED or DEVICE.type == "cuda"
    pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

    @pytest.mark.parametrize(("text", "kind", "batch", "pseudo"), covered(TREES, KINDS, [1, 3], [0, 1, 3]))
    def test_trees_are_those_of_torch(self, text: str, kind: str, batch: int, pseudo: int) -> None:
        check_build(*tree_case(text, kind, batch), 0, pseudo)

    @pytest.mark.parametrize(("text", "kind", "budget"), covered(TREES[1:], KINDS, [1, 2, 3]))
    def test_anchors_are_those_of_torch(self, text: str, kind: str, budget: int) -> None:
        check_build(*tree_case(f"{text}@{budget}", kind, 2), budget, 3)

    @pytest.mark.parametrize("text", ["dynamic:12", "static:2x2x2x1x1@4"])
    def test_deep_trees(self, text: str) -> None:
        """Exact sums: torch adds five numbers in another order."""
        spec, draft, root, lengths = tree_case(text, "ties", 2, steps=5)
        check_build(spec, draft, root, lengths, spec.budget or 0, 5)

    def test_roots_come_first_whatever_the_draft(self) -> None:
        spec, draft, root, lengths = tree_case("dynamic:9", "random", 2)
        draft.log_probs.fill_(torch.nan)
        given = Draft(draft.tokens.to(DEVICE), draft.log_probs.to(DEVICE))
        built = build_tree(spec, given, root.to(DEVICE), lengths.to(DEVICE), 2, 3)
        assert built is not None and built.anchors is not None
        assert built.tokens[:, 0].tolist() == root.tolist()
        assert all(0 <= parent < node for row in built.parents.tolist() for node, parent in enumerate(row) if node)
        assert (built.anchors[:, 0] == 0).all() and (built.anchors < 9).all()

    @pytest.mark.parametrize(("text", "batch", "budget"), covered([*TREES, "none"], [1, 3], [0, 1, 3]))
    def test_accepted_paths_are_those_of_torch(self, text: str, batch: int, budget: int) -> None:
        """Paths of every length; the output's row is wider than some trees."""
        budget = min(budget, parse_tree(text, 3).nodes - 1)
        spec, draft, root, lengths = tree_case(f"{text}@{budget}" if budget else text, "ties", batch)
        counts = set()
        nodes, anchors = Nodes(root[:, None], torch.zeros_like(root)[:, None]), None
        if text != "none":
            built = torch_build(spec, draft, root, lengths, budget, 3)
            nodes, anchors = built, built.anchors
        generator = torch.Generator().manual_seed(batch)
        for steps, strides in ((3, (3, 1)), (3, (1, 4)), (0, (0, 1))):
            for number in range(8):
                targets = torch.randint(0, 25, nodes.tokens.shape, generator=generator)
                for child in range(1, nodes.tokens.shape[1]):
                    follow = torch.rand(batch, generator=generator) < (number % 3) * 0.4
                    at = (torch.arange(batch)[follow], nodes.parents[follow, child])
                    targets[at] = nodes.tokens[follow, child]
                state = [torch.full((batch,), -1), torch.full((batch + 1, 5), -1)]
                written = [tensor.to(DEVICE, copy=True) for tensor in state]
                wanted = torch_accept(nodes, targets, spec.depth(3), anchors, steps, strides, *state)
                given = Nodes(nodes.tokens.to(DEVICE), nodes.parents.to(DEVICE))
                taken = accept_tree(
                    given, targets.to(DEVICE), spec.depth(3), on_device(anchors), steps, strides, *written
                )
                assert [tensor.tolist() for tensor in written] == [tensor.tolist() for tensor in state]
                assert torch.equal(taken.kept.cpu(), wanted.kept) and torch.equal(taken.path.cpu(), wanted.path)
                assert (taken.following is None) == (wanted.following is None)
                for got, expected in zip(taken.following or (), wanted.following or (), strict=True):
                    assert (got is None) == (expected is None)
                    assert got is None or (got.dtype == expected.dtype and torch.equal(got.cpu(), expected))
                counts |= set(taken.kept.tolist())
        assert counts >= ({1} if text == "none" else {1, 2})


def test_many_prefixes_are_left_to_torch() -> None:
    spec = parse_tree("dynamic:200", 3)
    draft, root = make_draft("random", 1, 3, 199, 0), torch.zeros(1, dtype=torch.long)
    assert build_tree(spec, draft, root, root, 0, 3) is None
    assert MOST_RANKED >= 1024


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="interpreted, or compiled for the device here")
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.nightly)])
def test_kernels_compile_without_a_device(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One launch each and no other one. Sequences, lengths and parts of larger drafts share a variant."""
    loaded = compile_only(monkeypatch, architecture, tmp_path, 5000 + architecture)
    counted = []
    for text, anchors in (("dynamic:8", 0), ("dynamic:33@3", 3), ("static:3x2x1", 0), ("static:3x2x1@2", 2)):
        for batch in (1, 2):
            spec, draft, root, lengths = tree_case(text, "random", batch)
            targets, row = torch.zeros(batch, spec.nodes, dtype=torch.long), torch.zeros(batch, 5, dtype=torch.long)
            build_tree(spec, draft, root, lengths, anchors, 3)  # makes the constants
            with Launches() as launches:
                built = build_tree(spec, draft, root, lengths, anchors, 3)
                assert built is not None
                accept_tree(built, targets, 3, built.anchors, 3, (3, 1), root, row)
            counted += launches.names
    assert loaded == ["_build_tree", "_accept_tree"] * 4
    assert counted == []
    spec, draft, root, lengths = tree_case("dynamic:7", "random", 1)
    build_tree(spec, draft, root, lengths, 0, 3)
    assert len(loaded) == 8, "trees of about one size share a variant"
