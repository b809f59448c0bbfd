"""`collect`: fill a hidden-state store from Python, as `firp collect` does; `write_prompts`: as `firp prompts`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from firp_cli.api.loading import teacher_line, warn_template
from firp_cli.collecting.collect_store import (
    CollectSummary,
    OpenProgress,
    collect_store,
    silent,
)
from firp_cli.collecting.corpus import check_dataset
from firp_cli.collecting.engine_responder import make_responder
from firp_cli.collecting.own_prompts import PromptSettings, own_prompts
from firp_cli.collecting.vllm import check_responder
from firp_cli.config import Recipe, TeacherConfig
from firp_cli.data.datasets import dataset_names
from firp_cli.data.hub import UnreachableError
from firp_cli.data.readers import dataset_label
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.distributed.sharding import load_for_ranks
from firp_cli.errors import UsageError
from firp_cli.files import check_output, open_lines
from firp_cli.machine import is_main
from firp_cli.recipe import load_recipe
from firp_cli.results import Progress, no_progress
from firp_cli.store.writer import check_target
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.teacher import Teacher

LOG = logging.getLogger("firp")


@dataclass(frozen=True)
class CollectRun:
    """A recipe resolved for collecting. `layers` None: those that the recipe's predictor reads."""

    recipe: Recipe
    store: Path
    layers: tuple[int, ...] | None = None


def collect(
    recipe: Recipe | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: OpenProgress = silent,
) -> CollectSummary:
    """Run the teacher over the recipe's conversations and keep its hidden states in a store.

    Without a launcher this process does all the work. Under torchrun, srun or DeepSpeed every rank calls this.

    Args:
        recipe: a Recipe, a recipe file, or the name of a shipped recipe; None: defaults and `overrides` alone.
        overrides: `section.field=value` each.
        layers: layers to store beside the final state. None: those that the recipe's predictor reads, or the middle
            layer of a recipe without predictor.
        output: folder of the store. None: the recipe's, else `stores/DATASET`.
        resume: finish an unfinished store and rebuild damaged shards.
        progress: opens a progress bar, as `progress("collecting")`.

    Raises FirpError as `collect_store`, and for a recipe, data set or responder that cannot be used.
    """
    run = resolve_collect(recipe, overrides, layers, output)
    check_collect(run, resume)
    return run_collect(run, resume, progress)


def resolve_collect(
    recipe: Recipe | str | Path | None,
    overrides: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    output: str | Path | None = None,
) -> CollectRun:
    """Return the recipe with its overrides, the store's folder and the layers. Raises RecipeError."""
    resolved = load_recipe(recipe, overrides)
    if output is not None:
        resolved = resolved.model_copy(update={"store": str(output)})
    store = Path(resolved.store or default_store(resolved.data.dataset))
    return CollectRun(resolved, store, None if layers is None else tuple(layers))


def default_store(dataset: str) -> str:
    """Return `stores/NAME` for a data set's name, hub id or file."""
    names = [dataset_label(name).replace("/", "--").replace(":", "--") for name in dataset_names(dataset)]
    return f"stores/{'-'.join(names)}"


def check_collect(run: CollectRun, resume: bool = False, estimating: bool = False) -> None:
    """Check folder, responder and data set before a teacher is loaded. Raises FirpError."""
    if not estimating and is_main():  # rank 0 may hold the folder's lock when another rank gets here
        check_output(run.store)
        check_target(run.store, resume)
    if not estimating:  # arithmetic needs no package
        check_responder(run.recipe)
    try:
        check_dataset(run.recipe.data, training=True)
    except UnreachableError:
        if not estimating or run.recipe.data.limit is None:
            raise


def run_collect(run: CollectRun, resume: bool = False, progress: OpenProgress = silent) -> CollectSummary:
    """Collect a run that `check_collect` has passed. Every rank calls this."""
    recipe = run.recipe
    group = RankGroup.join()
    teacher = group.run_on_all(lambda: load_collecting(recipe))
    return collect_store(
        teacher,
        recipe.data,
        chosen_layers(run, teacher),
        run.store,
        resume=resume,
        progress=progress,
        recipe=recipe.model_dump(),
        responder=group.run_on_all(lambda: make_responder(recipe, teacher)),
    )


def write_prompts(
    teacher: str | TeacherConfig,
    output: str | Path,
    count: int,
    settings: PromptSettings | None = None,
    progress: Progress = no_progress,
) -> int:
    """Let a chat model write `count` user messages into a new .jsonl file, which `data.dataset` may name; return how
    many it wrote. After an interruption the file holds those that were written.

    Args:
        teacher: model folder, hub id, .gguf file or known name; or its configuration.

    Raises UsageError where the file exists or has another ending, else FirpError as `own_prompts` and for a teacher
    that cannot be loaded.
    """
    path, written = Path(output), 0
    if path.exists():
        raise UsageError(f"{path} exists: give another --output, or remove it")
    if path.suffix.lower() != ".jsonl":
        raise UsageError(f"{path} does not end in .jsonl, by which its rows are read: give such an --output")
    check_output(path, "file")
    config = TeacherConfig(model=teacher) if isinstance(teacher, str) else teacher
    with open_lines(path, keep=False) as stream:
        try:
            loaded = load_collecting(Recipe(teacher=config))
            for text in own_prompts(loaded, count, settings or PromptSettings(), progress):
                row = {"messages": [{"role": "user", "content": text}]}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
                written += 1
        finally:
            if not written:
                path.unlink()
    return written


def load_collecting(recipe: Recipe) -> Teacher:
    """Load the teacher; with fast layers where they fit, since answers and states are then computed faster."""
    teacher = load_for_ranks(recipe.teacher)
    LOG.info(teacher_line(teacher.loaded_weights))
    use_lean_layers(teacher)
    if recipe.data.regenerate:
        warn_template(teacher)
    return teacher


def chosen_layers(run: CollectRun, teacher: Teacher) -> Sequence[int]:
    """Return the layers to store: those of the run, else the predictor's, else the middle layer."""
    if run.layers is not None:
        return run.layers
    predictor = run.recipe.predictor
    return [max(1, teacher.num_layers // 2)] if predictor is None else predictor.required_layers(teacher)
