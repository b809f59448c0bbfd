"""Teacher layers and K/V cache against the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.predictors.forward import forward_rows
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.masks import AttentionMask, step_mask
from firp_cli.teacher.teacher import Teacher
from helpers.models import LAYERS, VOCABULARY, sequence_batch, tiny_model, tiny_teacher


def test_layer_states_equal_models_forward(stacked_teacher: Teacher) -> None:
    """Compare hidden states of every layer, past any sliding window, and the normed final state."""
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    reference = stacked_teacher.model(ids, output_hidden_states=True)
    batch = sequence_batch(stacked_teacher, ids.tolist(), [1, 1], list(range(LAYERS + 1)))
    for layer in range(LAYERS):
        assert torch.allclose(batch.hidden[layer], reference.hidden_states[layer], atol=1e-4), layer
    assert torch.allclose(batch.final, reference.hidden_states[-1], atol=1e-4)
    assert torch.allclose(stacked_teacher.head(batch.final), reference.logits, atol=1e-3)


def test_model_with_hook_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    wrap_model(model)
    model.model.register_forward_hook(_scale)
    with pytest.raises(TeacherError, match="logits"):
        wrap_model(model)


def _scale(module: object, args: object, output: object) -> object:
    output.last_hidden_state = output.last_hidden_state * 1.5  # type: ignore[attr-defined]
    return output


def test_unknown_architectures_are_refused() -> None:
    small = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    with pytest.raises(TeacherError, match="learned absolute positions"):
        wrap_model(gpt2)
    with pytest.raises(TeacherError, match=r"teacher\.model"):
        load_teacher(TeacherConfig(model="/nonexistent/model"))


def test_damaged_weight_is_named() -> None:
    """One NaN changes every logit; states that are too large for a dtype come from sound weights."""
    model = copy.deepcopy(tiny_model("llama"))
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[3, 4] = float("nan")
    named = r"cannot be used: its weight model\.layers\.1\.mlp\.up_proj\.weight contains NaN .*\(1 of 3,072"
    with pytest.raises(TeacherError, match=named):
        wrap_model(model)
    weight[3, 4] = 0.0
    weight *= 1e38
    with pytest.raises(TeacherError, match=r"NaN or infinity at layer 2, .* too large for float32; set teacher\.dtype"):
        wrap_model(model)


def test_fingerprint_follows_weights() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    first = wrap_model(model).fingerprint
    assert wrap_model(copy.deepcopy(model)).fingerprint == first
    assert wrap_model(copy.deepcopy(model).bfloat16(), check=False).fingerprint == first  # the same teacher, rounded
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert wrap_model(model).fingerprint != first


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cached_step_equals_fresh_forward(any_stack: str, batch: int) -> None:
    """Commit some of five rows after prefixes of different lengths: the next row equals that of a fresh forward."""
    teacher = tiny_teacher("llama", any_stack == "lean")
    generator = torch.Generator().manual_seed(2)
    lengths = [4, 2, 6][:batch]
    prefixes = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    rows = torch.randint(3, VOCABULARY, (batch, 5), generator=generator)
    paths = torch.tensor([[0, 2, 4], [0, 1, 0], [0, 3, 0]])[:batch]
    counts = torch.tensor([3, 2, 2])[:batch]
    parents = {0: [0], 2: [0, 2], 4: [0, 2, 4], 1: [0, 1], 3: [0, 3]}
    allowed = torch.zeros(batch, 5, 5, dtype=torch.bool)
    for node, seen in parents.items():
        allowed[:, node, seen] = True
    cache = cache_for(teacher, batch, 5, 16)
    width = max(lengths)
    ids = torch.tensor([[*prefix, *[0] * (width - len(prefix))] for prefix in prefixes])
    for start in (0, 3):  # in chunks of three
        part = ids[:, start : start + 3]
        if part.shape[1]:
            cache.begin_chunk(start, part.shape[1])
            positions = torch.arange(start, start + part.shape[1])[None]
            slots = cache.prefix_slots(start + part.shape[1])[None]
            teacher.run(teacher.embed(part), positions, chunk_mask(positions, slots), cache=cache)
    cache.set_lengths(torch.tensor(lengths))
    run_step(teacher, cache, rows, torch.tensor([0, 1, 1, 1, 2]), allowed, width)
    cache.commit(paths, counts)
    assert cache.lengths.tolist() == [n + kept for n, kept in zip(lengths, counts.tolist(), strict=True)]
    root = rows[:, :1]
    last = run_step(teacher, cache, root, torch.tensor([0]), torch.ones(batch, 1, 1, dtype=torch.bool), width + 3)
    got = teacher.head(teacher.norm(last))[:, 0]
    for row in range(batch):
        kept = [int(rows[row, node]) for node in paths[row, : counts[row]]]
        fresh = torch.tensor([[*prefixes[row], *kept, int(rows[row, 0])]])
        assert torch.allclose(got[row], teacher.model(fresh).logits[0, -1], atol=1e-3)


def cache_for(teacher: Teacher, batch: int, scratch: int, capacity: int) -> KVCache:
    heads, size = teacher.kv_heads, teacher.head_size
    return KVCache(
        teacher.num_layers, batch, scratch, capacity, heads, size, teacher.dtype, teacher.device, spread=scratch
    )


def chunk_mask(positions: torch.Tensor, slots: torch.Tensor) -> AttentionMask:
    return AttentionMask(slots <= positions[:, :, None], torch.float32, positions, slots)


def run_step(
    teacher: Teacher, cache: KVCache, rows: torch.Tensor, depth: torch.Tensor, allowed: torch.Tensor, longest: int
) -> torch.Tensor:
    """Return the states of a step's rows after the last layer."""
    cache.begin(rows.shape[1], longest)
    positions = cache.lengths[:, None] + depth
    mask = step_mask(allowed, positions, cache.lengths, cache.prefix_slots(longest), torch.float32)
    return forward_rows(teacher, teacher.embed(rows), positions, mask, cache=cache)[0]
