"""Attention that kernels and lean layers do not compute is found at load: named, or left to the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from firp_cli.config import TeacherConfig
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import TeacherError
from firp_cli.teacher.attention import choose_backend
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher, load_upper, wrap_model
from helpers.models import SETTINGS, generate_reference, made_once, make_predictor, random_prompts

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3Next": (
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")},
        "layers 0, 1, 2 are linear_attention: such layers keep a recurrent state, of which a rejected draft",
    ),
    "Llama4Text": (
        {"num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": 8},
        "layers 0, 1, 2 are chunked_attention: a token in such layers sees its own chunk",
    ),
    "Jamba": ({"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}, "layers 0, 2 are linear_attention"),
    "FalconH1": ({"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_ssm": 96}, "layers 0, 1, 2, 3 are hybrid"),
    "RecurrentGemma": ({}, "layers 0, 1, 3 are linear_attention"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "layers 0, 2 are conv: such layers keep a recurrent"),
    "Mamba": ({}, "recurrent state"),
    "Gemma3nText": (
        {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
        "its last 2 layers read the keys and values of earlier layers",
    ),
    "DeepseekV3": (
        {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        r"latent attention \(MLA\)",
    ),
    "Bloom": ({"n_head": 4, "n_layer": 2}, r"a bias by distance \(ALiBi\)"),
    "Gemma3Text": ({}, r"its rotary tables differ by kind of layer \((full_attention, )?sliding_attention\)"),
    "Falcon": ({"head_dim": None}, "it needs alibi beside states, positions, mask and cache"),
    "GPT2": ({"n_head": 4, "n_layer": 2}, "it has learned absolute positions"),
    "OPT": ({"ffn_dim": 64}, "it has learned absolute positions"),
    "GPTJ": ({"rotary_dim": 4, "n_head": 4}, "it has no rotary position embeddings that all its layers share"),
    "Cohere": ({}, r"it multiplies its logits by 0\.0625"),
    "Granite": ({"embedding_multiplier": 3.0}, "it multiplies its embeddings by 3,"),
}
OWN_SCORES: dict[str, tuple[dict[str, Any], str]] = {
    "GptOss": (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "rope_parameters": {"rope_theta": 1e4}},
        "attention sinks",
    ),
    "Gemma2": ({"sliding_window": 8, "attn_logit_softcapping": 3.0}, "a cap on its scores"),
    # a bound that random states hardly reach: it is found all the same
    "VaultGemma": ({"sliding_window": 8, "attn_logit_softcapping": 50.0}, "a cap on its scores"),
}


@made_once
def model_of(kind: str) -> Any:
    options = (REFUSED | OWN_SCORES)[kind][0]
    config = getattr(transformers, f"{kind}Config")(
        **{key: value for key, value in (SETTINGS | options).items() if value is not None}
    )
    torch.manual_seed(1)
    name = f"{kind.removesuffix('Text')}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}"
    model = getattr(transformers, name)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_(std=2.0)
    return model


@pytest.mark.parametrize("kind", list(REFUSED))
def test_layers_that_trees_cannot_serve_are_refused_in_words(kind: str) -> None:
    with pytest.raises(TeacherError, match=f"tiny: .* is not supported: .*{REFUSED[kind][1]}") as refusal:
        wrap_model(model_of(kind), name="tiny")
    assert str(refusal.value).endswith("or similar model (docs/reference.md, Architectures)")


@pytest.fixture(scope="module", params=["Lfm2", "Gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.chat import byte_tokenizer

    path = tmp_path_factory.mktemp(request.param)
    model_of(request.param).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_every_way_of_loading_finds_the_kind(folder: Path) -> None:
    configs = [TeacherConfig(model=str(folder)), TeacherConfig(model=str(folder), device_map="cpu")]
    loads = [
        *(lambda config=config: load_teacher(config, "cpu") for config in configs),
        lambda: load_upper(configs[0], 2, "cpu"),
    ]
    for load in loads:
        if "Lfm2" in folder.name:
            with pytest.raises(TeacherError, match="layers 0, 2 are conv"):
                load()
        else:
            teacher = load()
            assert teacher.own_masks == "its attention has a cap on its scores" and not teacher.standard_attention


@pytest.mark.parametrize("kind", list(OWN_SCORES))
def test_own_scores_keep_the_librarys_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, words = wrap_model(model_of(kind), name="tiny"), OWN_SCORES[kind][1]
    assert teacher.own_masks == f"its attention has {words}" and not teacher.standard_attention
    assert words in str(use_lean_layers(teacher)) and teacher.stack is teacher.library
    assert isinstance(teacher.causal_mask(4).additive(None), torch.Tensor)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(TeacherError, match=f"attention triton cannot run this teacher: .*{words}: use auto or sdpa"):
        Engine(teacher, options=EngineOptions(attention="triton"))
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, teacher.own_masks) == "sdpa"
    assert choose_backend("auto", cuda) == "triton"


@pytest.mark.parametrize("kind", list(OWN_SCORES))
def test_own_scores_decode_as_the_model_generates(kind: str) -> None:
    teacher = wrap_model(model_of(kind), name="tiny")
    prompts = random_prompts(2, seed=5, low=9)
    expected = [generate_reference(model_of(kind), prompt, 10, eos_token_id=1) for prompt in prompts]
    predictor: Any = make_predictor(teacher, kind="firp", layer=2, steps=2)
    for engine in (Engine(teacher), Engine(teacher, predictor, parse_tree("dynamic:5", 2))):
        assert [item.token_ids for item in engine.generate(prompts, 10)] == expected


def test_lean_layers_are_compared_at_the_contexts_end() -> None:
    """Ministral 3 scales its queries only after the original context; near the start lean layers would agree."""
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    scaled = {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
    torch.manual_seed(0)
    config = transformers.Ministral3Config(**SETTINGS, rope_parameters=rope | scaled)
    model = transformers.Ministral3ForCausalLM(config).eval()
    teacher = wrap_model(model, name="tiny")
    assert "lean ones differ" in str(use_lean_layers(teacher))
    (prompt,) = random_prompts(1, low=90, high=90)
    expected = generate_reference(model, prompt, 12, eos_token_id=1)
    assert Engine(teacher).generate([prompt], 12)[0].token_ids == expected


def test_layers_with_keys_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may describe its attention otherwise than its layers compute it."""
    model = model_of("Gemma2")
    monkeypatch.setattr(model.config, "num_key_value_heads", 4)
    with pytest.raises(TeacherError, match=r"its layer 0 writes keys and values of \[\(2, 24, 12, 2, 24, 12\)\]"):
        wrap_model(model, name="tiny")
