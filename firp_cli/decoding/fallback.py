"""Fallback to autoregressive decoding while drafting is slower on the given text and machine."""

from __future__ import annotations

from collections import deque
from statistics import fmean, median

# Cost of a tick of r loops in autoregressive steps before any is measured: the first over r, at most the second. A pipe
# that emits more tokens per tick is not doubted.
TICK_COST, MOST_TICK_COST = 2.5, 0.75
WINDOW = 48  # speculative steps that are judged together
TRIAL = 5  # speculative steps after which speculation may be given up, if it clearly loses
CLEARLY = 2.0  # standard errors of the mean
TIMED = 5  # autoregressive steps that give their time: its median is right if two of them are captured or disturbed
RETIMED = 512  # speculative steps after which autoregressive ones are timed again
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # autoregressive steps until speculation is tried again; doubled at each failure
UNKNOWN = NEVER = float("inf")


def tree_fallback(cost: float = UNKNOWN) -> AutoregressiveFallback:
    """Return the fallback of draft trees. `cost`: predicted cost of a drafted step in autoregressive ones."""
    return AutoregressiveFallback(cost)


def pipeline_fallback(loops: int, shared: bool = True) -> AutoregressiveFallback:
    """Return the fallback of a pipeline of r `loops`. Timing empties the pipe, so a full one is not timed. Without
    `shared` loops a tick reads as many weights as a whole autoregressive step.
    """
    cost = min(TICK_COST / loops, MOST_TICK_COST) if shared else UNKNOWN
    return AutoregressiveFallback(cost, window=4 * loops, trial=4 * loops, timed_after=NEVER)


class AutoregressiveFallback:
    """Decides between speculative steps (a tick, a step with a draft tree) and autoregressive ones.

    Speculation pays while the mean tokens of its steps exceed their cost in autoregressive steps. The cost is the ratio
    of their median times, once autoregressive steps were timed: that is done before speculation is given up, and from
    time to time. The tokens are the same either way.

    Args:
        cost: of a speculative step in autoregressive ones until it is measured.
        window, trial: see WINDOW and TRIAL. timed_after: speculative steps until autoregressive ones are timed.
    """

    def __init__(self, cost: float, window: int = WINDOW, trial: int = TRIAL, timed_after: float = WINDOW) -> None:
        self._assumed, self._trial, self._until_timed = cost, trial, timed_after
        self._rates: deque[float] = deque(maxlen=window)
        self._speculative: deque[float] = deque(maxlen=window)  # seconds
        self._autoregressive: list[float] = []  # seconds
        self.pause = 0  # autoregressive steps until speculation goes on
        self._next_pause = FIRST_PAUSE

    @property
    def speculating(self) -> bool:
        """True while steps should be speculative."""
        return self.pause <= 0

    @property
    def measured(self) -> bool:
        """True once the cost is measured."""
        return len(self._autoregressive) >= TIMED and bool(self._speculative)

    @property
    def cost(self) -> float:
        """Cost of a speculative step in autoregressive ones: the tokens at which it breaks even."""
        if not self.measured:
            return self._assumed
        return median(self._speculative) / median(self._autoregressive)

    def speculated(self, tokens: float, seconds: float) -> None:
        """Record a speculative step that emitted `tokens` per sequence."""
        self._speculative.append(seconds)
        self._until_timed -= 1
        if self.speculating:  # else it was launched before the pause was decided
            self._rates.append(tokens)
            self._judge()

    def decoded(self, seconds: float) -> None:
        """Record an autoregressive step."""
        self._autoregressive.append(seconds)
        self.pause -= 1
        if self.pause == 0 and self._rates:  # the timing is over
            self._judge()
            if self.speculating:
                self._rates.clear()  # a pipe must fill again

    def _judge(self) -> None:
        """Go on, time autoregressive steps, or pause."""
        count = len(self._rates)
        if count < self._trial:
            return
        rate, whole = fmean(self._rates), count == self._rates.maxlen
        error = 0.0 if whole else sum((tokens - rate) ** 2 for tokens in self._rates) ** 0.5 / count
        if self._until_timed <= 0 or (not self.measured and rate < self.cost):
            self._pause(TIMED)
        elif rate + CLEARLY * error < self.cost:
            self._pause(self._next_pause)
            self._rates.clear()
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
        elif whole:
            self._next_pause = FIRST_PAUSE

    def _pause(self, steps: int) -> None:
        """Decode autoregressively for some steps, whose times replace those of an earlier context."""
        self.pause = steps
        self._autoregressive.clear()
        self._until_timed = max(self._until_timed, RETIMED)
