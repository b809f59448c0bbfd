"""Predictors: masks against an element-wise loop, training's forward against decoding's, folders on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.config import KINDS as CONFIGS
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import FingerprintError, PredictorError, TeacherError
from firp_cli.predictors.anchors import choose_anchors, compare_rows, target_states
from firp_cli.predictors.base import SequenceBatch, TreePredictor
from firp_cli.predictors.draft import largest, most_probable_tokens
from firp_cli.predictors.folder import PREDICTORS, load_predictor, predictor_folder, save_predictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.masks import AttentionMask, causal_allowed, pseudo_positions, rows_allowed, step_rows
from firp_cli.teacher.teacher import Teacher
from helpers.models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    described_teacher,
    looped_teacher,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered

KINDS = [
    {"kind": "firp", "layer": 2, "steps": 3},
    {"kind": "firp", "layer": 1, "steps": 2, "bias": True},
    {"kind": "hidden_transfer", "layers": [1, 2, 3]},
    {"kind": "medusa", "steps": 3},
    {"kind": "medusa", "steps": 2, "own_head": False, "resblocks": 2},
]
COUPLED = [
    {"kind": "firp_plus", "layer": 2, "steps": 3, "coupling": {"candidates": 5}},
    {"kind": "hidden_transfer", "layers": [1, 2, 3], "coupling": {"form": "recurrent", "share": False}},
    {"kind": "medusa", "steps": 2, "own_head": False, "coupling": {"form": "low_rank"}},
]
STACKS = ["lean", "library"]
EXITS = [
    {"kind": "speed", "loops": 3},
    {"kind": "speed", "loops": 4, "exits": [1, 3], "exit_weights": [1.0, 3.0], "bias": True, "threshold": 0.4},
]


def test_rows_mask_is_the_element_wise_rule() -> None:
    """A pseudo state sees the real rows its anchor sees, and its own anchor's earlier pseudo states. Nothing else."""
    lengths = torch.tensor([5, 3])
    rows, steps = 5, 3
    anchors = torch.tensor([[0, 3], [1, 2]])
    mask = rows_allowed(causal_allowed(lengths, rows), anchors, steps)
    for b in range(2):
        for query in range(rows + steps * 2):
            for key in range(rows + steps * 2):
                inside = [True] * rows if b == 0 else [True, True, True, False, False]
                if query < rows and key < rows:
                    expected = key == query or (key < query and inside[key])
                elif query < rows:
                    expected = False
                else:
                    step, anchor = divmod(query - rows, 2)
                    if key < rows:
                        expected = key <= int(anchors[b, anchor]) and inside[key]
                    else:
                        other_step, other_anchor = divmod(key - rows, 2)
                        expected = other_anchor == anchor and other_step <= step
                assert bool(mask[b, query, key]) == expected, (b, query, key)
    everyone = torch.arange(rows).expand(2, rows)
    real = causal_allowed(lengths, rows)
    assert torch.equal(rows_allowed(real, None, steps), rows_allowed(real, everyone, steps))


