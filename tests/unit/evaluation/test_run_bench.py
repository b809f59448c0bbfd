"""Bench: row arithmetic against hand-computed numbers, comparison of outputs, the measuring loop, the commands."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firp_cli.collecting.collect_store import collect_store
from firp_cli.config import DataConfig, TeacherConfig
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import CapacityError, UsageError
from firp_cli.evaluation.answer_runs import BatchRun, Times, batch_run
from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt, fit_prompts, make_batches, spread
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.evaluation.lossless import first_divergence, unit_in_last_place
from firp_cli.evaluation.measure import measure, memory_line
from firp_cli.evaluation.methods import (
    BenchSettings,
    LoadedPredictor,
    Method,
    choose_methods,
    make_methods,
    predictor_names,
)
from firp_cli.evaluation.rows import bench_rows
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.machine import readable_bytes
from firp_cli.predictors.folder import save_predictor
from firp_cli.results import BenchReport, Divergence, Generation
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.commands import invoke
from helpers.folders import save_prompts, save_teacher
from helpers.models import (
    FakePredictor,
    generate_reference,
    make_predictor,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.reports import Page


def generation(emitted: list[int], prefill: float, decode: float, tokens: list[int] | None = None) -> Generation:
    ids = tokens or list(range(10, 11 + sum(emitted)))
    return Generation(4, ids, len(emitted), list(emitted), prefill, decode, "length")


def run(number: int, emitted: list[int], prefill: float, decode: float, category: str = "") -> BatchRun:
    return batch_run(Batch("set", category, [number]), [[generation(emitted, prefill, decode)]])


def test_bench_row_matches_hand_computed_numbers() -> None:
    runs = {
        "ar": [run(0, [1] * 6, 0.5, 3.0), run(1, [1] * 4, 0.5, 2.0)],
        "hf": [run(0, [1] * 6, 0.5, 6.0), run(1, [1] * 4, 0.5, 4.0)],
        "firp": [run(0, [3, 2, 1], 0.6, 1.5), run(1, [1, 3], 0.4, 1.0)],
    }
    mark = Divergence(1, 3, 7, 8, 1e-5)
    (row,) = bench_rows("firp", runs, {0: None, 1: mark}, 0.0)
    assert (row.dataset, row.category, row.prompts, row.new_tokens, row.steps) == ("set", "all", 2, 12, 5)
    assert row.prefill_seconds == pytest.approx(1.0) and row.decode_seconds == pytest.approx(2.5)
    assert row.tokens_per_second == pytest.approx(10 / 2.5)
    assert row.speedup == pytest.approx((5 / 10) / (2.5 / 10))
    assert row.speedup_hf == pytest.approx((10 / 10) / (2.5 / 10))
    assert row.accepted_length == pytest.approx(10 / 5)
    assert row.accepted_histogram == [0, 2, 1, 2]
    assert row.acceptance_by_step == pytest.approx([3 / 5, 2 / 5])
    assert row.accepted_length == pytest.approx(1 + sum(row.acceptance_by_step))
    assert row.step_milliseconds == pytest.approx(500.0)
    # Spec-Bench: per prompt 7/3.5 and 5/2.5 for ar, 7/2.1 and 5/1.4 for firp.
    assert row.speedup_with_prefill == pytest.approx((7 / 2.1 + 5 / 1.4) / (7 / 3.5 + 5 / 2.5))
    assert (row.lossless.compared, row.lossless.identical, row.lossless.divergences) == (2, 1, [mark])
    assert row.speedup_interval is None, "two prompts are too few for an interval"
    (ar,) = bench_rows("ar", runs, {}, 0.0)
    assert ar.speedup == 1.0 and ar.accepted_length == 1.0 and ar.acceptance_by_step == []
    assert ar.speedup_interval is None and ar.lossless.compared == 0


def test_categories_have_their_own_rows() -> None:
    runs = {"ar": [run(0, [1, 1], 0.1, 1.0, "qa"), run(1, [1, 1, 1], 0.1, 1.0, "rag"), run(2, [1], 0.1, 1.0, "qa")]}
    rows = bench_rows("ar", runs, {}, 0.0)
    assert [(row.category, row.prompts) for row in rows] == [("all", 3), ("qa", 2), ("rag", 1)]


def test_speedup_needs_a_baseline() -> None:
    (row,) = bench_rows("firp", {"firp": [run(0, [2, 2], 0.1, 1.0)]}, {}, 0.0)
    assert row.speedup is None and row.speedup_hf is None and row.speedup_with_prefill is None


def test_single_token_answers_have_no_decode_time() -> None:
    runs = {"ar": [run(0, [], 0.1, 0.0)], "firp": [run(0, [], 0.1, 0.0)]}
    (row,) = bench_rows("firp", runs, {}, 0.0)
    assert row.speedup is None and row.new_tokens == 1 and math.isnan(row.accepted_length)


def test_times_are_medians_of_the_slowest_sequence() -> None:
    repeats = [[generation([2, 2], 0.3, seconds), generation([4], 0.3, seconds / 2)] for seconds in (4.0, 1.0, 2.0)]
    times = Times.of([batch_run(Batch("set", "", [0, 1]), repeats)])
    folded = times.fold(times.everything)
    assert (folded.tokens.item(), folded.passes.item()) == (8, 2) and folded.decode.item() == pytest.approx(2.0)


def test_batches_never_mix_categories() -> None:
    prompts = [BenchPrompt([1], "set", category) for category in "aabab"]
    assert [batch.numbers for batch in make_batches(prompts, 2)] == [[0, 1], [2, 4], [3]]


def test_spread_takes_from_every_category() -> None:
    assert spread(["a"] * 5 + ["b"] * 2 + ["c"], 4) == [0, 1, 5, 7]
    assert spread(["a", "a"], 9) == [0, 1]


def test_methods_take_turns_after_uncounted_warm_up() -> None:
    calls: list[str] = []

    def method(name: str) -> Method:
        def generate(prompts: list[list[int]], tokens: int) -> list[Generation]:
            calls.append(name)
            return [generation([1], 0.1, 1.0) for _ in prompts]

        return Method(name, generate)  # type: ignore[arg-type]

    prompts = [BenchPrompt([1], "set"), BenchPrompt([2], "set")]
    ticks: list[tuple[int, int | None]] = []
    settings = BenchSettings(repeats=2, warmup=1)
    measured = measure(
        [method("a"), method("b")],
        prompts,
        make_batches(prompts, 1),
        settings,
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert calls[:2] == ["a", "b"]
    assert calls[2:] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert ticks[-1] == (10, 10) and [len(runs) for runs in measured.values()] == [2, 2]


def test_graphs_are_captured_before_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every batch size, the largest first: a larger cache would drop the graphs of smaller batches."""
    events: list[tuple[str, int]] = []
    monkeypatch.setattr(Engine, "capture", lambda _, batch, *rest: events.append(("capture", batch)))
    settings = BenchSettings(max_new_tokens=4, batch_size=3, repeats=1)
    (ar,) = make_methods(tiny_teacher("llama"), {}, ["ar"], settings)
    generate = ar.generate
    ar.generate = lambda prompts, tokens: (events.append(("generate", len(prompts))), generate(prompts, tokens))[1]
    prompts = [BenchPrompt(prompt, "set") for prompt in random_prompts(4, seed=3)]
    measure([ar], prompts, make_batches(prompts, 3), settings)
    assert events[:3] == [("capture", 3), ("capture", 1), ("generate", events[2][1])] and len(events) == 5


