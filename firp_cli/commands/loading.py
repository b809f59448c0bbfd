"""Teachers and predictors as commands name them. Imports torch: import it inside a command."""

from __future__ import annotations

from pathlib import Path

from firp_cli.predictors.base import Predictor
from firp_cli.predictors.registry import load_predictor, predictor_folder, read_config
from firp_cli.recipe import DEFAULT_TEACHER, TeacherConfig
from firp_cli.teacher.stack import Teacher


def load_teacher(model: str | None, predictor: Path | None, dtype: str = "auto") -> Teacher:
    """The teacher named on the command line, else the one that the predictor was trained for, else the embedded one."""
    name = model or (read_config(predictor)["teacher"]["name"] if predictor else DEFAULT_TEACHER)
    return Teacher.load(TeacherConfig.model_validate({"model": name, "dtype": dtype}))


def load_pair(name: str, model: str | None, force: bool, dtype: str = "auto") -> tuple[Teacher, Predictor, Path]:
    """A predictor by folder or embedded name, with its teacher."""
    folder = predictor_folder(name)
    teacher = load_teacher(model, folder, dtype)
    return teacher, load_predictor(folder, teacher, force), folder
