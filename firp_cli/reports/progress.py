"""Progress on stderr: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0


@contextmanager
def console_progress(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield `progress(done, total)`; with total None only the count is shown."""
    if not sys.stderr.isatty():
        yield _line_progress(description)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)

        def progress(done: int, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total)

        yield progress


def _line_progress(description: str) -> Callable[[int, int | None], None]:
    began = last = time.monotonic()

    def progress(done: int, total: int | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            of = f"/{total}" if total else ""
            print(f"{description}: {done}{of} after {now - began:.0f} s", file=sys.stderr, flush=True)

    return progress