@pytest.mark.parametrize("anchored", [True, False])
def test_step_rows_are_those_of_rows_allowed(anchored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for steps, nodes in ((1, 1), (3, 5), (4, 8)):
        ancestors = torch.rand(2, nodes, nodes, generator=generator) > 0.5
        positions = torch.randint(0, 50, (2, nodes), generator=generator)
        anchors = torch.randint(0, nodes, (2, 2), generator=generator) if anchored else None
        rows, places = step_rows(ancestors, positions, anchors, steps)
        assert torch.equal(rows, rows_allowed(ancestors, anchors, steps))
        assert torch.equal(places, torch.cat([positions, pseudo_positions(positions, anchors, steps)], dim=1))


def test_window_cuts_by_position() -> None:
    allowed = torch.ones(1, 2, 4, dtype=torch.bool)
    mask = AttentionMask(allowed, torch.float32, torch.tensor([[7, 9]]), torch.tensor([[3, 4, 7, 9]]))
    assert (mask.additive(4)[0, 0] == 0).tolist() == [[False, True, True, True], [False, False, True, True]]
    assert (mask.additive(None) == 0).all()


def test_pseudo_positions() -> None:
    positions = pseudo_positions(torch.tensor([[10, 11, 12]]), torch.tensor([[2, 0]]), 2)
    assert positions.tolist() == [[13, 11, 14, 12]]


def slow_draft_states(
    teacher: Teacher, predictor: TreePredictor, batch: SequenceBatch, row: int, anchor: int
) -> Tensor:
    """Slow reference: append pseudo states after the anchor of one sequence, under a causal mask."""
    layers = predictor.transfer_layers
    states = batch.hidden[layers[0]][row : row + 1, : anchor + 1]
    real = states
    for layer in range(layers[0], teacher.num_layers):
        joined = [real]
        for step, start in enumerate(layers, start=1):
            if start == layer:
                joined.append(predictor.make_pseudo_states(step, step, real[:, anchor : anchor + 1]))
        if layer == layers[0]:
            rows = torch.cat(joined, dim=1)
        else:
            new = [
                predictor.make_pseudo_states(step, step, rows[:, anchor : anchor + 1])
                for step, start in enumerate(layers, start=1)
                if start == layer
            ]
            rows = torch.cat([rows, *new], dim=1)
        count = rows.shape[1]
        positions = torch.arange(count)[None]
        mask = teacher.sequence_mask(torch.ones(1, count, count, dtype=torch.bool).tril(), positions)
        rotary = teacher.rotary(rows, positions)
        rows = teacher.layer(layer, rows, rotary, positions, mask.additive(teacher.windows[layer]), None)
    return teacher.norm(rows[0, anchor + 1 :])


@pytest.mark.parametrize(("family", "stack", "section"), covered(list(FAMILIES), STACKS, KINDS[:3]), ids=str)
def test_training_forward_is_the_slow_forward(family: str, stack: str, section: dict) -> None:
    """For a single anchor the definition is a causal mask over [real rows <= n, pseudo 1..k]."""
    teacher = tiny_teacher(family, stack == "lean")
    predictor = make_predictor(teacher, **section)
    sequences = random_prompts(3, seed=11, low=14, high=20)
    batch = sequence_batch(teacher, sequences, [4, 5, 6], list(predictor.required_layers))
    anchors = torch.tensor([[4, 9, 12], [5, 6, 7], [6, 8, 10]])
    with torch.no_grad():
        states = predictor.draft_states(teacher, batch, anchors)
        for row in range(3):
            for place in range(3):
                slow = slow_draft_states(teacher, predictor, batch, row, int(anchors[row, place]))
                assert torch.allclose(states[row, place], slow, atol=2e-4), (row, place)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [(2, 2, 2), (1, 3, 3), (1, 2, 3), (1, 1, 2)])
@torch.no_grad()
def test_pseudo_state_maker_equals_the_single_maps(teacher: Teacher, layers: tuple[int, ...], bias: bool) -> None:
    """Decoding's joined maps give the pseudo states of the single maps, in the same order of rows."""
    predictor = make_predictor(teacher, kind="hidden_transfer", layers=list(layers), bias=bias)
    make_pseudo_states = predictor.pseudo_state_maker()
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer in set(layers):
        steps = [step for step, entered in enumerate(layers, start=1) if entered == layer]
        got = make_pseudo_states(steps[0], steps[-1], hidden)
        torch.testing.assert_close(got, predictor.make_pseudo_states(steps[0], steps[-1], hidden), rtol=1e-5, atol=1e-5)
        singly = [predictor.make_pseudo_states(step, step, hidden) for step in steps]
        torch.testing.assert_close(got, torch.cat(singly, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "stack", "section"), covered(list(FAMILIES), STACKS, [*KINDS, *COUPLED]), ids=str)
