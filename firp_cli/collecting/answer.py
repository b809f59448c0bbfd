"""`--regenerate`: the teacher answers the prompts greedily, since a predictor must match the teacher's own text.

The user turns of a conversation are asked in order, each with the teacher's own answers before it: a round asks one
turn of every conversation (collecting/dialogues.py). The ranks share the prompts of a round. Answers are kept on disk
batch by batch (collecting/answer_log.py). A prompt that cannot be answered is left out and counted; the next `--resume`
tries it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.answer_log import AnswerLog, prompt_keys, read_answers
from firp_cli.collecting.corpus import Corpus
from firp_cli.collecting.dialogues import Dialogue, next_prompts, start_dialogues
from firp_cli.collecting.responders import Responder
from firp_cli.config import DataConfig
from firp_cli.data.odd_rows import EMPTY_ANSWER as EMPTY
from firp_cli.data.odd_rows import TOO_LONG
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import DatasetError, TeacherError
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

FAILED = "answer failed"  # reason for leaving a prompt out
MANY_CUT = 0.2  # share of answers cut at a limit from which on the summary warns
MAX_CONSECUTIVE_FAILURES = 32  # so many failures in a row are not the fault of the prompts
ACCOUNT = {  # what became of the prompts, in words
    "written": "written",
    "turns": "user turns answered in them",
    "cut": "of them cut at a length limit (data.max_new_tokens, data.max_length)",
    "empty": "empty",
    "failed": "failed",
    "too_long": "not answered because the prompt is too long",
    "skipped": "skipped before answering",
    "turns_too_long": "later turns not asked because they do not fit data.max_length",
    "turns_unanswered": "later turns without an answer (empty, failed or refused by the chat template)",
}


def respond(
    teacher: Teacher,
    prompts: Corpus,
    data: DataConfig,
    longest: int,
    folder: Path,
    responder: Responder,
    progress: Progress = no_progress,
    group: RankGroup | None = None,
) -> tuple[Corpus, dict[str, Any]]:
    """Return the prompts followed by the teacher's greedy answers, in the order of the prompts, and an account.

    The ids of prompts and answers are joined without tokenizing again. The mask selects the answers, each of which ends
    with EOS or at a limit: `max_new_tokens` tokens, or `longest` together with its prompt. Every rank of `group` calls
    this and returns the whole corpus. Equal prompts are answered once.

    The account counts prompts: `written`, `empty` (EOS at once), `failed` (with the first `failure`), `too_long` and
    `skipped` (before answering); and answers that are `cut` at a length limit. With several turns it also counts the
    user turns that were answered (`turns`), not asked since they do not fit `longest` (`turns_too_long`), or not
    answered (`turns_unanswered`: the answer before or their own failed or was empty, or the template refused them).

    Raises DatasetError when every answer is empty, TeacherError when prompt after prompt fails, StoreError when answers
    cannot be kept, LaunchError.
    """
    group = group or RankGroup()
    maker = f"{teacher.fingerprint} {responder.name}"
    logged = group.run_on_all(lambda: read_answers(folder) if group.main else {})
    dialogues = start_dialogues(prompts, teacher, data.turns == "all")
    failures: dict[int, str] = {}
    stops = set(teacher.eos_token_ids)
    known = 0  # answers of earlier rounds
    try:
        while asked := [number for number, item in enumerate(dialogues) if item.prompt is not None]:
            texts = [ids for number in asked if (ids := dialogues[number].prompt) is not None]
            keys = prompt_keys(maker, texts, limits := [min(data.max_new_tokens, longest - len(ids)) for ids in texts])
            later = sum(dialogues[number].remaining - bool(dialogues[number].answers) for number in asked)
            bar = _shifted(progress, known, later)
            answers, failed = _ask_all(texts, limits, keys, logged, folder, responder, bar, group)
            failures |= {asked[place]: reason for place, reason in failed.items() if asked[place] not in failures}
            for number, answer in zip(asked, answers, strict=True):
                dialogues[number].take(answer, stops)
            known += len(asked)
            next_prompts(dialogues, longest, group)
    finally:
        responder.close()
    return group.run_on_all(lambda: _join(teacher, prompts, dialogues, failures))


def _shifted(progress: Progress, before: int, after: int) -> Progress:
    """Return a progress of one round among others."""

    def shifted(done: int, total: int | None = None) -> None:
        progress(before + done, None if total is None else before + total + after)

    return shifted


def _ask_all(
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    keys: Sequence[str],
    logged: dict[str, list[int]],
    folder: Path,
    responder: Responder,
    progress: Progress,
    group: RankGroup,
) -> tuple[list[Tensor | None], dict[int, str]]:
    """Answer prompts (T,) int32 on all ranks; return each prompt's answer (None: it failed), and the failures.

    `logged`: answers of earlier runs by key, on rank 0.
    """
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    answers = {first[key]: tokens for key, tokens in logged.items() if key in first}  # on rank 0; empty elsewhere
    answered = set(group.gather_rows(torch.tensor(sorted(answers), dtype=torch.long)).tolist())
    missing = sorted(set(first.values()) - answered, key=lambda index: (-len(prompts[index]), index))
    workers = [rank for rank, active in enumerate(group.gather(responder.active)) if active]
    mine = missing[workers.index(group.rank) :: len(workers)] if group.rank in workers else []

    def bar(done: int) -> None:
        progress(len(answered) + min(done * len(workers), len(missing)), len(answered) + len(missing))

    def answer() -> dict[int, str]:
        with AnswerLog(folder, group.rank) as log:
            return _answer(prompts, limits, keys, mine, responder, log, answers, bar)

    failures: dict[int, str] = {}
    for part in group.gather(group.run_on_all(answer)):
        failures |= part
    shared = _exchange(answers, group)
    return [shared.get(first[key]) for key in keys], failures


def account_line(account: dict[str, Any]) -> str:
    """Return an account of `respond` in one line, and further ones where many answers are cut or prompts failed."""
    parts = [f"{account[name]:,} {words}" for name, words in ACCOUNT.items() if name == "written" or account.get(name)]
    lines = [f"answers: {', '.join(parts)}"]
    answers = max(account["written"], account.get("turns", 0))
    if account["cut"] > MANY_CUT * answers:
        lines.append(
            f"{account['cut'] / answers:.0%} of the answers are cut: raise data.max_new_tokens, or check that the "
            "token with which the chat template ends turns is an eos_token_id of the teacher"
        )
    if account["failure"]:
        lines.append(f"first failure: {account['failure']}; --resume tries failed prompts again")
    return "\n".join(lines)


def _answer(
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    keys: Sequence[str],
    mine: Sequence[int],
    responder: Responder,
    log: AnswerLog,
    answers: dict[int, list[int]],
    bar: Callable[[int], None],
) -> dict[int, str]:
    """Answer the prompts `mine`, add the answers to `log` and `answers`, and return the failures by prompt."""
    failures: dict[int, str] = {}
    in_a_row = 0
    if not mine:
        return failures
    texts = [prompts[index].tolist() for index in mine]
    for done, reply in enumerate(responder.reply(texts, [limits[index] for index in mine]), 1):
        index = mine[reply.number]
        if reply.failure:
            failures[index] = reply.failure
            in_a_row += 1
            if in_a_row >= MAX_CONSECUTIVE_FAILURES:
                raise TeacherError(
                    f"{in_a_row} prompts in a row could not be answered: {reply.failure}\n"
                    "earlier answers are kept; remove the cause and run again with --resume"
                )
        else:
            answers[index] = reply.token_ids
            log.add(keys[index], reply.token_ids)
            in_a_row = 0
        bar(done)
    return failures


def _exchange(answers: dict[int, list[int]], group: RankGroup) -> dict[int, Tensor]:
    """Return the answers (n,) int32 of all ranks, by prompt. They are sent as three tensors."""
    numbers = group.gather_rows(torch.tensor(list(answers), dtype=torch.long)).tolist()
    lengths = group.gather_rows(torch.tensor([len(tokens) for tokens in answers.values()], dtype=torch.long)).tolist()
    flat = torch.tensor([token for tokens in answers.values() for token in tokens], dtype=torch.int32)
    parts = group.gather_rows(flat).split(lengths) if lengths else ()
    return dict(zip(numbers, parts, strict=True))


def _join(
    teacher: Teacher, prompts: Corpus, dialogues: Sequence[Dialogue], failures: dict[int, str]
) -> tuple[Corpus, dict[str, Any]]:
    """Return the sequences of all conversations, and count what became of the prompts."""
    corpus = Corpus(skipped=prompts.skipped.copy())
    written = 0
    for item in dialogues:
        for ids, mask in item.sequences:
            corpus.input_ids.append(ids)
            corpus.loss_mask.append(mask)
        corpus.cut += item.cut
        written += bool(item.sequences)
        if not item.sequences:
            corpus.skipped[FAILED if item.failed else EMPTY] += 1
    failure = failures[min(failures)] if failures else None
    if not corpus.input_ids and failure:
        raise TeacherError(f"no prompt was answered: {failure}\nremove the cause and run again with --resume")
    if not corpus.input_ids:
        raise DatasetError(f"{teacher.name} ended every answer at once; check its chat template and EOS tokens")
    account = {
        "written": written,
        "cut": corpus.cut,
        "empty": corpus.skipped[EMPTY],
        "failed": corpus.skipped[FAILED],
        "failure": failure,
        "too_long": prompts.skipped[TOO_LONG],
        "skipped": sum(prompts.skipped.values()) - prompts.skipped[TOO_LONG],
    }
    if any(item.questions for item in dialogues):
        account |= {
            "turns": sum(len(item.answers) for item in dialogues),
            "turns_too_long": sum(item.too_long for item in dialogues),
            "turns_unanswered": sum(item.unanswered for item in dialogues),
        }
    return corpus, account
