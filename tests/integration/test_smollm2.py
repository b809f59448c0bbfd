"""Shipped predictors with the real teacher that they were trained for, where it is installed (`make smollm2`)."""

from __future__ import annotations

import json

import pytest
import torch

from firp_cli.config import TeacherConfig
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import default_tree
from firp_cli.predictors.folder import load_predictor, predictor_folder
from firp_cli.recipe import load_recipe
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.source import known_teachers
from firp_cli.teacher.teacher import Teacher

PREDICTORS = {  # most bytes
    "smollm2-firp-plus": 8_000_000,
    "smollm2-firp": 6_000_000,
    "smollm2-hidden-transfer": 6_000_000,
    "smollm2-medusa": 6_000_000,
}
NEW_TOKENS = 24
installed = pytest.mark.skipif(
    known_teachers()["smollm2-135m"].installed() is None, reason="smollm2-135m is not installed: make smollm2"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        found = load_teacher(TeacherConfig(model="smollm2-135m"), "cpu")
    assert use_lean_layers(found) is None
    return found


@pytest.mark.parametrize("name", PREDICTORS)
def test_smollm2_predictor_is_small_and_records_training(name: str) -> None:
    folder = predictor_folder(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= PREDICTORS[name]
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["store"]["counts"]["response_tokens"] >= 400_000
    assert "/" not in record["store"]["settings"]["dataset"]
    shipped, named = load_recipe(str(folder / "recipe.yaml")), load_recipe(name)
    assert shipped.data == named.data and shipped.data.split == "train"
    assert shipped.predictor == named.predictor


@installed
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_predictors_draft_losslessly(teacher: Teacher) -> None:
    prompts = [encode_prompt(prompt.messages, teacher.tokenizer) for prompt in load_prompts("chat", limit=2)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = teacher.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        expected.append(written[0, len(prompt) :].tolist())
    for name in PREDICTORS:
        folder = predictor_folder(name)
        predictor = load_predictor(folder, teacher)
        engine = Engine(teacher, predictor, default_tree(folder, predictor))
        made = [engine.generate([prompt], NEW_TOKENS)[0] for prompt in prompts]
        assert [item.token_ids for item in made] == expected, name
        steps = [length for item in made for length in item.accepted_lengths]
        assert sum(steps) / len(steps) > 1.3, name
