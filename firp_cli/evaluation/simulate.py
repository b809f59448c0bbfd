"""Simulation of decoding over answers that are already written, without decoding them.

Three simulators, one for each question:

- `simulate_steps` (`simulate_answer` for one answer): tokens that each decoding step with a draft tree emits;
- `simulate_ticks`: ticks that a SPEED pipeline takes;
- `simulate_time` (`simulate_speedup` over autoregressive decoding): time of the steps, at a given time per step.

Shapes: S sequences, T positions, A anchors, k draft steps, s candidates per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firp_cli.decoding.accept import accept
from firp_cli.decoding.batch import halves
from firp_cli.decoding.tree_build import anchor_nodes, build, nearest_anchor
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.metrics import ticks_per_token
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.forward import LOGIT_ELEMENTS, sequence_states
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.teacher import Teacher

ANCHOR_CHUNK = 128  # anchors of one forward


def simulate_time(
    emitted: Sequence[Sequence[int]], batch: int, step: Callable[[int], float], halving: bool = False
) -> float:
    """Return the time of decoding the sequences in batches of `batch`, in their order.

    Args:
        emitted: by sequence, tokens of each decoding step. step: time of a step with that many live sequences.
        halving: the batch shrinks to its halves only (as with CUDA graphs), not with every finished sequence.
    """
    total = 0.0
    for start in range(0, len(emitted), batch):
        lengths = sorted(len(steps) for steps in emitted[start : start + batch])
        size = len(lengths)
        for number in range(lengths[-1]):
            live = sum(1 for length in lengths if length > number)
            size = min(half for half in halves(size) if half >= live) if halving else live
            total += step(size)
    return total


def simulate_speedup(
    emitted: Sequence[Sequence[int]],
    batch: int,
    step: Callable[[int], float],
    ar_step: Callable[[int], float],
    halving: bool = False,
) -> float:
    """Return the speedup over autoregressive decoding of the same tokens, whose step takes `ar_step(live)`."""
    ones = [[1] * sum(steps) for steps in emitted]
    return simulate_time(ones, batch, ar_step, halving) / simulate_time(emitted, batch, step, halving)


@dataclass
class Trace:
    """Written answer with the predictor's drafts at its positions.

    Attributes:
        ids: (T,) long. first: the first anchor; anchors are first..T-3, in a part of an answer fewer.
        draft: of every anchor, tokens and log_probs (A, k, s). breadth: the most candidates of a node that trees take.
    """

    ids: Tensor
    first: int
    draft: Draft
    breadth: int

    @property
    def last(self) -> int:
        """The position after the last anchor."""
        return self.first + self.draft.tokens.shape[0]

    @property
    def end(self) -> int:
        """The position after the last anchor of the answer."""
        return self.ids.shape[0] - 2

    def parts(self, anchors: int) -> list[Trace]:
        """Return consecutive parts of at most that many anchors."""
        starts = range(self.first, self.last, anchors)
        drafts = (
            self.draft.map(lambda part, at=start - self.first: part[at : at + anchors])  # type: ignore[misc]
            for start in starts
        )
        return [replace(self, first=start, draft=draft) for start, draft in zip(starts, drafts, strict=True)]


@torch.inference_mode()
def make_trace(
    teacher: Teacher, predictor: TreePredictor, token_ids: Sequence[int], prompt_length: int, breadth: int
) -> Trace | None:
    """Draft at every position of an answer; return None where it is too short for a decoding step."""
    first, length = prompt_length - 1, len(token_ids)
    if length - prompt_length < 2:
        return None
    batch = sequence_states(teacher, predictor, token_ids)
    drafts = []
    rows = max(1, LOGIT_ELEMENTS // (predictor.steps * teacher.vocab_size))
    for anchors in torch.arange(first, length - 2, device=teacher.device).split(ANCHOR_CHUNK):
        states = predictor.draft_states(teacher, batch, anchors[None])[0]
        finals = batch.final[0, anchors]
        for part, final in zip(states.split(rows), finals.split(rows), strict=True):
            drafts.append(predictor.draft(teacher, part, breadth, final=final))
    return Trace(batch.input_ids[0], first, Draft.cat(drafts), breadth)


@torch.inference_mode()
def simulate_steps(predictor: TreePredictor, traces: Sequence[Trace], spec: TreeSpec) -> list[list[int]]:
    """Return the tokens that each decoding step with such trees emits while writing the answers, by answer.

    All answers advance together, each from accepted node to accepted node; the end of an answer cuts its last step,
    but not the end of a part (so the mean over parts is that of endless answers, by Wald's equation). Prefill gives
    the first new token, which belongs to no step.
    """
    if spec.kind == "none":
        return [[1] * (trace.last - trace.first) for trace in traces]
    steps = spec.drafting(predictor.steps)
    predictor = predictor.first_steps(steps)
    depth, device = spec.depth(steps), traces[0].ids.device
    breadth = predictor.width(spec.breadth(1 << 30), traces[0].draft.tokens.shape[2])
    drafts = Draft.cat([trace.draft.map(lambda part: part[:, :steps]) for trace in traces])
    drafts = predictor.narrowed(drafts, breadth)
    sizes = torch.tensor([trace.last - trace.first for trace in traces], device=device)
    firsts = torch.tensor([trace.first for trace in traces], device=device)
    offset = sizes.cumsum(0) - sizes - firsts  # of an anchor's draft among all
    lasts = firsts + sizes
    ends = torch.tensor([trace.end for trace in traces], device=device)
    width = max(trace.ids.shape[0] for trace in traces) + steps + 2
    ids = torch.stack([torch.nn.functional.pad(trace.ids, (0, width - len(trace.ids)), value=-1) for trace in traces])
    anchor, lag, emitted = firsts.clone(), torch.zeros_like(firsts), []
    budgeted = spec.limited and bool(predictor.transfer_layers)
    while bool((anchor < lasts).any()):
        here = torch.minimum(anchor, lasts - 1)
        place = torch.maximum(here - lag, firsts) + offset  # an answer that has ended stays within its own drafts
        draft = drafts.map(lambda part, place=place: part[place])  # type: ignore[misc]
        if budgeted:
            draft = _shifted(draft, lag)
            if predictor.coupling is not None and draft.context is not None:
                assert drafts.context is not None
                draft.context = predictor.coupling.with_final(draft.context, drafts.context[here + offset])
        tree = build(spec, predictor, draft, ids.gather(1, here[:, None] + 1)[:, 0])
        accepted = accept(tree, ids.gather(1, here[:, None] + 2 + tree.depth), depth)
        count = accepted.count + 1
        emitted.append(torch.minimum(count, ends - anchor).masked_fill(anchor >= lasts, 0))
        if budgeted:
            _, lag = nearest_anchor(tree, anchor_nodes(tree, spec.budget or 1), accepted.path, accepted.count)
        anchor = anchor + count
    return [[count for count in row if count] for row in torch.stack(emitted, dim=1).tolist()]


def _shifted(draft: Draft, lag: Tensor) -> Draft:
    """Return the draft of a node from that of its ancestor `lag` (S,) tokens earlier: step i from its step i + lag.

    Steps that the ancestor did not reach have probability 0. One head serves all steps of predictors with pseudo
    states, so any of its steps may stand for another.
    """
    steps = draft.tokens.shape[1]
    ahead = lag[:, None] + torch.arange(steps, device=lag.device)
    index = ahead.clamp(max=steps - 1)[:, :, None]
    shifted = draft.map(lambda part: part.gather(1, index.expand(-1, -1, part.shape[2])))
    shifted.log_probs.masked_fill_((ahead >= steps)[:, :, None], -torch.inf)
    return shifted


def simulate_answer(
    teacher: Teacher, predictor: TreePredictor, token_ids: Sequence[int], prompt_length: int, tree: TreeSpec
) -> list[int]:
    """Return the tokens that each decoding step emits while writing `token_ids[prompt_length:]`.

    The drafts come from the training forward, so a difference from real decoding is a fault of one of them.
    """
    trace = make_trace(teacher, predictor, token_ids, prompt_length, tree.breadth(teacher.vocab_size))
    return simulate_steps(predictor, [trace], tree)[0] if trace else []


@torch.inference_mode()
def simulate_ticks(teacher: Teacher, predictor: SpeedPredictor, token_ids: Sequence[int], prompt_length: int) -> int:
    """Return the ticks that a pipeline takes to write `token_ids[prompt_length + 1:]`, from the training forward alone.

    The right successor of a token starts after the first exit from which on all predictions are right, or after the
    last loop (without a threshold). The last token but one takes r ticks to leave.
    """
    if len(token_ids) - prompt_length < 2:
        return 0
    batch = sequence_states(teacher, predictor, token_ids)
    places = torch.arange(prompt_length, len(token_ids) - 1, device=teacher.device)
    states = predictor.draft_states(teacher, batch, places[None])[0]
    following = batch.input_ids[0, places + 1]
    hits = teacher.head(states).argmax(-1) == following[:, None]
    settled = predictor.accepted(hits)[:-1].sum(dim=0)
    waits = ticks_per_token(settled.cpu().numpy(), [len(places) - 1] * predictor.steps, predictor.pipeline)
    return round(waits * (len(places) - 1)) + predictor.loops
