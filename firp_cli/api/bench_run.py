"""`firp_cli.bench`: accepted length and speedup of predictors against autoregressive decoding and transformers."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from firp_cli.api.loading import LOG, LayerBackend, chosen_model, load_named_teacher, load_trees, share_teacher
from firp_cli.collecting.collect_store import OpenProgress, silent
from firp_cli.config import TeacherConfig
from firp_cli.data.datasets import KNOWN, Prompt, Selection, dataset_names, load_prompts
from firp_cli.data.encode_rows import encode_prompts
from firp_cli.data.readers import dataset_label
from firp_cli.data.turns import Questions
from firp_cli.errors import UsageError
from firp_cli.evaluation.baselines import NGRAMS, ONE_PROCESS, argument, baseline, check_assistant
from firp_cli.evaluation.bench_groups import Group, add_embedded, choose_groups, embedded_folders, group_by_teacher
from firp_cli.evaluation.bench_prompts import BenchPrompt, fit_prompts, spread
from firp_cli.evaluation.measure import follow_bench, measure_bench, memory_line
from firp_cli.evaluation.merge import merge_teachers
from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
from firp_cli.evaluation.overlap import were_trained_on
from firp_cli.evaluation.run_bench import bench_report, complete_report
from firp_cli.evaluation.spec_bench import published_categories
from firp_cli.predictors.folder import load_predictor, predictor_folder, trained_store
from firp_cli.provenance import portable
from firp_cli.results import BenchReport
from firp_cli.teacher.teacher import Teacher

DEFAULT_LIMIT = 40


def bench(
    predictors: str | Sequence[str] | None = None,
    *,
    dataset: str,
    methods: Sequence[str] | None = None,
    teacher: str | TeacherConfig | None = None,
    dtype: str = "auto",
    data_dir: str | None = None,
    split: str = "test",
    limit: int | None = None,
    tree: str | None = None,
    skip_long: bool = False,
    force: bool = False,
    backend: str | LayerBackend = "lean",
    settings: BenchSettings | None = None,
    progress: OpenProgress = silent,
) -> BenchReport:
    """Decode the same prompts with several methods and compare them.

    Args:
        predictors: predictor folders or embedded names. None: the embedded ones.
        dataset: known name, hub id, file or folder; several with commas. split: of them; a file has none.
        methods: baselines (`ar`, `hf`, `hf-static`, `prompt-lookup`, `suffix`, `assisted:MODEL`, `early-exit:LAYER`)
            and predictors, by kind or folder name. None: `ar`, `hf`, `prompt-lookup`, `suffix` and all predictors. One
            that cannot run is a row with its reason.
        teacher: model folder, hub id, .gguf file or known name; or a configuration of which the fields that are set
            replace what each predictor remembers. None: each predictor's own.
        limit: prompts of each data set. None: 40. skip_long: skip and count prompts that exceed the context.
        settings: how the methods are measured. backend: implementation of the decoder layers.
        progress: `progress(description)` opens a progress bar: a context manager that gives a function of (done,
            total).

    Example:
        >>> settings = firp_cli.BenchSettings(max_new_tokens=64, repeats=1)
        >>> report = firp_cli.bench("firp", dataset="arithmetic", limit=8, settings=settings)
        >>> [(row.method, row.speedup) for row in report.rows]

    Of the ranks that share a pipeline only the first returns rows. KeyboardInterrupt ends the measurement: what is
    whole by then is reported, with `settings["interrupted"]`; it is raised again where nothing is.

    Raises UsageError, DatasetError, TeacherError, PredictorError, FingerprintError and CapacityError.
    """
    settings, names = settings or BenchSettings(), [predictors] if isinstance(predictors, str) else predictors
    prompts = find_prompts(dataset, data_dir, limit, split)
    loader = _Loader(teacher, dtype, tree, force, LayerBackend.of(backend), settings)
    groups = groups_to_measure(names, methods, chosen_model(teacher), settings.ranks)
    reports: list[BenchReport] = []
    for group in groups:
        try:
            reports.append(_measure(loader, group, prompts, split, skip_long, progress))
        except KeyboardInterrupt:
            if not reports:
                raise
            reports[0].settings["interrupted"] = f"interrupted after {len(reports)} of {len(groups)} teachers"
            break
        if reports[-1].settings.get("interrupted"):
            break
    return merge_teachers(reports)


def groups_to_measure(
    predictors: Sequence[str] | None, methods: Sequence[str] | None, teacher: str | None, ranks: int = 1
) -> list[Group]:
    """Return the predictors and methods to measure, by teacher. Raises UsageError, PredictorError."""
    if predictors:
        folders = add_embedded([predictor_folder(str(name)) for name in predictors], teacher, methods)
    else:
        folders = embedded_folders(teacher, methods)
        measured = "the embedded ones are measured" if folders else "only the baselines are measured"
        LOG.info(f"no predictor named: {measured}")
    groups = choose_groups(methods, group_by_teacher(folders, teacher))
    if ranks > 1:
        return _for_ranks(groups, methods is None)
    for name in dict.fromkeys(name for group in groups for name in group.methods if baseline(name) == "assisted"):
        check_assistant(argument(name))
    return groups


def _for_ranks(groups: list[Group], default: bool) -> list[Group]:
    """Return the group whose pipeline several ranks share; n-gram drafts are left out of the `default` methods.

    Raises UsageError where there is another method or teacher.
    """
    if len(groups) > 1:
        raise UsageError(
            f"--gpus takes predictors of one teacher, these have {len(groups)} "
            f"({', '.join(str(group.teacher) for group in groups)}): name some of them, or --methods"
        )
    if default:
        groups = [replace(groups[0], methods=[name for name in groups[0].methods if name not in NGRAMS])]
    for name in groups[0].methods:
        if groups[0].kinds.get(name, "speed") != "speed" or baseline(name) in ONE_PROCESS:
            raise UsageError(
                f"--gpus spreads a pipeline over devices; {name} decodes on one: leave it out of --methods"
            )
    if "speed" not in groups[0].kinds.values():
        raise UsageError("--gpus spreads a pipeline over devices: name a speed predictor")
    return groups


@dataclass(frozen=True)
class _Loader:
    """Loads the teacher and the predictors of a group."""

    teacher: str | TeacherConfig | None
    dtype: str
    tree: str | None
    force: bool
    backend: LayerBackend
    settings: BenchSettings

    def load(self, group: Group) -> tuple[Teacher, dict[str, LoadedPredictor]]:
        """Return the group's teacher, and the predictors that its methods need by method name."""
        settings = self.settings
        device = None if settings.rank == 0 else "cpu"  # the other ranks move their part to their device afterwards
        folder = next(iter(group.folders.values()), None)
        teacher = load_named_teacher(self.teacher, folder, self.dtype, device, self.backend)
        if settings.rank > 0:
            pipeline = next(folder for name, folder in group.folders.items() if group.kinds[name] == "speed")
            share_teacher(teacher, pipeline, settings.rank, settings.ranks, self.backend)
        loaded = {}
        for name in group.methods:
            if name in group.folders:
                folder = group.folders[name]
                predictor = load_predictor(folder, teacher, self.force)
                trees = load_trees(self.tree, folder, predictor, teacher, settings.temperature, settings.engine)
                loaded[name] = LoadedPredictor(predictor, trees, folder)
        return teacher, loaded


