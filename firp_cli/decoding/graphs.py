"""CUDA graphs of decoding steps: captured when a shape comes back, replayed from then on.

A step works in place on tensors that keep their addresses, so a replay continues where the last one stopped. What a
graph is for is the caller's key: tree, batch and bucket of cache lengths. Whatever cannot be captured runs eagerly,
and `reason` says why in one line.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

Step = Callable[[], None]
SMALLEST_BUCKET = 256  # positions
MOST_GRAPHS = 32
MOST_BYTES = 4 << 30


def bucket(length: int) -> int:
    """The length that a graph is captured for: the next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class StepGraphs:
    """Replays steps by key. The first time a key runs eagerly, which makes its constants and compiles its kernels;
    the second time it is captured.

    Args:
        capture: makes a replay from a step, `CudaCapture` on CUDA devices.
        limit: graphs kept; the least recently used one goes first.
    """

    def __init__(self, capture: Callable[[Step], Step], limit: int = MOST_GRAPHS) -> None:
        self._capture, self._limit = capture, limit
        self._replays: OrderedDict[Hashable, Step] = OrderedDict()
        self._seen: set[Hashable] = set()
        self.reason: str | None = None

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step, or replay the graph of its key."""
        replay = self._replays.get(key)
        if replay is not None:
            self._replays.move_to_end(key)
        elif key in self._seen and self.reason is None:
            replay = self._try(key, step)
        self._seen.add(key)
        (replay or step)()

    def settled(self, key: Hashable) -> bool:
        """True where running this key costs what it will cost again: it is neither new nor about to be captured."""
        return key in self._replays or (key in self._seen and self.reason is not None)

    def forget(self) -> None:
        """Drop all graphs: the tensors that they work on are going."""
        self._replays.clear()
        self._seen.clear()
        if isinstance(self._capture, CudaCapture):
            self._capture.reset()

    def _try(self, key: Hashable, step: Step) -> Step | None:
        """Capture a step; what fails once is not tried again, here or for other keys."""
        try:
            replay = self._capture(step)
        except (RuntimeError, NotImplementedError, MemoryError) as error:  # out of memory on a device is a RuntimeError
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.reason = f"steps run without CUDA graphs: {first[:160]}"
            return None
        self._replays[key] = replay
        if len(self._replays) > self._limit:
            self._replays.popitem(last=False)
        return replay


class CudaCapture:
    """Captures steps into graphs that share one memory pool: they never run at the same time.

    Args:
        generators: random states that steps draw from; a replay draws anew.
        most_bytes: what the pool may hold.
    """

    def __init__(
        self, device: torch.device, generators: Sequence[torch.Generator] = (), most_bytes: int = MOST_BYTES
    ) -> None:
        self._device, self._generators, self._most_bytes = device, list(generators), most_bytes
        self.reset()

    def reset(self) -> None:
        """A new pool: the graphs of the old one are gone."""
        self._pool = torch.cuda.graph_pool_handle()
        self._held = 0

    def __call__(self, step: Step) -> Step:
        """A replay of the step. Raises RuntimeError where it cannot be captured, MemoryError where the pool is full."""
        if self._held > self._most_bytes:
            raise MemoryError(f"the graphs hold {self._held >> 20} MiB already")
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            step()
        self._held += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph.replay
