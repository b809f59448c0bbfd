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
from firp_cli.data.chat import EncodedConversation, check_masks, encode
from firp_cli.data.datasets import Prompt, Rows, Selection, load_prompts, load_rows, refuse_training
from firp_cli.data.encode_rows import SideFields, check_ids, encode_question, encode_row, tell_left_out
from firp_cli.data.formats import Conversation
from firp_cli.data.odd_rows import CALLS_LEFT_OUT, EMPTY_ANSWER, REFUSED, TOO_LONG, OddRow, OddRows
from firp_cli.distributed.rank_group import RankGroup, raise_on_all_ranks
from firp_cli.errors import DatasetError, LaunchError, TeacherError
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

CHECKED_ROWS = 256  # rows that are read before a teacher is loaded


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


def load_messages(data: DataConfig) -> Rows:
    """Load the rows of a data set: conversations, or with `data.regenerate` prompts.

    Raises DatasetError when no conversation has an answer to learn from.
    """
    rows = _load(data, data.limit)
    if not data.regenerate and not any(row.conversation.answered for row in rows):
        raise DatasetError(f"{data.dataset} has no answers to learn from; let the teacher write them: --regenerate")
    return rows


def check_dataset(data: DataConfig, training: bool = False) -> None:
    """Find the data set and read its first rows, before a teacher is loaded. Raises DatasetError, with `training` also
    for a set whose terms of use forbid it.
    """
    if training:
        refuse_training(data.dataset)
    rows = _load(data, min(CHECKED_ROWS, data.limit or CHECKED_ROWS))
    if training:
        rows.refuse_training()


def _load(data: DataConfig, limit: int | None) -> Rows:
    selection = Selection(data.split, data.data_dir, limit, data.columns, data.sample, data.max_odd)
    if data.regenerate:
        return load_prompts(data.dataset, selection=selection, tell=False)
    return load_rows(data.dataset, selection, tell=False)


def build_corpus(
    rows: Sequence[Prompt], teacher: Teacher, data: DataConfig, progress: Progress = no_progress
) -> Corpus:
    """Tokenize every row in this process.

    Rows are skipped and counted when the template refuses them, when they have no answer, when an answer is empty, and
    when the answer (of a prompt: the prompt itself) does not begin within the longest sequence. The counts include the
    odd rows that `load_messages` skipped. Raises LossMaskError when no token or every token belongs to an answer,
    DatasetError when too many rows are odd or none remains, TeacherError when the teacher has no tokenizer.
    """
    encoded = _encode_rows(rows, teacher, data, lambda done: progress(done, len(rows)))
    return _check_corpus(rows, encoded, teacher, data)


