"""Conversion, splitting, merging and verification of stores; pages that a read maps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.errors import CapacityError, FingerprintError, StoreError, UsageError
from firp_cli.store import shard_file as store_file
from firp_cli.store.reader import SCALED, Store, bytes_per_token, decode_states, encode_states
from firp_cli.store.tools import assign_parts, convert_store, merge_stores, split_store
from firp_cli.store.verify import describe_store, verify_store
from firp_cli.store.writer import ShardPlan, StoreWriter
from helpers.stores import FINGERPRINTS, HIDDEN, LENGTHS, SETTINGS, contents, fill, shard, states, writer

# Largest error of an entry, relative to the largest of its row.
BOUNDS = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.5 / 127 * (1 + 2**-7), "float8": 2**-4}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    fill(tmp_path / "source")
    return tmp_path / "source"


def everything(folder: Path) -> list[tuple[Any, ...]]:
    """Return all conversations of a store as stored, as comparable values."""
    store = Store.open(folder, verify=True)
    rows = [{name: row.contiguous() for name, row in store.stored(index).items()} for index in range(len(store))]
    return [tuple((name, row[name].view(torch.uint8).numpy().tobytes()) for name in sorted(row)) for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("parts", [[0.5, 0.5], [1, 2, 3], [0.2, 0.8]])
def test_split_parts_merge_to_the_same_set(tmp_path: Path, dtype: str, parts: list[float]) -> None:
    fill(tmp_path / "source", dtype)
    outputs = [tmp_path / f"part-{number}" for number in range(len(parts))]
    summaries = split_store(tmp_path / "source", outputs, parts, seed=3)
    assert [summary["conversations"] for summary in summaries] == [len(Store.open(output)) for output in outputs]
    assert sum(summary["response_tokens"] for summary in summaries) == sum(LENGTHS) - len(LENGTHS)
    dealt = [everything(output) for output in outputs]
    summary = merge_stores(tmp_path / "merged", outputs)
    assert everything(tmp_path / "merged") == [item for part in dealt for item in part]
    assert sorted(everything(tmp_path / "merged")) == sorted(everything(tmp_path / "source"))
    assert (summary["conversations"], summary["tokens"]) == (6, sum(LENGTHS))
    assert verify_store(tmp_path / "merged") == []
    copied = {path.read_bytes() for path in (tmp_path / "merged").glob("shard-*")}
    assert copied == {path.read_bytes() for output in outputs for path in output.glob("shard-*")}


def test_assign_parts_depends_on_the_seed() -> None:
    dealt = assign_parts(100, [0.9, 0.1], 5)
    assert dealt == assign_parts(100, [0.9, 0.1], 5) and dealt != assign_parts(100, [0.9, 0.1], 6)
    assert list(map(len, dealt)) == [90, 10] and sorted(dealt[0] + dealt[1]) == list(range(100))
    assert all(part == sorted(part) for part in dealt)
    assert [len(part) for part in assign_parts(10, [1 / 3] * 3, 0)] == [3, 4, 3]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([0.9, 0.2], "sum to 1.1: give shares"),
        ([5, 2], "have 7 conversations, the store 6"),
        ([0.99, 0.01], "of 6 conversations: one of them is empty"),
        ([-1, 7], "one of them is empty"),
    ],
)
def test_incomplete_parts_are_refused(source: Path, tmp_path: Path, parts: list[float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        split_store(source, [tmp_path / "a", tmp_path / "b"], parts)
    with pytest.raises(UsageError, match="a different --output"):
        split_store(source, [tmp_path / "a", tmp_path / "a"], [0.5, 0.5])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_conversion_error_is_bounded_by_dtype(source: Path, tmp_path: Path, dtype: str) -> None:
    layers = [3] if dtype == "float32" else None
    convert_store(source, tmp_path / "new", dtype=dtype, layers=layers)
    before, after = Store.open(source), Store.open(tmp_path / "new", verify=True)
    assert after.manifest["dtype"] == dtype and after.manifest["fingerprints"] == FINGERPRINTS
    assert after.manifest["settings"]["sources"][0]["dtype"] == "float32"
    for index, mine in enumerate(before):
        theirs = after[index]
        assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.loss_mask, theirs.loss_mask)
        for layer, found in [*theirs.hidden.items(), (9, theirs.final)]:
            expected = states(index, layer)
            largest = expected.abs().amax(dim=-1, keepdim=True)
            assert ((found.float() - expected).abs() <= BOUNDS[dtype] * largest).all()
            stored = encode_states(expected, dtype)
            assert torch.equal(found, decode_states(stored[""], stored.get(".scale")))  # as if collected in that dtype
    found = describe_store(tmp_path / "new")
    headers = sum(len(LENGTHS) * 8 + 1500 for _ in range(found["shards"]))
    least = sum(LENGTHS) * bytes_per_token(HIDDEN, len(after.layers), dtype)
    assert least <= found["bytes"] <= least + headers
    assert verify_store(tmp_path / "new") == []


@pytest.mark.parametrize("dtype", SCALED)
def test_scaled_store_converts_to_its_floats(source: Path, tmp_path: Path, dtype: str) -> None:
    convert_store(source, tmp_path / "small", dtype=dtype)
    convert_store(tmp_path / "small", tmp_path / "back", dtype="float32")
    small, back = Store.open(tmp_path / "small"), Store.open(tmp_path / "back")
    for one, two in zip(small, back, strict=True):
        assert torch.equal(one.final, two.final) and all(torch.equal(one.hidden[n], two.hidden[n]) for n in (1, 3))


def test_convert_writes_only_kept_layers(source: Path, tmp_path: Path) -> None:
    convert_store(source, tmp_path / "upper", layers=[3])
    whole, upper = Store.open(source), Store.open(tmp_path / "upper")
    assert upper.manifest["layers"] == [3] and upper.manifest["dtype"] == "float32"
    assert torch.equal(upper[4].hidden[3], whole[4].hidden[3]) and torch.equal(upper[4].final, whole[4].final)
    size = {folder: describe_store(folder)["bytes"] for folder in (source, tmp_path / "upper")}
    saved = sum(LENGTHS) * HIDDEN * 4
    assert saved <= size[source] - size[tmp_path / "upper"] <= saved + 4 * 100
    convert_store(source, tmp_path / "final", layers=[])
    assert Store.open(tmp_path / "final")[0].hidden == {}
    other = tmp_path / "other"
    fill(other)
    with pytest.raises(StoreError, match=r"has layers \[3\].*\n?.*--layers 3"):
        merge_stores(tmp_path / "merged", [tmp_path / "upper", other])
    merge_stores(tmp_path / "merged", [tmp_path / "upper", other], layers=[3])
    merged = Store.open(tmp_path / "merged")
    assert len(merged) == 12 and merged.manifest["layers"] == [3]
    assert torch.equal(merged[9].hidden[3], whole[3].hidden[3])


def test_interrupted_tool_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill_after(tokens: int) -> Any:
        def progress(done: int, total: int | None) -> None:
            if done >= tokens:
                raise Killed

        return progress

    fill(tmp_path / "second")
    jobs: dict[str, Any] = {
        "converted": lambda output, **how: convert_store(source, output, dtype="int8", **how),
        "split": lambda output, **how: split_store(source, [output / "a", output / "b"], [0.5, 0.5], **how),
        "merged": lambda output, **how: merge_stores(output, [source, tmp_path / "second"], **how),
    }
    for name, job in jobs.items():
        job(tmp_path / name / "whole")
        with pytest.raises(Killed):
            job(tmp_path / name / "killed", progress=kill_after(16))
        unfinished = list((tmp_path / name / "killed").rglob("manifest.json"))
        assert unfinished and any(f.file == "manifest.json" for path in unfinished for f in verify_store(path.parent))
        with pytest.raises(StoreError, match=r"already holds an? (unfinished|complete) store"):
            job(tmp_path / name / "killed")
        job(tmp_path / name / "killed", resume=True)
        one, two = (
            {
                str(path.relative_to(tmp_path / name / side)): path.read_bytes()
                for path in (tmp_path / name / side).rglob("*")
                if path.is_file() and path.name not in ("provenance.json", ".lock")
            }
            for side in ("whole", "killed")
        )
        assert one == two


def test_merge_refuses_different_or_damaged_stores(source: Path, tmp_path: Path) -> None:
    for name, changes in (
        ("teacher", {"fingerprints": FINGERPRINTS | {"teacher": "t2"}}),
        ("bfloat16", {"dtype": "bfloat16"}),
        ("same", {}),
    ):
        with writer(tmp_path / name, **changes) as made:
            for plan in made.plan(LENGTHS, {"conversations": 6}):
                made.write(plan, shard(plan, changes.get("dtype", "float32")))
    output = tmp_path / "merged"
    with pytest.raises(FingerprintError, match=r"another teacher \(.*source: t1, .*teacher: t2\); only stores of one"):
        merge_stores(output, [source, tmp_path / "teacher"])
    with pytest.raises(StoreError, match=r"has float32 .* bfloat16; .*firp store convert .* --dtype float32"):
        merge_stores(output, [source, tmp_path / "bfloat16"])
    with pytest.raises(UsageError, match="two or more different stores"):
        merge_stores(output, [source, source])
    with pytest.raises(UsageError, match=r"unknown dtype 'int4'; did you mean 'int8'\?"):
        convert_store(source, output, dtype="int4")
    with pytest.raises(UsageError, match=r"already is a float32 store of layers \[1, 3\]"):
        convert_store(source, output, dtype="float32")
    with pytest.raises(StoreError, match="already holds a complete store"):
        convert_store(source, tmp_path / "same", dtype="int8")
    assert not output.exists()
    victim = source / "shard-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-70] ^= 1
    victim.write_bytes(data)
    for job in (
        lambda: merge_stores(tmp_path / "a", [source, tmp_path / "same"]),
        lambda: convert_store(source, tmp_path / "b", dtype="int8"),
        lambda: split_store(source, [tmp_path / "c", tmp_path / "d"], [0.5, 0.5]),
    ):
        with pytest.raises(StoreError, match=r"shard-00001\.safetensors \(its checksum differs\)\n.*firp collect"):
            job()
    for unfinished in ("a", "b"):
        with pytest.raises(StoreError, match="is unfinished"):
            Store.open(tmp_path / unfinished)


def test_output_larger_than_disk_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "free_bytes", lambda _: sum(LENGTHS) * bytes_per_token(HIDDEN, 2, "int8") - 1)
    before = contents(source)
    with pytest.raises(CapacityError, match=r"[kMG]?B are needed and .* free\nmake room"):
        convert_store(source, tmp_path / "small", dtype="int8")
    with pytest.raises(CapacityError):  # the parts fit one by one, not together
        split_store(source, [tmp_path / "a", tmp_path / "b"], [0.5, 0.5])
    assert not (tmp_path / "small").exists() and not (tmp_path / "a").exists() and contents(source) == before


def test_verify_names_every_fault(source: Path, tmp_path: Path) -> None:
    assert verify_store(source) == []
    whole = contents(source)
    victim = source / "shard-00000.safetensors"
    data = bytearray(whole[victim.name])
    data[-2] ^= 1
    victim.write_bytes(data)
    (source / "shard-00001.safetensors").unlink()
    (source / "shard-00002.safetensors").write_bytes(whole["shard-00002.safetensors"][:-5])
    found = {fault.file: fault for fault in verify_store(source)}
    assert found[victim.name].fault == "its checksum differs"
    assert found["shard-00001.safetensors"].fault == "missing"
    assert "bytes instead of" in found["shard-00002.safetensors"].fault
    assert len(found) == 3 and all("--resume" in fault.remedy for fault in found.values())
    description = describe_store(source)
    assert not description["complete"] and len(description["missing"]) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8"])
def test_verify_finds_faulty_contents_with_valid_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A writer without checks stores NaN and empty masks with valid checksums; verify finds them."""
    monkeypatch.setattr(StoreWriter, "_check_finite", lambda *_: None)
    with writer(tmp_path / "store", dtype) as made:
        for plan in made.plan(LENGTHS, {}):
            tensors = shard(plan, dtype)
            if plan.number == 0:  # conversations 0 and 1, of 5 and 3 tokens
                tensors["hidden.3.scale" if dtype in SCALED else "hidden.3"][6] = float("nan")
                tensors["hidden.3.scale" if dtype in SCALED else "hidden.3"][3, -1] = float("inf")
                tensors["loss_mask"][5:] = False
            made.write(plan, tensors)
    Store.open(tmp_path / "store", verify=True)
    name = "hidden.3.scale" if dtype in SCALED else "hidden.3"
    assert sorted(fault.fault for fault in verify_store(tmp_path / "store")) == [
        f"NaN or infinity in {name}, token 3 of conversation 0 and in 1 more",
        "the loss mask of conversation 1 is all zero: nothing to learn from",
    ]


