"""Captured steps without a CUDA device: operations recorded on tapes, and output that is read late."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from firp_cli.decoding.cuda_graphs import Step, StepGraphs
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.output_buffer import OutputBuffer


def with_graphs(engine: Engine) -> tuple[RecordingGraphs, Tapes]:
    """Give an engine graphs that replay tapes."""
    tapes = Tapes()
    engine.graphs = graphs = RecordingGraphs(tapes)
    return graphs, tapes


class Arrived:
    """Event of a device that completes at once."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class LateBuffer(OutputBuffer):
    """Output that is read as on a CUDA device, one step late, with copies on the CPU."""

    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        super().__init__(batch, width, device)
        self.late, self._copies = True, [torch.zeros_like(self.row) for _ in range(2)]


class Tapes:
    """Capture by tape. Recording runs the step, which on a CUDA device only the first replay does."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.captured += 1
        tape = Tape()
        with tape:
            step()
        recorded = [True]

        def replay() -> None:
            if recorded:
                recorded.clear()
            else:
                self.replayed += 1
                tape.replay()

        return replay


class RecordingGraphs(StepGraphs):
    """Step graphs that record their keys: mode, batch, bucket."""

    def __init__(self, capture: Callable[[Step], Step]) -> None:
        super().__init__(capture)
        self.keys: list[Any] = []
        self.forgotten = 0

    def run(self, key: Hashable, step: Step) -> None:
        self.keys.append(key)
        super().run(key, step)

    def forget(self) -> None:
        self.forgotten += 1
        super().forget()


class Tape(TorchDispatchMode):
    """Operations of a step and their tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Repeat all operations. Tensors that the tape made are made anew; all others keep their addresses."""
        made: dict[int, Tensor] = {}
        for func, args, kwargs, first in self.operations:
            current = tree_map_only(Tensor, lambda tensor: made.get(id(tensor), tensor), (args, kwargs))
            result = func(*current[0], **current[1])
            for before, now in zip(tree_leaves(first), tree_leaves(result), strict=True):
                if isinstance(before, Tensor):
                    made[id(before)] = now