def _measure(
    loader: _Loader,
    group: Group,
    prompts: Sequence[tuple[str, Prompt]],
    split: str,
    skip_long: bool,
    progress: OpenProgress,
) -> BenchReport:
    """Measure a group's methods with its teacher, which is loaded and released here. Ranks after the first return a
    report without rows.
    """
    settings = loader.settings
    teacher, loaded = loader.load(group)
    methods = make_methods(teacher, loaded, group.methods, settings)
    _note_unknown(prompts, split, loaded)
    fresh = _without_trained(prompts, teacher, loaded)
    encoded = _encode(fresh, teacher, settings.turns == "all")
    if settings.rank > 0:
        follow_bench(encoded, methods, settings, teacher.max_positions, skip_long)
        return BenchReport({}, teacher.describe(), {}, [])
    suffix = f" with {group.label}" if group.label else ""
    fit_prompts(encoded, teacher.max_positions, settings.max_new_tokens, skip_long)  # before its cache is announced
    LOG.info(memory_line(methods, encoded, settings, teacher.max_positions))
    LOG.info(f"warm-up{suffix}: each method decodes the longest batch once, uncounted")
    with progress(f"measuring{suffix}") as bar:
        measured = measure_bench(
            teacher, encoded, methods, settings, skip_long=skip_long, progress=bar, keep_partial=True
        )
    report = bench_report(teacher, methods, measured, settings)
    if not report.settings.get("interrupted"):
        try:
            with progress(f"checking{suffix}") as bar:
                complete_report(report, teacher, methods, measured, settings, bar)
        except KeyboardInterrupt:
            report.settings["interrupted"] = "interrupted while the answers were checked"
    report.left_out_trained = len(prompts) - len(fresh)
    del teacher, loaded, methods
    if group.label:  # the next teacher needs the memory
        if torch.cuda.is_available() and "hf-static" in group.methods:
            torch._dynamo.reset()  # transformers' compiled forward holds memory
        gc.collect()
        torch.cuda.empty_cache()
    return report


