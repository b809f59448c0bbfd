"""Answering every user turn of a conversation: token sequences, templates that rewrite, limits, kills and ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import firp_cli
from firp_cli.api.train_run import TrainRun, _online_states
from firp_cli.collecting.answer import account_line, respond
from firp_cli.collecting.answer_log import read_answers
from firp_cli.collecting.collect_store import collect_store, silent
from firp_cli.collecting.corpus import Corpus, build_corpus, load_messages
from firp_cli.collecting.engine_responder import EngineResponder
from firp_cli.collecting.estimate import estimate
from firp_cli.collecting.responders import Answer
from firp_cli.config import FirpConfig, Recipe
from firp_cli.data.chat import encode, encode_prompt, text_tokens
from firp_cli.data.formats import Conversation
from firp_cli.data.turns import Questions
from firp_cli.errors import StoreError
from firp_cli.store.reader import Store
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML, with_template
from helpers.collecting import config, contents, make_teacher
from helpers.faults import shard_bytes
from helpers.rank_pool import RankPool

REWRITING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
SPACED = (  # like Llama 2's: spaces around an answer, which is trimmed
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content']|trim + ' <|im_end|>' }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONE_ANSWER = CHATML + "{% if messages|length > 3 %}{{ raise_exception('too many turns') }}{% endif %}"
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Sum."},
            {"role": "user", "content": "2 + 3?"},
            {"role": "assistant", "content": "given"},
            {"role": "user", "content": "and 4?"},
        ]
    },
    {"turns": ["one", "two", "three"], "category": "c"},
    {"question": "alone?", "answer": "given"},
]


class Replies:
    """A responder that answers the prompts by their user turns; `rule(texts)` gives a text, or None for a failure."""

    name = "replies"
    devices = 1
    active = True

    def __init__(self, teacher: Teacher, rule: Any) -> None:
        self.teacher, self.rule, self.asked = teacher, rule, []  # type: ignore[var-annotated]

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        tokenizer = self.teacher.tokenizer
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            text = tokenizer.decode(list(prompt))
            self.asked.append(text)
            answer = self.rule(text)
            ids = [] if answer is None else text_tokens(answer, tokenizer)[:limit]
            yield Answer(number, ids, "it broke" if answer is None else "")

    def close(self) -> None: ...


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answered(teacher: Teacher, dataset: Path, folder: Path, rule: Any, **changes: Any) -> tuple[Corpus, dict[str, Any]]:
    data = config(dataset, regenerate=True, **changes)
    prompts = build_corpus(load_messages(data), teacher, data)
    folder.mkdir(exist_ok=True)
    return respond(teacher, prompts, data, data.max_length, folder, Replies(teacher, rule))


def shown(teacher: Teacher, corpus: Corpus) -> list[tuple[str, str]]:
    """Return each sequence's text, and the text under its mask."""
    decode = teacher.tokenizer.decode
    return [
        (decode(ids.tolist()), decode(ids[mask].tolist()))
        for ids, mask in zip(corpus.input_ids, corpus.loss_mask, strict=True)
    ]


def with_chat_template(template: str) -> Teacher:
    teacher = make_teacher()
    teacher.tokenizer = with_template(template)
    return teacher


