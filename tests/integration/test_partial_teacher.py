"""Teachers loaded in part have the states, losses and fingerprint of the whole one, without the lower layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from firp_cli.api import loading as command_loading
from firp_cli.config import LoopedSection, TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.predictors.folder import predictor_folder, read_config
from firp_cli.teacher.load import load_teacher, load_upper
from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.weight_files import WeightFiles
from firp_cli.training.trainer import train
from helpers.commands import invoke
from helpers.models import FAMILIES, LAYERS, tiny_model, tiny_teacher
from helpers.train_command import FIRP, SETTINGS
from helpers.training import losses, recipe, store

PIECES = "60KB"  # splits these checkpoints into several files


@pytest.fixture(scope="module")
def folders(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every family, each in several files, with the tokenizer of one."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        for path in teacher_folder.glob("tokenizer*"):
            shutil.copy(path, made[family])
        tiny_model(family).save_pretrained(made[family], max_shard_size=PIECES)
        assert len(list(made[family].glob("*.safetensors"))) > 2
    return made


def upper_states(teacher: Teacher, states: torch.Tensor, first: int) -> torch.Tensor:
    """Return logits (1, T, V) of states (1, T, d) of layer `first`."""
    count = states.shape[1]
    positions = torch.arange(count)[None]
    mask = teacher.sequence_mask(causal_allowed(torch.tensor([count]), count), positions)
    with torch.no_grad():
        return teacher.head(teacher.norm(teacher.run(states, positions, mask, first)))


@pytest.mark.parametrize(("family", "dtype"), [*((family, "auto") for family in FAMILIES), ("llama-tied", "bfloat16")])
def test_partial_teacher_equals_whole_and_reads_upper_layers_only(
    folders: dict[str, Path], family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    config = TeacherConfig.model_validate({"model": str(folders[family]), "dtype": dtype})
    whole = load_teacher(config)
    read: list[str] = []
    own = WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda files, name: (read.append(name), own(files, name))[1])
    tied = FAMILIES[family][1].get("tie_word_embeddings", False)
    for first in (1, LAYERS - 1, LAYERS):
        read.clear()
        part = load_upper(config, first)
        assert part.describe() == whole.describe() and part.fingerprint == whole.fingerprint
        states = torch.randn(1, 20, part.hidden_size).to(part.dtype)
        assert torch.equal(upper_states(part, states, first), upper_states(whole, states, first))
        layers = {int(name.split(".")[2]) for name in read if ".layers." in name}
        assert layers == set(range(first, LAYERS)) and any("embed" in name for name in read) == tied
        expected = sum(parameter.numel() * parameter.element_size() for parameter in whole.layers[:first].parameters())
        expected += 0 if tied else part.vocab_size * part.hidden_size * part.dtype.itemsize
        assert part.loaded_weights.saved == expected and part.loaded_weights.held == whole.weight_bytes - expected
        with pytest.raises(TeacherError, match="load the whole teacher"):
            part.layer(0, states, [], states, None, None)


def test_missing_embedding_is_refused(folders: dict[str, Path]):
    part = load_upper(TeacherConfig(model=str(folders["llama"])), 2)
    with pytest.raises(TeacherError, match="load the whole teacher"):
        part.embed(torch.tensor([[3]]))


def test_partial_teacher_keeps_fingerprint_of_embedded_predictor():
    trained_for = read_config(predictor_folder("firp"))["teacher"]
    assert load_upper(TeacherConfig(model="arithmetic"), 2).fingerprint == trained_for["fingerprint"]


@pytest.mark.parametrize(
    ("predictor", "layers"),
    [
        ({"kind": "firp", "layer": 2, "steps": 3}, 2),
        ({"kind": "hidden_transfer", "layers": [1, 1, 3]}, 3),
        ({"kind": "medusa", "steps": 2}, 0),
    ],
)
def test_training_losses_equal_whole_teacher(folders: dict[str, Path], tmp_path: Path, predictor: dict, layers: int):
    wanted = recipe(predictor, max_steps=4)
    train(wanted, tiny_teacher("llama"), store(), tmp_path / "whole")
    part = load_upper(TeacherConfig(model=str(folders["llama"])), LAYERS - layers)
    outcome = train(wanted, part, store(), tmp_path / "part")
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert outcome.training is not None and outcome.training["teacher_memory"]["layers"] == layers


def test_unsupported_parts_load_whole_with_note(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["llama"], tmp_path / "bin")
    for path in (tmp_path / "bin").glob("model*"):
        path.unlink()
    torch.save(tiny_model("llama").state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    found = load_upper(TeacherConfig(model=str(tmp_path / "bin")), 2)
    assert found.loaded_weights.kind == "whole" and "no safetensors weights" in found.loaded_weights.note
    looped = TeacherConfig(model=str(folders["llama"]), looped=LoopedSection(block=LAYERS, loops=2))
    found = load_upper(looped, 2)
    assert found.first == 0 and found.loaded_weights.note == "every loop needs its layers"


def test_weight_names_without_prefix_are_found(folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "base"
    shutil.copytree(folders["llama-tied"], folder)
    for path in folder.glob("model*"):
        path.unlink()
    tiny_model("llama-tied").model.save_pretrained(folder)
    config = TeacherConfig(model=str(folder))
    part = load_upper(config, 2)
    assert part.loaded_weights.kind == "upper" and part.fingerprint == load_teacher(config).fingerprint


def test_damaged_or_missing_file_error_names_file(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["llama"], tmp_path / "cut")
    path = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TeacherError, match=f"{path.name} cannot be read"):
        files = WeightFiles(str(tmp_path / "cut"))
        for name, parameter in tiny_model("llama").named_parameters():
            files.check(name, parameter.shape)
    path.unlink()
    with pytest.raises(TeacherError, match=f"{path.name} is missing"):
        WeightFiles(str(tmp_path / "cut"))


def test_train_command_reports_saved_bytes_and_gates_with_whole_teacher(
    teacher_folder: Path,
    store_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    output = tmp_path / "run"
    arguments = [*FIRP, *SETTINGS, f"teacher.model={teacher_folder}", f"--store={store_folder}"]
    result = invoke("train", *arguments, f"--output={output}", "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert "teacher: 2 of 4 layers loaded, 148.6 kB, 148.4 kB saved" in result.output
    training = json.loads((output / "training.json").read_text())
    assert training["teacher_memory"] == {"kind": "upper", "layers": 2, "of": 4, "bytes": 148608, "saved_bytes": 148416}
    assert training["gate"]["prompts"] == 2 and training["gate"]["agree"]
    monkeypatch.setattr(command_loading, "free_bytes", lambda _: 250_000)
    result = invoke("train", *arguments, f"--output={tmp_path / 'small'}", "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert "no gate: decoding needs the whole teacher, 297.0 kB, and cpu has 250.0 kB free" in result.output
    assert "whole teacher" in json.loads((tmp_path / "small" / "training.json").read_text())["gate"]["skipped"]
