"""Verdict on the check of every emitted token against the teacher: cell, note and failures."""

from __future__ import annotations

from firp_cli.records import TokenPlace, Verified
from firp_cli.reports.cells import DASH, main_rows, row_label
from firp_cli.results import BenchReport, BenchRow

# Exact sampling exceeds each of these in fewer than one run of ten thousand.
MOST_DEVIATIONS = 5.0
LEAST_P_VALUE = 1e-4


def is_lossless(check: Verified) -> bool:
    """Return True where nothing but rounding, or chance, explains the difference from the teacher."""
    return fault(check) is None


def fault(check: Verified) -> str | None:
    """Return in words why a method's answers are not the teacher's; None where they are."""
    if check.above:
        others = f", the worst of {check.above:,} such tokens" if check.above > 1 else ""
        return (_place(check.worst, check) if check.worst else f"{check.above:,} tokens are wrong") + others
    if check.deviation is not None and abs(check.deviation) >= MOST_DEVIATIONS:
        side = "less" if check.deviation > 0 else "more"
        return (
            f"its tokens are {side} probable than those of exact sampling, by {abs(check.deviation):.1f} standard "
            f"deviations of {check.tokens:,} tokens' surprisal"
        )
    if check.p_value is not None and check.p_value < LEAST_P_VALUE:
        return f"its answers are not as probable as those of ar (p = {check.p_value:.2g})"
    return None


def _place(worst: TokenPlace, check: Verified) -> str:
    """Return the place of a wrong token, the two tokens, and how far they are apart."""
    prompt = f"{worst.label} (prompt {worst.prompt})" if worst.label else f"prompt {worst.prompt}"
    emitted = "the answer's end" if worst.emitted < 0 else token_name(worst.emitted, worst.emitted_text)
    found = f"{prompt}, turn {worst.turn + 1}, token {worst.position}: {emitted}"
    if check.gap is None and check.tail is not None:
        return (
            f"{found}, where {token_name(worst.best, worst.best_text)} is the most probable: a token so improbable is "
            f"drawn with probability {worst.value or 0.0:.2g} (tolerance {check.tolerance:.2g})"
        )
    if worst.value is None or worst.value == float("inf"):
        reason = (
            "the answer goes on after its end" if worst.emitted >= 0 else "it has no end token and is not at its limit"
        )
        return f"{found}: {reason}"
    best = token_name(worst.best, worst.best_text)
    return f"{found}, where {best} has the largest logit: gap {worst.value:.3g} (tolerance {check.tolerance:.2g})"


def token_name(number: int, text: str) -> str:
    """Return `' the' (279)`, or the id alone where its text is not known."""
    return f"{text!r} ({number})" if text else f"token id {number}"


def verified_cell(check: Verified | None) -> str:
    """Return `all 3,214`, or `1 of 3,214: prompt 7, token 31, gap 4.2`; a dash where nothing was checked."""
    if check is None:
        return DASH
    if not check.above:
        return f"all {check.tokens:,}" if is_lossless(check) else f"all {check.tokens:,}, but improbable together"
    text = f"{check.above:,} of {check.tokens:,}"
    if check.worst is None:
        return text
    text += f": prompt {check.worst.prompt}, token {check.worst.position}"
    value = check.worst.value
    if check.gap is None and check.tail is not None:
        return f"{text}, tail {value or 0.0:.2g}"
    return f"{text}, gap {value:.2g}" if value is not None and value < float("inf") else text


def lossless_failures(report: BenchReport) -> list[str]:
    """Return a line for each method that is not lossless, or that was measured and not verified."""
    return [line for row in main_rows(report) if (line := _failure(row))]


def _failure(row: BenchRow) -> str | None:
    if row.reason is not None:  # it did not run
        return None
    method = row_label(row)
    if row.verified is None:
        return f"{method} was not verified"
    reason = fault(row.verified)
    return f"{method} is not lossless: {reason}" if reason else None
