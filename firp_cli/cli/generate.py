"""`firp generate`: text after a prompt, streamed, with what was drafted and accepted in colour."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.assets import nearest
from firp_cli.cli.terminal import (
    Attention,
    Compiled,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Layers,
    Model,
    Threads,
    Tree,
    Verbose,
    command_line,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
)
from firp_cli.errors import UsageError
from firp_cli.machine import is_main

if TYPE_CHECKING:
    from firp_cli.api.loading import LayerChoice
    from firp_cli.decoding.engine import Engine
    from firp_cli.decoding.speed.pipeline import PipelineEngine
    from firp_cli.results import Generation

TAIL_TOKENS = 8  # tokens of context that decide how the next one is written (spaces, split characters)


def generate(
    predictor: Annotated[
        str | None, typer.Argument(help="Predictor folder or embedded name. Default: the embedded FIRP predictor.")
    ] = None,
    *,
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="A user message.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts; writes JSONL.")] = None,
    method: Annotated[str | None, typer.Option(help="ar, or the predictor's kind (default).")] = None,
    teacher: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once, with --prompts.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    tree: Tree = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts at most, with --prompts.")] = None,
    raw: Annotated[bool, typer.Option(help="Take the prompt as it is, without the chat template.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSONL file for the results.")] = None,
    skip_long: Annotated[bool, typer.Option(help="Skip and count prompts that do not fit the context.")] = False,
    threads: Threads = None,
    layers: Layers = "lean",
    attention: Attention = "auto",
    graphs: Graphs = True,
    compiled: Compiled = False,
    gpus: Gpus = 1,
    guard: Guarded = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Generate text with a predictor's draft trees or pipeline. The tokens are those of plain decoding."""
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.jsonl")
    quiet_libraries(verbose)
    from firp_cli.api.loading import LayerChoice
    from firp_cli.decoding.engine import EngineOptions
    from firp_cli.distributed.launch import launch, relayed_errors
    from firp_cli.machine import set_threads

    set_threads(threads)
    choice, running = LayerChoice(layers, compiled), EngineOptions(attention=attention, graphs=graphs)
    if launch(gpus, None, command_line(context)):
        return
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "options": running}
    # steps with a tree draw other numbers than plain ones: a guard's choice would change what a seed stands for
    sampling["guard"] = True if guard is None and temperature == 0 else guard
    with relayed_errors():
        engine = _engine(predictor, method, teacher, force, tree, choice, **sampling)
        _run(engine, prompt, prompts, raw, max_new_tokens, stop or [], batch_size, limit, skip_long, output, as_json)


