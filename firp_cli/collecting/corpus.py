"""A data set as token sequences ready for the teacher: conversations with loss masks, or prompts to be answered."""

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
from firp_cli.data.formats import Message
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import DatasetError, TeacherError
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

REFUSED = "refused by the chat template"
TOO_LONG = "prompt longer than max_length"


@dataclass
class Corpus:
    """Sequences in the order of the data set. `input_ids` int32 and `loss_mask` bool, (T,) each; for prompts no mask.

    `skipped` counts rows left out, by reason; `cut` the generated answers that reached a length limit before their end.
    """

    input_ids: list[Tensor] = field(default_factory=list)
    loss_mask: list[Tensor] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0

    def add(self, conversation: EncodedConversation) -> None:
        self.input_ids.append(torch.tensor(conversation.input_ids, dtype=torch.int32))
        self.loss_mask.append(torch.tensor(conversation.loss_mask, dtype=torch.bool))

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    @property
    def response_tokens(self) -> int:
        return sum(int(mask.sum()) for mask in self.loss_mask)

    def gathered(self, group: RankGroup) -> Corpus:
        """The parts of all ranks one behind the other, by rank; on every rank. They travel as a few large tensors."""
        if group.size == 1:
            return self
        whole = Corpus(cut=sum(group.gather(self.cut)))
        for part in group.gather(self.skipped):
            whole.skipped.update(part)
        whole.input_ids = _gathered(self.input_ids, torch.int32, group)
        whole.loss_mask = _gathered(self.loss_mask, torch.bool, group)
        return whole

    def fingerprint(self) -> str:
        """16 hex digits over every token and mask."""
        digest = hashlib.sha256()
        for tensors in (self.input_ids, self.loss_mask):
            for tensor in tensors:
                digest.update(len(tensor).to_bytes(8, "little"))
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def _gathered(tensors: list[Tensor], dtype: torch.dtype, group: RankGroup) -> list[Tensor]:
    lengths = group.gather_rows(torch.tensor([len(tensor) for tensor in tensors], dtype=torch.long)).tolist()
    flat = group.gather_rows(torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype))
    return list(flat.split(lengths)) if lengths else []


def longest_sequence(teacher: Teacher, data: DataConfig) -> int:
    """Tokens per conversation at most: the recipe's limit, and the positions that the teacher has."""
    return min(data.max_length, teacher.max_positions)


def load_messages(data: DataConfig) -> list[list[Message]]:
    """The rows that a store is made of: conversations, or prompts when the teacher is to answer them itself.

    Raises DatasetError when no row has an answer to learn from.
    """
    if data.regenerate:
        return [prompt.messages for prompt in load_prompts(data.dataset, data.data_dir, data.limit, data.split)]
    rows = load_conversations(data.dataset, data.split, data.data_dir, data.limit)
    if not any(item["role"] == "assistant" for messages in rows for item in messages):
        raise DatasetError(
            f"{data.dataset} has no answers to learn from; let the teacher write them: --regenerate"
            if rows
            else f"{data.dataset} split {data.split!r} is empty"
        )
    return rows


def check_dataset(data: DataConfig) -> None:
    """Find the data set and read a row of it: cheap enough to do before a teacher is loaded. Raises DatasetError."""
    if data.regenerate:
        load_prompts(data.dataset, data.data_dir, 1, data.split)
    else:
        load_conversations(data.dataset, data.split, data.data_dir, 1)


def build_corpus(
    rows: Sequence[Sequence[Message]],
    teacher: Teacher,
    data: DataConfig,
    progress: Progress = no_progress,
    group: RankGroup | None = None,
) -> Corpus:
    """Encode every row; the ranks of `group` share the work, and each gets the whole.

    Rows that the template refuses, without an answer, or whose answer (for prompts: whose prompt) does not begin within
    the longest sequence are skipped and counted. Raises LossMaskError when no token or every token is an answer's,
    DatasetError when nothing is left.
    """
    group = group or RankGroup()
    tokenizer = group.run_on_all(lambda: _tokenizer(teacher))
    limit = longest_sequence(teacher, data)
    first, end = share_rows(rows, group.size)[group.rank]

    def bar(done: int) -> None:
        progress(done * len(rows) // (end - first), len(rows))

    mine, refusal = group.run_on_all(lambda: _encode_rows(rows[first:end], tokenizer, data.regenerate, limit, bar))
    corpus = mine.gathered(group)
    refusals = [text for text in group.gather(refusal) if text]
    group.run_on_main(lambda: _check_corpus(rows, corpus, refusals, tokenizer, data, limit))
    return corpus


def share_rows(rows: Sequence[Sequence[Message]], ranks: int) -> list[tuple[int, int]]:
    """The rows `first .. end-1` that each rank encodes: neighbours, of about as many characters for each."""
    if ranks == 1:
        return [(0, len(rows))]
    sizes = list(accumulate(1 + sum(len(item["content"]) for item in messages) for messages in rows))
    cuts = [bisect_left(sizes, sizes[-1] * part / ranks) if rows else 0 for part in range(1, ranks)]
    return list(pairwise([0, *cuts, len(rows)]))


def _encode_rows(
    rows: Sequence[Sequence[Message]], tokenizer: Any, prompts: bool, limit: int, bar: Callable[[int], None]
) -> tuple[Corpus, str]:
    """The rows' tokens, and why the template refused the first that it did."""
    corpus = Corpus()
    refusal = ""
    for number, messages in enumerate(rows, 1):
        try:
            if prompts:
                ids = encode_prompt(messages, tokenizer)
                conversation = EncodedConversation(ids, [])
                reason = "" if len(ids) < limit else TOO_LONG
            else:
                conversation = encode(messages, tokenizer, limit)
                reason = "" if any(conversation.loss_mask) else _why_unmasked(messages)
        except DatasetError as error:
            refusal = refusal or str(error)
            reason = REFUSED
        if reason:
            corpus.skipped[reason] += 1
        else:
            corpus.add(conversation)
        bar(number)
    return corpus, refusal


def _check_corpus(
    rows: Sequence[Sequence[Message]],
    corpus: Corpus,
    refusals: Sequence[str],
    tokenizer: Any,
    data: DataConfig,
    limit: int,
) -> None:
    if refusals and corpus.skipped[REFUSED] == len(rows):
        raise DatasetError(f"{data.dataset}: {refusals[0]} (all {len(rows)} of them)")
    if not data.regenerate:
        _check_masks(rows, corpus, tokenizer, limit)
    elif not corpus.input_ids:
        raise DatasetError(f"{data.dataset}: no prompt is shorter than {limit} tokens; raise data.max_length")


def _why_unmasked(messages: Sequence[Message]) -> str:
    answered = any(item["role"] == "assistant" for item in messages)
    return "no answer within max_length" if answered else "no answer"


def _tokenizer(teacher: Teacher) -> Any:
    if teacher.tokenizer is None:
        raise TeacherError(f"{teacher.name} has no tokenizer; give a model folder that holds one")
    return teacher.tokenizer


def _check_masks(rows: Sequence[Sequence[Message]], corpus: Corpus, tokenizer: Any, limit: int) -> None:
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
    raise DatasetError(f"no conversation is left: {dict(corpus.skipped)}")
