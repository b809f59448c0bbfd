"""Rows of data sets on the Hugging Face hub, or in its cache on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from firp_cli.data.readers import Read, missing_config, missing_split, numbered
from firp_cli.errors import DatasetError, first_line
from firp_cli.machine import hub_disabled, hub_reachable

CONFIG_MISSING = re.compile(r"Config name is missing|BuilderConfig .* not found")
SPLIT_MISSING = re.compile(r"Unknown split|Bad split")


class UnreachableError(DatasetError):
    """Data set that no place has: neither this machine nor the hub or its cache."""


def read_hub(
    hub: str, split: str, options: dict[str, Any], config: str | None, part: bool, name: str
) -> Iterator[Read]:
    """Yield the rows of a split.

    Args:
        options: keyword arguments of `datasets.load_dataset`. config: configuration that the user named, or None.
        part: only the first rows are wanted: they are streamed, so that no large set is fetched whole.
        name: of the data set, for messages.

    Raises UnreachableError, and DatasetError that lists the configurations or splits.
    """
    import datasets

    datasets.disable_progress_bars()
    reachable = hub_reachable()
    chosen = {"streaming": True} if part and reachable else {}
    try:
        with _cache_only(not reachable):
            loaded = datasets.load_dataset(hub, split=split, **options, **chosen)
        yield from numbered(loaded)
    except DatasetError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, datasets.exceptions.DatasetsError) as error:
        text = str(error)
        named = re.findall(r"'([^']+)'", text[text.find("[") :]) if "[" in text else []
        if CONFIG_MISSING.search(text):
            raise missing_config(name, config, named) from None
        if SPLIT_MISSING.search(text):
            raise missing_split(name, split, named) from None
        offline = " (offline: HF_HUB_OFFLINE is set)" if hub_disabled() else "" if reachable else " (not reachable)"
        raise UnreachableError(f"hub or its cache as {hub!r}{offline}: {first_line(error)[:160]}") from error


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Let `datasets` look only into its cache: its requests to an unreachable hub take half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
