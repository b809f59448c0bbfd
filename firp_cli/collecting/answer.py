"""`--regenerate`: the teacher answers the prompts greedily, since a predictor must match the teacher's own text.

The ranks share the prompts. Answers are kept on disk batch by batch (collecting/answer_log.py). A prompt that cannot be
answered is left out and counted; the next `--resume` tries it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.answer_log import AnswerLog, prompt_keys, read_answers
from firp_cli.collecting.corpus import TOO_LONG, Corpus
from firp_cli.collecting.responders import Responder
from firp_cli.config import DataConfig
from firp_cli.data.chat import EncodedConversation
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import DatasetError, TeacherError
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

EMPTY, FAILED = "empty answer", "answer failed"  # reasons for leaving a prompt out
MANY_CUT = 0.2  # share of answers cut at a limit from which on the summary warns
MAX_CONSECUTIVE_FAILURES = 32  # so many failures in a row are not the fault of the prompts
ACCOUNT = {  # what became of the prompts, in words
    "written": "written",
    "cut": "of them cut at a length limit (data.max_new_tokens, data.max_length)",
    "empty": "empty",
    "failed": "failed",
    "too_long": "not answered because the prompt is too long",
    "skipped": "skipped before answering",
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

    The ids of prompt and answer are joined without tokenizing again. The mask selects the answer, which ends with EOS
    or at a limit: `max_new_tokens` tokens, or `longest` together with its prompt. Every rank of `group` calls this and
    returns the whole corpus. Equal prompts are answered once.

    The account counts prompts: `written` (of these `cut` at a length limit), `empty` (EOS at once), `failed` (with the
    first `failure`), `too_long` and `skipped` (before answering).

    Raises DatasetError when every answer is empty, TeacherError when prompt after prompt fails, StoreError when answers
    cannot be kept, LaunchError.
    """
    group = group or RankGroup()
    limits = [min(data.max_new_tokens, longest - length) for length in prompts.lengths]
    keys = prompt_keys(f"{teacher.fingerprint} {responder.name}", prompts.input_ids, limits)
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    logged = group.run_on_all(lambda: read_answers(folder) if group.main else {})
    answers = {first[key]: tokens for key, tokens in logged.items() if key in first}  # on rank 0; empty elsewhere
    answered = set(group.gather_rows(torch.tensor(sorted(answers), dtype=torch.long)).tolist())
    missing = sorted(set(first.values()) - answered, key=lambda index: (-prompts.lengths[index], index))
    workers = [rank for rank, active in enumerate(group.gather(responder.active)) if active]
    mine = missing[workers.index(group.rank) :: len(workers)] if group.rank in workers else []

    def bar(done: int) -> None:
        progress(len(answered) + min(done * len(workers), len(missing)), len(answered) + len(missing))

    def answer() -> dict[int, str]:
        try:
            with AnswerLog(folder, group.rank) as log:
                return _answer(prompts, limits, keys, mine, responder, log, answers, bar)
        finally:
            responder.close()

    failures: dict[int, str] = {}
    for part in group.gather(group.run_on_all(answer)):
        failures |= part
    shared = _exchange(answers, group)
    return group.run_on_all(lambda: _join(teacher, prompts, [shared.get(first[key]) for key in keys], failures))


def account_line(account: dict[str, Any]) -> str:
    """Return an account of `respond` in one line, and further ones where many answers are cut or prompts failed."""
    parts = [f"{account[name]:,} {words}" for name, words in ACCOUNT.items() if name == "written" or account[name]]
    lines = [f"answers: {', '.join(parts)}"]
    if account["cut"] > MANY_CUT * account["written"]:
        lines.append(
            f"{account['cut'] / account['written']:.0%} of the answers are cut: raise data.max_new_tokens, or check "
            "that the token with which the chat template ends turns is an eos_token_id of the teacher"
        )
    if account["failed"]:
        lines.append(f"first failure: {account['failure']}; --resume tries failed prompts again")
    return "\n".join(lines)


def _answer(
    prompts: Corpus,
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
    texts = [prompts.input_ids[index].tolist() for index in mine]
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
    teacher: Teacher, prompts: Corpus, answers: Sequence[Tensor | None], failures: dict[int, str]
) -> tuple[Corpus, dict[str, Any]]:
    """Append each prompt's answer (None: it failed) and count what became of the prompts."""
    corpus = Corpus(skipped=prompts.skipped.copy())
    stops = set(teacher.eos_token_ids)
    for prompt, tokens in zip(prompts.input_ids, answers, strict=True):
        if tokens is None:
            corpus.skipped[FAILED] += 1
            continue
        answer = tokens.tolist()
        stopped = bool(answer) and answer[-1] in stops
        if len(answer) - stopped == 0:
            corpus.skipped[EMPTY] += 1
            continue
        corpus.cut += not stopped
        ids = prompt.tolist() + answer
        corpus.add(EncodedConversation(ids, [False] * len(prompt) + [True] * len(answer)))
    failure = failures[min(failures)] if failures else None
    if not corpus.input_ids and failure:
        raise TeacherError(f"no prompt was answered: {failure}\nremove the cause and run again with --resume")
    if not corpus.input_ids:
        raise DatasetError(f"{teacher.name} ended every answer at once; check its chat template and EOS tokens")
    account = {
        "written": len(corpus.input_ids),
        "cut": corpus.cut,
        "empty": corpus.skipped[EMPTY],
        "failed": corpus.skipped[FAILED],
        "failure": failure,
        "too_long": prompts.skipped[TOO_LONG],
        "skipped": sum(prompts.skipped.values()) - prompts.skipped[TOO_LONG],
    }
    return corpus, account
