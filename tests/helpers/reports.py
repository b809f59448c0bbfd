"""Invented results for tests of reports."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

from firp_cli.records import Accuracy, Execution, Sample, TokenPlace, Verified
from firp_cli.results import BenchReport, BenchRow, Lossless, PipelineReport, TickCost

DRAFTED = {
    "firp": (1.44, (1.38, 1.51), 1.86, 2.41, [0.62, 0.39, 0.25, 0.15], [0, 380, 230, 140, 100, 150]),
    "hidden_transfer": (1.31, (1.25, 1.36), 1.69, 2.22, [0.58, 0.33, 0.2, 0.11], [0, 420, 250, 130, 90, 110]),
    "medusa": (1.22, (1.17, 1.27), 1.58, 2.05, [0.52, 0.28, 0.16, 0.09], [0, 480, 240, 120, 70, 90]),
}

PNG = b"\x89PNG\r\n\x1a\n"


def bench_row(method: str, dataset: str = "arithmetic", category: str = "all") -> BenchRow:
    speedup, interval, over_hf, length, by_step, histogram = DRAFTED.get(
        method, (1.0, None, 1.29 if method == "ar" else 1.0, 1.0, [], [0, 2500])
    )
    return BenchRow(
        dataset=dataset,
        category=category,
        method=method,
        predictor=f"data/predictors/{method}" if method in DRAFTED else None,
        batch_size=1,
        temperature=0.0,
        prompts=40,
        new_tokens=2540,
        prefill_seconds=1.2,
        decode_seconds=10.0 / speedup,
        tokens_per_second=250.0 * speedup,
        speedup=speedup if method != "hf" else 0.78,
        speedup_interval=interval if method != "hf" else (0.75, 0.8),
        speedup_hf=over_hf,
        accepted_length=length,
        accepted_length_interval=(length - 0.06, length + 0.06) if length > 1 else None,
        acceptance_by_step=by_step,
        accepted_histogram=histogram,
        steps=sum(histogram),
        step_milliseconds=4.0,
        lossless=Lossless(0, 0) if method == "hf" else Lossless(40, 40),
        tree="dynamic:8" if method in DRAFTED else None,
        speedup_with_prefill=speedup * 0.97,
    )


def bench_report(groups: tuple[tuple[str, str], ...] = (("arithmetic", "all"),)) -> BenchReport:
    rows = [bench_row(method, *group) for group in groups for method in ("ar", "hf", *DRAFTED)]
    return BenchReport(
        environment={
            "argv": ["/somewhere/bin/firp", "bench", "--dataset", "a b"],
            "python": "3.11",
            "versions": {"torch": "2.13.0"},
            "cuda": None,
        },
        teacher={
            "name": "arithmetic",
            "dtype": "float32",
            "device": "cpu",
            "layers": 6,
            "hidden_size": 256,
            "parameters": 5200000,
            "fingerprint": "ab" * 8,
        },
        settings={
            "max_new_tokens": 128,
            "batch_size": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "repeats": 3,
            "warmup": 1,
            "reference": "hf",
            "prompts": 40,
        },
        rows=rows,
    )


def full_report(groups: tuple[tuple[str, str], ...] = (("arithmetic", "all"),), sampled: bool = False) -> BenchReport:
    """Return a report with every part that a bench can have: checks, accuracy, execution, parts of a step, samples,
    warnings, a method that cannot run, and names and texts that must be escaped.
    """
    report = bench_report(groups)
    for place, row in enumerate(report.rows):
        row.speedup_hf_interval = (0.95 * (row.speedup_hf or 1), 1.04 * (row.speedup_hf or 1))
        row.speedup_with_prefill_hf, row.speedup_with_prefill_hf_interval = 1.7, (1.62, 1.79)
        worst = TokenPlace(prompt=7, turn=1, position=31, emitted=100, best=200, value=0.5)
        row.verified = Verified(2540, 3 * (row.method == "medusa"), 1e-3, 2.5e-4 * (place + 1), worst=worst)
        if sampled:
            row.verified = Verified(2540, 0, 1e-9, None, 3e-6, worst, -0.81, 0.4, 0.62)
        row.accuracy = Accuracy(33, 40, (0.68, 0.91))
        row.execution = Execution("lean, compiled kernels", "sdpa", "not captured: no CUDA device", 0)
        row.parts = {"draft": 0.6 * (row.method in DRAFTED), "forward": 2.9, "accept": 0.3, "cache": 0.2}
    reason = "the <teacher> has no exit_layer & no head for it"
    missing = replace(bench_row("early-exit:3", *groups[0]), reason=reason, lossless=Lossless())
    odd = replace(bench_row("medusa", *groups[0]), method="assisted:HuggingFaceTB/SmolLM2-135M_Instruct $2 & 100%")
    report.rows[len(DRAFTED) + 2 : len(DRAFTED) + 2] = [missing, odd]
    report.warnings = ["ar drifted by 6% between its first and last repeat", "clocks <were> not fixed"]
    pieces = [("The", 1), (" shells cost", 3), ("\n\n  12 * 7 =", 5), (" <b>84</b>\x1b", 8), ("\n", 1), (".", 2)]
    plain = [(part, 1) for part in ["The", " shells", " cost", "\n\n  12", " *", " 7", " =", " <b>", "84", "</b>"]]
    for prompt, asked in enumerate(("How much do 7 shells cost?\n\tEach: 12", "<script>alert('&')</script>")):
        shown = (("ar", plain), ("firp", pieces))
        report.samples += [Sample(name, "arithmetic", "all", prompt, asked, text) for name, text in shown]
    report.environment |= {"driver": "570.1", "clocks": [{"sm_mhz": 1980, "memory_mhz": 2619}], "none": []}
    report.settings["temperature"] = 1.0 if sampled else 0.0
    return report


def speed_row(method: str = "speed", dataset: str = "arithmetic", shared: bool = True, cost: bool = True) -> BenchRow:
    row = replace(bench_row("ar", dataset), method=method, speedup=2.04, speedup_interval=(1.97, 2.11), speedup_hf=2.6)
    row.steps, row.step_milliseconds, row.decode_seconds, row.tokens_per_second = 3472, 1.4, 4.9, 510.0
    row.accepted_length, row.accepted_length_interval, row.accepted_histogram = 2.88, (2.8, 2.96), []
    return replace(row, pipeline=pipeline_report(shared, cost))


def speed_report(*rows: BenchRow) -> BenchReport:
    """Return a report of autoregressive decoding and SPEED, without draft trees."""
    report = bench_report()
    report.rows = [bench_row("ar"), *(rows or [speed_row()])]
    return report


class Page(HTMLParser):
    """Parser that collects figures, ids, links and texts, and fails on tags that are not closed, on ids that are there
    twice, and on anything that a browser would fetch.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[str] = []  # labels
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        references = {link[1:] for link in self.links} | set(re.findall(r"url\(#([^)]*)\)", text))
        assert all(link.startswith("#") for link in self.links) and references == set(self.ids)
        assert not re.search(r"https?:|@import|url\((?!#)|<script|<link|<img", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "svg":
            self.figures.append(values["aria-label"] or "")
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pipeline_report(shared: bool = True, cost: bool = True) -> PipelineReport:
    """Return statistics over 4 loops: 0.72 tokens per tick at 1.33 loops per tick, so 0.72 x 4 / 1.33 = 2.17."""
    occupancy = [1.0, 1.9, 2.7, 3.4, *(3.1 + 0.4 * math.sin(tick / 3) for tick in range(90))]
    return PipelineReport(
        loops=4,
        exits=[1, 2, 3],
        shared=shared,
        ranks=1,
        ticks=3472,
        tokens=2500,
        plain_tokens=0,
        tokens_per_tick=0.72,
        idle=0.28,
        flushes=310,
        flushed=0.19,
        corrected=0.12,
        exit_accuracy=[0.81, 0.93, 0.97],
        occupancy=occupancy,
        cost=TickCost(256, 2.32, 6.98, 1.745, 1.95, 0.21, 0.15, [1.6, 1.7, 1.8, 1.95]) if cost else None,
        predicted_speedup=2.17 if cost else None,
    )
