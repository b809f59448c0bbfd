"""Registry of predictor kinds, and predictor folders on disk.

A folder contains `predictor.safetensors`, `config.json` (kind and its fields, teacher identity), and, written by
training, `recipe.yaml`, `training.json` and optionally `tree.json`. It contains no pickle.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from firp_cli.assets import embedded_predictors, nearest
from firp_cli.config import KINDS, LoopedSection, PredictorSection, TeacherConfig
from firp_cli.errors import FingerprintError, PredictorError, first_line
from firp_cli.files import read_json
from firp_cli.predictors.base import Predictor, TreePredictor
from firp_cli.predictors.firp import FirpPredictor
from firp_cli.predictors.hidden_transfer import HiddenTransferPredictor
from firp_cli.predictors.medusa import MedusaPredictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.source import has_own_code
from firp_cli.teacher.teacher import Teacher

FORMAT = 1
WEIGHTS = "predictor.safetensors"
TRAINED_PROMPTS = "trained_prompts"  # among the weights: `Predictor.trained_prompts`
DRAFT_TOKENS = "draft_tokens"  # among the weights: a bit for each token, 1 for those of `TreePredictor.draft_tokens`
Checked = TypeVar("Checked", bound=BaseModel)
PREDICTORS: dict[str, Callable[[Any, Teacher], Predictor]] = {
    "firp": FirpPredictor,
    "firp_plus": FirpPredictor,
    "hidden_transfer": HiddenTransferPredictor,
    "medusa": MedusaPredictor,
    "speed": SpeedPredictor,
}


def build_predictor(config: PredictorSection, teacher: Teacher) -> Predictor:
    """Return an uninitialised predictor of the configured kind, on the teacher's device. Raises PredictorError."""
    kind = getattr(config, "kind", type(config).__name__)
    if kind not in PREDICTORS:
        raise PredictorError(f"unknown predictor kind {kind}; known: {', '.join(PREDICTORS)}")
    return PREDICTORS[kind](config, teacher).to(teacher.device)


def predictor_folder(name: str) -> Path:
    """Return a predictor folder, given its path or the name of an embedded predictor. Raises PredictorError."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    embedded = embedded_predictors()
    if name in embedded:
        return embedded[name]
    if Path(name).is_dir():
        raise PredictorError(f"{name} is not a predictor folder: it has no config.json; `firp train` writes one")
    raise PredictorError(
        f"no predictor folder {name!r} and no embedded predictor of that name{nearest(name, embedded)}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a predictor folder. Raises PredictorError."""
    path = folder / "config.json"
    try:
        config = read_json(path)
        missing = {"format", "predictor", "teacher"} - set(config if isinstance(config, dict) else ())
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError) as error:
        raise PredictorError(f"{path} cannot be read ({error}): restore it, or train the predictor again") from None
    if config["format"] != FORMAT:
        raise PredictorError(
            f"{path}: format is {config['format']!r}, this firp reads {FORMAT}: use the firp that wrote it, or train "
            "the predictor again"
        )
    _checked(path, "", _Record, config)
    return config


def _section(folder: Path, values: dict[str, Any]) -> PredictorSection:
    """Return the predictor section of a folder's config.json. Raises PredictorError."""
    path, kind = folder / "config.json", values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise PredictorError(f"{path}: unknown predictor kind {kind!r}{nearest(str(kind), KINDS)}")
    return _checked(path, "predictor.", KINDS[kind], values)


def _checked(path: Path, section: str, kind: type[Checked], values: dict[str, Any]) -> Checked:
    """Return the values of a section of a file as their type. Raises PredictorError naming file and field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = f"{section}{_first_fault(error)}"
        raise PredictorError(f"{path}: {fault}: correct it, or train the predictor again") from None


class _Template(BaseModel):
    """Record of a chat template."""

    source: str
    fingerprint: str


class _Trained(BaseModel):
    """Fields that are read of the teacher's record in config.json."""

    name: str | None = None
    architecture: str | None = None
    fingerprint: str | None = None
    dtype: str = ""
    path: str | None = None
    looped: LoopedSection | None = None
    loading: TeacherConfig = TeacherConfig()
    chat_template: _Template | None = None

    @field_validator("chat_template", mode="before")
    @classmethod
    def _or_none(cls, value: Any) -> Any:
        return None if value == {} else value  # of a teacher without a tokenizer


class _Record(BaseModel):
    """Types of config.json. Other fields are for readers only."""

    predictor: dict[str, Any]
    teacher: _Trained


def _first_fault(error: ValidationError) -> str:
    """Return field and fault of a validation error; an unknown field first, which explains a missing one."""
    fault = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    field = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{field} is not known to this firp, a newer one may have written it"
    reason = fault["msg"].removeprefix("Value error, ").partition(" or instance of")[0]
    return f"{field}: {reason}" + ("" if fault["type"] == "missing" else f" (got {reprlib.repr(fault['input'])})")


