"""What is accepted of a draft, learnt from answers that the teacher wrote: by step and rank, by whole paths, and, for
any tree, by walking through those answers as the decoder would.

Shapes: S sequences, A anchors, k steps, s candidates per step, N nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from firp_cli.evaluation.simulate import Trace
from firp_cli.predictors.base import TreePredictor
from firp_cli.tune_results import RankRate, Reliability

PRIOR = 16.0  # anchors' worth of trust in rates by step and rank, against what was counted on one path
BINS = 10  # of draft probabilities
SHOWN_RANKS = 8


@torch.inference_mode()
def ranks(predictor: TreePredictor, traces: Sequence[Trace]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the answers' own tokens stand among the candidates, given that all tokens before were drafted: (A, k)
    ranks from 0, s where a token is no candidate, -1 behind the answer's end; and the candidates' probabilities
    (A, k, s).
    """
    found, probable = [], []
    for item in traces:
        anchors = torch.arange(item.first, item.last, device=item.ids.device)
        padded = torch.nn.functional.pad(item.ids, (0, predictor.steps + 1), value=-1)
        breadth = item.draft.tokens.shape[2]
        columns, values = [], []
        for step in range(1, predictor.steps + 1):
            tokens, log_probs = predictor.child_candidates(item.draft, step, padded[anchors + step][:, None])
            follows = padded[anchors + step + 1]
            hits = tokens[:, 0] == follows[:, None]
            rank = torch.where(hits.any(-1), hits.int().argmax(-1), breadth)
            columns.append(torch.where(follows < 0, -1, rank))
            values.append(log_probs[:, 0].exp())
        found.append(torch.stack(columns, dim=1).cpu().numpy())
        probable.append(torch.stack(values, dim=1).double().cpu().numpy())
    return np.concatenate(found).astype(np.int64), np.concatenate(probable)


class Acceptance:
    """How likely a path of ranks is accepted.

    Args:
        ranks: (A, k) as `ranks` gives. breadth: s.
    """

    def __init__(self, ranks: NDArray[np.int64], breadth: int) -> None:
        self.ranks, self.breadth = ranks, breadth
        self.steps = ranks.shape[1]
        self.counts, self.rates = [], []
        reached = np.ones(len(ranks), dtype=bool)  # the path so far was among the candidates
        for step in range(self.steps):
            column = ranks[:, step]
            reached = reached & (column >= 0)
            hits = np.bincount(column[reached], minlength=breadth + 1)[:breadth]
            self.counts.append(int(reached.sum()))
            self.rates.append(hits / max(1, self.counts[-1]))
            reached = reached & (column < breadth)

    def by_rank(self) -> list[RankRate]:
        """Acceptance of each step and rank given that the parent was accepted, with how often that was."""
        shown = range(min(self.breadth, SHOWN_RANKS))
        return [
            RankRate(step + 1, rank, self.counts[step], float(self.rates[step][rank]))
            for step in range(self.steps)
            for rank in shown
        ]

    def grow(self, nodes: int, depth: int | None = None) -> list[tuple[tuple[int, ...], float]]:
        """The `nodes - 1` paths below the root that are accepted most often, most likely first, with how often.

        Best first: a child is at most as likely as its parent, so paths leave the heap in descending order and the
        first ones are the likeliest of all. No tree of as many nodes and this depth has a greater sum, which is its
        expected number of accepted tokens; every beginning of the list is closed under parents.
        """
        depth = min(depth or self.steps, self.steps)
        everyone = np.arange(len(self.ranks))
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]] = []
        self._push(heap, (), 1.0, everyone)
        grown: list[tuple[tuple[int, ...], float]] = []
        while heap and len(grown) < nodes - 1:
            value, path, chosen = heapq.heappop(heap)
            grown.append((path, -value))
            if len(path) < depth:
                self._push(heap, path, -value, chosen)
        return grown

    def _push(
        self,
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]],
        path: tuple[int, ...],
        value: float,
        chosen: NDArray[np.int64],
    ) -> None:
        """Put a path's children on the heap: counted where it was accepted, and where that is rare, as likely as their
        step and rank is on the whole.
        """
        step = len(path)
        column = self.ranks[chosen, step]
        chosen, column = chosen[column >= 0], column[column >= 0]
        hits = np.bincount(column, minlength=self.breadth + 1)[: self.breadth]
        rates = (hits + PRIOR * self.rates[step]) / (len(chosen) + PRIOR)
        for rank in np.flatnonzero(rates > 0):
            child = (*path, int(rank))
            heapq.heappush(heap, (-value * float(rates[rank]), child, chosen[column == rank]))


def reliability(ranks: NDArray[np.int64], probable: NDArray[np.float64]) -> list[Reliability]:
    """The draft's own probabilities against what came of them, by step and bin, given that the parent was accepted.
    Dynamic trees go by these probabilities.
    """
    breadth, found = probable.shape[2], []
    reached = np.ones(len(ranks), dtype=bool)
    for step in range(ranks.shape[1]):
        reached = reached & (ranks[:, step] >= 0)
        drafted = probable[reached, step]
        right = ranks[reached, step][:, None] == np.arange(breadth)
        bins = np.minimum((drafted * BINS).astype(int), BINS - 1)
        for number in range(BINS):
            inside = bins == number
            if inside.any():
                rate = float(right[inside].mean())
                found.append(Reliability(step + 1, int(inside.sum()), float(drafted[inside].mean()), rate))
        reached = reached & (ranks[:, step] < breadth)
    return found