def _without_trained(
    prompts: Sequence[tuple[str, Prompt]], teacher: Teacher, loaded: dict[str, LoadedPredictor]
) -> list[tuple[str, Prompt]]:
    """Return the prompts that none of the predictors was trained on; the others are counted in the log.

    Raises UsageError where none remains.
    """
    predictors = [item.predictor for item in loaded.values()]
    trained = were_trained_on([prompt.conversation for _, prompt in prompts], teacher.tokenizer, predictors)
    fresh = [pair for pair, seen in zip(prompts, trained, strict=True) if not seen]
    for name, count in Counter(name for (name, _), seen in zip(prompts, trained, strict=True) if seen).items():
        LOG.info(f"{name}: {count} prompts are left out, since a predictor was trained on them")
    if prompts and not fresh:
        raise UsageError(
            f"a predictor was trained on all {len(prompts)} prompts, so that they prove nothing: name another data set "
            "or split, or raise --limit"
        )
    return fresh


def _note_unknown(prompts: Sequence[tuple[str, Prompt]], split: str, loaded: dict[str, LoadedPredictor]) -> None:
    """Log which predictors keep no hashes of their prompts although their store was of the data that is measured."""
    measured = {name for name, _ in prompts}
    for item in loaded.values():
        settings = trained_store(item.folder).get("settings") or {}
        if item.predictor.trained_prompts is not None or not settings.get("dataset"):
            continue
        names = dataset_names(settings["dataset"])
        labels = {dataset_label(name) for name in names if settings.get("split") == split or name not in KNOWN}
        if shared := ", ".join(sorted(measured & labels)):
            LOG.info(
                f"{item.folder.name} keeps no hashes of the prompts that it was trained on: some that are measured "
                f"may be among them, since its store was made from {shared}"
            )


def load_bench_prompts(datasets: str, data_dir: str | None, limit: int | None, teacher: Teacher) -> list[BenchPrompt]:
    """Return the encoded prompts of one data set, or of several named with commas; at most `limit` of each, with all
    turns.
    """
    return _encode(find_prompts(datasets, data_dir, limit), teacher)


def find_prompts(
    datasets: str, data_dir: str | None, limit: int | None, split: str = "test"
) -> list[tuple[str, Prompt]]:
    """Return (data set, prompt) pairs: the first prompts, or, in a data set with categories, as many of each category,
    as it is published.

    Raises DatasetError, also for a set with placeholders in place of texts.
    """
    count = limit or DEFAULT_LIMIT
    pairs = []
    for name in dataset_names(datasets):
        selection, label = Selection(split, data_dir, count, whole=True), dataset_label(name)
        rows = load_prompts(name, selection=selection, tell=False)
        prompts: list[Prompt] = rows
        if any(prompt.category for prompt in prompts):
            rows = load_prompts(name, selection=replace(selection, limit=None), tell=False)
            own = [prompt.category for prompt in rows]
            categories = published_categories(label, own)
            places = spread(categories, count, own)
            prompts = [replace(rows[place], category=categories[place]) for place in places]
        rows.tell()
        if limit is None and len(prompts) == count:
            LOG.info(f"{name}: {count} prompts are measured; --limit N for another number")
        pairs += [(label, prompt) for prompt in prompts]
    return pairs


def _encode(prompts: Sequence[tuple[str, Prompt]], teacher: Teacher, all_turns: bool = True) -> list[BenchPrompt]:
    encoded = encode_prompts([prompt for _, prompt in prompts], teacher.tokenizer, teacher.vocab_size)
    stops, made = set(teacher.eos_token_ids), []
    for (name, prompt), ids in zip(prompts, encoded, strict=True):
        if ids is None:
            continue
        questions = Questions.of(prompt.conversation, teacher.tokenizer, stops) if all_turns else None
        lengths = tuple(questions.lengths()) if questions else ()
        place = f"{prompt.row} of {portable(prompt.dataset)}"
        said = next(iter(prompt.conversation.turns()), [])
        question = next((message["content"] for message in reversed(said) if message["role"] == "user"), "")
        told = {"place": place, "id": prompt.id, "question": question, "reference": prompt.reference}
        made.append(BenchPrompt(ids, name, prompt.category, questions, lengths, **told))
    return made