def load_predictor(folder: Path, teacher: Teacher, force: bool = False) -> Predictor:
    """Load a trained predictor onto the teacher's device, in the teacher's dtype (float32 on a CPU).

    Raises FingerprintError if it was trained for another teacher, unless `force`; PredictorError if it is damaged.
    """
    config = read_config(folder)
    trained_for = config["teacher"]
    if not force and trained_for.get("fingerprint") != teacher.fingerprint:
        raise FingerprintError(
            f"{folder} was trained for {trained_for.get('name')} (weights {trained_for.get('fingerprint')}), not for "
            f"{teacher.name} (weights {teacher.fingerprint}); --force uses it anyway"
        )
    if not force and trained_for.get("loading", {}).get("trust_remote_code") and not has_own_code(teacher.model):
        raise FingerprintError(
            f"{folder} was trained with {trained_for.get('architecture')} of the teacher's repository, and the "
            f"teacher runs as the library's {type(teacher.model).__name__}; --force uses it anyway"
        )
    section = _section(folder, config["predictor"])
    try:
        predictor = build_predictor(section, teacher)
        read_weights(predictor, folder / WEIGHTS)
        _check_draft_tokens(predictor, teacher.vocab_size)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PredictorError(
            f"{folder / WEIGHTS} cannot be loaded: {first_line(error)}: restore it, or train the predictor again"
        ) from error
    dtype = torch.float32 if teacher.device.type == "cpu" else teacher.dtype
    return predictor.to(teacher.device, dtype).eval().requires_grad_(False)


def read_weights(predictor: Predictor, path: Path) -> None:
    """Read a predictor's weights, and what `kept_tensors` adds. Raises RuntimeError and what `load_file` does."""
    weights = load_file(path)
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RuntimeError(f"{name} has NaN or infinite values")
    tokens = weights.pop(DRAFT_TOKENS, None)
    predictor.trained_prompts = weights.pop(TRAINED_PROMPTS, None)
    predictor.load_state_dict(weights)
    if tokens is not None and (tokens.dtype != torch.uint8 or tokens.dim() != 1 or not tokens.any()):
        raise RuntimeError(f"{DRAFT_TOKENS} is no mask of tokens")
    if tokens is not None and isinstance(predictor, TreePredictor):
        chosen = torch.from_numpy(np.unpackbits(tokens.numpy())).nonzero()[:, 0]
        predictor.draft_tokens = chosen.to(next(predictor.parameters()).device)


def _check_draft_tokens(predictor: Predictor, vocabulary: int) -> None:
    """Raise RuntimeError where draft tokens are missing or lie outside of the vocabulary."""
    tokens = predictor.draft_tokens if isinstance(predictor, TreePredictor) else None
    if tokens is not None and int(tokens.max()) >= vocabulary:
        raise RuntimeError(f"{DRAFT_TOKENS} has token {int(tokens.max())}, the teacher has {vocabulary}")
    wanted = getattr(predictor.config, "draft_vocabulary", None)
    if tokens is None and wanted is not None and wanted < vocabulary:
        raise RuntimeError(f"{DRAFT_TOKENS} is missing, though draft_vocabulary is {wanted}")


def kept_tensors(predictor: Predictor) -> dict[str, torch.Tensor]:
    """Return what a folder's weights contain beside the parameters."""
    kept = {} if predictor.trained_prompts is None else {TRAINED_PROMPTS: predictor.trained_prompts}
    tokens = predictor.draft_tokens if isinstance(predictor, TreePredictor) else None
    if tokens is None:
        return kept
    bits = np.zeros(int(tokens.max()) + 1, dtype=bool)
    bits[tokens.cpu().numpy()] = True
    return {**kept, DRAFT_TOKENS: torch.from_numpy(np.packbits(bits))}


def save_predictor(predictor: Predictor, folder: Path, teacher: Teacher, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and config.json. The caller adds recipe and provenance, and makes the write atomic."""
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in predictor.state_dict().items()}
    write_predictor(weights | kept_tensors(predictor), predictor.config, folder, teacher_record(teacher, folder))


def trained_store(folder: Path) -> dict[str, Any]:
    """Return the record of the store that the predictor in `folder` was trained on; empty where it has none.

    Raises PredictorError for a training.json that cannot be read.
    """
    record = folder / "training.json"
    if not record.is_file():
        return {}
    try:
        store = dict(read_json(record).get("store") or {})
        return store | {"settings": dict(store.get("settings") or {})}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PredictorError(f"{record} cannot be read ({first_line(error)}): restore it, or remove it") from None


def teacher_record(teacher: Teacher, folder: Path) -> dict[str, Any]:
    """Return what a predictor in `folder` remembers of its teacher. A path is relative to the predictor's folder."""
    path = teacher.origin.path if teacher.origin else None
    return teacher.describe() | ({"path": os.path.relpath(path, folder.resolve())} if path else {})


def write_predictor(
    weights: dict[str, torch.Tensor], config: PredictorSection, folder: Path, teacher: dict[str, Any]
) -> None:
    """Write a predictor folder's `predictor.safetensors` and `config.json` from CPU tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # `save_file` makes it private, but colleagues read predictors too
    values = {"format": FORMAT, "predictor": config.model_dump(), "teacher": teacher}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
