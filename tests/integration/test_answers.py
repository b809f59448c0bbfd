"""Answering: accounts of prompts, failures that lose only one prompt, kills that lose no logged answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from firp_cli.collecting import answer_log as answers_module
from firp_cli.collecting.answer import MAX_CONSECUTIVE_FAILURES, account_line, respond
from firp_cli.collecting.answer_log import AnswerLog, prompt_keys, read_answers
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.engine_responder import EngineResponder, make_responder
from firp_cli.collecting.responders import Answer, RetryingResponder
from firp_cli.config import DataConfig, Recipe
from firp_cli.data.chat import encode_prompt
from firp_cli.errors import CapacityError, DatasetError, StoreError, TeacherError, UsageError
from firp_cli.store.reader import Store
from firp_cli.store.tools import merge_stores
from helpers.chat import byte_tokenizer
from helpers.collecting import config, contents, corpus_of, make_teacher
from helpers.faults import KILLED, shard_bytes
from helpers.models import generate_reference, random_prompts, tiny_model, tiny_teacher
from helpers.rank_pool import RankPool

PROMPTS = 160
STOP = 1  # the tiny teacher's EOS
Rule = Callable[[Sequence[int]], list[int] | str]  # tokens, or why not


class Scripted:
    """A responder that answers by rule."""

    name = "scripted"
    devices = 1
    active = True

    def __init__(self, rule: Rule) -> None:
        self.rule, self.asked, self.closed = rule, [], 0  # type: ignore[var-annotated]

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            self.asked.append(list(prompt))
            found = self.rule(prompt)
            yield Answer(number, [], found) if isinstance(found, str) else Answer(number, found[:limit])

    def close(self) -> None:
        self.closed += 1


def test_respond_counts_every_prompt_and_keeps_the_order(tmp_path: Path) -> None:
    """Prompts as they are, answers as written, EOS kept; empty and failed ones left out, cut ones counted."""
    replies: dict[int, list[int] | str] = {
        5: [20, 21, STOP],
        8: [STOP],
        9: [22, 23, 24, 25],
        11: [23, STOP],
        12: "it broke",
        13: [],
    }
    prompts = corpus_of([[5, 6, 7], [8], [9, 10], [11, 12], [12, 13], [13]])
    prompts.skipped.update({"prompt longer than max_length": 2, "refused by the chat template": 1})
    responder = Scripted(lambda prompt: replies[prompt[0]])
    data = DataConfig(max_new_tokens=3)
    answered, account = respond(tiny_teacher(), prompts, data, 100, tmp_path, responder)
    assert [ids.tolist() for ids in answered.input_ids] == [
        [5, 6, 7, 20, 21, STOP],
        [9, 10, 22, 23, 24],
        [11, 12, 23, STOP],
    ]
    assert answered.loss_mask[0].tolist() == [False] * 3 + [True] * 3
    assert account == {
        "written": 3,
        "cut": 1,
        "empty": 2,
        "failed": 1,
        "failure": "it broke",
        "too_long": 2,
        "skipped": 1,
    }
    assert answered.cut == 1 and answered.skipped["empty answer"] == 2 and answered.skipped["answer failed"] == 1
    assert responder.closed == 1
    line = account_line(account)
    assert line.startswith("answers: 3 written, 1 of them cut at a length limit")
    assert "2 empty, 1 failed" in line and "first failure: it broke; --resume tries failed prompts again" in line


def test_respond_limits_answers_to_the_longest_sequence(tmp_path: Path) -> None:
    prompts = corpus_of([[4] * 7, [5] * 2])
    answered, account = respond(
        tiny_teacher(), prompts, DataConfig(max_new_tokens=6), 10, tmp_path, Scripted(lambda _: [9] * 50)
    )
    assert [len(ids) for ids in answered.input_ids] == [10, 8] and account["cut"] == 2


def test_respond_answers_equal_prompts_once(tmp_path: Path) -> None:
    responder = Scripted(lambda prompt: [prompt[0] + 1, STOP])
    answered, account = respond(tiny_teacher(), corpus_of([[5], [6], [5]]), DataConfig(), 100, tmp_path, responder)
    assert sorted(responder.asked) == [[5], [6]] and account["written"] == 3
    assert answered.input_ids[0].tolist() == answered.input_ids[2].tolist() == [5, 6, STOP]


def test_respond_reuses_logged_answers(tmp_path: Path) -> None:
    """Not by another run, not with other prompts around; but under another limit or by somebody else it is."""
    teacher, data = tiny_teacher(), DataConfig(max_new_tokens=4)
    first = Scripted(lambda prompt: "no" if prompt[0] == 6 else [prompt[0] + 1, STOP])
    respond(teacher, corpus_of([[5], [6], [7]]), data, 100, tmp_path, first)
    again = Scripted(lambda prompt: [prompt[0] + 1, STOP])
    answered, account = respond(teacher, corpus_of([[7], [8], [6], [5]]), data, 100, tmp_path, again)
    assert sorted(again.asked) == [[6], [8]]  # the one that failed, and the new one
    assert account["failed"] == 0 and [ids[0].item() for ids in answered.input_ids] == [7, 8, 6, 5]
    other = Scripted(lambda _: [3, STOP])
    respond(teacher, corpus_of([[5]]), data.model_copy(update={"max_new_tokens": 5}), 100, tmp_path, other)
    other.name = "another"
    respond(teacher, corpus_of([[5]]), data, 100, tmp_path, other)
    assert other.asked == [[5], [5]]


def test_respond_names_the_reason_when_no_prompt_is_answered(tmp_path: Path) -> None:
    prompts = corpus_of([[5], [6]])
    with pytest.raises(DatasetError, match="ended every answer at once"):
        respond(tiny_teacher(), prompts, DataConfig(), 100, tmp_path / "a", _made(tmp_path / "a", lambda _: [STOP]))
    with pytest.raises(TeacherError, match="no prompt was answered: bad weather"):
        respond(
            tiny_teacher(), prompts, DataConfig(), 100, tmp_path / "b", _made(tmp_path / "b", lambda _: "bad weather")
        )
    many = corpus_of([[token, token] for token in range(3, 97)] + [[5]])
    responder = _made(tmp_path / "c", lambda prompt: "bad weather" if len(prompt) == 2 else [4])
    with pytest.raises(
        TeacherError, match=f"{MAX_CONSECUTIVE_FAILURES} prompts in a row could not be answered: bad weather"
    ):
        respond(tiny_teacher(), many, DataConfig(), 100, tmp_path / "c", responder)
    assert len(responder.asked) == MAX_CONSECUTIVE_FAILURES and responder.closed == 1


def _made(folder: Path, rule: Rule) -> Scripted:
    folder.mkdir()
    return Scripted(rule)


def test_read_answers_cuts_off_incomplete_lines(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0) as log:
        log.add("aa", [1, 2])
        log.add("bb", [])
    with AnswerLog(tmp_path, 3) as log:
        log.add("cc", [3])
    for torn in (b'{"prompt":"dd","token_i', b'{"prompt":"dd"}\n{"prompt":"ee","token_ids":[4]}\n'):
        whole = (tmp_path / "answers-00000.jsonl").read_bytes()
        (tmp_path / "answers-00000.jsonl").write_bytes(whole + torn)
        assert read_answers(tmp_path) == {"aa": [1, 2], "bb": [], "cc": [3]}
        assert (tmp_path / "answers-00000.jsonl").read_bytes() == whole
    with AnswerLog(tmp_path, 0) as log:
        log.add("dd", [5])
    assert read_answers(tmp_path) == {"aa": [1, 2], "bb": [], "cc": [3], "dd": [5]}


def test_answer_log_syncs_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(answers_module.os, "fsync", lambda _: synced.append(1))
    with AnswerLog(tmp_path, 0) as log:
        for number in range(answers_module.SYNC_ANSWERS - 1):
            log.add(f"{number}", [number])
        assert not log.path.exists()
        log.add("last", [1])
        assert len(log.path.read_text().splitlines()) == answers_module.SYNC_ANSWERS and synced == [1]
        log.add("one more", [2])
    assert len(read_answers(tmp_path)) == answers_module.SYNC_ANSWERS + 1 and synced == [1, 1]


def test_respond_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers_module.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device\n.*--resume"):
        respond(tiny_teacher(), corpus_of([[5]]), DataConfig(), 100, tmp_path, Scripted(lambda _: [4, STOP]))


def test_prompt_keys_depend_on_prompt_limit_and_maker() -> None:
    prompts = [torch.tensor(ids, dtype=torch.int32) for ids in ([5, 6], [6, 5], [5, 6, 0])]
    keys = [key for maker in "ab" for limit in (3, 4) for key in prompt_keys(maker, prompts, [limit] * 3)]
    assert len(set(keys)) == 12


def run_retrying(decode: Any, count: int, width: int) -> tuple[dict[int, Answer], RetryingResponder]:
    retrying = RetryingResponder(decode, width)
    replies = list(retrying.reply([[number] for number in range(count)], [1] * count))
    assert sorted(reply.number for reply in replies) == list(range(count))
    return {reply.number: reply for reply in replies}, retrying


def in_batches(fault: Callable[[list[int]], None]) -> Any:
    """A decode that answers `width` prompts at a time with their own number."""

    def decode(prompts: list[list[int]], limits: list[int], width: int) -> Iterator[Answer]:
        for start in range(0, len(prompts), width):
            batch = [prompt[0] for prompt in prompts[start : start + width]]
            fault(batch)
            for place, number in enumerate(batch, start):
                yield Answer(place, [number])

    return decode


def test_retrying_responder_isolates_failing_prompts() -> None:
    calls: list[int] = []

    def fault(batch: list[int]) -> None:
        calls.append(len(batch))
        if {13, 14, 40} & set(batch):
            raise RuntimeError(f"cannot stand {min({13, 14, 40} & set(batch))}\nmore")

    replies, retrying = run_retrying(in_batches(fault), 50, 8)
    assert {number for number, reply in replies.items() if reply.failure} == {13, 14, 40}
    assert replies[13].failure == "cannot stand 13"
    assert all(reply.token_ids == [number] for number, reply in replies.items() if not reply.failure)
    assert retrying.width == 8 and len(calls) < 30  # found by halving, not one by one


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        CapacityError("no room"),
        RuntimeError("not enough memory: you tried"),
    ],
)
def test_retrying_responder_halves_the_batch_when_memory_runs_out(error: Exception) -> None:
    sizes: list[int] = []

    def fault(batch: list[int]) -> None:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise error

    replies, retrying = run_retrying(in_batches(fault), 20, 16)
    assert not any(reply.failure for reply in replies.values())
    assert retrying.width == 2 and sizes[:3] == [16, 8, 4] and set(sizes[3:]) == {2}


def test_retrying_responder_skips_a_prompt_that_never_fits() -> None:
    def fault(batch: list[int]) -> None:
        if 2 in batch:
            raise MemoryError("too large")

    replies, _ = run_retrying(in_batches(fault), 5, 4)
    assert [number for number, reply in replies.items() if reply.failure] == [2]


def test_retrying_responder_raises_when_decoding_cannot_start() -> None:
    def fault(_: list[int]) -> None:
        raise TeacherError("vLLM does not start")

    with pytest.raises(TeacherError, match="does not start"):
        run_retrying(in_batches(fault), 5, 4)


def test_engine_responder_answers_as_generate(tmp_path: Path) -> None:
    teacher, rows = tiny_teacher("llama", True), random_prompts(9, seed=12)
    prompts = corpus_of([*rows[:4], [3, 97], *rows[4:]])  # the teacher has no token 97
    answered, account = respond(
        teacher, prompts, DataConfig(max_new_tokens=10), 100, tmp_path, EngineResponder(teacher, 4)
    )
    expected = [row + generate_reference(tiny_model("llama"), row, 10) for row in rows]
    assert [ids.tolist() for ids in answered.input_ids] == expected
    assert account["failed"] == 1 and "token id outside of 0 to 96" in account["failure"]


def test_engine_responder_halves_its_batch_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = tiny_teacher("llama", True), random_prompts(9, seed=13)
    responder = EngineResponder(teacher, 8)
    whole = {reply.number: reply.token_ids for reply in responder.reply(prompts, [6] * 9)}
    from firp_cli.decoding.step_shape import StepShape
    from firp_cli.teacher.kv_cache import KVCache

    room = KVCache.bytes_needed(**StepShape().cache(teacher, 3, 40))
    monkeypatch.setattr("firp_cli.decoding.sequences.free_bytes", lambda _: room)
    found = {reply.number: reply.token_ids for reply in responder.reply(prompts, [6] * 9)}
    assert found == whole and responder._retrying.width == 2


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n} + {n * 7}?"}) + "\n" for n in range(24)))
    return path


def test_collect_retries_failed_prompts_on_resume(dataset: Path, tmp_path: Path) -> None:
    teacher, data = make_teacher(), config(dataset, regenerate=True, max_new_tokens=9)
    bad = encode_prompt([{"role": "user", "content": "What is 11 + 77?"}], teacher.tokenizer)
    engine = EngineResponder(teacher, 6)

    class Moody(EngineResponder):
        def _decode(self, prompts: list[Sequence[int]], limits: list[int], width: int) -> Iterator[Answer]:
            rows = [list(prompt) for prompt in prompts]
            place = rows.index(bad) if bad in rows else len(rows)
            yield from super()._decode(prompts[:place], limits[:place], width)
            if bad in rows:
                raise RuntimeError("a bad day")

    first = collect_store(teacher, data, [2], tmp_path / "store", responder=Moody(teacher, 6))
    assert first.answers["failed"] == 1 and first.answers["failure"] == "a bad day"
    assert first.conversations == 23 and first.skipped == {"answer failed": 1}
    assert Store.open(tmp_path / "store").manifest["counts"]["answers"]["failed"] == 1
    second = collect_store(teacher, data, [2], tmp_path / "store", responder=engine, resume=True)
    assert second.answers["failed"] == 0 and second.conversations == 24
    collect_store(teacher, data, [2], tmp_path / "reference", responder=engine)
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "reference")
    assert contents(tmp_path / "store")["manifest.json"] == contents(tmp_path / "reference")["manifest.json"]
    made = collect_store(teacher, data, [2], tmp_path / "other", responder=Moody(teacher, 6))
    assert made.answers["failed"] == 1
    merge_stores(tmp_path / "both", [tmp_path / "store", tmp_path / "other"])
    both = Store.open(tmp_path / "both").manifest["counts"]["answers"]
    assert (both["written"], both["failed"], both["failure"]) == (47, 1, "a bad day")
    stranger = Scripted(lambda _: [3])
    with pytest.raises(StoreError, match=r"responder \(store: engine, now: scripted\)"):
        collect_store(teacher, data, [2], tmp_path / "store", responder=stranger, resume=True)


def test_make_responder_follows_the_recipe() -> None:
    teacher = tiny_teacher("llama", True)
    assert make_responder(Recipe(), teacher) is None
    found = make_responder(Recipe(data=DataConfig(regenerate=True)), teacher)
    assert isinstance(found, EngineResponder) and found.name == "engine"


def test_make_responder_refuses_the_engine_for_a_sharded_teacher() -> None:
    teacher, recipe = make_teacher(), Recipe(data=DataConfig(regenerate=True))
    teacher.loaded_weights = replace(teacher.loaded_weights, kind="zero3")
    with pytest.raises(UsageError, match=r"sharded over ranks: set collect\.responder=vllm"):
        make_responder(recipe, teacher)
    teacher = make_teacher()
    teacher.model.lm_head.to("meta")
    with pytest.raises(UsageError, match="spread over devices"):
        make_responder(recipe, teacher)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("respond")
    make_teacher().model.save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    lines = [json.dumps({"question": f"What is {n} + {n * 7}?"}) for n in range(PROMPTS)]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def answering(place: Path, output: Path) -> list[str]:
    settings = ["data.shard_tokens=2000", "data.max_new_tokens=20", "data.batch_size=4"]
    settings += [f"teacher.model={place / 'teacher'}", "--regenerate", "--resume"]
    return ["collect", *settings, "--dataset", str(place / "sums.jsonl"), "--layers", "2", "--output", str(output)]


def kept_lines(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("answers-*.jsonl")) for line in path.read_text().splitlines()]


def test_killed_ranks_keep_their_answers(ranks: RankPool, place: Path, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "store"
    assert ranks.run(answering(place, tmp_path / "one"), 1, log) == [0], log.read_text()
    reference = shard_bytes(tmp_path / "one")
    group = ranks.start(answering(place, folder), 2, log)
    hunter = threading.Thread(target=_kill_once_some_is_kept, args=(folder, group.pids[1]))
    hunter.start()
    codes = group.wait()
    hunter.join()
    assert codes[1] == KILLED, log.read_text()[-2000:]
    before = kept_lines(folder)
    assert 0 < len(before) < PROMPTS and not shard_bytes(folder)
    assert ranks.run(answering(place, folder), 3, log) == [0, 0, 0], log.read_text()[-2000:]
    assert shard_bytes(folder) == reference and len(reference) >= 3
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (folder, tmp_path / "one")]
    assert manifests[0] | {"recipe": None} == manifests[1] | {"recipe": None}
    after = kept_lines(folder)
    keys = [json.loads(line)["prompt"] for line in after]
    assert set(before) <= set(after) and len(keys) == len(set(keys)) == PROMPTS  # nothing was answered twice
    assert f"{PROMPTS} written" in log.read_text()


def _kill_once_some_is_kept(folder: Path, pid: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if kept_lines(folder):
                break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
