"""Teachers in GGUF files (llama.cpp's format): dequantised once, then loaded like any folder.

`unpack` dequantises a file into a folder of safetensors weights, config and tokenizer under the cache folder
(`FIRP_CACHE_DIR`), named by the file's sha256 and the dtype. The library reads weights and vocabulary. Header fields
that it ignores are read here or refused: head sizes, scaled rotary positions, sliding windows, end-of-turn tokens and
the rule that splits text before byte-pair merges. A file with tensors that its model does not use is refused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.errors import TeacherError, first_line
from firp_cli.files import cache_folder, file_sha256, write_json
from firp_cli.machine import readable_bytes
from firp_cli.provenance import fingerprint

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
FORMAT = 1  # version of unpacked folders; a folder of another version is unpacked again
RECORD = "gguf.json"  # written last: a folder without it is unfinished
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies (Llama 3.1 and later)
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp's names of the rules whose merges were learned on single digits
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")

log = logging.getLogger("firp")


def unpack(path: Path, dtype: torch.dtype) -> Path:
    """Return the folder with a GGUF file's weights as `dtype`, made unless the cache has it.

    Raises TeacherError: the `gguf` package is missing, the file is damaged, truncated or one of several parts, its
    architecture is not supported, or the disk is full.
    """
    name = str(dtype).removeprefix("torch.")
    digest = _sha256(path)
    folder = cache_folder() / "teachers" / f"{path.stem}-{digest[:16]}-{name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # of a machine's ranks the first unpacks and the others wait for it
            if not _whole(folder, digest):
                _unpack_into(folder, path, dtype, digest)
    except OSError as error:
        raise TeacherError(
            f"{path} cannot be unpacked into {folder.parent}: {error.strerror or error}\n"
            "set FIRP_CACHE_DIR to a folder on a disk with room for its weights"
        ) from error
    return folder


def read_config(path: Path) -> Any:
    """Return the library's config of a GGUF file's model. Raises TeacherError."""
    return _model_config(_Header(path))


class _Header:
    """Header of a file, its fields and tensor table, read by the `gguf` package.

    Raises TeacherError for files other than a supported decoder, whole and in one file.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise TeacherError(
                f"{path} is a GGUF file, which needs the package gguf: pip install 'firp[gguf]'"
            ) from None
        self.path = path
        with _reading(path):
            reader = GGUFReader(path)
            self._fields = reader.fields
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.architecture = str(self.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise TeacherError(
                f"{self.path}: GGUF architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}. Give the model's safetensors folder or hub id instead"
            )
        if self.get("split.count", 1) > 1:
            raise TeacherError(
                f"{self.path} is one of {self.get('split.count')} parts: join them with llama.cpp's "
                "`gguf-split --merge`"
            )
        if self.get("*.expert_count", 0):
            raise TeacherError(f"{self.path}: mixtures of experts are not supported from GGUF files")

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value; `*` in the key is the architecture."""
        field = self._fields.get(key.replace("*", getattr(self, "architecture", "")))
        return default if field is None else field.contents()


def _unpack_into(folder: Path, path: Path, dtype: torch.dtype, digest: str) -> None:
    header = _Header(path)
    config = _model_config(header)
    parameters = sum(math.prod(map(int, tensor.shape)) for tensor in header.tensors.values())
    needed, free = parameters * dtype.itemsize, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise TeacherError(
            f"{path} takes {readable_bytes(needed)} unpacked, {folder.parent} has {readable_bytes(free)} free\n"
            "set FIRP_CACHE_DIR to a folder on a larger disk"
        )
    log.info("unpacking %s into %s (once)", path.name, folder.parent)
    temporary = folder.with_name(f".{folder.name}.tmp")
    for stale in (temporary, folder):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        model = _load_model(header, config, dtype)
        model.generation_config.eos_token_id = _stop_tokens(header)
        model.save_pretrained(temporary, max_shard_size="4GB")
        _load_tokenizer(header).save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # `save_pretrained` makes weights private; a cache may be shared
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        write_json(temporary / RECORD, {"format": FORMAT, "file": path.name, "sha256": digest, "sizes": sizes})
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _whole(folder: Path, digest: str) -> bool:
    """Return True where a folder has all that was unpacked from the file with this sha256."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
        return record["format"] == FORMAT and record["sha256"] == digest and record["sizes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _model_config(header: _Header) -> Any:
    """Return the library's config, with the header's fields that it ignores."""
    from transformers import AutoConfig, LlamaConfig, MistralConfig

    with _reading(header.path):
        library_config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name)
    values = library_config.to_dict()
    for unused in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        values.pop(unused, None)
    head_size = header.get("*.attention.key_length") or header.get("*.rope.dimension_count")
    values["head_dim"] = int(head_size or values["hidden_size"] // values["num_attention_heads"])
    values["rope_parameters"] = _rope_parameters(header, values)
    kind: Any = type(library_config)
    if header.architecture in ("llama", "mistral"):
        window = header.get("*.attention.sliding_window")
        kind = MistralConfig if window else LlamaConfig
        values["model_type"] = kind.model_type
        if window:
            values["sliding_window"] = int(window)
        else:
            values.pop("sliding_window", None)
            values["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
    config = kind.from_dict(values)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    return config


def _rope_parameters(header: _Header, values: dict[str, Any]) -> dict[str, Any]:
    """Return the file's scaling of rotary positions. Raises TeacherError for a scaling that the library lacks."""
    base = float(header.get("*.rope.freq_base", 10000.0))
    kind = str(header.get("*.rope.scaling.type", "none"))
    factor = float(header.get("*.rope.scaling.factor", header.get("*.rope.scale_linear", 1.0)))
    default: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind == "yarn":
        original = int(header.get("*.rope.scaling.original_context_length", values["max_position_embeddings"]))
        return default | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise TeacherError(f"{header.path}: rotary positions scaled by {kind!r} are not supported from GGUF files")
    if ROPE_FACTORS in header.tensors:
        factors = torch.tensor(header.tensors[ROPE_FACTORS].data)
        return default | _llama3_scaling(header.path, factors, base, values["head_dim"])
    return default if factor == 1.0 else default | {"rope_type": "linear", "factor": factor}


def _llama3_scaling(path: Path, factors: Tensor, base: float, head_size: int) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling with these divisors (D/2,) of the rotary frequencies."""
    largest = factors.max().item()
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    wavelengths = 2 * math.pi * base ** (torch.arange(0, head_size, 2) / head_size)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    share = ((LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / largest + share)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise TeacherError(f"{path}: its rotary factors ({ROPE_FACTORS}) are not those of Llama 3.1's scaling")
    return {"rope_type": "llama3", "factor": largest, **LLAMA3_ROPE}


def _load_model(header: _Header, config: Any, dtype: torch.dtype) -> Any:
    """Return a model with the file's dequantised weights, in the form of one that was never quantised.

    Raises TeacherError where file and model differ in a tensor, or a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = header.path
    # tensors are named by the file's architecture, which is llama for Mistral
    renamed = header.architecture in ("llama", "mistral") and config.model_type != "llama"
    reading = LlamaConfig.from_dict(config.to_dict() | {"model_type": "llama"}) if renamed else config
    auto: Any = AutoModelForCausalLM  # its type hints lack the loading info
    with _reading(path):
        loaded, info = auto.from_pretrained(
            path.parent, gguf_file=path.name, config=reading, dtype=dtype, output_loading_info=True
        )
    weights = loaded.state_dict()
    parameters = {name for name, _ in loaded.named_parameters()}
    stored = set(header.tensors) - {ROPE_FACTORS}
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong or len(stored) != len(parameters):
        differ = (
            f"it lacks {', '.join(wrong[:3])}" if wrong else f"{len(stored)} tensors for {len(parameters)} parameters"
        )
        raise TeacherError(f"{path}: its tensors are not those of a {type(loaded).__name__}: {differ}")
    for name in parameters:
        if not torch.isfinite(weights[name]).all():
            raise TeacherError(f"{path} is damaged: {name} has NaN or infinite weights; fetch it again")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model


def _load_tokenizer(header: _Header) -> Any:
    """Return the file's tokenizer, which splits digits where its merges were learned so. Raises TeacherError."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with _reading(header.path):
        tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
    if header.get("tokenizer.ggml.model") == "gpt2" and header.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _stop_tokens(header: _Header) -> int | list[int] | None:
    """Return the ids that end an answer: of the sequence, and of a turn or message where the file has other ids."""
    fields = [header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(int(token) for token in fields if token is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _sha256(path: Path) -> str:
    """Return the file's sha256, cached by size and time of change: reading gigabytes at each load takes seconds."""
    try:
        status = path.stat()
        key = fingerprint([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino])
        stamp = cache_folder() / "teachers" / "sha256" / key
        if stamp.is_file():
            return stamp.read_text(encoding="ascii").strip()
        digest = file_sha256(path)
    except OSError as error:
        raise TeacherError(f"{path} cannot be read: {error.strerror or error}") from error
    with suppress(OSError):  # without it the next load reads the file again
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest + "\n", encoding="ascii")
    return digest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise TeacherError where a file cannot be read: the parsers raise any exception on a damaged one."""
    try:
        yield
    except Exception as error:
        raise TeacherError(
            f"{path} is damaged, truncated or no GGUF file ({first_line(error)}); fetch it again"
        ) from error
