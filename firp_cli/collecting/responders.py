"""Who writes the teacher's answers: what a responder is, and how one gets past prompts and memory that fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from firp_cli.errors import CapacityError, LaunchError, StoreError, TeacherError


@dataclass(frozen=True)
class Answer:
    """The answer to prompt `number` of those given, EOS included; or why there is none."""

    number: int
    token_ids: list[int]
    failure: str = ""


Decode = Callable[[list[Sequence[int]], list[int], int], Iterator[Answer]]  # (prompts, limits, width)


class Responder(Protocol):
    """Writes greedy answers.

    Attributes:
        name: what the recipe calls it; its answers and another's are never mixed.
        devices: ranks of a machine that share one of it. active: False on a rank that leaves its prompts to others.
    """

    name: str
    devices: int
    active: bool

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """One reply per prompt (token ids), of at most its limit of tokens, in any order.

        Raises TeacherError when no prompt can be answered at all.
        """
        ...

    def close(self) -> None:
        """Free what answering took; `reply` may be called again."""
        ...


class RetryingResponder:
    """Replies in spite of faults: memory that runs out halves what is decoded at once, for good; a prompt at which
    decoding fails is found by halving and reported, and the others are answered.

    Args:
        decode: replies to some prompts, taken in order; those that it was at when it raised are among the first
            `width` without a reply.
        width: prompts decoded at once.
    """

    def __init__(self, decode: Decode, width: int) -> None:
        self.decode, self.width = decode, width

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """As `Responder.reply`."""
        parts = deque([list(range(len(prompts)))])
        while parts:
            part = parts.popleft()
            left = dict.fromkeys(part)
            failure, memory = "", False
            try:
                for reply in self.decode(
                    [prompts[number] for number in part], [limits[number] for number in part], self.width
                ):
                    del left[part[reply.number]]
                    yield Answer(part[reply.number], reply.token_ids, reply.failure)
            except (TeacherError, LaunchError, StoreError):
                raise
            except Exception as error:
                failure, memory = first_line(error), out_of_memory(error)
            # The error is gone here, and with it what its frames held.
            if not failure:
                continue
            missing = list(left)
            if memory and self.width > 1:
                self.width //= 2
                _empty_device_cache()
                parts.appendleft(missing)
                continue
            suspects, others = missing[: self.width], missing[self.width :]
            if len(suspects) == 1:
                yield Answer(suspects[0], [], failure)
            half = len(suspects) // 2
            parts.extendleft(some for some in (others, suspects[half:] if half else [], suspects[:half]) if some)


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """What an error says, in one line, its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether fewer prompts at once might do."""
    if isinstance(error, (MemoryError, CapacityError)):
        return True
    words = ("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory")  # torch's own
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
