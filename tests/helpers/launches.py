"""Counts of the kernels that operations would launch on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {  # views, allocations, numbers
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unbind", "split", "alias"),
    *("detach", "as_strided", "unsqueeze", "squeeze", "empty", "new_empty", "empty_like", "empty_strided"),
    *("split_with_sizes", "_reshape_alias", "lift_fresh", "scalar_tensor"),
    "flatten",  # shown for tensors made in inference mode alone
}


class Launches(TorchDispatchMode):
    """Names of torch's operations that would launch kernels, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._within = False

    def counted(self, name: str, work: Callable[[], Any]) -> Any:
        """Run work that counts as one launch."""
        self.names.append(name)
        self._within = True
        try:
            return work()
        finally:
            self._within = False

    def counting(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does `work` and counts as one launch: a stand-in for a kernel, which torch's dispatch
        does not see.
        """
        return lambda *given: self.counted(name, lambda: work(*given))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._within and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def trace_kernels(monkeypatch: pytest.MonkeyPatch, launches: Launches, module: ModuleType, *kernels: str) -> None:
    """Count every launch of these Triton kernels of a module, which torch's dispatch does not show, as one."""
    for name in kernels:
        monkeypatch.setattr(module, name, LaunchedKernel(getattr(module, name), launches.counted, name))


@dataclass
class LaunchedKernel:
    """Kernel whose launches are traced."""

    kernel: Any
    counted: Callable[[str, Callable[[], Any]], Any]
    name: str

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *given, **options: self.counted(self.name, lambda: self.kernel[grid](*given, **options))
