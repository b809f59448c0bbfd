"""`firp train`: fit a predictor on a store of hidden states."""

from __future__ import annotations

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
from firp_cli.cli.train_plan import print_plan
from firp_cli.errors import INTERRUPTED
from firp_cli.machine import is_main
from firp_cli.recipe import load_recipe

if TYPE_CHECKING:
    from firp_cli.api.train_run import TrainResult, TrainRun
    from firp_cli.training.metrics_log import Listener


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
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the output folder.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print recipe, sizes, memory, disk and hours; start nothing.")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="For --plan: memory of one device, as 80GB. Prints if a rank fits.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="For --plan: tokens per conversation, when there is no store yet.")
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
    load_recipe(name, overrides)  # refuses a faulty recipe before torch is imported
    quiet_libraries(verbose)
    from firp_cli.api.train_run import check_train, resolve_train
    from firp_cli.distributed.launch import adopt_scheduler, launch, ranks_wanted, relayed_errors

    run = resolve_train(name, overrides, store, output)
    adopt_scheduler()
    ranks, local_ranks = ranks_wanted(gpus, hostfile)
    if plan:
        print_plan(run, ranks, as_json, device_memory, tokens, device_tflops, utilisation)
        return
    check_train(run, resume, ranks, local_ranks)
    flags = {"--resume": resume, "--no-verify": not verify, "--json": as_json, "--verbose": verbose}
    argv = ["train", *(recipe or []), f"--store={run.store}", f"--output={run.output}"]
    if launch(gpus, str(hostfile) if hostfile else None, [*argv, *(flag for flag, given in flags.items() if given)]):
        return
    with relayed_errors():
        _train(run, resume, verify, as_json)


def _train(run: TrainRun, resume: bool, verify: bool, as_json: bool) -> None:
    """Train on this rank; rank 0 prints the result."""
    from firp_cli.api.train_run import run_train

    with _Terminal() as terminal:
        result = run_train(run, resume, verify, terminal.listener(), progress_bar)
    if result.stopped:
        say(f"stopped after step {result.steps} of {result.planned_steps}; the checkpoint is saved, --resume continues")
        raise typer.Exit(INTERRUPTED)
    if is_main():
        print_json(result.as_json()) if as_json else _report(result)


class _Terminal:
    """Progress of a run on stderr: one bar after the other, and a line of figures for each validation."""

    def __init__(self) -> None:
        self.bars = ExitStack()
        self.shown = ""
        self.row: dict[str, Any] = {}
        self.header = False

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.close()

    def listener(self) -> Listener:
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
        if done >= total:
            self.bars.close()

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


def _report(result: TrainResult) -> None:
    """Print the result for people."""
    training = result.training
    first, best = training["validation"]["first"], training["validation"]["best"]
    kind = training["predictor"]["kind"]
    stage = training["first_stage"]
    if stage:
        best_of_stage = stage["validation"]["best"]
        length = f", expected accepted length {best_of_stage['expected_accepted_length']:.3f}" if best_of_stage else ""
        typer.echo(f"first stage, the coupling: {stage['steps']} steps in {stage['seconds']:.0f} s{length}")
    if result.steps or not stage:
        typer.echo(f"trained {kind} for {result.steps} steps in {training['seconds']:.0f} s")
    if best:
        start, length = first["expected_accepted_length"], best["expected_accepted_length"]
        of = " (tokens in as many ticks as the teacher has loops)" if kind == "speed" else " of a chain"
        typer.echo(f"expected accepted length{of}: {length:.3f} at step {best['step']} ({start:.3f} at the start)")
    if training["data_wait_share"] is not None:
        typer.echo(f"waiting for data: {training['data_wait_share']:.1%} of step time")
    gate = result.gate
    if gate and "skipped" not in gate:
        per = "in as many ticks as the teacher has loops" if kind == "speed" else "per step"
        typer.echo(
            f"gate: simulated {gate['simulated']:.3f}, decoded {gate['real']:.3f} tokens {per} "
            f"({gate['prompts']} prompts{'' if gate['held_out'] else '; trained text: nothing was held out'})"
        )
        if not gate.get("agree", True):
            typer.echo("gate: they differ by more than rounding explains; do not trust this predictor", err=True)
    typer.echo(f"predictor: {result.output}")
