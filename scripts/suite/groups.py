"""Groups of parts as processes of their own: damage to a device or to memory ends with the process.

A group's process writes its results after every part, and during a part, to a file that its parent reads. If
a process ends early or hangs, its running part is marked as failed and the remaining parts of the group start in
another process. The parent never uses the device.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from firp_cli.results import plain
from suite.shapes import RANDOM
from suite.sizes import TOY
from suite.work import GRACE, OutOfTime, Part, Shared, Work, allowed, run_part

HANDED = ("bytes_per_second", "trees", "traces", "saved")  # names in `Shared.found` that go to other processes
STARTING = 90.0  # seconds of a process before and between its parts, at most
POLL = 0.2  # seconds between checks of a process
ENDING = 3.0  # seconds for a process to end after a signal
SAVED_EVERY = 0.5  # seconds between writes while a part runs
ENDED, BROKEN = 0, 3  # exit statuses: all parts have run; the device is unusable

Records = dict[str, dict[str, Any]]
Tell = Callable[[str], None]


@dataclass
class Found:
    """Results of the parts: records and tables by part, values for later parts, the device."""

    device: dict[str, Any] = field(default_factory=dict)
    records: Records = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)

    def take(self, other: dict[str, Any]) -> None:
        """Add the results that another process has written."""
        self.device = other["device"] or self.device
        self.records |= other["records"]
        self.tables |= other["tables"]
        self.given |= other["given"]


@dataclass
class Plan:
    """Parts that a process runs, and the parts after them.

    Attributes:
        parts: of this process. later: of other processes, for the shares. chosen: all parts of the run.
        until: time.monotonic() at which the run ends.
    """

    parts: list[Part]
    later: list[Part]
    chosen: list[Part]
    until: float


def run_parts(plan: Plan, shared: Shared, found: Found, write: Callable[[str | None, float], None], tell: Tell) -> bool:
    """Run parts one after the other; return False if one has left the device unusable.

    `write(part, until)` is called for every new result, with the running part and its deadline.
    """
    shared.found |= found.given
    for number, part in enumerate(plan.parts):
        missing = [
            other.name for other in plan.chosen if other.name in part.needs and not shared.found.get(other.gives)
        ]
        seconds = allowed(part, [*plan.parts[number + 1 :], *plan.later], plan.until - time.monotonic())
        until = time.monotonic() + seconds + 2 * GRACE
        last = 0.0

        def save(work: Work, record: dict[str, Any], name: str = part.name, until: float = until) -> None:
            nonlocal last
            found.records[name] = as_json(record)
            found.tables[name] = as_json([vars(table) for table in work.tables])
            found.given = as_json({key: shared.found[key] for key in HANDED if key in shared.found})
            if record["status"] != "running" or time.monotonic() - last > SAVED_EVERY:
                last = time.monotonic()
                write(name, until)

        least = 0.0 if shared.sizes is TOY else part.least
        work, record = run_part(part, shared, seconds, least, missing, save)
        if not record.get("fatal"):
            try:
                _clear(shared, plan.parts[number + 1 :])
                record["held_bytes"] = shared.held_bytes()
            except Exception as error:  # asynchronous errors of a part may surface only here
                record |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "fatal": True}
                record["traceback"] = traceback.format_exc().strip().splitlines()
        save(work, record)
        write(None, 0.0)
        tell(line(part.name, record))
        if record.get("fatal"):
            return False
    return True


def as_json(value: Any) -> Any:
    """Return a value as JSON. Values without a JSON form become text, so that no result is lost."""
    return json.loads(json.dumps(plain(value), default=str))


def _clear(shared: Shared, later: Sequence[Part]) -> None:
    """Free memory that the next part does not need."""
    name = later[0].name if later else ""
    if not (name.split(".")[0] in shared.sizes.shapes or name == "replay"):
        shared.free(RANDOM)
    shared.free()


def line(name: str, record: dict[str, Any]) -> str:
    """Return the line that is printed after a part."""
    reason = str(record.get("reason") or record.get("error") or "").partition("\n")[0]
    details = [text for text in (record["key"], reason, *record["cuts"]) if text]
    return f"{record['seconds']:6.1f} s  {name:<14} {record['status']:<8} {'; '.join(details)}"


def child(plan: Plan, make_shared: Callable[[], Shared], found: Found, path: Path, describe: Callable) -> int:
    """Run a group's parts and write to `path`. Returns the exit status of the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        raise OutOfTime

    ended: list[int] = []
    signal.signal(signal.SIGTERM, stop)
    own = Found(given=found.given)
    shared = make_shared()
    own.device = describe(shared)

    def write(part: str | None, until: float) -> None:
        values = {**plain(own), "part": part, "until": until}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)
        if ended:
            raise SystemExit(BROKEN)

    write(None, 0.0)
    return ENDED if run_parts(plan, shared, own, write, lambda text: print(text, flush=True)) else BROKEN


