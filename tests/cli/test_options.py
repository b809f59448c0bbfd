"""Every option of every command against values that it cannot take; options given twice; recipes and overrides."""

from __future__ import annotations

import shlex
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from typer.main import get_command

from firp_cli.cli.app import app, main
from firp_cli.cli.command import Command
from firp_cli.cli.terminal import command_text, override, split_recipe
from firp_cli.errors import UsageError
from firp_cli.recipe import load_recipe
from helpers.commands import invoke

HUGE = "9" * 40
NEEDED = {  # what a command needs before its options matter
    "bench": ["--dataset", "arithmetic"],
    "eval": ["firp"],
    "generate": ["--prompt", "x"],
    "train": ["demo"],
    "prompts": ["arithmetic", "--output", "p.jsonl"],
    "quickstart": ["arithmetic"],
    "store info": ["s"],
    "store verify": ["s"],
    "store merge": ["s", "t", "--output", "m"],
    "store split": ["s", "--parts", "2", "--output", "m"],
    "store convert": ["s", "--output", "m"],
}


def commands() -> dict[str, Any]:
    root = get_command(app).commands  # type: ignore[attr-defined]
    flat = {name: command for name, command in root.items() if name != "store"}
    return flat | {f"store {name}": command for name, command in root["store"].commands.items()}


def bad_values(option: Any) -> list[str]:
    """Values that an option cannot take, by its type."""
    text = option.opts[-1] in ("--prompt", "--system", "--stop", "--chat-template", "--template-options")
    values = ["caf\udce9", "a\0b", *([] if option.opts[-1] == "--prompt" else [""]), *([] if text else ["x" * 300])]
    kind, given = option.type_descriptor.annotation, option.type_descriptor.parameter_info
    if kind in (int, float):
        values += ["two", HUGE, f"-{HUGE}", "nan", "inf", "-inf", "1;2"]
        values += [] if given.min is None else [str(given.min - 1)]
        values += [] if given.max is None else [str(given.max + 1)]
    elif get_origin(kind) is Literal:
        values += ["other"]
    return values


def cases() -> list[tuple[str, str, str]]:
    found = []
    for name, command in commands().items():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag and option.name != "help":
                found += [(name, option.opts[-1], value) for value in bad_values(option)]
    return found


def test_all_commands_check_their_options() -> None:
    assert len(commands()) >= 14
    assert all(isinstance(command, Command) for command in commands().values())


def test_every_option_refuses_values_that_it_cannot_take(no_teacher: Path) -> None:
    """Exit code 2 with a message; nothing is loaded or written."""
    known, tried = commands(), cases()
    assert len(tried) > 600
    for name, option, value in tried:
        needed = list(NEEDED.get(name, []))
        if option in needed:  # leave its good value out
            del needed[needed.index(option) : needed.index(option) + 2]
        with pytest.raises(Exception, match=r"\S") as refused:
            known[name].main([*needed, f"{option}={value}"], prog_name=name, standalone_mode=False)
        where = (name, option, ascii(value[:20]), repr(refused.value)[:300])
        assert getattr(refused.value, "exit_code", 0) == 2, where
    assert not list(no_teacher.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["bench", "--dataset", "arithmetic", "--limit", "3", "--limit", "4"],
            "--limit is given 2 times, as 3 and as 4",
        ),
        (["generate", "--prompt", "x", "--teacher", "a", "--teacher=b"], "--teacher is given 2 times"),
        (["generate", "--prompt", "x", "--prompt", "y"], "--prompt is given 2 times"),
        (["generate", "--prompt", "x", "--guard", "--no-guard"], "contradict each other"),
        (["generate", "--prompt", "x", "--stop", "a", "--stop", ""], "--stop is empty"),
        (["generate", "--prompt", "x", "--tree", "chain", "--tree", "chain"], "give it once"),
        (["collect", "demo", "--limit", "3", "data.limit=4"], "data.limit is given twice"),
        (["tune", "--batch-sizes", "1", "--batch-sizes", "1;2"], "numbers with commas"),
        (["eval", ""], "predictor is empty"),
        (["bench", "--dataset", "arithmetic", "--max-new-tokens", "1"], "one new token comes from prefill"),
        (["generate", "--prompt", "x", "--resume"], "--resume continues the --output file"),
    ],
)
def test_options_given_twice_or_empty_are_refused(no_teacher: Path, arguments: list[str], expected: str) -> None:
    refused = invoke(*arguments).exception
    assert isinstance(refused, UsageError) and expected in str(refused)


