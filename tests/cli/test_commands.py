"""The command line: `firp generate`, bad input, renamed options, the README's commands and the wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.main import get_command

from firp_cli.cli.app import app, main
from firp_cli.cli.terminal import say
from firp_cli.errors import PredictorError
from helpers.commands import PROMPT, firp, invoke, succeed
from helpers.models import ROOT
from helpers.rank_pool import RankPool

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_generate_streams_the_text_of_autoregressive_decoding() -> None:
    """Drafting runs in a process of its own, as a user starts it."""
    drafted = firp("generate", "--no-guard", "--prompt", PROMPT)
    assert drafted.returncode == 0, drafted.stderr
    reference = succeed("generate", "--method", "ar", "--prompt", PROMPT)
    assert drafted.stdout == reference.stdout
    assert "####" in drafted.stdout
    tokens, steps, accepted = re.search(
        r"(\d+) tokens in (\d+) steps, accepted length ([\d.]+)", drafted.stderr
    ).groups()
    assert float(accepted) > 1.3
    assert int(steps) < int(tokens) - 1
    assert "accepted length 1.00" in reference.stderr
    memory, summary = drafted.stderr.splitlines()
    assert memory.startswith("K/V cache for 1 x ") and memory.endswith("B")
    assert summary.startswith(f"{tokens} tokens")


def test_generate_colours_drafted_text(monkeypatch: pytest.MonkeyPatch) -> None:
    black = succeed("generate", "--prompt", PROMPT).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = succeed("generate", "--prompt", PROMPT).stdout
    assert "\x1b[32m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == black


def test_generate_writes_jsonl(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": PROMPT}, {"question": "Tom has 9 pens and loses 2. How many pens are left?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    succeed("generate", "medusa", "--prompts", prompts, "--output", output, "--batch-size", "2")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert {"prompt_tokens", "token_ids", "text", "steps", "accepted_lengths"} <= set(record)
        assert len(record["accepted_lengths"]) == record["steps"]
        assert sum(record["accepted_lengths"]) + 1 == len(record["token_ids"])
    alone = json.loads(succeed("generate", "--json", "--prompt", PROMPT).stdout)
    assert alone["token_ids"] == records[0]["token_ids"]


def test_generate_skips_and_counts_long_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "x " * 3000)))
    done = succeed("generate", "--prompts", prompts, "--skip-long", "--max-new-tokens", "8")
    assert len(done.stdout.splitlines()) == 1
    assert "skipped 1 of 2 prompts longer than 2040 tokens" in done.stderr


def test_generate_raw_leaves_out_the_chat_template() -> None:
    options = ("--json", "--max-new-tokens", "4", "--prompt", PROMPT)
    templated, raw = (json.loads(succeed("generate", *flags, *options).stdout) for flags in ((), ("--raw",)))
    assert raw["prompt_tokens"] < templated["prompt_tokens"]


def test_generate_with_a_seed_reproduces_its_text() -> None:
    options = ("generate", "--prompt", PROMPT, "--temperature", "2", "--top-p", "0.95", "--max-new-tokens", "30")
    texts = [succeed(*options, "--seed", seed).stdout for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("old", [["--layers", "library"], ["--layers=library"]])
def test_old_option_names_work_and_print_the_new_ones(old: list[str]) -> None:
    done = succeed("generate", *old, "--prompt", PROMPT, "--max-new-tokens", "4")
    line, *_ = done.stderr.splitlines()
    assert line == "firp: --layers is now called --backend; the old name will be removed in the next version"
    refused = invoke("generate", *old, "--compile", "--prompt", PROMPT).exception
    assert "leave --backend library out" in str(refused)
    assert "--layers" not in succeed("generate", "--help").stdout


def test_old_name_of_timing_rounds_is_accepted() -> None:
    done = invoke("tune", "--sittings", "2", "--batch-sizes", "0")
    assert "firp: --sittings is now called --timing-rounds;" in done.stderr
    assert "at least 1" in str(done.exception)


BAD = [
    (["generate"], 2, "--prompt"),
    (["generate", "firp", "--method", "medusa", "--prompt", "x"], 2, "known: ar, firp"),
    (["generate", "frip", "--prompt", "x"], 2, "did you mean 'firp'"),
    (["generate", "--tree", "spiral", "--prompt", "x"], 2, "dynamic:N"),
    (["generate", "--tree", "dynamic:8@0", "--prompt", "x"], 2, "at least 1"),
    (["generate", "--backend", "leam", "--prompt", "x"], 2, "did you mean 'lean'"),
    (["generate", "--backend", "library", "--compile", "--prompt", "x"], 2, "leave --backend library out"),
    (["generate", "--attention", "tritn", "--prompt", "x"], 2, "choose from auto, sdpa, triton"),
    (["generate", "speed", "--attention", "tritn", "--prompt", "x"], 2, "choose from auto, sdpa, triton"),
    (["generate", "--method", "ar", "--tree", "chain", "--prompt", "x"], 2, "leave --tree"),
    (["generate", "--attention", "triton", "--prompt", "x"], 2, "on CUDA devices, the teacher is on cpu: use sdpa"),
    (["generate", "--prompt", "x " * 3000], 2, "context holds 2048"),
    (["generate", "--teacher", "/nowhere", "--method", "ar", "--prompt", "x"], 2, "teacher.model"),
    (["train", "dem"], 2, "did you mean 'demo'"),
    (["train", "demo", "training.epoch=2"], 2, "did you mean 'epochs'"),
    (["train", "demo", "predictor.layer=6"], 2, "1 <= t <= 5"),
    (["train", "demo", "store=/nowhere/store"], 1, "firp collect"),
    (["collect", "demo", "predictor.kind=frip"], 2, "did you mean 'firp'"),
    (["bench", "--dataset", "gsm8k"], 2, "--data-dir"),
    (["bench", "--dataset", "arithmetic", "--methods", "arr"], 2, "did you mean 'ar'"),
    (["eval", "frip"], 2, "did you mean 'firp'"),
    (["tune", "frip"], 2, "did you mean 'firp'"),
    (["tune", "--batch-sizes", "1;2"], 2, "numbers with commas"),
    (["tune", "--batch-sizes", "0,2"], 2, "at least 1"),
    (["tune", "--dataset", "mt_bench"], 2, "test prompts only"),
    (["tune", "--split", "test"], 2, "proves nothing"),
    (["tune", "--dataset", "gsm8k"], 2, "--data-dir"),
    (["tune", "speed"], 2, "no tree to tune"),
    (["tune", "--context", "2000"], 2, "the teacher's context has 2048 positions"),
    (["tune", "--limit", "3"], 2, "raise --limit"),
    (["tune", "--tree-file", "/proc/trees/tree.json"], 2, "--tree-file"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"), BAD, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_bad_input_prints_at_most_three_lines(
    ranks: RankPool, arguments: list[str], status: int, expected: str, tmp_path: Path
) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    settings = {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    codes = ranks.run(arguments, 1, log, cwd=place, environment=settings)
    printed = log.read_text()
    assert codes == [status], printed
    assert expected in printed
    assert "Traceback" not in printed
    message = printed[printed.index("firp: ") :]
    assert len(message.strip().splitlines()) <= 3
    assert not list(place.iterdir()), "a refused command wrote files"


def test_say_prints_brackets_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    say("folder [bold]x[/bold] [/tmp/x] [cuda]")
    assert capsys.readouterr().err.strip() == "folder [bold]x[/bold] [/tmp/x] [cuda]"


def test_main_raises_user_errors_with_verbose_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["firp", "generate", "frip", "--prompt", "x"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("firp: no predictor folder 'frip'")
    monkeypatch.setattr("sys.argv", [*arguments, "-v"])
    with pytest.raises(PredictorError):
        main()


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\.venv/bin/)?firp ", line)]


def test_readme_contains_commands() -> None:
    assert len(readme_commands()) >= 8


@pytest.mark.parametrize("arguments", readme_commands(), ids=lambda words: " ".join(words)[:50])
def test_readme_commands_parse(arguments: list[str]) -> None:
    """Options and recipes of every command line in the README exist."""
    from firp_cli.assets import shipped_recipes
    from firp_cli.recipe import load_recipe

    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], arguments[1:])
    if arguments[0] in ("collect", "train"):
        assert arguments[1] in shipped_recipes()
        load_recipe(arguments[1])


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that need no hub run, with small limits; bench in a process of its own."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for arguments in readme_commands():
        if any(word.startswith("smollm2") for word in arguments):  # tested by test_smollm2.py
            continue
        if arguments[0] == "doctor" or (arguments[0] == "generate" and "--prompt" in arguments):
            succeed(*arguments)
        elif arguments[:3] == ["bench", "--dataset", "arithmetic"]:
            short = ["--limit", "2", "--repeats", "1", "--max-new-tokens", "24", "--output", str(tmp_path / "bench")]
            done = firp(*arguments, *short, cwd=tmp_path)
            assert done.returncode == 0, (arguments, done.stderr)
        else:
            continue
        ran += 1
    assert ran >= 3


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """The wheel contains the recipes, the embedded data and the mark of a typed package."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    wheel = next(tmp_path.glob("firp-*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = firp(
        "generate", "--prompt", PROMPT, "--max-new-tokens", "40", cwd=tmp_path, PYTHONPATH=str(site), PYTHONSAFEPATH="1"
    )
    assert done.returncode == 0, done.stderr
    where = [
        sys.executable,
        "-c",
        "import firp_cli, firp_cli.assets as a, firp_cli.recipe as r; names = list(a.shipped_recipes()); "
        "[r.load_recipe(name) for name in names]; texts = [path.read_text() for path in a.chat_templates().values()]; "
        "assert texts and all(texts); print(firp_cli.__file__, len(names))",
    ]
    assert {"py.typed", "__init__.pyi"} <= {path.name for path in (site / "firp_cli").iterdir()}
    embedded = ["recipes", *(f"data/{name}" for name in ("datasets", "predictors", "shapes", "teachers", "templates"))]
    places = {"firp_cli": "firp_cli", **{name: f"firp_cli/_embedded/{name}" for name in embedded}}
    for source, target in places.items():
        needed = [path for path in (ROOT / source).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        missing = [path for path in needed if not (site / target / path.relative_to(ROOT / source)).is_file()]
        assert needed and not missing, missing
    done = subprocess.run(
        where, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, check=True
    )
    assert str(site) in done.stdout
    assert int(done.stdout.split()[-1]) >= 9
