"""`firp train` from the command line: plans, refusals, and whole runs on a store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from firp_cli.api.train_run import train
from firp_cli.assets import shipped_recipes
from firp_cli.config import Recipe, TrainingConfig
from firp_cli.errors import FingerprintError, FirpError, PredictorError, StoreError, UsageError
from firp_cli.predictors.folder import load_predictor
from firp_cli.recipe import load_recipe
from firp_cli.training.memory_model import optimizer_memory
from firp_cli.training.metrics_log import Listener
from firp_cli.training.plan import make_plan
from helpers.commands import invoke
from helpers.models import HIDDEN, LAYERS, ROOT, VOCABULARY, tiny_model, tiny_teacher
from helpers.train_command import FIRP, SETTINGS


def refused(*arguments: object) -> FirpError:
    error = invoke("train", *arguments).exception
    assert isinstance(error, FirpError), error
    return error


@pytest.fixture(scope="module")
def arguments(teacher_folder: Path, store_folder: Path) -> list[str]:
    return [*FIRP, *SETTINGS, f"teacher.model={teacher_folder}", f"--store={store_folder}"]


def test_train_ends_with_the_gate_and_resumes_to_the_same_predictor(arguments: list[str], tmp_path: Path):
    output = tmp_path / "run"
    result = invoke("train", *arguments, f"--output={output}", "training.epochs=2")
    assert result.exit_code == 0, result.output
    training = json.loads((output / "training.json").read_text())
    gate = training["gate"]
    assert gate["prompts"] == 2 and gate["agree"]
    assert f"gate: simulated {gate['simulated']:.3f}, decoded {gate['real']:.3f}" in result.output
    assert f"predictor: {output}" in result.output
    assert training["store"]["counts"] == {"conversations": 24} and training["data_wait_share"] < 0.5
    load_predictor(output, tiny_teacher("llama"))
    assert "add --resume" in str(refused(*arguments, f"--output={output}"))
    before = (output / "predictor.safetensors").read_bytes()
    again = invoke(
        "train", *arguments, f"--output={output}", "training.epochs=2", "training.gate_prompts=0", "--resume", "--json"
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["best_step"] == training["best_step"]
    assert "no gate: training.gate_prompts is 0" in again.stderr
    assert (output / "predictor.safetensors").read_bytes() == before


def test_train_function_returns_a_typed_result(teacher_folder: Path, store_folder: Path, tmp_path: Path):
    recipe = load_recipe(None, [*FIRP, *SETTINGS, f"teacher.model={teacher_folder}"])
    stopped = train(recipe, store=store_folder, output=tmp_path / "run", listener=Listener(stop=lambda done: done == 1))
    assert stopped.stopped and stopped.steps == 1 < stopped.planned_steps and stopped.as_json() == {}
    result = train(recipe, ["training.gate_prompts=1"], store=store_folder, output=tmp_path / "run", resume=True)
    assert result.as_json() == json.loads((tmp_path / "run" / "training.json").read_text())
    assert not result.stopped and result.output == tmp_path / "run" and result.steps == result.planned_steps
    assert result.gate is not None and result.gate["prompts"] == 1
    assert result.validation["best"]["expected_accepted_length"] == result.expected_accepted_length
    with pytest.raises(StoreError, match="firp collect RECIPE"):
        train(recipe, store=tmp_path / "nothing", output=tmp_path / "other")
    with pytest.raises(UsageError, match="names no predictor"):
        train(Recipe())


def test_train_starts_two_ranks(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "run"
    result = invoke("train", *arguments, f"--output={output}", "training.max_steps=2", "--gpus", 2)
    assert result.exit_code == 0, result.output
    training = json.loads((output / "training.json").read_text())
    assert training["world_size"] == 2 and training["steps"] == 2 and training["gate"]["prompts"] == 2


def test_train_plan_starts_nothing(tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("firp_cli.distributed.sharding.load_upper", lambda *_: pytest.fail("a plan loads no weights"))
    monkeypatch.setattr("firp_cli.distributed.launch.launch", lambda *_: pytest.fail("a plan launches nothing"))
    command = ["demo", f"teacher.model={teacher_folder}", "predictor.layer=2", "--plan"]
    result = invoke("train", *command, "--gpus", 4)
    assert result.exit_code == 0, result.output
    assert "kind: firp" in result.output and "ranks, ZeRO stage" in result.output
    assert f"{4 * HIDDEN**2:,}" in result.output and not list(tmp_path.iterdir())
    fixed = ["data.limit=800", "training.epochs=2", "--plan", "--json"]
    values = json.loads(invoke("train", "demo", f"teacher.model={teacher_folder}", "predictor.layer=2", *fixed).stdout)
    assert values["plan"]["predictor_parameters"] == 4 * HIDDEN**2
    assert values["plan"]["parameters_per_step"] == HIDDEN**2
    model = tiny_model("llama")
    used = sum(parameter.numel() for layer in model.model.layers[2:] for parameter in layer.parameters())
    assert values["plan"]["teacher_parameters_used"] == used + VOCABULARY * HIDDEN
    assert values["plan"]["steps"] == 2 * (760 // 8) and values["recipe"]["training"]["epochs"] == 2


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_train_plans_every_shipped_recipe(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("train", name, "--plan")
    assert result.exit_code == 0, result.output
    assert "needs the teacher's config" in result.output or "memory per rank: total" in result.output


def test_plan_figures_of_a_large_teacher(tmp_path: Path):
    """Llama-3.1-8B's shape, from its config alone."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    plan = make_plan(load_recipe("llama-3.1-8b-firp", [f"teacher.model={tmp_path}"]), ranks=8, tokens=None)
    assert plan.predictor_parameters == 4 * 4096**2 and plan.teacher_parameters == 8_030_261_248
    upper = 8 * (8_030_261_248 - 2 * 128256 * 4096 - 4096) // 32 + 128256 * 4096
    assert plan.memory is not None and plan.memory["teacher weights"] == 2 * upper, "layers 24.. and the head"
    assert 2 * upper + 4e9 < plan.memory["total"] < 2 * upper + 10e9
    online = make_plan(load_recipe("llama-3.1-8b-firp", [f"teacher.model={tmp_path}", "data.mode=online"]), ranks=8)
    assert online.memory is not None and online.memory["teacher weights"] == 2 * 8_030_261_248
    own_heads = load_recipe("llama-3.1-8b-firp", [f"teacher.model={tmp_path}"]).model_copy(
        update={"predictor": load_recipe("demo-medusa").predictor}
    )
    assert make_plan(own_heads, ranks=1).predictor_parameters == 4 * (4096**2 + 4096 + 128256 * 4096)


