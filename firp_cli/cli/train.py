"""`firp train`: fit a predictor on a store of hidden states."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.cli.terminal import (
    Json,
    Verbose,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
    split_recipe,
)
from firp_cli.cli.train_plan import check_devices, print_plan
from firp_cli.config import Recipe
from firp_cli.errors import INTERRUPTED, StoreError, UsageError
from firp_cli.machine import is_main
from firp_cli.recipe import load_recipe

if TYPE_CHECKING:
    from firp_cli.collecting.online import OnlineStates
    from firp_cli.store.reader import Store
    from firp_cli.teacher.teacher import Teacher
    from firp_cli.teacher.weight_files import LoadedWeights

GATE_TOKENS = 128  # new tokens per prompt of the gate


def train(
    recipe: Annotated[
        list[str] | None, typer.Argument(help="Recipe file or shipped name, then section.field=value overrides.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder that `firp collect` filled. Default: the recipe's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Predictor folder to write. Default: the recipe's.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks to start; on a CPU they share the cores.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Machines to start on, in DeepSpeed's format.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print recipe, sizes, memory, disk and hours; start nothing.")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="For --plan: memory of one device, as 80GB. Says whether a rank fits.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="For --plan: tokens of a conversation, where there is no store yet.")
    ] = None,
    device_tflops: Annotated[
        float | None, typer.Option(min=0, help="For --plan: a device's peak, in 1e12 operations per second.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0, max=1, help="For --plan: share of that peak that is reached.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the store's checksums before training.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a predictor with DeepSpeed; write the predictor folder, metrics and checkpoints."""
    name, overrides = split_recipe(recipe or [])
    wanted = _resolve(name, overrides, store, output)
    quiet_libraries(verbose)
    from firp_cli.distributed.launch import adopt_scheduler, launch, ranks_wanted, relayed_errors

    adopt_scheduler()
    if plan:
        ranks, _ = ranks_wanted(gpus, hostfile)
        print_plan(wanted, ranks, as_json, device_memory, tokens, device_tflops, utilisation)
        return
    from firp_cli.training.checkpoint import guard_output
    from firp_cli.training.metrics_log import check_trackers
    from firp_cli.training.plan import check_predictor

    check_predictor(wanted)
    check_trackers(wanted)
    if wanted.data.mode == "cached":
        _need_store(wanted, [*([name] if name else []), *overrides])
    else:
        from firp_cli.collecting.corpus import check_dataset
        from firp_cli.collecting.vllm import check_responder

        check_responder(wanted)
        check_dataset(wanted.data)
    guard_output(Path(str(wanted.output)), resume)
    check_devices(wanted, *ranks_wanted(gpus, hostfile))
    flags = {"--resume": resume, "--no-verify": not verify, "--json": as_json, "--verbose": verbose}
    argv = ["train", *(recipe or []), f"--store={wanted.store}", f"--output={wanted.output}"]
    if launch(gpus, str(hostfile) if hostfile else None, [*argv, *(flag for flag, given in flags.items() if given)]):
        return
    with relayed_errors():
        _train(wanted, resume, verify, as_json)


def _resolve(name: str | None, overrides: list[str], store: Path | None, output: Path | None) -> Recipe:
    """The recipe with the folders that the command line names, or usual ones."""
    wanted = load_recipe(name, overrides)
    if wanted.predictor is None:
        raise UsageError(
            f"{name or 'the command line'} names no predictor: give a recipe with a predictor section "
            "(`firp train demo`), or predictor.kind=firp predictor.layer=4"
        )
    kind, stem = wanted.predictor.kind, Path(name).stem if name else wanted.data.dataset
    return wanted.model_copy(
        update={
            "store": str(store or wanted.store or Path("stores") / stem),
            "output": str(output or wanted.output or Path("runs") / f"{stem}-{kind}"),
        }
    )


def _need_store(recipe: Recipe, typed: list[str]) -> None:
    if not (Path(str(recipe.store)) / "manifest.json").is_file():
        command = " ".join(["firp collect", *typed, f"--output {recipe.store}"])
        raise StoreError(f"no hidden-state store at {recipe.store}; fill it first:\n  {command}")


