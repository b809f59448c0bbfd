"""Methods that answer the same prompts in turns within a time limit, and their results so far.

A round is one prompt of every data set. Methods without CUDA graphs (transformers' `generate`, pipelines) take many
times as long as the others: they answer once, and fewer prompts when their share of the time is over. Every ratio of
two methods is over the prompts that both have answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.evaluation.answer_runs import ALL, BatchRun, batch_run
from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt
from firp_cli.evaluation.lossless import first_divergence, next_token_logits
from firp_cli.evaluation.methods import Method
from firp_cli.evaluation.rows import bench_rows, speedup
from firp_cli.evaluation.speed_ticks import pipeline_report
from firp_cli.results import BenchRow, Divergence, Generation, TickCost
from firp_cli.teacher.teacher import Teacher
from suite.work import Clock

FEW_TOKENS = 3  # tokens of a warm-up without graphs
NEXT_ROUND = 1.25  # expected time of the next round, over the longest one so far
EVERY = 3.0  # seconds between reports


class Bout:
    """Answers of all methods by prompt.

    Args:
        prompts: in the order of answering, those of a round together.
        slow_share: share of the time for all slow methods; None: they answer every prompt.
    """

    def __init__(
        self,
        teacher: Teacher,
        methods: Sequence[Method],
        prompts: Sequence[BenchPrompt],
        tokens: int,
        repeats: int,
        clock: Clock,
        slow_share: float | None = None,
    ) -> None:
        self.teacher, self.methods, self.prompts = teacher, list(methods), list(prompts)
        self.tokens, self.repeats, self.clock = tokens, repeats, clock
        self.slow_seconds = math.inf if slow_share is None else slow_share * clock.seconds
        self.made: dict[str, dict[int, list[Generation]]] = {method.name: {} for method in methods}
        self.differences: dict[tuple[str, str], dict[int, Divergence | None]] = {}
        self.tick: TickCost | None = None  # cost of a pipeline's tick, if measured
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def run(self, report: Callable[[], None]) -> None:
        """Run round after round; `report` is called every few seconds and at the end."""
        self._warm()
        size = len({prompt.dataset for prompt in self.prompts})
        spent_slowly, slow_round, longest, reported = 0.0, 0.0, 0.0, time.perf_counter()
        for start in range(0, len(self.prompts), size):
            numbers = range(start, min(start + size, len(self.prompts)))
            slowly = spent_slowly + slow_round <= self.slow_seconds
            needed = NEXT_ROUND * (longest + (slow_round if slowly else 0.0))
            if start and not self.clock.allows(needed, f"prompts after {start} of {len(self.prompts)}"):
                break
            began, spent = time.perf_counter(), 0.0
            for number in numbers:
                spent += self._answer(number, slowly)
                self._compare(number)
                if time.perf_counter() - reported > EVERY:
                    report()
                    reported = time.perf_counter()
            slow_round, spent_slowly = max(slow_round, spent), spent_slowly + spent
            longest = max(longest, time.perf_counter() - began - spent)
        report()

    def _warm(self) -> None:
        """Decode a few tokens; with graphs the longest prompt first, so that its graphs serve the others, then with all
        tokens until the steps that repeat are captured.
        """
        order = sorted((prompt.token_ids for prompt in self.prompts), key=len)
        for method in self.methods:
            if getattr(method.engine, "graphs", None) is None:
                method.generate([order[0]], min(FEW_TOKENS, self.tokens))
                continue
            for prompt in (order[-1], order[0], order[-1]):
                method.generate([prompt], self.tokens)

    def _answer(self, number: int, slowly: bool) -> float:
        """Answer a prompt with all methods; return the seconds of the slow ones."""
        spent = 0.0
        turn = number % len(self.methods)
        for repeat in range(self.repeats):
            for method in [*self.methods[turn:], *self.methods[:turn]]:
                if slow(method) and (repeat or not slowly):
                    continue
                began = time.perf_counter()
                made = method.generate([self.prompts[number].token_ids], self.tokens)
                self.made[method.name].setdefault(number, []).extend(made)
                if slow(method):
                    spent += time.perf_counter() - began
        return spent

    def _compare(self, number: int) -> None:
        """Compare every method's answer with that of `ar` and of `generate`."""
        for reference in ("ar", "hf"):
            expected = self.made.get(reference, {}).get(number)
            for method in self.methods:
                got = self.made[method.name].get(number)
                if expected and got and method.name != reference:
                    found = self._difference(number, expected[0].token_ids, got[0].token_ids)
                    self.differences.setdefault((method.name, reference), {})[number] = found

    def _difference(self, number: int, expected: Sequence[int], got: Sequence[int]) -> Divergence | None:
        prompt = self.prompts[number].token_ids
        return first_divergence(self.teacher, number, prompt, expected, got, self._logits_after)

    def _logits_after(self, ids: Sequence[int]) -> Tensor:
        if tuple(ids) not in self._logits:
            self._logits[tuple(ids)] = next_token_logits(self.teacher, ids).cpu()
        return self._logits[tuple(ids)]

    def runs(self, name: str, numbers: Sequence[int] | None = None) -> list[BatchRun]:
        """Return a method's answers with its repeats combined, of these prompts alone."""
        made = self.made[name]
        chosen = sorted(made) if numbers is None else sorted(set(numbers) & set(made))
        return [
            batch_run(Batch(self.prompts[number].dataset, "", [number]), [[item] for item in made[number]])
            for number in chosen
        ]

    def rows(self, reference: str) -> list[BenchRow]:
        """Return rows of every method on each data set and on all, compared with `reference`; each ratio is over common
        prompts.
        """
        found = []
        for method in self.methods:
            name, answered = method.name, list(self.made[method.name])
            if not answered:
                continue
            runs = {name: self.runs(name)}
            if "ar" in self.made:
                runs["ar"] = self.runs("ar", answered)
            for row in bench_rows(name, runs, self.differences.get((name, reference), {}), 0.0):
                row.predictor, row.tree = method.predictor, method.tree
                row.speedup_hf = self._over_hf(row)
                row.pipeline = pipeline_report(self._answers(row), self.teacher.looped is not None, 1, self.tick)
                found.append(row)
        order = {name: place for place, name in enumerate(dict.fromkeys(row.dataset for row in found))}
        return sorted(found, key=lambda row: order[row.dataset])

    def _answers(self, row: BenchRow) -> list[Generation]:
        made = self.made[row.method]
        return [made[number][0] for number in sorted(made) if row.dataset in (ALL, self.prompts[number].dataset)]

    def _over_hf(self, row: BenchRow) -> float | None:
        """Return the speedup over `generate`, over the prompts that both have answered."""
        if "hf" not in self.made or row.method == "hf":
            return None
        common = [
            number
            for number in self.made["hf"]
            if number in self.made[row.method] and row.dataset in (ALL, self.prompts[number].dataset)
        ]
        return speedup(self.runs("hf", common), self.runs(row.method, common)) if common else None

    def identical(self) -> dict[str, dict[str, Any]]:
        """Return by method and reference: answers compared, identical answers, the gaps at the first differences."""
        found: dict[str, dict[str, Any]] = {}
        for (name, reference), differences in self.differences.items():
            marks = [one for one in differences.values() if one is not None]
            ulps = sorted(abs(one.gap_ulps) for one in marks if one.gap_ulps is not None)
            found.setdefault(name, {})[reference] = {
                "compared": len(differences),
                "identical": len(differences) - len(marks),
                "median_ulps": ulps[len(ulps) // 2] if ulps else None,
                "largest_ulps": ulps[-1] if ulps else None,
                "differences": [vars(one) for one in marks],
            }
        return found


def slow(method: Method) -> bool:
    """Return True if the method never runs CUDA graphs."""
    return method.engine is None or isinstance(method.engine, PipelineEngine)