class Watch:
    """A process: its output, its result file, and its end.

    Args:
        forward: called with its output. changed: called with the content of its file when that is new.
        until: time.monotonic() at which it is ended in any case.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        path: Path,
        forward: Callable[[bytes], None],
        changed: Callable[[dict[str, Any]], None],
        until: float,
    ) -> None:
        assert process.stdout is not None
        self.process, self.output, self.path, self.until = process, process.stdout.fileno(), path, until
        self.forward, self.changed = forward, changed
        self.state: dict[str, Any] = {}
        self._stamp: int = 0

    def wait(self) -> str:
        """Wait for the end; return the reason of a failure, or nothing."""
        quiet, reason = time.monotonic(), ""
        try:
            while self.process.poll() is None:
                self._read(POLL)
                if self._look():
                    quiet = time.monotonic()
                if time.monotonic() > self._limit(quiet):
                    reason = "stopped: it did not end in time"
                    break
        finally:
            self._end()
            while self._read(0.0):
                pass
            self._look()
        status = self.process.returncode
        return reason or ("" if status == ENDED else f"its process ended with status {status}")

    def _limit(self, quiet: float) -> float:
        """Return the time of the next sign of progress that is required."""
        running = self.state.get("part") is not None
        return min(self.until, self.state["until"] if running else quiet + STARTING)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.output], [], [], seconds)
        text = os.read(self.output, 1 << 16) if ready else b""
        if text:
            self.forward(text)
        elif ready:
            time.sleep(seconds)  # no process writes any more
        return bool(text)

    def _look(self) -> bool:
        """Read the file if it is new."""
        try:
            stamp = self.path.stat().st_mtime_ns
            if stamp == self._stamp:
                return False
            self.state, self._stamp = json.loads(self.path.read_text(encoding="utf-8")), stamp
        except (OSError, ValueError):
            return False
        self.changed(self.state)
        return True

    def _end(self) -> None:
        """Ask the process to end, then force it, together with its children."""
        until = time.monotonic() + ENDING
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
        while self.process.poll() is None and time.monotonic() < until:
            self._read(POLL)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def remaining(parts: Sequence[Part], found: Found, reason: str) -> list[Part]:
    """Return the parts of an ended process that are still to run; its running part has failed. If no part was begun,
    the first one has failed too: a process that cannot start is not started again and again.
    """
    running = [part for part in parts if found.records.get(part.name, {}).get("status") == "running"]
    left = [part for part in parts if part.name not in found.records]
    if reason and not running and len(left) == len(parts):
        running, left = left[:1], left[1:]
    for part in running:
        record = {"seconds": 0.0, "key": "", "cuts": [], "result": {}} | found.records.get(part.name, {})
        found.records[part.name] = record | {"status": "failed", "error": reason or "its process ended"}
        found.tables.setdefault(part.name, [])
    return left