def test_results_of_tools_are_kept_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that a question follows are its history; those of a given call go with it, and a line says so."""
    teacher, path = make_teacher(), tmp_path / "rows.jsonl"
    asked, result = {"role": "user", "content": "w?"}, {"role": "tool", "content": "9"}
    answer = {"role": "assistant", "content": "It is 9"}
    for messages, named in (([asked, result, asked, answer], False), ([asked, answer, result, answer], True)):
        path.write_text(json.dumps({"messages": messages}) + "\n")
        caplog.clear()
        with caplog.at_level("WARNING", "firp"):
            data = config(path, regenerate=True)
            (ids,) = build_corpus(load_messages(data), teacher, data).input_ids
        assert teacher.tokenizer.decode(ids).count("9<|im_end|>") == 1 - named
        assert ("columns left out: tool messages (" in caplog.text) == named


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_answers_of_weight_0_are_no_part_of_the_mask(template: str, tmp_path: Path) -> None:
    teacher, path = with_chat_template(template), tmp_path / "rows.jsonl"
    asked, answer = {"role": "user", "content": "w?"}, {"role": "assistant", "content": "No", "weight": 0}
    rows = [[asked, answer, asked, {**answer, "content": "Yes", "weight": 1}], [asked, answer]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    data = config(path)
    corpus = build_corpus(load_messages(data), teacher, data)
    ((text, told),) = shown(teacher, corpus)
    assert "No<|im_end|>" in text and told == "Yes<|im_end|>"
    assert corpus.skipped == {"answers of weight 0 only": 1}


def test_respond_answers_every_turn_with_its_own_history(dataset: Path, tmp_path: Path) -> None:
    """One sequence for a conversation, with the mask of the same conversation of given answers."""
    teacher = make_teacher()
    corpus, account = answered(teacher, dataset, tmp_path / "a", lambda text: f"It is {len(text)}.<|im_end|>")
    assert account["written"] == 3 and (account["turns"], account["cut"]) == (6, 0)
    assert account["turns_too_long"] == account["turns_unanswered"] == 0
    assert "3 written, 6 user turns answered in them" in account_line(account)
    asked = (["2 + 3?", "and 4?"], ["one", "two", "three"], ["alone?"])
    for number, ((text, told), questions) in enumerate(zip(shown(teacher, corpus), asked, strict=True)):
        answers = [part + "<|im_end|>" for part in told.split("<|im_end|>")[:-1]]
        assert len(answers) == len(questions) and "given" not in text
        messages = [{"role": "system", "content": "Sum."}] if number == 0 else []
        for question, answer in zip(questions, answers, strict=True):
            messages.append({"role": "user", "content": question})
            prompt = teacher.tokenizer.decode(encode_prompt(messages, teacher.tokenizer))
            assert answer == f"It is {len(prompt)}.<|im_end|>"
            messages.append({"role": "assistant", "content": answer.removesuffix("<|im_end|>")})
        whole = encode(messages, teacher.tokenizer)
        count = len(corpus.input_ids[number])
        assert corpus.input_ids[number].tolist() == whole.input_ids[:count]
        assert corpus.loss_mask[number].tolist() == whole.loss_mask[:count]


def test_cut_answers_are_closed_by_the_template_and_not_trained_further(dataset: Path, tmp_path: Path) -> None:
    teacher = make_teacher()
    corpus, account = answered(teacher, dataset, tmp_path / "a", lambda _: "word " * 9, max_new_tokens=4)
    assert account["cut"] == account["turns"] == 6
    text, told = shown(teacher, corpus)[1]
    assert "<|im_end|>" not in told and text.count("<|im_end|>\n<|im_start|>user\n") == 2


def test_template_that_rewrites_turns_gives_each_its_own_sequence(dataset: Path, tmp_path: Path) -> None:
    """The teacher's second prompt has no thinking in it, so that neither has the second sequence."""
    teacher = with_chat_template(REWRITING)
    corpus, account = answered(teacher, dataset, tmp_path / "a", lambda _: "hm</think>Yes.<|im_end|>")
    assert account["written"] == 3 and account["turns"] == len(corpus.input_ids) == 6
    texts = shown(teacher, corpus)
    assert [told for _, told in texts] == ["hm</think>Yes.<|im_end|>"] * 6
    second = teacher.tokenizer.decode(
        encode_prompt(
            [*ROWS[0]["messages"][:2], {"role": "assistant", "content": "Yes."}, ROWS[0]["messages"][3]],
            teacher.tokenizer,
        )
    )
    assert texts[1][0] == second + "hm</think>Yes.<|im_end|>" and "</think>" not in second


def test_turns_that_fail_or_do_not_fit_are_counted(dataset: Path, tmp_path: Path) -> None:
    """What was answered before stays."""
    teacher = make_teacher()

    def rule(text: str) -> str | None:
        return None if "and 4?" in text else "<|im_end|>" if "two" in text else "Yes.<|im_end|>"

    corpus, account = answered(teacher, dataset, tmp_path / "a", rule)
    assert len(corpus.input_ids) == account["written"] == account["turns"] == 3
    assert (account["turns_unanswered"], account["failed"], account["failure"]) == (1 + 2, 0, "it broke")
    assert "3 later turns without an answer" in account_line(account)
    assert "first failure: it broke; --resume" in account_line(account)
    limit = len(corpus.input_ids[1]) + 12
    corpus, account = answered(teacher, dataset, tmp_path / "b", lambda _: "Yes.<|im_end|>", max_length=limit)
    assert account["turns_too_long"] > 0 and max(corpus.lengths) <= limit
    assert account["turns"] + account["turns_too_long"] == 6 and "do not fit data.max_length" in account_line(account)
    teacher = with_chat_template(ONE_ANSWER)
    corpus, account = answered(teacher, dataset, tmp_path / "c", lambda _: "Yes.<|im_end|>")
    assert (account["turns"], account["turns_unanswered"]) == (3 + 1, 1 + 1)


