"""Whether pipelining pays on the text and machine at hand: where it does not, plain decoding takes over for a while."""

from __future__ import annotations

from collections import deque
from statistics import median

# Before anything was measured a tick is taken to cost at most this many loops of one token, and a pipe fuller than this
# many tokens per tick to pay.
DOUBTED_TICK = 2.5
UNDOUBTED_RATE = 0.75
CALIBRATION = 8  # plain steps that tell what they cost
FIRST_REST = 32  # tokens decoded one by one before the pipeline is tried again; doubled each time it fails again
LONGEST_REST = 1024


class Guard:
    """Compares tokens per tick with what a tick costs in plain steps, both measured while decoding. Tokens never
    change, only who makes them.

    Plain steps are timed the first time that the pipe is emptier than DOUBTED_TICK / r (at most UNDOUBTED_RATE) tokens
    per tick, or at once where the loops share nothing.

    Args:
        loops: r. shared: the loops share their parameters.
    """

    def __init__(self, loops: int, shared: bool = True) -> None:
        self.doubted = min(DOUBTED_TICK / loops, UNDOUBTED_RATE) if shared else float("inf")
        self.window = 4 * loops  # ticks that are judged together
        self._rates: deque[float] = deque(maxlen=self.window)
        self._ticks: deque[float] = deque(maxlen=self.window)
        self._steps: deque[float] = deque(maxlen=2 * CALIBRATION)
        self._rate = 0.0
        self._rest = 0
        self._next_rest = FIRST_REST

    @property
    def pipelining(self) -> bool:
        """True while tokens should go through the pipeline."""
        return self._rest <= 0

    @property
    def needed(self) -> float | None:
        """Tokens per tick at which pipelining breaks even; None before plain steps were timed."""
        return median(self._ticks) / median(self._steps) if self._ticks and len(self._steps) >= CALIBRATION else None

    def ticked(self, rate: float, seconds: float) -> None:
        """Note a tick that emitted `rate` tokens per sequence."""
        self._rates.append(rate)
        self._ticks.append(seconds)
        if len(self._rates) < self.window:
            return
        self._rate = sum(self._rates) / len(self._rates)
        needed = self.needed
        if needed is None and self._rate < self.doubted:
            self._rest = CALIBRATION
            self._rates.clear()
        elif needed is not None:
            self._judge(needed)

    def decoded(self, seconds: float) -> None:
        """Note a token per sequence that was decoded without the pipeline."""
        calibrating = self.needed is None
        self._steps.append(seconds)
        self._rest -= 1
        if calibrating and self._rest <= 0 and (needed := self.needed) is not None:
            self._judge(needed)

    def _judge(self, needed: float) -> None:
        """Rest where the last window did not pay; else start again from the shortest rest."""
        if self._rate >= needed:
            self._next_rest = FIRST_REST
            return
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
        self._rates.clear()
