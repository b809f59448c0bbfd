"""Teachers that accelerate spreads over devices, here CPU and disk."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from firp_cli.api.loading import complete_teacher, teacher_line
from firp_cli.config import TeacherConfig
from firp_cli.decoding.continuous import ContinuousBatcher
from firp_cli.decoding.engine import Engine
from firp_cli.errors import TeacherError
from firp_cli.teacher import load as loading
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.trainer import train
from helpers.models import LAYERS, sequence_batch, tiny_model, tiny_teacher
from helpers.training import losses, recipe, store

PLACES = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
PLACES += [f"model.layers.{number}" for number in range(LAYERS)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    """Teacher config with two layers on disk."""
    folder = tmp_path_factory.mktemp("spread")
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    places = {place: "disk" if place.endswith(("layers.1", "layers.3")) else "cpu" for place in PLACES}
    return TeacherConfig.model_validate({"model": str(folder), "device_map": places})


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_tokenizer", lambda config, _: (config, None, {}))


def test_spread_teacher_equals_teacher_on_one_device(config: TeacherConfig, tmp_path: Path):
    importlib.import_module("accelerate")
    spread, whole = load_teacher(config), tiny_teacher("llama")
    assert spread.fingerprint == whole.fingerprint and spread.device == whole.device
    assert all(parameter.is_meta for parameter in spread.layers[1].parameters())
    assert "placed on several devices" in str(use_lean_layers(spread))
    tokens = [[5, 9, 13, 17, 21, 60], [7, 8]]
    mine, theirs = (sequence_batch(one, tokens, [1, 1], [1, 2, 3]) for one in (spread, whole))
    assert torch.equal(mine.final, theirs.final)
    assert all(torch.equal(mine.hidden[layer], theirs.hidden[layer]) for layer in (1, 2, 3))
    for one, name in ((spread, "spread"), (whole, "whole")):
        train(recipe(max_steps=3), one, store(), tmp_path / name)
    assert losses(tmp_path / "spread") == losses(tmp_path / "whole")
    held = spread.loaded_weights
    assert held.saved == sum(p.numel() * 4 for number in (1, 3) for p in whole.layers[number].parameters())
    assert "129.8 kB saved (spread over cpu, disk)" in teacher_line(held)


def test_decoding_refuses_spread_teacher(config: TeacherConfig):
    spread = load_teacher(config)
    for engine in (Engine, ContinuousBatcher):
        with pytest.raises(TeacherError, match=r"on one device: leave teacher\.device_map"):
            engine(spread)
    whole = complete_teacher(config, spread.loaded_weights)
    assert isinstance(whole, Teacher) and whole.loaded_weights.kind == "whole"
    assert Engine(whole).generate([[5, 9, 13]], 4)[0].token_ids


def test_map_to_one_device_loads_whole_teacher(config: TeacherConfig):
    one = load_teacher(config.model_copy(update={"device_map": {"": "cpu"}}))
    assert (
        one.loaded_weights.kind == "whole"
        and use_lean_layers(one) is None
        and one.fingerprint == tiny_teacher("llama").fingerprint
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_return_from_layers_device(config: TeacherConfig):
    places = {place: "cpu" if place.endswith(("layers.1", "layers.3", "norm")) else 0 for place in PLACES}
    spread = load_teacher(config.model_copy(update={"device_map": places}))
    assert spread.device.type == "cuda" and spread.loaded_weights.kind == "device_map"
    ids = torch.tensor([[5, 9, 13, 17]], device=spread.device)
    positions = torch.arange(4, device=spread.device)[None]
    mask = spread.sequence_mask(torch.ones(1, 4, 4, dtype=torch.bool, device=spread.device).tril(), positions)
    final = spread.norm(spread.run(spread.embed(ids), positions, mask))
    assert final.device == spread.device
    expected = sequence_batch(tiny_teacher("llama"), [[5, 9, 13, 17]], [1], []).final
    torch.testing.assert_close(final.cpu(), expected, rtol=1e-4, atol=1e-4)
