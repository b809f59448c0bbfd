"""Report of `firp eval` as one self-contained HTML page, and tables of the papers' analyses."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from firp_cli.reports.canvas import Picture
from firp_cli.reports.cells import DASH, Cells, literal, number, rich_table
from firp_cli.reports.page import closing, figure, page, section, table
from firp_cli.reports.tables import eval_cells, eval_headers
from firp_cli.results import Analysis, EvalReport

if TYPE_CHECKING:
    from rich.console import Group

TITLES = {
    "similarity": "Similarity of pseudo and real states",
    "transfer-layer": "Accuracy against the transfer layer",
    "attention": "Sight of earlier pseudo states",
    "heads": "Against Medusa and early-exit heads",
    "rows": "Forward time by rows",
    "tree-size": "Accepted length by tree size",
}
CAPTIONS = {
    "quality": "Agreement of the drafts with the teacher, and distance from its distribution.",
    "occupancy": "Tokens in the pipeline at each tick, and agreement of early exits with the last loop.",
}
NOTES = (
    "top-1: the teacher's token is the draft's first; top-5: it is among the first five; KL: teacher from draft, nats.",
    "Anchors: positions of the answers that drafts start from. Step i drafts the token i + 1 after its anchor.",
    "Expected accepted length: tokens of a decoding step, bonus token included, if every position were an anchor.",
)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 3)
    return DASH if value is None else str(value)


def analysis_cells(analysis: Analysis) -> Cells:
    """Return the cells of an analysis's table."""
    return [[_cell(value) for value in row] for row in analysis.rows]


def _texts(analysis: Analysis) -> int:
    """Return the number of leading columns with text."""
    first = analysis.rows[0] if analysis.rows else []
    return next((place for place, value in enumerate(first) if not isinstance(value, str)), len(first))


def analysis_table(analysis: Analysis) -> Group:
    """Return title, table, reading and note of an analysis for the terminal, or the reason why there is none."""
    from rich.console import Group

    title = f"\n[bold]{TITLES[analysis.name]}[/bold] ({analysis.name})"
    if analysis.reason is not None:
        return Group(title, literal(f"not measured: {analysis.reason}"))
    drawn = rich_table(*_joined(analysis), _texts(analysis))
    return Group(title, drawn, *(literal(_sentence(text)) for text in (analysis.reading, analysis.note) if text))


def _joined(analysis: Analysis) -> tuple[list[str], Cells]:
    """Return headers and cells with the columns of the steps as one, which takes less room in a terminal."""
    steps = [place for place, header in enumerate(analysis.headers) if header.startswith("step ")]
    if len(steps) < 2:
        return analysis.headers, analysis_cells(analysis)
    first, end = steps[0], steps[-1] + 1

    def join(cells: list[str], text: str) -> list[str]:
        return [*cells[:first], text, *cells[end:]]

    cells = [join(line, " ".join(cell.rjust(5) for cell in line[first:end])) for line in analysis_cells(analysis)]
    return join(analysis.headers, f"steps 1 to {len(steps)}"), cells


def eval_html(report: EvalReport, figures: Mapping[str, Picture]) -> str:
    """Return the page. `figures`: by name, from `figures.eval_figures` and `analysis_figures`."""
    chain, best = report.expected_accepted_length_chain, report.expected_accepted_length_tree
    length = f"{chain:.2f} tokens as a chain, {best:.2f} with tree {report.tree}"
    if report.pipeline:
        length = f"{chain:.2f} tokens in {report.pipeline.loops} ticks"
    body = [
        "<h1>firp eval</h1>",
        f'<p class="lead">{escape(_what(report))}.</p>',
        f'<p class="headline">Expected accepted length: {escape(length)}.</p>',
        table(eval_headers(report), eval_cells(report), 0),
        *(figure(name, text, figures.get(name)) for name, text in CAPTIONS.items()),
        _cosines(report),
        *(_section(item, figures.get(f"analysis-{item.name}")) for item in report.analyses),
        *closing(NOTES, report.environment, [report.teacher]),
    ]
    return page("firp eval", body)


def _cosines(report: EvalReport) -> str:
    """Return the cosines of pseudo and real states as a table; nothing for predictors without pseudo states."""
    if not report.similarity:
        return ""
    headers = ["after layer", *(f"step {item.step}" for item in report.steps)]
    cells = [[str(layer), *map(_cell, values)] for layer, values in report.similarity.items()]
    return section("Cosine of pseudo and real states", table(headers, cells, 1))


def _what(report: EvalReport) -> str:
    """Return predictor, teacher and data in one line."""
    data = report.data.get("dataset") or report.data.get("store")
    counts = f"{report.data.get('sequences')} conversations, {report.data.get('anchors')} anchors"
    predictor = f"predictor {report.predictor.get('folder')} ({report.predictor.get('kind')})"
    return f"{predictor}, teacher {report.teacher.get('name')}, {data}: {counts}"


def _section(analysis: Analysis, drawn: Picture | None) -> str:
    """Return the part of an analysis on the page."""
    title = TITLES[analysis.name]
    if analysis.reason is not None:
        return section(title, f"<p>Not measured: {escape(analysis.reason)}.</p>")
    return section(
        title,
        f"<p>{escape(_sentence(analysis.reading))}</p>",
        figure(f"analysis-{analysis.name}", f"{title}.", drawn),
        table(analysis.headers, analysis_cells(analysis), _texts(analysis)),
        f'<p class="small">{escape(_sentence(analysis.note))}</p>',
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
