"""Getting teachers: whole, spread over devices, or only the layers that a run goes through.

A part is filled into a model without memory, parameter by parameter, from the checkpoint's safetensors files: what is
not kept is never read, but for the few values that the fingerprint looks at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.assets import embedded_teachers, nearest
from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.machine import default_device
from firp_cli.teacher.attention import LayerMask
from firp_cli.teacher.library_layers import Cache, Stack
from firp_cli.teacher.looped_llama import register
from firp_cli.teacher.source import known_teachers, locate, teacher_name
from firp_cli.teacher.teacher import MissingLayer, Teacher
from firp_cli.teacher.weight_files import LoadedWeights, WeightFiles, weights_fingerprint

PROBLEMS = (OSError, ValueError, ImportError, KeyError)  # what the library raises for a model that cannot be had


def load_teacher(config: TeacherConfig, device: torch.device | str | None = None, check: bool = True) -> Teacher:
    """A teacher by folder, name, hub id or GGUF file, on one device or, by its `device_map`, on several.

    Raises TeacherError when it cannot be had or is not supported.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    register()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    found = locate(config)
    options = _options(found)
    if config.device_map is not None:
        options["device_map"] = config.device_map
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(found.model, dtype=dtype, **options)
        tokenizer = _tokenizer(config)
    except PROBLEMS as error:
        raise _unloadable(config, error) from error
    if config.device_map is None:
        nn.Module.to(model, torch.device(device or default_device()))
    teacher = Teacher(model, tokenizer, name=teacher_name(config), check=check, looped=config.looped)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        _spread(teacher, config, sorted(devices))
    return teacher


def _spread(teacher: Teacher, config: TeacherConfig, devices: list[str]) -> None:
    """Run layers where they lie, and say what is in memory. Raises TeacherError."""
    held, whole = teacher.weight_bytes, weight_bytes(teacher.model.parameters())
    note = f"spread over {', '.join(devices)}"
    teacher.loaded_weights = LoadedWeights(
        "device_map", teacher.num_layers, teacher.num_layers, held, whole - held, note
    )
    teacher.wrap_library(PlacedStack)
    if held < whole:  # what lies on the disk is read when it runs
        found = locate(config)
        files = WeightFiles(found.model, found.revision, teacher.model.base_model_prefix)
        teacher.keep_fingerprint(files_fingerprint(teacher, files))


class PlacedStack:
    """The library's layers wherever the library put them: rows go there and come back to where they were."""

    name = "placed"

    def __init__(self, library: Stack) -> None:
        self._library = library

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        return [part.to(hidden.device) for part in self._library.rotary(hidden, positions)]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._library.norm(hidden).to(hidden.device)

    def head(self, normed: Tensor) -> Tensor:
        return self._library.head(normed).to(normed.device)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        return self._library.layer(index, hidden, rotary, positions, mask, cache).to(hidden.device)


def load_upper(config: TeacherConfig, first: int, device: torch.device | str | None = None) -> Teacher:
    """A teacher without its layers below `first` (L or more: without any) and, unless the head shares its matrix,
    without its embedding: enough to train on states of layer `first`. Its fingerprint is the whole teacher's.

    Loads the whole one where a part would not do (looped layers, spread devices, weights under other names);
    `teacher.loaded_weights` tells. Raises TeacherError as `load_teacher`.
    """
    if first < 1 or config.device_map is not None:  # accelerate places whole models only
        return load_teacher(config, device)
    try:
        teacher = PartialTeacher(config)
        teacher.drop_lower(first)
        teacher.fill(torch.device(device or default_device()))
        return teacher.finished("upper")
    except PartError as error:
        whole = load_teacher(config, device)
        whole.loaded_weights = LoadedWeights(
            "whole", whole.num_layers, whole.num_layers, whole.weight_bytes, note=str(error)
        )
        return whole


class PartError(Exception):
    """Why a teacher is not loaded in part."""


