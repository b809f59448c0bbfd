"""The responder that a recipe asks for. Imports torch: import it inside a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from firp_cli.collecting.corpus import longest_sequence
from firp_cli.collecting.responders import Answer, Responder, RetryingResponder
from firp_cli.collecting.vllm import VllmResponder
from firp_cli.config import Recipe
from firp_cli.decoding.continuous import ContinuousBatcher
from firp_cli.errors import UsageError
from firp_cli.teacher.teacher import Teacher

ACCOUNT = {  # of the prompts of --regenerate
    "written": "written",
    "cut": "of them cut at a length limit (data.max_new_tokens, data.max_length)",
    "empty": "empty",
    "failed": "failed",
    "too_long": "not asked for, the prompt is too long",
    "skipped": "skipped before answering",
}


def make_responder(recipe: Recipe, teacher: Teacher) -> Responder | None:
    """Who writes the recipe's answers; None where it has none written.

    Raises UsageError where the engine cannot decode with this teacher, or vLLM is missing.
    """
    data = recipe.data
    if not data.regenerate:
        return None
    if recipe.collect.responder == "vllm":
        return VllmResponder(recipe.teacher, teacher, recipe.collect.vllm, longest_sequence(teacher, data))
    devices = {parameter.device for parameter in teacher.model.parameters()}
    if teacher.loaded_weights.kind == "zero3" or len(devices) > 1:
        how = "shared out over ranks" if teacher.loaded_weights.kind == "zero3" else "spread over devices"
        raise UsageError(
            f"firp's engine answers with a whole teacher on one device, and this one is {how}: set "
            "collect.responder=vllm with collect.vllm.tensor_parallel_size=N"
        )
    return EngineResponder(teacher, data.batch_size)


def account_line(account: dict[str, Any]) -> str:
    """What became of the prompts, for the user."""
    parts = [f"{account[name]:,} {words}" for name, words in ACCOUNT.items() if name == "written" or account[name]]
    line = f"answers: {', '.join(parts)}"
    return (
        f"{line}\nthe first that failed: {account['failure']}; --resume tries them again" if account["failed"] else line
    )


class EngineResponder:
    """firp's own engine: plain greedy decoding in batches that are refilled, of the numbers that `generate` writes.

    Args:
        batch_size: prompts at once; halved where memory ends.
    """

    name = "engine"
    devices = 1
    active = True

    def __init__(self, teacher: Teacher, batch_size: int) -> None:
        self._refiller = ContinuousBatcher(teacher)
        self._steady = RetryingResponder(self._decode, batch_size)

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """As `Responder.reply`."""
        return self._steady.reply(prompts, limits)

    def close(self) -> None:
        """Let go of the K/V cache and its graphs."""
        self._refiller.forget()

    def _decode(self, prompts: list[Sequence[int]], limits: list[int], width: int) -> Iterator[Answer]:
        try:
            for item in self._refiller.decode(prompts, limits, width):
                failure = "" if item.finite else "NaN or infinity in the teacher's states"
                yield Answer(item.number, item.token_ids if item.finite else [], failure)
        except BaseException:
            self._refiller.forget()  # what an error left in the cache is of no use, and its memory is
            raise
