"""Results are never lost: outputs that cannot be written, interrupted runs, lines of answers, reserved folders."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from firp_cli.api.decoder import Decoder
from firp_cli.api.generate_run import FileRun, GenerateSettings, prompts_to_answer
from firp_cli.chat_template import note_once
from firp_cli.cli.answers import Lines, summary
from firp_cli.cli.terminal import default_folder
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.data.turns import Questions
from firp_cli.errors import OutputError, UsageError
from firp_cli.files import cache_folder, check_output, reserved_folder
from firp_cli.predictors.folder import predictor_folder
from firp_cli.provenance import fingerprint
from helpers.chat import CHATML
from helpers.collecting import make_teacher
from helpers.commands import firp, invoke, succeed
from helpers.models import generate_reference

ONE_ANSWER = CHATML + "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
QUICK = ("--max-new-tokens", "8")
FOLDERS = {
    "bench": ["bench", "firp", "--dataset", "arithmetic"],
    "eval": ["eval", "firp", "--dataset", "arithmetic"],
    "tune": ["tune", "firp"],
    "collect": ["collect", "demo"],
    "train": ["train", "demo", "data.mode=online"],
    "quickstart": ["quickstart", "arithmetic"],
    "merge": ["store", "merge", "a", "b"],
    "convert": ["store", "convert", "a"],
    "split": ["store", "split", "a", "--parts", "2"],
}


def prompts_file(folder: Path, *rows: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"prompt": row}) + "\n" for row in rows))
    return path


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["bench", "eval", "tune", "collect", "train", "quickstart"])
def test_working_folder_that_cannot_be_written_is_refused(
    no_teacher: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir("/proc/self")
    refused = invoke(*FOLDERS[name]).exception
    assert getattr(refused, "exit_code", 0) == 2
    assert re.match(r"(runs|stores)/[\w./-]+ cannot be written \(.*\): give another --output", str(refused)), refused


def test_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number without a name. Nothing is ever kept in the working folder."""
    for name in ("HOME", "XDG_CACHE_HOME", "FIRP_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_folder().is_absolute()
    with pytest.raises(OSError):
        cache_folder().mkdir(parents=True)


def test_bench_needs_no_home_and_no_temporary_folder(tmp_path: Path) -> None:
    names = ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "FIRP_CACHE_DIR", "MPLCONFIGDIR")
    given = ("--methods", "ar", "--limit", "1", "--repeats", "1", *QUICK, "--output", "out")
    done = firp(*FOLDERS["bench"], *given, cwd=tmp_path, **dict.fromkeys(names, "/proc/none"))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {path.suffix for path in (tmp_path / "out").iterdir()} >= {".json", ".csv", ".md", ".html"}


