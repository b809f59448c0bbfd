"""Rows of data sets that cannot be used: they are skipped, counted by reason, and refused when they are many."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from firp_cli.errors import DatasetError

LOG = logging.getLogger("firp")
FEW = 10  # so many odd rows are always skipped, however short the file is
MAX_ODD = 0.05  # largest share of odd rows that is skipped
SHOWN = 6  # reasons named in a line
DISTINCT = 64  # reasons that are counted apart
OTHER = "another fault"
REFUSED = "refused by the chat template"  # reasons that arise with a teacher
TOO_LONG = "prompt longer than max_length"
NO_ANSWER = "no answer"
NOT_LEARNED = "answers of weight 0 only"
NO_ANSWER_WITHIN = "no answer within max_length"
NOT_WRITTEN = "no answer that the chat template writes"
BEYOND_EMBEDDING = "token ids beyond the teacher's embedding"
EMPTY_ANSWER = "empty answer"
CALLS_LEFT_OUT = "tool calls that the chat template leaves out"
EXPECTED = (TOO_LONG, NO_ANSWER, NOT_LEARNED, NO_ANSWER_WITHIN)  # a limit, or a set of questions: no fault of the rows
PLACEHOLDER = "a placeholder in place of a text"
FETCH = (
    "fetch the texts from their sources first; for SPEED-Bench with nemo_skills/dataset/speed-bench/prepare.py of "
    "https://github.com/NVIDIA-NeMo/Skills (python prepare.py --output_dir DIR/speed_bench), then --data-dir DIR"
)


class OddRow(DatasetError):
    """Row that cannot be used.

    Attributes:
        reason: short, the same for all rows with the fault; rows are counted by it. place: field of the row.
    """

    def __init__(self, reason: str, detail: str = "", place: str = "") -> None:
        super().__init__(printable(detail or reason))
        self.reason, self.place = printable(reason), printable(place)


def printable(text: str) -> str:
    """Return a text on one line without lone surrogates, which no output can carry."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\r", "\\r")


@dataclass
class OddRows:
    """Count of the rows of a data set that were skipped.

    Attributes:
        source: name of the data set. rows: number of rows read. counts: skipped rows by reason.
        first: first row of each reason, as `row 7`, and the detail of its fault ('' where the reason tells all).
    """

    source: str
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, reason: str, row: str, detail: str = "") -> None:
        """Count a row."""
        if reason not in self.counts and len(self.counts) >= DISTINCT:
            reason = OTHER
        self.counts[reason] += 1
        detail = detail.partition("\n")[0]
        self.first.setdefault(reason, (row, "" if detail in reason else detail))

    def merge(self, other: OddRows) -> None:
        """Add the counts of rows that follow those counted here."""
        self.rows += other.rows
        for reason, count in other.counts.items():
            self.counts[reason] += count
            self.first.setdefault(reason, other.first[reason])

    def line(self) -> str:
        """Return the counts in one line; '' where no row was skipped."""
        if not self.counts:
            return ""
        parts = []
        for reason, count in self.counts.most_common(SHOWN):
            row, detail = self.first[reason]
            where = f"first: {row}" + (f", {detail[:200]}" if detail else "")
            parts.append(f"{count:,} {_phrase(reason)} ({where})")
        hidden = sum(self.counts.values()) - sum(count for _, count in self.counts.most_common(SHOWN))
        if hidden:
            parts.append(f"{hidden:,} for other reasons")
        line = f"skipped {sum(self.counts.values()):,} of {self.rows:,} rows of {self.source}: {', '.join(parts)}"
        return f"{line}; {FETCH}" if PLACEHOLDER in self.counts else line

    def check(self, allowed: float = MAX_ODD) -> None:
        """Raise DatasetError when more than the share `allowed` of the rows, and more than `FEW`, are odd.

        Rows without an answer and rows beyond a length limit do not count.
        """
        odd = sum(count for reason, count in self.counts.items() if reason not in EXPECTED)
        if odd > max(FEW, allowed * self.rows):
            raise DatasetError(
                f"more than {allowed:.0%} of the rows cannot be used: {self.line()}\n"
                "mend or remove these rows; collect and train accept a larger share with data.max_odd=SHARE"
            )

    def refuse_placeholders(self) -> None:
        """Raise DatasetError for a set with placeholders in place of texts: the rest is another set."""
        if count := self.counts[PLACEHOLDER]:
            row, detail = self.first[PLACEHOLDER]
            are = "is a placeholder" if count == 1 else "are placeholders"
            raise DatasetError(
                f"{self.source}: {count:,} of {self.rows:,} rows {are} in place of a text (first: {row}, "
                f"{detail[:90]}); without them it is another set, so nothing is measured\n{FETCH}"
            )

    def tell(self) -> None:
        """Log the counts, if any row was skipped."""
        if self.counts:
            LOG.warning(self.line())


def _phrase(reason: str) -> str:
    """Return a reason as it follows a number of rows."""
    if reason == REFUSED:
        return reason
    article = "a " if reason == TOO_LONG else "an " if reason == EMPTY_ANSWER else ""
    return f"with {article}{reason}"
