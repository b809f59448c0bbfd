"""The layer stack and the K/V caches against the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from conftest import LAYERS, VOCABULARY, sequence_batch, tiny_model
from firp_cli.errors import TeacherError
from firp_cli.recipe import TeacherConfig
from firp_cli.teacher.attention import AttentionMask, behind_prefix, causal_allowed
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.stack import Teacher


def test_layers_are_the_models_own(any_teacher: Teacher) -> None:
    """Hidden states of every layer, past any sliding window, and the normed final state."""
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    own = any_teacher.model(ids, output_hidden_states=True)
    batch = sequence_batch(any_teacher, ids.tolist(), [1, 1], list(range(LAYERS + 1)))
    for layer in range(LAYERS):
        assert torch.allclose(batch.hidden[layer], own.hidden_states[layer], atol=1e-4), layer
    assert torch.allclose(batch.final, own.hidden_states[-1], atol=1e-4)
    assert torch.allclose(any_teacher.head(batch.final), own.logits, atol=1e-3)


def test_a_model_that_does_more_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    Teacher(model)
    model.model.register_forward_hook(_scale)
    with pytest.raises(TeacherError, match="logits"):
        Teacher(model)


def _scale(module: object, args: object, output: object) -> object:
    output.last_hidden_state = output.last_hidden_state * 1.5  # type: ignore[attr-defined]
    return output


def test_unknown_architectures_are_refused() -> None:
    small = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    with pytest.raises(TeacherError, match="rotary_emb"):
        Teacher(gpt2)
    with pytest.raises(TeacherError, match=r"teacher\.model"):
        Teacher.load(TeacherConfig(model="/nonexistent/model"))


def test_fingerprint_follows_the_weights() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    first = Teacher(model).fingerprint
    assert Teacher(copy.deepcopy(model)).fingerprint == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert Teacher(model).fingerprint != first


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_keeps_the_accepted_rows(teacher: Teacher, batch: int) -> None:
    """Prefix of different lengths, five rows, keep some of them: the next row sees what a fresh forward would."""
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
    depth = torch.tensor([0, 1, 1, 1, 2])
    cache = KVCache(teacher.num_layers, batch, 32, torch.device("cpu"))
    with torch.no_grad():
        width = max(lengths)
        ids = torch.tensor([[*prefix, *[0] * (width - len(prefix))] for prefix in prefixes])
        view = cache.begin(width)
        positions = cache.lengths[:, None] + torch.arange(width)
        full = causal_allowed(torch.full((batch,), width), width)
        teacher.run(teacher.embed(ids), positions, mask_of(full, cache, view), cache=cache)
        cache.advance(torch.tensor(lengths))
        cache.longest = width
        view = cache.begin(5)
        positions = cache.lengths[:, None] + depth
        teacher.run(teacher.embed(rows), positions, mask_of(allowed, cache, view), cache=cache)
        cache.commit(paths, counts)
        cache.longest = width + 3
        view = cache.begin(1)
        last = teacher.run(
            teacher.embed(rows[:, :1]),
            cache.lengths[:, None],
            mask_of(torch.ones(batch, 1, 1, dtype=torch.bool), cache, view),
            cache=cache,
        )
        got = teacher.head(teacher.norm(last))[:, 0]
        for row in range(batch):
            kept = [int(rows[row, node]) for node in paths[row, : counts[row]]]
            fresh = torch.tensor([[*prefixes[row], *kept, int(rows[row, 0])]])
            assert torch.allclose(got[row], teacher.model(fresh).logits[0, -1], atol=1e-3)


def mask_of(rows: torch.Tensor, cache: KVCache, view: int) -> AttentionMask:
    return AttentionMask(behind_prefix(rows, cache.lengths, view), torch.float32)


def test_sequences_leave_the_cache(teacher: Teacher) -> None:
    cache = KVCache(1, 3, 8, torch.device("cpu"))
    cache.begin(2)
    keys = torch.arange(3.0)[:, None, None, None].expand(3, 2, 2, 4).contiguous()
    cache.update(keys, keys, 0)
    cache.advance(torch.tensor([2, 2, 2]))
    cache.select(torch.tensor([0, 2]))
    cache.longest = 2
    cache.begin(1)
    seen, _ = cache.update(keys[:2, :, :1], keys[:2, :, :1], 0)
    assert seen[:, 0, 0, 0].tolist() == [0.0, 2.0]
    assert cache.bytes() == 1 * 2 * 2 * 2 * 8 * 4 * 4
