"""The Python API: `load`, `Decoder`, `bench`, `evaluate` and `tune` return what the commands print and write."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import firp_cli
from firp_cli.config import TeacherConfig
from firp_cli.errors import PredictorError, TeacherError, UsageError
from firp_cli.predictors.folder import save_predictor
from firp_cli.results import as_json
from firp_cli.teacher.load import load_teacher
from helpers.commands import PROMPT, succeed
from helpers.folders import save_prompts, save_teacher
from helpers.models import ROOT, generate_reference, make_predictor, tiny_model

OTHER_PROMPT = "Tom has 9 pens and loses 2. How many pens are left?"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def decoder() -> firp_cli.Decoder:
    return firp_cli.load("arithmetic", "firp", device="cpu")


@pytest.fixture(scope="module")
def reference() -> firp_cli.Decoder:
    """The same teacher without a predictor."""
    return firp_cli.load("arithmetic", device="cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher, a predictor for it and a data set."""
    folder = tmp_path_factory.mktemp("api")
    teacher = load_teacher(TeacherConfig(model=str(save_teacher(folder / "teacher"))), device="cpu")
    save_predictor(make_predictor(teacher, kind="firp", layer=2, steps=3), folder / "one", teacher)
    save_prompts(folder / "words.jsonl")
    return folder


