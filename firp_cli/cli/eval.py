"""`firp eval`: how good a predictor's drafts are, without decoding."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.cli.terminal import Force, Json, Model, Tree, Verbose, print_json, progress_bar, quiet_libraries, say
from firp_cli.config import DataConfig, Recipe
from firp_cli.errors import UsageError
from firp_cli.recipe import load_recipe

if TYPE_CHECKING:
    from firp_cli.decoding.tree_spec import TreeSpec
    from firp_cli.evaluation.quality import Sequences
    from firp_cli.predictors.base import Predictor
    from firp_cli.results import EvalReport, PipelineReport
    from firp_cli.teacher.teacher import Teacher

DEFAULT_LIMIT = 40
DECODED = 16  # prompts that a pipeline decodes for its diagnostics
DECODED_TOKENS = 128  # new tokens of each


@dataclass
class _Subset:
    """Some sequences of a store."""

    store: Sequences
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        return self.store[self.indices[index]]


def evaluate(
    predictor: Annotated[str, typer.Argument(help="Predictor folder or embedded name.")],
    store: Annotated[Path | None, typer.Option(help="A store made by `firp collect`.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Known name, hub id or .jsonl file: the teacher answers its test prompts first.")
    ] = None,
    teacher: Model = None,
    data_dir: Annotated[str | None, typer.Option(help="Where NAME/test.jsonl lies. Default: $FIRP_DATA_DIR.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"Conversations at most. Default: all of a store, {DEFAULT_LIMIT} prompts."),
    ] = None,
    tree: Tree = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/eval-...")] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure top-1, top-5, KL, expected accepted length and similarity by step; write eval.json and figures."""
    if store is not None and dataset is not None:
        raise UsageError("give either --store or --dataset")
    quiet_libraries(verbose)
    from firp_cli.api.loading import load_pair
    from firp_cli.evaluation.environment import measurement_environment
    from firp_cli.evaluation.quality import evaluate as measure
    from firp_cli.results import EvalReport

    model, loaded, folder = load_pair(predictor, teacher, force)
    spec = _tree(tree, folder, loaded)
    source = _sequences(model, loaded, _recipe(folder), store, dataset, data_dir, limit)
    with source as (sequences, data), progress_bar("evaluating") as progress:
        quality = measure(model, loaded, sequences, spec, limit=limit, progress=progress)
        pipeline = _pipeline(model, loaded, sequences, limit)
    report = EvalReport(
        environment=measurement_environment(model),
        teacher=model.describe(),
        predictor={"folder": str(folder), **loaded.describe()},
        data={**data, "sequences": quality.sequences, "anchors": quality.anchors},
        steps=quality.steps,
        expected_accepted_length_chain=quality.expected_accepted_length_chain,
        expected_accepted_length_tree=quality.expected_accepted_length_tree,
        tree=str(spec) if spec else "",
        pipeline=pipeline,
        similarity=quality.similarity,
    )
    target = output or Path("runs") / f"eval-{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    write_report(report, target)
    if as_json:
        from firp_cli import results

        print_json(results.as_json(report))
    else:
        _print(report, target)


def _tree(tree: str | None, folder: Path, predictor: Predictor) -> TreeSpec | None:
    """The tree that drafts are judged with, each node's own; None for a predictor that feeds a pipeline."""
    from firp_cli.decoding.tree_spec import default_tree, parse_tree

    if predictor.pipeline and tree:
        raise UsageError(f"{folder} feeds a pipeline, which has no tree: leave --tree out")
    if predictor.pipeline:
        return None
    spec = parse_tree(tree, predictor.steps) if tree else default_tree(folder, predictor)
    return replace(spec, budget=None)


