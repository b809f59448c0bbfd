"""Quality of a predictor's drafts, measured on stored conversations with the training forward.

Shapes: B sequences, T positions, A anchors, k steps, M anchors of one chunk, N tree nodes, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.decoding.accept import accept
from firp_cli.decoding.tree_build import build
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import StoreError
from firp_cli.evaluation.simulate import ANCHOR_CHUNK
from firp_cli.metrics import accepted_length, chain_length
from firp_cli.predictors.anchors import Anchors, Sequenced, choose_anchors, collate, compare_rows, target_states
from firp_cli.predictors.base import Predictor, SequenceBatch, TreePredictor
from firp_cli.predictors.forward import LOGIT_ELEMENTS
from firp_cli.results import Progress, StepQuality, no_progress
from firp_cli.teacher.teacher import Teacher


class Sequences(Protocol):
    """A store, or a list of its sequences."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequenced: ...


@dataclass
class Quality:
    """Measured part of an EvalReport."""

    steps: list[StepQuality]
    expected_accepted_length_chain: float
    expected_accepted_length_tree: float
    similarity: dict[int, list[float | None]]
    sequences: int
    anchors: int


@dataclass
class _Sums:
    """Running sums by draft step i = 1..k; `chain`, `tree`: anchors whose draft is accepted up to step i."""

    steps: int
    counts: Tensor = field(init=False)
    kl: Tensor = field(init=False)
    top1: Tensor = field(init=False)
    top5: Tensor = field(init=False)
    chain: Tensor = field(init=False)
    tree: Tensor = field(init=False)
    cosine: dict[int, Tensor] = field(default_factory=dict)  # layer -> (k,) summed cosines

    def __post_init__(self) -> None:
        for name in ("counts", "kl", "top1", "top5", "chain", "tree"):
            setattr(self, name, torch.zeros(self.steps, dtype=torch.float64))


