"""Trees with pseudo rows for some nodes only: the chosen nodes, the drafts after other nodes, the same tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.tree_build import Tree, anchor_nodes, build, nearest_anchor
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Children, Draft
from firp_cli.predictors.draft_kernel import DraftKernel
from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import COUPLED
from helpers.models import (
    FAMILIES,
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered
from helpers.trees import foreseen, paths_of, random_draft

TOKENS = 16
TREES = ["dynamic:9@1", "dynamic:9@3", "chain@2", "static:3x2x1@4"]
KINDS: dict[str, dict[str, Any]] = {
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
}
PSEUDO_COUPLED = {name: section for name, section in COUPLED.items() if section["kind"] != "medusa"}
TEACHERS = [*((family, "lean") for family in FAMILIES), ("qwen2-window", "library")]
kinds = pytest.mark.parametrize("kind", list(KINDS))


def decode(engine: Engine, prompts: list[list[int]], batch: int, tokens: int) -> list[Generation]:
    places = range(0, len(prompts), batch)
    return [item for start in places for item in engine.generate(prompts[start : start + batch], tokens)]


@cache
def reference(family: str, prompt: tuple[int, ...]) -> list[int]:
    return generate_reference(tiny_model(family), list(prompt), TOKENS)


@pytest.mark.parametrize(("stacked", "kind", "tree"), covered(TEACHERS, [*KINDS, *PSEUDO_COUPLED], TREES), ids=str)
def test_budgets_are_lossless(stacked: tuple[str, str], kind: str, tree: str) -> None:
    family, stack = stacked
    teacher, prompts = tiny_teacher(family, stack == "lean"), random_prompts(4, seed=31)
    expected = [reference(family, tuple(prompt)) for prompt in prompts]
    engine = Engine(teacher, make_predictor(teacher, **(KINDS | PSEUDO_COUPLED)[kind]), parse_tree(tree, 3))
    assert [item.token_ids for item in decode(engine, prompts, 4, TOKENS)] == expected
    assert [item.token_ids for item in decode(engine, prompts[:1], 1, TOKENS)] == expected[:1]


@cache
def embedded_reference() -> list[list[int]]:
    return [generate_reference(embedded_teacher().model, prompt, 60) for prompt in embedded_prompts(4)]


@pytest.mark.parametrize(("kind", "tree", "batch"), covered(list(KINDS), TREES, [1, 4]))
def test_budgets_are_lossless_with_trained_predictors(kind: str, tree: str, batch: int) -> None:
    """Trained predictors: paths of every length are accepted, and end at nodes with and without pseudo rows."""
    predictor = embedded_predictor(kind)
    spec = parse_tree(tree, predictor.steps)
    got = decode(Engine(embedded_teacher(), predictor, spec), embedded_prompts(4), batch, 60)
    assert [item.token_ids for item in got] == embedded_reference()
    lengths = [length for item in got for length in item.accepted_lengths]
    assert set(lengths) == set(range(1, spec.depth(predictor.steps) + 2))
    assert sum(lengths) > 2 * len(lengths)


@pytest.mark.parametrize("tree", ["dynamic:9", "static:3x2x1", "chain"])
@kinds
def test_budget_for_every_node_changes_no_step(kind: str, tree: str) -> None:
    predictor = embedded_predictor(kind)
    whole = parse_tree(tree, predictor.steps)
    steps = [
        [(item.token_ids, item.accepted_lengths) for item in decode(engine, embedded_prompts(2), 2, 40)]
        for spec in (
            whole,
            parse_tree(f"{tree}@{whole.nodes}", predictor.steps),
            parse_tree(f"{tree}@99", predictor.steps),
        )
        for engine in [Engine(embedded_teacher(), predictor, spec)]
    ]
    assert steps[0] == steps[1] == steps[2]


def test_budget_does_not_limit_predictors_without_pseudo_rows() -> None:
    predictor = embedded_predictor("medusa")
    engines = [Engine(embedded_teacher(), predictor, parse_tree(tree, 4)) for tree in ("dynamic:9", "dynamic:9@2")]
    first, second = (decode(engine, embedded_prompts(2), 2, 40) for engine in engines)
    assert [item.accepted_lengths for item in first] == [item.accepted_lengths for item in second]
    assert [item.token_ids for item in first] == [item.token_ids for item in second]


def test_scratch_has_the_rows_of_the_budget(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, **KINDS["firp"])
    scratch = {
        tree: DraftSetup.of(predictor, parse_tree(tree, 3)).shape.cache(teacher, 1, 10)["scratch"]
        for tree in ("dynamic:9", "dynamic:9@1", "dynamic:9@3", "chain@2", "static:3x2x1@4", "dynamic:9@50")
    }
    assert list(scratch.values()) == [9 + 27, 9 + 3, 9 + 9, 4 + 6, 16 + 12, 9 + 27]


class ByParent:
    """Child scores that depend on the parent's token, or not: a predictor's interface without its network."""

    steps, coupling = 3, None

    def __init__(self, parent_dependent: bool) -> None:
        self.parent_dependent = parent_dependent

    def child_candidates(
        self, draft: Draft, depth: int, parents: torch.Tensor, breadth: int, states: torch.Tensor | None = None
    ) -> Children:
        shape = (*parents.shape, breadth)
        log_probs = draft.log_probs[:, depth - 1, None, :breadth].expand(shape)
        if self.parent_dependent:
            log_probs = log_probs - 0.3 * (parents % 3)[:, :, None]
        return Children(draft.tokens[:, depth - 1, None, :breadth].expand(shape), log_probs)


def ending_probabilities(predictor: Any, draft: Draft, tree: Tree, row: int) -> list[float]:
    """Return for every node the draft's probability that the accepted path reaches it and none of its children."""
    row_draft = Draft(draft.tokens[row : row + 1], draft.log_probs[row : row + 1])
    reached = [1.0]
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parents[row, node])
        depth = int(tree.depth[row, node])
        breadth, above = draft.tokens.shape[2], tree.tokens[row : row + 1, parent, None]
        tokens, log_probs, _ = predictor.child_candidates(row_draft, depth, above, breadth)
        position = tokens[0, 0].tolist().index(int(tree.tokens[row, node]))
        reached.append(reached[parent] * float(log_probs[0, 0, position].double().exp()))
    ending = list(reached)
    for node in range(1, len(reached)):
        ending[int(tree.parents[row, node])] -= reached[node]
    return ending


