"""Drafts and trees for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firp_cli.decoding.accept import Taken, accept, next_draft
from firp_cli.decoding.tree_build import Nodes, Tree, anchor_nodes, build
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.coupling import Coupling
from firp_cli.predictors.draft import Children, Draft
from firp_cli.teacher.masks import step_rows
from helpers.models import VOCABULARY

if TYPE_CHECKING:
    from firp_cli.decoding.triton_tree import BuiltTree


def random_draft(batch: int, steps: int, vocabulary: int, breadth: int, seed: int, sharp: float = 1.0) -> Draft:
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(batch, steps, vocabulary, generator=generator)
    log_probs, tokens = logits.log_softmax(-1).topk(breadth)
    return Draft(tokens, log_probs)


def paths_of(tree: Tree, row: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return paths


def foreseen(texts: list[list[int]], emitted: list[int], steps: int, breadth: int, seed: int) -> Draft:
    """Return a draft with the true token at three of four steps, at random positions and with random probabilities."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for text, count in zip(texts, emitted, strict=True):
        for known in text[count : count + steps]:
            others = torch.randperm(VOCABULARY, generator=generator).tolist()
            others.remove(known)
            position, right = torch.randint(4, (2,), generator=generator).tolist()
            tokens.append(
                [*others[: min(position // 2, breadth - 1)], *([known] if right else []), *others[5:]][:breadth]
            )
    scores = 2.0 * torch.randn(len(texts), steps, breadth, generator=generator)
    return Draft(torch.tensor(tokens).view(scores.shape), scores.log_softmax(-1).sort(descending=True).values)


def torch_build(
    spec: TreeSpec,
    draft: Draft,
    root: Tensor,
    lengths: Tensor,
    anchors: int,
    pseudo: int,
    coupling: Coupling | None = None,
) -> BuiltTree:
    """Return what `triton_tree.build_tree` returns, by torch."""
    from firp_cli.decoding.triton_tree import BuiltTree
    from firp_cli.teacher.triton_attention import row_bits

    def children(draft: Draft, depth: int, parents: Tensor, breadth: int, states: Tensor | None = None) -> Children:
        assert coupling is not None and draft.context is not None
        step = depth - 1
        first, context = draft.log_probs[:, step, 0], draft.context[:, step]
        return coupling.best_children(parents, draft.tokens[:, step], first, context, states, breadth)

    predictor = SimpleNamespace(parent_dependent=coupling is not None, coupling=None, child_candidates=children)
    tree = build(spec, predictor, draft, root)  # type: ignore[arg-type]
    chosen = anchor_nodes(tree, anchors).contiguous() if anchors else None
    rows, offsets = step_rows(tree.ancestors, tree.depth, chosen, pseudo) if pseudo else (tree.ancestors, tree.depth)
    return BuiltTree(tree.tokens, tree.parents, chosen, row_bits(rows), lengths[:, None] + offsets)


def torch_accept(
    nodes: Nodes,
    targets: Tensor,
    depth: int,
    anchors: Tensor | None,
    steps: int,
    strides: tuple[int, int],
    root: Tensor,
    row: Tensor,
) -> Taken:
    """Return and write what `triton_tree.accept_tree` does, by torch."""
    batch, count = nodes.tokens.shape
    paths = torch.arange(count).expand(batch, count)[:, :, None]
    for _ in range(depth):  # the root is its own parent
        paths = torch.cat([nodes.parents.gather(1, paths[:, :, 0])[:, :, None], paths], dim=2)
    level = (paths > 0).sum(2)
    ancestors = torch.zeros(batch, count, count, dtype=torch.bool).scatter(2, paths, True)
    ahead = (torch.arange(depth + 1) + depth - level[:, :, None]).clamp(max=depth)
    tree = Tree(nodes.tokens, nodes.parents, level, ancestors, paths.gather(2, ahead))
    accepted = accept(tree, targets, depth)
    root.copy_(accepted.bonus)
    row[:batch, : 1 + accepted.tokens.shape[1]] = torch.cat([accepted.count[:, None], accepted.tokens], dim=1)
    following = next_draft(tree, accepted, anchors, steps, strides) if steps else None
    return Taken(accepted.count + 1, accepted.path, following)