def test_predictor_names_are_kinds_or_folders() -> None:
    kinds = [("firp", Path("runs/a")), ("medusa", Path("runs/m")), ("firp", Path("runs/b"))]
    assert predictor_names(kinds) == ["a", "medusa", "b"]


def test_choose_methods_defaults_to_all_and_suggests_names() -> None:
    assert choose_methods(None, ["firp"]) == ["ar", "hf", "prompt-lookup", "suffix", "firp"]
    assert choose_methods(["firp", "ar"], ["firp"]) == ["firp", "ar"]
    with pytest.raises(UsageError, match="did you mean 'medusa'"):
        choose_methods(["medua"], ["firp", "medusa"])


def test_long_prompts_are_refused_or_skipped() -> None:
    prompts = [BenchPrompt([1] * length, "set") for length in (5, 50)]
    with pytest.raises(CapacityError, match="longest has 50 tokens"):
        fit_prompts(prompts, 40, 10, skip_long=False)
    fitting, skipped = fit_prompts(prompts, 40, 10, skip_long=True)
    assert len(fitting) == 1 and skipped == 1
    with pytest.raises(CapacityError, match="no prompt fits"):
        fit_prompts(prompts[1:], 40, 10, skip_long=True)


def all_kinds(settings: BenchSettings) -> list[Method]:
    """Return the baselines, draft trees and a pipeline, of one teacher."""
    teacher = tiny_teacher("llama")
    drafting = make_predictor(teacher, kind="firp", layer=2, steps=3)
    predictors = {
        "firp": LoadedPredictor(drafting, parse_tree("dynamic:9", 3), Path("firp")),
        "speed": LoadedPredictor(make_predictor(teacher, kind="speed", loops=2), None, Path("speed")),
    }
    return make_methods(teacher, predictors, ["ar", "hf", "firp", "speed"], settings)