def test_public_names_are_typed_and_documented() -> None:
    stub = ast.parse((ROOT / "firp_cli/__init__.pyi").read_text())
    places = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert places == firp_cli._PLACES and (ROOT / "firp_cli/py.typed").is_file()
    assert set(firp_cli.__all__) == {*places, "__version__"} <= set(dir(firp_cli))
    for name in ("load", "bench", "evaluate", "tune"):
        assert ">>> " in getattr(firp_cli, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        firp_cli.lode  # noqa: B018


def test_import_leaves_heavy_libraries_out() -> None:
    code = (
        "import sys, firp_cli\n"
        "assert firp_cli.FirpError and firp_cli.Generation and dir(firp_cli)\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["lean", "library"])
def test_generate_equals_autoregressive_decoding(backend: str, reference: firp_cli.Decoder) -> None:
    drafted = firp_cli.load("arithmetic", "firp", backend=backend, device="cpu", guard=False).generate(PROMPT)
    expected = reference.generate(PROMPT)
    assert drafted.token_ids == expected.token_ids and drafted.text == expected.text
    assert expected.finish_reason == "eos" and expected.accepted_length == 1.0
    assert drafted.accepted_length is not None and drafted.accepted_length > 1.3
    assert drafted.tokens_per_second == pytest.approx(sum(drafted.accepted_lengths) / drafted.decode_seconds)


def test_generate_equals_the_command(decoder: firp_cli.Decoder) -> None:
    record = json.loads(succeed("generate", "firp", "--json", "--prompt", PROMPT).stdout)
    result = decoder.generate(PROMPT)
    assert (result.token_ids, result.text) == (record["token_ids"], record["text"])


def test_generate_takes_text_messages_and_token_ids(decoder: firp_cli.Decoder) -> None:
    ids = decoder.encode(PROMPT)
    results = [decoder.generate(prompt, 24) for prompt in (PROMPT, MESSAGES, ids, torch.tensor(ids))]
    assert {tuple(result.token_ids) for result in results} == {tuple(results[0].token_ids)}
    assert results[0].prompt_tokens == len(ids) and results[0].finish_reason == "length"
    with pytest.raises(UsageError, match="generate_batch"):
        decoder.generate([PROMPT, OTHER_PROMPT])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="is empty"):
        decoder.generate([])


def test_generate_batch_equals_single_prompts(decoder: firp_cli.Decoder) -> None:
    prompts: list[Any] = [PROMPT, MESSAGES, OTHER_PROMPT]
    calls: list[tuple[int, int | None]] = []
    batch = decoder.generate_batch(prompts, 24, batch_size=2, progress=lambda *counts: calls.append(counts))
    assert [item.token_ids for item in batch] == [decoder.generate(prompt, 24).token_ids for prompt in prompts]
    assert calls == [(2, 3), (3, 3)] and decoder.generate_batch([]) == []
    with pytest.raises(UsageError, match="at least 1"):
        decoder.generate_batch(prompts, batch_size=0)


@pytest.mark.parametrize("predictor", [None, "firp", "medusa"])
def test_streamed_pieces_join_to_the_text(predictor: str | None) -> None:
    decoder = firp_cli.load("arithmetic", predictor, device="cpu", guard=False)
    for limit in (1, 7, 256):
        pieces: list[tuple[str, bool]] = []
        result = decoder.generate(PROMPT, limit, stream=lambda text, drafted: pieces.append((text, drafted)))  # noqa: B023
        assert "".join(text for text, _ in pieces) == result.text
        assert all(text for text, _ in pieces)
    assert any(drafted for _, drafted in pieces) == (predictor is not None)


def test_streamed_pieces_are_whole_characters() -> None:
    """A character of three tokens is written once it is whole; a broken one at the end is written as in the text."""
    from firp_cli.api.decoder import TextStream

    class Bytes:
        def decode(self, tokens: list[int], **_: object) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    pieces: list[str] = []
    stream = TextStream(Bytes(), lambda text, _: pieces.append(text))
    tokens = list("a€".encode()) + list("€".encode())[:2]
    stream.on_tokens(0, tokens[:2], 0)
    stream.on_tokens(0, tokens[2:], 2)
    assert pieces == ["a", "€"]
    stream.finish(Bytes().decode(tokens))
    assert "".join(pieces) == Bytes().decode(tokens)


def test_generate_ends_at_a_stop_string(decoder: firp_cli.Decoder) -> None:
    result = decoder.generate(PROMPT, stop=["####"])
    assert result.finish_reason == "stop" and result.text.rstrip().endswith("####")


def test_sampling_is_reproduced_by_its_seed(decoder: firp_cli.Decoder) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_p": 0.95}
    first = decoder.generate(PROMPT, 30, seed=3, **settings)
    decoder.generate(OTHER_PROMPT, 30, seed=5, **settings)
    again = decoder.generate(PROMPT, 30, seed=3, **settings)
    other = decoder.generate(PROMPT, 30, seed=4, **settings)
    assert first.token_ids == again.token_ids != other.token_ids
    options = ("--temperature", "2", "--top-p", "0.95", "--max-new-tokens", "30", "--seed", "3")
    record = json.loads(succeed("generate", "firp", "--json", "--prompt", PROMPT, *options).stdout)
    assert record["token_ids"] == first.token_ids


def test_load_takes_a_teacher_or_a_transformers_model(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = firp_cli.load(str(work / "teacher"), device="cpu").generate("w5 w6 w7", 12)
    teacher = load_teacher(TeacherConfig(model=str(work / "teacher")), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(work / "teacher")
    for given in (teacher, model, None):
        decoder = firp_cli.load(given, work / "one", device="cpu")
        assert decoder.generate("w5 w6 w7", 12).token_ids == expected.token_ids
        assert decoder.predictor is not None and decoder.predictor.kind == "firp"
    alone = firp_cli.load(teacher)
    assert alone.teacher is teacher
    tokens, teacher.tokenizer = alone.encode("w5 w6 w7"), None
    assert alone.generate(tokens, 12).token_ids == expected.token_ids
    with pytest.raises(UsageError, match="has no tokenizer"):
        alone.generate("w5 w6 w7")
    model.config._name_or_path = model.name_or_path = "/nowhere"
    with pytest.raises(TeacherError, match="give tokenizer="):
        firp_cli.load(model)
    assert firp_cli.load(model, tokenizer=decoder.teacher.tokenizer).generate("w5", 4).token_ids


def test_load_decodes_in_a_pipeline_with_a_speed_predictor() -> None:
    result = firp_cli.load(predictor="speed", device="cpu", guard=False).generate(PROMPT, 24)
    assert result.pipeline is not None and result.pipeline.loops == 4
    assert result.accepted_length == pytest.approx(4 * sum(result.accepted_lengths) / result.steps)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("arithmetc",), {}, TeacherError, "did you mean 'arithmetic'"),
        (("arithmetic", "frip"), {}, PredictorError, "did you mean 'firp'"),
        (("arithmetic", "firp"), {"backend": "leam"}, UsageError, "did you mean 'lean'"),
        (("arithmetic", "firp"), {"tree": "spiral"}, UsageError, "no tree 'spiral'"),
        (("arithmetic",), {"tree": "chain"}, UsageError, "has no tree"),
        ((None, "speed"), {"tree": "chain"}, UsageError, "has no tree"),
        (("arithmetic", "speed"), {}, firp_cli.FirpError, "was trained for"),
    ],
)
def test_load_refuses_what_does_not_exist_or_fit(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message) as refused:
        firp_cli.load(*arguments, **options)
    assert isinstance(refused.value, firp_cli.FirpError)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of bench rows that do not depend on measured times."""
    names = ("dataset", "method", "new_tokens", "accepted_length", "accepted_histogram", "steps", "lossless", "tree")
    return [{name: row[name] for name in names} for row in rows]


def test_bench_returns_the_report_that_the_command_writes(work: Path) -> None:
    settings = firp_cli.BenchSettings(max_new_tokens=8, repeats=1)
    words, opened = str(work / "words.jsonl"), []

    def progress(description: str) -> Any:
        opened.append(description)
        return nullcontext(lambda done, total: None)

    report = firp_cli.bench(str(work / "one"), dataset=words, limit=2, settings=settings, progress=progress)
    assert isinstance(report, firp_cli.BenchReport) and opened == ["measuring"]
    assert [row.method for row in report.rows] == ["ar", "hf", "prompt-lookup", "suffix", "firp"]
    options = ["--limit", "2", "--max-new-tokens", "8", "--repeats", "1", "--output", work / "bench"]
    succeed("bench", work / "one", "--dataset", words, *options)
    written = json.loads((work / "bench" / "bench.json").read_text())
    assert untimed(written["rows"]) == untimed(as_json(report)["rows"])
    assert written["settings"] == json.loads(json.dumps(as_json(report)["settings"]))
    firp_cli.write_report(report, work / "again")
    files = {path.name for path in (work / "again").iterdir()}
    assert files == {path.name for path in (work / "bench").iterdir()} >= {"bench.csv", "bench.md", "bench.html"}


def test_evaluate_returns_the_report_that_the_command_writes(work: Path) -> None:
    words = str(work / "words.jsonl")
    report = firp_cli.evaluate(work / "one", dataset=words, limit=3)
    assert isinstance(report, firp_cli.EvalReport) and len(report.steps) == 3
    succeed("eval", work / "one", "--dataset", words, "--limit", "3", "--output", work / "eval")
    written = json.loads((work / "eval" / "eval.json").read_text())
    expected = json.loads(json.dumps(as_json(report)))
    for name in ("teacher", "predictor", "data", "expected_accepted_length_tree", "tree"):
        assert written[name] == expected[name]
    for step, same in zip(written["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(same)
    with pytest.raises(UsageError, match="either --store or --dataset"):
        firp_cli.evaluate(work / "one", dataset=words, store=work)


def test_tune_refuses_the_prompts_of_bench(work: Path) -> None:
    with pytest.raises(UsageError, match="proves nothing"):
        firp_cli.tune(work / "one", dataset=str(work / "words.jsonl"), split="test")


def test_load_takes_a_transformers_model_and_checks_it(decoder: firp_cli.Decoder) -> None:
    model, prompt = copy.deepcopy(tiny_model("llama")), list(range(5, 14))
    expected = generate_reference(model, prompt, 12)
    tokenizer = decoder.teacher.tokenizer
    assert firp_cli.load(model, tokenizer=tokenizer).generate(prompt, 12).token_ids == expected
    model.model.register_forward_hook(_scale_states)
    with pytest.raises(TeacherError, match=r"is not supported: it multiplies its logits by 1\.5"):
        firp_cli.load(model, tokenizer=tokenizer)


def _scale_states(module: object, arguments: object, output: Any) -> Any:
    """Change the states after the last layer, where `Teacher` does not see it."""
    output.last_hidden_state = output.last_hidden_state * 1.5
    return output
