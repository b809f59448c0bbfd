#!/usr/bin/env python3
"""GPU tests and measurements in one command of under seven minutes.

A smoke test comes first; the command ends with status 1 if it fails. Then random teachers of 7 and 1 billion parameters
(ceilings, autoregressive decoding, passes of many rows, decoding steps, prompts, batches, transformers' `generate`),
predictors trained, tuned, benched and compared in fp32, their accepted lengths projected onto the large shape, and the
tests marked `gpu`. The predictors belong to a teacher of about 100 million parameters that is trained by the suite or,
with `--teacher`, to a real one: it answers the prompts of the data folder, and its trained predictors are returned in
predictors.tar.

Groups of parts are processes of their own with time limits. Every part has a share of the time; work that does not fit
is skipped, failures are recorded, and the other parts continue. The output folder holds gpu_suite.json, gpu_suite.md,
gpu_suite.log and, with `--teacher`, predictors.tar; they are rewritten as results arrive.

The suite runs from a checkout, installed or not, and needs neither deepspeed nor datasets. Without `.git` it records
the environment's FIRP_GIT_COMMIT. `--device cpu` runs all parts at toy size.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

BEGAN = time.monotonic()
SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # query devices without using one
os.environ.setdefault("PYTHONUNBUFFERED", "1")

from suite.needs import missing
from suite.spare import FLAG, Spare, read_job

FIRST: Spare | None = None  # a process that imports while this one does
if __name__ == "__main__":
    if lacking := missing(sys.argv[1:]):
        print(f"the suite needs modules that are not installed: {', '.join(lacking)}", file=sys.stderr)
        sys.exit(2)
    if not {FLAG, "-h", "--help"} & set(sys.argv):
        FIRST = Spare(SCRIPT, sys.argv[1:])

import torch
from transformers.utils import logging

from firp_cli.config import TeacherConfig
from firp_cli.files import cache_folder
from firp_cli.provenance import environment
from firp_cli.teacher.source import locate
from suite import (
    answers,
    attention,
    benches,
    gpu_tests,
    groups,
    kernels,
    machine,
    predictors,
    products,
    replay,
    report,
    speed,
    steps,
    teacher,
)
from suite import smoke as smoking
from suite.groups import Found, Plan
from suite.sizes import FULL, QUICK, TOY
from suite.work import Part, Shared, grouped, select

MINUTES, QUICK_MINUTES = 6.8, 3.0
SPARE = 8.0  # seconds at the end that belong to no part
TOKENS = 5_000_000
SMOKE_SECONDS = 80.0  # with kernels to compile
CACHE = "FIRP_CACHE_DIR"


def chain(name: str, seconds: Sequence[float]) -> list[Part]:
    """Return the parts that train predictors for a teacher, with their shares."""
    first = (f"{name}.teacher",) if name == "trained" else ()
    gives = "predictors" if name == "trained" else "saved"
    both = (*first, f"{name}.train")
    runs: list[tuple[str, Callable[..., None], dict[str, Any]]] = [
        ("answers", answers.write_answers, {"least": 10, "needs": first, "gives": "sequences"}),
        ("train", predictors.train_predictors, {"least": 15, "needs": (*first, f"{name}.answers"), "gives": gives}),
        ("tune", benches.tune_trees, {"least": 10, "needs": both}),
        ("bench", benches.bench, {"least": 10, "needs": both, "gives": "traces"}),
        ("exact", benches.exact, {"needs": both}),
    ]
    return [
        Part(f"{name}.{part}", run, share, group="predictors", **options)
        for (part, run, options), share in zip(runs, seconds, strict=True)
    ]


def shaped(name: str, run: Callable[..., None], share: float, group: str, **options: Any) -> Part:
    """Return a part that measures a random teacher."""
    return Part(name, partial(run, name=name.split(".")[0]), share, group=group, **options)


PARTS = [  # shares of the time: seconds, about
    Part("smoke", smoking.smoke, 30, group="smoke", least=0, most=SMOKE_SECONDS),
    Part("bandwidth", machine.bandwidth, 4, group="7b", least=0, most=5),
    shaped("7b.ar", speed.ar, 20, "7b"),
    shaped("7b.kernels", kernels.kernels, 25, "7b"),
    shaped("7b.breakdown", steps.breakdown, 12, "7b"),
    shaped("7b.batches", speed.batches, 15, "7b"),
    shaped("7b.passes", steps.passes, 15, "7b"),
    Part("trained.teacher", teacher.train_teacher, 60, group="predictors", least=15, gives="state"),
    *chain("trained", (10, 40, 35, 50, 20)),
    *chain("real", (80, 100, 45, 70, 20)),
    Part("replay", replay.replay, 20, group="predictors", needs=("trained.bench", "real.bench")),
    shaped("7b.products", products.products, 40, "products"),
    shaped("7b.attention", attention.attention, 15, "products"),
    Part("tests", gpu_tests.tests, 60, group="tests", least=15),
    shaped("1b.ar", speed.ar, 10, "1b"),
    shaped("1b.kernels", kernels.kernels, 20, "1b"),
    shaped("1b.breakdown", steps.breakdown, 6, "1b"),
    shaped("1b.batches", speed.batches, 10, "1b"),
    shaped("1b.passes", steps.passes, 10, "1b"),
    shaped("1b.prefill", speed.prefill, 4, "1b", least=2),
    shaped("1b.hf", speed.hf, 7, "1b"),
    shaped("135m.ar", speed.ar, 6, "135m"),
    shaped("135m.kernels", kernels.kernels, 12, "135m"),
    shaped("7b.prefill", speed.prefill, 6, "7b again", least=2),
    shaped("7b.hf", speed.hf, 9, "7b again"),
    Part("speed", benches.looped, 16, group="speed"),
    shaped("1b.compiled", speed.compiled, 50, "compiled"),
    shaped("7b.compiled", speed.compiled, 75, "compiled"),
]


def offered(with_teacher: bool) -> list[Part]:
    """Return the parts that exist with a real teacher, or without one."""
    left_out = "trained." if with_teacher else "real."
    return [part for part in PARTS if not part.name.startswith(left_out)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_suite"), help="folder of the report")
    parser.add_argument("--minutes", type=float, help=f"of the whole run ({MINUTES:g}, quick: {QUICK_MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help="fewer points, less text, fewer prompts")
    parser.add_argument("--parts", help=f"some of {', '.join(part.name for part in PARTS)}; `7b` is all of its parts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--data-dir", help="folder with data sets as NAME/SPLIT.jsonl")
    parser.add_argument("--teacher", help="a real teacher: a folder, a .gguf file, a known name")
    parser.add_argument(
        "--predictors", type=Path, nargs="+", default=[], help="folders of predictors of that teacher to bench as well"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"that the real teacher answers at most ({TOKENS})")
    parser.add_argument(FLAG, action="store_true", help=argparse.SUPPRESS)  # a group's process
    known = parser.parse_args(arguments)
    known.arguments = list(sys.argv[1:] if arguments is None else arguments)
    known.minutes = known.minutes or (QUICK_MINUTES if known.quick else MINUTES)
    if known.predictors and not known.teacher:
        parser.error("--predictors needs --teacher")
    if known.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu runs all parts at toy size")
    try:
        wanted = [name.strip() for name in known.parts.split(",")] if known.parts else None
        known.chosen = select(offered(bool(known.teacher)), wanted)
    except ValueError as error:
        parser.error(str(error))
    return known


def describe(shared: Shared) -> dict[str, Any]:
    """Describe the device by its own properties."""
    device = shared.device
    found: dict[str, Any] = {"type": device.type, "dtype": str(shared.dtype).removeprefix("torch.")}
    if device.type != "cuda":
        return found | {"name": environment()["processor"], "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
    }


def make_shared(known: argparse.Namespace, scratch: Path) -> Shared:
    """Return the values that the parts of a process share."""
    device = torch.device(known.device, 0) if known.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every length, which takes longer than it saves
    return Shared(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        sizes=sizes_of(known),
        root=ROOT,
        data_dir=known.data_dir,
        teacher=known.teacher,
        predictors=known.predictors,
        tokens=known.tokens,
        scratch=scratch,
        output=known.output,
    )


def sizes_of(known: argparse.Namespace) -> Any:
    """Return the sizes of all parts."""
    return TOY if known.device == "cpu" else QUICK if known.quick else FULL


class Run:
    """All groups of a run and their report."""

    def __init__(self, known: argparse.Namespace, scratch: Path, began: float) -> None:
        self.known, self.scratch, self.began = known, scratch, began
        self.until = began + 60 * known.minutes - SPARE
        self.found = Found()
        self.spare, self.count = FIRST, 0
        self.held: Shared | None = None
        names = [part.name for part in known.chosen]
        settings = {"sizes": sizes_of(known).name, "minutes": known.minutes, "parts": names, "teacher": known.teacher}
        argv = [Path(word).name if Path(word).is_absolute() else word for word in environment()["argv"]]
        self.head = {
            "environment": environment() | {"argv": argv},
            "settings": settings,
        }  # paths mean nothing on other machines
        known.output.mkdir(parents=True, exist_ok=True)
        self.log = (known.output / f"{report.NAME}.log").open("wb", buffering=0)

    def write(self) -> None:
        """Write the report with the results so far."""
        report.write(self.known.output, self.head, time.monotonic() - self.began, self.found)

    def tell(self, text: str) -> None:
        """Print a line."""
        self.log.write(f"{text}\n".encode())
        print(text, flush=True)

    def groups(self, isolated: bool) -> bool:
        """Run the groups; return True if no part failed. Stops after a failed smoke test."""
        chosen = self.known.chosen
        waiting = grouped(chosen)
        if isolated and len(waiting) > 1:
            self._unpack()
        while waiting:
            parts, later = waiting[0], [part for group in waiting[1:] for part in group]
            plan = Plan(parts, later, chosen, self.until)
            if isolated:
                left = self._apart(plan)
            else:
                shared = self._shared()
                groups.run_parts(plan, shared, self.found, lambda *_: self.write(), self.tell)
                left = []
            waiting[:1] = [left] if left else []
            self.write()
            smoked = self.found.records.get("smoke", {}).get("status", "done")
            if smoked != "done":
                self.tell("the smoke test failed: nothing else is run")
                return False
        return all(record["status"] != "failed" for record in self.found.records.values())

    def _shared(self) -> Shared:
        """Shared values of an in-process run: one object for all groups."""
        if self.held is None:
            self.held = make_shared(self.known, self.scratch)
            self.found.device = describe(self.held)
        return self.held

    def _apart(self, plan: Plan) -> list[Part]:
        """Run a group in a process of its own, while the next process starts; return the parts that remain."""
        self.count += 1
        path = self.scratch / f"found{self.count}.json"
        process = (self.spare or self._ready()).start(self._job(plan, path))
        self.spare = self._ready() if plan.later else None
        limit = self.until + SPARE / 2
        reason = groups.Watch(process, path, self._forward, self._changed, limit).wait()
        ended = [name for name, record in self.found.records.items() if record["status"] != "running"]
        left = groups.remaining(plan.parts, self.found, reason)
        for name, record in self.found.records.items():
            if name not in ended:
                self.tell(groups.line(name, record))
        return left

    def _ready(self) -> Spare:
        return Spare(SCRIPT, self.known.arguments)

    def _job(self, plan: Plan, path: Path) -> dict[str, Any]:
        """Return the job of a group's process."""
        names = {"parts": plan.parts, "later": plan.later, "chosen": plan.chosen}
        job: dict[str, Any] = {name: [part.name for part in parts] for name, parts in names.items()}
        job |= {"until": plan.until, "given": self.found.given, "scratch": str(self.scratch), "path": str(path)}
        return job | {"environment": {CACHE: os.environ[CACHE]}}

    def _unpack(self) -> None:
        """Unpack a real teacher's GGUF file while other groups run. Its first part reports errors of the file."""

        def unpack() -> None:
            dtype = "bfloat16" if self.known.device == "cuda" else "float32"
            with suppress(Exception):
                locate(TeacherConfig.model_validate({"model": self.known.teacher, "dtype": dtype}))

        if self.known.teacher is not None:
            threading.Thread(target=unpack, daemon=True).start()

    def _forward(self, text: bytes) -> None:
        self.log.write(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()

    def _changed(self, state: dict[str, Any]) -> None:
        self.found.take(state)
        self.write()

    def close(self) -> None:
        """Write the report and end waiting processes."""
        self.write()
        self.log.close()
        if self.spare is not None:
            self.spare.end()


def run_job(known: argparse.Namespace) -> int:
    """Wait for a group's job and do it."""
    preload()
    job = read_job()
    if job is None:
        return 1
    os.environ.update(job["environment"])
    named = {part.name: part for part in PARTS}
    parts, later, chosen = ([named[name] for name in job[key]] for key in ("parts", "later", "chosen"))
    plan, found = Plan(parts, later, chosen, job["until"]), Found(given=job["given"])
    return groups.child(plan, partial(make_shared, known, Path(job["scratch"])), found, Path(job["path"]), describe)


def preload() -> None:
    """Import modules that every group needs."""
    from transformers.models.llama import modeling_llama  # noqa: F401


def main(arguments: Sequence[str] | None = None, began: float | None = None, isolated: bool = True) -> int:
    """Run the suite; return 1 if a part failed. `isolated`: groups are processes of their own."""
    known = parse(arguments)
    logging.set_verbosity_error()
    if known.job:
        return run_job(known)
    former = signal.signal(signal.SIGTERM, _terminate)
    began = time.monotonic() if began is None else began
    compiled = cache_folder() / "kernels"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        patch.dict(os.environ, {CACHE: f"{scratch}/cache"}),
    ):
        _keep_kernels(compiled, Path(scratch) / "cache")
        run = Run(known, Path(scratch), began)  # caches belong to this run alone
        try:
            whole = run.groups(isolated)
        finally:
            run.close()
            signal.signal(signal.SIGTERM, former)
    print(f"report: {known.output / report.NAME}.md", flush=True)
    return 0 if whole else 1


def _keep_kernels(compiled: Path, cache: Path) -> None:
    """Let a run's cache have the CPU's kernels of the user's, which take seconds to compile."""
    cache.mkdir()
    if compiled.is_dir():
        (cache / "kernels").symlink_to(compiled)


def _terminate(number: int, frame: Any) -> None:
    """Handle a signal as an error: results are written, and no process remains."""
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
