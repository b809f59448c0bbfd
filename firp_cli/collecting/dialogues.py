"""Conversations that the teacher answers turn by turn, and the training sequences that they become.

A conversation is one sequence as long as each prompt continues the tokens before it (data/turns.py). A prompt that does
not, since the template rewrites earlier turns, begins another sequence, in which only its own answer is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from firp_cli.collecting.corpus import Corpus, gather_tensors
from firp_cli.data.turns import Questions
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.errors import DatasetError
from firp_cli.teacher.teacher import Teacher

REWRITTEN, CONTINUED, TOO_LONG, REFUSED = range(4)  # kinds of the next prompt


@dataclass
class Dialogue:
    """Conversation with the answers so far.

    Attributes:
        prompt: (T,) int32 tokens before the next answer; None when nothing more is asked.
        questions: None for a conversation of one turn. answers: (n,) int32 each.
        sequences: token ids and loss mask of each training sequence.
        continued: the prompt continues the last sequence. failed: the teacher could not answer.
        cut: answers that a limit ended. too_long, unanswered: later turns that were not asked since they do not fit the
            longest sequence; that have no answer for another reason.
    """

    prompt: Tensor | None
    questions: Questions | None = None
    answers: list[Tensor] = field(default_factory=list)
    sequences: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    continued: bool = False
    failed: bool = False
    cut: int = 0
    too_long: int = 0
    unanswered: int = 0

    @property
    def remaining(self) -> int:
        """Later turns that are not answered yet."""
        return len(self.questions.turns) - max(1, len(self.answers)) if self.questions else 0

    def take(self, answer: Tensor | None, stops: Collection[int]) -> None:
        """Append the answer to the prompt. Without one (None), or with nothing in it, the conversation ends here."""
        prompt, self.prompt = self.prompt, None
        assert prompt is not None
        stopped = answer is not None and len(answer) > 0 and int(answer[-1]) in stops
        if answer is None or len(answer) - stopped == 0:
            self.failed = answer is None
            self.unanswered = self.remaining
            return
        mask = self.sequences.pop()[1] if self.continued else torch.empty(0, dtype=torch.bool)
        asked, told = torch.zeros(len(prompt) - len(mask)).bool(), torch.ones(len(answer)).bool()
        self.sequences.append((torch.cat([prompt, answer.int()]), torch.cat([mask, asked, told])))
        self.answers.append(answer)
        self.cut += not stopped

    def follow(self, kind: int, prompt: Tensor) -> None:
        """Set the next prompt, or end the conversation."""
        if kind == TOO_LONG:
            self.too_long = self.remaining
        elif kind == REFUSED:
            self.unanswered = self.remaining
        else:
            self.prompt, self.continued = prompt, kind == CONTINUED

    def following(self, longest: int) -> tuple[int, list[int]]:
        """Return kind and tokens of the prompt after the answers."""
        assert self.questions is not None
        last = self.sequences[-1][0][: -len(self.answers[-1])].tolist()
        try:
            ids, continued = self.questions.following(last, [answer.tolist() for answer in self.answers])
        except DatasetError:
            return REFUSED, []
        if len(ids) >= longest:
            return TOO_LONG, []
        return (CONTINUED if continued else REWRITTEN), ids


def start_dialogues(prompts: Corpus, teacher: Teacher, all_turns: bool) -> list[Dialogue]:
    """Return a conversation for each prompt. Only with `all_turns` it has later turns."""
    if not all_turns or not prompts.conversations:
        return [Dialogue(ids) for ids in prompts.input_ids]
    stops = set(teacher.eos_token_ids)
    return [
        Dialogue(ids, Questions.of(conversation, teacher.tokenizer, stops))
        for ids, conversation in zip(prompts.input_ids, prompts.conversations, strict=True)
    ]


def next_prompts(dialogues: Sequence[Dialogue], longest: int, group: RankGroup) -> None:
    """Set the next prompts of the conversations whose last prompt was answered. The ranks share the tokenizing."""
    waiting = [
        number
        for number, item in enumerate(dialogues)
        if item.questions and item.remaining and not (item.failed or item.too_long or item.unanswered)
    ]
    mine = waiting[group.rank :: group.size]
    found = group.run_on_all(lambda: [dialogues[number].following(longest) for number in mine])
    numbers = group.gather_rows(torch.tensor(mine, dtype=torch.long)).tolist()
    kinds = group.gather_rows(torch.tensor([kind for kind, _ in found], dtype=torch.long)).tolist()
    rows = gather_tensors([torch.tensor(ids, dtype=torch.int32) for _, ids in found], torch.int32, group)
    for number, kind, ids in zip(numbers, kinds, rows, strict=True):
        dialogues[number].follow(kind, ids)