@pytest.mark.parametrize("answer", ["Yes.<|im_end|>", " Yes. \n", "Yes, <|im_start|> no", "\n\n<|im_end|>"])
@pytest.mark.parametrize("template", [CHATML, SPACED])
def test_following_prompt_continues_the_tokens(template: str, answer: str) -> None:
    """The prompt holds the tokens as they were; apart from spaces around the answer its text is the template's."""
    tokenizer = with_template(template)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    conversation = Conversation([{"role": "user", "content": text} for text in ("one?", "two?")], None, True)
    questions = Questions.of(conversation, tokenizer, {stop})
    assert questions is not None and Questions.of(Conversation(conversation.messages[:1]), tokenizer, {stop}) is None
    prompt, ids = encode_prompt(conversation.messages[:1], tokenizer), text_tokens(answer, tokenizer)
    following, continued = questions.following(prompt, [ids])
    assert continued and following[: len(prompt) + len(ids)] == prompt + ids
    history = [conversation.messages[0], {"role": "assistant", "content": answer.removesuffix("<|im_end|>")}]
    rendered = tokenizer.decode(encode_prompt([*history, conversation.messages[1]], tokenizer))
    assert "".join(tokenizer.decode(following).split()) == "".join(rendered.split())
    assert following.count(stop) == (1 if template == SPACED else 3)


def test_following_prompt_is_rendered_anew_after_another_stop_token() -> None:
    """The template ends turns with <|im_end|>; a teacher that ended one with </s> reads what the template writes."""
    tokenizer = with_template(CHATML)
    stops = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    messages = [{"role": "user", "content": text} for text in ("one?", "two?")]
    questions = Questions.of(Conversation(messages, None, True), tokenizer, stops)
    assert questions is not None
    prompt = encode_prompt(messages[:1], tokenizer)
    following, continued = questions.following(prompt, [text_tokens("Yes.</s>", tokenizer)])
    history = [messages[0], {"role": "assistant", "content": "Yes."}, messages[1]]
    assert not continued and following == encode_prompt(history, tokenizer)


def test_stored_turns_are_what_generate_answers(tmp_path: Path) -> None:
    """The embedded teacher: prompt 1, answer 1, what stands between, answer 2, each from `load().generate`."""
    path, questions = tmp_path / "two.jsonl", ["Nia has 12 pens. How many?", "She buys 7 more. How many now?"]
    messages = [{"role": "user", "content": text} for text in questions]
    path.write_text(json.dumps({"messages": [messages[0], {"role": "assistant", "content": "12"}, messages[1]]}) + "\n")
    settings = [f"data.dataset={path}", "data.regenerate=true", "data.max_new_tokens=80"]
    summary = firp_cli.collect(None, settings, output=tmp_path / "store", layers=[2])
    assert summary.answers is not None and summary.answers["turns"] == 2
    decoder = firp_cli.load("arithmetic", device="cpu")
    tokenizer = decoder.teacher.tokenizer
    one = decoder.generate([messages[0]], 80)
    history = [messages[0], {"role": "assistant", "content": one.text}, messages[1]]
    two = decoder.generate(history, 80)
    first, second = (encode_prompt(part, tokenizer) for part in (history[:1], history))
    stored = Store.open(tmp_path / "store")[0]
    assert second[: len(first) + len(one.token_ids)] == first + one.token_ids
    assert stored.input_ids.tolist() == second + two.token_ids
    between = len(second) - len(first) - len(one.token_ids)
    mask = [False] * len(first) + [True] * len(one.token_ids) + [False] * between + [True] * len(two.token_ids)
    assert stored.loss_mask.tolist() == mask and one.finish_reason == "eos"


def test_first_turns_alone_give_the_store_of_single_turns(dataset: Path, tmp_path: Path) -> None:
    """And a data set of single turns has the settings that it had before there were later turns."""
    teacher = make_teacher()
    single = tmp_path / "single.jsonl"
    rows = [{"messages": ROWS[0]["messages"][:2]}, {"turns": ["one"]}, {"question": "alone?"}]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def collect(path: Path, name: str, **changes: Any) -> dict[str, Any]:
        data = config(path, regenerate=True, max_new_tokens=6, **changes)
        collect_store(teacher, data, [2], tmp_path / name, responder=EngineResponder(teacher, 2))
        return dict(json.loads((tmp_path / name / "manifest.json").read_text()))

    manifests = [collect(single, "single"), collect(dataset, "first", turns="first"), collect(dataset, "all")]
    assert shard_bytes(tmp_path / "single") == shard_bytes(tmp_path / "first") != shard_bytes(tmp_path / "all")
    one, first, every = (manifest["settings"] for manifest in manifests)
    assert one | {"dataset": ""} == first | {"dataset": ""} and "turns" not in one
    assert every["turns"] == "all" and every["data_fingerprint"] != one["data_fingerprint"]
    assert manifests[0]["counts"] == manifests[1]["counts"] and "turns" not in one
    assert manifests[2]["counts"]["answers"]["turns"] == 6
    with pytest.raises(StoreError, match=r"turns \(store: all, now: not set\)"):
        data = config(dataset, regenerate=True, max_new_tokens=6, turns="first")
        collect_store(teacher, data, [2], tmp_path / "all", responder=EngineResponder(teacher, 2), resume=True)