SPECS = ["dynamic:9", "dynamic:14", "static:3x2x1", "static:2x2", "chain"]


def random_tree(spec: str, seed: int, predictor: ByParent, ended: int = 0) -> tuple[Draft, Tree]:
    """Return a tree of two sequences, and its draft, whose last `ended` steps are missing."""
    draft = random_draft(2, 3, 30, 13, seed, sharp=6.0)
    if ended:
        draft.log_probs[:, -ended:] = -torch.inf
    return draft, build(parse_tree(f"{spec}@1", 3), predictor, draft, torch.tensor([7, 8]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "ended", "parent_dependent"), covered(SPECS, [0, 1, 2], [True, False]))
def test_anchors_are_the_likeliest_ends_of_the_path(spec: str, ended: int, parent_dependent: bool) -> None:
    predictor = ByParent(parent_dependent)
    beside_the_root = 0
    for seed in range(10):
        draft, tree = random_tree(spec, seed, predictor, ended)
        for count in (1, 2, 3):
            anchors = anchor_nodes(tree, count)
            assert anchors.shape == (2, count)
            for row in range(2):
                ending = ending_probabilities(predictor, draft, tree, row)
                chosen = anchors[row].tolist()
                assert 0 in chosen
                assert len(set(chosen)) == count
                best = sorted(ending[1:], reverse=True)[: count - 1]
                assert sorted((ending[node] for node in chosen if node), reverse=True) == pytest.approx(best, abs=1e-6)
                beside_the_root += sum(ending[node] > ending[0] for node in chosen)
    assert beside_the_root > 0, "an anchor may be likelier than the root"


@pytest.mark.parametrize("spec", SPECS)
def test_nearest_anchor_is_the_first_upwards(spec: str) -> None:
    distances = set()
    for seed in range(8):
        _, tree = random_tree(spec, seed, ByParent(seed % 2 == 0))
        anchors = anchor_nodes(tree, 3)[:, torch.randperm(3, generator=torch.Generator().manual_seed(seed))]
        for node in range(tree.tokens.shape[1]):
            place, distance = nearest_anchor(tree, anchors, tree.paths[:, node], tree.depth[:, node])
            for row in range(2):
                up, ancestor = 0, node
                while ancestor not in anchors[row].tolist():
                    up, ancestor = up + 1, int(tree.parents[row, ancestor])
                assert (int(anchors[row, place[row]]), int(distance[row])) == (ancestor, up)
                distances.add(up)
    assert {0, 1} <= distances