def test_decoder_drafts_what_training_predicts(
    family: str, stack: str, section: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's draft at a prefix equals the training forward's at that position, token for token."""
    teacher = tiny_teacher(family, stack == "lean")
    predictor = make_predictor(teacher, **section)
    prompts = random_prompts(2, seed=12, low=5, high=9)
    texts = [greedy(teacher, prompt, 20) for prompt in prompts]
    sequences = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    drafts: list[list[list[int]]] = []
    step = DecodeStep.step

    def recording(self: DecodeStep, *arguments: Any, **named: Any) -> None:
        step(self, *arguments, **named)
        drafts.append(self._draft.tokens[0, :, :2].tolist())

    monkeypatch.setattr(DecodeStep, "step", recording)
    for row, prompt in enumerate(prompts):
        drafts.clear()
        got = Engine(teacher, predictor, parse_tree("dynamic:5", predictor.steps)).generate([prompt], 20)[0]
        assert got.token_ids == texts[row]
        places, anchor = [len(prompt) - 1], len(prompt) - 1
        for accepted in got.accepted_lengths[:-1]:
            anchor += accepted
            places.append(anchor)
        batch = sequence_batch(teacher, [sequences[row]], [len(prompt)], list(predictor.required_layers))
        with torch.no_grad():
            states = predictor.draft_states(teacher, batch, torch.tensor([places]))
            expected = most_probable_tokens(predictor.logits(teacher, states[0]), 2).tokens.tolist()
        assert drafts[: len(places)] == expected


def test_only_the_predictor_gets_gradients(stacked_teacher: Teacher) -> None:
    for section in [*KINDS, *COUPLED, *EXITS]:
        predictor = make_predictor(stacked_teacher, **section).requires_grad_(True)
        batch = sequence_batch(
            stacked_teacher, random_prompts(2, seed=13, low=12, high=15), [3, 4], list(predictor.required_layers)
        )
        anchors = choose_anchors(batch, predictor.offsets)
        predictor.draft_states(stacked_teacher, batch, anchors.index).square().sum().backward()
        maps = [item for name, item in predictor.named_parameters() if not name.startswith(("heads.", "coupling."))]
        assert all(item.grad is not None and item.grad.abs().sum() > 0 for item in maps)
        assert all(item.grad is None for item in stacked_teacher.model.parameters())


def test_anchors_and_targets(teacher: Teacher) -> None:
    batch = sequence_batch(teacher, [list(range(3, 13)), list(range(3, 9))], [4, 3], [])
    anchors = choose_anchors(batch, 3)
    # Row 0: the response is tokens 4..9. Anchor n needs n+1 and n+2 in it: n = 3..7. Step i needs n+i+1 <= 9.
    assert anchors.index[0].tolist() == [3, 4, 5, 6, 7]
    assert anchors.valid[0].sum(1).tolist() == [3, 3, 3, 2, 1]
    assert anchors.index[1, :2].tolist() == [2, 3]
    assert anchors.valid[1].sum(1).tolist() == [2, 1, 0, 0, 0]
    targets = target_states(batch, anchors)
    assert torch.equal(targets[0, 1, 2], batch.final[0, 4 + 3])
    here = choose_anchors(batch, (0, 0))
    # An exit's draft at n is token n+1: n = 3..8, and all exits of a position count.
    assert here.index[0].tolist() == [3, 4, 5, 6, 7, 8]
    assert here.index[1, :3].tolist() == [2, 3, 4]
    assert here.valid.sum(1).tolist() == [[6, 6], [3, 3]]
    assert torch.equal(target_states(batch, here, (0, 0))[0, :, 1], batch.final[0, 3:9])
    # The last prompt position is the first anchor: an answer of 14 tokens has 13, 12, 11, 10 by step.
    longer = choose_anchors(sequence_batch(teacher, [list(range(3, 22))], [5], []), 4)
    assert longer.index[0, 0] == 4 and longer.valid[0].sum(0).tolist() == [13, 12, 11, 10]
    few = choose_anchors(batch, 3, limit=2, seeds=[5, 6])
    assert few.index.shape == (2, 2)
    assert torch.equal(few.index, choose_anchors(batch, 3, limit=2, seeds=[5, 6]).index)


@pytest.mark.parametrize("name", ["2x3", "raven", "ouro", "qwen3"])
def test_exit_is_a_map_before_norm_and_head(name: str) -> None:
    """Training's states and decoding's logits, element by element; some exits only, with or without the last loop."""
    made = {"2x3": lambda: looped_teacher(2, 3), "qwen3": lambda: tiny_teacher("qwen3")}
    teacher = made[name]() if name in made else described_teacher(name)
    predictor = make_predictor(teacher, kind="speed", bias=True, loops=3 if name == "qwen3" else None)
    assert isinstance(predictor, SpeedPredictor)
    layers = [teacher.boundaries(3)[loop - 1] for loop in (1, 2)]
    assert predictor.required_layers == tuple(layers)
    assert (predictor.exits, predictor.pipeline, predictor.steps) == ((1, 2), (1, 2, 3), 2)
    batch = sequence_batch(teacher, random_prompts(2, seed=3, low=9, high=12), [3, 4], [*layers, teacher.num_layers])
    anchors = torch.tensor([[2, 5, 8], [3, 4, 7]])
    with torch.no_grad():
        states = predictor.draft_states(teacher, batch, anchors)
        logits = [predictor.step_logits(teacher, states[:, :, step - 1], step) for step in (1, 2)]
        for b in range(2):
            for place, n in enumerate(anchors[b].tolist()):
                for step, (layer, linear) in enumerate(zip(layers, predictor.maps, strict=True)):
                    mapped = linear.weight @ batch.hidden[layer][b, n] + linear.bias
                    torch.testing.assert_close(states[b, place, step], teacher.norm(mapped), rtol=1e-4, atol=1e-4)
                    exit_logits = teacher.head(teacher.norm(mapped))
                    torch.testing.assert_close(logits[step][b, place], exit_logits, rtol=1e-4, atol=1e-3)
        rows = torch.arange(2)
        exits = {place: batch.hidden[layer][rows, anchors[:, 1]] for place, layer in enumerate(layers)}
        before, normed = batch.hidden[teacher.num_layers][rows, anchors[:, 1]], batch.final[rows, anchors[:, 1]]
        exact = teacher.head(normed)
        early = [row[:, 1] for row in logits]
        for got, expected in (
            (predictor.pipeline_logits(teacher, exits, before), [*early, exact]),
            (predictor.pipeline_logits(teacher, exits, normed, normed=True), [*early, exact]),
            (predictor.pipeline_logits(teacher, exits, None), early),
            (predictor.pipeline_logits(teacher, {1: exits[1]}, None), early[1:]),
            (predictor.pipeline_logits(teacher, {}, before), [exact]),
            (predictor.pipeline_logits(teacher, {}, normed, normed=True), [exact]),
        ):
            torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_exits_out_of_range(teacher: Teacher) -> None:
    with pytest.raises(PredictorError, match=r"exits \[1, 3\] is out of range for tiny-llama: .* follow loops 1 to 2"):
        make_predictor(teacher, kind="speed", loops=3, exits=[1, 3])
    with pytest.raises(PredictorError, match=r"exits \[4\] is out of range for looped-1x4: .* follow loops 1 to 3"):
        make_predictor(looped_teacher(1, 4), kind="speed", exits=[4])
    for exits in (None, [1]):
        with pytest.raises(PredictorError, match="none: it has one loop"):
            make_predictor(teacher, kind="speed", loops=1, exits=exits)
    with pytest.raises(TeacherError, match=r"set predictor\.loops .* \(1 to 4\)"):
        make_predictor(teacher, kind="speed")
    with pytest.raises(TeacherError, match=r"runs its layers 4 times, predictor\.loops is 3"):
        make_predictor(looped_teacher(1, 4), kind="speed", loops=3)


def test_compare_rows_is_the_definition() -> None:
    torch.manual_seed(0)
    draft, target = torch.randn(6, 11), torch.randn(6, 11)
    got = compare_rows(draft, target)
    for row in range(6):
        p, q = target[row].softmax(0), draft[row].softmax(0)
        assert torch.isclose(got.kl[row], (p * (p / q).log()).sum(), atol=1e-5)
        assert torch.isclose(got.total_variation[row], (p - q).abs().sum() / 2, atol=1e-6)
        assert torch.isclose(got.cross_entropy[row], -q[target[row].argmax()].log(), atol=1e-5)
        assert bool(got.top1[row]) == (int(draft[row].argmax()) == int(target[row].argmax()))
        assert bool(got.top5[row]) == (int(target[row].argmax()) in draft[row].topk(5).indices.tolist())


def test_every_configured_kind_has_a_predictor() -> None:
    assert list(PREDICTORS) == list(CONFIGS)


def test_transfer_layer_out_of_range(teacher: Teacher) -> None:
    with pytest.raises(PredictorError, match=f"1 <= t <= {LAYERS - 1}"):
        make_predictor(teacher, kind="firp", layer=LAYERS, steps=2)


@pytest.mark.parametrize("section", [*KINDS, *COUPLED, *EXITS], ids=lambda section: str(section))
def test_folder_round_trip(teacher: Teacher, tmp_path: Path, section: dict) -> None:
    predictor = make_predictor(teacher, **section)
    save_predictor(predictor, tmp_path / "p", teacher)
    again = load_predictor(predictor_folder(str(tmp_path / "p")), teacher)
    assert again.describe() == predictor.describe()
    for name, value in predictor.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_folder_refusals(teacher: Teacher, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    save_predictor(make_predictor(teacher, kind="firp", layer=1, steps=2), folder, teacher)
    other = wrap_model(tiny_model("llama-mha"), name="other")
    with pytest.raises(FingerprintError, match="--force"):
        load_predictor(folder, other)
    load_predictor(folder, other, force=True)
    with pytest.raises(PredictorError, match="no embedded predictor"):
        predictor_folder(str(tmp_path / "nothing"))
    weights = folder / "predictor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(PredictorError, match="cannot be loaded"):
        load_predictor(folder, teacher)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"predictor": config["predictor"] | {"layer": True}}))
    with pytest.raises(PredictorError, match=r"config\.json: predictor\.layer: expected a number"):
        load_predictor(folder, teacher)
    config["predictor"]["kind"] = "frip"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PredictorError, match="did you mean 'firp'"):
        load_predictor(folder, teacher)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("teacher", "loading"), {"foo": 1}, r"config.json: teacher.loading.foo is not known to this firp"),
        (("teacher", "loading"), {"dtype": 5}, r"teacher.loading.dtype: .*got 5"),
        (("teacher", "loading"), None, r"teacher.loading: .*got None"),
        (("teacher", "chat_template"), {"source": "plain"}, r"teacher.chat_template.fingerprint: Field required"),
        (("teacher", "chat_template"), 5, r"teacher.chat_template: .*got 5"),
        (("teacher",), "x", r"config.json: teacher: .*got 'x'"),
        (("predictor",), [], r"config.json: predictor: .*got \[\]"),
        (("predictor", "kind"), [1], r"unknown predictor kind \[1\]"),
        (("predictor", "layer"), None, r"predictor.layer: .*got None"),
        (("predictor", "steps"), 3, r"predictor.safetensors cannot be loaded: .*Missing key.*maps.2"),
        (("format",), 2, r"format is 2, this firp reads 1"),
    ],
)
def test_damaged_config_is_one_line_with_file_and_field(
    teacher: Teacher, tmp_path: Path, place: tuple[str, ...], value: Any, words: str
) -> None:
    save_predictor(make_predictor(teacher, kind="firp", layer=1, steps=2), tmp_path, teacher)
    file = tmp_path / "config.json"
    inner = config = json.loads(file.read_text())
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    file.write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    with pytest.raises(PredictorError, match=words) as caught:
        load_predictor(tmp_path, teacher)
    assert "\n" not in str(caught.value)


def test_predictor_with_nan_weights_or_deep_config_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=1, steps=2)
    with torch.no_grad():
        predictor.maps[1].weight[3, 4] = float("nan")
    save_predictor(predictor, tmp_path, teacher)
    with pytest.raises(PredictorError, match=r"predictor.safetensors .*maps.1.weight has NaN or infinite values"):
        load_predictor(tmp_path, teacher)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(PredictorError, match="nested too deeply"):
        load_predictor(tmp_path, teacher)


@pytest.mark.parametrize(("size", "count"), [(4096, 7), (128_256, 15), (49_152, 1), (997, 5), (256, 40), (64, 64)])
def test_largest_equals_topk(size: int, count: int) -> None:
    """Vocabularies with parts, without (a prime), and too small for them."""
    values = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))
    best, places = largest(values, count)
    assert torch.equal(best, values.topk(count).values)
    assert torch.equal(values.gather(-1, places), best)
    assert places.sort().values.diff().gt(0).all()
