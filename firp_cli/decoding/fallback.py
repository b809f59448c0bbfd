"""Fallback to autoregressive decoding while drafting is slower on the given text and machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median_low

# Assumptions before anything is measured: a tick costs at most this many loops of one token, and a pipe with more than
# this many tokens per tick pays.
DOUBTED_TICK = 2.5
UNDOUBTED_RATE = 0.75
# Assumption: a drafted step costs at most this many autoregressive ones. Higher rates are checked too, but later.
DOUBTED_STEP = 4.0
CALIBRATION = 8  # autoregressive steps that are timed before drafting is given up
FIRST_PAUSE = 32  # autoregressive steps until drafting is tried again; doubled each time it fails again
LONGEST_PAUSE = 1024
MOST_TRIES = 3  # attempts to time autoregressive steps, if other work disturbs the times
KEPT = 64  # times of autoregressive steps
MANY, TRIMMED = 12, 0.1  # from MANY times on the mean counts, without the share TRIMMED at either end
CLEARLY = 2.0  # standard errors of a mean rate
SURE = 1.5  # at this multiple of the needed tokens one timed autoregressive step is enough


@dataclass(frozen=True)
class FallbackPolicy:
    """Numbers of speculative steps after which a fallback decides.

    Attributes:
        window: steps that are judged together. trial: steps that are enough before speculation has paid. early: steps
            after which speculation is given up, if it clearly loses.
        doubted: tokens per step below which autoregressive steps are timed after `early` steps.
        slack: share of the needed tokens that may be missing once speculation has paid.
        quick: autoregressive steps that are timed to go on speculating, one more unless it clearly pays; giving it up
            takes CALIBRATION.
        untimed: steps after which autoregressive ones are timed for the first time; None: only if doubted.
        retime: steps after which autoregressive ones are timed again; None: never.
    """

    window: int
    trial: int
    early: int
    doubted: float
    slack: float = 0.0
    quick: int = CALIBRATION
    untimed: int | None = None
    retime: int | None = None


TREES = FallbackPolicy(window=48, trial=12, early=6, doubted=DOUBTED_STEP, slack=0.05, quick=1, untimed=48, retime=256)


def tree_fallback(ratio: float | None = None) -> AutoregressiveFallback:
    """Return the fallback of draft trees. `ratio`: predicted cost of a drafted step in autoregressive ones."""
    return AutoregressiveFallback(TREES, ratio)


def pipeline_fallback(loops: int, shared: bool = True) -> AutoregressiveFallback:
    """Return the fallback of a pipeline of r `loops`. It times autoregressive steps when the pipe emits fewer than
    DOUBTED_TICK / r (at most UNDOUBTED_RATE) tokens per tick, or after the first window if the loops are not `shared`.
    """
    doubted = min(DOUBTED_TICK / loops, UNDOUBTED_RATE) if shared else float("inf")
    return AutoregressiveFallback(FallbackPolicy(window=4 * loops, trial=4 * loops, early=4 * loops, doubted=doubted))


class AutoregressiveFallback:
    """Decides between speculative steps (a tick, a step with a draft tree) and autoregressive ones.

    It compares the tokens of a speculative step with its cost in autoregressive steps, both measured while decoding.
    The tokens are the same either way.

    Args:
        ratio: cost of a speculative step in autoregressive ones until it is measured.
    """

    def __init__(self, policy: FallbackPolicy, ratio: float | None = None) -> None:
        self.policy, self._ratio = policy, ratio
        self._rates: deque[float] = deque(maxlen=policy.window)
        self._speculative: deque[float] = deque(maxlen=policy.window)  # seconds
        self._autoregressive: deque[float] = deque(maxlen=KEPT)  # seconds
        self._since = 0  # speculative steps since autoregressive ones were timed
        self._paid = False
        self.pause = 0  # autoregressive steps until the next decision
        self._next_pause = FIRST_PAUSE
        self._tries = 0  # remaining attempts at timing; 0: speculation is given up for this pause
        self._needed_times = 0  # autoregressive steps to time
        self._stale = False  # the times so far are of another context

    @property
    def speculating(self) -> bool:
        """True while steps should be speculative."""
        return self.pause <= 0

    @property
    def needed(self) -> float | None:
        """Tokens per speculative step that break even; None before autoregressive steps were timed."""
        if self._speculative and len(self._autoregressive) >= self.policy.quick:
            return _typical(self._speculative) / _typical(self._autoregressive)
        return self._ratio

    def speculated(self, rate: float, seconds: float | None) -> None:
        """Record a step that emitted `rate` tokens per sequence. `seconds`: None where its time is not usable."""
        if seconds is not None:
            self._speculative.append(seconds)
        if not self.speculating:
            return  # launched before the pause was decided
        policy = self.policy
        self._rates.append(rate)
        self._since += 1
        if len(self._rates) < policy.early:
            return
        due, needed = policy.retime if self._autoregressive else policy.untimed, self.needed
        if due is not None and self._since >= due:
            self._stale = bool(self._autoregressive)
            self._time(policy.quick)
        elif needed is not None:
            self._judge(needed)
        elif self._rate < policy.doubted:
            self._time(policy.quick)

    def decoded(self, seconds: float | None) -> None:
        """Record an autoregressive step. `seconds`: None where its time is not usable."""
        if seconds is not None:
            if self._stale:
                self._autoregressive.clear()
                self._stale = False
            self._autoregressive.append(seconds)
        self.pause -= 1
        if self.pause > 0 or not self._tries:
            return
        self._tries -= 1
        missing = self._needed_times if self._stale else self._needed_times - len(self._autoregressive)
        if missing > 0 and self._tries:
            self.pause = missing
            return
        self._tries, self._since = 0, 0
        needed = self.needed
        if needed is not None:
            self._judge(needed, final=missing > 0)
        if self.speculating:
            self._rates.clear()  # a pipe must fill again

    @property
    def _rate(self) -> float:
        return sum(self._rates) / len(self._rates)

    def _time(self, steps: int) -> None:
        """Time autoregressive steps until there are `steps` of them."""
        self._needed_times, self._tries = steps, MOST_TRIES
        self.pause = max(1, steps if self._stale else steps - len(self._autoregressive))

    def _judge(self, needed: float, final: bool = False) -> None:
        """Go on, time more autoregressive steps, or pause. `final`: no more times follow."""
        loses, timed = self._loses(needed), len(self._autoregressive)
        if loses and (final or timed >= CALIBRATION):
            self.pause, self._next_pause = self._next_pause, min(2 * self._next_pause, LONGEST_PAUSE)
            self._tries, self._since, self._paid = 0, 0, False
            self._rates.clear()
        elif loses:
            self._time(CALIBRATION)
        elif timed == 1 and not final and self._rate < SURE * needed:
            self._time(timed + 1)
        elif self._rate >= needed and len(self._rates) >= self.policy.trial:
            self._paid = True
            if len(self._rates) == self.policy.window:
                self._next_pause = FIRST_PAUSE

    def _loses(self, needed: float) -> bool:
        rate, count = self._rate, len(self._rates)
        if count < (self.policy.window if self._paid else self.policy.trial):
            error = sqrt(sum((sample - rate) ** 2 for sample in self._rates)) / count
            return rate + CLEARLY * error < needed
        return rate < needed * (1 - self.policy.slack if self._paid else 1.0)


def _typical(times: Collection[float]) -> float:
    """Return the typical time of a step. Of few times it is the median. Of many it is the mean without the outermost
    ones, since a machine that is often interrupted decodes at its mean, not at its median.
    """
    if len(times) < MANY:
        return median_low(times)
    cut = int(TRIMMED * len(times))
    return fmean(sorted(times)[cut : len(times) - cut])
