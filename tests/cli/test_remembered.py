"""What stores and predictors remember of their teacher: dtype, chat template, revision, code, and where it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import firp_cli
from firp_cli.api.loading import load_named_teacher, remembered_teacher
from firp_cli.api.train_run import resolve_train
from firp_cli.config import TeacherConfig
from firp_cli.errors import FingerprintError, TeacherError, UsageError
from firp_cli.predictors.folder import load_predictor, save_predictor
from firp_cli.teacher.load import load_teacher
from helpers.commands import invoke, succeed
from helpers.folders import save_prompts, save_teacher
from helpers.models import make_predictor
from helpers.train_command import FIRP, SETTINGS

MARKED = (
    "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w8 {{ tone }} {% endif %}"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a store and a predictor of it in bfloat16 and another chat template, beside unseen prompts."""
    folder = tmp_path_factory.mktemp("remembered")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_teacher(folder / "teacher")
        (folder / "own.jinja").write_text(MARKED)
        save_prompts(folder / "words.jsonl", 16)
        save_prompts(folder / "unseen.jsonl", 4, seed=42)
        recipe = [
            *(f"teacher.model={folder / 'teacher'}", "teacher.dtype=bfloat16", "teacher.chat_template=own.jinja"),
            *("teacher.template_options={tone: w9}", f"data.dataset={folder / 'words.jsonl'}", *FIRP),
        ]
        succeed("collect", *recipe, "--regenerate", "data.max_new_tokens=6", "--output", folder / "store")
        # nothing but the store names the teacher and its settings
        succeed("train", *FIRP, *SETTINGS, "--store", folder / "store", "--output", folder / "run")
    return folder


def config_of(work: Path) -> dict[str, Any]:
    return json.loads((work / "run" / "config.json").read_text())["teacher"]


def test_training_takes_the_teacher_of_the_store(work: Path) -> None:
    made = json.loads((work / "store" / "manifest.json").read_text())["teacher"]
    kept = config_of(work)
    assert kept["loading"] == made["loading"]
    assert kept["loading"]["dtype"] == kept["dtype"] == "bfloat16"
    assert kept["loading"]["template_options"] == {"tone": "w9"} and kept["loading"]["chat_template"] == MARKED
    assert made["chat_template"]["source"] == "file own.jinja"
    assert kept["chat_template"] == made["chat_template"] | {"source": "text"}  # the store has the text
    explicit = resolve_train(None, [*FIRP, "teacher.dtype=float32"], store=work / "store").recipe.teacher
    assert explicit.dtype == "float32" and explicit.template_options == {"tone": "w9"}


