"""A part of the suite: its time, its results, and the values that parts share."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from suite.sizes import Sizes

TRACEBACK_LINES = 12
GRACE = 5.0  # seconds beyond its time before a part is stopped
AGAIN = 1.0  # seconds after which a part that caught that is stopped again
NOT_SERIOUS = ("OutOfMemoryError",)  # errors that name CUDA but leave the device usable


class OutOfTime(BaseException):
    """A part took longer than allowed, or its process must end. Not an Exception, so that no handler of a part catches
    it.
    """


class Skipped(Exception):
    """A part cannot run here; the text is the reason."""


class Failed(Exception):
    """A part ran and found an error; the text names it."""


@dataclass
class Table:
    """A table of the Markdown report."""

    title: str
    headers: list[str]
    cells: list[list[str]] = field(default_factory=list)


class Clock:
    """Time of a part, and work skipped for lack of it."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.perf_counter(), seconds
        self.cuts: list[str] = []

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def left(self) -> float:
        return self.seconds - self.spent()

    def allows(self, seconds: float, what: str) -> bool:
        """Return True if there is time for work of about so many seconds; otherwise record it as skipped."""
        left = self.left()
        if left >= seconds:
            return True
        self.cuts.append(f"{what}: needs about {seconds:.0f} s, {max(0.0, left):.0f} s remain")
        return False


@dataclass
class Work:
    """A running part. Its results are kept when it is stopped or fails.

    Attributes:
        values: for the JSON. key: its main figure in one line. tables: for the Markdown.
        save: writes the results so far, so that they outlive the process.
    """

    clock: Clock
    values: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    tables: list[Table] = field(default_factory=list)
    save: Callable[[], None] = lambda: None


Save = Callable[[Work, dict[str, Any]], None]


@dataclass
class Shared:
    """Values that parts pass to later ones.

    Attributes:
        root: the checkout. data_dir: folder of data sets. teacher: name, folder or file of a real teacher; None: one is
            trained. predictors: folders of predictors for it that are benched as well. tokens: to answer at most.
        scratch: folder of files for later parts. output: folder of the report; None: nothing is kept.
        found: values for later parts, by name; those of HANDED also go to other processes.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    root: Path
    data_dir: str | None = None
    teacher: str | None = None
    predictors: Sequence[Path] = ()
    tokens: int = 0
    scratch: Path | None = None
    output: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def free(self, *names: str) -> None:
        """Drop the values for later parts, and free their memory."""
        for name in names:
            self.found.pop(name, None)
        if self.device.type == "cuda":  # on a CPU models are toys, and a search for cycles takes longer than many parts
            gc.collect()
            torch.cuda.empty_cache()

    def held_bytes(self) -> int | None:
        """Return bytes of a GPU's memory in tensors: after a part, the values for later parts and a random teacher.
        None on CPUs.
        """
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        share: of the time, relative to the other parts. group: consecutive parts of one group share a
            process. least: seconds below which it is not begun at full size. most: seconds at most.
        needs: parts whose results it needs. gives: the name of its result in `Shared.found`.
    """

    name: str
    run: Callable[[Shared, Work], None]
    share: float
    group: str = ""
    least: float = 5.0
    most: float | None = None
    needs: tuple[str, ...] = ()
    gives: str = ""


def select(parts: Sequence[Part], wanted: Sequence[str] | None) -> list[Part]:
    """Return the named parts, each after the parts that it needs; `NAME.` parts are selected by NAME. None: all.

    Raises ValueError naming the parts that exist.
    """
    names = {part.name for part in parts}
    groups = {name.split(".")[0] for name in names}
    unknown = [name for name in wanted or () if name not in names | groups]
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join(part.name for part in parts)}")
    chosen = {name for name in names if wanted is None or {name, name.split(".")[0]} & set(wanted)}
    while more := {need for part in parts if part.name in chosen for need in part.needs} - chosen:
        chosen |= more
    return [part for part in parts if part.name in chosen]


def allowed(part: Part, later: Sequence[Part], left: float) -> float:
    """Return seconds for a part: its share of the time that remains for it and the later ones, which get what it does
    not use.
    """
    seconds = max(0.0, left) * part.share / (part.share + sum(other.share for other in later))
    return seconds if part.most is None else min(max(0.0, left), part.most)


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in their order, cut where the group changes."""
    return [list(found) for _, found in groupby(parts, key=lambda part: part.group)]


def run_part(
    part: Part, shared: Shared, seconds: float, least: float, missing: Sequence[str], save: Save = lambda *_: None
) -> tuple[Work, dict[str, Any]]:
    """Run a part within its seconds. Its record contains the outcome; `fatal` marks a process that can no longer use
    its device. `save(work, record)` is called while it runs.
    """
    work = Work(Clock(seconds))
    record: dict[str, Any] = {"status": "done", "allowed_seconds": round(seconds, 1)}
    work.save = lambda: save(work, described(work, record | {"status": "running"}))
    work.save()
    try:
        if missing:
            raise Skipped(f"{', '.join(missing)} gave no result")
        if seconds < least:
            raise Skipped(f"needs at least {least:.0f} s, {seconds:.0f} s remain")
        with stopped_after(seconds + GRACE):
            part.run(shared, work)
    except Skipped as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    except OutOfTime:
        work.clock.cuts.append(f"stopped after {work.clock.spent():.0f} s")
    except Exception as error:  # the other parts continue
        lines = traceback.format_exc().strip().splitlines()
        record |= {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "traceback": lines[-TRACEBACK_LINES:],
        }
        if is_fatal(error):
            record["fatal"] = True
    if record["status"] == "done" and work.clock.cuts:
        record["status"] = "cut"
    return work, described(work, record)


def described(work: Work, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the results of the part so far."""
    spent = round(work.clock.spent(), 1)
    return record | {"seconds": spent, "key": work.key, "cuts": work.clock.cuts, "result": work.values}


def is_fatal(error: BaseException) -> bool:
    """Return True for a CUDA error after which every call in this process fails."""
    kind = type(error).__name__
    if kind in NOT_SERIOUS:
        return False
    return kind == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the enclosed code once the seconds are over, and again if it was caught. Outside the main
    thread nothing is stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    former = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        signal.setitimer(signal.ITIMER_REAL, *before)
