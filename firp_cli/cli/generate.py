"""`firp generate`: text after a prompt, streamed, with drafted tokens in colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.assets import nearest
from firp_cli.cli.answers import answer_file, answer_one
from firp_cli.cli.terminal import (
    Attention,
    Backend,
    Compiled,
    Force,
    Gpus,
    Graphs,
    Guarded,
    Json,
    Seed,
    SkipLong,
    Stop,
    Temperature,
    Threads,
    TopP,
    Tree,
    Verbose,
    command_line,
    decoding_options,
    quiet_libraries,
    teacher_options,
)
from firp_cli.config import TeacherConfig
from firp_cli.errors import UsageError
from firp_cli.files import check_output

if TYPE_CHECKING:
    from firp_cli.api.decoder import Decoder

Method = Annotated[
    str | None, typer.Option(help="ar (autoregressive decoding), or the predictor's kind, which is the default.")
]


@teacher_options
def generate(
    predictor: Annotated[
        str | None, typer.Argument(help="Predictor folder or embedded name. Default: the embedded FIRP predictor.")
    ] = None,
    *,
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="A user message.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts; writes JSONL.")] = None,
    method: Method = None,
    teacher: TeacherConfig | None = None,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted --output file of --prompts.")
    ] = False,
    skip_long: SkipLong = False,
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
    _check(prompt, prompts, output, resume)
    quiet_libraries(verbose)
    from firp_cli.api.generate_run import GenerateSettings, prompts_to_answer
    from firp_cli.distributed.launch import launch, relayed_errors

    layers, options = decoding_options(backend, compiled, attention, graphs, threads)
    rows = prompts_to_answer(str(prompts), limit, raw) if prompts is not None else []
    if launch(gpus, None, command_line(context)):
        return
    settings = GenerateSettings(max_new_tokens, batch_size, temperature, top_p, seed, tuple(stop or ()), raw)
    loading: dict[str, Any] = {"tree": tree, "backend": layers, "guard": guard, "force": force, "options": options}
    with relayed_errors():
        decoder = _load(predictor, method, teacher, **loading)
        if prompt is not None:
            answer_one(decoder, prompt, settings, output, as_json)
        else:
            answer_file(decoder, str(prompts), rows, settings, output, resume, skip_long)


def _check(prompt: str | None, prompts: Path | None, output: Path | None, resume: bool) -> None:
    """Refuse options that contradict each other, and an output that cannot be written."""
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.jsonl")
    if resume and (prompts is None or output is None):
        raise UsageError("--resume continues the --output file of interrupted --prompts: give both")
    if output is not None and prompts is not None and output.exists() and prompts.exists() and output.samefile(prompts):
        raise UsageError(f"--output {output} is the file of --prompts, which it would overwrite: give another one")
    if output is not None:
        check_output(output, "stream")


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
