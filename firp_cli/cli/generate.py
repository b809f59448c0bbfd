"""`firp generate`: text after a prompt, streamed, with drafted tokens in colour."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.assets import nearest
from firp_cli.cli.terminal import (
    Attention,
    Backend,
    ChatTemplate,
    Compiled,
    Dtype,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Model,
    RemoteCode,
    Revision,
    Seed,
    Stop,
    Temperature,
    TemplateOptions,
    Threads,
    TopP,
    Tree,
    Verbose,
    command_line,
    decoding_options,
    print_json,
    progress_bar,
    quiet_libraries,
    teacher_choice,
)
from firp_cli.config import TeacherConfig
from firp_cli.errors import UsageError
from firp_cli.machine import is_main

if TYPE_CHECKING:
    from firp_cli.api.decoder import Decoder, OnText, Prompt
    from firp_cli.data.datasets import Rows
    from firp_cli.results import Generation

Method = Annotated[
    str | None, typer.Option(help="ar (autoregressive decoding), or the predictor's kind, which is the default.")
]


def generate(
    predictor: Annotated[
        str | None, typer.Argument(help="Predictor folder or embedded name. Default: the embedded FIRP predictor.")
    ] = None,
    *,
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="A user message.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts; writes JSONL.")] = None,
    method: Method = None,
    teacher: Model = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    chat_template: ChatTemplate = None,
    template_options: TemplateOptions = None,
    trust_remote_code: RemoteCode = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a prompt.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once, with --prompts.")] = 1,
    stop: Stop = None,
    tree: Tree = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts, with --prompts.")] = None,
    raw: Annotated[bool, typer.Option(help="Leave out the chat template.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSONL file for the results.")] = None,
    skip_long: Annotated[bool, typer.Option(help="Skip and count prompts that do not fit the context.")] = False,
    threads: Threads = None,
    backend: Backend = "lean",
    attention: Attention = "auto",
    graphs: Graphs = True,
    compiled: Compiled = False,
    gpus: Gpus = 1,
    guard: Guarded = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Generate text with a predictor. The output is that of autoregressive decoding."""
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.jsonl")
    if prompt is not None and prompt != prompt.encode("utf-8", "replace").decode("utf-8"):
        raise UsageError("--prompt contains bytes that are not UTF-8: correct them, or the encoding of the terminal")
    quiet_libraries(verbose)
    from firp_cli.distributed.launch import launch, relayed_errors

    choice = teacher_choice(teacher, dtype, revision, chat_template, template_options, trust_remote_code)
    layers, options = decoding_options(backend, compiled, attention, graphs, threads)
    if launch(gpus, None, command_line(context)):
        return
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop or []}
    settings |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    with relayed_errors():
        rows = None if prompts is None else _read_prompts(str(prompts), limit)
        decoder = _load(predictor, method, choice, tree=tree, backend=layers, guard=guard, force=force, options=options)
        if rows is None:
            stream = not as_json and output is None and is_main()
            results = [_generate_one(decoder, str(prompt), raw, stream, **settings)]
        else:
            items = _encode(decoder, rows, raw)
            fitting = _fitting(decoder, items, max_new_tokens) if skip_long else items
            with progress_bar("generating") as progress:
                results = decoder.generate_batch(fitting, batch_size=batch_size, progress=progress, **settings)
    if is_main():
        _write(results, output, as_json, prompt is not None)


def _load(predictor: str | None, method: str | None, teacher: TeacherConfig | None, **options: Any) -> Decoder:
    """Load what `--method` asks for: `ar` needs no predictor. A rank loads its part of a pipeline."""
    from firp_cli.api.decoder import load
    from firp_cli.api.loading import chosen_model, load_named_teacher
    from firp_cli.distributed.launch import start
    from firp_cli.machine import rank, world_size
    from firp_cli.predictors.folder import predictor_folder, read_config

    if method == "ar":
        folder = predictor_folder(predictor) if predictor else None
        if options["tree"]:
            raise UsageError("autoregressive decoding has no tree: leave --tree or --method ar out")
        return load(load_named_teacher(teacher, folder, backend=options["backend"]), **options)
    if predictor is None and chosen_model(teacher) is not None:
        raise UsageError(
            f"no predictor named for {chosen_model(teacher)}: give its folder, or --method ar to decode without one"
        )
    name = predictor or method or "firp"
    folder = predictor_folder(name)
    kind = str(read_config(folder)["predictor"].get("kind"))
    if method not in (None, kind):
        raise UsageError(f"{folder} is a {kind} predictor, not {method!r}{nearest(str(method), ['ar', kind])}")
    if world_size() > 1:
        start()
    return load(teacher, name, ranks=(rank(), world_size()), **options)


