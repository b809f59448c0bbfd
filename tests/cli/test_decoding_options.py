"""Options of decoding out of range are refused while the command line is parsed, in a line, before a teacher loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.decoder import Decoder
from firp_cli.collecting.answer import account_line
from firp_cli.decoding.sequences import Writer
from firp_cli.errors import CapacityError, NumericsError, UsageError
from helpers.commands import PROMPT, invoke, succeed
from helpers.models import ROOT, embedded_predictor, embedded_prompts, embedded_teacher

GENERATE = ("generate", "--prompt", PROMPT, "--max-new-tokens", 4)


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("command", [GENERATE, ("bench", "firp", "--dataset", "arithmetic"), ("tune", "firp")])
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--temperature", ["-1", "nan", "inf", "1e-40", "1e-8", "1e300"]),
        ("--top-p", ["0", "-0.5", "1.5", "nan"]),
        ("--seed", ["-1", "99999999999999999999"]),
        ("--threads", ["0", "-3"]),
    ],
)
def test_value_out_of_range_is_refused_at_once(command: tuple[object, ...], option: str, values: list[str]) -> None:
    for value in values:
        result = invoke(*command, f"{option}={value}")
        usage = isinstance(result.exception, UsageError)
        assert usage or (result.exit_code == 2 and f"'{option}'" in result.output), (value, result.output)
        if usage:
            assert option.strip("-").replace("-", "_") in str(result.exception).replace("-", "_")


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--temperature=1e300", "temperature must be 0 (greedy) or from 1e-06 to 1e+06, got 1e+300"),
        ("--temperature=nan", "--temperature nan: give a finite number"),
        ("--temperature=-inf", "--temperature -inf: give a finite number"),
        ("--top-p=nan", "--top-p nan: give a finite number"),
        ("--top-p=1.5", "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_refused_number_is_named_with_its_range(option: str, said: str) -> None:
    assert str(invoke(*GENERATE, option).exception) == said
    assert said.partition(",")[0].partition(" must")[0] in str(invoke("prompts", "x", "--output=y", option).exception)


def test_bench_names_the_row_of_a_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn of the third row is decoded in a batch of its own."""
    turns = [["What is 2 + 3?"], ["What is 2 + 4?"], ["What is 2 + 5?", "Who?"]]
    text = "".join(json.dumps({"turns": each}) + "\n" for each in turns)
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-8")
    write = Writer.write
    seen: list[object] = []  # two turns of the warm-up, then those of the rows

    def fail(writer: Writer, item: Any, tokens: list[int], drafted: int) -> int:
        seen.append(item)
        return write(writer, item, [-1] if len({id(one) for one in seen}) == 6 else tokens, drafted)

    monkeypatch.setattr(Writer, "write", fail)
    options = ("--methods", "ar", "--repeats", 1, "--batch-size", 1, "--max-new-tokens", 4)
    error = invoke("bench", "firp", "--dataset", tmp_path / "own.jsonl", *options).exception
    assert isinstance(error, NumericsError)
    assert re.match(r"row 3 of .*own\.jsonl: the logits of arithmetic are NaN or infinite at position", str(error))


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("stops", [["--stop", ""], ["--stop", "apples", "--stop", ""]])
def test_empty_stop_string_is_refused(stops: list[str]) -> None:
    result = invoke(*GENERATE, *stops)
    assert isinstance(result.exception, UsageError) and "--stop is empty" in str(result.exception)


def test_help_of_top_p_leaves_zero_out() -> None:
    for command in ("generate", "bench", "tune"):
        said = " ".join(invoke(command, "--help").output.replace("│", " ").split())
        assert "0.0<=x<=1.0" not in said


def test_python_refuses_the_same() -> None:
    decoder, prompt = Decoder(embedded_teacher()), embedded_prompts(1)[0]
    for options in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 1 << 63},
        {"stop": [""]},
        {"stop": ["a", ""]},
        {"stop": ""},
    ):
        with pytest.raises(UsageError):
            decoder.generate(prompt, 2, **options)  # type: ignore[arg-type]
    assert decoder.generate(prompt, 8, temperature=1e-6).token_ids == decoder.generate(prompt, 8).token_ids


