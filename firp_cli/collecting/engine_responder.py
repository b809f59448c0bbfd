"""Answers from firp's own engine, and the choice of the responder that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from firp_cli.collecting.corpus import longest_sequence
from firp_cli.collecting.responders import Answer, Responder, RetryingResponder
from firp_cli.collecting.vllm import VllmResponder
from firp_cli.config import Recipe
from firp_cli.decoding.continuous import ContinuousBatcher
from firp_cli.errors import UsageError
from firp_cli.teacher.teacher import Teacher


def make_responder(recipe: Recipe, teacher: Teacher) -> Responder | None:
    """Return the responder that writes the recipe's answers; None without `data.regenerate`.

    Raises UsageError when the engine cannot decode with this teacher, or vLLM is missing.
    """
    data = recipe.data
    if not data.regenerate:
        return None
    if recipe.collect.responder == "vllm":
        return VllmResponder(recipe.teacher, teacher, recipe.collect.vllm, longest_sequence(teacher, data))
    devices = {parameter.device for parameter in teacher.model.parameters()}
    if teacher.loaded_weights.kind == "zero3" or len(devices) > 1:
        how = "sharded over ranks" if teacher.loaded_weights.kind == "zero3" else "spread over devices"
        raise UsageError(
            f"firp's engine needs a whole teacher on one device, and this one is {how}: set "
            "collect.responder=vllm with collect.vllm.tensor_parallel_size=N"
        )
    return EngineResponder(teacher, data.batch_size)


class EngineResponder:
    """Writes greedy answers with firp's own engine: autoregressive decoding in batches that are refilled.

    The answers are those that `firp generate` writes.

    Args:
        batch_size: prompts at once; halved when memory runs out.
    """

    name = "engine"
    devices = 1
    active = True

    def __init__(self, teacher: Teacher, batch_size: int) -> None:
        self._batcher = ContinuousBatcher(teacher)
        self._retrying = RetryingResponder(self._decode, batch_size)

    def reply(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """Answer as `Responder.reply` describes."""
        return self._retrying.reply(prompts, limits)

    def close(self) -> None:
        """Free the K/V cache and its CUDA graphs."""
        self._batcher.forget()

    def _decode(self, prompts: list[Sequence[int]], limits: list[int], width: int) -> Iterator[Answer]:
        try:
            for item in self._batcher.decode(prompts, limits, width):
                failure = "" if item.finite else "NaN or infinity in the teacher's states"
                yield Answer(item.number, item.token_ids if item.finite else [], failure)
        except BaseException:
            self._batcher.forget()  # after an error its cache is useless, and its memory is needed
            raise
