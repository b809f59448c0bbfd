"""Analyses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from firp_cli.analyses.earlier_states import attention
from firp_cli.analyses.heads import heads
from firp_cli.analyses.row_costs import rows
from firp_cli.analyses.similarity import similarity
from firp_cli.analyses.subject import Subject
from firp_cli.analyses.transfer_layer import transfer_layer
from firp_cli.analyses.tree_size import tree_size
from firp_cli.assets import nearest
from firp_cli.collecting.collect_store import OpenProgress
from firp_cli.errors import CapacityError, MethodError, UsageError
from firp_cli.results import ANALYSES, Analysis

RUN: dict[str, Callable[[Subject], Analysis]] = {
    "similarity": similarity,
    "transfer-layer": transfer_layer,
    "attention": attention,
    "heads": heads,
    "rows": rows,
    "tree-size": tree_size,
}


def chosen_analyses(names: str | Sequence[str]) -> list[str]:
    """Return the named analyses in the order of ANALYSES. `names`: a list, or a text with commas; `all`: every one.

    Raises UsageError.
    """
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in (*ANALYSES, "all"):
            raise UsageError(f"no analysis {name!r}{nearest(name, (*ANALYSES, 'all'))}")
    return [name for name in ANALYSES if name in wanted or "all" in wanted]


def run_analyses(names: Sequence[str], subject: Subject, progress: OpenProgress) -> list[Analysis]:
    """Run analyses one after the other. One that the predictor does not have gets its reason."""
    done = []
    for name in names:
        with progress(f"analysis {name}") as bar:
            try:
                done.append(RUN[name](replace(subject, progress=bar)))
            except (MethodError, CapacityError) as error:
                done.append(Analysis(name, reason=str(error)))
    return done