WIDE, TOKENS, EACH = 1536, 8160, 60


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Store of one shard of 100 MB: 136 conversations of 60 tokens."""
    folder = tmp_path_factory.mktemp("wide") / "store"
    settings = SETTINGS | {"shard_tokens": TOKENS}
    with writer(folder, settings=settings, layers=[2], teacher={"name": "tiny", "hidden_size": WIDE}) as made:
        (plan,) = made.plan([EACH] * (TOKENS // EACH), {})
        made.write(plan, _wide_shard(plan))
    yield folder
    shutil.rmtree(folder)


def _wide_shard(plan: ShardPlan) -> dict[str, Tensor]:
    rows = torch.arange(TOKENS, dtype=torch.float32)[:, None].expand(-1, WIDE)
    return {
        "input_ids": torch.arange(TOKENS, dtype=torch.int32),
        "loss_mask": torch.ones(TOKENS, dtype=torch.bool),
        "sequence_offsets": torch.arange(0, TOKENS + 1, EACH),
        "hidden.2": rows.contiguous(),
        "hidden.final": -rows,
    }


def _resident(path: Path) -> tuple[int, int]:
    """Return the bytes of a file that this process maps, and those that are resident."""
    mapped = there = 0
    mine = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            mine = rest.endswith(str(path))
        elif mine and word in ("Size:", "Rss:"):
            kilobytes = int(rest.split()[0])
            mapped, there = mapped + kilobytes * (word == "Size:"), there + kilobytes * (word == "Rss:")
    return mapped << 10, there << 10


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's account of memory maps")
def test_store_reads_only_the_pages_of_a_conversation(wide: Path) -> None:
    path = wide / "shard-00000.safetensors"
    size = path.stat().st_size
    store = Store.open(wide)
    chosen = [7, 120, 55, 135]
    for index in chosen:
        item = store[index]
        assert item.hidden[2][:, -1].tolist() == [float(row) for row in range(index * EACH, (index + 1) * EACH)]
        assert torch.equal(item.final, -item.hidden[2])
    mapped, resident = _resident(path)
    rows = len(chosen) * 2 * EACH * WIDE * 4
    assert mapped >= size
    around = (2 * len(chosen) + 2) << 21  # the kernel maps up to 2 MiB of cached pages around each one touched
    assert rows <= resident <= rows + around < size / 4
    sum(store[index].final.sum() + store[index].hidden[2].sum() for index in range(len(store)))
    assert _resident(path)[1] > 0.95 * size  # the account is to be trusted
