"""`firp_cli.tune`: choose draft trees by measuring this machine, and write them into a tree.json."""

from __future__ import annotations

from pathlib import Path

from firp_cli.api.loading import LOG, LayerBackend, load_pair
from firp_cli.collecting.collect_store import OpenProgress, silent
from firp_cli.config import DataConfig, TeacherConfig
from firp_cli.data.datasets import Prompt, Selection, dataset_names, load_prompts
from firp_cli.data.encode_rows import encode_prompts
from firp_cli.data.known_sets import known_set
from firp_cli.decoding.tree_file import update_trees
from firp_cli.decoding.tree_spec import default_tree
from firp_cli.errors import OutputError, UsageError
from firp_cli.files import check_output, os_reason, write_json
from firp_cli.predictors.folder import predictor_folder
from firp_cli.provenance import portable
from firp_cli.recipe import load_recipe
from firp_cli.tune_results import TuneReport
from firp_cli.tuning.calibration import TuneSettings
from firp_cli.tuning.tuner import tune as choose_trees

DEFAULT_LIMIT = 64


def tune(
    predictor: str | Path = "firp",
    *,
    dataset: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    limit: int = DEFAULT_LIMIT,
    teacher: str | TeacherConfig | None = None,
    dtype: str = "auto",
    backend: str | LayerBackend = "lean",
    force: bool = False,
    settings: TuneSettings | None = None,
    tree_file: str | Path | None = None,
    progress: OpenProgress = silent,
) -> TuneReport:
    """Measure what decoding steps cost on this machine, choose the fastest draft tree of each batch size, and write
    the trees into `tree_file` (None: tree.json in the predictor's folder).

    Args:
        predictor: predictor folder or embedded name.
        dataset: calibration prompts: known name, hub id or .jsonl file. None: the data set of the predictor's recipe.
        split: the last `limit` prompts of this split are used. It must not be `test`, which `bench` decodes.
        settings: batch sizes, sampling and effort. backend: implementation of the decoder layers.
        progress: `progress(description)` opens a progress bar: a context manager that gives a function of (done,
            total).

    Example:
        >>> report = firp_cli.tune("runs/demo", settings=firp_cli.TuneSettings(batches=(1, 4)))
        >>> [(tree.batch_size, tree.tree) for tree in report.entries]

    Raises UsageError, DatasetError, TeacherError, PredictorError, FingerprintError and CapacityError; OutputError,
    which has the report as `result`, where the trees cannot be written.
    """
    folder = predictor_folder(str(predictor))
    trained = _trained_on(folder)
    name, columns = dataset or trained.dataset, {} if dataset else trained.columns
    target = Path(tree_file) if tree_file is not None else folder / "tree.json"
    check_output(target, "file", "--tree-file")
    prompts = _prompts(name, Selection(split, data_dir, columns=columns), limit)
    model, drafting, _ = load_pair(str(predictor), teacher, force, dtype, backend=LayerBackend.of(backend))
    with progress("measuring passes") as bar:
        report = choose_trees(
            model,
            drafting,
            [ids for ids in encode_prompts(prompts, model.tokenizer, model.vocab_size) if ids is not None],
            settings or TuneSettings(),
            dataset=f"{name}, {split}",
            default=default_tree(folder, drafting),
            tell=LOG.info,
            progress=bar,
        )
    report.predictor["folder"] = portable(str(folder))
    known = target if target.is_file() else folder / "tree.json"
    try:
        write_json(target, update_trees(known, report.entries))  # entries of other machines and batch sizes stay
    except OSError as error:
        failure = OutputError(f"{target} cannot be written ({os_reason(error)}): the trees are only in the report")
        failure.result = report
        raise failure from error
    return report


def _trained_on(folder: Path) -> DataConfig:
    """Return the data section of the predictor's recipe, else one with the embedded data set."""
    path = folder / "recipe.yaml"
    return load_recipe(str(path)).data if path.is_file() else DataConfig()


def _prompts(datasets: str, selection: Selection, limit: int) -> list[Prompt]:
    """Return the last prompts of the split: training uses the first ones, and `bench` those of the test split.

    Raises UsageError for the prompts that `bench` decodes, DatasetError.
    """
    names = dataset_names(datasets)
    for name in names:
        known = known_set(name)
        testing = known is not None and "train" not in known.splits
        if selection.split == "test" or testing:
            problem = f"{name} has test prompts only" if testing else "--split test"
            raise UsageError(
                f"{problem}: a tree that is tuned on the prompts of bench proves nothing; take others (--dataset)"
            )
    share = -(-limit // len(names))
    return [prompt for name in names for prompt in load_prompts(name, selection=selection)[-share:]]