def test_memory_line_is_for_the_largest_batch_that_fits() -> None:
    """By hand: a sequence's slot takes 4 layers x 2 x 2 heads x 12 x 4 = 768 bytes; 500 positions need 1 + 1 slots
    more for autoregressive decoding, 9 x 4 + 4 for nine nodes with three pseudo rows each, 2 + 1 for two loops.
    """
    prompts = [BenchPrompt([1] * length, "set") for length in (40, 100, 113, 7)]  # 113 + 400 exceed 512
    settings = BenchSettings(max_new_tokens=400, batch_size=2)
    methods = all_kinds(settings)
    slots = {"ar": 502, "firp": 540, "speed": 503}
    for size, batch in ((2, 2), (3, 3), (8, 3)):
        for method in methods:
            if method.engine is not None:
                assert method.engine.cache_bytes(batch, 100, 400) == 768 * batch * slots[method.name]
        sizes = ", ".join(f"{name} {readable_bytes(768 * batch * count)}" for name, count in slots.items())
        line = memory_line(methods, prompts, replace(settings, batch_size=size), 512)
        assert line == f"K/V cache for {batch} x 500 positions: {sizes}"
    none = memory_line(methods[1:2], prompts, settings, 512)
    assert none == "K/V cache for 2 x 500 positions: none"
    short = memory_line(methods, prompts, settings, 400)
    assert short.startswith(f"K/V cache for 1 x 400 positions: ar {readable_bytes(768 * 402)}")


@torch.no_grad()
def test_first_divergence_reports_position_and_logit_gap(teacher: Teacher) -> None:
    prompt = [5, 9, 33, 4]
    expected = generate_reference(teacher.model, prompt, 12)
    assert first_divergence(teacher, 0, prompt, expected, list(expected)) is None
    got = list(expected)
    got[7] = (got[7] + 1) % teacher.vocab_size
    mark = first_divergence(teacher, 0, prompt, expected, got)
    assert mark is not None and (mark.position, mark.expected, mark.got) == (7, expected[7], got[7])
    logits = teacher.model(torch.tensor([[*prompt, *expected[:7]]])).logits[0, -1]
    assert mark.logit_gap == pytest.approx((logits[expected[7]] - logits[got[7]]).item(), abs=1e-4)
    assert mark.logit_gap > 0
    unit = unit_in_last_place(max(abs(logits[token].item()) for token in (expected[7], got[7])), torch.float32)
    assert mark.gap_ulps == pytest.approx(mark.logit_gap / unit)
    short = first_divergence(teacher, 0, prompt, expected, expected[:4])
    assert short is not None and (short.position, short.got) == (4, -1) and math.isnan(short.logit_gap)


