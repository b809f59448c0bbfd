"""Whether pipelining pays on the text at hand: where it does not, plain decoding takes over for a while."""

from __future__ import annotations

from collections import deque

SHARED_TICK = 1.5  # cost of a full tick in loops of one token that a guard reckons with; wrong guesses cost little
FIRST_REST = 32  # tokens decoded one by one before the pipeline is tried again; doubled each time it fails again
LONGEST_REST = 1024


class Guard:
    """Watches tokens per tick over a window. Tokens never change, only who makes them.

    Args:
        loops: r. tick_cost: time of a full tick, in loops of one token; pipelining pays above tick_cost / r tokens per
            tick.
    """

    def __init__(self, loops: int, tick_cost: float) -> None:
        self.loops = loops
        self.needed = tick_cost / loops
        self._window: deque[float] = deque(maxlen=4 * loops)
        self._rest = 0
        self._next_rest = FIRST_REST

    @property
    def pipelining(self) -> bool:
        """True while tokens should go through the pipeline."""
        return self._rest <= 0

    def ticked(self, rate: float) -> None:
        """Note a tick that emitted `rate` tokens per sequence."""
        self._window.append(rate)
        if len(self._window) < self._window.maxlen:  # type: ignore[operator]
            return
        if sum(self._window) / len(self._window) >= self.needed:
            self._next_rest = FIRST_REST
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
            self._window.clear()

    def decoded(self) -> None:
        """Note a token per sequence that was decoded without the pipeline."""
        self._rest -= 1