def _train(recipe: Recipe, resume: bool, verify: bool, as_json: bool) -> None:
    """What every rank does."""
    from firp_cli.distributed.launch import start
    from firp_cli.training.trainer import train as run

    start()
    teacher = _teacher(recipe)
    store = _open(recipe, teacher, verify and is_main()) if recipe.data.mode == "cached" else _make(recipe, teacher)
    output = Path(str(recipe.output))
    terminal = _Terminal()
    with terminal:
        outcome = run(
            recipe,
            teacher,
            store,
            output,
            resume=resume,
            listener=terminal.listener(),
            store_summary=store.describe(),
        )
    if outcome.stopped:
        say(f"stopped after step {outcome.step} of {outcome.total_steps}; the checkpoint is saved, --resume goes on")
        raise typer.Exit(INTERRUPTED)
    if not is_main():
        return
    assert outcome.training is not None
    held = teacher.loaded_weights
    whole = None if held.kind != "whole" else teacher
    del teacher  # its memory may be needed for the whole one
    training = _gate(recipe, held, whole, store, output) or outcome.training
    if as_json:
        print_json(training)
    else:
        _report(training, output)


def _teacher(recipe: Recipe) -> Teacher:
    """As much of the teacher as the run goes through."""
    from firp_cli.api.loading import teacher_line
    from firp_cli.distributed.sharding import load_for_ranks

    assert recipe.predictor is not None
    cached = recipe.data.mode == "cached"
    # predictors of the final state run no layer at all
    lowest = min(recipe.predictor.transfer_layers, default=sys.maxsize) if cached else 0
    teacher = load_for_ranks(recipe.teacher, lowest)
    say(teacher_line(teacher.loaded_weights))
    return teacher


def _open(recipe: Recipe, teacher: Teacher, verify: bool) -> Store:
    from firp_cli.data.chat import template_fingerprint, tokenizer_fingerprint
    from firp_cli.store.reader import Store

    assert recipe.predictor is not None
    store = Store.open(Path(str(recipe.store)), layers=recipe.predictor.required_layers(teacher), verify=verify)
    tokenizer = teacher.tokenizer
    store.check_teacher(teacher.fingerprint, tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer))
    return store


def _make(recipe: Recipe, teacher: Teacher) -> OnlineStates:
    """The recipe's conversations with states that the teacher makes as they are asked for."""
    from firp_cli.collecting.answer import respond
    from firp_cli.collecting.collect_store import check_layers, stored_dtype
    from firp_cli.collecting.corpus import build_corpus, load_messages, longest_sequence
    from firp_cli.collecting.engine_responder import account_line, make_responder
    from firp_cli.collecting.online import HybridStates, OnlineStates
    from firp_cli.distributed.rank_group import RankGroup
    from firp_cli.machine import rank

    assert recipe.predictor is not None
    data, folder = recipe.data, Path(str(recipe.store))
    with progress_bar("tokenizing") as bar:
        corpus = build_corpus(load_messages(data), teacher, data, bar)
    responder = make_responder(recipe, teacher)
    if responder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        longest = longest_sequence(teacher, data)
        with progress_bar("answering") as bar:
            corpus, account = respond(teacher, corpus, data, longest, folder, responder, bar, RankGroup.join())
        say(account_line(account))
    layers, dtype = check_layers(recipe.predictor.required_layers(teacher), teacher), stored_dtype(teacher, data)
    if data.mode == "online":
        return OnlineStates(teacher, corpus, layers, dtype, data.pack_tokens)
    return HybridStates(teacher, corpus, layers, dtype, data.pack_tokens, folder, data.shard_tokens, rank())


