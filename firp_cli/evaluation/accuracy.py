"""Task accuracy of a bench's answers: final values, contained values, and code that passes its tests.

Every distinct answer is judged once, after all measurements. Answers count as they stand, cut ones too.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from firp_cli.data.references import Reference
from firp_cli.errors import SandboxError
from firp_cli.evaluation.answer_runs import ALL
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.final_values import contains, ends_with
from firp_cli.evaluation.methods import BenchSettings
from firp_cli.evaluation.run_code import passes_tests, sandbox_fault
from firp_cli.records import Accuracy, AnswerRecord
from firp_cli.results import BenchReport, Interval, Progress, no_progress

LOG = logging.getLogger("firp")
THINKING, THOUGHT = "<think>", "</think>"
NORMAL = 1.959964  # 97.5% quantile of the normal distribution


def judge(reference: Reference, text: str) -> bool | None:
    """Return True if an answer is right. None for code, which `passes_tests` judges by running it."""
    said = spoken(text)
    if reference.tests:
        return None
    if reference.final:
        return ends_with(said, reference.final)
    return all(contains(said, value) for value in reference.contained)


def spoken(text: str) -> str:
    """Return an answer without its thinking; nothing of one that is cut while it thinks."""
    said = text.rpartition(THOUGHT)[2]
    return "" if THINKING in said else said


def add_accuracy(report: BenchReport, prompts: Sequence[BenchPrompt], tokenizer: Any, settings: BenchSettings) -> None:
    """Judge the answers of a report; add their texts, the accuracy of each row, and warnings.

    Rows over several data sets get none, since these are judged in different ways. Nothing is added without a
    tokenizer.
    """
    if tokenizer is None:
        return
    write_texts(report.records, tokenizer)
    report.warnings += judge_answers(report.records, prompts, settings.run_code, sampled=settings.temperature > 0)
    for row in report.rows:
        if not row.reason and row.dataset != ALL:
            own = [
                item
                for item in report.records
                if (item.method, item.dataset) == (row.method, row.dataset) and row.category in (ALL, item.category)
            ]
            row.accuracy = accuracy(own, prompts)


def write_texts(records: Iterable[AnswerRecord], tokenizer: Any) -> None:
    """Set the text of the answers whose tokens were kept, without special tokens."""
    for record in records:
        if record.token_ids is not None:
            ids = record.token_ids
            record.text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def judge_answers(
    records: Sequence[AnswerRecord],
    prompts: Sequence[BenchPrompt],
    run_code: bool = False,
    progress: Progress = no_progress,
    sampled: bool = False,
) -> list[str]:
    """Set `correct` of the records whose text was kept and whose prompt has a reference; return warnings.

    Args:
        prompts: those that were measured, as records number them.
        run_code: run the code of answers with the tests of their data set, in a sandbox.
        sampled: records without a text repeat the first answer to their prompt, and are judged as that one.
    """
    asked = [(record, reference) for record in records if (reference := _reference(record, prompts)) is not None]
    kept = [(record, reference) for record, reference in asked if record.text is not None]
    verdicts = {(reference, record.text): judge(reference, record.text or "") for record, reference in kept}
    code = [answer for answer in verdicts if answer[0].tests]
    warnings = []
    if code and run_code:
        warnings += _run_all(code, verdicts, progress)
    elif code:
        names = dict.fromkeys(record.dataset for record, reference in kept if reference.tests)
        warnings.append(f"accuracy on {', '.join(names)}: --run-code runs the tests on the answers' code")
    for record, reference in kept:
        record.correct = verdicts[reference, record.text]
    if sampled:
        first = {_answered(record): record.correct for record, _ in reversed(kept)}
        for record, _ in asked:
            if record.text is None:
                record.correct = first.get(_answered(record))
    judged = [record for record, _ in kept if record.correct is not None]
    if cut := sum(record.finish_reason == "length" for record in judged):
        warnings.append(
            f"accuracy: {cut} of {len(judged)} judged answers were cut at --max-new-tokens and count as they stand"
        )
    return warnings


def accuracy(records: Sequence[AnswerRecord], prompts: Sequence[BenchPrompt] = ()) -> Accuracy | None:
    """Return the share of right answers among the judged ones of a method; None where the prompts have no reference.

    The interval is of as many draws as there are prompts: several answers to one prompt are not independent.

    Args:
        prompts: those that were measured. Given them, answers that wait for --run-code are 0 of 0.
    """
    judged = [record for record in records if record.correct is not None]
    if not judged:
        waiting = any(_reference(record, prompts) for record in records) if prompts else False
        return Accuracy(0, 0) if waiting else None
    right, units = sum(bool(record.correct) for record in judged), len({record.prompt for record in judged})
    return Accuracy(right, len(judged), wilson_interval(right / len(judged), units))


def wilson_interval(share: float, draws: int) -> Interval:
    """Return the 95% interval of a share that was observed in a number of draws (Wilson 1927)."""
    spread = NORMAL**2 / draws
    centre = (share + spread / 2) / (1 + spread)
    half = NORMAL / (1 + spread) * math.sqrt(share * (1 - share) / draws + spread / (4 * draws))
    return max(0.0, centre - half), min(1.0, centre + half)


def _reference(record: AnswerRecord, prompts: Sequence[BenchPrompt]) -> Reference | None:
    """Return the reference that an answer is judged by; None where its turn has none."""
    reference = prompts[record.prompt].reference
    return reference if reference is not None and reference.turn == record.turn else None


def _answered(record: AnswerRecord) -> tuple[str | None, str, int, int]:
    return record.teacher, record.method, record.prompt, record.turn


def _run_all(
    code: Sequence[tuple[Reference, str | None]],
    verdicts: dict[tuple[Reference, str | None], bool | None],
    progress: Progress,
) -> list[str]:
    """Set the verdicts on code by running it; return warnings. An interruption leaves the rest without a verdict."""
    if fault := sandbox_fault():
        return [f"--run-code: no answer was run: {fault}"]
    LOG.info(f"--run-code: the code of {len(code)} different answers is run with its tests")
    faults: Counter[str] = Counter()
    for done, (reference, text) in enumerate(code):
        progress(done, len(code))
        try:
            verdicts[reference, text] = passes_tests(reference, spoken(text or ""))
        except SandboxError as error:
            faults[str(error)] += 1
        except KeyboardInterrupt:
            return [f"--run-code: interrupted after {done} of {len(code)} answers"]
    progress(len(code), len(code))
    return [f"--run-code: {count} of {len(code)} answers were not run: {fault}" for fault, count in faults.items()]
