"""Collecting: shared forwards against one conversation at a time, kill and resume, answers, estimates, the command."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from firp_cli.api.collect_run import collect
from firp_cli.api.estimate_run import estimate_collect
from firp_cli.collecting import collect_store as capture_module
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.engine_responder import EngineResponder
from firp_cli.collecting.estimate import estimate
from firp_cli.collecting.teacher_states import capture, plan_batches
from firp_cli.config import Recipe, TeacherConfig
from firp_cli.data.chat import encode, encode_prompt
from firp_cli.errors import (
    CapacityError,
    DatasetError,
    LossMaskError,
    NumericsError,
    StoreError,
    TeacherError,
    UsageError,
)
from firp_cli.store.reader import Store
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.chat import byte_tokenizer
from helpers.collecting import config, contents, make_teacher
from helpers.commands import firp, invoke
from helpers.models import FAMILIES, ROOT, VOCABULARY, generate_reference, tiny_model, tiny_teacher
from helpers.rank_pool import RankPool


def random_ids(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator, dtype=torch.int32) for length in lengths]


def test_plan_batches_groups_similar_lengths() -> None:
    lengths = [5, 9, 30, 9, 1, 6, 16]
    batches = plan_batches(lengths, 20)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[0] == [2]  # longer than a batch: alone
    for batch in batches[1:]:
        assert lengths[batch[0]] * len(batch) <= 20
    assert batches == plan_batches(list(lengths), 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_the_forward_of_one_conversation(family: str) -> None:
    """Against the model's own forward, one conversation at a time (Llama, Mistral and Qwen2 with windows, Qwen3)."""
    wide = tiny_model(family)
    torch.manual_seed(1)
    model_config = copy.deepcopy(wide.config)
    model_config.initializer_range = 0.1  # states of a real model's size, where 1e-5 is some float32 steps
    teacher = wrap_model(type(wide)(model_config))
    lengths = [1, 33, 7, 20, 2, 33, 14, 19, 41]
    sequences = random_ids(lengths)
    layers = [1, 2, 3]
    found: dict[int, dict[str, Tensor]] = {}
    forwards = []

    def sink(batch: list[int], states: dict[str, Tensor]) -> None:
        forwards.append(batch)
        rows = {name: rows.split([lengths[index] for index in batch]) for name, rows in states.items()}
        found.update({index: {name: rows[name][place] for name in rows} for place, index in enumerate(batch)})

    capture(teacher, sequences, layers, 70, sink)
    assert max(map(len, forwards)) >= 3 and set(found) == set(range(len(lengths)))
    for index, ids in enumerate(sequences):
        with torch.no_grad():
            own = teacher.model(ids[None].long(), output_hidden_states=True, use_cache=False).hidden_states
        for name, want in [*((f"hidden.{layer}", own[layer][0]) for layer in layers), ("hidden.final", own[-1][0])]:
            assert (found[index][name] - want).abs().max() <= 1e-5, (index, name)


@pytest.fixture
def byte_teacher() -> Teacher:
    return make_teacher()


