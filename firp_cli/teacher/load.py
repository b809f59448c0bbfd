"""Loading of teachers: whole, spread over devices, or in part; and wrapping of models in memory.

A part is read from the checkpoint's safetensors files, parameter by parameter, into a model without memory. Of other
parameters only the values that the fingerprint samples are read.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from firp_cli.assets import embedded_teachers, nearest
from firp_cli.config import LoopedSection, TeacherConfig
from firp_cli.errors import TeacherError
from firp_cli.machine import default_device
from firp_cli.teacher.check import check_against_model, standard_attention
from firp_cli.teacher.library_layers import Cache, MissingLayer, Stack
from firp_cli.teacher.looped_llama import register
from firp_cli.teacher.masks import LayerMask
from firp_cli.teacher.source import known_teachers, locate, teacher_name
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.weight_files import LoadedWeights, WeightFiles, weights_fingerprint

PROBLEMS = (OSError, ValueError, ImportError, KeyError)  # raised by transformers for a model that cannot be loaded


def wrap_model(
    model: Any,
    tokenizer: Any = None,
    name: str = "in-memory",
    looped: LoopedSection | None = None,
    check: bool = True,
) -> Teacher:
    """Return a model in memory as a teacher.

    Args:
        looped: the layers that run several times, where the model's own class does not define them.
        check: compare the layers, run one by one, with the model's own forward.

    Raises TeacherError for an architecture that is not supported.
    """
    teacher = Teacher(model, tokenizer, name, looped)
    if check:
        check_against_model(teacher)
    teacher.standard_attention = standard_attention(teacher)
    return teacher


def load_teacher(config: TeacherConfig, device: torch.device | str | None = None, check: bool = True) -> Teacher:
    """Load a teacher by folder, name, hub id or GGUF file, on one device or, by its `device_map`, on several.

    Raises TeacherError when it cannot be loaded or is not supported.
    """
    register()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    located = locate(config)
    options = _options(located)
    if config.device_map is not None:
        options["device_map"] = config.device_map
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(located.model, dtype=dtype, **options)
        tokenizer = _tokenizer(config)
    except PROBLEMS as error:
        raise _unloadable(config, error) from error
    if config.device_map is None:
        nn.Module.to(model, torch.device(device or default_device()))
    teacher = wrap_model(model, tokenizer, teacher_name(config), config.looped, check)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        _spread(teacher, config, sorted(devices))
    return teacher


def _spread(teacher: Teacher, config: TeacherConfig, devices: list[str]) -> None:
    """Run each layer on its device, and record what is in memory. Raises TeacherError."""
    held, whole = teacher.weight_bytes, weight_bytes(teacher.model.parameters())
    note = f"spread over {', '.join(devices)}"
    teacher.loaded_weights = LoadedWeights(
        "device_map", teacher.num_layers, teacher.num_layers, held, whole - held, note
    )
    teacher.wrap_library(PlacedStack)
    if held < whole:  # layers on disk are read when they run
        located = locate(config)
        files = WeightFiles(located.model, located.revision, teacher.model.base_model_prefix)
        teacher.keep_fingerprint(files_fingerprint(teacher, files))


class PlacedStack:
    """The library's layers on the devices where the library placed them: rows move there and back."""

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
    """Load a teacher without its layers below `first` (L or more: without any layer) and, unless the head shares its
    matrix, without its embedding: enough to train on states of layer `first`. Its fingerprint is the whole teacher's.

    Loads the whole teacher where a part cannot serve (looped layers, several devices, weights under other names);
    `teacher.loaded_weights` records it. Raises TeacherError as `load_teacher`.
    """
    if first < 1 or config.device_map is not None:  # accelerate places only whole models
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
    """Reason why a teacher is not loaded in part."""