def test_commands_use_what_the_predictor_remembers(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    shutil.move("own.jinja", "moved.jinja")  # the predictor has the text
    short = ["--limit", "2", "--max-new-tokens", "6"]
    succeed("bench", "run", "--dataset", "unseen.jsonl", *short, "--repeats", "1", "--output", "bench")
    report = json.loads((work / "bench" / "bench.json").read_text())["teacher"]
    assert report["dtype"] == "bfloat16" and report["loading"] == config_of(work)["loading"]
    succeed("eval", "run", "--dataset", "unseen.jsonl", "--limit", "2", "--output", "eval")
    assert json.loads((work / "eval" / "eval.json").read_text())["teacher"]["dtype"] == "bfloat16"
    decoder = firp_cli.load(None, work / "run")
    words = decoder.teacher.tokenizer.decode(decoder.encode("w5"))
    assert words.split() == ["w7", "w5", "w8", "w9"] and decoder.teacher.describe()["dtype"] == "bfloat16"
    shutil.move("moved.jinja", "own.jinja")


def test_user_may_choose_otherwise_and_is_told(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="firp"):
        teacher = load_named_teacher(TeacherConfig(dtype="float32", chat_template="plain"), work / "run")
    text = " ".join(item.getMessage() for item in caplog.records)
    assert "trained on states in bfloat16, and the teacher runs in float32" in text
    assert "trained with another chat template (text" in text and "in use (plain" in text
    assert teacher.describe()["dtype"] == "float32"
    assert teacher.origin is not None and teacher.origin.chat_template["source"] == "plain"


def test_records_have_no_paths_of_one_machine(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    succeed(
        "bench",
        work / "run",
        "--dataset",
        work / "unseen.jsonl",
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
        "--repeats",
        "1",
        "--output",
        "paths",
    )
    for file in ("run/config.json", "run/training.json", "run/recipe.yaml", "paths/bench.json"):
        assert str(work) not in (work / file).read_text(), file
    assert config_of(work)["name"] == "teacher" and config_of(work)["path"] == "../teacher"


def test_moved_teacher_is_found_or_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = tmp_path / "elsewhere"
    shutil.copytree(work, both)
    monkeypatch.chdir("/")
    result = succeed("generate", both / "run", "--prompt", "w5", "--max-new-tokens", "3")
    shutil.move(both / "teacher", both / "renamed")
    error = invoke("generate", both / "run", "--prompt", "w5").exception
    assert isinstance(error, TeacherError) and "no such folder" in str(error) and "give --teacher" in str(error)
    again = succeed("generate", both / "run", "--teacher", both / "renamed", "--prompt", "w5", "--max-new-tokens", "3")
    assert again.stdout == result.stdout


def test_prompts_that_were_trained_on_are_left_out(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    lines = (work / "words.jsonl").read_text().splitlines()
    (work / "mixed.jsonl").write_text("\n".join([*lines, *(work / "unseen.jsonl").read_text().splitlines()]) + "\n")
    options = ["--max-new-tokens", "4", "--repeats", "1", "--output", "mixed"]
    result = succeed("bench", "run", "--dataset", "mixed.jsonl", *options)
    report = json.loads((work / "mixed" / "bench.json").read_text())
    training = json.loads((work / "run" / "training.json").read_text())["conversations"]["training"]
    assert report["left_out_trained"] == training == 13 and report["settings"]["prompts"] == 20 - training
    assert "13 left out: a predictor was trained on them" in " ".join(result.output.split())
    again = [*options[:4], "--methods", "ar,firp", "--chat-template", "plain", "--output", "mixed-plain"]
    succeed("bench", "run", "--dataset", "mixed.jsonl", *again)
    assert json.loads((work / "mixed-plain" / "bench.json").read_text())["left_out_trained"] == training
    evaluated = succeed("eval", "run", "--dataset", "mixed.jsonl", "--limit", "20", "--output", "mixed-eval")
    assert json.loads((work / "mixed-eval" / "eval.json").read_text())["data"]["left_out_trained"] == training
    assert "13 of 20 prompts are left out" in " ".join(evaluated.output.split())
    keys = load_predictor(work / "run", load_named_teacher(None, work / "run")).trained_prompts
    assert keys is not None and len(keys) == training
    (work / "trained.jsonl").write_text("\n".join(lines[:1]))
    held_out = report["settings"]["prompts"] - 4
    refused = [invoke("bench", "run", "--dataset", "trained.jsonl", *options[:4]).exception]
    if held_out and refused[0] is None:  # the first row is one of those that training held out
        (work / "trained.jsonl").write_text("\n".join(lines[1:2]))
        refused = [invoke("bench", "run", "--dataset", "trained.jsonl", *options[:4]).exception]
    assert isinstance(refused[0], UsageError) and "trained on all 1 prompts" in str(refused[0])


def test_a_predictor_without_hashes_is_named_beside_its_data(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    shutil.copytree("run", "old")
    weights = load_file("old/predictor.safetensors")
    del weights["trained_prompts"]
    save_file(weights, "old/predictor.safetensors")
    options = ["--max-new-tokens", "4", "--repeats", "1", "--limit", "2"]
    for name, said in (("words.jsonl", True), ("unseen.jsonl", False)):
        done = succeed("bench", "old", "--dataset", name, *options, "--output", f"old-{name}")
        assert ("keeps no hashes of the prompts" in " ".join(done.stderr.split())) == said


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "{kind}"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("kind", ["own-llama", "llama"])
def test_code_of_the_repository_runs_only_with_permission(kind: str, tmp_path: Path) -> None:
    save_teacher(tmp_path / "code")
    (tmp_path / "code" / "own_model.py").write_text(CODE.format(kind=kind))
    path = tmp_path / "code" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": kind, "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    path.write_text(json.dumps(config))
    teacher = load_teacher(TeacherConfig(model=str(path.parent), trust_remote_code=True), "cpu")
    assert type(teacher.model).__name__ == "OwnModel"
    save_predictor(make_predictor(teacher, kind="firp", layer=2, steps=2), tmp_path / "p", teacher)
    with pytest.raises(TeacherError, match="--trust-remote-code"):
        firp_cli.load(None, tmp_path / "p")
    allowed = firp_cli.load(TeacherConfig(trust_remote_code=True), tmp_path / "p")
    assert type(allowed.teacher.model).__name__ == "OwnModel"
    plain = load_teacher(TeacherConfig(model=str(save_teacher(tmp_path / "plain"))), "cpu")
    with pytest.raises(FingerprintError, match="OwnModel of the teacher's repository"):
        load_predictor(tmp_path / "p", plain)
    assert load_predictor(tmp_path / "p", plain, force=True).kind == "firp"


def test_commit_of_the_hub_is_remembered(tmp_path: Path) -> None:
    """A hand-made cache of two commits stands in for the hub."""
    old, new = "a" * 40, "b" * 40
    repository = tmp_path / "models--me--toy"
    save_teacher(repository / "snapshots" / old)
    save_teacher(repository / "snapshots" / new)
    teacher = load_teacher(TeacherConfig(model=str(repository / "snapshots" / old)), "cpu")
    assert teacher.name == "me/toy"
    save_predictor(make_predictor(teacher, kind="firp", layer=2, steps=2), tmp_path / "p", teacher)
    assert json.loads((tmp_path / "p" / "config.json").read_text())["teacher"]["loading"]["revision"] == old
    shutil.move(str(repository), str(tmp_path / "gone"))
    config = remembered_teacher(None, tmp_path / "p")
    assert (config.model, config.revision) == ("me/toy", old)
    assert remembered_teacher(TeacherConfig(revision="main"), tmp_path / "p").revision == "main"
    assert remembered_teacher("other/model", tmp_path / "p").revision is None


def test_vicuna_loads_from_its_sentencepiece_model(tmp_path: Path) -> None:
    """The repository has neither tokenizer.json nor a chat template, as lmsys/vicuna-7b-v1.3."""
    import sentencepiece

    from helpers.models import tiny_model

    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"Hello number {n}, what is the answer? ASSISTANT: USER: it is {n + 1}." for n in range(200))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=96,
        model_type="bpe",
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    folder = tmp_path / "vicuna"
    tiny_model("llama").save_pretrained(folder)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    decoder = firp_cli.load(TeacherConfig(model=str(folder), chat_template="vicuna"))
    ids = decoder.encode("what is the answer?")
    said = decoder.teacher.tokenizer.decode(ids)
    assert said.endswith("USER: what is the answer? ASSISTANT:") and ids[0] == 1 and ids.count(1) == 1


def test_tokenizer_file_is_used_whatever_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mistral-common is installed, the library takes its tokenizer for a folder with a tekken.json, unless it is
    told not to.
    """
    from transformers import AutoTokenizer

    asked: list[Any] = []
    read = AutoTokenizer.from_pretrained

    def recorded(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("mistral_format"))
        return read(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", recorded)
    folder = save_teacher(tmp_path / "mist")
    (folder / "tekken.json").write_text("{}")
    teacher = load_teacher(TeacherConfig(model=str(folder)), "cpu")
    assert asked == [False] and teacher.tokenizer.chat_template
