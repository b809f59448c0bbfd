"""Modules that the suite needs; this file imports none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "yaml",
    "jinja2",
    "matplotlib",
)
ON_CUDA = ("triton",)
FOR_GGUF = ("gguf", "accelerate")  # modules with which transformers reads such a file
KNOWN = Path(__file__).resolve().parents[2] / "data" / "teachers"  # NAME.yaml: teachers that are GGUF files


def missing(arguments: Sequence[str]) -> list[str]:
    """Return the modules that a run with these command-line arguments needs and that are not installed."""
    words = [word for argument in arguments for word in argument.split("=")]
    needed = [*NEEDED, *(() if "cpu" in words else ON_CUDA)]
    needed += FOR_GGUF if any(map(_is_gguf, words)) else ()
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _is_gguf(word: str) -> bool:
    return word.endswith(".gguf") or (KNOWN / f"{word}.yaml").is_file()
