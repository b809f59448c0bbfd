"""Trials after public reports of people who use such tools, which the program stood: they must stay right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import firp_cli
from firp_cli.api.decoder import Decoder
from firp_cli.store.reader import Store
from helpers.commands import PROMPT, firp, invoke, succeed

QUICK = ("--max-new-tokens", "6", "--limit", "2")


@pytest.fixture(scope="module")
def drafted() -> Decoder:
    return firp_cli.load("arithmetic", "firp", tree="dynamic:16", guard=False, device="cpu")


@pytest.fixture(scope="module")
def alone() -> Decoder:
    return firp_cli.load("arithmetic", device="cpu")


@pytest.mark.parametrize("stop", [["."], ["12 + 7"], ["shells", "####"], ["\n"], ["= 1"], ["e"], ["9 = "]])
def test_stop_inside_an_accepted_run_ends_both_alike(stop: list[str], drafted: Decoder, alone: Decoder) -> None:
    one, other = (decoder.generate(PROMPT, 60, stop=stop) for decoder in (drafted, alone))
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "\n\n\t",
        "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}",
        "\x01\x1b[31m",
        "<|end|><|user|>",
        "--help",
        "x" * 900,
    ],
)
def test_odd_prompts_are_answered(text: str, drafted: Decoder, alone: Decoder) -> None:
    assert drafted.generate(text, 6).token_ids == alone.generate(text, 6).token_ids


def test_sampling_under_a_tree_has_the_teachers_distribution(drafted: Decoder, alone: Decoder) -> None:
    """Two-sample permutation test over prefixes of two tokens; the seed is fixed, so it cannot fail by chance."""
    counts: list[dict[tuple[int, ...], int]] = []
    for decoder in (drafted, alone):
        found: dict[tuple[int, ...], int] = {}
        for start in range(0, 256, 64):
            for item in decoder.generate_batch([PROMPT] * 64, 3, batch_size=64, temperature=1.0, top_p=0.9, seed=start):
                key = tuple(item.token_ids[1:3])
                found[key] = found.get(key, 0) + 1
        counts.append(found)

    def distance(one: dict[Any, int], other: dict[Any, int]) -> int:
        return sum(abs(one.get(key, 0) - other.get(key, 0)) for key in {*one, *other})

    pooled = [key for found in counts for key, count in found.items() for _ in range(count)]
    chance, larger = random.Random(0), 0
    for _ in range(200):
        chance.shuffle(pooled)
        halves: list[dict[Any, int]] = [{}, {}]
        for place, key in enumerate(pooled):
            half = halves[place % 2]
            half[key] = half.get(key, 0) + 1
        larger += distance(*halves) >= distance(*counts)
    assert larger >= 10  # p >= 0.05


def test_packing_does_not_change_a_store(tmp_path: Path) -> None:
    for tokens in (256, 4096):
        options = [f"data.pack_tokens={tokens}", "data.limit=8", "--output", tmp_path / str(tokens)]
        succeed("collect", "demo", "--layers", "4", *options)
    stores = [Store.open(tmp_path / str(tokens)) for tokens in (256, 4096)]
    for one, other in zip(*stores, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.loss_mask, other.loss_mask)
        scale = one.final.abs().max()
        assert (one.final - other.final).abs().max() < 1e-5 * scale


def test_limits_and_batches_may_exceed_the_data(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 + 3?", "answer": "6"}]
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    many = ["--limit", "9999", "--max-new-tokens", "4"]
    made = succeed("generate", "firp", "--prompts", path, *many, "--batch-size", "512")
    assert len(made.stdout.splitlines()) == 2
    bench = ["--methods", "ar,firp", "--repeats", "1", "--batch-size", "512", "--output", tmp_path / "b", "--json"]
    assert json.loads(succeed("bench", "--dataset", path, *many, *bench).stdout)["settings"]["prompts"] == 2
    collected = [
        "--dataset",
        path,
        "--limit",
        "9999",
        "--regenerate",
        "data.batch_size=100000",
        "data.max_new_tokens=4",
    ]
    assert json.loads(succeed("collect", *collected, "--output", tmp_path / "s", "--json").stdout)["conversations"] == 2


def test_json_output_is_one_object(tmp_path: Path) -> None:
    options = ["--dataset", "arithmetic", *QUICK, "--repeats", "1", "--methods", "ar,firp", "--output", tmp_path / "b"]
    for command in (
        ("bench", *options, "--json"),
        ("eval", "firp", "--dataset", "arithmetic", "--limit", "2", "--output", tmp_path / "e", "--json"),
        ("generate", "firp", "--prompt", PROMPT, "--max-new-tokens", "4", "--json"),
        ("collect", "demo", "data.limit=4", "--output", tmp_path / "s", "--json"),
        ("collect", "demo", "data.limit=4", "--output", tmp_path / "t", "--estimate", "--json"),
        ("train", "demo", "--store", tmp_path / "s", "--plan", "--json"),
        ("store", "info", tmp_path / "s", "--json"),
        ("doctor", "--json"),
    ):
        assert isinstance(json.loads(succeed(*command).stdout), dict), command


def test_paths_may_have_spaces_and_umlauts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a dir with spaces & ü"
    folder.mkdir()
    monkeypatch.chdir(folder)
    succeed("collect", "demo", "data.limit=6", "--output", "my store")
    succeed(
        "train", "demo", "--store", "my store", "--output", "rün 1", "training.max_steps=0", "training.gate_prompts=1"
    )
    succeed(
        "bench", "rün 1", "--dataset", "arithmetic", *QUICK, "--repeats", "1", "--methods", "ar,firp", "--output", "b c"
    )
    assert (folder / "b c" / "bench.json").is_file()


def test_pipes_have_no_control_sequences() -> None:
    done = firp("generate", "firp", "--prompt", PROMPT, "--max-new-tokens", "5", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    failed = invoke("bench", "--dataset", "arithmetic,/no/such/own.jsonl", "--limit", "1")
    assert "/no/such/own.jsonl" in str(failed.exception)
