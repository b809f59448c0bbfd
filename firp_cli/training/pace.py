"""How far a run is: by its optimizer steps and, where `training.max_minutes` limits it, by the clock."""

from __future__ import annotations

import time


class Pace:
    """Place of a run between 0 and `total` planned optimizer steps. The learning rate and the end follow it.

    The place is the number of steps taken or, in a run that is limited to `seconds`, the share of them that is spent
    times `total`, whichever is larger: a run that the clock ends has gone through its whole schedule.
    """

    def __init__(self, total: int, seconds: float | None = None) -> None:
        self.total, self.seconds = total, seconds
        self.step = self.place = 0
        self._before = -1
        self._spent = 0.0
        self._began: float | None = None

    def resume(self, step: int, spent: float) -> None:
        """Go on after optimizer step `step` of a run that has spent so many seconds."""
        self._spent = spent
        self.move(step, spent)
        self._before = self.place - 1

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._began is None:
            self._began = time.monotonic()

    def clock(self) -> float:
        """Seconds spent by this process's clock, those before a resume included."""
        return self._spent if self._began is None else self._spent + time.monotonic() - self._began

    def move(self, step: int, spent: float) -> int:
        """Set the place after optimizer step `step`, when so many seconds are spent, and return it."""
        self._before, self.step, self.place = self.place, step, step
        if self.seconds is not None:
            self.place = min(self.total, max(step, int(self.total * spent / self.seconds)))
        return self.place

    @property
    def ended(self) -> bool:
        """Whether the last step has been taken or the time is over."""
        return self.place >= self.total

    def passed(self, every: int) -> bool:
        """Whether the last move reached or passed a multiple of `every`."""
        return self.place // every > self._before // every

    @property
    def expected(self) -> int:
        """Optimizer steps that the run will have at its end, at its speed so far."""
        return self.total if self.place <= self.step else round(self.step * self.total / self.place)