def test_bench_of_answers_that_end_at_once_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firp_cli.teacher.teacher.eos_token_ids", lambda model, tokenizer, count: tuple(range(count)))
    done = succeed(*BENCH, "--teacher", "arithmetic", "--repeats", "1", "--output", tmp_path / "out")
    said = "every answer ended with its first token, which prefill gives: there is no decoding step to compare"
    assert said in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_written_are_refused_before_the_work(no_teacher: Path, name: str) -> None:
    (no_teacher / "file").write_text("kept")
    for output in ("file", "file/below", "/proc/below", "/sys/a/b"):
        refused = invoke(*FOLDERS[name], "--output", output).exception
        assert getattr(refused, "exit_code", 0) == 2 and output.split("/below")[0] in str(refused), (output, refused)
    assert [path.name for path in no_teacher.iterdir()] == ["file"] and (no_teacher / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x", "--output"],
        ["generate", "--prompts", "file", "--output"],
        ["prompts", "arithmetic", "--output"],
        ["tune", "firp", "--tree-file"],
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_work(no_teacher: Path, arguments: list[str]) -> None:
    (no_teacher / "file").write_text("")
    (no_teacher / "folder").mkdir()
    for output in ("folder", "file/below", "/proc/below"):
        refused = invoke(*arguments, output).exception
        assert isinstance(refused, UsageError) and output.split("/below")[0] in str(refused), (output, refused)
    assert sorted(path.name for path in no_teacher.iterdir()) == ["file", "folder"]


def test_check_output_tries_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "new" / "folder")
    check_output(Path("/dev/null"), "stream")
    with pytest.raises(UsageError, match="not a regular file"):
        check_output(Path("/dev/null"), "file")

    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("firp_cli.files.tempfile.TemporaryFile", full)
    with pytest.raises(UsageError, match="No space left on device"):
        check_output(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    default = tmp_path / "runs" / "bench-x"
    with reserved_folder(None, default) as first, reserved_folder(None, default) as second:
        assert (first.name, second.name) == ("bench-x", "bench-x-2")
        (second / "kept").touch()
        with pytest.raises(UsageError, match="another run is writing"), reserved_folder(first, default):
            pass
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bench-x-2"]
    with reserved_folder(second, default) as again:
        assert again == second and (second / "kept").exists()


def test_default_folders_have_names_without_odd_characters() -> None:
    folder = default_folder("bench", f"org/{'n' * 80}:main ü")
    assert folder.parent == Path("runs") and re.fullmatch(r"bench-org-n{56}-\d{8}-\d{6}", folder.name)


BENCH = ("bench", "firp", "--dataset", "arithmetic", "--methods", "ar,firp", "--limit", "1", *QUICK)


def failing_write(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_bench_prints_the_table_of_a_report_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr("firp_cli.api.write_report.write_json", failing_write)
    done = invoke(*BENCH, "--repeats", "1", "--output", tmp_path / "out", *flags)
    assert isinstance(done.exception, OutputError) and "No space left on device" in str(done.exception)
    assert done.exception.exit_code == 1 and not (tmp_path / "out").exists()
    assert json.loads(done.stdout)["rows"] if flags else "up to 8 new tokens" in done.stdout


def interrupted_bar(number: int) -> Callable[[str], Any]:
    """Return a progress bar that interrupts at a call."""
    calls = iter(range(1, number + 1))

    def progress(*_: object) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt

    return lambda _: nullcontext(progress)


@pytest.mark.parametrize(("at", "whole"), [(8, 3), (3, 0)])
def test_interrupted_bench_reports_whole_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, whole: int
) -> None:
    monkeypatch.setattr("firp_cli.cli.bench.progress_bar", interrupted_bar(at))
    done = invoke(*BENCH, "--repeats", "5", "--output", tmp_path / "out")
    assert done.exit_code == 130
    if whole:
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["settings"]["repeats"] == whole
        assert "interrupted after 3 of 5 repeats" in done.stdout and "interrupted after 3 of 5" in done.stderr
    else:
        assert "nothing is kept" in done.stderr and not (tmp_path / "out").exists()


def test_generate_names_the_long_row_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_file(tmp_path, *["x"] * 5, "x " * 3000)
    monkeypatch.setattr("firp_cli.api.decoder.Decoder.session", lambda *_, **__: pytest.fail("a batch was decoded"))
    done = invoke("generate", "--prompts", prompts, "--output", tmp_path / "o.jsonl")
    text = str(done.exception)
    assert re.search(r"row 6 of .*prompts\.jsonl has \d{4} tokens and 256 new ones", text) and "holds 2048" in text
    assert not (tmp_path / "o.jsonl").exists()


def test_generate_resumes_an_interrupted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"What is {n} plus 5?", "question_id": f"q{n}"} for n in range(5)]
    prompts, output, whole = prompts_file(tmp_path, *rows), tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    command = ("generate", "--prompts", prompts, "--batch-size", "2", *QUICK, "--output")
    succeed(*command, whole)
    expected = lines_of(whole.read_text())
    assert [line["index"] for line in expected] == [0, 1, 2, 3, 4] and expected[1]["id"] == "q1"
    assert [line["batch_size"] for line in expected] == [2, 2, 2, 2, 1]
    with monkeypatch.context() as patch:
        patch.setattr("firp_cli.cli.answers.progress_bar", interrupted_bar(2))
        done = invoke(*command, output)
    assert done.exit_code == 130 and "4 of 5 answers are in" in done.stderr and "--resume" in done.stderr
    with output.open("a") as stream:
        stream.write('{"index": 4, "te')  # killed within a line
    done = succeed(*command, output, "--resume")
    assert "4 of 5 answers are kept" in done.stderr
    assert [line["token_ids"] for line in lines_of(output.read_text())] == [line["token_ids"] for line in expected]
    assert not [line for line in lines_of(output.read_text()) if line["settings"] != expected[0]["settings"]]
    prompts_file(tmp_path, *reversed(rows))
    refused = invoke(*command, output, "--resume").exception
    assert isinstance(refused, UsageError) and "answers another prompt than row 1" in str(refused)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--stop", "="), r"stop \(file: \[\], now: \['='\]\)"),
        (("--max-new-tokens", "9"), r"max_new_tokens \(file: 8, now: 9\)$"),
        (("--raw",), r"raw \(file: False, now: True\), chat_template \(file: \w{16}, now: not set\)$"),
        (("--chat-template", "vicuna"), r"different: chat_template \(file: \w{16}, now: \w{16}\)$"),
        (("--dtype", "bfloat16"), r"dtype \(file: float32, now: bfloat16\)"),
        (("--temperature", "1"), r"guard \(file: True, now: False\).*temperature \(file: 0.0, now: 1.0\), top_p.*seed"),
        (("--tree", "dynamic:4"), r"different: tree \(file: \S+ \(\w{16}\), now: dynamic:4 \(\w{16}\)\)$"),
        (("--no-guard",), r"different: guard \(file: True, now: False\)$"),
        (("--method", "ar"), r"method \(file: firp, now: ar\), .*predictor \(file: \w{16}, now: not set\)"),
        (("firp_plus",), r"method \(file: firp, now: firp_plus\), predictor \(file: \w{16}, now: \w{16}\)"),
        (("OTHER",), r"different: predictor \(file: \w{16}, now: \w{16}\)$"),
    ],
)
def test_generate_resumes_only_what_it_began(
    begun: tuple[Path, Path], tmp_path: Path, changed: tuple[str, ...], words: str
) -> None:
    """Another predictor gives equal text, but other accepted lengths; nothing is written."""
    prompts, output = begun
    if changed == ("OTHER",):
        changed = (str(other_weights(tmp_path / "other")),)
    before = output.read_bytes()
    quick = () if "--max-new-tokens" in changed else QUICK
    command = ("generate", *changed, "--prompts", prompts, *quick, "--output", output, "--resume")
    refused = invoke(*command).exception
    assert isinstance(refused, UsageError) and re.search(words, str(refused).splitlines()[0]), refused
    assert output.read_bytes() == before


