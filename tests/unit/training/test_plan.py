"""Plans of large runs against arithmetic from public shapes, and the comparison with a device before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from firp_cli import machine
from firp_cli.cli.app import app
from firp_cli.config import Recipe
from firp_cli.errors import CapacityError
from firp_cli.machine import parse_bytes
from firp_cli.recipe import load_recipe
from firp_cli.training.memory_model import memory_lines, remedies, stage_lines, total_bytes
from firp_cli.training.plan import make_plan, planned_memory
from firp_cli.training.preflight import preflight

TOKENS, CONVERSATIONS, VOCABULARY, KV_SIZE = 500, 60_000, 128_256, 1024
SHAPES = {  # hidden size, feed-forward size, layers, transfer layer, ranks, micro-batch
    "llama-3.1-8b": (4096, 14336, 32, 24, 8, 4),
    "llama-3.1-70b": (8192, 28672, 80, 60, 16, 2),
}


def shipped(name: str, *changes: str) -> Recipe:
    return load_recipe(f"{name}-firp", [f"teacher.model={name}", *changes])


@pytest.mark.parametrize("name", list(SHAPES))
def test_plan_of_large_teacher_matches_arithmetic(name: str):
    size, feed, layers, transfer, ranks, batch = SHAPES[name]
    plan = make_plan(shipped(name), ranks, mean_tokens=TOKENS)
    layer = 2 * size * size + 2 * size * KV_SIZE + 3 * size * feed + 2 * size  # q, o; k, v; gate, up, down; norms
    assert plan.teacher_parameters == layers * layer + 2 * VOCABULARY * size + size
    assert plan.chain and plan.memory
    tokens = CONVERSATIONS * TOKENS
    assert plan.chain.tokens == tokens
    # two states, an int32 token and a byte of the mask; scaled rows have two bytes of scale each
    assert plan.chain.disk["bfloat16"] == tokens * (2 * 2 * size + 5)
    assert plan.chain.disk["int8"] == plan.chain.disk["float8"] == tokens * (2 * (size + 2) + 5)
    attention = 2 * TOKENS * size  # 2 products * 2 operations * half of the positions
    states = tokens * layers * (2 * layer + attention)
    assert plan.chain.flops["states"] == pytest.approx(states)
    upper, head = layers - transfer, VOCABULARY * size
    pseudo = 4 * (upper * 2 * (2 * layer + attention) + 6 * head + 6 * size * size)  # k = 4
    training = tokens * upper * (2 * layer + attention) + CONVERSATIONS * 64 * pseudo
    assert plan.chain.flops["training"] == pytest.approx(training)
    answers = CONVERSATIONS * 512 * (layers * (2 * layer + 2 * 2048 * size) + 2 * head)
    assert plan.chain.flops["answers"] == pytest.approx(answers)
    device = 989e12 * ranks * 3600
    hours = {"states": states / device / 0.35, "training": training / device / 0.35, "answers": answers / device / 0.05}
    assert plan.chain.hours == pytest.approx(hours)
    held = upper * layer + head
    shared = ranks if name.endswith("70b") else 1
    assert plan.memory["teacher weights"] == -(-held // shared) * 2
    assert plan.memory["predictor weights"] == 2 * 4 * size * size
    assert plan.memory["optimizer states"] == 12 * 4 * size * size // ranks
    assert plan.memory["pseudo rows, for backward"] == 2 * batch * 64 * 4 * upper * (8 * size + 4 * feed)
    assert plan.memory["total"] < 80e9
    collecting = {line.name: line.bytes for line in plan.collecting}
    assert collecting["teacher weights"] == -(-plan.teacher_parameters // shared) * 2
    assert collecting["states kept"] == 4096 * 2 * size * 2
    assert sum(collecting.values()) < 80e9


@pytest.mark.parametrize("name", list(SHAPES))
def test_plan_command_prints_verdict_and_remedies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    command = ["train", f"{name}-firp", f"teacher.model={name}", "--plan", "--tokens", "500", "--gpus", "8"]
    small = CliRunner().invoke(app, [*command, "--device-memory", "9GB" if name.endswith("8b") else "16GB"])
    assert small.exit_code == 0, small.output
    assert "a rank needs" in small.output and "it fits with" in small.output and "disk, int8" in small.output
    slow = ["--device-tflops", "100", "--utilisation", "0.5", "--device-memory", "80GB", "--json"]
    values = json.loads(CliRunner().invoke(app, [*command, *slow]).stdout)
    chain = values["plan"]["chain"]
    assert chain["hours"]["states"] == pytest.approx(chain["flops"]["states"] / (8 * 100e12 * 0.5 * 3600))
    assert values["verdict"].startswith("fits") and not list(tmp_path.iterdir())


def changed(recipe: Recipe, remedy: str) -> Recipe:
    values = recipe.model_dump()
    for word in remedy.split():
        (section, field), value = word.split("=")[0].split("."), word.split("=")[1]
        values[section][field] = int(value) if value.isdigit() else value
    return Recipe.model_validate(values)


ROOMS = [("cached", 10e9), ("cached", 8e9), ("cached", 5e9), ("cached", 4.6e9)]


@pytest.mark.parametrize(("mode", "room"), ROOMS)
def test_remedies_fit_and_are_the_largest(mode: str, room: float):
    recipe = shipped("llama-3.1-8b", f"data.mode={mode}", "collect.responder=vllm")
    planned = planned_memory(recipe, 8)
    assert planned is not None
    teacher, parameters, lines = planned
    assert total_bytes(lines) > room, "else there is nothing to remedy"
    found = remedies(recipe, teacher, parameters, 8, int(room))
    assert found

    def need(setting: Recipe) -> int:
        return total_bytes(memory_lines(setting, teacher, parameters, 8))

    for remedy in found:
        better = changed(recipe, remedy)
        assert need(better) <= room, remedy
        if remedy.startswith("training.anchors"):
            more = better.training.model_copy(update={"anchors_per_sequence": better.training.anchors_per_sequence + 1})
            assert need(better.model_copy(update={"training": more})) > room


def test_remedies_are_valid_recipes():
    """A sharded teacher generates no answers: the recipe must name vLLM."""
    found = preflight(shipped("llama-3.1-8b"), 8, 8 * 10**9, "of a toy")
    assert found is not None and "teacher.sharding" not in found[1]


def test_preflight_reports_that_nothing_fits():
    found = preflight(shipped("llama-3.1-8b"), 1, 2 * 10**9, "of a toy")
    assert found is not None and "no setting makes it fit" in found[1] and "2.0 GB (of a toy)" in found[1]


def run_train(tmp_path: Path, *changes: str) -> Any:
    arguments = ["train", "demo", f"--store={tmp_path / 's'}", f"--output={tmp_path / 'o'}", "data.mode=online"]
    return CliRunner().invoke(app, [*arguments, "data.dataset=arithmetic", *changes])


def test_oversized_run_is_refused_before_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "available_memory", lambda: int(1.2e9))
    monkeypatch.setattr("firp_cli.distributed.launch.launch", lambda *_: pytest.fail("nothing is launched"))
    result = run_train(tmp_path, "training.micro_batch_size=64")
    assert isinstance(result.exception, CapacityError) and result.exception.exit_code == 2
    assert "it fits with training.anchors_per_sequence=" in str(result.exception) or "micro_batch_size=" in str(
        result.exception
    )
    assert "pseudo rows, for backward" in result.stderr and not (tmp_path / "o").exists()
    monkeypatch.setattr("firp_cli.distributed.launch.launch", lambda *_: True)  # here it would start
    warned = run_train(tmp_path, "training.micro_batch_size=64", "training.preflight=warn")
    assert warned.exit_code == 0 and "a rank needs" in warned.stderr
    silent = run_train(tmp_path, "training.micro_batch_size=64", "training.preflight=ignore")
    assert silent.exit_code == 0 and "a rank needs" not in silent.stderr


def coupled(*changes: str) -> Recipe:
    return load_recipe("llama-3.1-8b-firp-plus", ["teacher.model=llama-3.1-8b", *changes])


@pytest.mark.parametrize("share", [True, False])
def test_plan_of_first_stage_matches_arithmetic(share: bool):
    """Six steps on the shape of Llama-3.1-8B, 64 anchors, three epochs, a loss over 4096 tokens."""
    size, feed, layers, transfer, ranks, _ = SHAPES["llama-3.1-8b"]
    steps, heads = 6, 1 if share else 6
    plan = make_plan(coupled(f"predictor.coupling.share={share}"), ranks, mean_tokens=TOKENS)
    maps, coupling, biases = steps * size * size, heads * 4 * size * size, steps * size
    assert plan.predictor_parameters == maps + coupling + biases
    assert plan.chain and plan.memory
    anchors = CONVERSATIONS * 64
    assert plan.chain.draft_states == anchors * steps * size * 2
    layer = 2 * size * size + 2 * size * KV_SIZE + 3 * size * feed + 2 * size
    upper = (layers - transfer) * (2 * layer + 2 * TOKENS * size)
    frozen = CONVERSATIONS * TOKENS * upper + anchors * (steps * upper + 2 * maps)
    learning = 3 * anchors * 6 * steps * (4 * size * size + 4096 * size)
    assert plan.chain.flops["first stage"] == pytest.approx(frozen + learning)
    assert plan.chain.flops["training"] == plan.chain.hours["training"] == 0, "max_steps is 0"
    assert plan.steps == 0 and plan.first_stage_steps == 3 * (59_400 // (8 * 2 * 8))
    held = (layers - transfer) * layer + 2 * VOCABULARY * size  # the coupling reads the embedding
    assert plan.memory["teacher weights"] == 2 * held
    assert plan.memory["predictor weights"] == 2 * plan.predictor_parameters
    assert plan.memory["predictor gradients"] == 2 * (coupling + biases)
    assert plan.memory["optimizer states"] == -(-12 * (coupling + biases) // ranks)
    assert "pseudo rows, for backward" not in plan.memory
    assert plan.stages["first stage"] == plan.memory["total"] > plan.stages["second stage"]


def test_plan_of_second_stage_counts_maps_and_coupling():
    plan = make_plan(coupled("training.max_steps=null"), 8, conversations=60_000, tokens=30_000_000)
    without = make_plan(coupled("training.coupling.epochs=0", "training.max_steps=null"), 8, mean_tokens=TOKENS)
    assert plan.chain and without.chain and plan.steps and plan.first_stage_steps
    assert plan.chain.flops["training"] == without.chain.flops["training"] > 0
    assert plan.stages["second stage"] > plan.stages["first stage"], "gradients run through the teacher's layers"
    assert without.first_stage_steps is None and without.chain.draft_states == 0
    assert "first stage" not in without.chain.flops and list(without.stages) == ["training"]
    read = plan.steps * 8 * 2 * 4 + plan.first_stage_steps * 8 * 2 * 8
    assert plan.tokens == read * TOKENS


def test_sharded_teacher_keeps_no_draft_states():
    kept, computed = (
        make_plan(coupled(f"teacher.sharding={kind}", "collect.responder=vllm"), 8, mean_tokens=TOKENS).chain
        for kind in ("none", "zero3")
    )
    assert kept and computed and computed.draft_states == 0
    assert computed.flops["first stage"] > kept.flops["first stage"], "forwards in every epoch"


@pytest.mark.parametrize(("changes", "room"), [([], 12e9), ([], 10e9), (["training.max_steps=null"], 11e9)])
def test_remedies_of_two_stages_fit_both(changes: list[str], room: float):
    changes = ["collect.responder=vllm", *changes]
    recipe = coupled(*changes)
    planned = planned_memory(recipe, 8)
    assert planned is not None and total_bytes(planned[2]) > room
    found = remedies(recipe, planned[0], planned[1], 8, int(room))
    assert any("training.coupling." in remedy for remedy in found)
    for remedy in found:
        values = coupled(*changes, *remedy.split())
        for lines in stage_lines(values, planned[0], planned[1], 8).values():
            assert total_bytes(lines) <= room, remedy


def test_plan_command_prints_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    command = ["train", "llama-3.1-8b-firp-plus", "teacher.model=llama-3.1-8b", "--plan", "--tokens", "500"]
    printed = CliRunner().invoke(app, command).output
    assert "disk, draft states" in printed and "188.7 GB" in printed
    assert "hours, first stage" in printed and "hours, training" not in printed
    assert "optimizer steps, first stage" in printed and "first stage, which needs most" in printed
    plain = CliRunner().invoke(app, ["train", "llama-3.1-8b-firp", *command[2:]]).output
    assert "hours, training" in plain and "first stage" not in plain


def test_parse_bytes_reads_units():
    assert parse_bytes("80GB") == parse_bytes("80g") == 80 * 10**9
    assert parse_bytes("64GiB") == 64 * 2**30 and parse_bytes("1.5 MiB") == 3 * 2**19 and parse_bytes("7") == 7
    for wrong in ("", "GB", "80 apples", "1.2.3GB", "-5GB"):
        with pytest.raises(CapacityError, match="not an amount of memory"):
            parse_bytes(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a CPU's memory")
def test_memory_of_rank_honours_cgroup_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\nactive_file 7\n")
    assert machine._cgroup_memory_free(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_memory_free(tmp_path) is None
    monkeypatch.setattr(machine, "available_memory", lambda: 4000)
    monkeypatch.setattr(machine, "_cgroup_memory_free", lambda: 3000)
    room = machine.memory_of_rank(3)
    assert room is not None and room[0] == 1000 and "3 ranks" in room[1]
