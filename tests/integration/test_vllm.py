"""The vLLM responder against a stand-in with vLLM's signatures; vLLM itself is not used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firp_cli.collecting import vllm as vllm_process
from firp_cli.collecting.answer import respond
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.corpus import build_corpus, load_messages
from firp_cli.collecting.engine_responder import make_responder
from firp_cli.collecting.vllm import VllmResponder, check_vllm
from firp_cli.config import DataConfig, LoopedSection, Recipe, TeacherConfig
from firp_cli.errors import TeacherError, UsageError
from firp_cli.store.reader import Store
from firp_cli.teacher.teacher import Teacher
from helpers import vllm_stand_in
from helpers.collecting import config, corpus_of, make_teacher
from helpers.commands import invoke
from helpers.models import ROOT, looped_teacher, random_prompts

STOP = vllm_stand_in.STOP
Script = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make `import vllm` find the stand-in, here and in vLLM's process; return a function that sets its faults."""
    (tmp_path / "modules" / "vllm").mkdir(parents=True)
    shutil.copy(vllm_stand_in.__file__, tmp_path / "modules" / "vllm" / "__init__.py")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    root = str(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), root]))
    notes = tmp_path / "notes.json"
    monkeypatch.setenv("VLLM_STAND_IN", str(notes))

    def write(**faults: Any) -> Path:
        notes.write_text(json.dumps(faults))
        return notes

    write()
    return write


@pytest.fixture
def teacher() -> Teacher:
    made = make_teacher()
    made.eos_token_ids = (STOP,)
    return made


def responder_of(teacher: Teacher, folder: Path, longest: int = 100, **options: Any) -> VllmResponder:
    return VllmResponder(TeacherConfig(model=str(folder)), teacher, options, longest)


def asked(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{notes}.asked").read_text().splitlines()]


def expected(prompts: list[list[int]], limit: int) -> list[list[int]]:
    return [prompt + vllm_stand_in.answer(prompt)[:limit] for prompt in prompts]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_vllm_answers_by_token_ids_and_its_process_ends(
    script: Script, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = script()
    monkeypatch.setattr(vllm_process, "AT_ONCE", 4)
    monkeypatch.setenv("RANK", "0")  # of no matter to vLLM
    prompts = random_prompts(10, seed=2)
    responder = responder_of(teacher, tmp_path, tensor_parallel_size=4, enable_prefix_caching=True, seed=3)
    answered, account = respond(teacher, corpus_of(prompts), DataConfig(max_new_tokens=4), 100, tmp_path, responder)
    assert [ids.tolist() for ids in answered.input_ids] == expected(prompts, 4)
    assert account["written"] == 10 and account["failed"] == 0
    assert account["cut"] == sum(vllm_stand_in.answer(prompt)[:4][-1] != STOP for prompt in prompts) > 0
    start, *batches = asked(notes)
    assert [batch["batch"] for batch in batches] == [4, 4, 2]
    assert start["model"] == str(tmp_path) and "RANK" not in start["environment"]
    assert start["options"] == {
        "tensor_parallel_size": 4,
        "dtype": "float32",
        "seed": 3,
        "max_model_len": 100,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
    }
    assert not alive(start["pid"])


def test_vllm_answers_later_turns_in_one_process(script: Script, teacher: Teacher, tmp_path: Path) -> None:
    notes, talks = script(), tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"turns": ["one", "two", "three"][:count]}) + "\n" for count in (1, 2, 3)))
    data = config(talks, regenerate=True, max_new_tokens=4)
    prompts = build_corpus(load_messages(data), teacher, data)
    answered, account = respond(teacher, prompts, data, 400, tmp_path, responder_of(teacher, tmp_path, 400))
    assert account["turns"] == 6 and len(asked(notes)) == 1 + 3, "a start and a batch for each turn"
    for ids, mask in zip(answered.input_ids, answered.loss_mask, strict=True):
        told, place = ids.tolist(), 0
        while place < len(told):
            place += int(mask[place:].int().argmax())
            answer = vllm_stand_in.answer(told[:place])[:4]
            assert told[place : place + len(answer)] == answer and mask[place : place + len(answer)].all()
            place += len(answer)
            assert place == len(told) or not mask[place]


