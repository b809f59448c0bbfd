"""Tokenized data sets: conversations with loss masks, or prompts that the teacher answers."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from firp_cli.config import DataConfig
from firp_cli.data.chat import EncodedConversation, check_masks, encode, encode_prompt
from firp_cli.data.datasets import load_conversations, load_prompts
from firp_cli.data.formats import Conversation, Message
from firp_cli.distributed.rank_group import RankGroup, raise_on_all_ranks
from firp_cli.errors import DatasetError, LaunchError, TeacherError
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

REFUSED = "refused by the chat template"  # reasons for leaving a row out
TOO_LONG = "prompt longer than max_length"


@dataclass
class Corpus:
    """Token sequences in the order of the data set.

    Attributes:
        input_ids: int32 (T,) each. loss_mask: bool (T,) each; (0,) for prompts.
        rows: for each sequence the number of its row, from 0. conversations: the rows of prompts.
        skipped: rows left out, by reason. cut: generated answers that a length limit ended.
    """

    input_ids: list[Tensor] = field(default_factory=list)
    loss_mask: list[Tensor] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    rows: list[int] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)

    def add(self, conversation: EncodedConversation) -> None:
        self.input_ids.append(torch.tensor(conversation.input_ids, dtype=torch.int32))
        self.loss_mask.append(torch.tensor(conversation.loss_mask, dtype=torch.bool))

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    @property
    def response_tokens(self) -> int:
        return sum(int(mask.sum()) for mask in self.loss_mask)

    def fingerprint(self) -> str:
        """Return 16 hex digits over every token and mask."""
        digest = hashlib.sha256()
        for tensors in (self.input_ids, self.loss_mask):
            for tensor in tensors:
                digest.update(len(tensor).to_bytes(8, "little"))
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def gather_tensors(tensors: list[Tensor], dtype: torch.dtype, group: RankGroup) -> list[Tensor]:
    """Return all ranks' tensors (T,) in the order of the ranks. They are sent as one tensor."""
    lengths = group.gather_rows(torch.tensor([len(tensor) for tensor in tensors], dtype=torch.long)).tolist()
    flat = group.gather_rows(torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype))
    return list(flat.split(lengths)) if lengths else []


def longest_sequence(teacher: Teacher, data: DataConfig) -> int:
    """Return the most tokens of a conversation: the recipe's limit, but not more than the teacher's positions."""
    return min(data.max_length, teacher.max_positions)


def load_messages(data: DataConfig) -> list[Conversation]:
    """Load the rows of a data set: conversations, whose turns are questions with `data.regenerate`.

    Raises DatasetError when no conversation has an answer to learn from.
    """
    if data.regenerate:
        return [prompt.conversation for prompt in load_prompts(data.dataset, data.data_dir, data.limit, data.split)]
    rows = [Conversation(row) for row in load_conversations(data.dataset, data.split, data.data_dir, data.limit)]
    if not any(item["role"] == "assistant" for row in rows for item in row.messages):
        raise DatasetError(
            f"{data.dataset} has no answers to learn from; let the teacher write them: --regenerate"
            if rows
            else f"{data.dataset} split {data.split!r} is empty"
        )
    return rows


def check_dataset(data: DataConfig) -> None:
    """Find the data set and read one row of it, before a teacher is loaded. Raises DatasetError."""
    if data.regenerate:
        load_prompts(data.dataset, data.data_dir, 1, data.split)
    else:
        load_conversations(data.dataset, data.split, data.data_dir, 1)


def build_corpus(
    rows: Sequence[Conversation], teacher: Teacher, data: DataConfig, progress: Progress = no_progress
) -> Corpus:
    """Tokenize every row in this process.

    Rows are skipped and counted when the template refuses them, when they have no answer, and when the answer (of a
    prompt: the prompt itself) does not begin within the longest sequence. Raises LossMaskError when no token or every
    token belongs to an answer, DatasetError when no row remains, TeacherError when the teacher has no tokenizer.
    """
    corpus, refusal = _encode_rows(rows, teacher, data, lambda done: progress(done, len(rows)))
    _check_corpus(rows, corpus, refusal, teacher, data)
    corpus.conversations = [rows[number] for number in corpus.rows] if data.regenerate else []
    return corpus


