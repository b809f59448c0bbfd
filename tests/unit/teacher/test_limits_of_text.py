"""Where a teacher's text ends: the context that scaled position embeddings reach, and the tokens that end an answer."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from firp_cli.decoding.engine import Engine
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.library_layers import eos_token_ids, max_positions
from firp_cli.teacher.load import wrap_model
from helpers.models import SETTINGS, generate_reference, random_prompts, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}


def config_of(**rope: Any) -> Any:
    return transformers.LlamaConfig(**SETTINGS | {"max_position_embeddings": 256}, rope_parameters=rope)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (YARN, 1024),  # the library takes the config's length for the original one
        (YARN | {"original_max_position_embeddings": 256}, 1024),
        (YARN | {"original_max_position_embeddings": 64}, 256),  # the config names the extended one
        (YARN | {"original_max_position_embeddings": 32}, 256),
        # Llama 3.2: 8,192 original positions, factor 32, a context of 131,072
        (LLAMA3 | {"original_max_position_embeddings": 16, "factor": 32.0}, 256),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}, 1024),
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 256),  # frequencies change after 256
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
    ],
)
def test_context_follows_the_scaled_frequencies(
    rope: dict[str, Any], context: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "firp")
    assert max_positions(config_of(**rope), rope["rope_type"]) == context
    said = [message for message in caplog.messages if "rope_parameters extend" in message]
    assert len(said) == (context > 256)


def test_yarn_decodes_past_the_config_length_as_the_model_generates() -> None:
    torch.manual_seed(4)
    model = transformers.LlamaForCausalLM(config_of(**YARN)).eval()
    teacher = wrap_model(model, name="yarn")
    (prompt,) = random_prompts(1, low=404, high=404)
    expected = generate_reference(model, prompt, 12, eos_token_id=1)
    assert Engine(teacher).generate([prompt], 12)[0].token_ids == expected
    assert use_lean_layers(teacher) is None
    assert Engine(teacher).generate([prompt], 12)[0].token_ids == expected


@pytest.mark.parametrize(
    ("named", "own", "ids", "dropped"),
    [
        (None, 7, (7,), ""),
        ([], 7, (7,), ""),
        (99999, 7, (7,), "99999"),
        (-1, 7, (7,), "-1"),
        ([3, 99999, 5, 3], 7, (3, 5), "99999"),
        ("<|end|>", 7, (7,), "'<|end|>'"),
        ([True, 2.0], 7, (7,), "True, 2.0"),
        (0, 7, (0,), ""),
        ([99999], 88888, (), "88888"),
        ([], None, (), "no token ends an answer"),
    ],
)
def test_impossible_eos_ids_fall_back_to_the_tokenizers(
    named: Any, own: int | None, ids: tuple[int, ...], dropped: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "firp")
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
    assert eos_token_ids(model, SimpleNamespace(eos_token_id=own), 97) == ids
    assert dropped in "\n".join(caplog.messages)
    assert bool(dropped) == bool(caplog.messages)


def test_impossible_eos_ids_of_a_model_end_nothing() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.generation_config.eos_token_id = [99999, 1]
    assert wrap_model(model).eos_token_ids == (1,)
