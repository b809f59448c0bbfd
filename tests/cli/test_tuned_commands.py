"""Tuned trees and the guard in `firp bench` and `firp generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.loading import load_pair, load_trees
from firp_cli.cli.terminal import quiet_libraries
from firp_cli.config import TeacherConfig
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.errors import UsageError
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.environment import machine_key
from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.folder import save_predictor
from firp_cli.results import BenchReport, Prediction, as_json
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TunedTree
from helpers.commands import invoke
from helpers.folders import save_prompts, save_teacher
from helpers.models import embedded_predictor, embedded_prompts, embedded_teacher, make_predictor, tiny_teacher

PREDICTED = Prediction(2.0, 1.5, 1.0, 1.33)
GREEDY = {"temperature": 0.0, "options": EngineOptions()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a predictor for it and a data set."""
    folder = tmp_path_factory.mktemp("tuned")
    loaded = load_teacher(TeacherConfig(model=str(save_teacher(folder / "teacher"))), device="cpu")
    save_predictor(make_predictor(loaded, kind="firp", layer=2, steps=3), folder / "one", loaded)
    save_prompts(folder / "words.jsonl")
    return folder


def entry(loaded: Teacher, batch: int, tree: str, **changes: Any) -> TunedTree:
    given = {"machine": machine_key(loaded), "teacher": loaded.fingerprint, "temperature": 0.0, **changes}
    return TunedTree(batch_size=batch, context=32, tree=tree, predicted=PREDICTED, **given)


def write(path: Path, *entries: TunedTree, **default: Any) -> Path:
    path.write_text(json.dumps({**default, "entries": [as_json(item) for item in entries]}))
    return path


