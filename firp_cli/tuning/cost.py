"""Cost of a pass on this machine: M rows through the lower layers, the upper layers and the head, measured over row
counts, context lengths and batch sizes. Points are added until linear interpolation predicts those between them.

Shapes: B sequences, M rows of each, d hidden size.
"""

from __future__ import annotations

import json
import logging
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from firp_cli.decoding.sequences import check_fits
from firp_cli.evaluation.environment import machine_key, measurement_environment
from firp_cli.evaluation.timing import Run, captured, enough_calls, milliseconds, undisturbed
from firp_cli.files import cache_folder, os_reason, write_json
from firp_cli.provenance import fingerprint
from firp_cli.results import Progress, as_json, no_progress
from firp_cli.teacher.attention import choose_backend
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import KernelMask, Mask, step_mask
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import CostCheck, CostCurve, CostReport

LOG = logging.getLogger("firp")  # the program prints it on stderr
PARTS = ("lower", "upper", "head")
TOLERANCE = 0.05  # relative error of the whole pass, between two measured points
ROUNDS, LEAST_ROUNDS = 8, 2
POINTS = 6  # expected row counts of a curve
DEEPEST = 8  # largest distance of a row from the prefix, in tokens, as in a tree
SECONDS, SECONDS_CUDA = 50.0, 15.0  # of all curves together
Times = tuple[float, float, float]  # milliseconds of the three parts


def check_cache(teacher: Teacher, batch: int, context: int, most_rows: int) -> dict[str, Any]:
    """Return the arguments of the K/V cache of such passes. Raises CapacityError when it does not fit into memory."""
    shape: dict[str, Any] = {
        "layers": teacher.num_layers,
        "batch": batch,
        "scratch": most_rows,
        "capacity": context,
        "heads": teacher.kv_heads,
        "head_size": teacher.head_size,
        "dtype": teacher.dtype,
    }
    check_fits(KVCache.bytes_needed(**shape), batch, context, teacher.device)
    return shape


class CostProbe:
    """Passes after `context` committed tokens of `batch` sequences, which can be run again and again for timing.

    Args:
        split: layers of the lower part. most_rows: rows of the largest pass. Raises CapacityError.
    """

    def __init__(
        self, teacher: Teacher, split: int, batch: int, context: int, most_rows: int, kernel: bool = False
    ) -> None:
        self.teacher, self.split, self.batch, self.context, self.kernel = teacher, split, batch, context, kernel
        shape = check_cache(teacher, batch, context, most_rows)
        self.cache = KVCache(**shape, device=teacher.device)
        self.cache.fill(context)

    @torch.inference_mode()
    def parts(self, rows: int) -> dict[str, Run]:
        """Return the three parts of a pass of `rows` rows by name; each runs independently of the others."""
        teacher, device = self.teacher, self.teacher.device
        numbers = torch.arange(rows, device=device)
        positions = self.cache.lengths[:, None] + numbers.clamp(max=DEEPEST)
        hidden = teacher.embed(((numbers + 1) % teacher.vocab_size).expand(self.batch, rows))
        rotary = teacher.rotary(hidden, positions)
        mask: Mask | None = None  # as in decoding without the kernel: one row sees every slot
        seen = torch.ones(rows, rows, dtype=torch.bool, device=device).tril().expand(self.batch, rows, rows)
        if self.kernel:
            mask = KernelMask(seen, positions, self.cache.lengths, self.context)
        elif rows > 1 or any(window is not None for window in teacher.windows):
            slots = self.cache.prefix_slots(self.context)
            mask = step_mask(seen, positions, self.cache.lengths, slots, teacher.dtype, exact=True)

        def layers(first: int, last: int, states: torch.Tensor) -> torch.Tensor:
            self.cache.begin(rows, self.context)
            return teacher.layers_between(first, last, states, rotary, positions, mask, self.cache)

        between = layers(0, self.split, hidden)
        last = layers(self.split, teacher.num_layers, between)
        return {
            "lower": torch.inference_mode()(lambda: layers(0, self.split, hidden)),
            "upper": torch.inference_mode()(lambda: layers(self.split, teacher.num_layers, between)),
            "head": torch.inference_mode()(lambda: teacher.head(teacher.norm(last))),
        }


