"""Teacher of the trained, tuned and benched predictors: one that the suite trains, or a real one; its prompts, and its
predictors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from firp_cli.config import TeacherConfig
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import KNOWN, load_prompts
from firp_cli.data.formats import Message
from firp_cli.decoding.tree_file import described, spec_of
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import load_predictor
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.teacher import Teacher
from suite.shapes import empty_model, sections
from suite.work import Shared

DEFAULT_TREE = "dynamic:8"
SEED = 17
TRAINING_SETS = ("gsm8k", "mbpp", "self_instruct", "chat")  # training splits, of the data sets that exist
TEST_SETS = ("gsm8k", "humaneval", "mt_bench")
PACKAGED = "chat"  # embedded: exists on any machine
DEPTH = 2 / 3  # share of the layers below the predictors of a real teacher; SmolLM2: layer 20 of 30
TEMPERATURES = (0.7, 1.0)  # temperatures of the passes over the prompts after the greedy one
SAVED = "predictors"  # folder in the scratch folder


class Subject(Protocol):
    """A teacher with its prompts.

    Attributes:
        question_tokens, answer_tokens: of a training prompt and of its answer, at most.
        tokens: tokens to answer at most; None: every prompt is answered once.
    """

    question_tokens: int
    answer_tokens: int
    tokens: int | None

    def teacher(self, dtype: torch.dtype | None = None) -> Teacher:
        """Return the teacher on lean layers, in the suite's dtype or with the same weights in another."""

    def asked(self) -> Iterator[list[Message]]:
        """Return training prompts in an order in which every section is a fair mix."""

    def tests(self) -> dict[str, list[list[Message]]]:
        """Return questions by source that nothing is trained on."""

    def sections(self, layers: int) -> dict[str, dict[str, Any]]:
        """Return settings of the predictors to train for a teacher of so many layers, by kind."""


def subject(shared: Shared) -> Subject:
    """Return the real teacher if one is given, else the trained one."""
    return Trained(shared) if shared.teacher is None else Real(shared)


def lean(teacher: Teacher) -> Teacher:
    """Put the teacher on lean layers; a teacher that computes in fp32 stays on the library's if they differ by more
    than rounding, since it is the reference. Raises RuntimeError.
    """
    reason = use_lean_layers(teacher)
    if reason and teacher.dtype != torch.float32:
        raise RuntimeError(reason)
    return teacher


