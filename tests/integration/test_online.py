"""States computed during training: the losses of a store, with nothing on disk or with states kept on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from firp_cli.collecting import online as online_module
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.corpus import Corpus, build_corpus, load_messages
from firp_cli.collecting.online import HybridStates, OnlineStates
from firp_cli.config import DataConfig, Recipe
from firp_cli.errors import NumericsError, StoreError
from firp_cli.recipe import validate_recipe
from firp_cli.store.reader import Store
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.metrics_log import Listener
from firp_cli.training.trainer import train
from helpers.collecting import make_teacher
from helpers.commands import invoke
from helpers.training import losses

LAYER = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"What is {n} + {n * 7}?", "answer": f"It is {n * 8}. " * (1 + n % 5)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


def recipe(dataset: Path, dtype: str = "auto", **training: Any) -> Recipe:
    settings = {"micro_batch_size": 3, "anchors_per_sequence": 6, "epochs": 3, "validation_fraction": 0.2}
    data = {"dataset": str(dataset), "store_dtype": dtype, "shard_tokens": 400, "pack_tokens": 200}
    return validate_recipe(
        {
            "data": data,
            "predictor": {"kind": "firp", "layer": LAYER, "steps": 2},
            "training": settings | {"learning_rate": 5e-3, "validate_every": 6} | training,
        }
    )


def corpus_of(teacher: Teacher, data: DataConfig) -> Corpus:
    return build_corpus(load_messages(data), teacher, data)


def hybrid(teacher: Teacher, data: DataConfig, folder: Path, dtype: str = "float32", rank: int = 0) -> HybridStates:
    corpus = corpus_of(teacher, data)
    return HybridStates(teacher, corpus, [LAYER], dtype, data.pack_tokens, folder, data.shard_tokens, rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_online_and_hybrid_losses_equal_those_of_a_store(
    teacher: Teacher, dataset: Path, tmp_path: Path, dtype: str
) -> None:
    wanted = recipe(dataset, dtype)
    collect_store(teacher, wanted.data, [LAYER], tmp_path / "store")
    train(wanted, teacher, Store.open(tmp_path / "store"), tmp_path / "cached")
    made = OnlineStates(teacher, corpus_of(teacher, wanted.data), [LAYER], dtype, wanted.data.pack_tokens)
    train(wanted, teacher, made, tmp_path / "online")
    kept = hybrid(teacher, wanted.data, tmp_path / "cache", dtype)
    train(wanted, teacher, kept, tmp_path / "hybrid")
    expected = losses(tmp_path / "cached")
    assert len(expected) > 12
    # a state that rounds to the neighbouring value of a coarse dtype may do so after another batch's forward
    tolerance = {"float32": 1e-5, "bfloat16": 1e-3, "int8": 1e-3}[dtype]
    assert losses(tmp_path / "online") == pytest.approx(expected, rel=tolerance)
    assert losses(tmp_path / "hybrid") == pytest.approx(expected, rel=tolerance)
    assert kept.made == len(kept) and len(list((tmp_path / "cache").glob("cache-*.safetensors"))) >= 3


def test_hybrid_computes_each_state_once_and_resumes_from_disk(teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    wanted = recipe(dataset)
    first = hybrid(teacher, wanted.data, tmp_path / "cache")
    stopped = train(wanted, teacher, first, tmp_path / "run", listener=Listener(stop=lambda done: done == 4))
    assert stopped.stopped and first.made == len(first)  # the ridge start and a validation read all of them
    second = hybrid(teacher, wanted.data, tmp_path / "cache")
    assert not train(wanted, teacher, second, tmp_path / "run", resume=True).stopped
    assert second.made == 0
    other = hybrid(make_teacher(seed=1), wanted.data, tmp_path / "cache")
    assert other[3].input_ids.tolist() == second[3].input_ids.tolist()
    assert not torch.equal(other[3].final, second[3].final) and other.made == 1


def test_hybrid_recomputes_damaged_files(teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    data = recipe(dataset).data
    whole = hybrid(teacher, data, tmp_path)
    expected = [whole[index].final for index in range(len(whole))]
    whole.flush()
    files = sorted(tmp_path.glob("cache-*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:500])
    again = hybrid(teacher, data, tmp_path)
    for one, other in zip(expected, again[:], strict=True):
        assert (one - other.final).abs().max() < 1e-5
    assert 0 < again.made < len(again)


def test_hybrid_ranks_read_each_others_files(teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    data = recipe(dataset).data
    zero, one = (hybrid(teacher, data, tmp_path, rank=rank) for rank in (0, 1))
    zero.fetch(range(12))
    zero.flush()
    got = one.fetch(range(14))
    assert one.made == 2 and torch.equal(got[5].hidden[LAYER], zero[5].hidden[LAYER])


def test_hybrid_threads_read_equal_states(teacher: Teacher, dataset: Path, tmp_path: Path) -> None:
    states = hybrid(teacher, recipe(dataset).data, tmp_path)
    expected = [item.final.clone() for item in states[:]]
    fresh, wrong = hybrid(teacher, recipe(dataset).data, tmp_path / "other"), []

    def read(start: int) -> None:
        for number in range(start, start + len(fresh)):
            difference = (fresh[number % len(fresh)].final - expected[number % len(fresh)]).abs().max()
            if not difference < 1e-5:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(7 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_online_nan_names_the_conversation(dataset: Path) -> None:
    broken = make_teacher()
    data = recipe(dataset).data
    corpus = corpus_of(broken, data)
    token = next(
        iter(set(corpus.input_ids[5].tolist()) - {item for ids in corpus.input_ids[:5] for item in ids.tolist()})
    )
    broken.model.get_input_embeddings().weight.data[token] = float("nan")
    states = OnlineStates(broken, corpus, [LAYER], "float32", 200)
    states.fetch(range(5))
    with pytest.raises(NumericsError, match="conversation 5"):
        states.fetch(range(6))


def test_hybrid_keeps_its_files_on_a_full_disk(
    teacher: Teacher, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = hybrid(teacher, recipe(dataset).data, tmp_path)
    states.fetch(range(10))
    states.flush()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(online_module, "save_hashed", full)
    with pytest.raises(StoreError, match=r"No space left .*\n.*data.mode=online"):
        states[:]
        states.flush()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("mode", ["online", "hybrid"])
def test_train_without_a_store(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answered = str(mode == "hybrid").lower()
    arguments = ["train", "demo", f"data.mode={mode}", f"data.regenerate={answered}", "data.limit=24"]
    arguments += ["training.max_steps=2"]
    arguments += ["training.gate_prompts=1", "data.max_new_tokens=8", "--store=cache", "--output=run", "--json"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    training = json.loads(result.stdout)
    assert training["steps"] == 2 and training["store"]["mode"] == mode
    assert bool(list(tmp_path.glob("cache/cache-*"))) == (mode == "hybrid")
    assert (tmp_path / "cache" / "answers-00000.jsonl").exists() == (mode == "hybrid")
