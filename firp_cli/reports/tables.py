"""Tables of `firp bench` and `firp eval`: rich for the terminal, Markdown and CSV for files, from the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from firp_cli.reports import predicted
from firp_cli.reports.cells import (
    DASH,
    TEACHERS_NOTE,
    Cells,
    by_teacher,
    closing_markdown,
    group_name,
    literal,
    markdown_table,
    number,
    rich_table,
    row_label,
    teacher_column,
    with_interval,
)
from firp_cli.reports.predicted import predicted_cells, predicted_lines
from firp_cli.reports.preset_lines import preset_lines
from firp_cli.reports.speed_tables import FIGURE, NOTES, pipeline_markdown, pipeline_rows, pipeline_tables
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, EvalReport, PipelineReport, TickCost

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

BENCH_HEADERS = ("method", "accepted length", "tokens/s", "speedup over ar", "over hf", "lossless")
EVAL_HEADERS = ("step", "top-1", "top-5", "KL (nats)", "anchors")
# Up to this gap of the two logits a first difference is a near-tie that rounding in this dtype decides.
NEAR_TIE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
NO_STEP = "; every answer ended with its first token, which prefill gives: there is no decoding step to compare"


def lossless_cell(row: BenchRow, reference: str | None) -> str:
    """Return `40/40`, `reference`, or a dash when nothing was compared."""
    if row.method == reference:
        return "reference"
    return f"{row.lossless.identical}/{row.lossless.compared}" if row.lossless.compared else DASH


def bench_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of the main table; leading columns name the teacher, and the data set or category, if
    there are several.
    """
    headers = list(BENCH_HEADERS)
    cells = [_main_cells(row, report.settings.get("reference")) for row in report.rows]
    if len({group_name(row) for row in report.rows}) > 1:
        headers = ["prompts", *headers]
        cells = [[group_name(row), *line] for row, line in zip(report.rows, cells, strict=True)]
    return teacher_column(report.rows, headers, cells)


def _main_cells(row: BenchRow, reference: str | None) -> list[str]:
    return [
        row.method,
        with_interval(row.accepted_length, row.accepted_length_interval),
        number(row.tokens_per_second, 1),
        with_interval(row.speedup, row.speedup_interval),
        number(row.speedup_hf),
        lossless_cell(row, reference),
    ]


def detail_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of the second table of the written reports: totals of the main table, and
    predictions if there are any.
    """
    headers = ["prompts", "method", "tree", "n", "new tokens", "prefill s", "decode s", "steps", "ms/step"]
    headers += ["speedup with prefill", "steps accepting at least 1, 2, ... drafts"]
    cells = [
        [
            group_name(row),
            row.method,
            row.tree or DASH,
            str(row.prompts) if row.turns in (None, row.prompts) else f"{row.prompts} ({row.turns} turns)",
            str(row.new_tokens),
            number(row.prefill_seconds),
            number(row.decode_seconds),
            str(row.steps),
            number(row.step_milliseconds),
            number(row.speedup_with_prefill),
            " ".join(number(share) for share in row.acceptance_by_step) or DASH,
        ]
        for row in report.rows
    ]
    added_headers, added_cells = predicted_cells(report.rows)
    cells = [[*line, *added] for line, added in zip(cells, added_cells, strict=True)]
    return teacher_column(report.rows, [*headers, *added_headers], cells)


def bench_tables(report: BenchReport) -> Group:
    """Return the main tables for the terminal, one for each teacher and data set, at most 80 columns wide: headers on
    two lines, accepted lengths without their interval. Categories, predictions and pipelines follow.
    """
    from rich.console import Group
    from rich.text import Text

    drawn = [table for part in by_teacher(report) for table in _teacher_tables(part)]
    return Group(*drawn, *map(Text, predicted_lines(report)), *pipeline_tables(report))


def _teacher_tables(report: BenchReport) -> list[Table]:
    """Return a teacher's main tables and its categories; titles name the teacher if the rows do."""
    reference = report.settings.get("reference")
    owner = f"teacher {report.rows[0].teacher}" if report.rows and report.rows[0].teacher else ""
    datasets = list(dict.fromkeys(row.dataset for row in report.rows))
    drawn = []
    for dataset in datasets:
        rows = [row for row in report.rows if (row.dataset, row.category) == (dataset, "all")]
        cells = [_main_cells(replace(row, accepted_length_interval=None), reference) for row in rows]
        table = rich_table([header.replace(" ", "\n", 1) for header in BENCH_HEADERS], cells, left=1)
        name = dataset if len(datasets) > 1 else ""
        drawn.append(_titled(table, owner, f"data set {name}" if owner and name else name))
    headers, cells = category_cells(report)
    if cells:
        drawn.append(_titled(rich_table(headers, cells, left=1), owner, "speedup over ar (accepted length)"))
    return drawn


