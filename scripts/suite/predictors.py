"""Predictors of every kind for a teacher, trained on its own answers, and their files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch

from firp_cli.config import CouplingTraining, TrainingConfig
from firp_cli.files import write_atomically
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import save_predictor
from firp_cli.results import as_json
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.local_trainer import train_local
from suite.answers import predictors_for, stored
from suite.subject import saved, subject
from suite.work import Shared, Table, Work

EPOCHS = 100_000  # the clock ends a run
USED = 0.9  # part of a kind's share of the time; the rest is for work after the last optimizer step
SHARES = {"firp": 0.35, "firp_plus": 0.25, "hidden_transfer": 0.22, "medusa": 0.18}  # shares of the training time
PIPELINE_SHARE = 0.1  # an exit is trained in seconds
RIDGE_LAMBDA = 1e-4
ARCHIVE = "predictors.tar"
MOST_BYTES = 16 * 1000 * 1000 - 100_000  # largest file of the output
HEADERS = ["kind", "parameters", "steps", "seconds", "top-1 by step, start", "top-1 by step, best", "expected length"]


def train_predictors(shared: Shared, work: Work) -> None:
    """Train each kind for its share of the time, those that draft trees first. Later parts read `predictors`, kind to
    predictor, and `saved`, the kinds in the scratch folder.
    """
    sizes, clock, own = shared.sizes, work.clock, subject(shared)
    teacher = own.teacher()
    made = predictors_for(own, teacher)
    library = wrap_model(teacher.model, teacher.tokenizer, teacher.name, check=False)  # as `firp train` has it
    order = sorted(made, key=lambda kind: share(made[kind]), reverse=True)
    sequences = shared.found["sequences"]
    shared.found["predictors"] = {}
    table = Table("Predictors, on held-out answers of the teacher", HEADERS)
    work.tables.append(table)
    for number, kind in enumerate(order):
        predictor = made[kind]
        waiting = sum(share(made[other]) for other in order[number:])
        seconds = USED * clock.left() * share(predictor) / waiting
        settings = TrainingConfig(
            init="ridge" if predictor.ridge_layers() else "identity",
            ridge_lambda=RIDGE_LAMBDA,
            epochs=EPOCHS,
            micro_batch_size=min(sizes.conversations, len(sequences)),
            anchors_per_sequence=sizes.anchors,
            coupling=CouplingTraining(epochs=EPOCHS, anchors_per_sequence=sizes.anchors),
            max_steps=min(sizes.train_steps, 10_000),
            validation_fraction=min(0.05, sizes.held_out / len(sequences)),
            readers=2,
        )
        history = train_local(
            predictor,
            library,
            stored(sequences, predictor),
            settings,
            seconds,
            ridge_sequences=sizes.ridge_answers,
        )
        found = summary(predictor, history)
        work.values[kind] = found | {"settings": settings.model_dump()}
        table.cells.append(_cells(kind, found))
        work.key = "expected accepted length: " + ", ".join(f"{line[0]} {line[-1]}" for line in table.cells)
        dtype = torch.float32 if shared.device.type == "cpu" else teacher.dtype
        shared.found["predictors"][kind] = predictor.to(dtype)
        if shared.teacher is not None:  # the other teacher exists only in this run
            keep(shared, teacher, predictor, work)
        work.save()
    del sequences
    shared.free("sequences")


def keep(shared: Shared, teacher: Teacher, predictor: Predictor, work: Work) -> None:
    """Write a predictor, in 16 bits, to the scratch folder, and all predictors there to the archive."""
    folder = saved(shared, predictor.kind)
    save_predictor(predictor, folder, teacher, torch.bfloat16)
    found = json.dumps(as_json(work.values[predictor.kind]), indent=2) + "\n"
    (folder / "training.json").write_text(found, encoding="utf-8")
    shared.found.setdefault("saved", []).append(predictor.kind)
    pack(shared, work)


def pack(shared: Shared, work: Work) -> None:
    """Rewrite the archive: all saved predictors, except those that would make it larger than MOST_BYTES."""
    if shared.output is None:
        return
    size, folders = 0, []
    for kind in shared.found.get("saved", []):
        folder = saved(shared, kind)
        size += sum(file.stat().st_size + 1024 for file in folder.iterdir())
        if size > MOST_BYTES:
            work.clock.cuts.append(f"the predictor {kind} is too large for {ARCHIVE}")
            break
        folders.append(folder)
    write_atomically(shared.output / ARCHIVE, lambda path: write_archive(path, folders))


def write_archive(path: Path, folders: list[Path]) -> None:
    """Write the folders' files as NAME/FILE."""
    with tarfile.open(path, "w") as archive:
        for folder in folders:
            for file in sorted(folder.iterdir()):
                content = file.read_bytes()
                entry = tarfile.TarInfo(f"{folder.name}/{file.name}")
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))


def share(predictor: Predictor) -> float:
    """Return a kind's share of the training time, relative to the other kinds."""
    return SHARES.get(predictor.kind, PIPELINE_SHARE)


def summary(predictor: Predictor, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of a run: its size, and its first and best measurement on held-out answers."""
    held_out = [row for row in history if row["split"] == "validation"]
    best = max(held_out, key=lambda row: row["expected_accepted_length"])
    return {
        "predictor": predictor.describe(),
        "steps": history[-1]["step"],
        "seconds": history[-1]["seconds"],
        "start": held_out[0],
        "best": best,
        "validations": [[row["step"], row["seconds"], row["expected_accepted_length"]] for row in held_out],
        "expected_accepted_length": best["expected_accepted_length"],
    }


def _cells(kind: str, found: dict[str, Any]) -> list[str]:
    return [
        kind,
        f"{found['predictor']['parameters'] / 1e6:.1f} M",
        str(found["steps"]),
        f"{found['seconds']:.0f}",
        " ".join(f"{share:.2f}" for share in found["start"]["top1"]),
        " ".join(f"{share:.2f}" for share in found["best"]["top1"]),
        f"{found['expected_accepted_length']:.2f}",
    ]
