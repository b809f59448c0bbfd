"""What decoding would take, from how many tokens each step emitted and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firp_cli.decoding.accept import accept
from firp_cli.decoding.tree_build import anchor_nodes, build, nearest_anchor
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.metrics import ticks_per_token
from firp_cli.predictors.base import Draft, TreePredictor
from firp_cli.predictors.forward import LOGIT_ELEMENTS, sequence_states
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.teacher import Teacher

ANCHOR_CHUNK = 128  # anchors of one forward


def replay(emitted: Sequence[Sequence[int]], batch: int, step: Callable[[int], float], halving: bool = False) -> float:
    """Time of decoding the sequences in batches of `batch`, in their order.

    Args:
        emitted: by sequence, tokens of each step. step: time of a step of so many live sequences.
        halving: finished sequences leave once half of the batch has (with CUDA graphs), not at once.
    """
    total = 0.0
    for start in range(0, len(emitted), batch):
        lengths = sorted(len(steps) for steps in emitted[start : start + batch])
        held = len(lengths)
        for number in range(lengths[-1]):
            live = sum(1 for length in lengths if length > number)
            if not halving or 2 * live <= held:
                held = live
            total += step(held)
    return total


def replay_speedup(
    emitted: Sequence[Sequence[int]],
    batch: int,
    step: Callable[[int], float],
    plain: Callable[[int], float],
    halving: bool = False,
) -> float:
    """Speedup over plain decoding of the same tokens, where a plain step of so many sequences takes `plain`."""
    ones = [[1] * sum(steps) for steps in emitted]
    return replay(ones, batch, plain, halving) / replay(emitted, batch, step, halving)


@dataclass
class Trace:
    """A written answer with what the predictor drafts at its positions.

    Attributes:
        ids: (T,) long. first: the anchor of the first draft; anchors are first..T-3.
        draft: of every anchor, tokens and log_probs (A, k, s).
    """

    ids: Tensor
    first: int
    draft: Draft

    @property
    def last(self) -> int:
        """The position behind the last anchor."""
        return self.ids.shape[0] - 2


@torch.inference_mode()
def trace(
    teacher: Teacher, predictor: TreePredictor, token_ids: Sequence[int], prompt_length: int, breadth: int
) -> Trace | None:
    """Draft at every position of an answer; None where it is too short for a decoding step."""
    first, length = prompt_length - 1, len(token_ids)
    if length - prompt_length < 2:
        return None
    batch = sequence_states(teacher, predictor, token_ids)
    tokens, log_probs = [], []
    rows = max(1, LOGIT_ELEMENTS // (predictor.steps * teacher.vocab_size))
    for anchors in torch.arange(first, length - 2, device=teacher.device).split(ANCHOR_CHUNK):
        states = predictor.draft_states(teacher, batch, anchors[None])[0]
        for part in states.split(rows):
            draft = predictor.draft(teacher, part, breadth)
            tokens.append(draft.tokens)
            log_probs.append(draft.log_probs)
    return Trace(batch.input_ids[0], first, Draft(torch.cat(tokens), torch.cat(log_probs)))


@torch.inference_mode()
def walk(predictor: TreePredictor, traces: Sequence[Trace], spec: TreeSpec) -> list[list[int]]:
    """Tokens that each decoding step with such trees would emit while writing the answers, by answer.

    All answers are walked at once, each from accepted node to accepted node, the last step cut at the answer's end. The
    first new token is prefill's and belongs to no step.
    """
    if spec.kind == "none":
        return [[1] * (trace.last - trace.first) for trace in traces]
    steps = spec.drafting(predictor.steps)
    predictor = predictor.first_steps(steps)
    depth, device = spec.depth(steps), traces[0].ids.device
    breadth = min(spec.breadth(1 << 30), traces[0].draft.tokens.shape[2])
    tokens = torch.cat([trace.draft.tokens[:, :steps, :breadth] for trace in traces])
    log_probs = torch.cat([trace.draft.log_probs[:, :steps, :breadth] for trace in traces])
    sizes = torch.tensor([trace.last - trace.first for trace in traces], device=device)
    firsts = torch.tensor([trace.first for trace in traces], device=device)
    offset = sizes.cumsum(0) - sizes - firsts  # of an anchor's draft among all
    lasts = firsts + sizes
    width = max(trace.ids.shape[0] for trace in traces) + steps + 2
    ids = torch.stack([torch.nn.functional.pad(trace.ids, (0, width - len(trace.ids)), value=-1) for trace in traces])
    anchor, behind, emitted = firsts.clone(), torch.zeros_like(firsts), []
    budgeted = spec.limited and bool(predictor.transfer_layers)
    while bool((anchor < lasts).any()):
        here = torch.minimum(anchor, lasts - 1)
        place = torch.maximum(here - behind, firsts) + offset  # an answer that has ended stays within its own drafts
        draft = Draft(tokens[place], log_probs[place])
        if budgeted:
            draft = _shifted(draft, behind)
        tree = build(spec, predictor, draft, ids.gather(1, here[:, None] + 1)[:, 0])
        accepted = accept(tree, ids.gather(1, here[:, None] + 2 + tree.depth), depth)
        count = accepted.count + 1
        emitted.append(torch.minimum(count, lasts - anchor).clamp(min=0))
        if budgeted:
            _, behind = nearest_anchor(tree, anchor_nodes(tree, spec.budget or 1), accepted.path, accepted.count)
        anchor = anchor + count
    return [[count for count in row if count] for row in torch.stack(emitted, dim=1).tolist()]


def _shifted(draft: Draft, behind: Tensor) -> Draft:
    """The draft of a node from its ancestor's, `behind` (S,) tokens back: step i from its step i + behind. Steps that
    the ancestor did not reach have probability 0. One head serves all steps of predictors with pseudo states.
    """
    steps = draft.tokens.shape[1]
    ahead = behind[:, None] + torch.arange(steps, device=behind.device)
    index = ahead.clamp(max=steps - 1)[:, :, None].expand_as(draft.tokens)
    log_probs = draft.log_probs.gather(1, index).masked_fill((ahead >= steps)[:, :, None], -torch.inf)
    return Draft(draft.tokens.gather(1, index), log_probs)


def simulate(
    teacher: Teacher, predictor: TreePredictor, token_ids: Sequence[int], prompt_length: int, tree: TreeSpec
) -> list[int]:
    """Tokens that each decoding step would emit while writing `token_ids[prompt_length:]`, without decoding.

    Training's forward drafts at every anchor; the walk then goes from accepted node to accepted node as the decoder
    does.
    """
    written = trace(teacher, predictor, token_ids, prompt_length, tree.breadth(teacher.vocab_size))
    return walk(predictor, [written], tree)[0] if written else []


@torch.inference_mode()
def simulate_ticks(teacher: Teacher, predictor: SpeedPredictor, token_ids: Sequence[int], prompt_length: int) -> int:
    """Ticks that a pipeline would take to write `token_ids[prompt_length + 1:]`, from training's forward alone.

    A token's right successor starts for good after the first exit from which on all predictions are right, or after the
    last loop (no threshold); the last token but one takes r ticks to leave.
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
