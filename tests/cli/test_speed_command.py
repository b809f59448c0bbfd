"""SPEED from the command line: all commands on a teacher that only the recipe describes as looped; the embedded one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firp_cli.api.loading import load_pair
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.errors import FingerprintError, UsageError
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import BenchReport
from helpers.commands import invoke
from helpers.folders import save_prompts, save_teacher
from helpers.models import generate_reference

LOOPED = "teacher.looped={prelude: 1, block: 2, coda: 1, loops: 3}"
SETTINGS = [
    "training.validation_fraction=0.3",
    "training.micro_batch_size=2",
    "training.gate_prompts=2",
    "data.max_new_tokens=12",
    "training.max_steps=4",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint that the recipe describes as looped, a store of its states, and exits trained on it."""
    folder = tmp_path_factory.mktemp("speed")
    recipe = [f"teacher.model={save_teacher(folder / 'teacher')}", LOOPED, "predictor.kind=speed"]
    words = f"data.dataset={save_prompts(folder / 'words.jsonl', 16)}"
    save_prompts(folder / "unseen.jsonl", 4, seed=42)
    done = invoke("collect", *recipe, words, f"store={folder / 'store'}")
    assert done.exit_code == 0, (done.output, done.exception)
    done = invoke("train", *recipe, *SETTINGS, "--store", folder / "store", "--output", folder / "run")
    assert done.exit_code == 0, (done.output, done.exception)
    return folder


def test_store_contains_the_states_of_the_exits(work: Path) -> None:
    manifest = json.loads((work / "store" / "manifest.json").read_text())
    assert manifest["layers"] == [3, 5]  # after the first two loops; the coda follows the third


def test_gate_simulation_equals_decoding(work: Path) -> None:
    gate = json.loads((work / "run" / "training.json").read_text())["gate"]
    assert gate["prompts"] == 2 and gate["simulated"] == pytest.approx(gate["real"], abs=1e-9)


def test_bench_takes_the_loops_from_the_predictor(work: Path) -> None:
    """The predictor's config describes the loops; transformers' own `generate` loops too and is the reference."""
    out = work / "bench"
    options = ["--limit", "3", "--max-new-tokens", "10", "--repeats", "1", "--no-guard", "--output", out]
    done = invoke("bench", work / "run", "--dataset", work / "unseen.jsonl", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    report = BenchReport.from_json(json.loads((out / "bench.json").read_text()))
    row = next(row for row in report.rows if row.method == "speed")
    assert report.settings["reference"] == "hf" and row.lossless.identical == row.lossless.compared == 3
    assert row.pipeline is not None and row.pipeline.shared and row.pipeline.loops == 3
    assert row.accepted_length == pytest.approx(3 * row.pipeline.tokens_per_tick)
    assert row.pipeline.ticks == row.steps and row.pipeline.cost is not None
    assert row.pipeline.predicted_speedup == pytest.approx(row.accepted_length / row.pipeline.cost.relative)
    assert len(row.pipeline.cost.rows) == 3 and row.pipeline.cost.layers == row.pipeline.cost.rows[-1]
    for text in ("tokens per tick", "predicted speedup", "corrected early"):
        assert text in done.stdout
    assert (out / "occupancy.png").is_file()


def test_eval_reports_the_exits_and_the_pipeline(work: Path) -> None:
    out = work / "eval"
    done = invoke("eval", work / "run", "--store", work / "store", "--output", out)
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((out / "eval.json").read_text())
    assert [item["step"] for item in report["steps"]] == [1, 2]
    assert report["pipeline"]["exits"] == [1, 2] and 0 < report["pipeline"]["tokens_per_tick"] <= 1
    assert report["pipeline"]["predicted_speedup"] > 0
    assert {path.name for path in out.iterdir()} == {"eval.json", "eval.html", "quality.png", "occupancy.png"}


def test_generate_equals_autoregressive_decoding(work: Path) -> None:
    texts = []
    for method in ("ar", "speed"):
        path = work / f"{method}.jsonl"
        options = ["--prompts", work / "words.jsonl", "--max-new-tokens", "9", "--output", path, "--batch-size", "4"]
        done = invoke("generate", work / "run", "--method", method, *options)
        assert done.exit_code == 0, (done.output, done.exception)
        texts.append([json.loads(line)["token_ids"] for line in path.read_text().splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 16


def test_unshared_teacher_needs_groups_and_is_not_faster(work: Path) -> None:
    recipe = [f"teacher.model={work / 'teacher'}", "predictor.kind=speed"]
    error = invoke("collect", *recipe, f"data.dataset={work / 'words.jsonl'}", f"store={work / 'no'}").exception
    assert "set predictor.loops to the groups" in str(error)
    recipe.append("predictor.loops=2")
    invoke("collect", *recipe, f"data.dataset={work / 'words.jsonl'}", f"store={work / 'groups'}")
    done = invoke("train", *recipe, *SETTINGS, "--store", work / "groups", "--output", work / "grouped")
    assert done.exit_code == 0, (done.output, done.exception)
    options = ["--limit", "2", "--max-new-tokens", "8", "--repeats", "1", "--output", work / "grouped-bench"]
    done = invoke("bench", work / "grouped", "--dataset", work / "unseen.jsonl", "--methods", "ar,speed", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "no gain is to be expected on one device" in " ".join(done.stdout.split())


def test_generate_refuses_trees_and_other_teachers(work: Path) -> None:
    error = invoke("generate", work / "run", "--prompt", "w5", "--tree", "chain").exception
    assert isinstance(error, UsageError) and "has no tree" in str(error)
    error = invoke("generate", work / "run", "--teacher", "arithmetic", "--prompt", "w5").exception
    assert isinstance(error, FingerprintError) and "layers run 3 times" in str(error)


def test_embedded_exits_are_lossless_and_fill_the_pipeline() -> None:
    """Greedy text of the embedded looped teacher equals transformers' `generate`. A full pipeline shows that the exits
    predict well.
    """
    teacher, predictor, _ = load_pair("speed", None, force=False)
    assert isinstance(predictor, SpeedPredictor)
    rows = load_prompts("arithmetic", None, 12)
    prompts = [encode_prompt(row.messages, teacher.tokenizer) for row in rows]
    alone = [PipelineEngine(teacher, predictor).generate([prompt], 96)[0] for prompt in prompts[:6]]
    together = PipelineEngine(teacher, predictor).generate(prompts[6:], 96)
    for prompt, item in zip(prompts, [*alone, *together], strict=True):
        assert item.token_ids == generate_reference(teacher.model, prompt, 96)
    traces = [item.pipeline for item in alone if item.pipeline]
    assert sum(trace.left for trace in traces) >= 0.7 * sum(trace.ticks for trace in traces)
