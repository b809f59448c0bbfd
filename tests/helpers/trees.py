"""Drafts and trees for tests."""

from __future__ import annotations

import torch

from firp_cli.decoding.tree_build import Tree
from firp_cli.predictors.base import Draft


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