@pytest.mark.parametrize(
    "word", ["teacher.dtype=bfloat16", "key=", "a=b=c", "ключ=значение", "=", "x='b c'", "a.b==", "k=\n"]
)
def test_odd_overrides_are_refused_in_words(no_teacher: Path, word: str) -> None:
    for command in ("generate --prompt x firp", "bench --dataset arithmetic firp", "eval firp", "tune firp"):
        refused = invoke(*command.split(), word).exception
        assert isinstance(refused, UsageError) and f"{word!r} does not exist, and `firp {command.split()[0]}" in str(
            refused
        )
    if not word.startswith("teacher"):
        for command in ("train demo", "collect demo"):
            refused = invoke(*command.split(), word).exception
            assert isinstance(refused, UsageError) and word.partition("=")[0] in str(refused)
    assert "`firp store info --help` lists" in str(invoke("store", "info", word).exception)
    (no_teacher / "lr=1").mkdir()
    assert "lr=1 is not a predictor folder" in str(invoke("eval", "lr=1", "--dataset", "arithmetic").exception)


def test_lists_given_twice_count_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def measure(*_: object, **given: Any) -> None:
        seen.update(given)
        raise UsageError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("firp_cli.api.bench_run.bench", measure)
    given = ["--dataset", "a", "--dataset=b", "--methods", "ar", "--methods", "firp", "-v", "--force", "--force"]
    assert "enough" in str(invoke("bench", *given).exception)
    assert seen["dataset"] == "a,b" and seen["methods"] == ["ar", "firp"] and seen["force"] is True
    assert not list(tmp_path.iterdir())


def test_a_recipe_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "layer=4.yaml"
    path.write_text("base: demo\n")
    assert split_recipe([str(path), "data.limit=3"]) == (str(path), ["data.limit=3"])
    assert split_recipe(["no/such=file.yaml"]) == ("no/such=file.yaml", [])
    assert split_recipe(["demo", "store=a/b=c"]) == ("demo", ["store=a/b=c"])
    with pytest.raises(UsageError, match="one recipe expected, got demo, other"):
        split_recipe(["demo", "other"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainning.epochs=3"], "command line, key trainning: unknown key; did you mean 'training'?"),
        (["training.epoch=3"], "command line, key training.epoch: unknown key; did you mean 'epochs'?"),
        (["data.limit=99999999999999999999"], "out of range"),
        (["data.dataset=2024-13-45"], "not valid YAML"),
        (["data.limit=2024-01-02"], "command line, key data.limit"),
    ],
)
def test_faulty_overrides_are_blamed_on_the_command_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_recipe("demo", arguments)
    assert expected in str(refused.value) and "demo.yaml" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x01\n", b"a: 2024-13-45\n", b"[" * 5000])
def test_recipes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.yaml.*(UTF-8|not valid YAML)"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("value", ["plain", "my store", "it's", "12", "null", "a: b", "[x", "x,y", True, 7, "ü", "~"])
def test_overrides_and_lines_are_read_back_as_written(value: Any) -> None:
    line = command_text("collect", override("store", value), "--output", value)
    words = shlex.split(line)
    assert words[:2] == ["firp", "collect"] and words[-1] == str(value)
    from firp_cli.recipe import yaml_value

    assert yaml_value(words[2].removeprefix("store=")) == value


@pytest.mark.parametrize("name", ["./x", "/a/b", "../m", "x/y.gguf", "~/m", "a/b/c", "x/"])
def test_local_teachers_are_not_sought_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firp_cli.teacher.source.hub_reachable", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setattr("firp_cli.teacher.load.AutoModelForCausalLM", None)
    refused = invoke("generate", "--method", "ar", "--teacher", name, "--prompt", "x").exception
    assert getattr(refused, "exit_code", 0) == 2 and f"no such {'file' if 'gguf' in name else 'folder'}" in str(refused)


def test_output_that_cannot_carry_a_character_shows_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [TextIOWrapper(BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["firp", "generate", "früp", "--prompt", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and [stream.errors for stream in streams] == ["replace", "replace"]
    streams[0].write("frü")
    streams[0].flush()
    assert streams[0].buffer.getvalue() == b"fr?"  # type: ignore[attr-defined]


def test_an_override_given_twice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert split_recipe(["demo", "data.limit=3", "data.limit=4"])[1] == ["data.limit=3", "data.limit=4"]
    assert "data.limit is given twice, as 3 and as 4: 4 is taken" in capsys.readouterr().err