@pytest.fixture
def teacher_folder(tmp_path: Path, byte_teacher: Teacher) -> Path:
    byte_teacher.model.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {n} + {n * 7}?", "answer": f"It is {n * 8}. " * (1 + n % 5)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_store_has_the_teachers_states_tokens_and_masks(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    summary = collect_store(byte_teacher, config(dataset), [3, 1], tmp_path / "store")
    store = Store.open(tmp_path / "store", verify=True)
    assert len(store) == summary.conversations == 24 and summary.shards >= 4
    assert summary.layers == [1, 3] and summary.tokens == sum(store.lengths)
    for number, item in enumerate(store):
        messages = [
            {"role": "user", "content": f"What is {number} + {number * 7}?"},
            {"role": "assistant", "content": f"It is {number * 8}. " * (1 + number % 5)},
        ]
        expected = encode(messages, byte_teacher.tokenizer)
        assert item.input_ids.tolist() == expected.input_ids and item.loss_mask.tolist() == expected.loss_mask
        with torch.no_grad():
            own = byte_teacher.model(item.input_ids[None], output_hidden_states=True).hidden_states
        for got, want in ((item.hidden[1], own[1]), (item.hidden[3], own[3]), (item.final, own[-1])):
            assert (got - want[0]).abs().max() <= 1e-5
    store.check_teacher(
        *(capture_module.fingerprints(byte_teacher)[key] for key in ("teacher", "tokenizer", "chat template"))
    )
    provenance = json.loads((tmp_path / "store" / "provenance.json").read_text())
    assert {"argv", "versions", "git_commit"} <= set(provenance)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compressed_stores_stay_near_the_states(
    byte_teacher: Teacher, dataset: Path, tmp_path: Path, dtype: str
) -> None:
    collect_store(byte_teacher, config(dataset), [2], tmp_path / "exact")
    collect_store(byte_teacher, config(dataset, store_dtype=dtype), [2], tmp_path / "small")
    exact, small = Store.open(tmp_path / "exact"), Store.open(tmp_path / "small")
    for one, other in zip(exact, small, strict=True):
        error = (one.hidden[2] - other.hidden[2].float()).norm() / one.hidden[2].norm()
        assert 0 < error < 0.01
    sizes = [sum(len(data) for data in contents(tmp_path / name).values()) for name in ("exact", "small")]
    assert sizes[1] < 0.75 * sizes[0]


KILL_IN_SHARD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.collecting import config, make_teacher
from firp_cli.collecting.collect_store import collect_store
from firp_cli.store import writer as store_writer
count, save = 0, store_writer.save_hashed
def save_half(tensors, path):
    global count
    count += 1
    digest = save(tensors, path)
    if count == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return digest
