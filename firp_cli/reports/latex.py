"""LaTeX of `firp bench`: the main table and the categories, for a paper that loads the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from firp_cli.reports.cells import DASH, Cells, by_teacher, one_line
from firp_cli.reports.notes import interval_note, reason_lines, settings_line
from firp_cli.reports.preset_lines import preset_lines
from firp_cli.reports.tables import bench_cells, category_cells
from firp_cli.results import BenchReport

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    DASH: "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
INTERVAL = re.compile(r" \[([-\d.]+), ([-\d.]+)\]")
EXPLAINED = "Brackets: 95% intervals."


def escaped(text: str) -> str:
    """Return the text with LaTeX's special characters escaped."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)


def bench_latex(report: BenchReport) -> str:
    """Return a table of all methods, and one of each teacher's categories if there are any."""
    whole = [row for row in report.rows if row.category == "all"]
    headers, cells = bench_cells(report, whole)
    settings = settings_line(report)
    caption = f"{settings[0].upper()}{settings[1:]}. {EXPLAINED}"
    notes = [*preset_lines(report), *report.warnings, *reason_lines(report)]
    notes += [note] if (note := interval_note(report)) else []
    left = headers.index("method") + 1
    drawn = [latex_table(headers, cells, left, caption, "tab:firp-bench", notes)]
    for number, part in enumerate(by_teacher(report), 1):
        headers, cells = category_cells(part)
        owner = f", teacher {part.rows[0].teacher}" if part.rows and part.rows[0].teacher else ""
        caption = f"Speedup over ar (accepted length){owner}."
        label = f"tab:firp-bench-categories{'' if number == 1 else f'-{number}'}"
        drawn += [latex_table(headers, cells, 1, caption, label)] if cells else []
    return "\n".join(["% needs \\usepackage{booktabs}", *drawn])


def latex_table(
    headers: Sequence[str], cells: Cells, left: int, caption: str, label: str, notes: Sequence[str] = ()
) -> str:
    """Return a table whose first `left` columns are flush left; a rule where the first of several changes."""
    lines = []
    for place, line in enumerate(cells):
        if left > 1 and place and line[0] != cells[place - 1][0]:
            lines.append(r"\midrule")
        lines.append(_line(line))
    below = [f"\\par\\smallskip{{\\footnotesize {escaped(one_line(note))}.\\par}}" for note in notes]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            f"\\caption{{{escaped(caption)}}}",
            f"\\label{{{label}}}",
            f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(headers) - left)}}}",
            r"\toprule",
            _line(headers),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *below,
            r"\end{table}",
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(INTERVAL.sub(r" {\\scriptsize [\1, \2]}", escaped(cell)) for cell in cells) + r" \\"