def test_trees_come_from_the_option_else_the_folder(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    quiet_libraries(verbose=False)  # prints what is logged
    teacher, predictor, _ = load_pair(str(work / "one"), None, False)
    options: dict[str, Any] = GREEDY
    assert load_trees(None, tmp_path, predictor, teacher, **options) == parse_tree("dynamic:8", 3)
    assert load_trees("chain/2", tmp_path, predictor, teacher, **options) == parse_tree("chain/2", 3)
    (tmp_path / "tree.json").write_text(json.dumps({"tree": "dynamic:5"}))
    assert load_trees(None, tmp_path, predictor, teacher, **options) == TreeSpec("dynamic", 5)
    write(tmp_path / "tree.json", entry(teacher, 1, "dynamic:4"), entry(teacher, 2, "chain", machine={}), tree="chain")
    for text, folder in ((None, tmp_path), (str(tmp_path / "tree.json"), work / "one")):
        found = load_trees(text, folder, predictor, teacher, **options)
        assert isinstance(found, TunedTrees)
        assert [item.tree for item in found.entries] == ["dynamic:4"] and str(found.default) == "chain"
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="no tree 'spiral'"):
        load_trees("spiral", tmp_path, predictor, teacher, **options)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"machine": {"device": "another"}}, "was tuned on another machine, chain is used: `firp tune "),
        ({"teacher": "another"}, "was tuned on another machine, chain is used: `firp tune "),
        ({"temperature": 0.7}, "was tuned for another temperature, chain is used: `firp tune "),
    ],
)
def test_trees_of_another_machine_print_one_line(
    changes: dict[str, Any], expected: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quiet_libraries(verbose=False)  # prints what is logged
    teacher, predictor, folder = load_pair(str(work / "one"), None, False)
    file = write(tmp_path / "tree.json", entry(teacher, 1, "dynamic:4", **changes), tree="chain")
    trees = load_trees(str(file), folder, predictor, teacher, 0.0, EngineOptions())
    assert trees == parse_tree("chain", 3)
    (line,) = capsys.readouterr().err.splitlines()
    measured = "temperature" if "temperature" in changes else "machine"
    assert expected in line and line.endswith(f"`firp tune {folder} --tree-file {file}` measures this {measured}")


def test_pipelines_have_no_trees() -> None:
    teacher = tiny_teacher("llama")
    speed = make_predictor(teacher, kind="speed", loops=2)
    assert load_trees(None, Path("nowhere"), speed, teacher, 0.0, EngineOptions()) is None


@pytest.mark.parametrize(
    ("guard", "trees", "pipeline"), [(None, False, True), (True, True, True), (False, False, False)]
)
def test_guard_is_on_for_pipelines_by_default(guard: bool | None, trees: bool, pipeline: bool) -> None:
    teacher = tiny_teacher("llama")
    predictors = {
        "firp": LoadedPredictor(
            make_predictor(teacher, kind="firp", layer=2, steps=3), parse_tree("chain", 3), Path("a")
        ),
        "speed": LoadedPredictor(make_predictor(teacher, kind="speed", loops=2), None, Path("b")),
    }
    baseline, drafting, piping = make_methods(
        teacher, predictors, ["ar", "firp", "speed"], BenchSettings(max_new_tokens=8, guard=guard)
    )
    assert isinstance(baseline.engine, Engine) and isinstance(drafting.engine, Engine)
    assert isinstance(piping.engine, PipelineEngine)
    assert (piping.engine.fallback is not None) == pipeline
    for engine, guarded in ((baseline.engine, False), (drafting.engine, trees)):
        engine.generate([[5, 9, 33]], 8)
        assert bool(engine.fallbacks) == guarded


@pytest.mark.parametrize(("size", "tree"), [(1, "dynamic:6/3"), (4, "static:2x1")])
def test_bench_row_names_its_tuned_tree(size: int, tree: str) -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    entries = (entry(teacher, 1, "dynamic:6/3"), entry(teacher, 4, "static:2x1"))
    tuned = TunedTrees(parse_tree("dynamic:8", 4), 4, entries)
    predictors = {
        "tuned": LoadedPredictor(predictor, tuned, Path("tuned")),
        "fixed": LoadedPredictor(predictor, parse_tree("dynamic:4", 4), Path("fixed")),
    }
    settings = BenchSettings(max_new_tokens=16, batch_size=size, repeats=1, warmup=0)
    methods = make_methods(teacher, predictors, ["ar", "tuned", "fixed"], settings)
    report = run_bench(teacher, [BenchPrompt(prompt, "set") for prompt in embedded_prompts(4)], methods, settings)
    report = BenchReport.from_json(json.loads(json.dumps(as_json(report))))
    rows = {row.method: row for row in report.rows}
    assert {name: (row.tree, row.predicted) for name, row in rows.items()} == {
        "ar": (None, None),
        "tuned": (tree, PREDICTED),
        "fixed": ("dynamic:4", None),
    }
    assert rows["tuned"].lossless.identical == 4


def test_bench_takes_a_file_of_tuned_trees(work: Path, tmp_path: Path) -> None:
    teacher, _, _ = load_pair(str(work / "one"), None, False)
    file = write(tmp_path / "trees.json", entry(teacher, 2, "dynamic:3/2"), entry(teacher, 8, "none"))
    options = ["--limit", "4", "--max-new-tokens", "8", "--repeats", "1", "--methods", "ar,firp", "--tree", file]
    for batch, tree in ((2, "dynamic:3/2"), (8, "none")):
        out = tmp_path / f"report-{batch}"
        command = ("bench", work / "one", "--dataset", work / "words.jsonl", *options, "--output", out, "--guard")
        done = invoke(*command, "--batch-size", batch)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "another machine" not in done.stderr
        written = json.loads((out / "bench.json").read_text())
        row = next(row for row in written["rows"] if row["method"] == "firp")
        assert (row["tree"], row["predicted"]) == (tree, as_json(PREDICTED))
        assert row["lossless"]["identical"] == 4 and written["settings"]["guard"] is True


@pytest.mark.parametrize("guard", [None, "--guard", "--no-guard"])
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_generate_is_guarded_unless_it_samples(
    guard: str | None, temperature: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed reproduces its text only without a guard, whose decisions depend on measured times."""
    made: list[bool] = []
    original = Engine.__init__

    def recording(engine: Engine, *arguments: Any, **options: Any) -> None:
        original(engine, *arguments, **options)
        made.append(options["guard"])

    monkeypatch.setattr(Engine, "__init__", recording)
    options = [guard] if guard else []
    done = invoke(
        *("generate", work / "one", "--prompt", "w5 w6", "--max-new-tokens", "4", "--temperature", temperature),
        *options,
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert made == [guard == "--guard" if guard else temperature == "0"]


def test_generate_prints_that_trees_were_tuned_elsewhere(work: Path, tmp_path: Path) -> None:
    teacher, _, _ = load_pair(str(work / "one"), None, False)
    options = ["--prompt", "w5 w6 w7", "--max-new-tokens", "12", "--tree"]
    expected = invoke("generate", work / "one", "--method", "ar", *options[:-1]).stdout
    for machine, noted in ((machine_key(teacher), False), ({"device": "another"}, True)):
        file = write(tmp_path / "tree.json", entry(teacher, 1, "dynamic:3", machine=machine))
        done = invoke("generate", work / "one", *options, file)
        assert done.exit_code == 0, (done.output, done.exception)
        assert done.stdout == expected
        assert ("was tuned on another machine" in done.stderr) == noted