def build_shared_corpus(
    teacher: Teacher, data: DataConfig, progress: Progress = no_progress, group: RankGroup | None = None
) -> Corpus:
    """Load and tokenize a data set on all ranks of `group`: each tokenizes a share, and each returns the whole.

    Raises the errors of `load_messages` and `build_corpus`, and LaunchError naming the rank that reads different data
    or another teacher than rank 0.
    """
    group = group or RankGroup()

    def encode() -> tuple[list[Conversation], Corpus, str]:
        rows = load_messages(data)
        first, end = share_rows(rows, group.size)[group.rank]
        share = rows[first:end]
        corpus, refusal = _encode_rows(
            share, teacher, data, lambda done: progress(done * len(rows) // len(share), len(rows))
        )
        corpus.rows = [first + number for number in corpus.rows]
        return rows, corpus, refusal

    rows, corpus, refusal = group.run_on_all(encode)
    size = sum(len(item["content"]) for row in rows for item in row.messages)
    inputs = {"data set": (len(rows), size), "teacher": teacher.fingerprint}
    parts = group.gather((inputs, corpus.skipped, refusal))
    _check_same_inputs([part[0] for part in parts])
    if group.size > 1:
        corpus = Corpus(
            gather_tensors(corpus.input_ids, torch.int32, group),
            gather_tensors(corpus.loss_mask, torch.bool, group),
            sum((part[1] for part in parts), Counter()),
            rows=group.gather_rows(torch.tensor(corpus.rows, dtype=torch.long)).tolist(),
        )
    refusal = next((part[2] for part in parts if part[2]), "")
    group.run_on_main(lambda: _check_corpus(rows, corpus, refusal, teacher, data))
    corpus.conversations = [rows[number] for number in corpus.rows] if data.regenerate else []
    return corpus


def _check_same_inputs(inputs: Sequence[dict[str, Any]]) -> None:
    """Raise LaunchError on every rank when a rank's data set or teacher differs from that of rank 0."""
    for number, values in enumerate(inputs):
        for name, value in values.items():
            if value != inputs[0][name]:
                raise_on_all_ranks(
                    LaunchError(
                        f"rank {number} reads another {name} than rank 0 ({value} against {inputs[0][name]}); "
                        "give all machines the same files"
                    )
                )


def share_rows(rows: Sequence[Conversation], ranks: int) -> list[tuple[int, int]]:
    """Return the rows `first .. end-1` that each rank tokenizes: neighbours, about equally many characters for each."""
    if ranks == 1:
        return [(0, len(rows))]
    sizes = list(accumulate(1 + sum(len(item["content"]) for item in row.messages) for row in rows))
    cuts = [bisect_left(sizes, sizes[-1] * part / ranks) if rows else 0 for part in range(1, ranks)]
    return list(pairwise([0, *cuts, len(rows)]))


def _encode_rows(
    rows: Sequence[Conversation], teacher: Teacher, data: DataConfig, on_row: Callable[[int], None]
) -> tuple[Corpus, str]:
    """Return the tokenized rows, and the template's message about the first row that it refused ('' for none)."""
    tokenizer = teacher.tokenizer
    if tokenizer is None:
        raise TeacherError(f"{teacher.name} has no tokenizer; give a model folder that contains one")
    corpus, limit = Corpus(), longest_sequence(teacher, data)
    refusal = ""
    for number, row in enumerate(rows, 1):
        messages = row.messages
        try:
            if data.regenerate:
                ids = encode_prompt(row.turns()[0], tokenizer, row.tools)
                conversation = EncodedConversation(ids, [])
                reason = "" if len(ids) < limit else TOO_LONG
            else:
                conversation = encode(messages, tokenizer, limit, row.tools)
                reason = "" if any(conversation.loss_mask) else _why_unmasked(messages)
        except DatasetError as error:
            refusal = refusal or str(error)
            reason = REFUSED
        if reason:
            corpus.skipped[reason] += 1
        else:
            corpus.add(conversation)
            corpus.rows.append(number - 1)
        on_row(number)
    return corpus, refusal


def _check_corpus(
    rows: Sequence[Conversation],
    corpus: Corpus,
    refusal: str,
    teacher: Teacher,
    data: DataConfig,
) -> None:
    """Raise DatasetError or LossMaskError when nothing can be learned from the tokenized rows."""
    limit = longest_sequence(teacher, data)
    if refusal and corpus.skipped[REFUSED] == len(rows):
        raise DatasetError(f"{data.dataset}: {refusal} (all {len(rows)} conversations)")
    if not data.regenerate:
        _check_masks([row.messages for row in rows], corpus, teacher.tokenizer, limit)
    elif not corpus.input_ids:
        raise DatasetError(f"{data.dataset}: no prompt is shorter than {limit} tokens; raise data.max_length")


def _why_unmasked(messages: Sequence[Message]) -> str:
    answered = any(item["role"] == "assistant" for item in messages)
    return "no answer within max_length" if answered else "no answer"


def _check_masks(rows: Sequence[Sequence[Message]], corpus: Corpus, tokenizer: Any, limit: int) -> None:
    """Raise LossMaskError when the masks select no token or all tokens, DatasetError when no conversation remains."""
    answered = [messages for messages in rows if any(item["role"] == "assistant" for item in messages)]
    if corpus.input_ids:
        check_masks(answered[0], tokenizer, corpus.response_tokens, sum(corpus.lengths))
        return
    for messages in answered:
        try:
            tokens = len(encode(messages, tokenizer, limit).input_ids)
        except DatasetError:
            continue
        check_masks(messages, tokenizer, 0, tokens)
    raise DatasetError(f"no conversation remains: {dict(corpus.skipped)}")