def _run(
    engine: Engine | PipelineEngine,
    prompt: str | None,
    prompts: Path | None,
    raw: bool,
    max_new_tokens: int,
    stops: list[str],
    batch_size: int,
    limit: int | None,
    skip_long: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Decode and write; of several ranks only the first writes."""
    if prompt is not None:
        ids = _encode([{"role": "user", "content": prompt}], prompt if raw else None, engine)
        stream = not as_json and output is None and is_main()
        _say_memory(engine, 1, len(ids), max_new_tokens)
        painter = _Painter(engine.teacher.tokenizer) if stream else None
        result = engine.generate([ids], max_new_tokens, stops, painter.on_tokens if painter else None)[0]
        if painter:
            painter.end()
        if not is_main():
            return
        if as_json:
            print_json(_record(result))
        if output is not None:
            _write_lines(output, [result])
        typer.echo(_summary([result]), err=True)
        return
    assert prompts is not None
    results = _generate_file(engine, prompts, limit, raw, max_new_tokens, stops, batch_size, skip_long)
    if not is_main():
        return
    _write_lines(output, results)
    typer.echo(_summary(results), err=True)


def _engine(
    predictor: str | None,
    method: str | None,
    teacher: str | None,
    force: bool,
    tree: str | None,
    choice: LayerChoice,
    **options: Any,
) -> Engine | PipelineEngine:
    """The decoding engine that the options ask for. Method `ar` needs no predictor. A rank keeps its part of it."""
    from firp_cli.api.loading import load_named_teacher, load_pair, load_trees
    from firp_cli.decoding.make_engine import make_engine
    from firp_cli.distributed.launch import start
    from firp_cli.machine import rank, world_size
    from firp_cli.predictors.folder import predictor_folder

    if method == "ar":
        if tree:
            raise UsageError("plain decoding has no tree: leave --tree or --method ar out")
        folder = predictor_folder(predictor) if predictor else None
        return make_engine(load_named_teacher(teacher, folder, choice=choice), **options)
    if predictor is None and teacher is not None:
        raise UsageError(f"no predictor named for {teacher}: give its folder, or --method ar for plain decoding")
    if world_size() > 1:
        start()
    ranks = (rank(), world_size())
    model, loaded, folder = load_pair(predictor or method or "firp", teacher, force, ranks=ranks, choice=choice)
    if method not in (None, loaded.kind):
        raise UsageError(
            f"{folder} holds a {loaded.kind} predictor, not {method!r}{nearest(str(method), ['ar', loaded.kind])}"
        )
    if loaded.pipeline and tree:
        raise UsageError(f"{folder} feeds a pipeline, which has no tree: leave --tree out")
    trees = load_trees(tree, folder, loaded, model, options["temperature"], options["options"])
    return make_engine(model, loaded, trees, rank(), world_size(), **options)


def _encode(messages: list[dict[str, str]], raw: str | None, engine: Engine | PipelineEngine) -> list[int]:
    from firp_cli.data.chat import encode_prompt

    tokenizer = engine.teacher.tokenizer
    return list(tokenizer(raw)["input_ids"]) if raw is not None else encode_prompt(messages, tokenizer)


def _generate_file(
    engine: Engine | PipelineEngine,
    path: Path,
    limit: int | None,
    raw: bool,
    max_new_tokens: int,
    stops: list[str],
    batch_size: int,
    skip_long: bool,
) -> list[Generation]:
    """Results in the file's order, prompts in batches of `batch_size`."""
    from firp_cli.data.datasets import load_prompts

    loaded = load_prompts(str(path), None, limit)
    encoded = [_encode(item.messages, item.messages[-1]["content"] if raw else None, engine) for item in loaded]
    room = engine.teacher.max_positions - max_new_tokens
    if skip_long:
        fitting = [ids for ids in encoded if len(ids) <= room]
        if len(fitting) < len(encoded):
            typer.echo(
                f"skipped {len(encoded) - len(fitting)} of {len(encoded)} prompts longer than {room} tokens", err=True
            )
        encoded = fitting
    _say_memory(engine, min(batch_size, len(encoded)), max(map(len, encoded), default=0), max_new_tokens)
    results: list[Generation] = []
    with progress_bar("generating") as progress:
        for start in range(0, len(encoded), batch_size):
            results += engine.generate(encoded[start : start + batch_size], max_new_tokens, stops)
            progress(len(results), len(encoded))
    return results


def _say_memory(engine: Engine | PipelineEngine, batch: int, longest: int, max_new_tokens: int) -> None:
    """Before anything is allocated: what the K/V cache takes."""
    from firp_cli.machine import readable_bytes

    size = readable_bytes(engine.cache_bytes(batch, longest, max_new_tokens))
    say(f"K/V cache for {batch} x {longest + max_new_tokens} positions: {size}")


def _record(result: Generation) -> dict[str, Any]:
    """DESIGN's JSONL fields, and the times. A pipeline's steps are ticks: `accepted_lengths` has a 0 or 1 for each."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "token_ids": result.token_ids,
        "text": result.text,
        "steps": result.steps,
        "accepted_lengths": result.accepted_lengths,
        "finish_reason": result.finish_reason,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
    }


def _write_lines(output: Path | None, results: list[Generation]) -> None:
    """JSONL to a file, whole or not at all, or to stdout."""
    from firp_cli.files import write_atomically

    text = "".join(json.dumps(_record(result), ensure_ascii=False) + "\n" for result in results)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))


def _summary(results: list[Generation]) -> str:
    tokens = sum(len(result.token_ids) for result in results)
    steps = sum(result.steps for result in results)
    decoded = sum(sum(result.accepted_lengths) for result in results)
    seconds = sum(result.decode_seconds for result in results)
    prefill = sum(result.prefill_seconds for result in results)
    speed = f"{decoded / seconds:.1f} tokens/s" if seconds and decoded else "no decoding step"
    pipelines = [result.pipeline for result in results if result.pipeline]
    name, length = "steps", f"accepted length {decoded / steps:.2f}" if steps else "accepted length -"
    if plain := sum(result.autoregressive_steps for result in results):
        length += f" ({plain} steps plain, since drafting did not pay)"
    if pipelines and steps:
        plain = sum(trace.autoregressive_tokens for trace in pipelines)
        name, length = "ticks", f"{decoded / steps:.2f} tokens per tick"
        length += f" ({plain} of them decoded plainly, since the pipeline did not pay)" if plain else ""
    return f"{tokens} tokens in {steps} {name}, {length}, {speed}, prefill {prefill:.2f} s"


class _Painter:
    """Writes text as it is decided: drafted and accepted tokens green, the teacher's own plain."""

    def __init__(self, tokenizer: Any) -> None:
        from rich.console import Console

        self.tokenizer = tokenizer
        self.console = Console(highlight=False, soft_wrap=True)
        self.tokens: list[int] = []
        self.pending = 0  # tokens not written yet: their text ends inside a character

    def on_tokens(self, _: int, tokens: list[int], drafted: int) -> None:
        """The tokens of one step; the first `drafted` of them came from the draft."""
        for number, token in enumerate(tokens):
            self.tokens.append(token)
            self.pending += 1
            start = max(0, len(self.tokens) - self.pending - TAIL_TOKENS)
            before = self.tokenizer.decode(self.tokens[start : -self.pending], skip_special_tokens=True)
            text = self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            self.console.print(text[len(before) :], end="", style="green" if number < drafted else None, markup=False)
            self.pending = 0
        self.console.file.flush()

    def end(self) -> None:
        self.console.print()