@torch.inference_mode()
def evaluate(
    teacher: Teacher,
    predictor: Predictor,
    sequences: Sequences,
    tree: TreeSpec | None,
    *,
    limit: int | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> Quality:
    """Compare the draft of every anchor with the teacher's own rows, over the first `limit` sequences.

    The expected accepted length of the chain counts argmax drafts; that of `tree` counts the nodes that the decoder
    would accept. Both include the bonus token. Early exits have no tree: their steps are the exits, and both lengths
    are the tokens that a pipeline emits in r ticks. Raises StoreError when no sequence has an anchor.
    """
    count = min(len(sequences), limit or len(sequences))
    sums = _Sums(predictor.steps)
    anchors_seen = 0
    for batch, anchors in anchor_chunks(teacher, predictor, sequences, limit, batch_size, progress):
        index, valid = anchors.index, anchors.valid
        hook = _similarity_hook(sums, index, valid)
        states = predictor.draft_states(teacher, batch, index, on_layer=hook)
        targets = target_states(batch, anchors, predictor.offsets)
        used = valid.any(-1)
        roots = batch.input_ids.gather(1, index + 1)[used]
        # what the head reads, what drafts are made from, the teacher's rows, and the rest
        adjusted, own = predictor.path_states(batch, index, states), rows_at(batch.final, index)
        rows = (adjusted[used], states[used], targets[used], valid[used], roots, own[used])
        anchors_seen += len(roots)
        for chunk in _row_chunks(rows, predictor.steps * teacher.vocab_size):
            _add_rows(sums, teacher, predictor, tree, *chunk)
    if not anchors_seen:
        raise StoreError("nothing to evaluate: no stored sequence has two response tokens; collect longer answers")
    return _quality(sums, count, anchors_seen, predictor.pipeline)


def anchor_chunks(
    teacher: Teacher,
    predictor: Predictor,
    sequences: Sequences,
    limit: int | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> Iterator[tuple[SequenceBatch, Anchors]]:
    """Yield all anchors of the first `limit` sequences, with the batch that they belong to, at most ANCHOR_CHUNK per
    sequence at a time.
    """
    count = min(len(sequences), limit or len(sequences))
    for start in range(0, count, batch_size):
        chosen = [sequences[index] for index in range(start, min(start + batch_size, count))]
        batch = collate(chosen).to(teacher.device, teacher.dtype)
        anchors = choose_anchors(batch, predictor.offsets)
        chunks = zip(anchors.index.split(ANCHOR_CHUNK, dim=1), anchors.valid.split(ANCHOR_CHUNK, dim=1), strict=True)
        for index, valid in chunks:
            yield batch, Anchors(index, valid)
        progress(min(start + batch_size, count), count)


def _row_chunks(rows: tuple[Tensor, ...], elements_per_row: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same row range of every tensor, with few enough rows for their logits to fit."""
    size = max(1, LOGIT_ELEMENTS // elements_per_row)
    for start in range(0, len(rows[0]), size):
        yield tuple(part[start : start + size] for part in rows)


def rows_at(states: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` (B, A) of states (B, T, d), the last row where an index passes it: (B, A, d)."""
    index = index.clamp(max=states.shape[1] - 1)
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))


def _similarity_hook(sums: _Sums, index_BA: Tensor, valid_BAk: Tensor) -> Callable[[int, Tensor, Tensor], None]:
    """Return a hook that adds cosine(pseudo state of step i at anchor n, real state at n+i), layer by layer."""

    def on_layer(layer: int, real: Tensor, pseudo: Tensor) -> None:
        started = pseudo.shape[2]
        total = sums.cosine.setdefault(layer, torch.full((sums.steps,), float("nan"), dtype=torch.float64))
        for step in range(1, started + 1):
            future = rows_at(real, index_BA + step)
            cosine = functional.cosine_similarity(pseudo[:, :, step - 1].double(), future.double(), dim=-1)
            added = (cosine * valid_BAk[:, :, step - 1]).sum().cpu()
            total[step - 1] = added + total[step - 1].nan_to_num(0.0)

    return on_layer


def _add_rows(
    sums: _Sums,
    teacher: Teacher,
    predictor: Predictor,
    tree: TreeSpec | None,
    adjusted: Tensor,
    states: Tensor,
    target_rows: Tensor,
    valid: Tensor,
    roots: Tensor,
    final: Tensor,
) -> None:
    """Add M anchors to the sums: states that the head reads, draft states and target states (M, k, d), valid (M, k),
    root tokens (M,), the anchors' own final states (M, d).
    """
    choices, hits = [], []
    for step in range(1, predictor.steps + 1):
        teacher_logits = teacher.head(target_rows[:, step - 1])
        agreement = compare_rows(predictor.step_logits(teacher, adjusted[:, step - 1], step), teacher_logits)
        counted = valid[:, step - 1]
        hits.append(agreement.top1 & counted)
        choices.append(torch.where(counted, teacher_logits.argmax(-1), -1))
        place = step - 1
        sums.counts[place] += counted.sum().item()
        sums.kl[place] += torch.where(counted, agreement.kl, 0.0).double().sum().item()
        sums.top1[place] += hits[-1].sum().item()
        sums.top5[place] += (agreement.top5 & counted).sum().item()
    sums.chain += predictor.accepted(torch.stack(hits, dim=1)).sum(dim=0).cpu()
    if tree is None:
        return
    assert isinstance(predictor, TreePredictor)
    counts = accepted_counts(teacher, predictor, states, final, roots, torch.stack(choices, dim=1), tree)
    for place in range(predictor.steps):
        sums.tree[place] += (counts > place).sum().item()


def accepted_counts(
    teacher: Teacher,
    predictor: TreePredictor,
    states: Tensor,
    final: Tensor,
    roots: Tensor,
    choices: Tensor,
    spec: TreeSpec,
) -> Tensor:
    """Return the number of drafted tokens that the decoder would accept at each of M anchors, (M,) long.

    Args:
        states: (M, k, d) from `draft_states`. final: (M, d) the anchors' normed final states.
        roots: (M,) the tokens after the anchors.
        choices: (M, k') the teacher's tokens after the root, in order; -1 where none counts.
    """
    draft = predictor.draft(teacher, states, spec.breadth(teacher.vocab_size), final=final)
    tree = build(spec, predictor, draft, roots)
    depth = spec.depth(predictor.steps)
    beyond = choices.new_full((len(roots), depth + 1), -1)
    targets = torch.cat([choices, beyond], dim=1).gather(1, tree.depth)
    return accept(tree, targets, depth).count


def _quality(sums: _Sums, sequences: int, anchors: int, pipeline: tuple[int, ...]) -> Quality:
    counts = sums.counts
    chain = accepted_length(sums.chain.numpy(), counts.numpy(), pipeline)
    steps = [
        StepQuality(
            step=pipeline[place] if pipeline else place + 1,
            top1=(sums.top1[place] / counts[place]).item(),
            top5=(sums.top5[place] / counts[place]).item(),
            kl=(sums.kl[place] / counts[place]).item(),
            anchors=int(counts[place]),
        )
        for place in range(sums.steps)
    ]
    similarity: dict[int, list[float | None]] = {}
    for layer, total in sorted(sums.cosine.items()):
        means = (total / counts).tolist()
        similarity[layer] = [None if mean != mean else mean for mean in means]
    return Quality(
        steps=steps,
        expected_accepted_length_chain=chain,
        expected_accepted_length_tree=chain if pipeline else chain_length(sums.tree.numpy(), counts.numpy()),
        similarity=similarity,
        sequences=sequences,
        anchors=anchors,
    )
