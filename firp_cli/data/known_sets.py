"""Known data sets: their sources on the hub, splits, local file names and terms of use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPEED_BENCH_TERMS = "NVIDIA Evaluation Dataset License: for evaluation, not for training"
SPEED_BENCH_FIELDS = {"sub_category", "src_id", "multiturn"}  # which no other set has together


@dataclass(frozen=True)
class KnownDataset:
    """Source of a named set. `splits`: our split names to the hub's.

    A set with a single split serves prompts from it for any requested split; several splits are never exchanged.
    """

    hub: str | None
    splits: dict[str, str]
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    files: tuple[str, ...] = ()  # other local file names of the only split
    source: str = ""  # origin of a file that is not on the hub
    configs: tuple[str, ...] = ()  # its configurations, after which a local file may be named (CONFIG.jsonl)
    terms: str = ""  # terms of use that forbid training


KNOWN: dict[str, KnownDataset] = {
    "arithmetic": KnownDataset(None, {"train": "train", "test": "test"}),
    "chat": KnownDataset(None, {"train": "train", "test": "test"}),
    "gsm8k": KnownDataset("openai/gsm8k", {"train": "train", "test": "test"}, config="main"),
    "humaneval": KnownDataset("openai/openai_humaneval", {"test": "test"}),
    "mbpp": KnownDataset(
        "google-research-datasets/mbpp",
        {"train": "train", "validation": "validation", "test": "test"},
        config="full",
    ),
    "math500": KnownDataset("HuggingFaceH4/MATH-500", {"test": "test"}),
    "aime24": KnownDataset("HuggingFaceH4/aime_2024", {"test": "train"}),
    "aime25": KnownDataset("math-ai/aime25", {"test": "test"}),
    # the authors' own repository needs a loading script, which `datasets` 4 refuses; v6: January to April 2025
    "livecodebench": KnownDataset("lighteval/code_generation_lite", {"test": "test"}, config="v6"),
    "self_instruct": KnownDataset(
        None,
        {"train": "train"},
        source="seed_tasks.jsonl and user_oriented_instructions.jsonl of https://github.com/yizhongw/self-instruct",
    ),
    "mt_bench": KnownDataset("HuggingFaceH4/mt_bench_prompts", {"test": "train"}, files=("question",)),
    "spec_bench": KnownDataset(
        None,
        {"test": "question"},
        files=("question",),
        source="data/spec_bench/question.jsonl of https://github.com/hemingkx/Spec-Bench",
    ),
    "speed_bench": KnownDataset(
        "nvidia/SPEED-Bench",
        {"test": "test"},
        config="qualitative",
        source="nemo_skills/dataset/speed-bench/prepare.py of https://github.com/NVIDIA-NeMo/Skills writes it",
        configs=("qualitative", *(f"throughput_{size}" for size in ("1k", "2k", "8k", "16k", "32k"))),
        terms=SPEED_BENCH_TERMS,
    ),
    "xsum": KnownDataset(
        "EdinburghNLP/xsum",
        {"train": "train", "validation": "validation", "test": "test"},
        revision="refs/convert/parquet",
    ),
    "cnn_dm": KnownDataset(
        "abisee/cnn_dailymail", {"train": "train", "validation": "validation", "test": "test"}, config="3.0.0"
    ),
    "alpaca": KnownDataset("tatsu-lab/alpaca", {"train": "train"}),
    "sharegpt": KnownDataset(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        {"train": "train"},
        data_files="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "ultrachat": KnownDataset("HuggingFaceH4/ultrachat_200k", {"train": "train_sft", "test": "test_sft"}),
}


def known_set(name: str) -> KnownDataset | None:
    """Return the known set of a name or of its hub id, with or without `:CONFIG`; None for others."""
    names = {name, name.rpartition(":")[0]}
    by_hub = (known for known in KNOWN.values() if known.hub and known.hub.lower() in {item.lower() for item in names})
    return next((KNOWN[item] for item in names if item in KNOWN), None) or next(by_hub, None)


def terms_of_row(row: Mapping[str, Any]) -> str:
    """Return the terms of use of the set that a row is from, by its fields; '' for most."""
    return SPEED_BENCH_TERMS if row.keys() >= SPEED_BENCH_FIELDS else ""
