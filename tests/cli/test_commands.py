"""The command line as a user meets it: generate, bad input, the README's commands, the wheel."""

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

from firp_cli.cli.terminal import say
from helpers.commands import PROMPT, firp
from helpers.models import ROOT
from helpers.rank_pool import RankPool

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generate_streams_the_same_text_as_plain_decoding() -> None:
    drafted = firp("generate", "--no-guard", "--prompt", PROMPT)
    plain = firp("generate", "--method", "ar", "--prompt", PROMPT)
    assert drafted.returncode == plain.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert "####" in drafted.stdout
    tokens, steps, accepted = re.search(
        r"(\d+) tokens in (\d+) steps, accepted length ([\d.]+)", drafted.stderr
    ).groups()
    assert float(accepted) > 1.3
    assert int(steps) < int(tokens) - 1
    assert "accepted length 1.00" in plain.stderr
    memory, summary = drafted.stderr.splitlines()
    assert memory.startswith("K/V cache for 1 x ") and memory.endswith("B")
    assert summary.startswith(f"{tokens} tokens")


def test_generate_colours_what_was_drafted() -> None:
    done = firp("generate", "--prompt", PROMPT, FORCE_COLOR="1")
    assert "\x1b[32m" in done.stdout
    assert re.sub(r"\x1b\[[0-9;]*m", "", done.stdout) == firp("generate", "--prompt", PROMPT).stdout


def test_generate_writes_jsonl(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": PROMPT}, {"question": "Tom has 9 pens and loses 2. How many pens are left?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    done = firp("generate", "medusa", "--prompts", str(prompts), "--output", str(output), "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert {"prompt_tokens", "token_ids", "text", "steps", "accepted_lengths"} <= set(record)
        assert len(record["accepted_lengths"]) == record["steps"]
        assert sum(record["accepted_lengths"]) + 1 == len(record["token_ids"])
    alone = json.loads(firp("generate", "--json", "--prompt", PROMPT).stdout)
    assert alone["token_ids"] == records[0]["token_ids"]


def test_sampling_is_seeded() -> None:
    options = ("generate", "--prompt", PROMPT, "--temperature", "1", "--top-p", "0.95", "--max-new-tokens", "30")
    assert firp(*options, "--seed", "3").stdout == firp(*options, "--seed", "3").stdout


BAD = [
    (["generate"], 2, "--prompt"),
    (["generate", "firp", "--method", "medusa", "--prompt", "x"], 2, "known: ar, firp"),
    (["generate", "frip", "--prompt", "x"], 2, "did you mean 'firp'"),
    (["generate", "--tree", "spiral", "--prompt", "x"], 2, "dynamic:N"),
    (["generate", "--tree", "dynamic:8@0", "--prompt", "x"], 2, "at least 1"),
    (["generate", "--layers", "leam", "--prompt", "x"], 2, "did you mean 'lean'"),
    (["generate", "--layers", "library", "--compile", "--prompt", "x"], 2, "leave --layers library out"),
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
    (["tune", "--context", "2000"], 2, "context holds 2048"),
    (["tune", "--limit", "3"], 2, "raise --limit"),
    (["tune", "--tree-file", "/proc/trees/tree.json"], 2, "--tree-file"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"), BAD, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_bad_input_is_one_or_two_lines(
    ranks: RankPool, arguments: list[str], status: int, expected: str, tmp_path: Path
) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    settings = {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    codes = ranks.run(arguments, 1, log, cwd=place, environment=settings)
    told = log.read_text()
    assert codes == [status], told
    assert expected in told
    assert "Traceback" not in told
    message = told[told.index("firp: ") :]
    assert len(message.strip().splitlines()) <= 3
    assert not list(place.iterdir()), "a refused command leaves nothing behind"


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("folder [bold]x[/bold] [/tmp/x] [cuda]")
    assert capsys.readouterr().err.strip() == "folder [bold]x[/bold] [/tmp/x] [cuda]"


def test_verbose_shows_the_traceback() -> None:
    assert "Traceback" in firp("generate", "frip", "--prompt", "x", "-v").stderr


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\.venv/bin/)?firp ", line)]


def test_readme_names_commands() -> None:
    assert len(readme_commands()) >= 8


@pytest.mark.parametrize("arguments", readme_commands(), ids=lambda words: " ".join(words)[:50])
def test_readme_commands_parse(arguments: list[str]) -> None:
    """Options and recipes of every command line in the README exist."""
    from typer.main import get_command

    from firp_cli.assets import shipped_recipes
    from firp_cli.cli.app import app
    from firp_cli.recipe import load_recipe

    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], arguments[1:])
    if arguments[0] in ("collect", "train"):
        assert arguments[1] in shipped_recipes()
        load_recipe(arguments[1])


def test_readme_commands_run(tmp_path: Path) -> None:
    """Those that need no hub: shortened, and really run."""
    ran = 0
    for arguments in readme_commands():
        if any(word.startswith("smollm2") for word in arguments):  # tests/test_smollm2.py has those
            continue
        if arguments[0] == "doctor" or (arguments[0] == "generate" and "--prompt" in arguments):
            done = firp(*arguments, cwd=tmp_path)
        elif arguments[:3] == ["bench", "--dataset", "arithmetic"]:
            short = ["--limit", "2", "--repeats", "1", "--max-new-tokens", "24", "--output", str(tmp_path / "bench")]
            done = firp(*arguments, *short, cwd=tmp_path)
        else:
            continue
        ran += 1
        assert done.returncode == 0, (arguments, done.stderr)
    assert ran >= 3


@pytest.mark.slow
def test_wheel_works_elsewhere(tmp_path: Path) -> None:
    """Recipes and embedded data travel in the wheel; the package found there answers without the checkout."""
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
        "import firp_cli, firp_cli.assets as a; print(firp_cli.__file__, len(a.shipped_recipes()))",
    ]
    told = subprocess.run(
        where, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, check=True
    )
    assert str(site) in told.stdout
    assert int(told.stdout.split()[-1]) >= 9