def test_zero_stages_shard_optimizer_memory():
    sizes = [optimizer_memory(TrainingConfig(zero_stage=stage, precision="bf16"), 1000, 4) for stage in (0, 1, 2, 3)]
    assert [size["optimizer states"] for size in sizes] == [12000, 3000, 3000, 3000]
    assert [size["predictor gradients"] for size in sizes] == [4000, 2000, 500, 500]
    assert [size["predictor weights"] for size in sizes] == [2000, 2000, 2000, 500]
    plain = optimizer_memory(TrainingConfig(), 1000, 4)
    assert list(plain.values()) == [4000, 4000, 8000]


def test_train_names_the_command_that_fills_a_missing_store(teacher_folder: Path, tmp_path: Path):
    missing = tmp_path / "nothing"
    error = refused("demo", "data.limit=5", f"--store={missing}", f"--output={tmp_path / 'out'}")
    assert isinstance(error, StoreError)
    assert f"firp collect demo data.limit=5 --output {missing}" in str(error)
    assert not (tmp_path / "out").exists()


def test_train_names_the_range_of_transfer_layers(arguments: list[str], tmp_path: Path):
    for extra in ([], ["--plan"]):
        error = refused(*arguments, f"predictor.layer={LAYERS}", f"--output={tmp_path / 'out'}", *extra)
        assert isinstance(error, PredictorError)
        assert f"transfer layer {LAYERS} is out of range" in str(error) and f"1 <= t <= {LAYERS - 1}" in str(error)


def test_train_refuses_a_recipe_without_predictor(tmp_path: Path):
    assert isinstance(refused(f"--output={tmp_path / 'out'}"), UsageError)


def test_train_refuses_a_store_of_another_teacher(arguments: list[str], teacher_folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    model = tiny_teacher("llama-mha").model
    model.save_pretrained(other)
    error = refused(*arguments, f"teacher.model={other}", f"--output={tmp_path / 'out'}")
    assert isinstance(error, FingerprintError)


def test_train_refuses_a_ridge_start_of_medusa(arguments: list[str], tmp_path: Path):
    changed = [item for item in arguments if not item.startswith("predictor.")]
    error = refused(*changed, "predictor.kind=medusa", f"--output={tmp_path / 'out'}")
    assert "training.init" in str(error)
