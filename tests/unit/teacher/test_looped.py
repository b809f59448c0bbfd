"""Looped teachers: shared layers against unrolled ones, the model's own code against a recipe's loops, K/V by stage."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from firp_cli.config import LoopedSection
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.speed.stage_cache import StageCache
from firp_cli.errors import TeacherError
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.looped import LayerGroup, LoopedLayers, layer_groups
from firp_cli.teacher.looped_llama import LoopedLlamaConfig, LoopedLlamaForCausalLM, register
from firp_cli.teacher.masks import AttentionMask, causal_allowed
from firp_cli.teacher.teacher import Teacher
from helpers.models import (
    DESCRIBED,
    HIDDEN,
    LAYERS,
    SETTINGS,
    VOCABULARY,
    OwnLoops,
    described,
    described_model,
    described_teacher,
    generate_reference,
    looped_model,
    looped_teacher,
    pipe_teacher,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import pairwise

SHAPES = [(1, 4), (2, 3), (4, 2), (3, 4)]
shapes = pytest.mark.parametrize(("unique", "loops"), SHAPES, ids=[f"{unique}x{loops}" for unique, loops in SHAPES])


def unrolled(model: Any) -> LlamaForCausalLM:
    """Return an ordinary Llama of u*r layers with the looped one's weights copied r times, in cyclic order."""
    config = model.config
    plain = LlamaForCausalLM(LlamaConfig(**(SETTINGS | {"num_hidden_layers": config.unique_layers * config.loops})))
    plain.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    plain.model.norm.load_state_dict(model.model.norm.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    for number, layer in enumerate(plain.model.layers):
        layer.load_state_dict(model.model.layers.unique[number % config.unique_layers].state_dict())
    return plain.eval()


def some_ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_states(teacher: Teacher, ids: Tensor) -> list[Tensor]:
    """Return h^0..h^L of whole sequences (B, T), layer by layer and without a cache."""
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    mask = teacher.sequence_mask(causal_allowed(torch.full((batch,), length), length), positions)
    states: list[Tensor] = []
    teacher.run(teacher.embed(ids), positions, mask, on_layer=lambda _, hidden: states.append(hidden))
    return states


@shapes
@torch.no_grad()
def test_looped_states_equal_unrolled_model(unique: int, loops: int) -> None:
    model, plain, ids = looped_model(unique, loops), unrolled(looped_model(unique, loops)), some_ids()
    looped, unrolled_output = (item(ids, output_hidden_states=True) for item in (model, plain))
    torch.testing.assert_close(looped.logits, unrolled_output.logits)
    assert len(looped.hidden_states) == unique * loops + 1
    for got, expected in zip(looped.hidden_states, unrolled_output.hidden_states, strict=True):
        torch.testing.assert_close(got, expected)


@shapes
def test_looped_llama_stores_unique_layers(unique: int, loops: int) -> None:
    model = looped_model(unique, loops)
    assert model.config.num_hidden_layers == len(model.model.layers) == unique * loops
    numbers = {name.split(".")[2] for name in model.state_dict() if name.startswith("model.layers.")}
    assert numbers == set(map(str, range(unique)))
    one_loop = LoopedLlamaForCausalLM(LoopedLlamaConfig(**SETTINGS, unique_layers=unique, loops=1))
    assert model.num_parameters() == one_loop.num_parameters()
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in one_loop.named_parameters()}


@shapes
def test_looped_generate_is_equal_with_and_without_cache(unique: int, loops: int) -> None:
    prompt = random_prompts(1, seed=1, low=6, high=9)[0]
    model = looped_model(unique, loops)
    texts = [generate_reference(model, prompt, 20, use_cache=cached) for cached in (True, False)]
    assert texts[0] == texts[1] == generate_reference(unrolled(model), prompt, 20)
    assert len(set(texts[0])) > 5


@pytest.mark.parametrize("auto", [True, False])
def test_saved_looped_llama_loads_with_loops(tmp_path: Path, auto: bool) -> None:
    register()
    register()
    model, ids = looped_model(2, 3), some_ids()
    model.save_pretrained(tmp_path)
    again = (AutoModelForCausalLM if auto else LoopedLlamaForCausalLM).from_pretrained(tmp_path)
    assert type(again) is LoopedLlamaForCausalLM
    assert (again.config.unique_layers, again.config.loops, again.config.num_hidden_layers) == (2, 3, 6)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert wrap_model(again).fingerprint == looped_teacher(2, 3).fingerprint


