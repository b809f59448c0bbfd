"""Choice of draft trees by measurement: acceptance on answers that the teacher writes to calibration prompts, times on
this machine, the best tree for each batch size, and a trial of the predictions on prompts that were kept back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from firp_cli.decoding.tree_file import described
from firp_cli.decoding.tree_spec import TreeSpec, static_tree
from firp_cli.errors import CapacityError, UsageError
from firp_cli.evaluation.environment import machine_key, measurement_environment
from firp_cli.evaluation.simulate import simulate_speedup, simulate_steps
from firp_cli.evaluation.timing import as_benched, undisturbed
from firp_cli.predictors.base import Predictor, TreePredictor
from firp_cli.results import Prediction, Progress, no_progress
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import CostReport, Trial, TunedTree, TuneReport
from firp_cli.tuning.acceptance import Acceptance, candidate_positions, reliability
from firp_cli.tuning.calibration import Calibration, TuneSettings, calibrate, split_prompts
from firp_cli.tuning.cost import CostModel, check_cache, load_or_measure
from firp_cli.tuning.search import (
    NO_TREE,
    Candidate,
    Scored,
    StepCosts,
    TreeSearch,
    layer_rows,
    node_probabilities,
    probed_trees,
    shapes,
)
from firp_cli.tuning.step_timing import time_steps
from firp_cli.tuning.trial import TRIAL_SECONDS, TrialSize, decode_trees, make_bout, trial_size

SCREENED = 12  # trees that are simulated on all answers
FINALISTS = 6  # trees whose whole steps are timed
REPEATS, PROBE_REPEATS = 6, 8  # of timing a step, in one round
TIMING_ROUNDS, LEAST_TIMING_ROUNDS = 16, 4  # of all batch sizes together, and of each
PAYS = 1.03  # predicted speedup from which on a tree is used; a smaller one may be a loss
HOPELESS = 0.85  # speedup below which larger batches, whose rows cost more, are not timed
LADDER = (2, 4, 8, 16, 32)  # nodes of the trees that the trial decodes beside the chosen ones
MOST_ROWS, MOST_ROWS_CUDA = 64, 256
SMALLEST_CONTEXT = 64

Tell = Callable[[str], None]


@dataclass
class Finalists:
    """Trees that may be the best at a batch size, with the milliseconds of their steps and of autoregressive ones.
    `speedup`: the best of the trees to which the step costs are fitted.
    """

    batch: int
    costs: StepCosts
    trees: dict[TreeSpec, Candidate]
    speedup: float
    times: dict[TreeSpec, list[float]] = field(default_factory=dict)


@dataclass
class Choice:
    """Choice at a batch size: `entry` is used; `spec`, `trial` are the best tree, also where no tree pays."""

    entry: TunedTree
    spec: TreeSpec
    trial: Trial
    costs: StepCosts


class Tuner:
    """Tuning of one predictor on one machine. `default`: the tree in use, which is timed as well."""

    def __init__(
        self,
        teacher: Teacher,
        predictor: TreePredictor,
        settings: TuneSettings,
        default: TreeSpec | None = None,
        tell: Tell = lambda line: None,
    ) -> None:
        self.teacher, self.predictor, self.settings = teacher, predictor, settings
        self.default, self.tell = default, tell
        cuda = teacher.device.type == "cuda"
        self.most_rows = settings.most_rows or (MOST_ROWS_CUDA if cuda else MOST_ROWS)
        self.breadth = min(self.most_rows, teacher.vocab_size)
        self.halving = cuda and settings.engine.graphs
        self.key = machine_key(teacher, settings.engine.attention, settings.engine.graphs)
        self._prepared = predictor.for_decoding(teacher)
        self._emitted: dict[TreeSpec, list[list[int]]] = {}

    def learn(self, prompts: Sequence[Sequence[int]]) -> Calibration:
        """Calibrate on these prompts. Raises CapacityError, UsageError."""
        self.calibration = calibrate(self.teacher, self._prepared, prompts, self.settings, self.breadth)
        self.context = self.settings.context or self.calibration.context
        positions, self.probabilities = candidate_positions(self._prepared, self.calibration.traces)
        self.acceptance = Acceptance(positions, self.breadth)
        self.candidates = shapes(self.acceptance, self.predictor, self.most_rows)
        if not any(self.fits(candidate.spec) for candidate in self.candidates):
            raise UsageError(f"no tree has steps of at most {self.most_rows} rows: raise --max-rows")
        self.search = TreeSearch(self.candidates, self.predictor, self.estimate, self.fits)
        self.batches = self._batches()
        return self.calibration

    def _batches(self) -> list[int]:
        """Return the batch sizes that fit into memory. Raises CapacityError when none does."""
        batches: list[int] = []
        for batch in sorted(set(self.settings.batches)):
            try:
                check_cache(self.teacher, batch, 2 * self.context, self.most_rows)
            except CapacityError as error:
                if not batches:
                    raise
                self.tell(f"batch sizes from {batch} on are skipped: {str(error).splitlines()[0]}")
                break
            batches.append(batch)
        return batches

    def measure(self, progress: Progress = no_progress) -> CostReport:
        """Measure the cost of passes at the batch sizes and around the context, or load an earlier measurement."""
        split = min(self.predictor.transfer_layers, default=self.teacher.num_layers)
        room = self.teacher.max_positions
        low = 1 << max(0, self.context.bit_length() - 1)
        contexts = sorted({max(1, min(place, room)) for place in (max(SMALLEST_CONTEXT, low), 2 * low)})
        most = max(self.batches)
        batches = sorted({1, min(2, most), most})  # between them times are interpolated, or a curve is added
        self.cost, kept = load_or_measure(
            self.teacher,
            split,
            batches,
            contexts,
            self.most_rows,
            again=self.settings.again,
            attention=self.settings.engine.attention,
            graphs=self.settings.engine.graphs,
            seconds=self.settings.seconds,
            progress=progress,
        )
        origin = "kept from an earlier run" if kept else f"measured in {self.cost.seconds:.0f} s"
        self.tell(
            f"cost of passes: {origin}, {len(self.cost.curves)} curves, largest error {100 * self.cost.residual:.1f}% "
            f"at {len(self.cost.checks)} checks"
        )
        return self.cost

    def emitted(self, spec: TreeSpec) -> list[list[int]]:
        """Return the tokens of each simulated step of the calibration answers with a tree."""
        if spec not in self._emitted:
            self._emitted[spec] = simulate_steps(self._prepared, self.calibration.traces, spec)
        return self._emitted[spec]

    def length(self, spec: TreeSpec) -> float:
        """Return the accepted length on the calibration answers."""
        steps = [count for answer in self.emitted(spec) for count in answer]
        return sum(steps) / len(steps)

    def estimate(self, spec: TreeSpec) -> float:
        """Return the accepted length on a sample of the answers' parts, in a time that does not grow with the prompts.

        Trees with few pseudo rows gain a little, since each part begins with a draft of its own anchor.
        """
        steps = [count for part in simulate_steps(self._prepared, self.calibration.sample, spec) for count in part]
        return sum(steps) / len(steps)

    def fits(self, spec: TreeSpec) -> bool:
        """Return whether no layer of the tree's step runs more rows than allowed."""
        return self._rows(spec) <= self.most_rows

    def _rows(self, spec: TreeSpec) -> int:
        return max(layer_rows(spec, self.predictor, self.teacher.num_layers))

    def costs(self, batch: int) -> StepCosts:
        """Return the times of steps at a batch size, fitted to a few whole ones."""
        costs = StepCosts(CostModel(self.cost), self.predictor, batch, self.context)
        probed = [spec for spec in probed_trees(self.candidates, self.predictor) if self.fits(spec)]
        probed = probed if batch == 1 else probed[::2]  # steps of larger batches take longer
        times = self._time([NO_TREE, *probed], batch, PROBE_REPEATS)
        costs.fit({spec: undisturbed(values) for spec, values in times.items()})
        return costs

    def _time(self, order: Sequence[TreeSpec], batch: int, repeats: int) -> dict[TreeSpec, list[float]]:
        return time_steps(self.teacher, self.predictor, order, batch, self.context, self.settings, repeats)

    def find_finalists(self, batch: int) -> Finalists:
        """Return the trees that look best at a batch size, with the best of each kind and the tree in use."""
        costs = self.costs(batch)
        found = self.search.best(costs, SCREENED)
        ranking = [Scored(one.candidate, self.length(one.spec), one.milliseconds) for one in found[:SCREENED]]
        ranking = sorted(ranking, key=lambda scored: -scored.rate) + found[SCREENED:]
        of_kind = {(scored.spec.kind, scored.spec.limited): scored for scored in reversed(ranking)}
        trees = {scored.spec: scored.candidate for scored in (*ranking[:FINALISTS], *of_kind.values())}
        if self.default is not None and self.default.kind != "none" and self.fits(self.default):
            trees.setdefault(self.default, Candidate(self.default))
        speedup = max(costs.ar * self.length(spec) / measured for spec, measured in costs.probed.items())
        return Finalists(batch, costs, trees, speedup)

    def time_round(self, finalists: Finalists) -> None:
        """Time the steps of the finalists once more, with an autoregressive step beside each."""
        order = [spec for tree in finalists.trees for spec in (NO_TREE, tree)]
        for spec, times in self._time(order, finalists.batch, REPEATS).items():
            finalists.times.setdefault(spec, []).extend(times)

    def choose(self, finalists: Finalists) -> Choice:
        """Return the best of the finalists; the choice is autoregressive decoding where it does not pay."""
        batch, costs = finalists.batch, finalists.costs
        times = {spec: as_benched(values) for spec, values in finalists.times.items()}
        costs.settle(times)
        ar = times[NO_TREE]
        predictions = {spec: self.predict(spec, batch, costs, times[spec], ar) for spec in finalists.trees}
        best = max(predictions, key=lambda spec: predictions[spec].speedup)
        predicted, candidate = predictions[best], finalists.trees[best]
        pays = predicted.speedup >= PAYS
        self.tell(
            f"batch {batch}: {best}, accepted length {predicted.accepted_length:.2f}, {predicted.speedup:.2f} x ar"
            + ("" if pays else ": no tree pays, autoregressive decoding is used")
        )
        used = predicted if pays else Prediction(1.0, ar, ar, 1.0)
        entry = self._entry(candidate if pays else Candidate(NO_TREE), batch, used)
        return Choice(entry, best, self._trial(best, batch, predicted), costs)

    def tune(self) -> list[Choice]:
        """Return the choice for each batch size up to the first at which drafting is far from paying. On a CPU steps
        are timed in several rounds, spread over all batch sizes: its speed varies from minute to minute.
        """
        by_batch = []
        for batch in self.batches:
            by_batch.append(self.find_finalists(batch))
            if by_batch[-1].speedup < HOPELESS and batch < self.batches[-1]:
                self.tell(f"batch sizes above {batch} are not timed: drafting does not pay at {batch}")
                break
        cuda = self.teacher.device.type == "cuda"
        rounds = 1 if cuda else max(LEAST_TIMING_ROUNDS, TIMING_ROUNDS // len(by_batch))
        for _ in range(self.settings.timing_rounds or rounds):
            for finalists in by_batch:
                self.time_round(finalists)
        return [self.choose(finalists) for finalists in by_batch]

    def predict(self, spec: TreeSpec, batch: int, costs: StepCosts, step: float, ar_step: float) -> Prediction:
        """Predict the performance of a tree from the milliseconds of a step of the whole batch with it and without.

        When sequences have ended, a step is shorter by the difference of its passes in the cost model.
        """

        def step_time(tree: TreeSpec, whole: float) -> Callable[[int], float]:
            full = costs.passes(tree, batch)
            return lambda live: whole if live == batch else max(0.1 * whole, whole + costs.passes(tree, live) - full)

        times = step_time(spec, step), step_time(NO_TREE, ar_step)
        speedup = simulate_speedup(self.emitted(spec), batch, *times, halving=self.halving)
        return Prediction(self.length(spec), step, ar_step, speedup)

    def ladder(self, choice: Choice) -> list[tuple[TreeSpec, Trial]]:
        """Return the best tree of each number of nodes by the cost model, with pseudo rows for all nodes or limited as
        in the chosen tree; at its own number the chosen tree.
        """
        costs, ladder = choice.costs, []

        def alike(spec: TreeSpec) -> bool:
            limits = (spec.budget, spec.drafting(self.predictor.steps))
            chosen = (choice.spec.budget, choice.spec.drafting(self.predictor.steps))
            return spec.nodes == nodes and (not spec.limited or limits == chosen)

        for nodes in sorted({candidate.spec.nodes for candidate in self.candidates} | {choice.spec.nodes}):
            if nodes == choice.spec.nodes:
                ladder.append((choice.spec, replace(choice.trial)))
                continue
            ranking = self.search.best(costs, 1, alike)
            if ranking:
                spec = ranking[0].spec
                predicted = self.predict(spec, costs.batch, costs, costs(spec), costs.ar)
                ladder.append((spec, self._trial(spec, costs.batch, predicted)))
        return ladder

    def _trial(self, spec: TreeSpec, batch: int, predicted: Prediction) -> Trial:
        return Trial(str(spec), batch, spec.nodes, self._rows(spec), predicted)

    def _entry(self, chosen: Candidate, batch: int, predicted: Prediction) -> TunedTree:
        spec, shape = chosen.spec, chosen
        if spec.kind == "dynamic":  # reports draw its most likely shape
            grown = sorted(self.acceptance.grow(spec.nodes, spec.drafting(self.predictor.steps)))
            typical = static_tree([path for path, _ in grown], self.predictor.steps, "")
            shape = Candidate(typical, node_probabilities(grown))
        drawn = {} if spec.kind == "none" else {"paths": [list(path) for path in shape.spec.paths]}
        return TunedTree(
            machine=self.key,
            teacher=self.teacher.fingerprint,
            batch_size=batch,
            context=self.context,
            temperature=self.settings.temperature,
            predicted=predicted,
            **(described(spec) | drawn),
            rows=self._rows(spec),
            probabilities=list(shape.probabilities) or None,
        )


def tune(
    teacher: Teacher,
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    settings: TuneSettings | None = None,
    *,
    dataset: str = "",
    default: TreeSpec | None = None,
    tell: Tell = lambda line: None,
    progress: Progress = no_progress,
) -> TuneReport:
    """Choose a tree for each batch size. The prompts should be like those that will be decoded, but not the same.

    Raises UsageError for too few prompts and for predictors without draft trees, CapacityError when no batch fits.
    """
    settings = settings or TuneSettings()
    if not isinstance(predictor, TreePredictor):
        raise UsageError(f"a {predictor.kind} predictor feeds a pipeline, which has no tree to tune")
    calibrating, kept_back = split_prompts(teacher, prompts, settings)
    tuner = Tuner(teacher, predictor, settings, default, tell)
    calibration = tuner.learn(calibrating)
    positions = tuner.acceptance.positions
    tell(
        f"calibration: {calibration.tokens} tokens that the teacher wrote to {calibration.prompts} prompts, "
        f"{len(positions)} drafts; context {tuner.context}"
    )
    cost = tuner.measure(progress)
    choices = tuner.tune()
    ladder = tuner.ladder(choices[0])
    tried = _try(tuner, kept_back, choices, ladder) if settings.trial else None
    losing = [choice.trial.batch_size for choice in choices if choice.trial.predicted.speedup < PAYS]
    return TuneReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        predictor=predictor.describe(),
        settings={**settings.describe(), "dataset": dataset},
        calibration={
            "dataset": dataset,
            "prompts": calibration.prompts,
            "tokens": calibration.tokens,
            "anchors": len(positions),
            "kept_back": len(kept_back),
            "trial": None if tried is None else asdict(tried),
        },
        acceptance=tuner.acceptance.by_candidate(),
        reliability=reliability(positions, tuner.probabilities),
        cost=cost,
        entries=[choice.entry for choice in choices],
        ladder=[trial for _, trial in ladder],
        batches=[choice.trial for choice in choices],
        break_even=min(losing, default=None),
    )


