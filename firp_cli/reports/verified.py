"""Cells, tables and notes on the check of outputs: comparison with the reference, every token against the teacher, and
the task's own judgement.
"""

from __future__ import annotations

import math

from firp_cli.records import Accuracy, TokenPlace, Verified
from firp_cli.reports.cells import DASH, Cells, by_teacher, group_name, measured, row_label, teacher_column
from firp_cli.reports.verification import fault, is_lossless, token_name
from firp_cli.results import BenchReport, BenchRow

# Up to this gap of the two logits a first difference is a near-tie that rounding in this dtype decides.
NEAR_TIE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
GREEDY_HEADERS = ("largest gap", "tolerance", "above it", "worst token")
SAMPLED_HEADERS = ("least tail", "tolerance", "below it", "log-prob.", "deviation", "p against ar", "worst token")
GREEDY_NOTE = (
    "Verified: each output is fed to the teacher once; a token's gap is the distance of its logit below the teacher's "
    "largest one, which rounding explains up to the tolerance. Prompts and tokens count from 0, turns from 1."
)
SAMPLED_NOTE = (
    "Verified: each output is fed to the teacher once. Tail: probability of drawing a token at most as probable as the "
    "emitted one; tokens below the tolerance are implausible. Log-prob.: mean of a token, in nats. Deviation: "
    "surprisal over its expectation, in standard deviations. p against ar: two-sample test of the answers' surprisal. "
    "Prompts and tokens count from 0, turns from 1."
)
ACCURACY_NOTE = "Accuracy: answers that the task judges right, out of those that it judged, with the 95% interval."


def lossless_cell(row: BenchRow, reference: str | None) -> str:
    """Return `40/40`, `reference`, or a dash when nothing was compared."""
    if row.method == reference:
        return "reference"
    return f"{row.lossless.identical}/{row.lossless.compared}" if row.lossless.compared else DASH


def verified_word(verified: Verified | None) -> str:
    """Return `yes`, the number of tokens beyond the tolerance, `3 off`, or `no`: improbable together."""
    if verified is None or not verified.tokens:
        return DASH
    if verified.above:
        return f"{verified.above} off"
    return "yes" if is_lossless(verified) else "no"


def accuracy_cell(accuracy: Accuracy | None) -> str:
    """Return `33/40 = 0.82 [0.68, 0.91]`; a dash where nothing was judged."""
    if accuracy is None or not accuracy.judged:
        return DASH
    interval = f" [{accuracy.interval[0]:.2f}, {accuracy.interval[1]:.2f}]" if accuracy.interval else ""
    return f"{accuracy.right}/{accuracy.judged} = {accuracy.right / accuracy.judged:.2f}{interval}"


def right_cell(accuracy: Accuracy | None) -> str:
    """Return `33/40`; a dash where nothing was judged."""
    return f"{accuracy.right}/{accuracy.judged}" if accuracy and accuracy.judged else DASH