def _pipeline(teacher: Teacher, predictor: Predictor, sequences: Sequences, limit: int | None) -> PipelineReport | None:
    """For early exits: the pipeline at work on the prompts of a few of the sequences, and the cost of its tick."""
    from firp_cli.decoding.speed.pipeline import PipelineEngine
    from firp_cli.evaluation.speed_ticks import measure_tick, pipeline_report
    from firp_cli.predictors.speed import SpeedPredictor

    if not isinstance(predictor, SpeedPredictor):
        return None
    engine = PipelineEngine(teacher, predictor, guard=False)
    generations = []
    for index in range(min(len(sequences), limit or len(sequences), DECODED)):
        ids, mask = sequences[index].input_ids, sequences[index].loss_mask
        start = int(mask.int().argmax())
        if 0 < start <= teacher.max_positions - DECODED_TOKENS:
            generations += engine.generate([ids[:start].tolist()], DECODED_TOKENS)
    middle = [item.prompt_tokens + len(item.token_ids) // 2 for item in generations]
    cost = measure_tick(teacher, predictor, sum(middle) // len(middle)) if middle else None
    return pipeline_report(generations, teacher.looped is not None, cost=cost)


def _recipe(folder: Path) -> Recipe:
    """The recipe that the predictor was trained with; an empty one where the folder has none."""
    path = folder / "recipe.yaml"
    return load_recipe(str(path)) if path.is_file() else Recipe()


@contextmanager
def _sequences(
    teacher: Teacher,
    predictor: Predictor,
    recipe: Recipe,
    store: Path | None,
    dataset: str | None,
    data_dir: str | None,
    limit: int | None,
) -> Iterator[tuple[Sequences, dict[str, Any]]]:
    """What to evaluate on, and its description for the report: a store, else answers collected for the purpose."""
    own = Path(recipe.store) if recipe.store else None
    if store is None and dataset is None and own is not None and (own / "manifest.json").is_file():
        store = own
    if store is not None:
        yield _from_store(teacher, predictor, recipe, store)
        return
    name = dataset or recipe.data.dataset or DEFAULT_TEACHER
    config = recipe.data.model_copy(
        update={
            "dataset": name,
            "split": "test",
            "data_dir": data_dir or recipe.data.data_dir,
            "limit": limit or DEFAULT_LIMIT,
            "regenerate": True,
        }
    )
    if limit is None:
        say(f"{name}: the teacher answers at most {DEFAULT_LIMIT} prompts; --limit N for another number")
    with tempfile.TemporaryDirectory(prefix="firp-eval-") as folder:
        _collect(teacher, config, predictor, Path(folder) / "store")
        sequences, _ = _from_store(teacher, predictor, Recipe(), Path(folder) / "store")
        yield sequences, {"dataset": name, "split": "test", "answers": "teacher, greedy"}


def _collect(teacher: Teacher, config: DataConfig, predictor: Predictor, folder: Path) -> None:
    """The teacher's own answers with their states, in a temporary store."""
    from firp_cli.collecting.collect_store import collect_store
    from firp_cli.collecting.engine_responder import EngineResponder

    responder = EngineResponder(teacher, config.batch_size)
    collect_store(teacher, config, predictor.required_layers, folder, progress=progress_bar, responder=responder)


def _from_store(
    teacher: Teacher, predictor: Predictor, recipe: Recipe, folder: Path
) -> tuple[Sequences, dict[str, Any]]:
    """A store's sequences; of the store that the predictor was trained on, only those that training held out."""
    from firp_cli.data.chat import template_fingerprint, tokenizer_fingerprint
    from firp_cli.store.reader import Store
    from firp_cli.training.batches import split_validation

    store = Store.open(folder, layers=predictor.required_layers)
    tokenizer = teacher.tokenizer
    store.check_teacher(teacher.fingerprint, tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer))
    data: dict[str, Any] = {"store": str(folder)}
    if recipe.store is None or Path(recipe.store).resolve() != folder.resolve():
        return store, data
    _, held_out = split_validation(len(store), recipe.training.validation_fraction, recipe.training.seed)
    if not held_out:
        say(f"{folder}: training held nothing out of this store, so the figures are those of its training data")
        return store, data
    say(f"{folder}: the predictor was trained on this store; the {len(held_out)} held-out conversations are used")
    return _Subset(store, held_out), {**data, "part": "held out of training"}


def write_report(report: EvalReport, folder: Path) -> None:
    """eval.json and the figures as PNG, each whole or absent."""
    from firp_cli.files import write_atomically, write_json
    from firp_cli.reports.figures import eval_figures
    from firp_cli.results import as_json

    write_json(folder / "eval.json", as_json(report))
    for name, image in eval_figures(report).items():
        write_atomically(folder / f"{name}.png", lambda path, image=image: path.write_bytes(image))  # type: ignore[misc]


def _print(report: EvalReport, folder: Path) -> None:
    from rich.console import Console

    from firp_cli.reports.speed_tables import eval_pipeline_lines
    from firp_cli.reports.tables import eval_table

    console = Console(highlight=False)
    console.print(eval_table(report))
    chain, best = report.expected_accepted_length_chain, report.expected_accepted_length_tree
    if report.pipeline:
        console.print(f"expected: {chain:.2f} tokens in {report.pipeline.loops} ticks", markup=False)
        for line in eval_pipeline_lines(report):
            console.print(line, markup=False)
    else:
        text = f"expected accepted length: {chain:.2f} as a chain, {best:.2f} with tree {report.tree}"
        console.print(text, markup=False)
    console.print(f"report: {folder}", markup=False, soft_wrap=True)