class PartialTeacher:
    """A teacher whose parameters have no memory yet, and the files that hold them.

    Raises PartError where the files do not give every parameter as it is; TeacherError where there is no model.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        tokenizer = _try_tokenizer(config)
        try:
            model = empty_model(config)
            self.teacher = Teacher(model, tokenizer, teacher_name(config), check=False, looped=config.looped)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise PartError(f"its model cannot be made without memory: {error}") from error
        if self.teacher.looped is not None:
            raise PartError("every loop needs its layers")
        if getattr(model.config, "quantization_config", None) is not None:
            raise PartError("its weights are quantised")
        try:
            found = locate(config)
            self.files = WeightFiles(found.model, found.revision, model.base_model_prefix)
            self._check_names(model)
        except TeacherError as error:
            raise PartError(str(error).splitlines()[0]) from error
        self.whole_bytes = weight_bytes(model.parameters())
        self.teacher.keep_fingerprint(files_fingerprint(self.teacher, self.files))

    def drop_lower(self, first: int) -> None:
        """Take the layers below `first` out, and the embedding where nothing else shares its matrix."""
        count = self.teacher.num_layers
        self.teacher.release(range(min(first, count), count))

    def fill(self, device: torch.device, make: Callable[[str, nn.Parameter], nn.Parameter] | None = None) -> None:
        """Put the parameters that are left in place, one after the other. `make(name, empty)` gives each, of the shape
        and dtype of `empty`; None: as the files have them.
        """
        model = self.teacher.model
        embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        needed = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        skipped = embedding - needed if self.teacher.first else set()
        if skipped:
            self.teacher.drop_embedding()
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append((module, leaf))
        for name, empty in list(model.named_parameters()):
            if id(empty) in skipped:
                continue
            made = make(name, empty) if make else nn.Parameter(self.read(name).to(device, empty.dtype), False)
            for module, leaf in owners[id(empty)]:
                setattr(module, leaf, made)
        _fill_buffers(model, device)

    def read(self, name: str) -> Tensor:
        """A parameter's values, on the CPU, in the file's dtype."""
        key = self.files.key(name)
        assert key is not None
        return self.files.read(key)

    def finished(self, kind: str, held: int | None = None, ranks: int = 1) -> Teacher:
        """The teacher, compared with its model's own forward. Raises PartError where they differ."""
        teacher = self.teacher
        held = teacher.weight_bytes if held is None else held
        teacher.loaded_weights = LoadedWeights(
            kind, teacher.num_layers - teacher.first, teacher.num_layers, held, self.whole_bytes - held, ranks=ranks
        )
        try:
            teacher.check()
        except TeacherError as error:
            raise PartError(str(error).splitlines()[0]) from error
        return teacher

    def _check_names(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            key = self.files.key(name)
            if key is None or self.files.shape(key) != tuple(parameter.shape):
                raise PartError(f"its files do not hold {name} as the library does")
            self.files.dtype(key)
            if parameter.dtype != self.teacher.dtype:
                raise PartError(f"{name} is of another dtype than the rest")
        held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if set(model.state_dict()) - held:
            raise PartError("it has buffers with values of their own")


def empty_model(config: TeacherConfig, **options: Any) -> Any:
    """The library's model in the dtype that it would be loaded in, all parameters without memory. Its config comes from
    the folder, the hub's cache or the hub. Raises TeacherError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    register()
    located = locate(config)
    try:
        found = AutoConfig.from_pretrained(located.model, **_options(located), **options)
        dtype = _dtype(config, found)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=config.trust_remote_code)
    except PROBLEMS as error:
        raise _unloadable(config, error) from error
    with contextlib.suppress(OSError):  # then the model's config says when it stops
        model.generation_config = GenerationConfig.from_pretrained(located.model, revision=located.revision or "main")
    return model


def files_fingerprint(teacher: Teacher, files: WeightFiles) -> str:
    """A whole teacher's fingerprint, of values that its files hold. Raises TeacherError where they lack a parameter."""

    def sample(name: str, places: Tensor) -> Tensor:
        key = files.key(name)
        if key is None:
            raise TeacherError(f"{teacher.name}: its files do not hold {name} as the library does; load it whole")
        return files.sample(key, places).to(teacher.dtype)

    shapes = [(name, parameter.shape) for name, parameter in teacher.model.named_parameters()]
    return weights_fingerprint(shapes, sample, "" if teacher.looped is None else teacher.looped.model_dump_json())


def _dtype(config: TeacherConfig, found: Any) -> torch.dtype:
    """As asked, as the model's config says, or that of its weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    text = found.get_text_config()
    return getattr(found, "dtype", None) or getattr(text, "dtype", None) or torch.float32


def _options(config: TeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _tokenizer(config: TeacherConfig) -> Any:
    from transformers import AutoTokenizer

    found = locate(config)
    return AutoTokenizer.from_pretrained(found.model, **_options(found))


def _try_tokenizer(config: TeacherConfig) -> Any:
    try:
        return _tokenizer(config)
    except PROBLEMS as error:
        raise _unloadable(config, error) from error


def _unloadable(config: TeacherConfig, error: Exception) -> TeacherError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "" if "/" in config.model else nearest(config.model, [*embedded_teachers(), *known_teachers()])
    return TeacherError(
        f"cannot load the teacher {config.model!r}{hint}: {first}\n"
        "give a local model folder, a .gguf file or a reachable hub id as teacher.model"
    )


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the rotary frequencies, which no file holds. Raises PartError for buffers of another kind."""
    for name, module in model.named_modules():
        buffers = [buffer for buffer in module.buffers(recurse=False) if buffer.is_meta]
        if not buffers or isinstance(module, MissingLayer):
            continue
        if "RotaryEmbedding" not in type(module).__name__ or not hasattr(module, "original_inv_freq"):
            raise PartError(f"{name} has buffers that no file holds")
        module.to_empty(device=device)
        with torch.no_grad():
            model._init_weights(module)


def weight_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters, also of those without memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