def verified_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of the check against the teacher, one line per method and data set."""
    rows = [row for row in measured(report.rows) if row.verified and row.category == "all" and row.dataset != "all"]
    several = len({row.dataset for row in rows}) > 1
    sampled = any(row.verified and row.verified.log_prob is not None for row in rows)
    cells = []
    for row in rows:
        assert row.verified is not None
        group = [group_name(row)] if several else []
        checked = _sampled(row.verified) if sampled else _greedy(row.verified)
        cells.append([*group, row.method, f"{row.verified.tokens}", *checked])
    headers = [
        *(["data set"] if several else []),
        "method",
        "tokens",
        *(SAMPLED_HEADERS if sampled else GREEDY_HEADERS),
    ]
    return teacher_column(rows, headers, cells)


def _share(verified: Verified) -> str:
    return f"{verified.above} ({verified.above / verified.tokens:.2%})" if verified.tokens else DASH


def _figure(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.3g}"


def _greedy(verified: Verified) -> list[str]:
    return [_figure(verified.gap), _figure(verified.tolerance), _share(verified), _place(verified.worst)]


def _sampled(verified: Verified) -> list[str]:
    figures = [_figure(verified.tail), _figure(verified.tolerance), _share(verified), _figure(verified.log_prob)]
    return [*figures, _figure(verified.deviation), _figure(verified.p_value), _place(verified.worst)]


def _place(worst: TokenPlace | None) -> str:
    if worst is None:
        return DASH
    emitted = "the end" if worst.emitted < 0 else token_name(worst.emitted, worst.emitted_text)
    turn = f", turn {worst.turn + 1}" if worst.turn else ""
    best = token_name(worst.best, worst.best_text)
    return f"prompt {worst.prompt}{turn}, token {worst.position}: {emitted}, teacher {best}"


def definitions(report: BenchReport) -> list[str]:
    """Return the definitions of what this file adds to the tables of a report."""
    checks = [row.verified for row in report.rows if row.verified]
    sampled = any(check.log_prob is not None for check in checks)
    notes = [SAMPLED_NOTE if sampled else GREEDY_NOTE] if checks else []
    return notes + ([ACCURACY_NOTE] if any(row.accuracy for row in report.rows) else [])


def verified_note(report: BenchReport) -> str | None:
    """Return a note on the tokens beyond the tolerance; None without a check."""
    rows = [row for row in measured(report.rows) if row.verified and row.category == "all" and row.dataset != "all"]
    if not rows:
        return None
    tokens = sum(row.verified.tokens for row in rows if row.verified)
    faults = [(row, fault(row.verified)) for row in rows if row.verified]
    wrong = [f"{row_label(row)} ({row.dataset}): {words}" for row, words in faults if words]
    if wrong:
        return f"not the teacher's output: {'; '.join(wrong)}"
    largest = max((row.verified.gap for row in rows if row.verified and row.verified.gap is not None), default=None)
    gap = "" if largest is None else f"; the largest gap to the teacher's best logit is {_figure(largest)}"
    return f"verified against the teacher: all {tokens:,} tokens of {len({row.method for row in rows})} methods{gap}"


def identical_line(report: BenchReport) -> str | None:
    """Return the counts of outputs that equal the reference's; None where nothing was compared."""
    reference = report.settings.get("reference")
    whole = [row for row in measured(report.rows) if row.category == "all" and row.dataset != "all"]
    rows = [row for row in whole if row.lossless.compared]
    several = len({row.dataset for row in rows}) > 1
    counts = [f"{row_label(row)} {lossless_cell(row, None)}{f' ({row.dataset})' if several else ''}" for row in rows]
    return f"outputs identical to {reference}'s: {', '.join(counts)}" if reference and counts else None


def lossless_note(report: BenchReport) -> str | None:
    """Return a note on outputs that differ from the reference, for each teacher with such outputs; None if all are
    identical or nothing was compared.
    """
    notes = [note for part in by_teacher(report) for note in (_lossless_note(part), _ar_note(part)) if note]
    return "; ".join(notes) or None


def _lossless_note(report: BenchReport) -> str | None:
    """Return the note on one teacher's outputs."""
    whole = [row for row in report.rows if row.category == "all" and row.dataset != "all"]
    marks = [mark for row in whole for mark in row.lossless.divergences]
    if not marks:
        return None
    methods = list(dict.fromkeys(row_label(row) for row in whole if row.lossless.divergences))
    dtype = str(report.teacher.get("dtype"))
    gaps = [abs(mark.logit_gap) for mark in marks if mark.logit_gap is not None and not math.isnan(mark.logit_gap)]
    largest = max(gaps, default=math.inf)
    outputs = "1 output" if len(marks) == 1 else f"{len(marks)} outputs"
    verb = "differs" if len(marks) == 1 else "differ"
    start = f"{outputs} ({', '.join(methods)}) {verb} from {report.settings.get('reference')}'s"
    if largest <= NEAR_TIE.get(dtype, 0.5):
        return (
            f"{start}: at the first difference the two tokens' logits are at most {largest:.2g} apart, a near-tie that "
            f"{dtype} rounding decides"
        )
    gap = f"up to {largest:.2g} apart" if gaps else "not comparable"
    return f"{start} and the two tokens' logits are {gap}: more than {dtype} rounding explains; please report this"


def _ar_note(report: BenchReport) -> str | None:
    """Return the note on outputs compared with `ar`, which runs the same layers; None where they were not compared."""
    whole = [row for row in report.rows if row.category == "all" and row.dataset != "all" and row.lossless_ar]
    counts, gaps = [], [0.0]
    for row in whole:
        assert row.lossless_ar is not None
        counts.append(f"{row_label(row)} {row.lossless_ar.identical}/{row.lossless_ar.compared} ({row.dataset})")
        gaps += [abs(mark.gap_ulps) for mark in row.lossless_ar.divergences if mark.gap_ulps is not None]
    if not counts:
        return None
    gap = f"; where they differ, the logits are at most {max(gaps):.1f} units in the last place apart"
    return f"identical to ar's outputs: {', '.join(counts)}{gap if max(gaps) else ''}"
