"""Teachers and predictors by the names that users give them. Imports torch: a command imports this module late."""

from __future__ import annotations

import gc
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from firp_cli.assets import DEFAULT_TEACHER, nearest
from firp_cli.config import TeacherConfig
from firp_cli.data.chat import prompt_warning, turn_end_warning
from firp_cli.decoding.engine import EngineOptions
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.decoding.tree_file import TunedTrees, read_trees
from firp_cli.decoding.tree_spec import TreeSpec, default_tree, parse_tree
from firp_cli.errors import FingerprintError, TeacherError, UsageError
from firp_cli.machine import default_device, free_bytes, readable_bytes
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import load_predictor, predictor_folder, read_config
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.weight_files import LoadedWeights

LOG = logging.getLogger("firp")  # commands print it on stderr
BACKENDS = ("lean", "library")


@dataclass(frozen=True)
class LayerBackend:
    """Implementation of the teacher's decoder layers.

    Attributes:
        name: `lean` (joined matrices, used where they give the library's logits) or `library` (transformers' modules).
        compiled: run the lean layers through torch.compile.

    Raises UsageError on another name, or on `compiled` with the library's layers.
    """

    name: str = "lean"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise UsageError(f"unknown backend {self.name!r}{nearest(self.name, BACKENDS)}")
        if self.compiled and self.name != "lean":
            raise UsageError("--compile is for the lean layers: leave --backend library out")

    @staticmethod
    def of(value: str | LayerBackend) -> LayerBackend:
        """Return the backend of that name, or the given one."""
        return LayerBackend(value) if isinstance(value, str) else value

    def apply(self, teacher: Teacher) -> None:
        """Switch the teacher to the lean layers if asked for; log the reason where it keeps the library's."""
        if self.name != "lean":
            return
        if teacher.device.type == "cpu" and teacher.dtype == torch.float32 and cpu_kernels.to_be_compiled():
            LOG.info("compiling kernels for this processor: a few seconds, once")
        reason = use_lean_layers(teacher, self.compiled)
        if reason:
            LOG.info(reason)


def load_named_teacher(
    choice: str | TeacherConfig | None,
    predictor: Path | None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    backend: LayerBackend | None = None,
) -> Teacher:
    """Load the teacher that is named, else the one that the predictor was trained for, else the embedded one.

    The predictor also remembers dtype, revision, chat template and loop structure: they hold unless `choice` sets
    them.

    Args:
        choice: a name, or a configuration of which only the fields that were set count. dtype: of `choice`, if not
            auto.

    Raises TeacherError; FingerprintError where the predictor's loop structure does not fit the teacher.
    """
    trained_for = read_config(predictor)["teacher"] if predictor else {}
    config = remembered_teacher(choice, predictor, dtype)
    try:
        teacher = load_teacher(config, device)
    except TeacherError as error:
        if config.looped is None or config.model == trained_for.get("name"):
            raise
        raise FingerprintError(
            f"{predictor} was trained for {trained_for.get('name')}, whose layers run {config.looped.loops} times, "
            f"not for {config.model}: {error}"
        ) from error
    _note_differences(teacher, config, trained_for, predictor)
    (backend or LayerBackend()).apply(teacher)
    warn_template(teacher)
    return teacher


def chosen_model(choice: str | TeacherConfig | None) -> str | None:
    """Return the name of a teacher that the user chose; None where only other settings, or nothing, were chosen."""
    if isinstance(choice, TeacherConfig):
        return choice.model if "model" in choice.model_fields_set else None
    return choice


def remembered_teacher(
    choice: str | TeacherConfig | None, predictor: Path | None, dtype: str = "auto"
) -> TeacherConfig:
    """Return the configuration of a predictor's teacher under the user's choice, as `load_named_teacher` explains.

    Raises TeacherError where the teacher is gone, or was trained with code of its repository and the user has not
    allowed it.
    """
    trained_for = read_config(predictor)["teacher"] if predictor else {}
    given = choice.model_dump(include=choice.model_fields_set) if isinstance(choice, TeacherConfig) else {}
    if dtype != "auto":
        given["dtype"] = dtype
    model = chosen_model(choice)
    values = {"looped": trained_for.get("looped"), **trained_for.get("loading", {})}
    if values.pop("trust_remote_code", False) and not given.get("trust_remote_code"):
        raise TeacherError(
            f"{predictor} was trained with Python code from the repository of {trained_for.get('name')}: "
            "--trust-remote-code (trust_remote_code=True) runs it"
        )
    if model is None and predictor is not None:
        values["model"] = _remembered_model(trained_for, predictor)
    elif model is not None:
        values["model"] = model
        if model != trained_for.get("name"):
            values.pop("revision", None)  # of another repository
    if Path(values.get("model", "")).exists():
        values.pop("revision", None)
    if "chat_template" in given:
        values.pop("template_options", None)  # of the other template
    return TeacherConfig.model_validate(values | given)


def _remembered_model(trained_for: dict[str, Any], predictor: Path) -> str:
    """Return the model that a predictor's teacher is loaded from: its path, as seen from the predictor's folder, or its
    name. Raises TeacherError where a path leads nowhere.
    """
    name, path = str(trained_for.get("name") or DEFAULT_TEACHER), trained_for.get("path")
    if path is not None:
        place = (predictor / path).resolve()
        if place.exists():
            return str(place)
        if "revision" in trained_for.get("loading", {}):  # a snapshot of a hub repository
            return name
        raise TeacherError(f"no such folder {place}, the teacher that {predictor} was trained for: give --teacher")
    if Path(name).is_absolute() and not Path(name).exists():
        raise TeacherError(f"no such folder {name}, the teacher that {predictor} was trained for: give --teacher")
    return name