def _generate_one(decoder: Decoder, prompt: str, raw: bool, stream: bool, **settings: Any) -> Generation:
    """Generate after one prompt; with `stream` print the text as it is decided."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)

    def show(text: str, drafted: bool) -> None:
        console.print(text, end="", style="green" if drafted else None, markup=False)
        console.file.flush()

    on_text: OnText | None = show if stream else None
    result = decoder.generate(_raw(decoder, prompt) if raw else prompt, stream=on_text, **settings)
    if stream:
        console.print()
    return result


def _raw(decoder: Decoder, text: str) -> list[int]:
    from firp_cli.data.chat import encode_text

    return encode_text(text, decoder.teacher.tokenizer)


def _read_prompts(path: str, limit: int | None) -> Rows:
    from firp_cli.data.datasets import load_prompts

    return load_prompts(path, None, limit)


def _encode(decoder: Decoder, rows: Rows, raw: bool) -> list[Prompt]:
    """Return the token ids of prompts, without those that the chat template refuses."""
    from firp_cli.data.encode_rows import encode_prompts

    teacher = decoder.teacher
    plain = (lambda row: _raw(decoder, row.messages[-1]["content"])) if raw else None
    return [ids for ids in encode_prompts(rows, teacher.tokenizer, teacher.vocab_size, plain) if ids is not None]


def _fitting(decoder: Decoder, prompts: list[Prompt], max_new_tokens: int) -> list[Prompt]:
    """Return the prompts that fit the context with their answers, and print how many do not."""
    from firp_cli.decoding.sequences import check_room

    check_room(max_new_tokens, decoder.teacher.max_positions)
    room = decoder.teacher.max_positions - max_new_tokens
    fitting = [ids for ids in prompts if len(ids) <= room]
    if len(fitting) < len(prompts):
        typer.echo(
            f"skipped {len(prompts) - len(fitting)} of {len(prompts)} prompts longer than {room} tokens", err=True
        )
    return fitting


def _write(results: list[Generation], output: Path | None, as_json: bool, single: bool) -> None:
    """Write the results of a file of prompts, or of a single one where asked for, and print the summary."""
    if single and as_json:
        print_json(_record(results[0]))
    if output is not None or not single:
        _write_lines(output, results)
    typer.echo(_summary(results), err=True)


def _record(result: Generation) -> dict[str, Any]:
    """Return the fields of a JSONL line. A pipeline's steps are ticks: `accepted_lengths` has a 0 or 1 for each."""
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
    """Write JSONL to a file, whole or not at all, or to stdout."""
    from firp_cli.files import write_atomically

    text = "".join(json.dumps(_record(result), ensure_ascii=False) + "\n" for result in results)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))


def _summary(results: list[Generation]) -> str:
    """Return tokens, steps, accepted length, throughput and prefill time of all results in one line."""
    tokens = sum(len(result.token_ids) for result in results)
    steps = sum(result.steps for result in results)
    decoded = sum(sum(result.accepted_lengths) for result in results)
    seconds = sum(result.decode_seconds for result in results)
    prefill = sum(result.prefill_seconds for result in results)
    throughput = f"{decoded / seconds:.1f} tokens/s" if seconds and decoded else "no decoding step"
    pipelines = [result.pipeline for result in results if result.pipeline]
    name, length = "steps", f"accepted length {decoded / steps:.2f}" if steps else "accepted length -"
    if undrafted := sum(result.autoregressive_steps for result in results):
        length += f" ({undrafted} of them autoregressive, chosen by the guard)"
    if pipelines and steps:
        undrafted = sum(trace.autoregressive_tokens for trace in pipelines)
        name, length = "ticks", f"{decoded / steps:.2f} tokens per tick"
        length += f" ({undrafted} of them outside the pipeline, which was slower)" if undrafted else ""
    return f"{tokens} tokens in {steps} {name}, {length}, {throughput}, prefill {prefill:.2f} s"
