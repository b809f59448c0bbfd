"""Fixtures of several files: ranks, tiny teachers, a teacher and a store on disk."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # parallel processes would wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from firp_cli.chat_template import template_fingerprint, tokenizer_fingerprint
from firp_cli.config import TeacherConfig
from firp_cli.decoding import step
from firp_cli.store.writer import StoreWriter
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from helpers.graphs import Arrived, LateBuffer
from helpers.models import FAMILIES, VOCABULARY, sequence_batch, tiny_model, tiny_teacher

if TYPE_CHECKING:
    from helpers.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool that starts commands on any number of ranks, without the seconds of importing."""
    from helpers.rank_pool import rank_pool  # it imports this module

    with rank_pool() as made:
        yield made


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher("llama")


@pytest.fixture(params=list(FAMILIES))
def any_teacher(request: pytest.FixtureRequest) -> Teacher:
    """A teacher of every family, on the library's layers."""
    return tiny_teacher(request.param)


@pytest.fixture(params=["lean", "library"])
def any_stack(request: pytest.FixtureRequest) -> str:
    """Name of each layer stack."""
    return request.param


@pytest.fixture(params=list(FAMILIES))
def stacked_teacher(request: pytest.FixtureRequest, any_stack: str) -> Teacher:
    """A teacher of every family on each layer stack."""
    return tiny_teacher(request.param, any_stack == "lean")


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Work in an empty folder, where no teacher can be loaded."""
    for place in ("api.loading", "teacher.load"):
        monkeypatch.setattr(f"firp_cli.{place}.load_teacher", lambda *_, **__: pytest.fail("a teacher was loaded"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines read steps late, as on a CUDA device."""
    monkeypatch.setattr(torch.cuda, "Event", Arrived)
    monkeypatch.setattr(step, "OutputBuffer", LateBuffer)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher on disk, whose tokenizer knows the words w3, w4, ..."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = {"<unk>": 0, "</s>": 1, "<s>": 2} | {f"w{token}": token for token in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 conversations, each a walk round a cycle of words, in two shards."""
    folder = tmp_path_factory.mktemp("store")
    teacher = load_teacher(TeacherConfig(model=str(teacher_folder)))
    tokenizer = teacher.tokenizer
    fingerprints = {
        "teacher": teacher.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat template": template_fingerprint(tokenizer),
    }
    settings = {"shard_tokens": 300}
    texts = [[3 + 4 * ((7 * number + place) % 22) for place in range(20)] for number in range(24)]
    with StoreWriter(
        folder,
        teacher=teacher.describe(),
        fingerprints=fingerprints,
        layers=[2],
        dtype="float32",
        settings=settings,
    ) as writer:
        for plan in writer.plan([20] * 24, {"conversations": 24}):
            part = texts[plan.first : plan.next]
            batch = sequence_batch(teacher, part, [5] * len(part), [2])
            tensors = {
                "input_ids": batch.input_ids.flatten().int(),
                "loss_mask": batch.loss_mask.flatten(),
                "sequence_offsets": torch.arange(len(part) + 1) * 20,
                "hidden.2": batch.hidden[2].flatten(0, 1).contiguous(),
                "hidden.final": batch.final.flatten(0, 1).contiguous(),
            }
            writer.write(plan, tensors)
    return folder