def test_killed_run_resumes_between_turns(dataset: Path, tmp_path: Path) -> None:
    """An interruption after n answers, for every n; the answers kept are not asked again."""
    teacher, data = make_teacher(), config(dataset, regenerate=True, max_new_tokens=6)
    collect_store(teacher, data, [2], tmp_path / "whole", responder=EngineResponder(teacher, 2))

    class Dying(EngineResponder):
        def __init__(self, most: int) -> None:
            super().__init__(teacher, 2)
            self.most, self.made = most, 0

        def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
            for answer in super().reply(prompts, limits):
                if self.made == self.most:
                    raise KeyboardInterrupt
                self.made += 1
                yield answer

    for most in range(6):
        folder, dying = tmp_path / f"store-{most}", Dying(most)
        with pytest.raises(KeyboardInterrupt):
            collect_store(teacher, data, [2], folder, responder=dying)
        assert len(read_answers(folder)) == most
        rest = Dying(6 - most)
        collect_store(teacher, data, [2], folder, responder=rest, resume=True)
        assert rest.made == 6 - most and shard_bytes(folder) == shard_bytes(tmp_path / "whole")
        assert contents(folder)["manifest.json"] == contents(tmp_path / "whole")["manifest.json"]


@pytest.mark.parametrize("mode", ["online", "hybrid"])
def test_states_without_a_store_have_the_same_turns(dataset: Path, tmp_path: Path, mode: str) -> None:
    teacher, data = make_teacher(), config(dataset, regenerate=True, max_new_tokens=6, mode=mode)
    collect_store(teacher, data, [2], tmp_path / "store", responder=EngineResponder(teacher, 2))
    predictor = FirpConfig(kind="firp", layer=2, steps=2)
    run = TrainRun(Recipe(data=data, predictor=predictor), predictor, tmp_path / "cache", tmp_path / "run")
    made, stored = _online_states(run, teacher, silent), Store.open(tmp_path / "store")
    assert made.lengths == stored.lengths
    for one, two in zip(made[:], stored[:], strict=True):
        assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.loss_mask, two.loss_mask)


def test_estimate_counts_later_turns(dataset: Path, tmp_path: Path) -> None:
    teacher, found = make_teacher(), {}
    for turns in ("all", "first"):
        data = config(dataset, regenerate=True, max_new_tokens=6, turns=turns)
        found[turns] = estimate(teacher, data, [2], "float32", tmp_path / "store", [EngineResponder(teacher, 2)])
        collect_store(teacher, data, [2], tmp_path / turns, responder=EngineResponder(teacher, 2))
        tokens = Store.open(tmp_path / turns).manifest["counts"]["tokens"]
        assert tokens <= found[turns].tokens + 3 <= tokens + 9  # placeholders have a token each
    assert found["all"].tokens > found["first"].tokens + 30


def test_ranks_share_the_turns(ranks: RankPool, dataset: Path, tmp_path: Path) -> None:
    """Two ranks write the bytes of one; so do three that continue after one was stopped among the later turns."""
    make_teacher().model.save_pretrained(tmp_path / "teacher")
    with_template(CHATML).save_pretrained(tmp_path / "teacher")
    rows = [{"turns": [f"what is {n}?", "and then?", "so?"][: 1 + n % 3]} for n in range(14)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data.shard_tokens=300", "data.max_new_tokens=8", f"teacher.model={tmp_path / 'teacher'}"]

    def run(name: str, count: int) -> Path:
        folder = tmp_path / name
        command = ["collect", *settings, "--regenerate", "--resume", "--dataset", str(dataset), "--layers", "2"]
        log = tmp_path / "log"
        assert ranks.run([*command, "--output", str(folder)], count, log) == [0] * count, log.read_text()[-2000:]
        assert "14 written, 27 user turns answered in them" in log.read_text()
        return folder

    one, two = run("one", 1), run("two", 2)
    assert shard_bytes(one) == shard_bytes(two) and len(shard_bytes(one)) > 2
    logs = sorted(two.glob("answers-*.jsonl"))
    assert len(logs) == 2 and len(read_answers(two)) == 27
    lines = [line for path in logs for line in path.read_text().splitlines(keepends=True)]
    three = Path(shutil.copytree(two, tmp_path / "three"))
    for path in [*three.glob("shard-*"), *three.glob("answers-*")]:
        path.unlink()
    (three / "answers-00000.jsonl").write_text("".join(lines[5:20]))
    assert shard_bytes(run("three", 3)) == shard_bytes(one)
