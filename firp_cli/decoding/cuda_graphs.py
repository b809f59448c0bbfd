"""CUDA graphs of decoding steps: captured when a step is run a second time, replayed from then on.

A step works in place on tensors that keep their addresses, so a replay continues where the last one stopped. The caller
names a graph by a key: mode, batch, and bound of the lengths. A step that cannot be captured raises an error with the
cause and leaves the process as it was: decoding without graphs is the user's decision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from firp_cli.errors import TeacherError

Step = Callable[[], None]
SMALLEST_BUCKET = 256  # positions


class CaptureError(TeacherError):
    """A step cannot be captured as a CUDA graph."""


def bucket(length: int) -> int:
    """Return the length for which a graph with a dense attention mask is captured: the next power of two, at least
    SMALLEST_BUCKET. The attention kernel reads true lengths, and one graph at the cache's capacity serves them all.
    """
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class StepGraphs:
    """Replays of steps by key. The first run of a key is eager, which makes its constants and compiles its kernels; the
    second one is captured.

    Args:
        capture: makes a replay from a step, `CudaCapture` on CUDA devices.

    Attributes:
        owner: what the keys belong to, the tree of the batch. captures: graphs that were captured, forgotten ones
            included.
    """

    def __init__(self, capture: Callable[[Step], Step]) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Step] = {}
        self._seen: set[Hashable] = set()
        self.owner: Hashable = None
        self.captures = 0

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step, or replay the graph of its key. Raises CaptureError."""
        key = self.owner, key
        if key in self._seen and key not in self._replays:
            self._replays[key] = self._capture(step)
            self.captures += 1
        self._seen.add(key)
        self._replays.get(key, step)()

    def forget(self) -> None:
        """Drop all graphs, before the tensors that they work on are freed."""
        self._replays.clear()
        self._seen.clear()
        if isinstance(self._capture, CudaCapture):
            self._capture.reset()


class CudaCapture:
    """Captures steps into graphs that share one memory pool: they never run at the same time.

    Args:
        generators: random states that steps draw from; every replay draws new numbers.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device, self._generators = device, list(generators)
        self._stream = torch.cuda.Stream(device)  # the same for all: a pool's memory belongs to one stream
        self.reset()

    def reset(self) -> None:
        """Start a new pool, after the graphs of the old one were dropped."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Return a replay of the step. Raises CaptureError if that fails; the next capture is not affected."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            # in inference mode, as decoding: a graph's random state made in it cannot be updated outside it
            with torch.inference_mode(), torch.cuda.device(self._device), self._recording(graph):
                step()
        except RuntimeError as error:
            self._heal()
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CaptureError(
                f"a decoding step cannot be captured as a CUDA graph: {first[:300]}; --no-graphs decodes without graphs"
            ) from error
        except BaseException:
            self._heal()
            raise
        return graph.replay

    @contextlib.contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record the operations of this context. As `torch.cuda.graph`, but it restores the stream where the end of a
        broken capture raises, and does not record other threads.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a broken capture raises again at its end
                    graph.capture_end()
                raise
            graph.capture_end()

    def _heal(self) -> None:
        """Undo a failed capture: torch ends neither the allocator's recording nor the random generators', and every
        later draw would raise.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):
                end(index, self._pool)
        for generator in (torch.cuda.default_generators[index], *self._generators):
            generator.graphsafe_set_state(generator.clone_state())
        self.reset()
