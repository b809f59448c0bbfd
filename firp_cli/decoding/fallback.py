"""Whether speculation pays on the text and machine at hand: where it does not, plain decoding takes over for a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median_low

# Before anything was measured a tick is taken to cost at most this many loops of one token, and a pipe fuller than this
# many tokens per tick to pay.
DOUBTED_TICK = 2.5
UNDOUBTED_RATE = 0.75
# A drafted step is taken to cost at most this many plain ones; rates above are checked all the same, but later.
DOUBTED_STEP = 4.0
CALIBRATION = 8  # plain steps that tell what they cost
FIRST_REST = 32  # tokens decoded one by one before speculation is tried again; doubled each time it fails again
LONGEST_REST = 1024
MOST_TRIES = 3  # at timing plain steps, where something else takes time beside them
KEPT = 64  # times of plain steps
MANY, TRIMMED = 12, 0.1  # times whose mean is taken, without this share of them at either end
CLEARLY = 2.0  # standard errors of a mean rate
SURE = 1.5  # times the needed tokens: then one timed plain step is enough


@dataclass(frozen=True)
class FallbackPolicy:
    """How long a guard looks before it decides, in speculative steps.

    Attributes:
        window: are judged together. trial: are enough before speculation has paid. early: of them, behind which it may
            be given up, if it clearly loses.
        doubted: tokens per step below which plain steps are timed as soon as that.
        slack: share of the needed tokens that may lack once speculation has paid.
        quick: plain steps that are timed to go on speculating, one more unless it surely pays; giving it up takes
            CALIBRATION.
        untimed: steps behind which plain ones are timed for the first time; None: only if doubted.
        retime: steps behind which plain ones are timed again; None: never.
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


def tree_fallback(ratio: float | None = None) -> PlainFallback:
    """For draft trees. `ratio`: what a drafted step was foretold to cost in plain ones."""
    return PlainFallback(TREES, ratio)


def pipeline_fallback(loops: int, shared: bool = True) -> PlainFallback:
    """For pipelines of r `loops`: plain steps are timed the first time that the pipe is emptier than DOUBTED_TICK / r
    (at most UNDOUBTED_RATE) tokens per tick, or at once where the loops are not `shared`.
    """
    doubted = min(DOUBTED_TICK / loops, UNDOUBTED_RATE) if shared else float("inf")
    return PlainFallback(FallbackPolicy(window=4 * loops, trial=4 * loops, early=4 * loops, doubted=doubted))


class PlainFallback:
    """Compares tokens per speculative step (a tick, a step with a draft tree) with what it costs in plain steps, both
    measured while decoding. Tokens never change, only who makes them.

    Args:
        ratio: what a speculative step costs in plain ones, as long as nothing was measured.
    """

    def __init__(self, patience: FallbackPolicy, ratio: float | None = None) -> None:
        self.patience, self._ratio = patience, ratio
        self._rates: deque[float] = deque(maxlen=patience.window)
        self._speculative: deque[float] = deque(maxlen=patience.window)  # seconds
        self._plain: deque[float] = deque(maxlen=KEPT)  # seconds
        self._since = 0  # speculative steps since plain ones were timed
        self._paid = False
        self._rest = 0
        self._next_rest = FIRST_REST
        self._tries = 0  # at timing, that are left; 0: this is a rest
        self._wanted = 0  # plain steps to time
        self._stale = False  # their times so far are of another context

    @property
    def window(self) -> int:
        """Speculative steps that are judged together."""
        return self.patience.window

    @property
    def speculating(self) -> bool:
        """True while steps should be speculative."""
        return self._rest <= 0

    @property
    def rest(self) -> int:
        """Plain steps until the next decision."""
        return self._rest

    @property
    def needed(self) -> float | None:
        """Tokens per speculative step that break even; None before plain steps were timed."""
        if self._speculative and len(self._plain) >= self.patience.quick:
            return _typical(self._speculative) / _typical(self._plain)
        return self._ratio

    def speculated(self, rate: float, seconds: float | None) -> None:
        """Note a step that emitted `rate` tokens per sequence. `seconds`: None where its time says nothing."""
        if seconds is not None:
            self._speculative.append(seconds)
        if not self.speculating:
            return  # launched before that was decided
        patience = self.patience
        self._rates.append(rate)
        self._since += 1
        if len(self._rates) < patience.early:
            return
        due, needed = patience.retime if self._plain else patience.untimed, self.needed
        if due is not None and self._since >= due:
            self._stale = bool(self._plain)
            self._time(patience.quick)
        elif needed is not None:
            self._judge(needed)
        elif self._rate < patience.doubted:
            self._time(patience.quick)

    def decoded(self, seconds: float | None) -> None:
        """Note a plain step. `seconds`: None where its time says nothing."""
        if seconds is not None:
            if self._stale:
                self._plain.clear()
                self._stale = False
            self._plain.append(seconds)
        self._rest -= 1
        if self._rest > 0 or not self._tries:
            return
        self._tries -= 1
        missing = self._wanted if self._stale else self._wanted - len(self._plain)
        if missing > 0 and self._tries:
            self._rest = missing
            return
        self._tries, self._since = 0, 0
        needed = self.needed
        if needed is not None:
            self._judge(needed, final=missing > 0)
        if self.speculating:
            self._rates.clear()  # a pipe has to fill again

    @property
    def _rate(self) -> float:
        return sum(self._rates) / len(self._rates)

    def _time(self, steps: int) -> None:
        """Time plain steps until there are so many."""
        self._wanted, self._tries = steps, MOST_TRIES
        self._rest = max(1, steps if self._stale else steps - len(self._plain))

    def _judge(self, needed: float, final: bool = False) -> None:
        """Go on, time more plain steps, or rest. `final`: nothing more will be known of what they cost."""
        loses, timed = self._loses(needed), len(self._plain)
        if loses and (final or timed >= CALIBRATION):
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
            self._tries, self._since, self._paid = 0, 0, False
            self._rates.clear()
        elif loses:
            self._time(CALIBRATION)
        elif timed == 1 and not final and self._rate < SURE * needed:
            self._time(timed + 1)
        elif self._rate >= needed and len(self._rates) >= self.patience.trial:
            self._paid = True
            if len(self._rates) == self.patience.window:
                self._next_rest = FIRST_REST

    def _loses(self, needed: float) -> bool:
        rate, count = self._rate, len(self._rates)
        if count < (self.patience.window if self._paid else self.patience.trial):
            error = sqrt(sum((one - rate) ** 2 for one in self._rates)) / count
            return rate + CLEARLY * error < needed
        return rate < needed * (1 - self.patience.slack if self._paid else 1.0)


def _typical(times: Collection[float]) -> float:
    """What a step takes: of many times the mean without the outermost ones, since a machine that is often interrupted
    decodes at its mean, not at its median; of few the one in the middle.
    """
    if len(times) < MANY:
        return median_low(times)
    cut = int(TRIMMED * len(times))
    return fmean(sorted(times)[cut : len(times) - cut])