def build_shared_corpus(
    teacher: Teacher, data: DataConfig, progress: Progress = no_progress, group: RankGroup | None = None
) -> Corpus:
    """Load and tokenize a data set on all ranks of `group`: each tokenizes a share, and each returns the whole.

    Raises the errors of `load_messages` and `build_corpus`, and LaunchError naming the rank that reads different data
    or another teacher than rank 0.
    """
    group = group or RankGroup()

    def encode() -> tuple[Rows, _Encoded]:
        rows = load_messages(data)
        first, end = share_rows(rows, group.size)[group.rank]
        share = rows[first:end]
        encoded = _encode_rows(share, teacher, data, lambda done: progress(done * len(rows) // len(share), len(rows)))
        encoded.corpus.rows = [first + number for number in encoded.corpus.rows]
        return rows, encoded

    rows, encoded = group.run_on_all(encode)
    inputs = {"data set": (len(rows), sum(map(_size, rows))), "teacher": teacher.fingerprint}
    parts = group.gather((inputs, encoded.odd, encoded.left_out))
    _check_same_inputs([part[0] for part in parts])
    corpus = encoded.corpus
    if group.size > 1:
        corpus = Corpus(
            gather_tensors(corpus.input_ids, torch.int32, group),
            gather_tensors(corpus.loss_mask, torch.bool, group),
            rows=group.gather_rows(torch.tensor(corpus.rows, dtype=torch.long)).tolist(),
        )
    odd = OddRows(data.dataset)
    for part in parts:
        odd.merge(part[1])
    whole = _Encoded(corpus, odd, set().union(*(part[2] for part in parts)))
    group.run_on_main(lambda: _check_corpus(rows, whole, teacher, data))
    return _counted(rows, whole, data)


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


def share_rows(rows: Sequence[Prompt], ranks: int) -> list[tuple[int, int]]:
    """Return the rows `first .. end-1` that each rank tokenizes: neighbours, about equally many characters for each."""
    if ranks == 1:
        return [(0, len(rows))]
    sizes = list(accumulate(1 + _size(row) for row in rows))
    cuts = [bisect_left(sizes, sizes[-1] * part / ranks) if rows else 0 for part in range(1, ranks)]
    return list(pairwise([0, *cuts, len(rows)]))


def _size(row: Prompt) -> int:
    """Return the characters of a row, or its tokens."""
    return len(row.conversation.input_ids or ()) + sum(len(item["content"]) for item in row.conversation.messages)


@dataclass
class _Encoded:
    """Tokenized rows, those that were skipped, and the columns that the template leaves out."""

    corpus: Corpus
    odd: OddRows
    left_out: set[str]


def _encode_rows(rows: Sequence[Prompt], teacher: Teacher, data: DataConfig, on_row: Callable[[int], None]) -> _Encoded:
    if teacher.tokenizer is None:
        raise TeacherError(f"{teacher.name} has no tokenizer; give a model folder that contains one")
    corpus, odd, fields = Corpus(), OddRows(data.dataset, len(rows)), SideFields(teacher.tokenizer)
    limit = longest_sequence(teacher, data)
    for number, row in enumerate(rows, 1):
        try:
            if data.regenerate:
                conversation = EncodedConversation(encode_question(row, fields), [])
                check_ids(conversation.input_ids, teacher.vocab_size)
                if len(conversation.input_ids) >= limit:
                    raise OddRow(TOO_LONG)
            else:
                conversation = encode_row(row, fields, limit, teacher.vocab_size)
            corpus.add(conversation)
            corpus.rows.append(number - 1)
        except DatasetError as error:
            odd.add(error.reason if isinstance(error, OddRow) else REFUSED, row.row, str(error))
        on_row(number)
    return _Encoded(corpus, odd, fields.unused())


def _check_corpus(rows: Sequence[Prompt], encoded: _Encoded, teacher: Teacher, data: DataConfig) -> Corpus:
    """Return the corpus with the counts of skipped rows, and log them.

    Raises DatasetError or LossMaskError when nothing can be learned from the tokenized rows.
    """
    corpus, odd = encoded.corpus, encoded.odd
    total = OddRows(data.dataset)
    for part in (*_odd_while_reading(rows), odd):
        total.merge(part)
    total.rows -= odd.rows if isinstance(rows, Rows) else 0  # they are counted as rows that were read
    if odd.counts[REFUSED] == len(rows):
        raise DatasetError(f"{data.dataset}: {odd.first[REFUSED][1]} (all {len(rows)} conversations)")
    limit = longest_sequence(teacher, data)
    if not data.regenerate:
        _check_masks(rows, encoded, teacher.tokenizer, limit)
    elif not corpus.input_ids and odd.counts[TOO_LONG]:
        raise DatasetError(f"{data.dataset}: no prompt is shorter than {limit} tokens; raise data.max_length")
    elif not corpus.input_ids:
        raise DatasetError(f"no prompt remains: {odd.line()}")
    total.check(data.max_odd)
    total.tell()
    tell_left_out(encoded.left_out)
    return _counted(rows, encoded, data)


def _counted(rows: Sequence[Prompt], encoded: _Encoded, data: DataConfig) -> Corpus:
    """Return the corpus with the counts of the rows that were skipped while reading and while tokenizing, and the
    conversations of prompts.
    """
    corpus = encoded.corpus
    corpus.skipped = sum((odd.counts for odd in (*_odd_while_reading(rows), encoded.odd)), Counter())
    corpus.conversations = [rows[number].conversation for number in corpus.rows] if data.regenerate else []
    return corpus


def _odd_while_reading(rows: Sequence[Prompt]) -> list[OddRows]:
    return rows.odd if isinstance(rows, Rows) else []  # a part of the rows is a plain list


def _check_masks(rows: Sequence[Prompt], encoded: _Encoded, tokenizer: Any, limit: int) -> None:
    """Raise LossMaskError when the masks select no token or all tokens, DatasetError when no conversation remains."""
    answered = [row.conversation for row in rows if row.conversation.answered]
    corpus = encoded.corpus
    if corpus.input_ids:
        check_masks(answered[0].messages, tokenizer, corpus.response_tokens, sum(corpus.lengths))
        return
    for conversation in answered:
        try:
            tokens = len(encode(conversation.messages, tokenizer, limit, conversation.tools).input_ids)
        except DatasetError:
            continue
        if tokens and not encoded.odd.counts[EMPTY_ANSWER] + encoded.odd.counts[CALLS_LEFT_OUT]:
            check_masks(conversation.messages, tokenizer, 0, tokens)
    raise DatasetError(f"no conversation remains: {encoded.odd.line()}")