def test_stop_string_may_be_a_string_or_a_special_token() -> None:
    decoder, prompt = Decoder(embedded_teacher()), embedded_prompts(1)[0]
    whole = decoder.generate(prompt, 40)
    word = whole.text.split()[3]
    for stop in (word, [word]):
        assert decoder.generate(prompt, 40, stop=stop).finish_reason == "stop"
    assert decoder.generate(prompt, 40, stop=["<|system|>", "\t"]).token_ids == whole.token_ids


@pytest.mark.parametrize("predictor", [None, "firp"])
def test_long_prompt_is_named_before_the_first_batch(
    predictor: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "firp")
    teacher, prompts = embedded_teacher(), embedded_prompts(3)
    decoder = Decoder(teacher, embedded_predictor(predictor) if predictor else None)
    monkeypatch.setattr(teacher, "embed", lambda _: pytest.fail("decoding began"))
    long = [5] * teacher.max_positions
    with pytest.raises(CapacityError, match=f"prompt 4 has {len(long)} tokens"):
        decoder.generate_batch([*prompts, long], 4, batch_size=2)
    with pytest.raises(CapacityError, match=r"row 40 of p\.jsonl has"):
        decoder.generate_batch([*prompts, long], 4, label=lambda number: f"row {10 * (number + 1)} of p.jsonl")
    with pytest.raises(UsageError, match="prompt 2 is empty"):
        decoder.generate_batch([prompts[0], []], 4, batch_size=1)
    for token in (-1, teacher.vocab_size):
        with pytest.raises(UsageError, match="the prompt has a token id outside of 0 to"):
            decoder.generate([5, token], 4)
    assert not caplog.messages  # no cache is announced for what is refused


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", PROMPT),
        ("generate", "--prompts", "data/datasets/arithmetic/test.jsonl", "--limit", 2, "--skip-long"),
        ("bench", "--teacher", "arithmetic", "--methods", "ar", "--dataset", "arithmetic", "--limit", 2),
        ("bench", "--teacher", "arithmetic", "--methods", "ar", "--dataset", "arithmetic", "--limit", 2, "--skip-long"),
    ],
)
def test_answer_longer_than_the_context_is_refused_before_its_cache(
    command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = invoke(*command, "--max-new-tokens", 100000)
    assert isinstance(result.exception, CapacityError)
    said = str(result.exception)
    assert said.startswith("100000 new tokens leave no room for a prompt: the teacher's context holds 2048")
    assert "K/V cache" not in result.output


def test_eos_that_the_template_does_not_write_is_named(tmp_path: Path) -> None:
    """The teacher's answers then run to their limit: the summary of a collection says so as well."""
    shutil.copytree(ROOT / "data/teachers/arithmetic", tmp_path / "eos")
    config = tmp_path / "eos/generation_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    for named, line in (
        (0, "its chat template ends turns with '<|end|>' (3), which does not end an answer"),
        ([], ""),
        (99999, "eos_token_id 99999 is no token of the"),
    ):
        config.write_text(json.dumps(settings | {"eos_token_id": named}), encoding="utf-8")
        result = succeed("generate", "--teacher", tmp_path / "eos", "--method", "ar", *GENERATE[1:3], "--json")
        assert line in result.stderr, (named, result.stderr)
        assert ("template ends turns" in result.stderr) == (named == 0)
        reason = json.loads(result.stdout)["finish_reason"]
        assert reason == ("length" if named == 0 else "eos")


def test_summary_of_answers_warns_above_a_fifth_cut() -> None:
    account = {"written": 20, "cut": 5, "empty": 0, "failed": 0, "failure": None, "too_long": 0, "skipped": 0}
    assert "25% of the answers are cut" in account_line(account)
    assert "\n" not in account_line(account | {"cut": 4})
    assert "first failure: x" in account_line(account | {"failed": 1, "failure": "x"})