@shapes
def test_looped_gradients_sum_over_loops(unique: int, loops: int) -> None:
    shared, ids = copy.deepcopy(looped_model(unique, loops)).requires_grad_(True).train(), some_ids(1, 10)
    plain = unrolled(shared).requires_grad_(True).train()
    for model in (shared, plain):
        model(ids).logits.log_softmax(-1)[..., 3].sum().backward()
    for number, layer in enumerate(shared.model.layers.unique):
        copies = [dict(plain.model.layers[place].named_parameters()) for place in range(number, unique * loops, unique)]
        for name, parameter in layer.named_parameters():
            parts = torch.stack([item[name].grad for item in copies])
            torch.testing.assert_close(parameter.grad, parts.sum(0), rtol=1e-4, atol=1e-4 * parts.abs().max().item())
            assert all(part.abs().sum() > 0 for part in parts)


@shapes
def test_teacher_counts_effective_layers(unique: int, loops: int, any_stack: str) -> None:
    teacher = looped_teacher(unique, loops, any_stack == "lean")
    assert teacher.num_layers == unique * loops
    assert teacher.windows == [None] * unique * loops
    assert teacher.looped == LoopedSection(block=unique, loops=loops)
    assert teacher.boundaries() == teacher.boundaries(loops) == tuple(unique * loop for loop in range(1, loops + 1))
    plain, ids = wrap_model(unrolled(teacher.model)), some_ids(2, 30)
    assert any_stack == "library" or use_lean_layers(plain) is None
    for got, wanted in zip(plain_states(teacher, ids), plain_states(plain, ids), strict=True):
        torch.testing.assert_close(got, wanted)


def test_looped_model_with_hook_is_refused() -> None:
    model = copy.deepcopy(looped_model(2, 3))
    wrap_model(model)
    calls: list[int] = []

    def in_the_second_loop(_: object, __: object, output: Tensor) -> Tensor:
        calls.append(1)
        return 1.5 * output if len(calls) == 2 else output

    model.model.layers.unique[1].register_forward_hook(in_the_second_loop)
    with pytest.raises(TeacherError, match="own forward at layer"):
        wrap_model(model)


def test_fingerprint_and_description_depend_on_loops() -> None:
    three, four = (LoopedLlamaForCausalLM(LoopedLlamaConfig(**SETTINGS, unique_layers=2, loops=r)) for r in (3, 4))
    four.load_state_dict(three.state_dict())
    teachers = [wrap_model(three), wrap_model(four)]
    assert teachers[0].fingerprint != teachers[1].fingerprint
    assert wrap_model(copy.deepcopy(three)).fingerprint == teachers[0].fingerprint
    seen = [item.describe() for item in teachers]
    assert [item["looped"]["loops"] for item in seen] == [3, 4]
    assert [item["layers"] for item in seen] == [6, 8]
    assert seen[0]["parameters"] == seen[1]["parameters"] == three.num_parameters()
    assert "looped" not in tiny_teacher("llama").describe()


@pytest.mark.parametrize("name", ["llama", "qwen3", "ouro"])
def test_unnorm_inverts_final_norm(name: str, any_stack: str) -> None:
    teacher = described_teacher(name, any_stack == "lean")
    normed = teacher.norm(3 * torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(teacher.norm(teacher.unnorm(normed)), normed, rtol=1e-4, atol=1e-4)


def test_boundaries_without_sharing_are_groups() -> None:
    teacher = tiny_teacher("llama")
    assert [teacher.boundaries(loops) for loops in range(1, LAYERS + 1)] == [(4,), (2, 4), (2, 3, 4), (1, 2, 3, 4)]
    for loops in (None, 0, LAYERS + 1):
        with pytest.raises(TeacherError, match=r"tiny-llama runs each of its 4 layers once: .* \(1 to 4\)"):
            teacher.boundaries(loops)
    with pytest.raises(TeacherError, match=r"looped-2x3 runs its layers 3 times, predictor\.loops is 2"):
        looped_teacher(2, 3).boundaries(2)
    assert described_teacher("raven").boundaries() == (3, 5, 7), "the coda belongs to the last loop"


@described
@torch.no_grad()
def test_described_loops_equal_models_forward(name: str) -> None:
    shape, model, ids = DESCRIBED[name][1], described_model(name), some_ids(2, 30)
    before, own_code = model(ids).logits, isinstance(model, OwnLoops)
    teacher = wrap_model(model, looped=shape)
    assert (teacher.num_layers, teacher.looped) == (shape.effective, shape)
    logits = teacher.head(teacher.norm(plain_states(teacher, ids)[-1]))
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(ids).logits, before) == own_code, "an ordinary checkpoint loops from now on"
    assert wrap_model(model, looped=shape).fingerprint == teacher.fingerprint, "describing it again changes nothing"
    assert describe_parameters(teacher) == sum(parameter.numel() for parameter in described_model(name).parameters())


