"""Loading of teachers: whole, spread over devices, or in part; and wrapping of models in memory.

A part is read from the checkpoint's safetensors files, parameter by parameter, into a model without memory. Of other
parameters only the values that the fingerprint samples are read.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from firp_cli.assets import embedded_teachers, nearest, teacher_source
from firp_cli.chat_template import find_template, old_template, set_chat_template
from firp_cli.config import LoopedSection, TeacherConfig
from firp_cli.errors import FirpError, TeacherError, first_line
from firp_cli.machine import default_device
from firp_cli.teacher.check import check_against_model, inspect_attention
from firp_cli.teacher.library_layers import MissingLayer
from firp_cli.teacher.looped_llama import register
from firp_cli.teacher.source import gguf_path, known_teachers, locate, teacher_name, teacher_origin
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.weight_files import (
    LoadedWeights,
    WeightFiles,
    check_complete,
    damaged_weights,
    note_unused,
)

REMEDY = "give a local model folder, a .gguf file or a reachable hub id as teacher.model"


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
    inspect_attention(teacher)
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
    config, tokenizer, chat_template = _tokenizer(config, located)
    auto: Any = AutoModelForCausalLM  # its type hints lack the loading info
    with _loading(config):
        model, found = auto.from_pretrained(
            located.model, dtype=config.dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_complete(teacher_name(config), model, **found)
    if config.device_map is None:
        nn.Module.to(model, torch.device(device or default_device()))
    teacher = wrap_model(model, tokenizer, teacher_name(config), config.looped, check)
    teacher.origin = teacher_origin(config, model, chat_template)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        held, whole = teacher.weight_bytes, sum(parameter.nbytes for parameter in model.parameters())
        note = f"spread over {', '.join(sorted(devices))}"
        teacher.loaded_weights = replace(teacher.loaded_weights, kind="device_map", saved=whole - held, note=note)
        teacher.library.name = "placed"
        if held < whole:  # layers on disk are read when they run
            _fingerprint_files(teacher, WeightFiles(located.model, located.revision, model.base_model_prefix))
    return teacher


def load_upper(
    config: TeacherConfig, first: int, device: torch.device | str | None = None, embedding: bool = False
) -> Teacher:
    """Load a teacher without its layers below `first` (L or more: without any layer) and, unless `embedding` or the
    head shares its matrix, without its embedding: enough to train on states of layer `first`. Its fingerprint is the
    whole teacher's.

    Loads the whole teacher where a part cannot serve (looped layers, several devices, weights under other names);
    `teacher.loaded_weights` records it. Raises TeacherError as `load_teacher`.
    """
    if first < 1 or config.device_map is not None:  # accelerate places only whole models
        return load_teacher(config, device)
    try:
        teacher = PartialTeacher(config)
        teacher.drop_lower(first, embedding)
        teacher.fill(torch.device(device or default_device()))
        return teacher.finished("upper")
    except PartError as error:
        whole = load_teacher(config, device)
        whole.loaded_weights = replace(whole.loaded_weights, note=str(error))
        return whole


class PartError(Exception):
    """Reason why a teacher is not loaded in part."""


class PartialTeacher:
    """Teacher whose parameters have no memory yet, and the files that contain them.

    Raises PartError where the files lack a parameter or have it in another form, TeacherError where there is no model.
    """

    def __init__(self, config: TeacherConfig) -> None:
        register()
        self._drops_embedding = False
        located = locate(config)
        config, tokenizer, chat_template = _tokenizer(config, located)
        try:
            model = _empty_model(config, located)
            self.teacher = Teacher(model, tokenizer, teacher_name(config), config.looped)
            self.teacher.origin = teacher_origin(config, model, chat_template)
        except FirpError:
            raise
        except Exception as error:  # of any kind, as the model's own code; loading it whole may succeed
            raise PartError(f"its model cannot be made without memory: {error}") from error
        if self.teacher.looped is not None:
            raise PartError("every loop needs its layers")
        if getattr(model.config, "quantization_config", None) is not None:
            raise PartError("its weights are quantised")
        with _as_part_error():
            self.files = WeightFiles(located.model, located.revision, model.base_model_prefix)
            self._check_names(model)
        self.whole_bytes = sum(parameter.nbytes for parameter in model.parameters())
        _fingerprint_files(self.teacher, self.files)

    def drop_lower(self, first: int, embedding: bool = False) -> None:
        """Drop the layers below `first`. Unless `embedding` is needed, `fill` then drops it too where nothing else
        shares its matrix.
        """
        count = self.teacher.num_layers
        self.teacher.release(range(min(first, count), count))
        self._drops_embedding = bool(self.teacher.first) and not embedding

    def fill(self, device: torch.device, make: Callable[[str, nn.Parameter], nn.Parameter] | None = None) -> None:
        """Set the remaining parameters, one after the other. `make(name, empty)` returns each, in the shape and dtype
        of `empty`; None: the files' values.
        """
        model = self.teacher.model
        embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        needed = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        skipped = embedding - needed if self._drops_embedding else set()
        if skipped:
            self.teacher.drop_embedding()
        made: dict[int, nn.Parameter] = {}  # modules may share a parameter
        for name, empty in list(model.named_parameters(remove_duplicate=False)):
            if id(empty) in skipped:
                continue
            if id(empty) not in made:
                value = (
                    make(name, empty) if make else nn.Parameter(self.files.read(name).to(device, empty.dtype), False)
                )
                made[id(empty)] = value
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, made[id(empty)])
        _fill_buffers(model, device)

    def finished(self, kind: str, held: int | None = None, ranks: int = 1) -> Teacher:
        """Return the teacher after comparing it with its model's own forward. Raises PartError where they differ."""
        teacher = self.teacher
        held = teacher.weight_bytes if held is None else held
        teacher.loaded_weights = LoadedWeights(
            kind, teacher.num_layers - teacher.first, teacher.num_layers, held, self.whole_bytes - held, ranks=ranks
        )
        with _as_part_error():
            check_against_model(teacher)
        inspect_attention(teacher)
        return teacher

    def _check_names(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            self.files.check(name, parameter.shape)
            if parameter.dtype != self.teacher.dtype:
                raise PartError(f"{name} has another dtype than the other parameters")
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if set(model.state_dict()) - parameters:
            raise PartError("it has buffers with values of their own")
        ignored = "|".join(["rotary_emb\\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())])
        note_unused(self.teacher.name, [key for key in self.files.unused(parameters) if not re.search(ignored, key)])


def _empty_model(config: TeacherConfig, located: TeacherConfig) -> Any:
    """Return the library's model in the dtype that it would be loaded in, all parameters without memory.

    Its config comes from the folder, the hub's cache or the hub. Raises TeacherError where that cannot be read, and any
    error of the model's code.
    """
    with _loading(config):
        model_config = AutoConfig.from_pretrained(located.model, **_options(located))
        dtype = getattr(model_config, "dtype", None) or getattr(model_config.get_text_config(), "dtype", None)
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
        )
    with contextlib.suppress(OSError):  # then the model's config has the tokens that end an answer
        model.generation_config = GenerationConfig.from_pretrained(located.model, revision=located.revision or "main")
    return model


def _fingerprint_files(teacher: Teacher, files: WeightFiles) -> None:
    """Compute a whole teacher's fingerprint from values in its files. Raises TeacherError for a missing parameter."""
    teacher.compute_fingerprint(lambda name, places: files.sample(name, places).to(teacher.dtype))


def _options(located: TeacherConfig) -> dict[str, Any]:
    return {"revision": located.revision, "trust_remote_code": located.trust_remote_code}


def load_tokenizer(config: TeacherConfig) -> Any:
    """Load the tokenizer of a teacher in a folder or on the hub, without its weights. Raises TeacherError."""
    if gguf_path(config) is not None:
        raise TeacherError(f"the tokenizer of {config.model} is in its GGUF file")
    return _tokenizer(config, config.model_copy(update={"model": teacher_source(config.model)}))[1]


def _tokenizer(config: TeacherConfig, located: TeacherConfig) -> tuple[TeacherConfig, Any, dict[str, str]]:
    """Return the configuration with its template's text in place of a file, the tokenizer with that template, and the
    template's record. Raises TeacherError.

    Mistral's own tokenizer library, where it is installed, has no chat template and no character offsets: it is not
    used.
    """
    with _loading(config):  # a tokenizer's class depends on the model's: a fault is reported as the config's
        AutoConfig.from_pretrained(located.model, **_options(located))
        if (Path(located.model) / "generation_config.json").is_file():  # the library goes on without a damaged one
            GenerationConfig.from_pretrained(located.model)
    with _loading(config, "tokenizer of the ", "check its tokenizer.json, tokenizer_config.json, chat_template.jinja"):
        tokenizer = AutoTokenizer.from_pretrained(located.model, mistral_format=False, **_options(located))
    if config.chat_template is not None:  # read once: the record must have the text that is used
        source, text = find_template(config.chat_template)
        record = set_chat_template(tokenizer, config, teacher_name(config), (source, text))
        shipped = source == config.chat_template
        return config if shipped else config.model_copy(update={"chat_template": text}), tokenizer, record
    if not tokenizer.chat_template:
        tokenizer.chat_template = old_template(located.model)
    return config, tokenizer, set_chat_template(tokenizer, config, teacher_name(config))


@contextlib.contextmanager
def _loading(config: TeacherConfig, part: str = "", remedy: str = REMEDY) -> Iterator[None]:
    """Raise TeacherError where the library cannot load the teacher, or a `part` of it.

    On damaged files the libraries raise errors of any kind. A lack of memory is not one of them.
    """
    try:
        yield
    except (FirpError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = "" if "/" in config.model else nearest(config.model, [*embedded_teachers(), *known_teachers()])
        damaged = damaged_weights(Path(config.model)) if isinstance(error, SafetensorError) else None
        raise TeacherError(
            f"cannot load the {part}teacher {config.model!r}{hint}: {damaged or first_line(error)}\n{remedy}"
        ) from error


@contextlib.contextmanager
def _as_part_error() -> Iterator[None]:
    """Raise PartError for a TeacherError."""
    try:
        yield
    except TeacherError as error:
        raise PartError(first_line(error)) from error


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
