"""Presets of `firp bench`: published definitions of benches. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from firp_cli.assets import nearest
from firp_cli.data.known_sets import KNOWN, SPEED_BENCH_TERMS
from firp_cli.errors import UsageError

TEMPLATE = "prompts are rendered by the teacher's chat template"
TOKENS = "tokens after the end of an answer do not count, neither as new tokens nor in the last step"
QUALITATIVE_PROMPTS, THROUGHPUT_PROMPTS = 880, 1536  # of SPEED-Bench's configurations


@dataclass(frozen=True)
class Preset:
    """Published definition of a bench.

    Attributes:
        options: values of `firp bench`'s options that it sets; `warmup` is no option.
        prompts: number of questions, all data sets together. definition: of its authors, in a line.
        departures: what is measured differently here.
    """

    name: str
    options: Mapping[str, Any]
    prompts: int
    definition: str
    departures: tuple[str, ...]


# as on the command line, where these options may have several values
_COMMON: dict[str, Any] = {"batch_size": "1", "temperature": "0", "turns": "all", "split": "test"}

PRESETS: dict[str, Preset] = {
    item.name: item
    for item in (
        Preset(
            "spec-bench",
            {**_COMMON, "dataset": "spec_bench", "limit": 480, "max_new_tokens": "1024", "warmup": 3},
            480,
            "480 questions, all turns, up to 1,024 new tokens, batch size 1, greedy, three warm-ups; speedup: mean "
            "over questions of new tokens per second of wall time, prefill included, over that of transformers' "
            "generate",
            (
                f"{TEMPLATE} (Spec-Bench: FastChat's for the model; --chat-template vicuna has that of Vicuna)",
                "the warm-up decodes the question with the longest prompt (Spec-Bench: its first one)",
                TOKENS,
                "the median of the repeats counts (Spec-Bench: the mean of three runs)",
            ),
        ),
        Preset(
            "speed-bench",
            {**_COMMON, "dataset": "speed_bench", "limit": QUALITATIVE_PROMPTS, "max_new_tokens": "4096", "warmup": 1},
            QUALITATIVE_PROMPTS,
            "SPEED-Bench by category, 880 questions of qualitative or 1,536 of a throughput configuration, all turns, "
            f"up to 4,096 new tokens, as in NVIDIA's specdec_bench ({SPEED_BENCH_TERMS})",
            (
                "batch size 1, greedy (NVIDIA serves up to 32 requests at once; its figure is the accepted length by "
                "category)",
                TEMPLATE,
            ),
        ),
        Preset(
            "eagle",
            {
                **_COMMON,
                "dataset": "mt_bench,humaneval,gsm8k,alpaca,cnn_dm",
                "limit": 80,
                "max_new_tokens": "1024",
                "warmup": 3,
            },
            400,
            "MT-Bench, HumanEval, GSM8K, Alpaca and CNN/DM, 80 questions each, up to 1,024 new tokens, batch size 1, "
            "three warm-ups",
            (
                "the first 80 questions of each set's test split, of Alpaca of its only one (EAGLE ships 80 of its own "
                "choice)",
                f"{TEMPLATE} without a system message (EAGLE: FastChat's for Vicuna, a system message for Llama)",
                "the warm-up decodes the question with the longest prompt (EAGLE: the first one)",
                TOKENS,
            ),
        ),
    )
}


def preset_named(name: str) -> Preset:
    """Return the preset. Raises UsageError with the nearest name."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def apply_preset(
    name: str | None, values: Mapping[str, Any], given: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the values of the options under a preset, and what a report says about it; None without a preset.

    Args:
        values: of the options. given: names of those that the user gave: they win over the preset.

    Raises UsageError for an unknown preset, and without a data set.
    """
    if name is None:
        if values.get("dataset") is None:
            raise UsageError(
                f"name the data set with --dataset, or a published bench with --preset {'|'.join(PRESETS)}"
            )
        return dict(values), None
    preset = preset_named(name)
    chosen = {**values, **{key: value for key, value in preset.options.items() if key not in given}}
    options, prompts = dict(preset.options), preset.prompts
    if name == "speed-bench":
        options, prompts = _with_config(options, chosen["dataset"])
        chosen = {**chosen, **({} if "limit" in given else {"limit": options["limit"]})}
    changes = {key: str(chosen[key]) for key in options if key in given and not _same(chosen[key], options[key])}
    told = {"name": name, "definition": preset.definition, "departures": list(preset.departures), "changes": changes}
    return chosen, {**told, "prompts": prompts}


def _same(value: Any, other: Any) -> bool:
    """Return True for equal values of an option, which may be numbers written differently."""
    try:
        return float(value) == float(other)
    except (TypeError, ValueError):
        return str(value) == str(other)


def _with_config(options: dict[str, Any], dataset: str) -> tuple[dict[str, Any], int]:
    """Return the options and number of questions of the configuration of SPEED-Bench that is measured."""
    base, _, config = dataset.partition(":")
    if base != "speed_bench" or config not in ("", *KNOWN[base].configs):
        return options, QUALITATIVE_PROMPTS
    prompts = QUALITATIVE_PROMPTS if config in ("", "qualitative") else THROUGHPUT_PROMPTS
    return {**options, "dataset": dataset, "limit": prompts}, prompts