def _note_differences(
    teacher: Teacher, config: TeacherConfig, trained_for: dict[str, Any], predictor: Path | None
) -> None:
    """Log what differs from the teacher as the predictor was trained with it: dtype and chat template."""
    now = teacher.describe()
    if teacher.device.type == "cpu" and config.dtype in ("bfloat16", "float16") and trained_for.get("loading"):
        LOG.info(f"the teacher runs in {config.dtype}; on a CPU --dtype float32 usually decodes faster")
    if config.dtype != "auto" and trained_for.get("dtype", now["dtype"]) != now["dtype"]:
        LOG.info(
            f"{predictor} was trained on states in {trained_for['dtype']}, and the teacher runs in {now['dtype']}: its "
            "drafts may be accepted less often"
        )
    template, before = now.get("chat_template"), trained_for.get("chat_template")
    if template and before and template["fingerprint"] != before["fingerprint"]:
        LOG.info(
            f"{predictor} was trained with another chat template ({before['source']}, {before['fingerprint']}) than "
            f"the one in use ({template['source']}, {template['fingerprint']}): its drafts may be accepted less often"
        )


def warn_template(teacher: Teacher) -> None:
    """Log a line where the teacher's chat template ends turns with a token that ends no answer, and one where it has no
    generation prompt.
    """
    for warning in (
        turn_end_warning(teacher.tokenizer, teacher.eos_token_ids, teacher.name),
        prompt_warning(teacher.tokenizer, teacher.name),
    ):
        if warning:
            LOG.info(warning)


def share_teacher(
    teacher: Teacher, predictor: Path, rank: int, ranks: int, backend: LayerBackend | None = None
) -> None:
    """Release the layers that this rank's pipeline stages do not run, and move the others to its device."""
    loops = len(teacher.boundaries(read_config(predictor)["predictor"].get("loops")))
    part = PipelineStages(loops, rank, ranks)
    teacher.release(part.layers(teacher.boundaries(None if teacher.looped else loops), teacher.num_layers))
    teacher.model.to(default_device())
    (backend or LayerBackend()).apply(teacher)


def load_pair(
    name: str,
    choice: str | TeacherConfig | None,
    force: bool,
    dtype: str = "auto",
    backend: LayerBackend | None = None,
) -> tuple[Teacher, Predictor, Path]:
    """Load a predictor by folder or embedded name, with its teacher. Returns the predictor's folder too.

    Raises PredictorError, TeacherError, FingerprintError.
    """
    folder = predictor_folder(name)
    teacher = load_named_teacher(choice, folder, dtype, backend=backend)
    return teacher, load_predictor(folder, teacher, force), folder


def teacher_line(held: LoadedWeights) -> str:
    """Describe in one line which layers of the teacher this process has loaded."""
    why = f" ({held.note})" if held.note else ""
    if held.kind == "whole":
        return f"teacher: all {held.of} layers loaded, {readable_bytes(held.held)}{why}"
    shared = f", shared over {held.ranks} ranks" if held.ranks > 1 else ""
    part = f"{held.layers} of {held.of} layers loaded{shared}"
    return f"teacher: {part}, {readable_bytes(held.held)}, {readable_bytes(held.saved)} saved{why}"


def complete_teacher(config: TeacherConfig, held: LoadedWeights) -> Teacher | str:
    """Load the whole teacher on one device after a part of it was loaded; return the reason where it does not fit.

    The caller releases the part first.
    """
    gc.collect()
    device = default_device()
    needed, free = held.held + held.saved, free_bytes(device)
    if free is not None and needed > free:
        return (
            f"decoding needs the whole teacher, {readable_bytes(needed)}, and {device} has {readable_bytes(free)} free"
        )
    config = config.model_copy(update={"device_map": None, "sharding": "none"})
    try:
        return load_teacher(config, device)
    except (torch.OutOfMemoryError, MemoryError):
        return f"decoding needs the whole teacher, and {device} has no room for its {readable_bytes(needed)}"


def _tune_command(tree: str | None, folder: Path, temperature: float) -> str:
    """Return the command that adds trees for this machine and temperature to the file that was read."""
    file = ["--tree-file", tree] if tree else []
    return shlex.join(
        ["firp", "tune", str(folder), *file, *(["--temperature", f"{temperature:g}"] if temperature else [])]
    )


def load_trees(
    tree: str | None, folder: Path, predictor: Predictor, teacher: Teacher, temperature: float, options: EngineOptions
) -> TreeSpec | TunedTrees | None:
    """Return the tree that `tree` names (a specification or a tree.json), else those of the predictor's tree.json.

    Of tuned trees only those of this machine, teacher and temperature are used; where there are none, the file's
    default is used and a line is logged. None for predictors that feed a pipeline. Raises UsageError.
    """
    if predictor.pipeline:
        return None
    path = Path(tree) if tree else folder / "tree.json"
    if not (path.is_file() if tree else os.path.lexists(path)):  # a folder or a broken link is no tree file
        return parse_tree(tree, predictor.steps) if tree else default_tree(None, predictor)
    from firp_cli.evaluation.environment import machine_key

    trees = read_trees(path, predictor.steps)
    key = machine_key(teacher, options.attention, options.graphs)
    fitting = trees.fitting(key, teacher.fingerprint, temperature)
    if trees.entries and not fitting.entries:
        here = any((entry.machine, entry.teacher) == (key, teacher.fingerprint) for entry in trees.entries)
        LOG.info(
            f"{path} was tuned {'for another temperature' if here else 'on another machine'}, {trees.default} is used: "
            f"`{_tune_command(tree, folder, temperature)}` measures this {'temperature' if here else 'machine'}"
        )
    return fitting if fitting.entries else trees.default
