"""Facts of how a bench's methods ran their steps: layers, attention, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.evaluation.methods import Method
from firp_cli.records import Execution
from firp_cli.teacher.lean_layers import LeanStack
from firp_cli.teacher.library_layers import LibraryStack
from firp_cli.teacher.teacher import Teacher

CAPTURED = "captured"
KERNELS = "compiled kernels"  # this package's own on a CPU


def reset_captures(methods: Iterable[Method]) -> None:
    """Count captured graphs anew: call it after the warm-up, so that `execution` tells those of timed runs."""
    for method in methods:
        if isinstance(method.engine, Engine) and method.engine.graphs is not None:
            method.engine.graphs.captures = 0


def execution(method: Method, teacher: Teacher, static_cache: bool = False) -> Execution:
    """Return how a method's steps ran, with the graphs captured since `reset_captures`.

    Args:
        static_cache: of a method that calls transformers' `generate`: its K/V cache is the library's static one.
    """
    if method.engine is None:
        return library_execution(teacher, static_cache)
    return engine_execution(method.engine, teacher)


def engine_execution(engine: Engine | PipelineEngine, teacher: Teacher) -> Execution:
    """Return how an engine of this package runs its steps."""
    stack, graphs = teacher.stack, engine.graphs if isinstance(engine, Engine) else None
    compiled = isinstance(stack, LeanStack) and stack.compiled
    return Execution(
        layers=f"{stack.name}, torch.compile" if compiled else stack.name,
        attention=_attention(engine.attention if isinstance(engine, Engine) else "sdpa", teacher),
        graphs=CAPTURED if graphs is not None else _eager(engine, teacher),
        captures=graphs.captures if graphs is not None else 0,
    )


def library_execution(teacher: Teacher, static_cache: bool = False) -> Execution:
    """Return how transformers' `generate` runs this teacher. On CUDA devices it compiles steps with a static cache, and
    torch.compile captures them.
    """
    compiled = static_cache and teacher.device.type == "cuda"
    if teacher.device.type != "cuda":
        graphs = _no_graphs(teacher)
    else:
        graphs = f"{CAPTURED} by torch.compile" if compiled else "transformers' generate with a dynamic cache"
    layers = f"{LibraryStack.name}, torch.compile" if compiled else LibraryStack.name
    return Execution(layers, _library_attention(teacher), graphs)


def _attention(backend: str, teacher: Teacher) -> str:
    """Return the attention of decoding steps. Layers of the library get masks as tensors, and attend by themselves."""
    stack = teacher.stack
    if backend == "triton":
        return backend
    if isinstance(stack, LeanStack):
        return KERNELS if stack.packed else backend
    return f"{_library_attention(teacher)} of transformers"


def _library_attention(teacher: Teacher) -> str:
    return teacher.library.attention if isinstance(teacher.library, LibraryStack) else "the library's"


def _eager(engine: Engine | PipelineEngine, teacher: Teacher) -> str:
    """Return the reason why an engine without graphs runs its steps eagerly."""
    if teacher.device.type != "cuda":
        return _no_graphs(teacher)
    return "a pipeline's ticks are not captured" if isinstance(engine, PipelineEngine) else "--no-graphs"


def _no_graphs(teacher: Teacher) -> str:
    return f"none on {teacher.device.type}"