class _Terminal:
    """Progress bars one after the other, and a line of figures at each validation."""

    def __init__(self) -> None:
        self.bars = ExitStack()
        self.shown = ""
        self.row: dict[str, Any] = {}
        self.header = False

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.close()

    def listener(self) -> Any:
        from firp_cli.training.metrics_log import Listener

        return Listener(
            ridge=lambda done, total: self.bar("ridge start", done, total),
            step=self.step,
            validation=self.validation,
            note=say,
        )

    def bar(self, name: str, done: int, total: int | None) -> None:
        if name != self.shown:
            self.bars.close()
            self.shown, self.progress = name, self.bars.enter_context(progress_bar(name))
        self.progress(done, total)

    def step(self, done: int, total: int, row: dict[str, Any]) -> None:
        self.row = row
        self.bar("training", done, total)

    def validation(self, row: dict[str, Any]) -> None:
        columns = {
            "step": f"{row['step']:>6}",
            "train loss": f"{self.row['loss']:>10.4f}" if self.row else " " * 9 + "-",
            "held-out": f"{row['loss']:>8.4f}",
            "accepted": f"{row['expected_accepted_length']:>8.3f}",
            "tokens/s": f"{self.row['tokens_per_second']:>8.0f}" if self.row else " " * 7 + "-",
            "data wait": f"{self.row['data_wait']:>9.1%}" if self.row else " " * 8 + "-",
            "top-1 by step": " ".join(f"{rate:.3f}" for rate in row["top1"]),
        }
        if not self.header:
            self.header = True
            say("  ".join(name.rjust(len(cell)) for name, cell in columns.items()))
        say("  ".join(columns.values()))


def _gate(
    recipe: Recipe, held: LoadedWeights, teacher: Teacher | None, store: Store | OnlineStates, output: Path
) -> dict[str, Any] | None:
    """Decode a few held-out prompts with the folder just written; adds the figures to training.json. `teacher` None:
    training held a part of it, the whole one is loaded now.
    """
    from firp_cli.api.loading import complete_teacher
    from firp_cli.evaluation.gate import gate
    from firp_cli.predictors.folder import load_predictor
    from firp_cli.training.batches import split_validation

    settings = recipe.training
    if not settings.gate_prompts:
        say("no gate: training.gate_prompts is 0, so nothing was decoded")
        return None
    training, held_out = split_validation(len(store), settings.validation_fraction, settings.seed)
    prompts = []
    for index in (held_out or training)[: settings.gate_prompts]:
        item = store[index]
        start = int(item.loss_mask.int().argmax())
        if start:
            prompts.append(item.input_ids[:start].tolist())
    began = time.monotonic()
    whole = complete_teacher(recipe.teacher, held) if teacher is None else teacher
    if isinstance(whole, str):
        say(f"no gate: {whole}")
        return _note_gate(output, {"skipped": whole})
    limit = min(GATE_TOKENS, recipe.data.max_new_tokens)
    found = gate(whole, load_predictor(output, whole), prompts, None, limit)
    return _note_gate(output, {**found, "max_new_tokens": limit, "seconds": time.monotonic() - began})


def _note_gate(output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Add what the gate found to training.json; returns all that stands there."""
    import json

    from firp_cli.files import write_json
    from firp_cli.results import plain

    path = output / "training.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["gate"] = plain(found)
    write_json(path, record)
    return record


def _report(training: dict[str, Any], output: Path) -> None:
    first, best = training["validation"]["first"], training["validation"]["best"]
    speed = training["predictor"]["kind"] == "speed"
    per = "that many ticks" if speed else "step"
    typer.echo(f"trained {training['predictor']['kind']} for {training['steps']} steps in {training['seconds']:.0f} s")
    if best:
        start, length = first["expected_accepted_length"], best["expected_accepted_length"]
        chain = " (tokens in as many ticks as the teacher has loops)" if speed else " of a chain"
        typer.echo(f"expected accepted length{chain}: {length:.3f} at step {best['step']} ({start:.3f} at the start)")
    if training["data_wait_share"] is not None:
        typer.echo(f"waiting for data: {training['data_wait_share']:.1%} of step time")
    gate = training.get("gate")
    if gate and "skipped" not in gate:
        typer.echo(
            f"gate: simulated {gate['simulated']:.3f}, decoded {gate['real']:.3f} tokens per {per} "
            f"({gate['prompts']} prompts)"
        )
        if not gate.get("agree", True):
            typer.echo("gate: they differ by more than rounding explains; do not trust this predictor", err=True)
    typer.echo(f"predictor: {output}")