def _try(
    tuner: Tuner,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Choice],
    ladder: Sequence[tuple[TreeSpec, Trial]],
) -> TrialSize | None:
    """Decode prompts that were kept back, as many as fit into the trial's time: with some trees of the ladder at the
    first batch size, and with the best tree of each other batch size that they fill.

    Sets `measured` of these trials. Returns the trial's size; None where the prompts fill no batch.
    """
    filled = [choice for choice in choices if choice.trial.batch_size <= len(prompts)]
    if not filled:
        return None
    first, *others = filled
    tried = [(spec, trial) for spec, trial in ladder if spec.nodes in LADDER or spec == first.spec]
    # the best tree first, then those nearest in size: they tell most about the choice
    tried.sort(key=lambda pair: (pair[0] != first.spec, abs(pair[0].nodes - first.spec.nodes)))
    entrants = [tried, *([(choice.spec, choice.trial)] for choice in others)]
    tokens = tuner.calibration.tokens / tuner.calibration.prompts
    bouts = [make_bout([trial for _, trial in pairs], tokens) for pairs in entrants]
    size = trial_size(bouts, len(prompts), tuner.settings.repeats, TRIAL_SECONDS)
    tuner.tell(f"trial: {size}")
    for bout, pairs in zip(bouts, entrants, strict=True):
        pairs = pairs[: size.trees]
        decoded, specs = prompts[: bout.prompts(size.prompts)], [spec for spec, _ in pairs]
        results = decode_trees(tuner.teacher, tuner.predictor, decoded, specs, bout.batch, size.repeats, tuner.settings)
        for (_, trial), measured in zip(pairs, results, strict=True):
            trial.measured = measured
    first.trial.measured = tried[0][1].measured
    return size
