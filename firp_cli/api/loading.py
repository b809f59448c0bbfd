"""Teachers and predictors as commands name them. Imports torch: import it inside a command."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from firp_cli.assets import DEFAULT_TEACHER, nearest
from firp_cli.config import TeacherConfig
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

LOG = logging.getLogger("firp")  # the program prints it on stderr
STACKS = ("lean", "library")


@dataclass(frozen=True)
class LayerChoice:
    """Which layers decode. Raises UsageError on a name that is none of STACKS."""

    layers: str = "lean"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.layers not in STACKS:
            raise UsageError(f"unknown layers {self.layers!r}{nearest(self.layers, STACKS)}")
        if self.compiled and self.layers != "lean":
            raise UsageError("--compile is for the lean layers: leave --layers library out")

    def apply(self, teacher: Teacher) -> None:
        """Use the lean layers if they are wanted and fit; say why not where they do not."""
        if self.layers != "lean":
            return
        if teacher.device.type == "cpu" and teacher.dtype == torch.float32 and cpu_kernels.to_be_compiled():
            LOG.info("compiling kernels for this processor: a few seconds, once")
        reason = use_lean_layers(teacher, self.compiled)
        if reason:
            LOG.info(reason)


def load_named_teacher(
    model: str | None,
    predictor: Path | None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    choice: LayerChoice | None = None,
) -> Teacher:
    """The teacher named on the command line, else the one that the predictor was trained for, else the embedded one.

    How its layers loop, where its own config does not say, is what the predictor was trained with.
    """
    choice = choice or LayerChoice()
    trained_for = read_config(predictor)["teacher"] if predictor else {}
    name = model or trained_for.get("name") or DEFAULT_TEACHER
    looped = trained_for.get("looped")
    config = TeacherConfig.model_validate({"model": name, "dtype": dtype, "looped": looped})
    try:
        teacher = load_teacher(config, device)
    except TeacherError as error:
        if looped is None or name == trained_for.get("name"):
            raise
        raise FingerprintError(
            f"{predictor} was trained for {trained_for.get('name')}, whose layers run {looped['loops']} times; "
            f"{name} is another one: {error}"
        ) from error
    choice.apply(teacher)
    return teacher


def share_teacher(teacher: Teacher, predictor: Path, rank: int, ranks: int, choice: LayerChoice | None = None) -> None:
    """Keep only the layers that this rank's stages of the predictor's pipeline run, and move them to its device."""
    loops = len(teacher.boundaries(read_config(predictor)["predictor"].get("loops")))
    part = PipelineStages(loops, rank, ranks)
    teacher.release(part.layers(teacher.boundaries(None if teacher.looped else loops), teacher.num_layers))
    teacher.model.to(default_device())
    (choice or LayerChoice()).apply(teacher)


def load_pair(
    name: str,
    model: str | None,
    force: bool,
    dtype: str = "auto",
    ranks: tuple[int, int] = (0, 1),
    choice: LayerChoice | None = None,
) -> tuple[Teacher, Predictor, Path]:
    """A predictor by folder or embedded name, with its teacher, or that part of it which rank `ranks[0]` of `ranks[1]`
    runs.
    """
    folder = predictor_folder(name)
    alone = ranks[1] == 1 or read_config(folder)["predictor"].get("kind") != "speed"
    teacher = load_named_teacher(model, folder, dtype, None if alone else "cpu", choice)
    if not alone:
        share_teacher(teacher, folder, *ranks, choice)
    return teacher, load_predictor(folder, teacher, force), folder


def teacher_line(held: LoadedWeights) -> str:
    """What of the teacher this process has loaded, for the user."""
    why = f" ({held.note})" if held.note else ""
    if held.kind == "whole":
        return f"teacher: all {held.of} layers loaded, {readable_bytes(held.held)}{why}"
    shared = f", shared over {held.ranks} ranks" if held.ranks > 1 else ""
    part = f"{held.layers} of {held.of} layers loaded{shared}"
    return f"teacher: {part}, {readable_bytes(held.held)}, {readable_bytes(held.saved)} saved{why}"


def complete_teacher(config: TeacherConfig, held: LoadedWeights) -> Teacher | str:
    """The whole teacher on one device, where there was a part of it; or why it does not fit there.

    The caller lets go of the part first.
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


def load_trees(
    tree: str | None, folder: Path, predictor: Predictor, teacher: Teacher, temperature: float, options: EngineOptions
) -> TreeSpec | TunedTrees | None:
    """The tree that `--tree` names, else those of the predictor's tree.json; of tuned ones those of this machine, and
    a line where there are none. None for predictors that feed a pipeline. Raises UsageError.
    """
    if predictor.pipeline:
        return None
    path = Path(tree) if tree else folder / "tree.json"
    if not path.is_file():
        return parse_tree(tree, predictor.steps) if tree else default_tree(None, predictor)
    from firp_cli.evaluation.environment import machine_key

    trees = read_trees(path, predictor.steps)
    key = machine_key(teacher, options.attention, options.graphs)
    own = trees.fitting(key, teacher.fingerprint, temperature)
    if trees.entries and not own.entries:
        here = any((entry.machine, entry.teacher) == (key, teacher.fingerprint) for entry in trees.entries)
        LOG.info(
            f"{path} was tuned {'for another temperature' if here else 'on another machine'}, {trees.default} is used: "
            f"`firp tune {folder}` measures this one"
        )
    return own if own.entries else trees.default