def _titled(table: Table, *parts: str) -> Table:
    """Return the table with the non-empty `parts` as its title."""
    title = ", ".join(part for part in parts if part)
    if title:
        table.title, table.title_justify = literal(title), "left"
    return table


def category_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of a teacher's categories: prompts, then `speedup (accepted length)` of each drafting
    method.
    """
    rows = [row for row in report.rows if row.category != "all"]
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name not in UNDRAFTED]
    by_method = {(group_name(row), row.method): row for row in rows}
    cells = []
    for group in dict.fromkeys(group_name(row) for row in rows):
        drafting = [by_method[group, method] for method in methods]
        prompts = next(row.prompts for row in rows if group_name(row) == group)
        speedups = [f"{number(row.speedup)} ({number(row.accepted_length)})" for row in drafting]
        cells.append([group, str(prompts), *speedups])
    return ["", "prompts", *methods], cells if methods else []


def eval_cells(report: EvalReport) -> Cells:
    """Return cells under `eval_headers`."""
    return [
        [str(item.step), number(item.top1, 3), number(item.top5, 3), number(item.kl, 3), str(item.anchors)]
        for item in report.steps
    ]


def eval_headers(report: EvalReport) -> list[str]:
    """Return EVAL_HEADERS; the rows of early exits are exits, by loop, not draft steps."""
    return ["exit" if report.pipeline else EVAL_HEADERS[0], *EVAL_HEADERS[1:]]


def eval_table(report: EvalReport) -> Table:
    """Return the table of draft quality by step for the terminal."""
    return rich_table(eval_headers(report), eval_cells(report))


def settings_line(report: BenchReport) -> str:
    """Return the settings in one sentence."""
    settings, parts = report.settings, by_teacher(report)
    temperature = settings.get("temperature", 0.0)
    how = "greedy" if not temperature else f"temperature {temperature:g}, top-p {settings.get('top_p', 1.0):g}"
    skipped = f" ({report.skipped_long} longer than the context skipped)" if report.skipped_long else ""
    if report.left_out_trained:
        skipped += f" ({report.left_out_trained} left out: a predictor was trained on them)"
    repeats = settings.get("repeats")
    taken = "measured once" if repeats == 1 else f"medians over {repeats} repeats"
    taken += f", {settings['interrupted']}" if settings.get("interrupted") else ""
    names = [
        f"{part.teacher.get('name')} ({part.teacher.get('dtype')}, {part.teacher.get('device')})" for part in parts
    ]
    counts = [str(count) for count in (settings.get("prompts_by_teacher") or {"": settings.get("prompts")}).values()]
    same = len(set(counts)) == 1
    prompts = f"{counts[0] if same else ' and '.join(counts)} prompts{' each' if same and len(parts) > 1 else ''}"
    prompts += _turns(settings)
    return (
        f"{'teachers' if len(parts) > 1 else 'teacher'} {' and '.join(names)}, "
        f"{prompts}{skipped}, {how}, up to {settings.get('max_new_tokens')} new tokens, "
        f"batch size {settings.get('batch_size')}, {taken}{NO_STEP if _no_step(report) else ''}"
    )


def _turns(settings: dict[str, Any]) -> str:
    """Return the turns that were asked, where conversations have several; reports of older versions do not say."""
    asked = list((settings.get("turns_by_teacher") or {"": settings.get("turns_asked")}).values())
    prompts = list((settings.get("prompts_by_teacher") or {"": settings.get("prompts")}).values())
    text = ""
    if settings.get("turns") == "first":
        text = ", first turns only"
    elif asked != prompts and None not in asked:
        text = f", {' and '.join(map(str, dict.fromkeys(asked)))} turns"
    missed = settings.get("turns_not_asked")
    return f"{text} ({missed} more do not fit the context or the chat template)" if missed else text


def _no_step(report: BenchReport) -> bool:
    return bool(report.rows) and not any(row.steps for row in report.rows)


def reading_notes(report: BenchReport) -> list[str]:
    """Return the definitions of the columns, for the written reports."""
    warmup = report.settings.get("warmup")
    times = "once" if warmup == 1 else f"{warmup} times"
    return [
        "Accepted length: tokens emitted per decoding step, bonus token included; 1 for autoregressive decoding.",
        "Speedup: pooled decode seconds per token, the baseline's over the method's. Prefill and the first token "
        "(which prefill gives) do not count.",
        "Brackets: 95% bootstrap interval over prompts (speedup: over batches, if the batch size is above 1).",
        "ar: autoregressive decoding in the same engine. hf: transformers' own generate.",
        "Speedup with prefill, as defined by Spec-Bench: mean over prompts of tokens per second of wall time, over "
        "that of ar.",
        *(
            [
                "Turns: each method answers a conversation's user turns in order, after its own earlier answers; a "
                "prompt sums its turns. Outputs are compared up to the first turn that differs, which is part of the "
                "later turns' prompts."
            ]
            if any(row.turns not in (None, row.prompts) for row in report.rows)
            else []
        ),
        f"Before measuring, each method decoded the longest batch {times}, uncounted; methods then took turns within "
        "each batch.",
        *([f"{TEACHERS_NOTE}."] if report.teachers else []),
        *([predicted.NOTE] if any(row.predicted for row in report.rows) else []),
        *(NOTES if pipeline_rows(report.rows) else ()),
    ]


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


def bench_markdown(report: BenchReport, figures: Sequence[str] = ()) -> str:
    """Return bench.md: tables, definitions, environment and command line. `figures`: names of PNGs in its folder."""
    note, predictions = lossless_note(report), predicted_lines(report)
    parts = [
        "# firp bench\n",
        settings_line(report) + ".\n",
        *(f"{line}.\n" for line in preset_lines(report)),
        markdown_table(*bench_cells(report)),
        *(["\n".join(f"- {line}" for line in predictions) + "\n"] if predictions else []),
        *([note + ".\n"] if note else []),
        *(f"![{name}]({name}.png)\n" for name in figures if name != FIGURE),
        *pipeline_markdown(report, figures),
        "## Details\n",
        markdown_table(*detail_cells(report)),
        *closing_markdown(reading_notes(report), report.environment),
    ]
    return "\n".join(parts)


def bench_csv(report: BenchReport) -> str:
    """Return bench.csv: one line per row with every field; intervals as two columns, lists joined by spaces. There are
    `pipeline_` and `predicted_` columns if a row has them, and a leading `teacher` if there are several.
    """
    stream = io.StringIO()
    lines = [_flat(row) for row in report.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _flat(row: BenchRow) -> dict[str, Any]:
    flat: dict[str, Any] = {"teacher": row.teacher} if row.teacher else {}
    for item in fields(BenchRow):
        value = getattr(row, item.name)
        if item.name == "teacher":
            continue
        if item.name.endswith("_interval"):
            low, high = value or ("", "")
            flat[item.name.replace("_interval", "_low")], flat[item.name.replace("_interval", "_high")] = low, high
        elif item.name in ("lossless", "lossless_ar"):
            if value is not None:
                flat[f"{item.name}_compared"], flat[f"{item.name}_identical"] = value.compared, value.identical
        elif item.name == "predicted":
            flat.update({f"predicted_{name}": _csv_value(part) for name, part in vars(value).items()} if value else {})
        elif item.name == "pipeline":
            flat.update(_flat_pipeline(value) if value else {})
        else:
            flat[item.name] = _csv_value(value)
    return flat


def _flat_pipeline(pipeline: PipelineReport) -> dict[str, Any]:
    """Return all fields but the occupancy, which is as long as the run."""
    flat: dict[str, Any] = {}
    for item in fields(PipelineReport):
        value = getattr(pipeline, item.name)
        if item.name == "cost":
            for part in fields(TickCost):
                flat[f"pipeline_cost_{part.name}"] = _csv_value(getattr(value, part.name, None))
        elif item.name != "occupancy":
            flat[f"pipeline_{item.name}"] = _csv_value(value)
    return flat


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join("nan" if entry is None else f"{entry:g}" for entry in value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
