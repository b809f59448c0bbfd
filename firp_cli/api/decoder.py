"""`firp_cli.load` and `Decoder`: text, chat messages or token ids in, generated text out."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from firp_cli.api.loading import LOG, LayerBackend, load_named_teacher, load_trees, share_teacher, warn_template
from firp_cli.chat_template import set_chat_template, template_fingerprint
from firp_cli.config import TeacherConfig, check_sampling
from firp_cli.data.chat import encode_prompt
from firp_cli.data.formats import Message
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.sequences import Label, OnTokens, check_prompts, check_stop, prompt_label
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.text_stream import OnText, TextStream
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import TeacherError, UsageError
from firp_cli.files import file_sha256
from firp_cli.machine import readable_bytes
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import WEIGHTS, load_predictor, predictor_folder, read_config
from firp_cli.provenance import fingerprint
from firp_cli.results import Generation, Progress, no_progress
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.source import TeacherOrigin
from firp_cli.teacher.teacher import Teacher

Prompt = str | Sequence[int] | Sequence[Message]  # a user message, token ids, or chat messages


def load(
    teacher: str | TeacherConfig | Teacher | torch.nn.Module | None = None,
    predictor: str | Path | None = None,
    *,
    tree: str | None = None,
    dtype: str = "auto",
    backend: str | LayerBackend = "lean",
    device: torch.device | str | None = None,
    guard: bool | None = None,
    force: bool = False,
    tokenizer: Any = None,
    options: EngineOptions | None = None,
    ranks: tuple[int, int] = (0, 1),
) -> Decoder:
    """Load a teacher and, optionally, a predictor.

    Args:
        teacher: model folder, hub id, .gguf file or known name; or a configuration of which the fields that are set
            replace what the predictor remembers; or a transformers model, which is frozen; or a `Teacher`, which is
            used as it is. None: the teacher that the predictor was trained for.
        predictor: predictor folder or embedded name. None: autoregressive decoding.
        tree: draft tree, such as "dynamic:8", or a tree.json. None: the predictor's own.
        dtype: the teacher's number format, for a teacher that is loaded by name.
        backend: implementation of the decoder layers, "lean" or "library".
        guard: fall back to autoregressive decoding while drafting is slower. None: on for greedy decoding and for
            SPEED, off when sampling from trees, so that a seed reproduces its text.
        force: accept a predictor that was made for another teacher.
        tokenizer: of a transformers model. None: the one of the folder or hub id that the model came from.
        options: how decoding steps run; the output does not depend on it.
        ranks: (rank, number of ranks) of this process where several share a SPEED pipeline.

    Example:
        >>> decoder = firp_cli.load("arithmetic", "firp")
        >>> decoder.generate("Tom has 9 pens and loses 2. How many pens are left?").text

    Raises TeacherError, PredictorError, FingerprintError and UsageError.
    """
    folder = predictor_folder(str(predictor)) if predictor is not None else None
    config = read_config(folder) if folder else {}
    kind = config["predictor"].get("kind") if config else None
    if tree and folder is None:
        raise UsageError("autoregressive decoding has no tree: leave --tree out, or name a predictor")
    if kind == "speed" and tree:
        raise UsageError(f"{folder} is a speed predictor, whose pipeline has no tree: leave --tree out")
    backend, sharing = LayerBackend.of(backend), kind == "speed" and ranks[1] > 1
    if isinstance(teacher, torch.nn.Module):
        trained_for = config["teacher"] if config else {}
        kept = {"chat_template", "template_options"} & set(trained_for.get("loading", {}))
        wanted = {"looped": trained_for.get("looped"), **{name: trained_for["loading"][name] for name in kept}}
        teacher = _wrap(teacher, tokenizer, TeacherConfig.model_validate(wanted), device)
        backend.apply(teacher)
        warn_template(teacher)
    elif not isinstance(teacher, Teacher):
        teacher = load_named_teacher(teacher, folder, dtype, "cpu" if sharing else device, backend)
    if folder is None:
        return Decoder(teacher, guard=guard, options=options, ranks=ranks)
    if sharing:
        share_teacher(teacher, folder, *ranks, backend)
    loaded = load_predictor(folder, teacher, force)
    return Decoder(teacher, loaded, folder, tree=tree, guard=guard, options=options, ranks=ranks)


def _wrap(model: Any, tokenizer: Any, config: TeacherConfig, device: torch.device | str | None) -> Teacher:
    """Make a teacher of a transformers model. Raises TeacherError where it has no tokenizer or is not supported."""
    from transformers import AutoTokenizer

    source = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise TeacherError(f"no tokenizer at {source!r}, where the model came from: give tokenizer=") from error
    if device is not None:
        model.to(device)
    name = Path(source).name if Path(source).exists() else source or "in-memory"
    tokenizer = copy.copy(tokenizer)  # the caller's keeps its own chat template
    chat_template = set_chat_template(tokenizer, config, name)
    teacher = wrap_model(model, tokenizer, name=name, looped=config.looped)
    teacher.origin = TeacherOrigin({}, chat_template)
    return teacher


class Decoder:
    """A teacher with an optional predictor. Made by `load`.

    The output is that of the teacher alone: greedy text is the same token for token, sampled text has the same
    distribution. CUDA graphs, K/V cache and the guard's measurements are kept between calls with the same sampling
    settings. Not safe for use from several threads.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor | None = None,
        folder: Path | None = None,
        *,
        tree: str | None = None,
        guard: bool | None = None,
        options: EngineOptions | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        self.teacher, self.predictor, self.folder = teacher, predictor, folder
        self._tree, self._guard, self._ranks = tree, guard, ranks
        self._options = options or EngineOptions()
        self._engine: Engine | PipelineEngine | None = None
        self._sampling: tuple[float, float] | None = None  # temperature and top_p of `_engine`
        if tree and predictor is not None and not Path(tree).is_file():
            parse_tree(tree, predictor.steps)  # raises on a misspelt tree now, not at the first prompt

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, which ends where the assistant starts to write.

        A string is a user message. Strings and chat messages go through the tokenizer's chat template; token ids are
        returned as they are. Raises UsageError, DatasetError.
        """
        items: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if items and all(isinstance(item, dict) for item in items):
            if self.teacher.tokenizer is None:
                raise UsageError(f"the teacher {self.teacher.name} has no tokenizer: give token ids")
            return encode_prompt(items, self.teacher.tokenizer)
        try:
            return [operator.index(item) for item in items]
        except TypeError:
            raise UsageError(
                "a prompt is a string, a list of token ids or a list of chat messages; generate_batch takes several"
            ) from None

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        stream: OnText | None = None,
    ) -> Generation:
        """Generate text after one prompt.

        Args:
            temperature: 0 is greedy. top_p: applied after temperature. seed: of sampling.
            stop: strings that end the text once it contains one of them.
            stream: called with each piece of text as soon as it is decided, and with True where the predictor drafted
                it. The pieces join to the text.

        Example:
            >>> decoder.generate("What is 17 plus 5?", 64, stream=lambda text, drafted: print(text, end=""))

        Raises CapacityError where the prompt and the new tokens exceed the teacher's context or the device's memory,
        UsageError, DatasetError.
        """
        ids = self.encode(prompt)
        check_stop(stop, self.teacher.tokenizer)
        check_prompts(self.teacher, [ids], max_new_tokens, lambda _: "the prompt")
        engine = self._prepare(temperature, top_p, seed)
        self._log_cache(engine, 1, len(ids), max_new_tokens)
        pieces = TextStream(self.teacher.tokenizer, stream) if stream else None
        on_tokens: OnTokens | None = pieces.on_tokens if pieces else None
        (generation,) = engine.generate([ids], max_new_tokens, stop, on_tokens, lambda _: "the prompt")
        if pieces:
            pieces.finish(generation.text)
        return generation

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        progress: Progress = no_progress,
        label: Label = prompt_label,
    ) -> list[Generation]:
        """Generate text after several prompts, `batch_size` at once; results are in the prompts' order. All prompts are
        checked before the first batch.

        After each batch `progress` is called with (prompts done, all prompts). The results of a batch share its times.
        `label` names a prompt in messages, by its number from 0. The other arguments and the errors are those of
        `generate`.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        encoded = [self.encode(prompt) for prompt in prompts]
        check_stop(stop, self.teacher.tokenizer)
        check_prompts(self.teacher, encoded, max_new_tokens, label)
        decode = self.session(
            max_new_tokens,
            batch=min(batch_size, len(encoded)),
            longest=max(map(len, encoded), default=0),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        results: list[Generation] = []
        for start in range(0, len(encoded), batch_size):
            batch = range(start, min(start + batch_size, len(encoded)))
            results += decode([encoded[number] for number in batch], [label(number) for number in batch])
            progress(len(results), len(encoded))
        return results

    def session(
        self,
        max_new_tokens: int,
        *,
        batch: int,
        longest: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
    ) -> Callable[[Sequence[list[int]], Sequence[str]], list[Generation]]:
        """Return a function that decodes prompts (token ids) as one batch, given their names for messages. Random
        numbers go on from batch to batch.

        `batch`, `longest`: most prompts of a batch, most tokens of a prompt, to log the memory. Raises UsageError.
        """
        engine = self._prepare(temperature, top_p, seed)
        self._log_cache(engine, batch, longest, max_new_tokens)

        def decode(prompts: Sequence[list[int]], names: Sequence[str]) -> list[Generation]:
            made = engine.generate(prompts, max_new_tokens, stop, label=names.__getitem__)
            for item in made:
                item.batch_size = len(made)
            return made

        return decode

    def describe(self, temperature: float = 0.0, top_p: float = 1.0) -> dict[str, Any]:
        """Return what drafts and texts depend on with this sampling, as JSON values: teacher, number format, chat
        template, method, and of a predictor its weights, trees and guard. Raises UsageError.
        """
        tokenizer = self.teacher.tokenizer
        made_by: dict[str, Any] = {
            "teacher": self.teacher.fingerprint,
            "dtype": str(self.teacher.dtype).removeprefix("torch."),
            "chat_template": template_fingerprint(tokenizer) if tokenizer else None,
            "method": self.predictor.kind if self.predictor else "ar",
        }
        if self.predictor is None or self.folder is None:
            return made_by
        made_by |= {
            "predictor": file_sha256(self.folder / WEIGHTS)[:16],
            "guard": self._guarded(temperature),
        }
        engine = self._prepare(temperature, top_p, 0)
        if isinstance(engine, Engine):
            shown = engine.tree.default if isinstance(engine.tree, TunedTrees) else engine.tree
            made_by["tree"] = f"{shown} ({fingerprint(repr(engine.tree))})"
        return made_by

    def _prepare(self, temperature: float, top_p: float, seed: int) -> Engine | PipelineEngine:
        """Return the engine of these settings, its random numbers set to `seed`. Raises UsageError."""
        check_sampling(temperature, top_p, seed)
        if self._engine is None or self._sampling != (temperature, top_p):
            self._engine = None  # frees its cache first
            trees = None
            if self.predictor is not None and self.folder is not None:
                trees = load_trees(self._tree, self.folder, self.predictor, self.teacher, temperature, self._options)
            self._engine = make_engine(
                self.teacher,
                self.predictor,
                trees,
                *self._ranks,
                guard=self._guarded(temperature),
                options=self._options,
                temperature=temperature,
                top_p=top_p,
            )
            self._sampling = temperature, top_p
        self._engine.sampler.generator.manual_seed(seed)
        return self._engine

    def _guarded(self, temperature: float) -> bool:
        """Return whether decoding falls back to plain steps while drafting is slower; pipelines do by default."""
        if self._guard is not None:
            return self._guard
        return temperature == 0 or (self.predictor is not None and bool(self.predictor.pipeline))

    def _log_cache(self, engine: Engine | PipelineEngine, batch: int, longest: int, max_new_tokens: int) -> None:
        """Log the size of the K/V cache before it is allocated."""
        size = readable_bytes(engine.cache_bytes(batch, longest, max_new_tokens))
        LOG.info(f"K/V cache for {batch} x {longest + max_new_tokens} positions: {size}")
