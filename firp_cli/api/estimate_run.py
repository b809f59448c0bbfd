"""`estimate_collect`: disk and time of a collection, as `firp collect --estimate` prints them.

Times are measured where the teacher's weights are at hand and fit into memory. Else they follow from its shape, by
the assumptions of training/time_model.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from firp_cli.api.collect_run import CollectRun, check_collect, chosen_layers, load_collecting, resolve_collect
from firp_cli.collecting.collect_store import check_layers, stored_dtype
from firp_cli.collecting.corpus import load_messages, longest_sequence
from firp_cli.collecting.engine_responder import make_responder
from firp_cli.collecting.estimate import Amount, CollectEstimate, Way, count, estimate, fill
from firp_cli.collecting.responders import Responder
from firp_cli.config import Recipe
from firp_cli.data.hub import UnreachableError
from firp_cli.errors import TeacherError, UsageError, first_line
from firp_cli.machine import default_device, free_bytes, readable_bytes
from firp_cli.teacher.load import load_tokenizer
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.plan import skeleton
from firp_cli.training.time_model import Throughput, answer_flops, forward_flops

LOG = logging.getLogger("firp")
RESPONDERS = ("engine", "vllm")


def estimate_collect(
    recipe: Recipe | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
    output: str | Path | None = None,
    ranks: int = 1,
) -> CollectEstimate:
    """Estimate disk and time of `collect` on `ranks` ranks; writes nothing.

    Loads the teacher and runs a sample. A teacher that does not fit into memory, or whose weights are not at hand, is
    estimated from its shape. Raises FirpError for a recipe, data set or teacher that cannot be used.
    """
    run = resolve_collect(recipe, overrides, layers, output)
    check_collect(run, estimating=True)
    return run_estimate(run, ranks)


def run_estimate(run: CollectRun, ranks: int = 1) -> CollectEstimate:
    """Estimate a run that `check_collect` has passed, in this process and with its number of threads."""
    whole = run.recipe.teacher.model_copy(update={"sharding": "none"})  # no other rank takes part
    recipe = run.recipe.model_copy(update={"teacher": whole})
    shape, _ = skeleton(whole)
    reason = "" if shape is None else _too_large(shape)
    if not reason:
        try:
            teacher = load_collecting(recipe)
        except TeacherError as error:
            if shape is None or not isinstance(error.__cause__, OSError):
                raise
            reason = first_line(error)
    if reason:
        assert shape is not None
        return _computed(run, shape, ranks, reason)
    responders, refused = _responders(recipe, teacher)
    layers, dtype = check_layers(chosen_layers(run, teacher), teacher), stored_dtype(teacher, recipe.data)
    figures = estimate(teacher, recipe.data, layers, dtype, run.store, responders, ranks)
    return replace(figures, ways=[*figures.ways, *refused])


def _too_large(shape: Teacher) -> str:
    """Return why the teacher cannot be loaded on this machine's device; '' where its weights fit."""
    needed, free = sum(parameter.nbytes for parameter in shape.model.parameters()), free_bytes(default_device())
    if free is None or needed <= free:
        return ""
    return f"{shape.name} has {readable_bytes(needed)} of weights, {readable_bytes(free)} are free here"


def _responders(recipe: Recipe, teacher: Teacher) -> tuple[list[Responder], list[Way]]:
    """Return the responders that can be timed here, that of the recipe first, and the others with their reasons."""
    ready: list[Responder] = []
    refused: list[Way] = []
    chosen = recipe.collect.responder
    for name in sorted(RESPONDERS, key=lambda name: name != chosen) if recipe.data.regenerate else ():
        collecting = recipe.collect.model_copy(update={"responder": name})
        try:
            responder = make_responder(recipe.model_copy(update={"collect": collecting}), teacher)
            assert responder is not None
            ready.append(responder)
        except UsageError as error:
            refused.append(Way(name, None, first_line(error)))
    if recipe.data.regenerate and not ready:
        raise UsageError(refused[0].note)
    if ready and ready[0].name != chosen:
        LOG.info(f"{chosen} cannot be timed here, the hours are those of {ready[0].name}: {refused[0].note}")
    return ready, refused


def _computed(run: CollectRun, shape: Teacher, ranks: int, reason: str) -> CollectEstimate:
    """Estimate from the teacher's shape alone."""
    recipe, reached = run.recipe, Throughput()
    data = recipe.data
    amount, counted = _amount(shape, recipe)
    mean = amount.tokens / max(1, amount.conversations)
    rate = reached.peak_flops * reached.utilisation / forward_flops(shape, 0, mean)
    ways: list[Way] = []
    if data.regenerate:
        per_second = ranks * reached.peak_flops * reached.answer_utilisation
        answering = answer_flops(recipe, shape, amount.answers) / per_second
        ways.append(Way(recipe.collect.responder, answering + amount.tokens / rate / ranks, "computed"))
        ways += [replace(ways[0], name=name) for name in RESPONDERS if name != recipe.collect.responder]
        if recipe.teacher.sharding == "zero3":
            refused = Way("engine", None, "needs a whole teacher on one device, and this one is sharded")
            ways = [refused if way.name == "engine" else way for way in ways]
    layers, dtype = check_layers(chosen_layers(run, shape), shape), stored_dtype(shape, data)
    figures = fill(amount, shape, data, layers, dtype, run.store, ranks, rate, ways)
    how = (
        f"devices of {reached.peak_flops / 1e12:.0f} TFLOP/s, {reached.utilisation:.0%} of it reached"
        f"{f', {reached.answer_utilisation:.0%} in answering' if data.regenerate else ''}"
    )
    return replace(figures, computed=f"not measured: {reason}\ncomputed for {how}{counted}")


def _amount(shape: Teacher, recipe: Recipe) -> tuple[Amount, str]:
    """Return the amount, and a line on what was not counted: without data set or tokenizer every conversation has the
    most tokens that it may have. Raises DatasetError where the number of conversations is unknown.
    """
    data, rows, given = recipe.data, recipe.data.limit, False
    try:
        found = load_messages(data)
        rows, given = len(found), any(row.conversation.answered for row in found)
        shape.tokenizer = load_tokenizer(recipe.teacher)
        return count(shape, data), ""
    except (UnreachableError, TeacherError) as error:
        if rows is None:
            raise
        length = longest_sequence(shape, data)
        amount = Amount(rows, rows * length, rows if data.regenerate else 0, rows, given=given)
        return amount, f"\n{length} tokens of each conversation, at most: {first_line(error)}"