def prefilled(teacher: Teacher, predictor: TreePredictor, spec: TreeSpec, prompts: list[list[int]]) -> DecodeStep:
    sampler = Sampler(0.0, 1.0, 0, torch.device("cpu"))
    stepper = DecodeStep(teacher, DraftSetup.of(predictor, spec), sampler, len(prompts), 100)
    stepper.prefill(prompts, 512)
    stepper.step(max(map(len, prompts)) - 1, "drafted", first=True)
    stepper.output.launched(None)
    return stepper


@pytest.mark.parametrize("tree", ["dynamic:9@1", "dynamic:9@3", "chain@1", "chain@2", "static:2x2x1@4"])
@kinds
@torch.inference_mode()
def test_node_without_pseudo_rows_drafts_from_its_nearest_anchor(kind: str, tree: str) -> None:
    """The next draft equals the training forward's at the nearest anchor, without the passed steps. If the node is an
    anchor itself, it also equals the draft of a step in which every node is one.
    """
    teacher = tiny_teacher("qwen2-window", lean=True)
    predictor = make_predictor(teacher, **KINDS[kind])
    spec = parse_tree(tree, predictor.steps)
    prompts = random_prompts(2, seed=33, low=5, high=9)
    texts = [generate_reference(teacher.model, prompt, 60, eos_token_id=-1) for prompt in prompts]
    batches = [
        sequence_batch(teacher, [prompt + text], [1], list(predictor.required_layers))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    limited = prefilled(teacher, predictor, spec, prompts)
    full = prefilled(teacher, predictor, TreeSpec(spec.kind, spec.nodes, spec.paths), prompts)
    emitted, distances = [1, 1], set()
    for seed in range(15):
        draft = foreseen(texts, emitted, predictor.steps, limited._breadth, seed)
        roots = torch.tensor([text[count - 1] for text, count in zip(texts, emitted, strict=True)])
        known = build(spec, predictor, draft, roots)
        anchors = anchor_nodes(known, spec.budget or 1)
        read = []
        for stepper in (limited, full):
            assert torch.equal(stepper._root, roots)
            stepper._draft.tokens.copy_(draft.tokens)
            stepper._draft.log_probs.copy_(draft.log_probs)
            stepper.step(80, "drafted")
            read.append(stepper.output.launched(None)[0][1])
        assert read[0] == read[1]
        for row, (count, *tokens) in enumerate(read[0]):
            assert tokens[: count + 1] == texts[row][emitted[row] : emitted[row] + count + 1]
            path = tuple(texts[row][emitted[row] : emitted[row] + count])
            node, distance = paths_of(known, row).index(path), 0
            while node not in anchors[row].tolist():
                node, distance = int(known.parents[row, node]), distance + 1
            distances.add(distance)
            place = len(prompts[row]) + emitted[row] - 1 + count - distance
            states = predictor.draft_states(teacher, batches[row], torch.tensor([[place]]))
            expected = predictor.draft(teacher, states[0], limited._breadth)
            check_draft(limited, row, expected, distance)
            if not distance:
                check_draft(limited, row, Draft(full._draft.tokens[row, None], full._draft.log_probs[row, None]), 0)
            emitted[row] += count + 1
    assert distances >= ({0, 1, 2, 3} if spec.budget == 1 else {0, 1})


def check_draft(stepper: DecodeStep, row: int, expected: Draft, distance: int) -> None:
    """Assert that the stepper's draft has the expected one's steps after the first `distance`, then nothing."""
    steps = expected.tokens.shape[1]
    tokens, log_probs = stepper._draft.tokens[row], stepper._draft.log_probs[row]
    assert torch.equal(tokens[: steps - distance], expected.tokens[0, distance:])
    ahead = log_probs[: steps - distance]
    torch.testing.assert_close(ahead, expected.log_probs[0, distance:], rtol=1e-3, atol=1e-3)
    assert (log_probs[steps - distance :] == -torch.inf).all()


@pytest.mark.parametrize(("tree", "passes"), [("dynamic:3", 1), ("dynamic:8", 2)])
def test_small_trees_apply_the_head_once_a_step(tree: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama", lean=True)
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    calls, head, write = [], teacher.head, DraftKernel.write

    def drafting(self: DraftKernel, *given: Any) -> None:
        calls.extend([1] if given[-1] is None else [])  # without logits the kernel runs the head
        write(self, *given)

    monkeypatch.setattr(teacher, "head", lambda states: calls.append(1) or head(states))
    monkeypatch.setattr(DraftKernel, "write", drafting)
    made = Engine(teacher, predictor, parse_tree(tree, 2)).generate([[3, 9, 4]], 16)[0]
    assert len(calls) == 1 + passes * made.steps  # the first token's step has a single node