class Trained:
    """Teacher that `trained.teacher` has trained."""

    tokens = None

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.question_tokens, self.answer_tokens = shared.sizes.question_tokens, shared.sizes.answer_tokens

    def teacher(self, dtype: torch.dtype | None = None) -> Teacher:
        found = self.shared.found
        with torch.inference_mode(False):
            model = empty_model(found["shape"], self.shared.device, dtype or self.shared.dtype)
            model.load_state_dict(found["state"])
            return lean(wrap_model(model, found["tokenizer"], name="trained on the spot"))

    def asked(self) -> Iterator[list[Message]]:
        corpus, most = self.shared.found["corpus"], self.shared.sizes.answers
        share = -(-most // len(corpus.conversations))
        for item in corpus.mixed(2 * share):
            yield item[:1]

    def tests(self) -> dict[str, list[list[Message]]]:
        return self.shared.found["corpus"].questions

    def sections(self, layers: int) -> dict[str, dict[str, Any]]:
        return sections(layers)


class Real:
    """Real teacher, and the data sets of the data folder."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.tokens = shared, shared.tokens
        self.question_tokens, self.answer_tokens = shared.sizes.real_question_tokens, shared.sizes.real_answer_tokens

    def teacher(self, dtype: torch.dtype | None = None) -> Teacher:
        held = self.shared.found.get("real teacher")
        if dtype is None and held is not None:
            return held
        own = self.shared.dtype
        config = TeacherConfig.model_validate({"model": self.shared.teacher, "dtype": str(own).removeprefix("torch.")})
        with torch.inference_mode(False):
            teacher = load_teacher(config, self.shared.device)
            _ = teacher.fingerprint  # computed from the weights as stored in the file
            if dtype not in (None, own):
                return lean(wrap_model(teacher.model.to(dtype), teacher.tokenizer, name=teacher.name))
            lean(teacher)
        if dtype is None:
            self.shared.found["real teacher"] = teacher
        return teacher

    def asked(self) -> Iterator[list[Message]]:
        found: list[list[Message]] = []
        for name in TRAINING_SETS:
            if name == PACKAGED or self._has(name, "train"):
                rows = load_prompts(name, self.shared.data_dir, split="train")
                random.Random(SEED).shuffle(rows)
                found += [row.messages for row in rows[: self.shared.sizes.real_prompts]]
        random.Random(SEED).shuffle(found)
        yield from found

    def tests(self) -> dict[str, list[list[Message]]]:
        names = [name for name in TEST_SETS if self._has(name, "test")] or [PACKAGED]
        found = {}
        for name in names:
            found[name] = [prompt.messages for prompt in load_prompts(name, self.shared.data_dir)]
            random.Random(SEED).shuffle(found[name])  # mix all categories
        return found

    def sections(self, layers: int) -> dict[str, dict[str, Any]]:
        steps = 4
        first = max(1, min(layers - 1, round(DEPTH * layers)))
        places = [min(layers - 1, first + step) for step in range(steps)]
        return {
            "firp": {"kind": "firp", "layer": first, "steps": steps},
            "firp_plus": {"kind": "firp_plus", "layer": first, "steps": 6, "coupling": {"form": "recurrent"}},
            "hidden_transfer": {"kind": "hidden_transfer", "layers": places},
            "medusa": {"kind": "medusa", "steps": steps, "own_head": False},
        }

    def _has(self, name: str, split: str) -> bool:
        stems = (split, *KNOWN[name].files)
        folder = Path(self.shared.data_dir or "/nowhere") / name
        return any((folder / f"{stem}.jsonl").is_file() for stem in stems)


def questions(shared: Shared, teacher: Teacher, most: int, skip: int = 0) -> list[BenchPrompt]:
    """Return test questions, the first of every source, then the second of every source, and so on, after the first
    `skip`; at most a number of each source. Those without room for an answer are left out.
    """
    room = teacher.max_positions - max(shared.sizes.bench_tokens, shared.sizes.new_tokens) - 1
    found = []
    for source, asked in subject(shared).tests().items():
        encoded = (encode_prompt(messages, teacher.tokenizer) for messages in asked[skip : skip + most])
        found.append([BenchPrompt(ids, source) for ids in encoded if len(ids) <= room])
    longest = max(map(len, found), default=0)
    return [source[number] for number in range(longest) for source in found if number < len(source)]


def predictors(shared: Shared, teacher: Teacher) -> dict[str, Predictor]:
    """Return the trained predictors by kind; in a process that did not train them, as they were saved."""
    held = shared.found.get("predictors")
    if held is None:
        held = shared.found["predictors"] = {
            kind: load_predictor(folder, teacher) for kind in shared.found["saved"] if (folder := saved(shared, kind))
        }
    return held


def saved(shared: Shared, kind: str) -> Path:
    """Return the folder of a trained predictor."""
    assert shared.scratch is not None
    return shared.scratch / SAVED / kind


def keep_tree(shared: Shared, kind: str, tree: TreeSpec) -> None:
    """Keep a tuned tree for later parts, unless it drafts nothing."""
    if tree.kind != "none":
        shared.found.setdefault("trees", {})[kind] = described(tree)


def tree_for(shared: Shared, predictor: Predictor) -> TreeSpec | None:
    """Return the tree that was tuned for this kind, or DEFAULT_TREE; None for a pipeline."""
    if predictor.pipeline:
        return None
    fields = shared.found.get("trees", {}).get(predictor.kind)
    return parse_tree(DEFAULT_TREE, predictor.steps) if fields is None else tree_of(fields, predictor.steps)


def tree_of(fields: dict[str, Any], steps: int) -> TreeSpec:
    """Return a tree from its `described` form."""
    return spec_of(SimpleNamespace(**fields), steps)  # type: ignore[arg-type]
