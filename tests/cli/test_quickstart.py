"""`firp quickstart`: test prompts are not trained on, and one command ends in a table and a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from firp_cli.cli import quickstart as module
from firp_cli.cli.quickstart import (
    AROUND_TRAINING,
    LEAST_TRAINING,
    MEASURING,
    MOST_EPOCHS,
    Prompts,
    default_predictor,
    find_prompts,
    make_recipe,
    training_overrides,
)
from firp_cli.data.datasets import load_prompts
from firp_cli.errors import DatasetError, TeacherError, UsageError
from firp_cli.recipe import load_recipe
from helpers.commands import firp, invoke


def test_quickstart_keeps_the_last_tenth_of_a_file_back(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(50)))
    found = find_prompts(str(path), None, tmp_path / "out")
    train, test = load_prompts(found.train), load_prompts(found.test)
    assert (found.count, len(train), len(test)) == (45, 45, 5)
    asked = [prompt.messages[0]["content"] for prompt in (*train, *test)]
    assert asked == [f"question {number}" for number in range(50)]


def test_quickstart_keeps_later_turns(tmp_path: Path) -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [{"turns": ["one", "two"]}, {"messages": talk}] * 25
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out").mkdir()
    found = find_prompts(str(path), None, tmp_path / "out")
    read = [prompt.conversation for name in (found.train, found.test) for prompt in load_prompts(name)]
    assert read == [prompt.conversation for prompt in load_prompts(str(path))]
    assert all(len(conversation.turns()) == 2 for conversation in read)


def test_quickstart_uses_the_splits_of_a_known_set(tmp_path: Path) -> None:
    found = find_prompts("chat", None, tmp_path)
    assert (found.train, found.test, found.count) == ("chat", "chat", 200)
    assert not list(tmp_path.iterdir())


def test_quickstart_refuses_prompts_that_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "one"}\n' * 10)
    with pytest.raises(DatasetError, match="has 10 prompts; a quickstart needs 25"):
        find_prompts(str(path), None, tmp_path / "out")
    folder = tmp_path / "data" / "mt_bench"
    folder.mkdir(parents=True)
    (folder / "question.jsonl").write_text('{"turns": ["one"]}\n')
    with pytest.raises(DatasetError, match="test prompts only"):
        find_prompts("mt_bench", tmp_path / "data", tmp_path / "out")


SMALL = {"layer": 4, "steps": 3}


def test_quickstart_layer_is_at_two_thirds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert default_predictor("arithmetic") == {"layer": 4, "draft_vocabulary": None}
    with pytest.raises(TeacherError, match="give a model folder"):
        default_predictor("owner/no-such-model")
    assert default_predictor("arithmetic", 2)["layer"] == 2
    with pytest.raises(UsageError, match="between 1 and 5"):
        default_predictor("arithmetic", 6)


@pytest.mark.parametrize(("vocabulary", "drafted"), [(32767, None), (32768, 16384), (151936, 16384)])
def test_quickstart_drafts_frequent_tokens_of_large_vocabularies(
    vocabulary: int, drafted: int | None, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    LlamaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        folder
    )
    assert default_predictor(folder)["draft_vocabulary"] == drafted


def test_quickstart_recipe_trains_on(tmp_path: Path) -> None:
    recipe = make_recipe("arithmetic", find_prompts("chat", None, tmp_path), None, tmp_path, SMALL, 64)
    assert recipe.training.coupling.epochs > 1 and recipe.training.coupling.max_minutes is None
    assert recipe.data.regenerate and recipe.training.max_steps == 0, "the first stage alone"
    assert recipe.predictor is not None and recipe.predictor.transfer_layers == (4, 4, 4)


def test_quickstart_collects_and_trains_in_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts("chat", "chat", 200)
    for fast, dtype in ((True, "bfloat16"), (False, "auto")):
        monkeypatch.setattr("firp_cli.teacher.packed_linear.fast_bfloat16", lambda device, fast=fast: fast)
        recipe = make_recipe("arithmetic", prompts, None, Path("out"), SMALL, 64)
        assert recipe.teacher.dtype == dtype


def test_quickstart_trains_in_the_minutes_that_tuning_leaves() -> None:
    given = ["predictor.kind=firp_plus", "predictor.layer=4", *training_overrides(9.0, 15.0)]
    settings = load_recipe(None, given).training.coupling
    assert settings.max_minutes == pytest.approx(9.0 - MEASURING * 15.0 - AROUND_TRAINING, abs=0.1)
    assert settings.epochs == MOST_EPOCHS
    for left, minutes in ((4.5, 15.0), (-1.0, 15.0), (0.6 + AROUND_TRAINING + 0.9 * LEAST_TRAINING, 2.0)):
        assert training_overrides(left, minutes) == ["training.coupling.epochs=0"]


def test_quickstart_hands_the_time_that_is_left_to_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "run", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(module, "_affordable", lambda path, recipe, count, seconds: round(seconds))
    folder = tmp_path / "out"
    module.quickstart("arithmetic", 15.0, "chat", None, folder, layer=4, steps=2, max_new_tokens=32, verbose=False)
    assert [arguments[0] for arguments in commands] == ["collect", "train", "tune", "bench"]
    recipe = load_recipe(str(folder / "recipe.yaml"))
    assert recipe.data.limit == pytest.approx(0.4 * 15 * 60, abs=30)
    assert recipe.training.coupling.max_minutes is None and recipe.training.coupling.epochs < MOST_EPOCHS
    taught = load_recipe(str(folder / "recipe.yaml"), list(commands[1][2:])).training
    assert taught.coupling.max_minutes == pytest.approx((1 - MEASURING) * 15 - AROUND_TRAINING, abs=0.5)
    assert taught.coupling.epochs == MOST_EPOCHS and taught.gate_prompts == 2 and taught.max_steps == 0


@pytest.mark.nightly
def test_quickstart_ends_in_a_table_and_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data" / "sums"
    data.mkdir(parents=True)
    rows = [{"messages": prompt.messages} for prompt in load_prompts("arithmetic", None, 40, "train")]
    own = data / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts", str(own), "--minutes", "2", "--output", "out", "--max-new-tokens", "48"]
    done = firp("quickstart", "arithmetic", *options, cwd=tmp_path, FIRP_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ firp ")]
    assert commands == ["collect", "collect", "train", "tune", "bench"]
    rows = json.loads((tmp_path / "out" / "bench" / "bench.json").read_text())["rows"]
    found = {row["method"]: row for row in rows if row["category"] == "all"}
    assert found["firp_plus"]["lossless"]["identical"] == found["firp_plus"]["lossless"]["compared"] == 4
    entries = json.loads((tmp_path / "out" / "predictor" / "tree.json").read_text())["entries"]
    assert [entry["batch_size"] for entry in entries] == [1]
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert recipe.data.limit == 36 and recipe.store == "out/store"
    monkeypatch.chdir(tmp_path)
    error = invoke("quickstart", "arithmetic", *options).exception
    assert isinstance(error, UsageError) and "contains an earlier quickstart" in str(error)
