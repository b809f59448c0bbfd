"""Prompts of a bench: the turns that are asked, and the batches that are decoded together.

The turns are chosen before anything is measured, so that all methods answer the same ones: a later turn is asked if it
fits the teacher's context after the longest possible answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from firp_cli.data.references import Reference
from firp_cli.data.turns import Questions
from firp_cli.decoding.sequences import check_room, prompt_label
from firp_cli.errors import CapacityError, NumericsError
from firp_cli.results import Generation

Generate = Callable[[Sequence[Sequence[int]], int], list[Generation]]  # (prompts, most new tokens of each)
SLACK = 2  # tokens that a later turn may have more where the text around an answer is tokenized differently


@dataclass(frozen=True)
class BenchPrompt:
    """Encoded prompt with its data set and category.

    Attributes:
        questions: all turns of its conversation; None if it has one. lengths: `Questions.lengths`.
        bounds: most tokens of the prompt of each later turn that is asked.
        place: its row and data set, for messages. id: name or number that the row gives itself.
        question: text of the first turn's last user message. reference: what an answer is judged by, if the row has it.
    """

    token_ids: list[int]
    dataset: str
    category: str = ""
    questions: Questions | None = None
    lengths: tuple[int, ...] = ()
    bounds: tuple[int, ...] = ()
    place: str = ""
    id: Any = None
    question: str = ""
    reference: Reference | None = None

    @property
    def turns(self) -> int:
        """Turns that are asked."""
        return 1 + len(self.bounds)

    @property
    def turns_not_asked(self) -> int:
        """Later turns that do not fit the context, or that the chat template refuses."""
        return len(self.questions.turns) - self.turns if self.questions else 0

    @property
    def longest(self) -> int:
        """Most tokens of a turn's prompt."""
        return max(len(self.token_ids), *self.bounds, 0)

    def asked(self, max_positions: int, max_new_tokens: int) -> BenchPrompt:
        """Return the prompt with the later turns that fit the context after answers of `max_new_tokens`."""
        bounds: list[int] = []
        for turn, length in enumerate(self.lengths, 1):
            bound = length + turn * (max_new_tokens + SLACK)
            if bound + max_new_tokens > max_positions:
                break
            bounds.append(bound)
        return replace(self, bounds=tuple(bounds))

    def after(self, answers: Sequence[Sequence[int]]) -> list[int]:
        """Return the tokens of the prompt of the turn after `answers`, which are the earlier turns' tokens.

        Where the template rewrites earlier turns, their text is tokenized again. If it then exceeds the turn's bound,
        the last answer is shortened in the prompt. Raises DatasetError when the template refuses an answer.
        """
        if not answers:
            return self.token_ids
        assert self.questions is not None
        ids, said = self.token_ids, []
        for bound, answer in zip(self.bounds, answers, strict=False):
            said.append(list(answer))
            prompt, _ = self.questions.following(ids, said)
            while len(prompt) > bound and said[-1]:
                said[-1] = said[-1][: len(said[-1]) // 2]
                prompt, _ = self.questions.following(ids, said)
            ids = prompt
        return ids


@dataclass
class Batch:
    """Prompts decoded together, of one data set and category. `numbers` are their indices in the prompt list.

    `turns`: turns that are asked of each; empty: one of each. Prompts without a further turn leave the batch.
    """

    dataset: str
    category: str
    numbers: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def places(self) -> list[list[int]]:
        """Return for each turn the places of the prompts of which it is asked."""
        turns = self.turns or [1] * len(self.numbers)
        return [[place for place, count in enumerate(turns) if turn < count] for turn in range(max(turns, default=0))]


def fit_prompts(
    prompts: Sequence[BenchPrompt], max_positions: int, max_new_tokens: int, skip_long: bool
) -> tuple[list[BenchPrompt], int]:
    """Return the prompts that leave room for the answer, with the turns that are asked, and the number of skipped ones.

    Raises CapacityError when a prompt is too long and `skip_long` is off, or when none fits.
    """
    check_room(max_new_tokens, max_positions)
    room = max_positions - max_new_tokens
    fitting = [prompt.asked(max_positions, max_new_tokens) for prompt in prompts if len(prompt.token_ids) <= room]
    skipped = len(prompts) - len(fitting)
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if skipped and not skip_long:
        raise CapacityError(
            f"{skipped} of {len(prompts)} prompts are too long (the longest has {longest} tokens): the teacher's "
            f"context of {max_positions} has room for {room} beside {max_new_tokens} new tokens\n"
            "--skip-long skips and counts them, a smaller --max-new-tokens makes room"
        )
    if not fitting:
        raise CapacityError(
            f"no prompt fits: the shortest has {min((len(prompt.token_ids) for prompt in prompts), default=0)} tokens, "
            f"the teacher's context of {max_positions} has room for {room} beside {max_new_tokens} new tokens; lower "
            "--max-new-tokens"
        )
    return fitting, skipped


def spread(categories: Sequence[str], limit: int, parts: Sequence[str] | None = None) -> list[int]:
    """Return the indices of at most `limit` prompts, in order, taken from every category in turn, and within a category
    from each of its `parts` in turn.
    """
    ranked: dict[str, list[tuple[int, int]]] = {}
    seen = Counter[str]()
    for place, (category, part) in enumerate(zip(categories, parts or categories, strict=True)):
        ranked.setdefault(category, []).append((seen[part], place))
        seen[part] += 1
    queues = {category: [place for _, place in sorted(queue)] for category, queue in ranked.items()}
    rounds = max((len(queue) for queue in queues.values()), default=0)
    in_turn = [queue[turn] for turn in range(rounds) for queue in queues.values() if turn < len(queue)]
    return sorted(in_turn[:limit])


def make_batches(prompts: Sequence[BenchPrompt], size: int) -> list[Batch]:
    """Return batches of `size` prompts of the same data set and category, in the order of the prompts."""
    open_batches: dict[tuple[str, str], Batch] = {}
    batches = []
    for number, prompt in enumerate(prompts):
        key = (prompt.dataset, prompt.category)
        batch = open_batches.get(key)
        if batch is None or len(batch.numbers) == size:
            batch = open_batches[key] = Batch(*key)
            batches.append(batch)
        batch.numbers.append(number)
        batch.turns.append(prompt.turns)
    return batches


def longest_batch(prompts: Sequence[BenchPrompt], batches: Sequence[Batch]) -> int:
    """Return the index of the warm-up batch. After the longest prompt no buffer grows and no step is captured again."""
    lengths = [max(prompts[number].longest for number in batch.numbers) for batch in batches]
    return max(range(len(batches)), key=lambda place: lengths[place], default=0)


def decode_turns(
    generate: Generate, prompts: Sequence[BenchPrompt], batch: Batch, max_new_tokens: int
) -> list[Generation]:
    """Decode every turn of a batch's prompts, each after the method's own earlier answers.

    The answers are in the order of `Batch.places`: those of the first turn, then those of the second one, and so on.
    Raises NumericsError naming the prompt.
    """
    asked = [prompts[number] for number in batch.numbers]
    answers: list[list[list[int]]] = [[] for _ in asked]
    generations: list[Generation] = []
    for places in batch.places():
        try:
            made = generate([asked[place].after(answers[place]) for place in places], max_new_tokens)
        except NumericsError as error:
            if error.prompt is None:
                raise
            place = places[error.prompt]
            name = asked[place].place or prompt_label(batch.numbers[place])
            raise NumericsError(f"{name}: {str(error).partition(': ')[2]}") from error
        for place, item in zip(places, made, strict=True):
            answers[place].append(item.token_ids)
        generations += made
    return generations
