"""Report of `firp tune`: tables for the terminal, Markdown and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from firp_cli.reports.canvas import Picture
from firp_cli.reports.cells import DASH, Cells, closing_markdown, markdown_table, number, rich_table
from firp_cli.reports.page import closing, figure, page, table
from firp_cli.reports.predicted import disagreement
from firp_cli.reports.tuning_figures import acceptance_figure, batch_figure, cost_figure, nodes_figure
from firp_cli.reports.tuning_tree import drawable, tree_figure
from firp_cli.results import Prediction
from firp_cli.tune_results import Trial, TunedTree, TuneReport

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

CHOICE_HEADERS = (
    "batch",
    "tree",
    "rows",
    "accepted length",
    "step ms",
    "ar ms",
    "predicted speedup",
    "measured speedup",
    "off by %",
)
LADDER_HEADERS = (
    "nodes",
    "tree",
    "predicted length",
    "measured length",
    "off by %",
    "predicted speedup",
    "measured speedup",
    "off by %",
)
CHECK_HEADERS = ("batch size", "context", "rows", "predicted ms", "measured ms", "off by %")
CAPTIONS = {
    "cost": "Time of a pass of the teacher by its rows; open circles are measurements that the curves do not contain.",
    "nodes": "Performance of the best tree of each number of nodes, at the first batch size.",
    "batch": "Speedup of the best tree at each batch size; 1 is autoregressive decoding.",
    "tree": "The chosen tree.",
    "acceptance": "Accuracy of each candidate by its order, and reliability of the drafted probabilities.",
}
NOTES = (
    "Accepted length: tokens emitted per decoding step, bonus token included; 1 for autoregressive decoding.",
    "Speedup: over autoregressive decoding (ar) in the same engine, decode time only.",
    "Predicted: from acceptance on the calibration prompts and the measured cost of passes. Measured: by decoding "
    "prompts that were not used to choose the tree. Off by: predicted over measured, minus 1.",
    "Nodes: tokens of the tree, the root included. Rows: all rows of a step, per sequence, rows for drafting included. "
    "Step ms and ar ms: a step with the tree and an autoregressive one, predicted.",
    "Checks of the cost curves are measured passes that the curves do not contain.",
    "Break-even: the smallest batch size at which no tree pays: none is predicted to be clearly faster than ar.",
)


def tune_figures(report: TuneReport) -> dict[str, Picture]:
    """Return figures by name: `cost`, `nodes`, `batch`, `tree`, `acceptance`, without those that would be empty."""
    figures = {}
    if report.cost.curves:
        figures["cost"] = cost_figure(report)
    if len({trial.nodes for trial in report.ladder}) > 1:
        figures["nodes"] = nodes_figure(report)
    if len({trial.batch_size for trial in report.batches}) > 1:
        figures["batch"] = batch_figure(report)
    if entry := drawable(report.entries):
        figures["tree"] = tree_figure(entry)
    if report.acceptance:
        figures["acceptance"] = acceptance_figure(report)
    return figures


def percent_off(predicted: float | None, measured: float | None) -> str:
    """Return `+2.1`, the error in percent of the measured value; a dash if a value is missing."""
    value = disagreement(predicted, measured)
    return DASH if value is None else f"{100 * value:+.1f}"


def measured_at(report: TuneReport, batch_size: int) -> Prediction | None:
    """Return the measured performance of the best tree at a batch size, if the trial decoded it."""
    return next((trial.measured for trial in report.batches if trial.batch_size == batch_size and trial.measured), None)


def choice_cells(report: TuneReport) -> Cells:
    """Return cells under CHOICE_HEADERS, one line per batch size."""
    return [_choice(entry, measured_at(report, entry.batch_size)) for entry in report.entries]


def _choice(entry: TunedTree, measured: Prediction | None) -> list[str]:
    predicted, speedup = entry.predicted, measured.speedup if measured else None
    return [
        str(entry.batch_size),
        entry.tree,
        str(entry.rows),
        number(predicted.accepted_length),
        number(predicted.step_milliseconds),
        number(predicted.ar_milliseconds),
        number(predicted.speedup),
        number(speedup),
        percent_off(predicted.speedup, speedup),
    ]


def ladder_cells(report: TuneReport) -> Cells:
    """Return cells under LADDER_HEADERS, one line per number of nodes."""
    return [_rung(trial) for trial in sorted(report.ladder, key=lambda trial: trial.nodes)]


def _rung(trial: Trial) -> list[str]:
    cells = [str(trial.nodes), trial.tree]
    for name in ("accepted_length", "speedup"):
        predicted, measured = getattr(trial.predicted, name), getattr(trial.measured, name, None)
        cells += [number(predicted), number(measured), percent_off(predicted, measured)]
    return cells


def check_cells(report: TuneReport) -> Cells:
    """Return cells under CHECK_HEADERS, one line per check."""
    return [
        [
            *map(str, (check.batch_size, check.context, check.rows)),
            number(check.predicted),
            number(check.measured),
            percent_off(check.predicted, check.measured),
        ]
        for check in report.cost.checks
    ]


def summary_lines(report: TuneReport) -> list[str]:
    """Return a line each on the cost curves, the calibration and the break-even."""
    return [_cost_line(report), _calibration_line(report), _break_even_line(report)]


def _cost_line(report: TuneReport) -> str:
    cost = report.cost
    points, checks = sum(len(curve.rows) for curve in cost.curves), len(cost.checks)
    line = f"cost curves: {_counted(points, 'point')} in {cost.seconds:.0f} s, "
    return line + (f"largest residual {cost.residual:.1%} at {_counted(checks, 'check')}" if checks else "unchecked")


def _calibration_line(report: TuneReport) -> str:
    calibration = report.calibration
    names = (("prompts", "prompt"), ("tokens", "token"), ("anchors", "anchor"))
    counts = [_counted(calibration[name], noun) for name, noun in names if isinstance(calibration.get(name), int)]
    dataset = calibration.get("dataset")
    context = sorted({entry.context for entry in report.entries})
    tuned = f"; tuned for {' and '.join(map(str, context))} tokens in the cache" if context else ""
    return f"calibration: {', '.join(counts)}{f' of {dataset}' if dataset else ''}{tuned}"


def _break_even_line(report: TuneReport) -> str:
    if report.break_even is not None:
        return f"break-even: {report.break_even} is the smallest batch size tried at which no tree pays"
    sizes = sorted({entry.batch_size for entry in report.entries})
    if len(sizes) == 1:
        return f"break-even: a tree pays at batch size {sizes[0]}, the only one tried"
    return f"break-even: a tree pays at every batch size tried ({', '.join(map(str, sizes))})"


def _counted(count: int, singular: str) -> str:
    return f"{count:,} {singular}{'' if count == 1 else 's'}"


def lead_line(report: TuneReport) -> str:
    """Return teacher, predictor and sampling in one line."""
    teacher, predictor = report.teacher, report.predictor
    folder = predictor.get("folder")
    name = " ".join(
        part for part in (predictor.get("kind"), f"({PurePath(str(folder)).name})" if folder else "") if part
    )
    temperatures = sorted({entry.temperature for entry in report.entries})
    how = [f"temperature {value:g}" if value else "greedy" for value in temperatures]
    owner = f"teacher {teacher.get('name')} ({teacher.get('dtype')}, {teacher.get('device')})"
    return ", ".join([owner, f"predictor {name}", *how])


def headline(report: TuneReport) -> str | None:
    """Return a sentence on the best choice; None if no tree pays."""
    paying = [entry for entry in report.entries if entry.tree != "none"]
    if not paying:
        return None
    best = max(paying, key=lambda entry: entry.predicted.speedup)
    measured = measured_at(report, best.batch_size)
    also = f"; measured: {number(measured.speedup)} times" if measured else ""
    return (
        f"{best.tree} is predicted to decode {number(best.predicted.speedup)} times as fast as autoregressive "
        f"decoding at batch size {best.batch_size}, at {number(best.predicted.accepted_length)} tokens per step{also}"
    )


def tune_tables(report: TuneReport) -> Group:
    """Return the choices, the ladder and the summary for the terminal, at most 100 columns wide."""
    from rich.console import Group
    from rich.text import Text

    parts = [_narrow(CHOICE_HEADERS, choice_cells(report))]
    if report.ladder:
        ladder = _narrow(LADDER_HEADERS, ladder_cells(report))
        ladder.title, ladder.title_justify = "the best tree of each number of nodes", "left"
        parts.append(ladder)
    return Group(*parts, *map(Text, summary_lines(report)))


def _narrow(headers: Sequence[str], cells: Cells) -> Table:
    """Return a table with headers on two lines and little padding; on a narrow terminal cells are folded, never cut."""
    drawn = rich_table([header.replace(" ", "\n", 1) for header in headers], cells, fixed=False)
    drawn.padding = (0, 1, 0, 0)
    drawn.columns[headers.index("tree")].no_wrap = True
    return drawn


def tune_markdown(report: TuneReport, figures: Sequence[str] = ()) -> str:
    """Return tune.md: tables, definitions, environment and command line. `figures`: names of PNGs in its folder."""
    ladder, checks = ladder_cells(report), check_cells(report)
    best = headline(report)
    parts = [
        "# firp tune\n",
        f"{lead_line(report)}.\n",
        *([f"{best}.\n"] if best else []),
        markdown_table(CHOICE_HEADERS, choice_cells(report)),
        "\n".join(f"- {line}" for line in summary_lines(report)) + "\n",
        *(f"![{name}]({name}.png)\n" for name in figures),
        *(["## Trees by number of nodes\n", markdown_table(LADDER_HEADERS, ladder)] if ladder else []),
        *(["## Checks of the cost curves\n", markdown_table(CHECK_HEADERS, checks)] if checks else []),
        *closing_markdown(NOTES, report.environment),
    ]
    return "\n".join(parts)


def tune_html(report: TuneReport, figures: dict[str, Picture]) -> str:
    """Return the page. `figures`: by name, from `tune_figures`."""
    ladder, checks = ladder_cells(report), check_cells(report)
    best = headline(report)
    body = [
        "<h1>firp tune</h1>",
        f'<p class="lead">{escape(lead_line(report))}.</p>',
        f'<p class="headline">{escape(best)}.</p>' if best else "",
        table(CHOICE_HEADERS, choice_cells(report), 0),
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in summary_lines(report)) + "</ul>",
        *(figure(name, CAPTIONS[name], drawn) for name, drawn in figures.items()),
        *(["<h2>Trees by number of nodes</h2>", table(LADDER_HEADERS, ladder, 0)] if ladder else []),
        *(["<h2>Checks of the cost curves</h2>", table(CHECK_HEADERS, checks, 0)] if checks else []),
        *closing(NOTES, report.environment, [report.teacher]),
    ]
    return page("firp tune", body)