def test_gaps_are_in_units_of_the_dtype() -> None:
    assert unit_in_last_place(20.0, torch.bfloat16) == 0.125
    assert unit_in_last_place(-1.0, torch.bfloat16) == 2**-7
    assert unit_in_last_place(1.5, torch.float32) == 2**-23


def test_bench_compares_with_ar_in_half_precision() -> None:
    """`ar` and draft trees run the same layers; `generate` runs the library's, which round otherwise."""
    teacher = wrap_model(copy.deepcopy(tiny_model("llama")).bfloat16())
    loaded = {
        "firp": LoadedPredictor(
            make_predictor(teacher, kind="firp", layer=2, steps=3), parse_tree("chain", 3), Path("f")
        )
    }
    settings = BenchSettings(max_new_tokens=12, repeats=1)
    prompts = [BenchPrompt(prompt, "set") for prompt in random_prompts(3, seed=8, low=4)]
    report = run_bench(teacher, prompts, make_methods(teacher, loaded, ["ar", "hf", "firp"], settings), settings)
    rows = {row.method: row for row in report.rows}
    against = rows["firp"].lossless_ar
    assert against is not None and against.compared == 3 and rows["ar"].lossless_ar is None
    assert against.identical == 3 - len(against.divergences) and rows["firp"].lossless.compared == 3
    exact = run_bench(teacher, prompts, make_methods(teacher, loaded, ["ar", "firp"], settings), settings)
    assert all(row.lossless_ar is None for row in exact.rows), "the reference is `ar` itself"


def test_hf_pads_left_cuts_at_eos_and_ignores_the_models_penalties(teacher: Teacher) -> None:
    prompts = random_prompts(4, seed=3)
    expected = [generate_reference(teacher.model, prompt, 24) for prompt in prompts]
    own = teacher.model.generation_config
    own.repetition_penalty = 5.0
    try:
        generations = HuggingFaceGenerate(teacher).generate(prompts, 24)
    finally:
        own.repetition_penalty = None
    assert teacher.model.generation_config is own
    assert [item.token_ids for item in generations] == expected
    assert all(item.prefill_seconds > 0 and item.decode_seconds > 0 for item in generations)
    assert all(item.steps == len(item.token_ids) - 1 == sum(item.accepted_lengths) for item in generations)


