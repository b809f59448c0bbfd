"""Bench of conversations: prompts of later turns, rows over turns, comparison turn by turn, turns that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.bench_run import load_bench_prompts
from firp_cli.api.loading import load_named_teacher
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.data.formats import Conversation
from firp_cli.data.turns import Questions
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import UsageError
from firp_cli.evaluation.answer_runs import BatchRun, Times, batch_run
from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt, decode_turns, fit_prompts, make_batches
from firp_cli.evaluation.lossless import compare_tokens
from firp_cli.evaluation.measure import measure, memory_line
from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
from firp_cli.evaluation.rows import bench_rows
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.folder import load_predictor, predictor_folder
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.notes import settings_line
from firp_cli.reports.tables import detail_cells
from firp_cli.results import BenchReport, Generation, as_json
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML, with_template
from helpers.collecting import make_teacher
from helpers.commands import invoke
from helpers.folders import save_teacher
from helpers.models import generate_reference, make_predictor

TALKS = [["what is a sum?", "and why?"], ["one"], ["It is four.", "is it?", "system?"], ["question", "answer"]]


def generation(
    emitted: list[int], prefill: float = 0.1, decode: float = 1.0, tokens: list[int] | None = None
) -> Generation:
    ids = tokens or list(range(10, 11 + sum(emitted)))
    return Generation(4, ids, len(emitted), list(emitted), prefill, decode, "length")


def save_talks(path: Path, talks: Sequence[Sequence[str]] = TALKS) -> Path:
    path.write_text("".join(json.dumps({"turns": list(talk)}) + "\n" for talk in talks))
    return path


def talk_prompts(teacher: Teacher, folder: Path, talks: Sequence[Sequence[str]] = TALKS) -> list[BenchPrompt]:
    return load_bench_prompts(str(save_talks(folder / "talks.jsonl", talks)), None, None, teacher)


def test_rows_sum_the_turns_of_a_prompt() -> None:
    """By hand: prompt 0 has two turns and prompt 1 one, decoded as one batch."""
    batch = Batch("set", "", [0, 1], [2, 1])
    assert batch.places() == [[0, 1], [0]]

    def answers(scale: float) -> list[Generation]:
        return [generation([2, 2], 0.3, 4 * scale), generation([1], 0.3, scale), generation([3, 1, 1], 0.5, 2 * scale)]

    run = batch_run(batch, [answers(1.0), answers(3.0), answers(2.0)])
    assert (run.numbers, [record.turn for record in run.first]) == ([0, 1, 0], [0, 0, 1])
    times = Times.of([run])
    folded = times.fold(times.everything)
    assert folded.prefill.item() == pytest.approx(0.3 + 0.5) and folded.decode.item() == pytest.approx(2 * (4 + 2))
    assert (folded.tokens.item(), folded.passes.item()) == (4 + 1 + 5, 2 + 3)
    ar = batch_run(batch, [answers(20 / 6)])
    (row,) = bench_rows("firp", {"ar": [ar], "firp": [run]}, {0: None, 1: None}, 0.0)
    assert (row.prompts, row.turns, row.new_tokens, row.steps, row.batch_size) == (2, 3, 13, 6, 2)
    assert row.accepted_length == pytest.approx(10 / 6) and row.speedup == pytest.approx(20 / 12)
    assert (row.lossless.compared, row.lossless.identical) == (2, 2)
    assert row.speedup_with_prefill == pytest.approx((13 / 12.8) / (13 / 20.8))
    assert row.step_milliseconds == pytest.approx(1000 * 12 / 5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_turn_is_lossless_against_transformers(tmp_path: Path, batch_size: int) -> None:
    """Each turn's tokens are those of `generate` after the messages so far."""
    teacher = make_teacher()
    prompts, _ = fit_prompts(talk_prompts(teacher, tmp_path), teacher.max_positions, 12, skip_long=False)
    assert [prompt.turns for prompt in prompts] == [2, 1, 3, 2]
    drafting = LoadedPredictor(
        make_predictor(teacher, kind="firp", layer=2, steps=3), parse_tree("dynamic:6", 3), tmp_path
    )
    settings = BenchSettings(max_new_tokens=12, batch_size=batch_size, repeats=2)
    methods = make_methods(teacher, {"firp": drafting}, ["ar", "hf", "firp"], settings)
    batches = make_batches(prompts, batch_size)
    runs = measure(methods, prompts, batches, settings)
    for name in ("ar", "hf", "firp"):
        found: dict[int, list[Generation]] = {}
        for run in runs[name]:
            for number, item in zip(run.numbers, run.generations, strict=True):
                found.setdefault(number, []).append(item)
        for number, talk in enumerate(TALKS):
            messages: list[dict[str, Any]] = []
            for text, item in zip(talk, found[number], strict=True):
                messages.append({"role": "user", "content": text})
                said = [answer.token_ids for answer in found[number][: len(messages) // 2]]
                prompt = prompts[number].after(said)
                assert item.prompt_tokens == len(prompt)
                assert item.token_ids == generate_reference(teacher.model, prompt, 12), (name, number)
                whole = teacher.tokenizer.decode(encode_prompt(messages, teacher.tokenizer))
                assert teacher.tokenizer.decode(prompt) == whole
                messages.append(
                    {
                        "role": "assistant",
                        "content": prompts[number].questions.text(item.token_ids) if prompts[number].questions else "",
                    }
                )
    report = run_bench(teacher, talk_prompts(teacher, tmp_path), methods, settings)
    assert report.settings["prompts"] == 4 and report.settings["turns_asked"] == 8
    assert all((row.prompts, row.turns) == (4, 8) for row in report.rows)
    for row in report.rows:
        assert row.method == "hf" or (row.lossless.compared, row.lossless.identical) == (4, 4)


def test_an_interruption_is_raised_unless_partial_results_are_wanted(tmp_path: Path) -> None:
    teacher = make_teacher()
    settings = BenchSettings(max_new_tokens=4, repeats=3, warmup=0)

    def interrupt(done: int, total: int | None) -> None:
        if done == 5:  # in the second repeat of the four prompts
            raise KeyboardInterrupt

    methods = make_methods(teacher, {}, ["ar"], settings)
    prompts = talk_prompts(teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_bench(teacher, prompts, methods, settings, progress=interrupt)
    kept = run_bench(teacher, prompts, methods, settings, progress=interrupt, keep_partial=True)
    assert "1 of 3 repeats" in kept.settings["interrupted"]


def test_embedded_teacher_is_lossless_in_both_turns(tmp_path: Path) -> None:
    folder = predictor_folder("firp")
    teacher = load_named_teacher("arithmetic", folder, "float32", "cpu")
    talks = [["Nia has 12 pens. How many?", "She buys 7 more. How many now?"], ["What is 3 plus 4?", "And 9 minus 2?"]]
    loaded = {"firp": LoadedPredictor(load_predictor(folder, teacher), parse_tree("dynamic:8", 3), folder)}
    settings = BenchSettings(max_new_tokens=48, repeats=1, warmup=0, batch_size=2)
    methods = make_methods(teacher, loaded, ["ar", "hf", "firp"], settings)
    report = run_bench(teacher, talk_prompts(teacher, tmp_path, talks), methods, settings)
    rows = {row.method: row for row in report.rows}
    assert rows["ar"].turns == rows["firp"].turns == 4 and rows["firp"].accepted_length > 1.3
    assert rows["ar"].lossless.identical == rows["firp"].lossless.identical == 2


def test_comparison_ends_at_the_first_turn_that_differs(tmp_path: Path) -> None:
    """A later output is compared only where the outputs before it are identical; its prompt contains them."""
    teacher = make_teacher()
    prompts, _ = fit_prompts(talk_prompts(teacher, tmp_path, TALKS[:1] * 3), teacher.max_positions, 6, skip_long=False)
    batches = make_batches(prompts, 3)
    engine = Engine(teacher)
    expected = batch_run(batches[0], [decode_turns(engine.generate, prompts, batches[0], 6)])
    changed = [list(record.token_ids or []) for record in expected.first]
    changed[4][2] += 1  # prompt 1, turn 2
    changed[2][1] += 1  # prompt 2, turns 1 and 2
    changed[5][0] += 1
    got = [replace(record, token_ids=ids) for record, ids in zip(expected.first, changed, strict=True)]
    marks = compare_tokens(teacher, prompts, [expected], [BatchRun([got])])
    assert marks[0] is None and marks[1] is not None and marks[2] is not None
    assert (marks[1].turn, marks[1].position, marks[2].turn, marks[2].position) == (2, 2, 1, 1)
    assert marks[1].logit_gap > 0, "the expected token is the most probable one after the second prompt"


def test_turns_that_may_not_fit_are_not_asked(tmp_path: Path) -> None:
    """Decided by the longest possible answers, before measuring; the report says so."""
    teacher = make_teacher()
    prompts = talk_prompts(teacher, tmp_path)
    lengths = prompts[2].lengths
    for fits, room in ((3, lengths[1] + 3 * 20 + 4), (2, lengths[1] + 3 * 20 + 3), (1, lengths[0] + 2 * 20 + 1)):
        assert prompts[2].asked(room, 20).turns == fits
        assert prompts[2].asked(room, 20).turns_not_asked == 3 - fits
    teacher.max_positions = lengths[1] + 3 * 20 + 3
    settings = BenchSettings(max_new_tokens=20, repeats=1, warmup=0)
    methods = make_methods(teacher, {}, ["ar", "hf"], settings)
    report = run_bench(teacher, prompts, methods, settings)
    assert (report.settings["turns_asked"], report.settings["turns_not_asked"]) == (7, 1)
    line = settings_line(report)
    assert "4 prompts, 7 turns (1 more do not fit the context or the chat template), greedy" in line
    assert "4 (7 turns)" in detail_cells(report)[1][0] and "in order, after its own earlier" in bench_markdown(report)
    assert settings_line(BenchReport.from_json(as_json(report))) == line
    longest = max(prompt.longest for prompt in fit_prompts(prompts, teacher.max_positions, 20, False)[0])
    assert f"x {longest + 20} positions" in memory_line(methods, prompts, settings, teacher.max_positions)
    first = [replace(prompt, questions=None, lengths=()) for prompt in prompts]
    short = run_bench(teacher, first, methods, replace(settings, turns="first"))
    assert "4 prompts, first turns only, greedy" in settings_line(short) and short.rows[0].turns == 4
    with pytest.raises(UsageError, match="unknown turns 'second': choose from all, first"):
        BenchSettings(turns="second")


def test_prompt_of_a_rewriting_template_stays_in_its_bound() -> None:
    """Bytes that are no text are tokenized to more tokens than they were: then the answer is shortened."""
    tokenizer = with_template(CHATML.replace("{% for", "{{ messages|length }}{% for"))
    conversation = Conversation([{"role": "user", "content": text} for text in "abc"], None, True)
    questions = Questions.of(conversation, tokenizer, set())
    assert questions is not None
    ids = encode_prompt(conversation.messages[:1], tokenizer)
    prompt = BenchPrompt(ids, "set", "", questions, tuple(questions.lengths())).asked(1000, 40)
    odd = tokenizer("é", add_special_tokens=False)["input_ids"][:1] * 40  # the first byte of a character
    answers = [odd, odd]
    for turn, bound in enumerate(prompt.bounds, 1):
        assert bound - 40 < len(prompt.after(answers[:turn])) <= bound
        assert len(questions.following(ids, answers[:turn])[0]) > bound


def test_graphs_are_captured_for_the_longest_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for the smaller batches of the last turns."""
    teacher, captured = make_teacher(), []
    monkeypatch.setattr(Engine, "capture", lambda _, *sizes: captured.append(sizes))
    prompts, _ = fit_prompts(talk_prompts(teacher, tmp_path), teacher.max_positions, 6, skip_long=False)
    settings = BenchSettings(max_new_tokens=6, batch_size=4, repeats=1)
    runs = measure(make_methods(teacher, {}, ["ar"], settings), prompts, make_batches(prompts, 4), settings)
    longest = max(item.prompt_tokens for item in runs["ar"][0].generations)
    assert [size for size, *_ in captured] == [4, 3, 1]
    assert {context for _, context, _ in captured} == {prompts[2].longest} and longest <= prompts[2].longest


def test_mt_bench_and_spec_bench_ask_all_turns(tmp_path: Path) -> None:
    """MT-Bench has 80 questions of two turns, Spec-Bench those and 400 of one; without the files, small ones."""
    real = os.environ.get("FIRP_DATA_DIR")
    expected = {"mt_bench": (80, 160), "spec_bench": (480, 560)}
    if not real:
        for name in expected:
            (tmp_path / name).mkdir()
            save_talks(tmp_path / name / "question.jsonl")
        expected = dict.fromkeys(expected, (4, 8))
    for name, counts in expected.items():
        prompts = load_prompts(name, real or str(tmp_path))
        assert (len(prompts), sum(len(prompt.conversation.turns()) for prompt in prompts)) == counts


@pytest.mark.parametrize(("turns", "count"), [("all", 5), ("first", 3)])
def test_bench_command_asks_the_turns(tmp_path: Path, turns: str, count: int) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    talks = save_talks(tmp_path / "talks.jsonl", [["w5 w6", "w7"], ["w8"], ["w9", "w10 w11"]])
    options = ["--methods", "ar,hf", "--max-new-tokens", "5", "--repeats", "1", "--output", tmp_path / "out"]
    done = invoke("bench", "--teacher", teacher, "--dataset", talks, "--turns", turns, *options)
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["settings"]["turns_asked"] == count and report["settings"]["turns"] == turns
    assert [row["turns"] for row in report["rows"]] == [count] * 2 and "3/3" in done.stdout
    assert ("3 prompts, 5 turns" if turns == "all" else "first turns only") in " ".join(done.stdout.split())
