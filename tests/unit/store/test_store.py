"""Store: dtypes, slices, damage, fingerprints, and a writer whose shards are whole or absent."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from firp_cli.errors import FingerprintError, NumericsError, StoreError
from firp_cli.predictors.anchors import collate
from firp_cli.store.reader import Store, bytes_per_token, decode_states, encode_states
from firp_cli.store.writer import plan_shards
from firp_cli.training.batches import read_batch
from helpers.stores import FINGERPRINTS, HIDDEN, LAYERS, LENGTHS, SETTINGS, contents, fill, shard, states, writer


def test_shards_contain_whole_conversations_in_order() -> None:
    plans = plan_shards([5, 3, 9, 40, 4, 6, 2], 10)
    assert [(plan.first, plan.next) for plan in plans] == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert plans[3].file == "shard-00003.safetensors"
    assert plan_shards([], 10) == []


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 1 / 127), ("float8", 2**-3.9)],
)
def test_store_round_trip(tmp_path: Path, dtype: str, tolerance: float) -> None:
    fill(tmp_path / "store", dtype)
    store = Store.open(tmp_path / "store", verify=True)
    assert len(store) == 6 and store.lengths == LENGTHS
    for index in (0, 5, 2, 4, 1, 3):
        found = store[index]
        assert found.input_ids.dtype == torch.long and found.loss_mask.dtype == torch.bool
        assert found.input_ids.tolist() == [10 * index + place for place in range(LENGTHS[index])]
        assert found.loss_mask.tolist() == [False] + [True] * (LENGTHS[index] - 1)
        assert set(found.hidden) == set(LAYERS)
        for layer, got in ((1, found.hidden[1]), (3, found.hidden[3]), (9, found.final)):
            expected = states(index, layer)
            largest = expected.abs().amax(dim=-1, keepdim=True)
            assert ((got.float() - expected).abs() <= tolerance * largest).all()
    size = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*"))
    assert (
        sum(LENGTHS) * bytes_per_token(HIDDEN, 2, dtype)
        <= size
        <= sum(LENGTHS) * bytes_per_token(HIDDEN, 2, dtype) + 4 * 1000
    )


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_rows_have_separate_scales(dtype: str) -> None:
    """A row of large states does not reduce the precision of a row of small ones; a row of zeros stays zero."""
    rows = torch.randn(3, 64) * torch.tensor([[1000.0], [1e-3], [0.0]])
    stored = encode_states(rows, dtype)
    assert stored[".scale"].shape == (3, 1) and stored[""].element_size() == 1
    error = (decode_states(stored[""], stored[".scale"]) - rows).abs().amax(dim=-1) / rows.abs().amax(dim=-1).clamp_min(
        1e-30
    )
    assert (error < 0.05).all()


def test_decode_states_is_exact_for_every_float8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes[~codes.float().isnan()].view(127, 2)
    for factor in (1.0, 0.0123, 3.7e-38, 7.5e35):
        for kind in (torch.bfloat16, torch.float32):  # of the scales of stores today and of older ones
            scale = torch.full((127, 1), factor, dtype=kind)
            assert torch.equal(decode_states(numbers, scale), numbers.float() * scale.float())


def test_store_reads_only_chosen_layers(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    assert set(Store.open(tmp_path / "store", layers=[3])[0].hidden) == {3}
    assert Store.open(tmp_path / "store", layers=[])[0].hidden == {}
    with pytest.raises(StoreError, match=r"holds layers \[1, 3\], not \[2\]; collect another with --layers 1,2,3"):
        Store.open(tmp_path / "store", layers=[2, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8"])
def test_read_batch_equals_collate(tmp_path: Path, dtype: str) -> None:
    fill(tmp_path / "store", dtype)
    opened = Store.open(tmp_path / "store", layers=[3])
    for indices in ([4, 0, 5], [2], [1, 1]):
        batch, expected = read_batch(opened, indices), collate([opened[index] for index in indices])
        assert list(batch.hidden) == list(expected.hidden) == [3]
        for name in ("input_ids", "lengths", "loss_mask", "final"):
            got, wanted = getattr(batch, name), getattr(expected, name)
            assert got.dtype == wanted.dtype and torch.equal(got, wanted), name
        assert batch.hidden[3].dtype == expected.hidden[3].dtype and torch.equal(batch.hidden[3], expected.hidden[3])


def test_store_supports_indices_slices_and_pickling(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert torch.equal(store[-1].final, store[5].final)
    assert [len(item.input_ids) for item in store[1:4]] == LENGTHS[1:4]
    for outside in (6, -7):
        with pytest.raises(IndexError):
            store[outside]
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy[2].final, store[2].final)


def test_damaged_shard_is_named_and_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(folder)
    whole = contents(folder)
    victim = folder / "shard-00001.safetensors"
    data = bytearray(whole[victim.name])
    data[-1] ^= 1
    victim.write_bytes(data)
    Store.open(folder)  # the size is right
    with pytest.raises(
        StoreError, match=r"shard-00001\.safetensors \(its checksum differs\)\n.*--resume.*just that"
    ) as caught:
        Store.open(folder, verify=True)
    assert "shard-00000" not in str(caught.value)
    assert [plan.file for plan in fill(folder, resume=True)] == [victim.name]
    assert contents(folder) == whole
    Store.open(folder).verify()


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_open_detects_missing_or_cut_shard(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "store"
    fill(folder)
    whole = contents(folder)
    victim = folder / "shard-00002.safetensors"
    if kind == "missing":
        victim.unlink()
    else:
        victim.write_bytes(whole[victim.name][:-9])
    with pytest.raises(
        StoreError, match=rf"{victim.name} \({'missing' if kind == 'missing' else '.* bytes instead of'}"
    ):
        Store.open(folder)
    assert [plan.number for plan in fill(folder, resume=True)] == [2]
    assert contents(folder) == whole


def test_unfinished_store_is_refused_and_resumed(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    folder = tmp_path / "store"
    with writer(folder) as store:
        first, second, *_ = store.plan(LENGTHS, {"conversations": len(LENGTHS)})
        store.write(first, shard(first, "float32"))
        store.write(second, shard(second, "float32"))
    (folder / ".shard-00002.safetensors.99.tmp").write_bytes(b"half a shard")
    with pytest.raises(StoreError, match=r"is unfinished \(2 of 4 shards\); run the same `firp collect` with --resume"):
        Store.open(folder)
    with pytest.raises(StoreError, match="already holds an unfinished store of made; give --resume"):
        writer(folder)
    assert [plan.number for plan in fill(folder, resume=True)] == [2, 3]
    assert contents(folder) == contents(tmp_path / "whole")
    assert fill(folder, resume=True) == []
    with pytest.raises(StoreError, match="already holds a complete store"):
        writer(folder)


def test_writer_refuses_nan_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with writer(folder) as store:
        first, second, *_ = store.plan(LENGTHS, {})
        store.write(first, shard(first, "float32"))
        tensors = shard(second, "float32")
        tensors["hidden.3"][4, 2] = float("nan")
        with pytest.raises(NumericsError, match=r"hidden\.3, token 4 of conversation 2 \(shard-00001"):
            store.write(second, tensors)
    assert sorted(path.name for path in folder.glob("*shard*")) == ["shard-00000.safetensors"]
    assert json.loads((folder / "manifest.json").read_text())["complete"] is False


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8"])
def test_writer_refuses_infinities_of_a_dtype(tmp_path: Path, dtype: str) -> None:
    with writer(tmp_path / "store", dtype) as store:
        plan = store.plan(LENGTHS, {})[0]
        tensors = shard(plan, dtype)
        rows = torch.randn(8, HIDDEN)
        rows[6, 1] = 1e6 if dtype == "float16" else float("inf")
        tensors |= {"hidden.1" + suffix: stored for suffix, stored in encode_states(rows, dtype).items()}
        with pytest.raises(NumericsError, match=r"hidden\.1, token 1 of conversation 1 .*\n.*data.store_dtype"):
            store.write(plan, tensors)


def test_writer_accepts_large_finite_states(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as store:
        plan = store.plan(LENGTHS, {})[0]
        tensors = shard(plan, "float32")
        tensors["hidden.1"] = torch.full_like(tensors["hidden.1"], 3e38)
        store.write(plan, tensors)


def test_check_teacher_names_both_fingerprints(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    store.check_teacher("t1", "k1", "c1")
    with pytest.raises(FingerprintError, match=r"another tokenizer \(store: k1, now: k2\)") as caught:
        store.check_teacher("t1", "k2", "c1")
    assert "chat template" not in str(caught.value) and "t1" not in str(caught.value)
    with pytest.raises(FingerprintError, match=r"teacher \(store: t1, now: t2\) and another chat template"):
        store.check_teacher("t2", "k1", "c2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [1]}, r"layers \(store: \[1, 3\], now: \[1\]\)"),
        ({"dtype": "bfloat16"}, r"dtype \(store: float32, now: bfloat16\)"),
        ({"settings": SETTINGS | {"limit": 4}}, r"limit \(store: None, now: 4\)"),
        ({"settings": SETTINGS | {"batch_size": 4}}, r"batch_size \(store: not set, now: 4\)"),
        ({"fingerprints": FINGERPRINTS | {"teacher": "t2"}}, r"another teacher \(store: t1, now: t2\)"),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    fill(tmp_path / "store")
    whole = contents(tmp_path / "store")
    with pytest.raises((StoreError, FingerprintError), match=words):
        writer(tmp_path / "store", resume=True, **changes)
    assert contents(tmp_path / "store") == whole


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "store"), pytest.raises(StoreError, match="another `firp collect` is writing"):
        writer(tmp_path / "store", resume=True)
    writer(tmp_path / "store", resume=True).close()


def test_folder_without_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store in .*; make one: firp collect"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(StoreError, match="is not empty and is not a store"):
        writer(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": "firp.store/99"}')
    with pytest.raises(StoreError, match=r"schema 'firp\.store/99', this firp reads 'firp\.store/1'"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open(tmp_path)
