"""Responders write the teacher's answers; `RetryingResponder` isolates failing prompts and adapts to little memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from firp_cli.errors import CapacityError, LaunchError, StoreError, TeacherError, first_line

MOST_TEXT = 300  # characters of a failure's text


@dataclass(frozen=True)
class Answer:
    """Answer to prompt `number` of a list, EOS included; or the reason why there is none (`failure`)."""

    number: int
    token_ids: list[int]
    failure: str = ""


Decode = Callable[[list[Sequence[int]], list[int], int], Iterator[Answer]]  # (prompts, limits, width)


class Responder(Protocol):
    """Writes greedy answers.

    Attributes:
        name: its name in a recipe; answers of different responders are never mixed.
        devices: ranks of a machine that share one responder. active: False on a rank that answers no prompts.
    """

    name: str
    devices: int
    active: bool

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """Yield one answer per prompt (token ids), of at most its limit of tokens, in any order.

        Raises TeacherError when no prompt can be answered at all.
        """
        ...

    def close(self) -> None:
        """Free the memory that answering took; `reply` may be called again."""
        ...


class RetryingResponder:
    """Answers prompts although decoding fails for some of them.

    When memory runs out, `width` is halved for good. A prompt for which decoding fails is found by bisection and
    reported; the others are answered.

    Args:
        decode: answers prompts in their order; when it raises, the prompts that it was decoding are among the first
            `width` without an answer.
        width: prompts decoded at once.
    """

    def __init__(self, decode: Decode, width: int) -> None:
        self.decode, self.width = decode, width

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """Answer as `Responder.reply` describes."""
        parts = deque([list(range(len(prompts)))])
        while parts:
            part = parts.popleft()
            remaining = dict.fromkeys(part)
            failure, memory = "", False
            try:
                for reply in self.decode(
                    [prompts[number] for number in part], [limits[number] for number in part], self.width
                ):
                    del remaining[part[reply.number]]
                    yield Answer(part[reply.number], reply.token_ids, reply.failure)
            except (TeacherError, LaunchError, StoreError):
                raise
            except Exception as error:
                failure, memory = first_line(error)[:MOST_TEXT], out_of_memory(error)
            # The error is freed here, and with it the memory that its frames hold.
            if not failure:
                continue
            missing = list(remaining)
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


def out_of_memory(error: BaseException) -> bool:
    """Return True for an error that fewer prompts at once may avoid."""
    if isinstance(error, (MemoryError, CapacityError)):
        return True
    words = ("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory")  # texts of torch
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
