"""Teacher folders with damaged, missing or contradicting files: each is refused in a line that names the fault."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.teacher.load import load_teacher, load_upper
from helpers.folders import TEMPLATE
from helpers.models import LAYERS, VOCABULARY

Damage = Callable[[Path], Any]
TOKENIZER = "tokenizer of the teacher .*\n.*tokenizer_config.json"


def changed(file: str, **values: Any) -> Damage:
    """Return a function that sets fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut(file: str, kept: int) -> Damage:
    """Return a function that keeps the first bytes of a file."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:kept])


def without(name: str) -> Damage:
    """Return a function that takes one tensor out of the weights."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut("model.safetensors", 0), r"model.safetensors cannot be read"),
        (cut("model.safetensors", 1000), r"model.safetensors cannot be read"),
        (without("model.layers.1.mlp.up_proj.weight"), r"config.json: model.layers.1.mlp.up_proj.weight is missing\n"),
        (changed("config.json", num_hidden_layers=LAYERS + 1), rf"model.layers.{LAYERS}.\S+ is missing.* and 6 more\n"),
        (changed("config.json", vocab_size=90), rf"embed_tokens.weight has shape \[{VOCABULARY}, 48\], not \[90, 48\]"),
        (changed("config.json", num_hidden_layers=0), "has no layers"),
        (changed("config.json", hidden_size=-1), r"hidden size \(-1\)"),
        (changed("config.json", max_position_embeddings=None), "'max_position_embeddings' expected int"),
        (changed("config.json", rms_norm_eps="x"), "'rms_norm_eps' expected float"),
        (changed("config.json", hidden_act="nope"), "nope"),
        (cut("generation_config.json", 5), r"generation_config.json' is not a valid JSON file"),
        (cut("tokenizer.json", 99), TOKENIZER),
        (changed("tokenizer_config.json", chat_template=[TEMPLATE]), TOKENIZER),
        (changed("tokenizer_config.json", chat_template=5), r"is no text but 5"),
    ],
)
def test_damaged_folder_is_refused_in_a_line(teacher_folder: Path, tmp_path: Path, damage: Damage, words: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    damage(folder)
    for load in (load_teacher, lambda config: load_upper(config, 2)):
        with pytest.raises(TeacherError, match=words) as caught:
            load(TeacherConfig(model=str(folder)))
        assert str(caught.value).count("\n") <= 1


def test_weights_that_are_not_used_are_told(
    teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, load in (("whole", load_teacher), ("upper", lambda config: load_upper(config, 2))):
        folder = tmp_path / name
        shutil.copytree(teacher_folder, folder)
        with caplog.at_level(logging.INFO, logger="firp"):
            load(TeacherConfig(model=str(folder)))
            assert "does not use" not in caplog.text
            changed("config.json", num_hidden_layers=LAYERS - 1)(folder)
            assert load(TeacherConfig(model=str(folder))).num_layers == LAYERS - 1
        assert f"{name} have weights that the model does not use: model.layers.{LAYERS - 1}." in caplog.text
        caplog.clear()


def test_template_of_a_processor_is_read(teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    teacher = load_upper(TeacherConfig(model=str(folder)), LAYERS)
    assert teacher.tokenizer.chat_template == TEMPLATE
    assert teacher.origin is not None and teacher.origin.chat_template["source"] == "tokenizer"
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(TeacherError, match=r"chat_template.json cannot be read .*--chat-template"):
        load_upper(TeacherConfig(model=str(folder)), LAYERS)


def test_template_file_is_read_once(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    own = Path.read_text

    def read_and_change(path: Path, *arguments: Any, **options: Any) -> str:
        text = own(path, *arguments, **options)
        if path == file:
            file.write_text("{{ messages }}")
        return text

    monkeypatch.setattr(Path, "read_text", read_and_change)
    teacher = load_upper(TeacherConfig(model=str(teacher_folder), chat_template=str(file)), LAYERS)
    assert teacher.origin is not None
    assert teacher.tokenizer.chat_template == TEMPLATE == teacher.origin.loading["chat_template"]