def test_hf_samples_with_its_own_seed(teacher: Teacher) -> None:
    prompt = random_prompts(1, seed=5)
    state = torch.random.get_rng_state()
    one = HuggingFaceGenerate(teacher, temperature=1.0, seed=1).generate(prompt, 16)[0].token_ids
    two = HuggingFaceGenerate(teacher, temperature=1.0, seed=1).generate(prompt, 16)[0].token_ids
    other = HuggingFaceGenerate(teacher, temperature=1.0, seed=2).generate(prompt, 16)[0].token_ids
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bench_is_lossless_and_counts_accepted_tokens(batch_size: int) -> None:
    teacher = tiny_teacher("llama")
    prompts = random_prompts(4, seed=7, low=4)
    outputs = [[*prompt, *generate_reference(teacher.model, prompt, 30)] for prompt in prompts]
    always = FakePredictor(teacher, outputs, 3, lambda position, step: True)
    random = make_predictor(teacher, kind="firp", layer=2, steps=3)
    settings = BenchSettings(max_new_tokens=20, batch_size=batch_size, repeats=2)
    predictors = {
        "right": LoadedPredictor(always, parse_tree("chain", 3), Path("right")),
        "firp": LoadedPredictor(random, parse_tree("dynamic:6", 3), Path("runs/firp")),
    }
    methods = make_methods(teacher, predictors, ["ar", "hf", "right", "firp"], settings)
    report = run_bench(teacher, [BenchPrompt(prompt, "set") for prompt in prompts], methods, settings)
    rows = {row.method: row for row in report.rows}
    assert report.settings["reference"] == "hf"
    for name in ("ar", "right", "firp"):
        assert (rows[name].lossless.compared, rows[name].lossless.identical) == (4, 4), name
    assert {row.new_tokens for row in report.rows} == {rows["ar"].new_tokens}
    assert rows["right"].accepted_length > 3.0 > rows["firp"].accepted_length >= 1.0
    assert rows["firp"].tree == "dynamic:6" and rows["firp"].predictor == "runs/firp"
    assert rows["ar"].accepted_length == rows["hf"].accepted_length == 1.0
    assert all(row.batch_size == batch_size and row.tokens_per_second > 0 for row in report.rows)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with a teacher, two predictors for it and a data set."""
    loaded = load_teacher(TeacherConfig(model=str(save_teacher(tmp_path / "teacher"))), device="cpu")
    for name, section in (("one", {"kind": "firp", "layer": 2, "steps": 3}), ("two", {"kind": "medusa", "steps": 2})):
        save_predictor(make_predictor(loaded, **section), tmp_path / name, loaded)
    save_prompts(tmp_path / "words.jsonl")
    return tmp_path


def test_bench_command_writes_a_report(work: Path) -> None:
    out = work / "report"
    words = str(work / "words.jsonl")
    folders = [str(work / "one"), str(work / "two")]
    options = ["--limit", "3", "--max-new-tokens", "12", "--repeats", "2", "--output", str(out)]
    result = invoke("bench", *folders, "--dataset", words, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    for text in ("ar", "hf", "firp", "medusa", "3/3", "bench.html"):
        assert text in result.stdout
    report = BenchReport.from_json(json.loads((out / "bench.json").read_text()))
    assert [row.method for row in report.rows] == ["ar", "hf", "prompt-lookup", "suffix", "firp", "medusa"]
    assert all(row.dataset == "words" and row.prompts == 3 for row in report.rows)
    assert {"bench.json", "bench.csv", "bench.md", "bench.html", "speedup.png"} <= {path.name for path in out.iterdir()}
    assert len(Page((out / "bench.html").read_text()).figures) == len(list(out.glob("*.png"))) >= 3
    assert "\\begin{tabular}" in (out / "bench.tex").read_text()


def test_bench_command_refuses_an_unknown_method_before_loading(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firp_cli.api.loading.load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    result = invoke("bench", str(work / "one"), "--dataset", str(work / "words.jsonl"), "--methods", "ar,frip")
    assert isinstance(result.exception, UsageError) and "did you mean 'firp'" in str(result.exception)


@pytest.mark.parametrize("source", ["--dataset", "--store"])
def test_eval_command_writes_a_report(work: Path, source: str) -> None:
    given = work / "words.jsonl"
    if source == "--store":
        loaded = load_teacher(TeacherConfig(model=str(work / "teacher")), device="cpu")
        given = work / "store"
        collect_store(loaded, DataConfig(dataset=str(work / "words.jsonl"), split="test"), (2,), given)
    out = work / "eval"
    result = invoke("eval", str(work / "one"), source, str(given), "--tree", "dynamic:6", "--output", str(out))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "expected accepted length" in result.stdout and "dynamic:6" in result.stdout
    report = json.loads((out / "eval.json").read_text())
    assert [step["step"] for step in report["steps"]] == [1, 2, 3] and report["data"]["sequences"] == 4
    assert set(report["similarity"]) == {"2", "3", "4"}
    assert (out / "quality.png").is_file() and (out / "similarity.png").is_file()