def test_vllm_refused_prompt_loses_no_other(
    script: Script, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(refuse=96, drop_stop=True)
    monkeypatch.setattr(vllm_process, "AT_ONCE", 4)
    prompts = [[token % 96 for token in prompt] for prompt in random_prompts(6, seed=3)]
    mixed = corpus_of([*prompts[:2], [5, 96], *prompts[2:]])
    responder = responder_of(teacher, tmp_path)
    answered, account = respond(teacher, mixed, DataConfig(max_new_tokens=9), 100, tmp_path, responder)
    assert [ids.tolist() for ids in answered.input_ids] == expected(prompts, 9)  # with the stop token put back
    assert account["failed"] == 1 and account["failure"] == "ValueError: Token id is out of vocabulary"
    script()
    again, account = respond(teacher, mixed, DataConfig(max_new_tokens=9), 100, tmp_path, responder)
    assert account["failed"] == 0 and len(again.input_ids) == 7


def test_vllm_survives_little_memory_and_a_killed_process(
    script: Script, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = script(room=3, die=96)
    monkeypatch.setattr(vllm_process, "AT_ONCE", 8)
    prompts = [[token % 96 for token in prompt] for prompt in random_prompts(5, seed=4)]
    responder = responder_of(teacher, tmp_path)
    mixed = corpus_of([*prompts, [96]])
    answered, account = respond(teacher, mixed, DataConfig(max_new_tokens=9), 100, tmp_path, responder)
    assert [ids.tolist() for ids in answered.input_ids] == expected(prompts, 9)
    assert account["failed"] == 1 and "its process ended (code -9)" in account["failure"]
    assert not any(alive(line["pid"]) for line in asked(notes) if "pid" in line)


def test_vllm_reports_that_it_does_not_start(script: Script, teacher: Teacher, tmp_path: Path) -> None:
    prompts = corpus_of([[5]])
    for faults, options, words in (
        ({}, {"tensor_paralel_size": 2}, "unexpected keyword argument 'tensor_paralel_size'"),
        ({"no_start": True}, {}, r"its process ended \(code 3\): the driver is too old"),
    ):
        script(**faults)
        with pytest.raises(TeacherError, match=f"vLLM does not start with .*{words}\n.*collect.vllm"):
            respond(teacher, prompts, DataConfig(), 100, tmp_path, responder_of(teacher, tmp_path, **options))


def test_vllm_refuses_unsupported_options_and_teachers(script: Script, teacher: Teacher, tmp_path: Path) -> None:
    looped = TeacherConfig(looped=LoopedSection(block=2, loops=2))
    for given, options, words in (
        (TeacherConfig(), {"model": "x"}, "cannot be set"),
        (looped, {}, "does not run the loops"),
    ):
        with pytest.raises(UsageError, match=words):
            check_vllm(given, options)
    with pytest.raises(UsageError, match="whose layers loop"):
        VllmResponder(TeacherConfig(), looped_teacher(2, 2), {}, 100)


def test_missing_vllm_is_refused_before_the_teacher_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if vllm_process.importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    monkeypatch.chdir(tmp_path)
    error = invoke("collect", "--regenerate", "collect.responder=vllm", "teacher.model=nowhere").exception
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert "pip install 'firp[vllm]'" in str(error) and len(str(error).splitlines()) == 1


def test_vllm_ranks_share_the_devices(
    script: Script, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six ranks on a machine, vLLM over two devices each: every second rank answers, with its own and the next."""
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    found = []
    for rank in range(6):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        responder = responder_of(teacher, tmp_path, tensor_parallel_size=2)
        found.append((responder.active, responder._visible))
    assert [active for active, _ in found] == [True, False] * 3
    assert [devices for active, devices in found if active] == [["0", "1"], ["2", "3"], ["4", "5"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert responder_of(teacher, tmp_path, tensor_parallel_size=4)._visible == ["7", "6", "5", "4"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert not responder_of(teacher, tmp_path, tensor_parallel_size=4).active  # two devices are too few
    with pytest.raises(UsageError, match="needs 8 devices, and this machine has 6 ranks"):
        responder_of(teacher, tmp_path, tensor_parallel_size=8)


def test_vllm_process_ends_with_the_process_that_started_it(script: Script, teacher: Teacher, tmp_path: Path) -> None:
    """Killed in the middle of a batch: nothing holds the devices' memory afterwards."""
    notes = script(seconds=30)
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    code = (
        "import sys; from firp_cli.collecting.vllm import VllmResponder as R; r = R.__new__(R)\n"
        f"r.options, r.stops, r._visible, r._process = {{'model': {str(tmp_path)!r}}}, [7], None, None\n"
        "list(r._decode([[5, 6]], [4], 1))\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while time.monotonic() < until and not (Path(f"{notes}.asked").exists() and len(asked(notes)) == 2):
        time.sleep(0.05)
    pid = asked(notes)[0]["pid"]
    assert alive(pid)
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    while time.monotonic() < until and alive(pid):
        time.sleep(0.05)
    assert not alive(pid)


def test_collect_with_vllm(script: Script, teacher: Teacher, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n} + {n}?"}) for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    data = config(tmp_path / "sums.jsonl", regenerate=True, max_new_tokens=9)
    recipe = Recipe.model_validate(
        {
            "teacher": {"model": str(tmp_path)},
            "data": data.model_dump(),
            "collect": {"responder": "vllm", "vllm": {"max_num_seqs": 8}},
        }
    )
    responder = make_responder(recipe, teacher)
    assert isinstance(responder, VllmResponder)
    summary = collect_store(teacher, data, [2], tmp_path / "store", responder=responder)
    assert summary.answers["written"] == 8
    store = Store.open(tmp_path / "store", verify=True)
    assert store.manifest["settings"]["responder"] == "vllm"
    for item in store:
        start = int(item.loss_mask.int().argmax())
        prompt = item.input_ids[:start].tolist()
        assert item.input_ids[start:].tolist() == vllm_stand_in.answer(prompt)[:9]
