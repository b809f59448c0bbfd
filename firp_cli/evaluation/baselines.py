"""Baselines of a bench: methods without a trained predictor, by name, and the reasons why one cannot run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firp_cli.assets import nearest
from firp_cli.config import KINDS, TeacherConfig
from firp_cli.errors import TeacherError, UsageError, first_line
from firp_cli.evaluation.hf_generate import exits_early
from firp_cli.teacher.load import load_teacher, load_tokenizer
from firp_cli.teacher.source import gguf_path
from firp_cli.teacher.teacher import Teacher

NGRAMS = ("prompt-lookup", "suffix")
STATIC = "hf-static"
LIBRARY = ("hf", STATIC)  # methods of transformers; `assisted` and `early-exit` are too
DEFAULT = ("ar", "hf", *NGRAMS)
ONE_PROCESS = (*NGRAMS, STATIC, "assisted", "early-exit")  # do not run beside a pipeline of several ranks
ARGUMENTS = {"assisted": "MODEL", "early-exit": "LAYER"}
MEANINGS = {
    "assisted": "a folder, hub id, .gguf file or known name, as in assisted:smollm2-135m",
    "early-exit": "a number of layers, as in early-exit:4",
}


def baseline(name: str) -> str | None:
    """Return the baseline that a method's name stands for, without its argument; None for predictors."""
    kind = name.partition(":")[0]
    return kind if kind in ARGUMENTS or name in ("ar", *LIBRARY, *NGRAMS) else None


def argument(name: str) -> str:
    """Return what follows the colon of a method's name."""
    return name.partition(":")[2].strip()


def check_method(name: str, predictors: Sequence[str]) -> None:
    """Raise UsageError, with the nearest name, where `name` is no baseline, no predictor's and no kind of predictor."""
    kind, given = baseline(name), argument(name)
    if name in predictors or name in KINDS:
        return
    if kind is None:
        forms = [f"{known}:{what}" for known, what in ARGUMENTS.items()]
        known = [*DEFAULT, STATIC, *forms, *dict.fromkeys([*predictors, *KINDS])]
        raise UsageError(f"unknown method {name!r}{nearest(name, known)}")
    if kind in ARGUMENTS and not re.fullmatch(r"[+-]?[0-9]+" if kind == "early-exit" else ".+", given):
        raise UsageError(f"method {name!r} needs {MEANINGS[kind]}")


def check_assistant(model: str) -> None:
    """Raise UsageError where an assistant cannot be found. Loads its tokenizer, no weights."""
    config = TeacherConfig(model=model)
    try:
        if gguf_path(config) is None:
            load_tokenizer(config)
    except TeacherError as error:
        raise _not_found(model, error) from error


def load_assistant(model: str, teacher: Teacher) -> Teacher:
    """Load the assistant of `assisted:MODEL` in the teacher's precision, on its device. Raises UsageError."""
    config = TeacherConfig(model=model, dtype=_precision(teacher))
    try:
        return load_teacher(config, teacher.device, check=False)
    except TeacherError as error:
        raise _not_found(model, error) from error


def _precision(teacher: Teacher) -> Any:
    return str(teacher.dtype).removeprefix("torch.")


def _not_found(model: str, error: TeacherError) -> UsageError:
    """Return the error with a remedy for `--methods` in place of a teacher's; how to install a known one stays."""
    fault, last = first_line(error).partition("; give ")[0], str(error).splitlines()[-1]
    remedy = last if last.startswith("install it") else f"give assisted: {MEANINGS['assisted']}"
    return UsageError(f"assisted:{model}: {fault}\n{remedy}")


def library_reason(name: str, teacher: Teacher, batch_size: int) -> str | None:
    """Return the reason why a method of transformers cannot run; None where it can, as far as is known beforehand."""
    kind, model = baseline(name), teacher.model
    if not callable(getattr(model, "generate", None)):
        return f"{type(model).__name__} has no `generate`"
    if kind in ARGUMENTS and batch_size > 1:
        return f"transformers assists one prompt at a time: --batch-size 1, not {batch_size}"
    if kind == STATIC:
        return _static_reason(teacher)
    return _early_exit_reason(teacher, int(argument(name))) if kind == "early-exit" else None


def _static_reason(teacher: Teacher) -> str | None:
    held = getattr(teacher.model.config.get_text_config(), "num_hidden_layers", teacher.num_layers)
    if held < teacher.num_layers:
        return f"the static cache has {held} layers, the model's loops fill {teacher.num_layers}"
    return None


def _early_exit_reason(teacher: Teacher, layer: int) -> str | None:
    if teacher.looped is not None:
        return "the teacher's layers run several times: transformers has no early exit from its loops"
    if not 1 <= layer < teacher.num_layers:
        return f"drafts need 1 to {teacher.num_layers - 1} of the teacher's {teacher.num_layers} layers, not {layer}"
    try:
        early = exits_early(teacher, layer)
    except Exception as error:  # of any kind, as the model's own code
        return f"{type(teacher.model).__name__} has no early exit: {first_line(error)}"
    return None if early else f"{type(teacher.model).__name__} has no early exit: its code runs all of its layers"


def assistant_reason(teacher: Teacher, assistant: Teacher) -> str | None:
    """Return the reason why transformers cannot let a model draft for the teacher: another vocabulary. Tokens added to
    a vocabulary may have other texts.
    """
    sizes = [model.model.config.get_text_config().vocab_size for model in (teacher, assistant)]
    if sizes[0] != sizes[1]:
        return f"{assistant.name} has a vocabulary of {sizes[1]} tokens, the teacher one of {sizes[0]}"
    if teacher.tokenizer is None or assistant.tokenizer is None:
        return None
    own, other = (_vocabulary(model.tokenizer) for model in (teacher, assistant))
    differing = sum(other.get(number, text) != text for number, text in own.items())
    if differing:
        return f"{assistant.name} has another tokenizer than the teacher: {differing} of {len(own)} tokens differ"
    return None


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    added = set(tokenizer.get_added_vocab().values())
    return {number: text for text, number in tokenizer.get_vocab().items() if number not in added}


def missing_reason(kind: str, teacher: Teacher) -> str:
    """Return the reason why a kind of predictor that was named cannot run: there is none for the teacher."""
    if kind == "speed" and teacher.looped is None:
        return (
            "no speed predictor for this teacher, whose layers run once: speed is for looped teachers; name the folder "
            "of one that was trained with predictor.loops"
        )
    return f"no {kind} predictor for this teacher: name its folder"


def shown_names(names: Sequence[str]) -> dict[str, str]:
    """Return the methods' names in reports: of an assistant's absolute path the last part, where no other has it."""
    short = {}
    for name in names:
        path = Path(argument(name))
        short[name] = f"assisted:{path.name}" if baseline(name) == "assisted" and path.is_absolute() else name
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}
