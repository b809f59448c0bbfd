"""Teachers and predictors as commands name them. Imports torch: import it inside a command."""

from __future__ import annotations

from pathlib import Path

import torch

from firp_cli.decoding.ranks import Ranks
from firp_cli.errors import FingerprintError, TeacherError
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.registry import load_predictor, predictor_folder, read_config
from firp_cli.recipe import DEFAULT_TEACHER, TeacherConfig
from firp_cli.teacher.stack import Teacher, default_device


def load_teacher(
    model: str | None, predictor: Path | None, dtype: str = "auto", device: torch.device | str | None = None
) -> Teacher:
    """The teacher named on the command line, else the one that the predictor was trained for, else the embedded one.

    How its layers loop, where its own config does not say, is what the predictor was trained with.
    """
    trained_for = read_config(predictor)["teacher"] if predictor else {}
    name = model or trained_for.get("name") or DEFAULT_TEACHER
    looped = trained_for.get("looped")
    config = TeacherConfig.model_validate({"model": name, "dtype": dtype, "looped": looped})
    try:
        return Teacher.load(config, device)
    except TeacherError as error:
        if looped is None or name == trained_for.get("name"):
            raise
        raise FingerprintError(
            f"{predictor} was trained for {trained_for.get('name')}, whose layers run {looped['loops']} times; "
            f"{name} is another one: {error}"
        ) from error


def share_teacher(teacher: Teacher, predictor: Path, rank: int, ranks: int) -> None:
    """Keep only the layers that this rank's stages of the predictor's pipeline run, and move them to its device."""
    loops = len(teacher.boundaries(read_config(predictor)["predictor"].get("loops")))
    part = Ranks(loops, rank, ranks)
    teacher.release(part.layers(teacher.boundaries(None if teacher.looped else loops), teacher.num_layers))
    teacher.model.to(default_device())


def load_pair(
    name: str, model: str | None, force: bool, dtype: str = "auto", ranks: tuple[int, int] = (0, 1)
) -> tuple[Teacher, Predictor, Path]:
    """A predictor by folder or embedded name, with its teacher, or that part of it which rank `ranks[0]` of `ranks[1]`
    runs.
    """
    folder = predictor_folder(name)
    alone = ranks[1] == 1 or read_config(folder)["predictor"].get("kind") != "speed"
    teacher = load_teacher(model, folder, dtype, None if alone else "cpu")
    if not alone:
        share_teacher(teacher, folder, *ranks)
    return teacher, load_predictor(folder, teacher, force), folder
