"""Facts of how a bench's methods ran: layers, attention, graphs, and captures in timed runs."""

from __future__ import annotations

import copy

import pytest
import torch

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.bench_prompts import BenchPrompt, make_batches
from firp_cli.evaluation.execution import engine_execution, execution, library_execution, reset_captures
from firp_cli.evaluation.measure import measure
from firp_cli.evaluation.methods import BenchSettings, Method, make_methods
from firp_cli.records import Execution
from firp_cli.results import Prediction
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TunedTree
from helpers.graphs import with_graphs
from helpers.models import (
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    pipe_teacher,
    tiny_teacher,
)
from helpers.pipelines import random_exits


def on_cuda(teacher: Teacher) -> Teacher:
    """Return the teacher as one that says it is on a CUDA device."""
    kind = type("OnCuda", (Teacher,), {"device": torch.device("cuda")})
    other = copy.copy(teacher)
    other.__class__ = kind
    return other


def test_methods_on_a_cpu_tell_layers_attention_and_why_steps_are_eager() -> None:
    teacher = tiny_teacher("llama")
    methods = make_methods(teacher, {}, ["ar", "hf"], BenchSettings())
    assert [execution(method, teacher) for method in methods] == [
        Execution("library", "sdpa of transformers", "none on cpu", 0),
        Execution("library", "sdpa", "none on cpu", 0),
    ]
    looped, loops = pipe_teacher("2x3")
    found = engine_execution(PipelineEngine(looped, random_exits(looped, loops)), looped)
    assert found.layers.startswith("lean") and found.graphs == "none on cpu"


def test_attention_of_lean_layers_is_the_one_that_runs() -> None:
    """The kernels for CPUs attend by themselves; compiled layers call torch."""
    lean = tiny_teacher("llama", lean=True)
    packed = lean.stack.packed  # type: ignore[attr-defined]
    found = engine_execution(Engine(lean), lean)
    assert (found.layers, found.attention) == (lean.stack.name, "compiled kernels" if packed else "sdpa")
    other = copy.copy(lean)
    other.stack = lean.lean_stack(compiled=False, kernels=False)
    other.stack.compiled = True  # compiling takes seconds
    found = engine_execution(Engine(other), other)
    assert (found.layers, found.attention) == ("lean, torch.compile", "sdpa")
    kernel = Engine(lean)
    kernel._kernel = True
    assert engine_execution(kernel, lean).attention == "triton"


def test_reasons_of_eager_steps_on_a_cuda_device() -> None:
    teacher = tiny_teacher("llama")
    engine = Engine(teacher, options=EngineOptions(graphs=False))
    there = on_cuda(teacher)
    assert engine_execution(engine, there).graphs == "--no-graphs"
    looped, loops = pipe_teacher("2x3")
    pipeline = PipelineEngine(looped, random_exits(looped, loops))
    assert engine_execution(pipeline, on_cuda(looped)).graphs == "a pipeline's ticks are not captured"
    assert library_execution(there).graphs == "transformers' generate with a dynamic cache"
    compiled = library_execution(there, static_cache=True)
    assert (compiled.layers, compiled.graphs) == ("library, torch.compile", "captured by torch.compile")
    assert library_execution(teacher, static_cache=True).graphs == "none on cpu"


def test_attention_of_the_library_is_named_while_its_layers_attend_with_a_structured_mask() -> None:
    teacher = copy.copy(tiny_teacher("llama"))
    library = teacher.library
    with library._kernel():  # type: ignore[attr-defined]
        assert library_execution(teacher).attention == "sdpa"


def test_captures_count_those_of_timed_runs() -> None:
    engine, prompts = Engine(embedded_teacher()), embedded_prompts(2)
    method = Method("ar", engine.generate, engine=engine)
    _, tapes = with_graphs(engine)
    engine.capture(1, max(map(len, prompts)), 12)
    assert execution(method, engine.teacher).captures == tapes.captured > 0
    reset_captures([method, Method("hf", lambda *_: [])])
    engine.generate(prompts[:1], 12)
    assert execution(method, engine.teacher) == engine_execution(engine, engine.teacher)
    assert (execution(method, engine.teacher).graphs, execution(method, engine.teacher).captures) == ("captured", 0)
    engine.generate(prompts, 12)  # a batch of two was not captured
    assert execution(method, engine.teacher).captures == 1
    reset_captures([method])
    engine.forget()
    engine.generate(prompts[:1], 12)
    assert execution(method, engine.teacher).captures == 1


def tuned(batch: int, tree: str, context: int) -> TunedTree:
    return TunedTree({}, "", batch, context, 0.0, tree, Prediction(2.0, 2.0, 1.0, 1.0))


@pytest.mark.parametrize("trees", ["one", "tuned"])
def test_bench_captures_nothing_in_timed_runs(trees: str) -> None:
    """Batches of three, a remainder of two, later turns of one, prompts of other lengths than the longest, and tuned
    trees that differ between all of these.
    """
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    default = parse_tree("dynamic:6", predictor.steps)
    entries = (
        *(tuned(1, "dynamic:4", 32), tuned(1, "chain/2", 90), tuned(1, "dynamic:7", 4000)),
        *(tuned(2, "dynamic:5", 32), tuned(2, "none", 90), tuned(4, "static:2x1", 64)),
    )
    tree = TunedTrees(default, predictor.steps, entries) if trees == "tuned" else default
    short = embedded_prompts(5)
    long = [prompt + prompt + prompt for prompt in short]
    asked = [*short[:3], *long[:2], short[4]]
    prompts = [BenchPrompt(ids, "set" if number < 5 else "other") for number, ids in enumerate(asked)]
    engine = Engine(teacher, predictor, tree)
    graphs, tapes = with_graphs(engine)
    counted: list[int] = []

    def generate(prompts: list[list[int]], limit: int) -> list[object]:
        made = engine.generate(prompts, limit)
        counted.append(graphs.captures)
        return made  # type: ignore[return-value]

    method = Method("firp", generate, engine=engine)  # type: ignore[arg-type]
    batches = make_batches(prompts, 3)
    assert [len(batch.numbers) for batch in batches] == [3, 2, 1]
    settings = BenchSettings(max_new_tokens=8, batch_size=3, repeats=1)
    runs = measure([method], prompts, batches, settings)
    for run in runs["firp"]:
        for number, item in zip(run.numbers, run.generations, strict=True):
            assert item.token_ids == generate_reference(teacher.model, asked[number], 8)
    assert counted[0] == tapes.captured > 0 and graphs.forgotten == 0, "all are captured before the warm-up"
    assert set(counted[1:]) == {0}, "and none while times are taken"
    # of the tuned ones the last of batch size 1 is never the nearest
    assert len({owner for owner, _ in graphs._replays}) == (1 if trees == "one" else len(entries) - 1)  # type: ignore[misc]
