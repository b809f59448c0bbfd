"""Choosing draft trees by measurement: acceptance from answers that the teacher writes to calibration prompts, times
from this machine, the best tree of all for each batch size, and a trial of what was foretold on prompts kept back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_file import described
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree, static_tree
from firp_cli.errors import CapacityError, UsageError
from firp_cli.evaluation.environment import machine_key, measurement_environment
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.evaluation.rows import ALL
from firp_cli.evaluation.run_bench import BenchPrompt, run_bench
from firp_cli.evaluation.simulate import replay_speedup, walk
from firp_cli.evaluation.timing import as_benched, enough_calls, milliseconds, undisturbed
from firp_cli.predictors.base import Predictor
from firp_cli.results import Prediction, Progress
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import CostReport, Trial, TunedTree, TuneReport
from firp_cli.tuning.acceptance import Acceptance, ranks, reliability
from firp_cli.tuning.calibration import Calibration, TuneSettings, calibrate
from firp_cli.tuning.cost import CostModel, check_cache, load_or_measure
from firp_cli.tuning.search import PLAIN, Candidate, StepCosts, chances, layer_rows, search, shapes
from firp_cli.tuning.step_timing import TimedStep
from firp_cli.tuning.trial import TRIAL_SECONDS, WARMUP, TrialSize, make_bout, trial_size

KEPT_BACK = 0.25  # share of the prompts that are kept for the trial
LEAST_PROMPTS = 4
FINALISTS = 6  # trees whose whole steps are timed
ROUNDS, PROBED_ROUNDS, LEAST_ROUNDS = 6, 8, 3
SITTINGS, LEAST_SITTINGS = 16, 4  # of all batch sizes, and of each
PAYS = 1.03  # predicted speedup; what is nearer to 1 may be a loss
STEP_SECONDS = 8.0  # of timing steps at one sitting
LADDER = (2, 4, 8, 16, 32)  # nodes of the trees that are tried for real, beside the chosen ones
MOST_ROWS, MOST_ROWS_CUDA = 64, 256
SMALLEST_CONTEXT = 64

Tell = Callable[[str], None]


def _engine(teacher: Teacher, predictor: Predictor, spec: TreeSpec, settings: TuneSettings) -> Engine:
    """An engine that decodes with one tree; PLAIN decodes plainly."""
    return Engine(
        teacher,
        predictor,
        spec,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        options=settings.engine,
    )


def time_steps(
    teacher: Teacher,
    predictor: Predictor,
    order: Sequence[TreeSpec],
    batch: int,
    context: int,
    settings: TuneSettings,
    rounds: int,
) -> dict[TreeSpec, list[float]]:
    """Milliseconds of whole steps with trees (PLAIN: of plain ones), round after round in this order; a tree may stand
    in it more than once.
    """
    probes = {spec: TimedStep(_engine(teacher, predictor, spec, settings), batch, context) for spec in set(order)}
    device = teacher.device
    calls = {spec: enough_calls(probe.step, device) for spec, probe in probes.items()}
    found: dict[TreeSpec, list[float]] = {spec: [] for spec in probes}
    until = time.perf_counter() + STEP_SECONDS
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        for spec in order:
            found[spec].append(milliseconds(probes[spec].step, calls[spec], device, warm=calls[spec]))
    return found


@dataclass
class Finalists:
    """The trees that may be the best at a batch size, and the times of their steps and of plain ones so far."""

    batch: int
    costs: StepCosts
    finalists: dict[TreeSpec, Candidate]
    times: dict[TreeSpec, list[float]]


@dataclass
class Choice:
    """What is used at a batch size, the best tree there even where none pays, and the times that it was chosen by."""

    entry: TunedTree
    spec: TreeSpec
    trial: Trial
    costs: StepCosts


class Tuner:
    """One predictor on one machine. `default`: the tree that was used so far, which is tried as well."""

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor,
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
        self._walked: dict[TreeSpec, list[list[int]]] = {}

    def learn(self, prompts: Sequence[Sequence[int]]) -> Calibration:
        """Calibrate on these prompts."""
        self.calibration = calibrate(self.teacher, self.predictor, prompts, self.settings, self.breadth)
        self.context = self.settings.context or self.calibration.context
        found, self.probable = ranks(self.predictor, self.calibration.traces)
        self.acceptance = Acceptance(found, self.breadth)
        self.candidates = shapes(self.acceptance, self.predictor, self.most_rows)
        if not any(self.fits(one.spec) for one in self.candidates):
            raise UsageError(f"no tree has steps of at most {self.most_rows} rows: raise --max-rows")
        self.batches = self._batches()
        return self.calibration

    def _batches(self) -> list[int]:
        """The batch sizes that fit into memory. Raises CapacityError where none does."""
        found: list[int] = []
        for batch in sorted(set(self.settings.batches)):
            try:
                check_cache(self.teacher, batch, 2 * self.context, self.most_rows)
            except CapacityError as error:
                if not found:
                    raise
                self.tell(f"batch {batch} and more are left out: {str(error).splitlines()[0]}")
                break
            found.append(batch)
        return found

    def measure(self, progress: Progress = lambda done, total: None) -> CostReport:
        """The cost of passes here, at the batch sizes asked for and around the context."""
        split = min(self.predictor.transfer_layers, default=self.teacher.num_layers)
        room = self.teacher.max_positions
        low = 1 << max(0, self.context.bit_length() - 1)
        contexts = sorted({max(1, min(place, room)) for place in (max(SMALLEST_CONTEXT, low), 2 * low)})
        most = max(self.batches)
        batches = sorted({1, min(2, most), most})  # between them the time is foretold, or a curve is added
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
        where = "kept from an earlier run" if kept else f"measured in {self.cost.seconds:.0f} s"
        self.tell(
            f"cost of passes: {where}, {len(self.cost.curves)} curves, largest error {100 * self.cost.residual:.1f}% "
            f"at {len(self.cost.checks)} checks"
        )
        return self.cost

    def walked(self, spec: TreeSpec) -> list[list[int]]:
        """Tokens of each step of the calibration answers with a tree."""
        if spec not in self._walked:
            self._walked[spec] = walk(self.predictor, self.calibration.traces, spec)
        return self._walked[spec]

    def length(self, spec: TreeSpec) -> float:
        """Accepted length on the calibration answers."""
        steps = [count for answer in self.walked(spec) for count in answer]
        return sum(steps) / len(steps)

    def fits(self, spec: TreeSpec) -> bool:
        """Whether its steps have no more rows than allowed."""
        return max(layer_rows(spec, self.predictor, self.teacher.num_layers)) <= self.most_rows

    def costs(self, batch: int) -> StepCosts:
        """Times of steps at a batch size, learnt from a few whole ones."""
        costs = StepCosts(CostModel(self.cost), self.predictor, batch, self.context)
        times = self._time([PLAIN, *self.probed()], batch, PROBED_ROUNDS)
        costs.fit({spec: undisturbed(each) for spec, each in times.items()})
        return costs

    def _time(self, order: Sequence[TreeSpec], batch: int, rounds: int) -> dict[TreeSpec, list[float]]:
        return time_steps(self.teacher, self.predictor, order, batch, self.context, self.settings, rounds)

    def probed(self) -> list[TreeSpec]:
        """Trees of all kinds, small and large, whose whole steps are timed."""
        steps = self.predictor.steps
        names = [
            f"{shape}/{run}"
            for run in sorted({steps, max(1, steps // 2)})
            for shape in ("chain", "dynamic:2", "dynamic:6", "dynamic:12")
        ]
        shapes = [one.spec for one in self.candidates if one.spec.kind == "static" and one.spec.nodes in (6, 12, 24)]
        if self.predictor.transfer_layers:
            names += [f"chain/{steps}@1", "dynamic:6@1", "dynamic:12@3", "dynamic:32@2"]
            shapes += [replace(spec, budget=2, steps=None) for spec in shapes if spec.nodes > 6]
        specs = [parse_tree(name, steps) for name in names] + shapes
        return [spec for spec in dict.fromkeys(specs) if self.fits(spec)]

    def contest(self, batch: int) -> Finalists:
        """The trees that look best at a batch size, the best of each kind among them, and the one used so far."""
        costs = self.costs(batch)
        found = search(self.candidates, self.predictor, costs, self.length, FINALISTS, self.fits)
        of_kind = {(scored.spec.kind, scored.spec.limited): scored for scored in reversed(found)}
        finalists = {scored.spec: scored.candidate for scored in (*found[:FINALISTS], *of_kind.values())}
        if self.default is not None and self.default.kind != "none" and self.fits(self.default):
            finalists.setdefault(self.default, Candidate(self.default))
        return Finalists(batch, costs, finalists, {})

    def sit(self, contest: Finalists) -> None:
        """Time the steps of a contest's trees once more, a plain one beside each."""
        order = [spec for tree in contest.finalists for spec in (PLAIN, tree)]
        for spec, times in self._time(order, contest.batch, ROUNDS).items():
            contest.times.setdefault(spec, []).extend(times)

    def choose(self, contest: Finalists) -> Choice:
        """The best tree of a contest, if it pays."""
        batch, costs = contest.batch, contest.costs
        times = {spec: as_benched(each) for spec, each in contest.times.items()}
        costs.settle(times)
        foretold = {spec: self.predict(spec, batch, costs, times[spec], times[PLAIN]) for spec in contest.finalists}
        best = max(foretold, key=lambda spec: foretold[spec].speedup)
        prediction, chosen = foretold[best], contest.finalists[best]
        pays = prediction.speedup >= PAYS
        self.tell(
            f"batch {batch}: {best}, accepted length {prediction.accepted_length:.2f}, {prediction.speedup:.2f} x ar"
            + ("" if pays else ": no tree pays, plain decoding is used")
        )
        used = prediction if pays else Prediction(1.0, times[PLAIN], times[PLAIN], 1.0)
        entry = self._entry(chosen if pays else Candidate(PLAIN), batch, used)
        return Choice(entry, best, self._trial(best, batch, prediction), costs)

    def tune(self) -> list[Choice]:
        """The tree for each batch size. A CPU is timed in several sittings: how fast it is differs from minute to
        minute.
        """
        contests = [self.contest(batch) for batch in self.batches]
        sittings = 1 if self.teacher.device.type == "cuda" else max(LEAST_SITTINGS, SITTINGS // len(contests))
        for _ in range(self.settings.sittings or sittings):
            for contest in contests:
                self.sit(contest)
        return [self.choose(contest) for contest in contests]

    def predict(self, spec: TreeSpec, batch: int, costs: StepCosts, step: float, plain: float) -> Prediction:
        """What a tree brings whose step takes `step` milliseconds, and a plain one `plain`, with all sequences of the
        batch; those that are left when some have ended take less by what the cost model says of their passes.
        """

        def of(tree: TreeSpec, whole: float) -> Callable[[int], float]:
            full = costs.passes(tree, batch)
            return lambda live: whole if live == batch else max(0.1 * whole, whole + costs.passes(tree, live) - full)

        speedup = replay_speedup(self.walked(spec), batch, of(spec, step), of(PLAIN, plain), self.halving)
        return Prediction(self.length(spec), step, plain, speedup)

    def ladder(self, choice: Choice) -> list[tuple[TreeSpec, Trial]]:
        """The best tree of each number of nodes, by the model; the one that was chosen stands for its own."""
        costs, rungs = choice.costs, []
        for nodes in sorted({one.spec.nodes for one in self.candidates} | {choice.spec.nodes}):
            if nodes == choice.spec.nodes:
                rungs.append((choice.spec, replace(choice.trial)))
                continue
            alike = [one for one in self.candidates if one.spec.nodes == nodes]
            found = search(alike, self.predictor, costs, self.length, 1, self.fits)
            if found:
                spec = found[0].spec
                foretold = self.predict(spec, costs.batch, costs, costs(spec), costs.plain)
                rungs.append((spec, self._trial(spec, costs.batch, foretold)))
        return rungs

    def _trial(self, spec: TreeSpec, batch: int, foretold: Prediction) -> Trial:
        rows = max(layer_rows(spec, self.predictor, self.teacher.num_layers))
        return Trial(str(spec), batch, spec.nodes, rows, foretold)

    def _entry(self, chosen: Candidate, batch: int, foretold: Prediction) -> TunedTree:
        spec, shape = chosen.spec, chosen
        if spec.kind == "dynamic":  # what it looks like most often
            grown = sorted(self.acceptance.grow(spec.nodes, spec.drafting(self.predictor.steps)))
            shape = Candidate(static_tree([path for path, _ in grown], self.predictor.steps, ""), chances(grown))
        drawn = {} if spec.kind == "none" else {"paths": [list(path) for path in shape.spec.paths]}
        return TunedTree(
            machine=self.key,
            teacher=self.teacher.fingerprint,
            batch_size=batch,
            context=self.context,
            temperature=self.settings.temperature,
            predicted=foretold,
            **(described(spec) | drawn),
            rows=max(layer_rows(spec, self.predictor, self.teacher.num_layers)),
            probabilities=list(shape.probabilities) or None,
        )

    def decode(
        self, prompts: Sequence[Sequence[int]], specs: Sequence[TreeSpec], batch: int, repeats: int
    ) -> list[Prediction]:
        """What trees bring when prompts are decoded for real, each beside plain decoding."""
        settings = BenchSettings(
            self.settings.max_new_tokens,
            batch,
            self.settings.temperature,
            self.settings.top_p,
            repeats,
            WARMUP,
            seed=self.settings.seed,
            engine=self.settings.engine,
        )
        engines = {
            str(number): _engine(self.teacher, self.predictor, spec, self.settings) for number, spec in enumerate(specs)
        }
        engines["ar"] = _engine(self.teacher, self.predictor, PLAIN, self.settings)
        methods = [Method(name, engine.generate, engine=engine) for name, engine in engines.items()]
        report = run_bench(self.teacher, [BenchPrompt(list(ids), "held") for ids in prompts], methods, settings)
        rows = {row.method: row for row in report.rows if row.category == ALL}
        ar = rows["ar"].step_milliseconds
        own = [rows[str(number)] for number in range(len(specs))]
        return [Prediction(row.accepted_length, row.step_milliseconds, ar, row.speedup or float("nan")) for row in own]


def tune(
    teacher: Teacher,
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    settings: TuneSettings | None = None,
    *,
    dataset: str = "",
    default: TreeSpec | None = None,
    tell: Tell = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> TuneReport:
    """Choose a tree for each batch size. The prompts should be like those that will be decoded, but not the same.

    Raises UsageError for too few prompts and for predictors that draft no trees, CapacityError where a batch does not
    fit.
    """
    settings = settings or TuneSettings()
    if predictor.pipeline:
        raise UsageError(f"a {predictor.kind} predictor feeds a pipeline, which has no tree to tune")
    room = teacher.max_positions - settings.max_new_tokens
    if settings.context is not None and not 1 <= settings.context <= room:
        raise UsageError(
            f"--context {settings.context} leaves no room for {settings.max_new_tokens} new tokens: the teacher's "
            f"context holds {teacher.max_positions}"
        )
    fitting = [ids for ids in prompts if len(ids) <= room]
    held = max(1, round(KEPT_BACK * len(fitting))) if settings.trial else 0
    if len(fitting) - held < LEAST_PROMPTS:
        raise UsageError(
            f"{len(fitting)} of {len(prompts)} prompts leave room for {settings.max_new_tokens} new tokens in a "
            f"context of {teacher.max_positions}; tuning needs at least {LEAST_PROMPTS + held}: raise --limit, or "
            "lower --max-new-tokens"
        )
    tuner = Tuner(teacher, predictor, settings, default, tell)
    known, unseen = fitting[: len(fitting) - held], fitting[len(fitting) - held :]
    calibration = tuner.learn(known)
    tell(
        f"calibration: {calibration.tokens} tokens that the teacher wrote to {calibration.prompts} prompts, "
        f"{len(tuner.acceptance.ranks)} drafts; context {tuner.context}"
    )
    cost = tuner.measure(progress)
    choices = tuner.tune()
    ladder = tuner.ladder(choices[0])
    tried = _try(tuner, unseen, choices, ladder) if settings.trial else None
    losing = [choice.trial.batch_size for choice in choices if choice.trial.predicted.speedup < PAYS]
    return TuneReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        predictor=predictor.describe(),
        settings={**asdict(settings), "dataset": dataset},
        calibration={
            "dataset": dataset,
            "prompts": calibration.prompts,
            "tokens": calibration.tokens,
            "anchors": len(tuner.acceptance.ranks),
            "kept_back": len(unseen),
            "trial": None if tried is None else asdict(tried),
        },
        acceptance=tuner.acceptance.by_rank(),
        reliability=reliability(tuner.acceptance.ranks, tuner.probable),
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
    """Decode prompts that were kept back, as many as fit into the time: some trees of the ladder at the first batch
    size, and the tree of each other batch size that they fill. Return how many; None where they fill no batch.
    """
    fitting = [choice for choice in choices if choice.trial.batch_size <= len(prompts)]
    if not fitting:
        return None
    first, *others = fitting
    tried = [(spec, trial) for spec, trial in ladder if spec.nodes in LADDER or spec == first.spec]
    # the chosen tree, then those nearest to it, which say most about the choice
    tried.sort(key=lambda pair: (pair[0] != first.spec, abs(pair[0].nodes - first.spec.nodes)))
    entrants = [tried, *([(choice.spec, choice.trial)] for choice in others)]
    tokens = tuner.calibration.tokens / tuner.calibration.prompts
    bouts = [make_bout([trial for _, trial in pairs], tokens) for pairs in entrants]
    size = trial_size(bouts, len(prompts), tuner.settings.repeats, TRIAL_SECONDS)
    tuner.tell(f"trial: {size}")
    for bout, pairs in zip(bouts, entrants, strict=True):
        pairs = pairs[: size.trees]
        chosen = prompts[: bout.prompts(size.prompts)]
        found = tuner.decode(chosen, [spec for spec, _ in pairs], bout.batch, size.repeats)
        for (_, trial), measured in zip(pairs, found, strict=True):
            trial.measured = measured
    first.trial.measured = tried[0][1].measured
    return size