class _Curve:
    """Measurement of one curve. Times are relative to a pass of one row in the same rounds, so that a temporary
    slowdown of the machine does not change the curve's shape.

    Args:
        seconds: time for one row count; long passes are repeated less often.
    """

    def __init__(self, passes: CostProbe, seconds: float = float("inf")) -> None:
        self.passes, self.seconds, self.device = passes, seconds, passes.teacher.device
        self.ones: list[float] = []
        self.times: dict[int, Times] = {}  # by row count, relative to a pass of one row
        self.checks: list[tuple[int, float, float]] = []  # row count; predicted and measured time, relative
        self._one = self._ready(1)
        self.measure(1)

    def _ready(self, rows: int) -> list[tuple[Run, int]]:
        runs = [captured(run, self.device) for run in self.passes.parts(rows).values()]
        return [(run, enough_calls(run, self.device)) for run in runs]

    def measure(self, rows: int) -> Times:
        """Return the times of a row count; measure them at the first call."""
        if rows not in self.times:
            until = time.perf_counter() + self.seconds
            runs = self._one if rows == 1 else self._ready(rows)
            ones: list[float] = []
            times: list[list[float]] = [[] for _ in PARTS]
            for turn in range(ROUNDS):
                if turn >= LEAST_ROUNDS and time.perf_counter() > until:
                    break
                ones.append(sum(self._time(run, calls) for run, calls in self._one))
                for part, (run, calls) in zip(times, runs, strict=True):
                    part.append(self._time(run, calls))
            one = undisturbed(ones)
            self.ones.append(one)
            lower, upper, head = (undisturbed(part) / one for part in times)
            self.times[rows] = (lower, upper, head)
        return self.times[rows]

    def _time(self, run: Run, calls: int) -> float:
        return milliseconds(run, calls, self.device, warm=max(1, calls // 2))

    def refine(self, most: int, until: float) -> None:
        """Halve the intervals between row counts until the middle of each is predicted, or `until` is reached."""
        knots = sorted({1, min(2, most), most})
        for rows in knots:
            self.measure(rows)
        open_intervals = list(pairwise(knots[1:]))
        while open_intervals and time.perf_counter() < until:
            low, high = open_intervals.pop(0)
            middle = max(low + 1, round((low * high) ** 0.5))
            if middle >= high:
                continue
            predicted = sum(_between(middle, low, high, self.times[low], self.times[high]))
            measured = sum(self.measure(middle))
            if abs(predicted / measured - 1) <= TOLERANCE:
                del self.times[middle]
                self.checks.append((middle, predicted, measured))
            else:
                open_intervals += [(low, middle), (middle, high)]

    def curve(self) -> CostCurve:
        """Return the measured points in milliseconds."""
        one, rows = median(self.ones), sorted(self.times)
        lower, upper, head = ([one * self.times[count][place] for count in rows] for place in range(len(PARTS)))
        return CostCurve(self.passes.batch, self.passes.context, rows, lower, upper, head)

    def checked(self) -> list[CostCheck]:
        """Return the points that were predicted, and are not part of the curve."""
        one, batch, context = median(self.ones), self.passes.batch, self.passes.context
        return [
            CostCheck(batch, context, rows, one * predicted, one * measured)
            for rows, predicted, measured in self.checks
        ]


def measure_rows(teacher: Teacher, split: int, context: int, counts: Sequence[int]) -> CostCurve:
    """Measure passes of exactly these row counts, one of them 1, of one sequence. Arguments: see `CostProbe`."""
    kernel = choose_backend("auto", teacher.device, teacher.own_masks) == "triton"
    curve = _Curve(CostProbe(teacher, split, 1, context, max(counts), kernel))
    for rows in counts:
        curve.measure(rows)
    return curve.curve()


def _between(place: float, low: float, high: float, at_low: Sequence[float], at_high: Sequence[float]) -> list[float]:
    """Interpolate linearly at `place` between the values at `low` and `high`."""
    share = (place - low) / (high - low) if high > low else 0.0
    return [one + share * (two - one) for one, two in zip(at_low, at_high, strict=True)]


def measure_cost(
    teacher: Teacher,
    split: int,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (256,),
    most_rows: int = 64,
    seconds: float | None = None,
    attention: str = "auto",
    graphs: bool = True,
    progress: Progress = no_progress,
) -> CostReport:
    """Measure passes of 1 to `most_rows` rows per sequence at every batch size and context.

    Args:
        split: layers of the lower part, 0..L. seconds: time to measure; after it no points are added.

    Raises CapacityError when a K/V cache does not fit into memory.
    """
    began = time.perf_counter()
    until = began + (seconds or (SECONDS_CUDA if teacher.device.type == "cuda" else SECONDS))
    kernel = choose_backend(attention, teacher.device, teacher.own_masks) == "triton"
    report = CostReport(
        environment=measurement_environment(teacher),
        machine=machine_key(teacher, attention, graphs),
        teacher=teacher.describe(),
        split=split,
        layers=teacher.num_layers,
        curves=[],
        checks=[],
        seconds=0.0,
    )
    grid = _Grid(teacher, report, most_rows, kernel, until, progress)
    grid.measure(batches, contexts)
    grid.check_between()
    return replace(report, seconds=time.perf_counter() - began)


class _Grid:
    """Curves at every batch size and context; a curve is added where interpolation between two of them fails."""

    def __init__(
        self, teacher: Teacher, report: CostReport, most_rows: int, kernel: bool, until: float, progress: Progress
    ) -> None:
        self.teacher, self.report, self.most_rows, self.kernel = teacher, report, most_rows, kernel
        self.until, self.progress = until, progress

    def measure(self, batches: Sequence[int], contexts: Sequence[int]) -> None:
        """Measure the missing curves at these batch sizes and contexts."""
        known = {(curve.batch_size, curve.context) for curve in self.report.curves}
        places = sorted({(batch, context) for batch in batches for context in contexts} - known)
        for number, place in enumerate(places):
            share = max(0.0, self.until - time.perf_counter()) / (len(places) - number)
            until = time.perf_counter() + share
            curve = self._curve(*place, self.most_rows, share / POINTS)
            curve.refine(self.most_rows, until)
            self.report.curves.append(curve.curve())
            self.report.checks += curve.checked()
            self.progress(len(known) + number + 1, len(known) + len(places))

    def check_between(self) -> None:
        """Check the middle of neighbouring contexts and batch sizes, and add curves where the prediction is wrong."""
        for low, high in pairwise(CostModel(self.report).contexts):
            middle = round((low * high) ** 0.5)
            if high - low > 1 and not self._is_predicted(CostModel(self.report).batches[0], middle):
                self.measure(CostModel(self.report).batches, [middle])
        for low, high in pairwise(CostModel(self.report).batches):
            middle = round((low * high) ** 0.5)
            if high - low > 1 and not self._is_predicted(middle, CostModel(self.report).contexts[0]):
                self.measure([middle], CostModel(self.report).contexts)

    def _is_predicted(self, batch: int, context: int) -> bool:
        """Return whether the curves predict a pass between them; it is then recorded as a check. True when no time
        remains.
        """
        remaining = self.until - time.perf_counter()
        if remaining <= 0:
            return True
        rows = max(1, round(self.most_rows**0.5))
        curve = self._curve(batch, context, rows, remaining / POINTS)
        shares = curve.measure(rows)
        predicted = sum(CostModel(self.report).parts(rows, batch, context))
        check = CostCheck(batch, context, rows, predicted, median(curve.ones) * sum(shares))
        good = abs(check.error) <= TOLERANCE
        if good:
            self.report.checks.append(check)
        return good

    def _curve(self, batch: int, context: int, rows: int, seconds: float) -> _Curve:
        passes = CostProbe(self.teacher, self.report.split, batch, context, rows, self.kernel)
        return _Curve(passes, seconds)


class CostModel:
    """Times of passes by linear interpolation between the row counts, contexts and batch sizes of a report."""

    def __init__(self, report: CostReport) -> None:
        self.report = report
        self._curves = {(curve.batch_size, curve.context): curve for curve in report.curves}
        self.batches = sorted({batch for batch, _ in self._curves})
        self.contexts = sorted({context for _, context in self._curves})

    def parts(self, rows: int, batch: int, context: int) -> list[float]:
        """Return the milliseconds of the lower layers, the upper layers and the head for `rows` rows per sequence."""

        def at_context(size: int, where: int) -> list[float]:
            curve = self._curves[size, where]
            return _along(rows, curve.rows, list(zip(curve.lower, curve.upper, curve.head, strict=True)))

        def at_batch(size: int) -> list[float]:
            return _along(context, self.contexts, [at_context(size, where) for where in self.contexts])

        return [max(0.0, value) for value in _along(batch, self.batches, [at_batch(size) for size in self.batches])]

    def layers(self, rows: Sequence[int], batch: int, context: int) -> float:
        """Return the milliseconds of all layers, where layer l runs `rows[l]` rows per sequence."""
        split, total = self.report.split, 0.0
        sizes = {count: self.parts(count, batch, context) for count in set(rows)}
        for number, count in enumerate(rows):
            lower, upper, _ = sizes[count]
            total += lower / split if number < split else upper / (len(rows) - split)
        return total


def _along(place: float, knots: Sequence[int], values: Sequence[Sequence[float]]) -> list[float]:
    """Interpolate piecewise linearly at `place`. After the last knot the last piece is extended; before the first knot
    the values are constant.
    """
    if len(knots) == 1 or place <= knots[0]:
        return list(values[0])
    upper = min(bisect_right(knots, place), len(knots) - 1)
    return _between(place, knots[upper - 1], knots[upper], values[upper - 1], values[upper])


def saved_cost(teacher: Teacher, split: int, asked: dict[str, Any], key: dict[str, Any]) -> Path:
    """Return the file that keeps the report of such a measurement. `asked`: batches, contexts and rows."""
    name = fingerprint({"machine": key, "teacher": teacher.fingerprint, "split": split, **asked})
    return cache_folder() / "costs" / f"{name}.json"


def load_or_measure(
    teacher: Teacher,
    split: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    most_rows: int,
    *,
    again: bool = False,
    attention: str = "auto",
    graphs: bool = True,
    seconds: float | None = None,
    progress: Progress = no_progress,
) -> tuple[CostReport, bool]:
    """Return the report of an earlier measurement on the same machine with the same teacher, else measure and keep it.

    `again`: measure in any case. A report that cannot be kept gets a line. The second value is True for an earlier one.
    """
    key = machine_key(teacher, attention, graphs)
    asked = {"batches": list(batches), "contexts": list(contexts), "rows": most_rows}
    path = saved_cost(teacher, split, asked, key)
    if not again:
        try:
            return CostReport.from_json(json.loads(path.read_text(encoding="utf-8"))), True
        except (OSError, ValueError, TypeError, KeyError):
            pass  # there is none, or it is damaged: measure
    report = measure_cost(teacher, split, batches, contexts, most_rows, seconds, attention, graphs, progress)
    try:
        write_json(path, as_json(report))
    except OSError as error:
        LOG.info(f"{path.parent} cannot be written ({os_reason(error)}): the next tuning measures the costs again")
    return report, False