class PartialTeacher:
    """Teacher whose parameters have no memory yet, and the files that contain them.

    Raises PartError where the files lack a parameter or have it in another form, TeacherError where there is no model.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        tokenizer = _try_tokenizer(config)
        try:
            model = empty_model(config)
            self.teacher = Teacher(model, tokenizer, teacher_name(config), config.looped)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise PartError(f"its model cannot be made without memory: {error}") from error
        if self.teacher.looped is not None:
            raise PartError("every loop needs its layers")
        if getattr(model.config, "quantization_config", None) is not None:
            raise PartError("its weights are quantised")
        try:
            located = locate(config)
            self.files = WeightFiles(located.model, located.revision, model.base_model_prefix)
            self._check_names(model)
        except TeacherError as error:
            raise PartError(str(error).splitlines()[0]) from error
        self.whole_bytes = weight_bytes(model.parameters())
        self.teacher.keep_fingerprint(files_fingerprint(self.teacher, self.files))

    def drop_lower(self, first: int) -> None:
        """Drop the layers below `first`; `fill` then drops the embedding where nothing else shares its matrix."""
        count = self.teacher.num_layers
        self.teacher.release(range(min(first, count), count))

    def fill(self, device: torch.device, make: Callable[[str, nn.Parameter], nn.Parameter] | None = None) -> None:
        """Set the remaining parameters, one after the other. `make(name, empty)` returns each, in the shape and dtype
        of `empty`; None: the files' values.
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
        """Return a parameter's values, on the CPU, in the file's dtype."""
        key = self.files.key(name)
        assert key is not None
        return self.files.read(key)

    def finished(self, kind: str, held: int | None = None, ranks: int = 1) -> Teacher:
        """Return the teacher after comparing it with its model's own forward. Raises PartError where they differ."""
        teacher = self.teacher
        held = teacher.weight_bytes if held is None else held
        teacher.loaded_weights = LoadedWeights(
            kind, teacher.num_layers - teacher.first, teacher.num_layers, held, self.whole_bytes - held, ranks=ranks
        )
        try:
            check_against_model(teacher)
        except TeacherError as error:
            raise PartError(str(error).splitlines()[0]) from error
        teacher.standard_attention = standard_attention(teacher)
        return teacher

    def _check_names(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            key = self.files.key(name)
            if key is None or self.files.shape(key) != tuple(parameter.shape):
                raise PartError(f"its files do not contain {name} as the library does")
            self.files.dtype(key)
            if parameter.dtype != self.teacher.dtype:
                raise PartError(f"{name} has another dtype than the other parameters")
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if set(model.state_dict()) - parameters:
            raise PartError("it has buffers with values of their own")


def empty_model(config: TeacherConfig, **options: Any) -> Any:
    """Return the library's model in the dtype that it would be loaded in, all parameters without memory.

    Its config comes from the folder, the hub's cache or the hub. Raises TeacherError.
    """
    register()
    located = locate(config)
    try:
        model_config = AutoConfig.from_pretrained(located.model, **_options(located), **options)
        dtype = _dtype(config, model_config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
    except PROBLEMS as error:
        raise _unloadable(config, error) from error
    with contextlib.suppress(OSError):  # then the model's config has the tokens that end an answer
        model.generation_config = GenerationConfig.from_pretrained(located.model, revision=located.revision or "main")
    return model


def files_fingerprint(teacher: Teacher, files: WeightFiles) -> str:
    """Return a whole teacher's fingerprint from values in its files. Raises TeacherError for a missing parameter."""

    def sample(name: str, places: Tensor) -> Tensor:
        key = files.key(name)
        if key is None:
            raise TeacherError(f"{teacher.name}: its files do not contain {name} as the library does; load it whole")
        return files.sample(key, places).to(teacher.dtype)

    shapes = [(name, parameter.shape) for name, parameter in teacher.model.named_parameters()]
    return weights_fingerprint(shapes, sample, "" if teacher.looped is None else teacher.looped.model_dump_json())


def _dtype(config: TeacherConfig, model_config: Any) -> torch.dtype:
    """Return the dtype of the recipe, else of the model's config, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    text = model_config.get_text_config()
    return getattr(model_config, "dtype", None) or getattr(text, "dtype", None) or torch.float32


def _options(config: TeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _tokenizer(config: TeacherConfig) -> Any:
    located = locate(config)
    return AutoTokenizer.from_pretrained(located.model, **_options(located))


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
    """Compute the rotary frequencies, which no file contains. Raises PartError for buffers of another kind."""
    for name, module in model.named_modules():
        buffers = [buffer for buffer in module.buffers(recurse=False) if buffer.is_meta]
        if not buffers or isinstance(module, MissingLayer):
            continue
        if "RotaryEmbedding" not in type(module).__name__ or not hasattr(module, "original_inv_freq"):
            raise PartError(f"{name} has buffers that no file contains")
        module.to_empty(device=device)
        with torch.no_grad():
            model._init_weights(module)


def weight_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of parameters, also of those without memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