store_writer.save_hashed = save_half
collect_store(make_teacher(), config(Path({dataset!r})), [1, 2], Path({folder!r}))
"""


def run_script(code: str) -> int:
    values = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=values, capture_output=True, timeout=120, check=False).returncode


def test_resume_after_a_kill_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    code = KILL_IN_SHARD.format(tests=str(ROOT / "tests"), dataset=str(dataset), folder=str(folder))
    assert run_script(code) == -signal.SIGKILL
    left = sorted(path.name for path in folder.glob("shard-*.safetensors"))
    assert left == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert list(folder.glob(".shard-*"))  # the torn third shard, under a temporary name
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in left}
    summary = collect_store(make_teacher(), config(dataset), [1, 2], folder, resume=True)
    assert summary.shards_written == summary.shards - 2
    assert before == {name: (folder / name).stat().st_mtime_ns for name in left}
    collect_store(make_teacher(), config(dataset), [1, 2], tmp_path / "uninterrupted")
    assert contents(folder) == contents(tmp_path / "uninterrupted")


def test_resume_rebuilds_only_damaged_shards(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    collect_store(byte_teacher, config(dataset), [2], folder)
    whole = contents(folder)
    (folder / "shard-00001.safetensors").write_bytes(b"\0" * len(whole["shard-00001.safetensors"]))
    (folder / "shard-00003.safetensors").unlink()
    summary = collect_store(byte_teacher, config(dataset), [2], folder, resume=True)
    assert summary.shards_written == 2
    assert contents(folder) == whole
    assert collect_store(byte_teacher, config(dataset), [2], folder, resume=True).tokens_per_second is None


def test_resume_refuses_other_data_and_other_teachers(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    collect_store(byte_teacher, config(dataset), [2], folder)
    with pytest.raises(StoreError, match=r"layers \(store: \[2\], now: \[3\]\)"):
        collect_store(byte_teacher, config(dataset), [3], folder, resume=True)
    with pytest.raises(Exception, match="another teacher"):
        collect_store(make_teacher(seed=1), config(dataset), [2], folder, resume=True)
    dataset.write_text(dataset.read_text().replace("It is 8.", "It is 9."))
    with pytest.raises(StoreError, match="data_fingerprint"):
        collect_store(byte_teacher, config(dataset), [2], folder, resume=True)


def test_nan_stops_before_its_shard(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    byte_teacher.model.get_input_embeddings().weight.data[byte_teacher.tokenizer.encode("7")[0]] = float("nan")
    with pytest.raises(NumericsError, match=r"NaN or infinity in hidden\.2, token \d+ of conversation \d"):
        collect_store(byte_teacher, config(dataset), [2], tmp_path / "store")
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "store")


def test_full_disk_is_reported_before_and_during_writing(
    byte_teacher: Teacher, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firp_cli.collecting import estimate as estimate_module
    from firp_cli.store import writer as store_writer

    with monkeypatch.context() as patch:
        patch.setattr(estimate_module, "free_bytes", lambda _: 1000)
        with pytest.raises(CapacityError, match=r"the store needs .* kB and .* 1\.0 kB free\n.*data.store_dtype=int8"):
            collect_store(byte_teacher, config(dataset), [2], tmp_path / "small")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "save_hashed", no_space)
        with pytest.raises(StoreError, match=r"No space left on device\n.*--resume"):
            collect_store(byte_teacher, config(dataset), [2], tmp_path / "full")
    collect_store(byte_teacher, config(dataset), [2], tmp_path / "full", resume=True)
    assert len(Store.open(tmp_path / "full", verify=True)) == 24


def test_rows_without_a_usable_answer_are_skipped(byte_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    long = [{"role": "user", "content": "far too long " * 40}, turns[1]]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": []}, {"messages": long}, {"messages": turns}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = collect_store(byte_teacher, config(path, max_length=60), [2], tmp_path / "store")
    assert summary.conversations == 2
    assert summary.skipped == {"no messages": 1, "no answer": 1, "no answer within max_length": 1}


def test_useless_loss_masks_and_unanswered_sets_are_refused(byte_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    byte_teacher.tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(LossMaskError, match=r"none of the data set's.*\n.*answers in \[\[ \]\]"):
        collect_store(byte_teacher, config(path), [2], tmp_path / "store")
    byte_teacher.tokenizer.chat_template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(LossMaskError, match="all of the data set's"):
        collect_store(byte_teacher, config(path), [2], tmp_path / "store")
    byte_teacher.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DatasetError, match="the chat template refuses the conversation: never"):
        collect_store(byte_teacher, config(path), [2], tmp_path / "store")
    path.write_text(json.dumps({"turns": ["q"]}) + "\n")
    with pytest.raises(DatasetError, match="no answers to learn from; let the teacher write them: --regenerate"):
        collect_store(byte_teacher, config(path), [2], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_unusable_layers_and_missing_tokenizers_are_refused(
    byte_teacher: Teacher, dataset: Path, tmp_path: Path
) -> None:
    for layers in ([0], [4], [2, 9]):
        with pytest.raises(UsageError, match="layers 1 to 3 can be collected"):
            collect_store(byte_teacher, config(dataset), layers, tmp_path / "store")
    with pytest.raises(TeacherError, match="has no tokenizer"):
        collect_store(tiny_teacher(), config(dataset), [2], tmp_path / "store")


def test_regenerated_store_has_the_teachers_own_text(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    data = config(dataset, regenerate=True, max_new_tokens=12, batch_size=7)
    collect_store(byte_teacher, data, [2], tmp_path / "store", responder=EngineResponder(byte_teacher, 7))
    store = Store.open(tmp_path / "store")
    assert len(store) == 24
    for number in (0, 9, 23):
        prompt = encode_prompt(
            [{"role": "user", "content": f"What is {number} + {number * 7}?"}], byte_teacher.tokenizer
        )
        expected = prompt + generate_reference(byte_teacher.model, prompt, 12)
        assert store[number].input_ids.tolist() == expected
        assert store[number].loss_mask.tolist() == [place >= len(prompt) for place in range(len(expected))]


def test_estimate_is_exact_and_writes_nothing(byte_teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    figures = estimate(byte_teacher, config(dataset), [1, 2], "float32", tmp_path / "deep" / "store")
    assert sorted(tmp_path.rglob("*")) == before
    assert figures.exact and figures.free_bytes > 0 and figures.seconds > 0
    summary = collect_store(byte_teacher, config(dataset), [1, 2], tmp_path / "store")
    assert (figures.conversations, figures.tokens) == (summary.conversations, summary.tokens)
    assert figures.total_bytes == pytest.approx(summary.bytes, rel=0.1)
    data = config(dataset, regenerate=True, max_new_tokens=5)
    bound = estimate(byte_teacher, data, [2], "int8", tmp_path, responders=[EngineResponder(byte_teacher, 32)])
    assert bound.upper_bound and bound.answering_seconds > 0 and bound.bytes_per_token == 5 + 2 * (32 + 2)


def test_estimate_from_a_sample_is_close(
    byte_teacher: Teacher, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = estimate(byte_teacher, config(dataset), [1], "float32", tmp_path)
    monkeypatch.setattr("firp_cli.collecting.estimate.SAMPLE_CONVERSATIONS", 8)
    figures = estimate(byte_teacher, config(dataset), [1], "float32", tmp_path)
    assert not figures.exact and figures.sampled_conversations == 8 and figures.conversations == 24
    assert figures.tokens == pytest.approx(exact.tokens, rel=0.2)


def test_collect_estimates_and_fills_a_store(
    teacher_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--teacher", teacher_folder, "--dataset", dataset, "--layers", "1,3", "data.shard_tokens=300"]
    planned = invoke("collect", *common, "--estimate")
    assert planned.exit_code == 0, planned.output
    assert "nothing was started" in planned.stdout and "GB free" in planned.stdout
    assert not (tmp_path / "stores").exists()
    done = invoke("collect", *common, "--limit", "10", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["store"] == "stores/sums" and summary["conversations"] == 10
    store = Store.open(tmp_path / "stores" / "sums", verify=True)
    assert store.manifest["layers"] == [1, 3] and store.manifest["recipe"]["data"]["limit"] == 10


def test_collect_function_returns_a_typed_summary(teacher_folder: Path, dataset: Path, tmp_path: Path) -> None:
    overrides = [f"teacher.model={teacher_folder}", f"data.dataset={dataset}", "data.limit=8"]
    figures = estimate_collect(None, overrides, layers=[1], output=tmp_path / "store", ranks=2)
    assert figures.exact and figures.ranks == 2 and not (tmp_path / "store").exists()
    summary = collect(None, overrides, layers=[1], output=tmp_path / "store")
    assert (summary.conversations, summary.tokens) == (figures.conversations, figures.tokens) and summary.layers == [1]
    assert summary.as_json()["store"] == str(tmp_path / "store") and "answers" not in summary.as_json()
    with pytest.raises(StoreError, match="already holds a complete store"):
        collect(None, overrides, output=tmp_path / "store")
    recipe = Recipe(teacher=TeacherConfig(model=str(teacher_folder)), data=config(dataset, limit=8))
    assert collect(recipe, output=tmp_path / "other").layers == [2]  # the middle one: the recipe has no predictor


def test_collect_reads_layers_and_folder_from_the_recipe(
    teacher_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = [f"teacher: {{model: {teacher_folder}}}", f"data: {{dataset: {dataset}}}"]
    text = "\n".join([*sections, "predictor: {kind: firp, layer: 3}", "store: mine"])
    (tmp_path / "run.yaml").write_text(text)
    done = firp("collect", "run.yaml", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine: 24 conversations") and "layers 3 and the final state" in done.stdout
    assert done.stdout.rstrip().endswith("next: firp train run.yaml --store mine")
    monkeypatch.chdir(tmp_path)
    error = invoke("collect", "run.yaml").exception
    assert isinstance(error, StoreError) and error.exit_code == 1
    assert "already holds a complete store" in str(error) and "--resume" in str(error)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words", "lines"),
    [
        (["--dataset", "gsm8k"], "--data-dir DIR", 2),
        (["--hostfile", "absent"], "no hostfile absent", 1),
        (["--layers", "two"], "--layers takes numbers", 1),
        (["data.limt=3"], "did you mean 'limit'", 1),
        (["--layers", "99"], "can be collected", 2),  # the first line names the loaded layers
        (["--dataset", "absent.jsonl"], "no such file: absent.jsonl", 1),
    ],
)
def test_collect_bad_input_has_an_error_of_two_lines(
    ranks: RankPool, teacher_folder: Path, tmp_path: Path, arguments: list[str], words: str, lines: int
) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    codes = ranks.run(["collect", "--teacher", str(teacher_folder), *arguments], 1, log, cwd=place)
    printed = log.read_text()
    assert codes == [2] and words in printed, printed
    assert len(printed.splitlines()) == lines
    assert not list(place.iterdir())