def describe_parameters(teacher: Teacher) -> int:
    return int(teacher.describe()["parameters"])


def written_out(name: str) -> Any:
    """Return an ordinary checkpoint's described loops as a longer ordinary model of its family."""
    model, shape = described_model(name), DESCRIBED[name][1]
    kinds = getattr(model.config, "layer_types", None)
    options = model.config.to_dict() | {"num_hidden_layers": shape.effective}
    if kinds is not None:
        options["layer_types"] = [kinds[number] for number in shape.order]
    plain = type(model)(type(model.config)(**options))
    for part in ("embed_tokens", "norm"):
        getattr(plain.model, part).load_state_dict(getattr(model.model, part).state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    for layer, number in zip(plain.model.layers, shape.order, strict=True):
        layer.load_state_dict(model.model.layers[number].state_dict())
    return plain.eval()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_described_checkpoint_generates_looped(name: str, any_stack: str) -> None:
    """Generate past the sliding windows, with and without a cache."""
    teacher, plain = described_teacher(name, any_stack == "lean"), written_out(name)
    prompt = random_prompts(1, seed=2, low=8, high=8)[0]
    expected = generate_reference(plain, prompt, 24)
    for cached in (True, False):
        assert generate_reference(teacher.model, prompt, 24, use_cache=cached) == expected
    assert greedy(teacher, prompt, 24) == expected != generate_reference(tiny_model(DESCRIBED[name][0]), prompt, 24)
    assert teacher.windows == wrap_model(plain).windows


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("llama", LoopedSection(prelude=1, block=2, coda=2, loops=2), r"1 \+ 2 \+ 2 = 5 layers, the model has 4"),
        ("raven", LoopedSection(prelude=1, block=2, loops=3), r"1 \+ 2 \+ 0 = 3 layers, the model has 4"),
        ("raven", LoopedSection(prelude=1, block=2, coda=1, loops=2), "loops is 2, .* 3 times"),
        ("ouro", LoopedSection(block=2, loops=4, norm_each_loop=True), "loops is 4, .* 3 times"),
        ("ouro", LoopedSection(block=2, loops=1), "loops is 1, .* 3 times"),
        ("ouro", LoopedSection(block=2, loops=3), "differ from its own forward at logits"),
        ("raven", LoopedSection(prelude=1, block=2, coda=1, loops=3, norm_each_loop=True), "own forward at logits"),
        ("raven", LoopedSection(prelude=1, block=1, coda=2, loops=3), "own forward at logits"),
        ("raven", LoopedSection(prelude=2, block=2, loops=3), "own forward at logits"),
    ],
)
def test_wrong_loop_descriptions_are_refused(name: str, shape: LoopedSection, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        wrap_model(described_model(name), looped=shape)


@pytest.mark.parametrize(
    "shape", [LoopedSection(block=4, loops=2), LoopedSection(block=2, loops=3), LoopedSection(block=2, loops=1)]
)
def test_looped_llama_with_other_description_is_refused(shape: LoopedSection) -> None:
    with pytest.raises(TeacherError, match=r"own shape is .*block=2 .*loops=2 .*leave teacher\.looped out"):
        wrap_model(copy.deepcopy(looped_model(2, 2)), looped=shape)
    assert wrap_model(looped_model(2, 2), looped=LoopedSection(block=2, loops=2)).num_layers == 4


def test_one_loop_equals_ordinary_model() -> None:
    teacher = wrap_model(described_model("llama"), looped=LoopedSection(block=LAYERS, loops=1))
    assert teacher.boundaries() == (LAYERS,)
    ids = some_ids()
    torch.testing.assert_close(plain_states(teacher, ids)[-1], plain_states(tiny_teacher("llama"), ids)[-1])


def test_looped_layers_are_sequence_of_passes() -> None:
    layers = looped_model(2, 3).model.layers
    assert isinstance(layers, LoopedLayers)
    assert len(layers) == len(list(layers)) == len(layers[:]) == 6
    assert [item.index for item in layers] == list(range(6))
    assert [item.layer for item in layers] == 3 * layers.unique
    assert [item.index for item in layers[2:5]] == [2, 3, 4]
    assert layers[-1].index == 5
    assert layers[1].self_attn is layers.unique[1].self_attn
    with pytest.raises(IndexError):
        layers[6]
    assert len(list(layers.children())) == 2


def test_layer_groups_with_prelude_and_coda() -> None:
    shape = LoopedSection(prelude=1, block=2, coda=1, loops=3)
    prelude, block, coda = layer_groups(shape.boundaries, shape.effective, shape)
    assert prelude == LayerGroup(range(1), range(1))
    assert block == LayerGroup(range(1, 3), range(3), 2)
    assert coda == LayerGroup(range(7, 8), range(2, 3))
    assert [[block.effective(stage, layer) for layer in (0, 1)] for stage in range(3)] == [[1, 2], [3, 4], [5, 6]]
    assert [prelude.effective(0, 0), coda.effective(2, 0)] == [0, 7]
    second = block.within(range(1, 3))
    assert second == LayerGroup(range(3, 5), range(1, 3), 2)
    assert second.effective(2, 1) == block.effective(2, 1) == 6
    assert prelude.within(range(1, 3)) is None
    assert coda.within(range(2)) is None
    assert coda.within(range(2, 3)) == coda
    assert block.within(range(3)) == block


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_layer_groups_without_sharing(loops: int) -> None:
    boundaries = tiny_teacher("llama").boundaries(loops)
    groups = layer_groups(boundaries, LAYERS, None)
    assert [list(group.stages) for group in groups] == [[stage] for stage in range(loops)]
    assert [layer for group in groups for layer in group.layers] == list(range(LAYERS))
    assert tuple(group.layers.stop for group in groups) == boundaries
    assert [group.within(range(1, loops)) for group in groups] == [None, *groups[1:]]
    assert all(
        group.effective(stage, number) == layer
        for group in groups
        for stage in group.stages
        for number, layer in enumerate(group.layers)
    )


@pytest.mark.parametrize("shape", [shape for _, shape in DESCRIBED.values()], ids=list(DESCRIBED))
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_layer_groups_of_ranks_cover_each_layer_once(shape: LoopedSection, parts: int) -> None:
    cuts = [shape.loops * part // parts for part in range(parts + 1)]
    covered = [
        part.effective(stage, layer)
        for start, stop in itertools.pairwise(cuts)
        for group in layer_groups(shape.boundaries, shape.effective, shape)
        if (part := group.within(range(start, stop)))
        for stage in part.stages
        for layer in range(len(part.layers))
    ]
    assert sorted(covered) == list(range(shape.effective))


class Stages:
    """Stages of a pipeline, driven by the test: in each tick every stage takes the states of the stage before."""

    def __init__(self, teacher: Teacher, loops: int | None, stages: range, batch: int, slots: int) -> None:
        self.teacher, self.stages, self.batch, self.slots = teacher, stages, batch, slots
        groups = layer_groups(teacher.boundaries(loops), teacher.num_layers, teacher.looped)
        self.groups = [part for group in groups if (part := group.within(stages))]
        self.cache = StageCache(self.groups, batch, slots, torch.device("cpu"))
        self.hidden = torch.zeros(len(stages), batch, teacher.hidden_size)

    @torch.no_grad()
    def tick(self, entering: Tensor, positions: Tensor) -> Tensor:
        """Return the states after every stage, for `entering` (B, d) at the first stage and `positions` (stages, B)."""
        hidden = torch.cat([entering[None], self.hidden[:-1]])
        self.cache.begin_tick(positions, self.slots, self.stages.start)
        for group in self.groups:
            part = slice(group.stages.start - self.stages.start, group.stages.stop - self.stages.start)
            rows = positions[part].reshape(-1, 1)
            seen = torch.arange(self.slots).expand(len(rows), self.slots)
            mask = AttentionMask(seen[:, None] <= rows[:, :, None], torch.float32, rows, seen)
            states = hidden[part].reshape(-1, 1, hidden.shape[-1])
            rotary = self.teacher.rotary(states, rows.clamp(min=0))
            for layer in group.layers:
                additive = mask.additive(self.teacher.windows[layer])
                states = self.teacher.layer(layer, states, rotary, rows.clamp(min=0), additive, self.cache)
            hidden[part] = states.view(-1, self.batch, hidden.shape[-1])
        self.hidden = hidden
        return hidden


PIPES = ["3x4", "1x4", "raven", "raven-norms", "ouro", "qwen2-window", "llama/2", "qwen2-window/3"]


@pytest.mark.parametrize(("name", "ranks", "any_stack"), pairwise(PIPES, [1, 2], ["lean", "library"]))
def test_ticks_equal_layerwise_run(name: str, ranks: int, any_stack: str) -> None:
    """Compare every stage's states in every tick. Token n is at stage s in tick n + s; the second sequence starts three
    ticks later.

    A norm that ends every loop is in the last stage's states where the tick runs it for several stages at once.
    """
    teacher, loops = pipe_teacher(name, any_stack == "lean")
    tolerance = 2e-4 if any_stack == "library" else 5e-4  # for states up to 90: other row counts sum in another order
    boundaries, ids, late = teacher.boundaries(loops), some_ids(2, 18), torch.tensor([0, 3])
    expected, count, length = plain_states(teacher, ids), len(boundaries), ids.shape[1]
    ends = [*boundaries[:-1], teacher.num_layers]
    cut = (count + 1) // 2 if ranks == 2 else count
    parts = [range(cut), range(cut, count)][:ranks]
    pipes = [Stages(teacher, loops, part, 2, length) for part in parts]
    shape = teacher.looped
    ends_normed = bool(shape and shape.norm_each_loop and not shape.coda and len(parts[-1]) > 1)
    checked = 0
    for tick in range(length + count + 2):
        positions = tick - torch.arange(count)[:, None] - late
        positions = torch.where((positions >= 0) & (positions < length), positions, -1)
        entering = teacher.embed(ids.gather(1, positions[0].clamp(min=0)[:, None])[:, 0])
        arriving = [
            entering,
            *(pipe.hidden[-1] for pipe in pipes[:-1]),
        ]  # the states of the rank before, from the last tick
        states = torch.cat(
            [pipe.tick(state, positions[part]) for pipe, state, part in zip(pipes, arriving, parts, strict=True)]
        )
        for stage, layer in enumerate(ends):
            for b in range(2):
                position = int(positions[stage, b])
                if position >= 0:
                    wanted = expected[layer][b, position]
                    if ends_normed and layer == teacher.num_layers:
                        wanted = teacher.norm(wanted)
                    torch.testing.assert_close(states[stage, b], wanted, rtol=tolerance, atol=tolerance)
                    checked += 1
    assert checked == 2 * count * length


def test_stage_cache_rows_and_ticks_share_slots(any_stack: str) -> None:
    """Run a prompt in rows, then ticks; the slots of flushed tokens are overwritten, never rolled back."""
    teacher = looped_teacher(2, 3, any_stack == "lean")
    ids = some_ids(1, 9)
    expected = plain_states(teacher, ids)[-1][0]
    pipe = Stages(teacher, None, range(3), 1, 9)
    with torch.no_grad():
        positions = torch.arange(4)[None]
        pipe.cache.begin_rows(positions, 4)
        mask = AttentionMask(torch.ones(1, 4, 4).tril().bool(), torch.float32)
        teacher.run(teacher.embed(ids[:, :4]), positions, mask, cache=pipe.cache)
    wrong = teacher.embed(torch.tensor([5]))
    for state, place in ((wrong, [4, -1, -1]), (wrong, [5, 4, -1])):  # two tokens that are flushed
        pipe.tick(state, torch.tensor(place)[:, None])
    got = []
    for tick in range(5 + 2):
        places = torch.tensor([4 + tick - stage if 4 <= 4 + tick - stage < 9 else -1 for stage in range(3)])[:, None]
        states = pipe.tick(teacher.embed(ids[:, min(4 + tick, 8)]), places)
        if places[2] >= 0:
            got.append(states[2, 0])
    torch.testing.assert_close(torch.stack(got), expected[4:], rtol=2e-4, atol=2e-4)


def test_stage_cache_select_keeps_remaining_sequences() -> None:
    cache = StageCache([LayerGroup(range(1), range(2), 1)], 3, 4, torch.device("cpu"))
    cache.begin_tick(torch.tensor([[1, 0, 2], [0, -1, 1]]), 3)
    keys = torch.arange(6.0)[:, None, None, None].expand(6, 2, 1, 5) + 1  # stage by stage, three sequences each
    seen, _ = cache.update(keys, keys, 0)
    assert seen.shape == (6, 2, 3, 5)
    assert seen[:, 0, :, 0].tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 3], [4, 0, 0], [0, 0, 0], [0, 6, 0]]
    cache.select(torch.tensor([2]))
    cache.begin_rows(torch.tensor([[0]]), 3)
    rows = torch.full((1, 2, 1, 5), 9.0)
    first, _ = cache.update(rows, rows, 0)
    second, _ = cache.update(rows, rows, 1)
    assert first[0, 0, :, 0].tolist() == [9, 0, 3]
    assert second[0, 0, :, 0].tolist() == [9, 6, 0]