def test_generate_tells_another_version_from_another_file(begun: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, output = begun
    line = lines_of(output.read_text())[0]
    earlier = {name: value for name, value in line.items() if name != "settings"} | {"settings_hash": "0123"}
    for written, words in ((earlier, "written by another version of firp"), ({"a": 1}, "is no answer of `firp gen")):
        copy = tmp_path / "o.jsonl"
        copy.write_text(json.dumps(written) + "\n")
        refused = invoke("generate", "--prompts", prompts, *QUICK, "--output", copy, "--resume").exception
        assert isinstance(refused, UsageError) and f"o.jsonl line 1 {words}" in str(refused).replace("was ", ""), (
            refused
        )


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two prompts, of which one is answered."""
    folder = tmp_path_factory.mktemp("begun")
    prompts, output = prompts_file(folder, "What is 1 plus 5?", "What is 2 plus 5?"), folder / "o.jsonl"
    succeed("generate", "--prompts", prompts, *QUICK, "--limit", "1", "--output", output)
    return prompts, output


def other_weights(folder: Path) -> Path:
    """Return a copy of the embedded predictor with one weight changed."""
    shutil.copytree(predictor_folder("firp"), folder)
    weights = load_file(folder / "predictor.safetensors")
    next(value for value in weights.values() if value.is_floating_point()).flatten()[0] += 1
    save_file(weights, folder / "predictor.safetensors")
    return folder


def test_generate_prints_lines_that_the_file_does_not_take(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, "What is 1 plus 5?", "What is 2 plus 5?")
    done = invoke("generate", "--prompts", prompts, *QUICK, "--output", "/dev/full")
    assert isinstance(done.exception, OutputError) and "No space left" in str(done.exception)
    assert [line["index"] for line in lines_of(done.stdout)] == [0, 1] and Path("/dev/full").is_char_device()


def test_generate_counts_batch_times_once(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, *[f"What is {n} plus 5?" for n in range(4)])
    done = succeed("generate", "--method", "ar", "--prompts", prompts, *QUICK, "--batch-size", "4")
    lines = lines_of(done.stdout)
    decoded = sum(sum(line["accepted_lengths"]) for line in lines)
    rate = decoded / max(line["decode_seconds"] for line in lines)
    assert f"{rate:.1f} tokens/s, prefill {lines[0]['prefill_seconds']:.2f} s" in done.stderr


def test_generate_answers_the_last_user_turn_with_its_history(tmp_path: Path) -> None:
    said = [("user", "Nia has 12 pens. How many?"), ("assistant", "12"), ("user", "She buys 7 more. How many now?")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (line,) = lines_of(succeed("generate", "--prompts", prompts_file(tmp_path, row), *QUICK).stdout)
    assert line["prompt_tokens"] == 37 and "turn" not in line


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["one", "two"]},
        {"system": "Answer in French.", "question": "one"},
        {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user")]},
    ],
)
def test_raw_rows_of_several_messages_are_refused(no_teacher: Path, row: dict[str, Any]) -> None:
    refused = invoke("generate", "--prompts", prompts_file(no_teacher, "one", row), "--raw").exception
    assert isinstance(refused, UsageError) and re.search(r"row 2 of \S+ has several messages", str(refused))


def test_raw_rows_name_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("firp"), "propagate", True)  # commands of earlier tests keep it to themselves
    rows = [{"question": "one", "tools": [{"name": "add"}]}, {"messages": [{"role": "user", "content": "two"}]}]
    rows[1]["context"] = "lost"
    prompts = prompts_to_answer(str(prompts_file(tmp_path, *rows)), None, raw=True)
    with caplog.at_level("WARNING", "firp"):
        run = FileRun("f", Decoder(make_teacher()), prompts, GenerateSettings(max_new_tokens=4, raw=True))
    assert "columns left out: context, tools" in caplog.text
    tokenizer = run.decoder.teacher.tokenizer
    assert [tokenizer.decode(item.prompt) for item in run.asked] == ["one", "two"]


def test_questions_are_answered_turn_by_turn(tmp_path: Path) -> None:
    """Each prompt continues the tokens of the one before and of its answer, as in bench and collect."""
    texts = ["what is a sum?", "and why?", "system?"]
    rows = load_prompts(str(prompts_file(tmp_path, {"turns": texts}, "one", {"turns": ["alone"]})))
    teacher, output = make_teacher(), tmp_path / "o.jsonl"
    run = FileRun("f", Decoder(teacher), rows, GenerateSettings(max_new_tokens=12, batch_size=2))
    lines = [line for batch in run.answers() for line in batch]
    assert [(line["index"], line.get("turn")) for line in lines] == [(0, 0), (1, None), (0, 1), (0, 2), (2, 0)]
    questions = Questions.of(rows[0].conversation, teacher.tokenizer, set(teacher.eos_token_ids))
    prompt, answers = encode_prompt(rows[0].messages, teacher.tokenizer), []
    assert questions is not None and run.count == 5 and run.cut == 0 and "60 tokens" in summary(run.totals)
    for line in (lines[0], lines[2], lines[3]):
        assert line["prompt_hash"] == fingerprint(prompt)
        assert line["token_ids"] == generate_reference(teacher.model, prompt, 12)
        answers.append(line["token_ids"])
        prompt = questions.following(prompt, answers)[0] if len(answers) < 3 else prompt
    for kept in range(6):  # resumed after any answer
        output.write_text("".join(json.dumps(line) + "\n" for line in lines[:kept]))
        again = FileRun("f", Decoder(teacher), rows, run.settings)
        again.read_kept(output)
        made = [line for batch in again.answers() for line in batch]
        assert again.kept == kept
        assert {(line["prompt_hash"], str(line["token_ids"])) for line in lines[kept:]} == {
            (line["prompt_hash"], str(line["token_ids"])) for line in made
        }


@pytest.mark.parametrize(("room", "template", "answered"), [(70, CHATML, 2), (512, ONE_ANSWER, 1)])
def test_turns_that_cannot_be_asked_are_counted(tmp_path: Path, room: int, template: str, answered: int) -> None:
    """They do not fit the context, or the chat template refuses them."""
    rows = load_prompts(str(prompts_file(tmp_path, {"turns": ["what is a sum?", "and why?", "system?"]})))
    teacher = make_teacher()
    teacher.max_positions, teacher.tokenizer.chat_template = room, template
    run = FileRun("f", Decoder(teacher), rows, GenerateSettings(max_new_tokens=12))
    assert (len(list(run.answers())), run.cut) == (answered, 3 - answered)


def test_files_without_prompts_are_refused(no_teacher: Path) -> None:
    refused = invoke("generate", "--prompts", prompts_file(no_teacher)).exception
    assert getattr(refused, "exit_code", 0) == 2 and "no prompts in" in str(refused)
    refused = invoke("bench", "--dataset", no_teacher / "prompts.jsonl").exception
    assert getattr(refused, "exit_code", 0) == 2 and "no prompts in" in str(refused)


def test_prompts_are_not_overwritten_by_their_answers(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, "2 + 2?")
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl"):
        refused = invoke("generate", "--prompts", path, "--output", output).exception
        assert getattr(refused, "exit_code", 0) == 2 and "overwrite" in str(refused)
    assert path.read_bytes() == before


def test_lines_are_written_one_at_a_time(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "o.jsonl")
    lines.write({"text": "ü"})
    assert (tmp_path / "o.jsonl").read_text() == '{"text": "ü"}\n'
    with pytest.raises(UsageError, match="another run is writing"):
        Lines(tmp_path / "o.jsonl")
    lines.close()


def test_lines_hold_what_utf8_and_lines_do_not(tmp_path: Path) -> None:
    """A text may end lines in other ways, and an id may be half a character."""
    from firp_cli.api.generate_run import _whole_lines

    path, texts = tmp_path / "o.jsonl", [{"text": "a\u2028b\x85c"}, {"id": "\ud800", "text": "d"}]
    lines = Lines(path)
    for text in texts:
        lines.write(text)
    lines.release()
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "cut')
    assert [json.loads(line) for line in _whole_lines(path)] == texts
    more = Lines(path, kept=2)
    more.write({"text": "e"})
    more.release()
    assert more.held == 3 and [json.loads(line) for line in _whole_lines(path)] == [*texts, {"text": "e"}]


def test_a_full_stdout_ends_with_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "firp_cli", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_streamed_text_is_not_altered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from firp_cli.api.generate_run import GenerateSettings
    from firp_cli.cli.answers import answer_one
    from firp_cli.results import Generation

    text = "all:\tfirst\r\n:smile: [red]x[/red] \x0c"

    def generate(*_: object, stream: Callable[[str, bool], None], **__: object) -> Generation:
        stream(text, False)
        return Generation(1, [1], 0, [], 0.1, 0.0, "length")

    answer_one(SimpleNamespace(generate=generate), "x", GenerateSettings(), None, False)  # type: ignore[arg-type]
    assert capsys.readouterr().out == text + "\n"


def test_the_next_line_of_collect_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = succeed("collect", "demo", "teacher.dtype=bfloat16", "--limit", "4", "--output", "my store")
    line = next(line for line in done.stdout.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: firp "))
    assert words == ["train", "demo", "teacher.dtype=bfloat16", "data.limit=4", "--store", "my store"]
    done = succeed(*words, "training.max_steps=0", "training.gate_prompts=0", "--output", "run")
    missing = invoke(*words[:-1], "no store").exception
    assert "firp collect demo teacher.dtype=bfloat16 data.limit=4 --output 'no store'" in str(missing)


@pytest.mark.parametrize("layers", ["3", "none"])
def test_the_next_line_of_collect_trains_what_the_layers_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = succeed("collect", "demo", "--limit", "4", "--layers", layers, "--output", "s")
    words = shlex.split(done.stdout[done.stdout.index("next: ") :])[2:]
    succeed(*words, "training.max_steps=0", "training.gate_prompts=0", "--output", "run")


def test_estimate_times_the_responders_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("firp_cli.collecting.vllm.importlib.util.find_spec", lambda _: None)
    given = ("data.max_new_tokens=8", "collect.responder=vllm", "--limit", "4", "--regenerate")
    done = succeed("collect", "demo", *given, "--estimate")
    assert "the hours are those of engine" in done.stderr and "of it answering" in done.stdout
    assert "vllm           - (collect.responder=vllm needs the package" in done.stdout
    figures = json.loads(succeed("collect", "demo", *given, "--estimate", "--json").stdout)
    ways = {way["name"]: way["seconds"] for way in figures["ways"]}
    assert list(ways) == ["engine", "given", "vllm"] and ways["vllm"] is None
    assert ways["engine"] == figures["seconds"] > ways["given"] > 0 and figures["computed"] == ""


def test_estimate_of_a_teacher_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    note_once.cache_clear()  # another test may have had the line
    done = succeed("collect", "llama-3.1-70b-firp", "--estimate", "--gpus", "16", "--json")
    assert "the embedded shape llama-3.1-70b stands for it" in done.stderr
    other = invoke(
        "collect", "llama-3.1-8b-firp", "teacher.model=someone/Llama-3.1-8B-Instruct", "--estimate"
    ).exception
    assert "cannot load the teacher 'someone/Llama-3.1-8B-Instruct'" in str(other)  # it may have another shape
    figures = json.loads(done.stdout)
    assert figures["conversations"] == 60_000 and figures["tokens"] == 60_000 * 2048  # at most
    assert figures["bytes_per_token"] == 5 + 2 * (8192 + 2) and "has 141.1 GB of weights" in figures["computed"]
    ways = {way["name"]: way for way in figures["ways"]}
    assert ways["engine"]["seconds"] is None and "sharded" in ways["engine"]["note"]
    # Two operations a weight of the 80 layers; attention to half of the 2048 positions; answers pass the head too.
    layers, head = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192), 8192 * 128256
    forward = 2 * layers + 2 * 2048 * 8192 * 80
    reading = figures["tokens"] * forward / 0.35
    answering = 60_000 * 512 * (forward + 2 * head) / 0.05
    assert ways["vllm"]["seconds"] == pytest.approx((reading + answering) / 16 / 989e12)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2+3?", "answer": "5"}\n' * 9, encoding="utf-8")
    shown = succeed(
        "collect", "llama-3.1-8b-firp", "teacher.model=llama-3.1-8b", "--dataset", rows, "--estimate"
    ).stdout
    assert "conversations    9 of" in shown and "cheapest         given" in shown and "not measured" in shown


def test_eval_names_the_place_of_a_nan(store_folder: Path) -> None:
    from firp_cli.api.eval_run import _Finite
    from firp_cli.errors import NumericsError
    from firp_cli.store.reader import Store

    store = Store.open(store_folder)
    item = store[20]
    assert len(_Finite(store, store_folder, [1, 20])) == 2 and _Finite(store, store_folder, [20])[0].input_ids.numel()
    item.hidden[2] = item.hidden[2].clone()
    item.hidden[2][3, 0] = float("nan")
    faulty = {20: item}
    with pytest.raises(NumericsError) as refused:
        _Finite(faulty, store_folder, [20])[0]  # type: ignore[arg-type]
    assert "hidden.2 of" in str(refused.value) and "shard-00001" in str(refused.value)
    assert "token 3 of conversation 20" in str(refused.value)


def test_training_without_held_out_text_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("collect", "demo", "--limit", "1", "--output", "one")
    fast = ("training.max_steps=0", "training.gate_prompts=1", "data.max_new_tokens=8", "predictor.steps=1")
    done = succeed("train", "demo", *fast, "--store", "one", "--output", "run")
    assert "nothing held out: the gate decodes trained text" in done.stderr
    assert "trained text: nothing was held out" in done.stdout
