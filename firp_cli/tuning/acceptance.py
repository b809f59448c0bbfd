"""Acceptance of drafts, estimated from answers that the teacher wrote: by draft step and candidate, and by whole paths.

Shapes: S sequences, A anchors, k draft steps, s candidates per step, N nodes. A candidate's position counts from 0, the
most probable; a path is the positions of its nodes' candidates from the root.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from firp_cli.evaluation.simulate import Trace
from firp_cli.predictors.base import TreePredictor
from firp_cli.tune_results import CandidateRate, Reliability

PRIOR = 16.0  # weight of the rates by step and position, in anchors, against the counts of one path
BINS = 10  # of draft probabilities
SHOWN_CANDIDATES = 8


@torch.inference_mode()
def candidate_positions(
    predictor: TreePredictor, traces: Sequence[Trace]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the positions of the answers' tokens among the candidates, given that all tokens before were drafted:
    (A, k), s where a token is no candidate, -1 after the answer's end; and the candidates' probabilities (A, k, s).
    """
    positions, probabilities = [], []
    for trace in traces:
        anchors = torch.arange(trace.first, trace.last, device=trace.ids.device)
        padded = torch.nn.functional.pad(trace.ids, (0, predictor.steps + 1), value=-1)
        columns, values, breadth, states = [], [], trace.breadth, None
        for step in range(1, predictor.steps + 1):
            parents = padded[anchors + step][:, None].clamp(min=0)
            tokens, log_probs, states = predictor.child_candidates(trace.draft, step, parents, breadth, states)
            following = padded[anchors + step + 1]
            hits = tokens[:, 0] == following[:, None]
            position = torch.where(hits.any(-1), hits.int().argmax(-1), breadth)
            columns.append(torch.where(following < 0, -1, position))
            values.append(log_probs[:, 0].exp())
        positions.append(torch.stack(columns, dim=1).cpu().numpy())
        probabilities.append(torch.stack(values, dim=1).double().cpu().numpy())
    return np.concatenate(positions).astype(np.int64), np.concatenate(probabilities)


class Acceptance:
    """Probability that a path is accepted.

    Args:
        positions: (A, k) from `candidate_positions`. breadth: s.
    """

    def __init__(self, positions: NDArray[np.int64], breadth: int) -> None:
        self.positions, self.breadth = positions, breadth
        self.steps = positions.shape[1]
        self.counts, self.rates = [], []
        reached = np.ones(len(positions), dtype=bool)  # the path so far was among the candidates
        for step in range(self.steps):
            column = positions[:, step]
            reached = reached & (column >= 0)
            hits = np.bincount(column[reached], minlength=breadth + 1)[:breadth]
            self.counts.append(int(reached.sum()))
            self.rates.append(hits / max(1, self.counts[-1]))
            reached = reached & (column < breadth)

    def by_candidate(self) -> list[CandidateRate]:
        """Return the acceptance of each draft step and candidate, given that the parent was accepted."""
        shown = range(min(self.breadth, SHOWN_CANDIDATES))
        return [
            CandidateRate(step + 1, position, self.counts[step], float(self.rates[step][position]))
            for step in range(self.steps)
            for position in shown
        ]

    def grow(self, nodes: int, depth: int | None = None) -> list[tuple[tuple[int, ...], float]]:
        """Return the `nodes - 1` most probable paths below the root with their probabilities, in descending order.

        Best first: a child is at most as probable as its parent, so paths leave the heap in descending order. No tree
        of as many nodes and this depth has a greater sum of probabilities, which is its expected number of accepted
        tokens. Every prefix of the list is closed under parents.
        """
        depth = min(depth or self.steps, self.steps)
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]] = []
        self._push(heap, (), 1.0, np.arange(len(self.positions)))
        grown: list[tuple[tuple[int, ...], float]] = []
        while heap and len(grown) < nodes - 1:
            value, path, anchors = heapq.heappop(heap)
            grown.append((path, -value))
            if len(path) < depth:
                self._push(heap, path, -value, anchors)
        return grown

    def _push(
        self,
        heap: list[tuple[float, tuple[int, ...], NDArray[np.int64]]],
        path: tuple[int, ...],
        value: float,
        anchors: NDArray[np.int64],
    ) -> None:
        """Push a path's children. Their probabilities are counted at the `anchors` that accept the path, smoothed with
        the rates of their step and position.
        """
        step = len(path)
        column = self.positions[anchors, step]
        anchors, column = anchors[column >= 0], column[column >= 0]
        hits = np.bincount(column, minlength=self.breadth + 1)[: self.breadth]
        rates = (hits + PRIOR * self.rates[step]) / (len(anchors) + PRIOR)
        for position in np.flatnonzero(rates > 0):
            child = (*path, int(position))
            heapq.heappush(heap, (-value * float(rates[position]), child, anchors[column == position]))


def reliability(positions: NDArray[np.int64], probabilities: NDArray[np.float64]) -> list[Reliability]:
    """Return drafted probabilities against acceptance, by draft step and bin, given that the parent was accepted.
    Dynamic trees are built from these probabilities.
    """
    breadth, bins = probabilities.shape[2], []
    reached = np.ones(len(positions), dtype=bool)
    for step in range(positions.shape[1]):
        reached = reached & (positions[:, step] >= 0)
        drafted = probabilities[reached, step]
        right = positions[reached, step][:, None] == np.arange(breadth)
        numbers = np.minimum((drafted * BINS).astype(int), BINS - 1)
        for number in range(BINS):
            inside = numbers == number
            if inside.any():
                rate = float(right[inside].mean())
                bins.append(Reliability(step + 1, int(inside.sum()), float(drafted[inside].mean()), rate))
        reached = reached & (positions[:, step] < breadth)
    return bins
