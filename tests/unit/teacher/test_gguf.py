"""Teachers from GGUF files equal the models that were written, by every way of naming them; other files are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from firp_cli.chat_template import tokenizer_fingerprint
from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.teacher import gguf as reader
from firp_cli.teacher import source
from firp_cli.teacher.load import load_teacher, load_upper
from firp_cli.training.plan import skeleton
from helpers.models import SETTINGS

gguf = pytest.importorskip("gguf")
from helpers.gguf_writer import write_gguf  # noqa: E402

SHAPE = SETTINGS | {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", "llama", {}, {}),
    "llama-tied": ("Llama", "llama", {"tie_word_embeddings": True}, {}),
    "mistral": ("Mistral", "llama", {"sliding_window": None}, {"general.name": "mistral"}),
    "mistral-window": ("Mistral", "llama", {"sliding_window": 12}, {"llama.attention.sliding_window": 12}),
    "qwen2": ("Qwen2", "qwen2", {"use_sliding_window": False}, {}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "linear rope": (
        "Llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "yarn": (
        "Qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 64,
        },
    ),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FIRP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(kind: str, **options: Any) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 1024, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gguf_teacher_equals_written_model(family: str, tmp_path: Path) -> None:
    kind, architecture, options, fields = FAMILIES[family]
    model = tiny(kind, **options)
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture, fields=fields)
    teacher = load_teacher(TeacherConfig(model=str(path)), "cpu")
    assert torch.equal(logits(teacher.model), logits(model))
    assert teacher.dtype == torch.float32 and teacher.name == path.name
    assert teacher.tokenizer.decode(teacher.tokenizer("2 + 30 = 32").input_ids).endswith("2 + 30 = 32")
    assert teacher.windows[0] == (12 if family == "mistral-window" else None)


def test_gguf_llama3_scaling_follows_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, **reader.LLAMA3_ROPE}
    model = tiny("Llama", rope_parameters=rope)
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors={reader.ROPE_FACTORS: factors})
    teacher = load_teacher(TeacherConfig(model=str(path)), "cpu")
    assert torch.allclose(logits(teacher.model), logits(model), atol=1e-4)
    odd = write_gguf(tmp_path / "odd.gguf", model, tensors={reader.ROPE_FACTORS: factors + 0.5})
    with pytest.raises(TeacherError, match="rotary factors"):
        load_teacher(TeacherConfig(model=str(odd)), "cpu")


def test_gguf_weights_are_dequantised(tmp_path: Path) -> None:
    model = tiny("Llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, quantised=gguf.GGMLQuantizationType.Q8_0)
    teacher = load_teacher(TeacherConfig(model=str(path)), "cpu")
    loaded, written = dict(teacher.model.named_parameters()), dict(model.named_parameters())
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        blocks = gguf.quants.quantize(written[name].detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(loaded[name].numpy(), expected)
    half = load_teacher(TeacherConfig(model=str(path), dtype="bfloat16"), "cpu")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.lm_head.weight, loaded["lm_head.weight"].bfloat16())
    teacher.model.save_pretrained(tmp_path / "saved")  # an unpacked model is not quantised
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_gguf_teacher_is_equal_by_file_folder_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "tiny_teacher"
    package.mkdir(parents=True)
    path = write_gguf(package / "tiny.gguf", tiny("Qwen2"), "qwen2")
    monkeypatch.syspath_prepend(tmp_path / "site")
    known = source.KnownTeacher("tiny-known", "tiny_teacher", "tiny-teacher", "nobody/tiny", "tiny.gguf", "a test")
    monkeypatch.setattr(source, "known_teachers", lambda: {"tiny-known": known})
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    configs = [
        TeacherConfig(model=str(path)),
        TeacherConfig(model=str(package)),
        TeacherConfig(model=str(package), gguf_file="tiny.gguf"),
        TeacherConfig(model="tiny-known"),
    ]
    teachers = [load_teacher(config, "cpu") for config in configs]
    assert len({teacher.fingerprint for teacher in teachers}) == 1
    assert len({tokenizer_fingerprint(teacher.tokenizer) for teacher in teachers}) == 1
    assert teachers[3].name == "tiny-known" and teachers[2].name == path.name
    upper = load_upper(configs[3], 2, "cpu")
    assert upper.loaded_weights.kind == "upper" and upper.fingerprint == teachers[0].fingerprint
    planned, reason = skeleton(configs[3])
    assert reason is None and planned is not None and planned.parameters == teachers[0].parameters


def test_gguf_cache_is_reused_until_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"))
    first = reader.unpack(path, torch.float32)
    parsed = []
    header = reader._Header
    monkeypatch.setattr(reader, "_Header", lambda path: parsed.append(path) or header(path))
    assert reader.unpack(path, torch.float32) == first and not parsed
    (first / "model.safetensors").write_bytes(b"cut")
    assert reader.unpack(path, torch.float32) == first and len(parsed) == 1
    assert (first / "model.safetensors").stat().st_size > 1000
    torch.manual_seed(8)
    other = tiny("Llama", num_hidden_layers=2)
    write_gguf(path, other)
    assert reader.unpack(path, torch.float32) != first


def test_gguf_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"))
    data = path.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"not a model\n" * 50,
        "header": data[:300],
        "cut": data[: len(data) * 3 // 4],
        "tail": data[:-64],
    }.items():
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(content)
        with pytest.raises(TeacherError, match=f"{name}.gguf is damaged, truncated or no GGUF file"):
            load_teacher(TeacherConfig(model=str(damaged)), "cpu")
    assert not list((tmp_path / "cache" / "teachers").glob("*/model.safetensors"))


def test_gguf_nan_weight_is_refused(tmp_path: Path) -> None:
    model = tiny("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    path = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(TeacherError, match=r"up_proj\.weight has NaN"):
        load_teacher(TeacherConfig(model=str(path)), "cpu")


def test_gguf_unsupported_models_are_refused(tmp_path: Path) -> None:
    model = tiny("Llama")
    for name, options, message in (
        ("missing", {"left_out": ("blk.1.ffn_up.weight",)}, "tensors are not those of a LlamaForCausalLM"),
        ("more", {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "tensors are not those"),
        ("experts", {"fields": {"llama.expert_count": 4}}, "mixtures of experts"),
        ("parts", {"fields": {"split.count": 3}}, "one of 3 parts"),
        ("longrope", {"fields": {"llama.rope.scaling.type": "longrope"}}, "scaled by 'longrope'"),
    ):
        path = write_gguf(tmp_path / f"{name}.gguf", model, **options)
        with pytest.raises(TeacherError, match=message):
            load_teacher(TeacherConfig(model=str(path)), "cpu")
    path = write_gguf(tmp_path / "strange.gguf", tiny("Qwen2"), "qwen2")
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"gptjx"))
    with pytest.raises(TeacherError, match="architecture 'gptjx' is not supported; supported: llama, mistral"):
        load_teacher(TeacherConfig(model=str(path)), "cpu")


def test_gguf_missing_file_error_names_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        write_gguf(tmp_path / "folder" / f"{name}.gguf", tiny("Llama", num_hidden_layers=1))
    for config, message in (
        (TeacherConfig(model=str(tmp_path / "no.gguf")), "no such file"),
        (TeacherConfig(model=str(tmp_path / "folder")), "several GGUF files: name one .*: a.gguf, b.gguf"),
        (TeacherConfig(model=str(tmp_path / "folder"), gguf_file="c.gguf"), "has no file 'c.gguf'.*a.gguf"),
        (TeacherConfig(model="owner/repository", gguf_file="x.gguf"), "cannot fetch x.gguf of the hub repository"),
        (TeacherConfig(model="owner/repository/x.gguf"), "cannot fetch x.gguf of the hub repository owner/repository"),
    ):
        with pytest.raises(TeacherError, match=message):
            load_teacher(config, "cpu")


def test_missing_known_teacher_error_names_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = source.known_teachers()["smollm2-135m"]
    monkeypatch.setattr(source.KnownTeacher, "installed", lambda self: None)
    with pytest.raises(TeacherError, match=f"(?s){re.escape(known.install)}.*{re.escape(known.hub)}"):
        load_teacher(TeacherConfig(model="smollm2-135m"), "cpu")


def test_gguf_full_disk_error_names_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TeacherError, match=r"[kMG]?B unpacked.*\nset FIRP_CACHE_DIR"):
        load_teacher(TeacherConfig(model=str(path)), "cpu")
