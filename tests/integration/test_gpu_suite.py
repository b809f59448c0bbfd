"""`scripts/gpu_suite.py` at toy size on the CPU, end to end, and its parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.models import ROOT, SETTINGS, tiny_teacher

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_suite
from build_embedded import build_tokenizer

from firp_cli.config import KINDS, TeacherConfig
from firp_cli.decoding.tree_file import described, read_trees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors import folder as registry
from firp_cli.teacher.load import load_teacher
from suite import (
    answers,
    corpus,
    gpu_tests,
    groups,
    needs,
    predictors,
    replay,
    report,
    shapes,
    sizes,
    speed,
    steps,
    subject,
)
from suite.answers import OutputSequence, stored
from suite.benches import Traced, tune_settings, write_tree
from suite.predictors import share
from suite.subject import SAVED, Real, tree_of
from suite.work import Clock, Failed, Part, Shared, Skipped, Table, Work, allowed, grouped, is_fatal, run_part, select

CPU = torch.device("cpu")


@pytest.fixture
def shared() -> Shared:
    return Shared(CPU, torch.float32, sizes.TOY, ROOT)


def part(run: Any, name: str = "made", **options: Any) -> Part:
    return Part(name, run, 1, **options)


@pytest.mark.nightly
def test_suite_runs_all_parts_at_toy_size(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"}) for n in range(20)]
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").write_text("\n".join(lines))
    began = time.perf_counter()
    output = tmp_path / "out"
    options = ["--device", "cpu", "--quick", "--output", str(output), "--data-dir", str(tmp_path / "data")]
    assert gpu_suite.main(options, isolated=False) == 0
    assert time.perf_counter() - began < 100
    found = json.loads((output / "gpu_suite.json").read_text())
    assert found["schema"] == report.SCHEMA and found["environment"]["versions"]["torch"]
    parts = found["parts"]
    assert list(parts) == [item.name for item in gpu_suite.offered(False)]
    skipped = parts.pop("tests")
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no CUDA device")
    assert skipped["result"]["counts"]["skipped"] > 50 and not skipped["result"]["counts"]["error"]
    for name in ("7b.kernels", "7b.products", "7b.attention", "1b.kernels", "135m.kernels"):
        assert parts.pop(name)["status"] == "skipped", "they compare kernels of CUDA devices"
    assert {item["status"] for item in parts.values()} <= {"done", "cut"}, parts
    assert all(item["result"] and item["key"] for item in parts.values())
    check_figures(parts)
    text = (output / "gpu_suite.md").read_text()
    assert all(f"| {name} |" in text for name in parts) and "Projection" in text and "python" in text
    assert "Pipelines on one device (no gain expected" in text
    assert not list(output.glob(".*"))


def check_figures(parts: dict[str, Any]) -> None:
    """Check that figures of several parts agree."""
    found = {name: item["result"] for name, item in parts.items()}
    ar = found["7b.ar"]
    floor = 1e3 * (ar["weight_bytes"] + ar["cache_bytes"]) / found["bandwidth"]["bytes_per_second"]
    assert ar["floor_milliseconds"] == pytest.approx(floor)
    assert len(found["7b.passes"]["points"]) == len(sizes.TOY.contexts) * len(sizes.TOY.rows)
    trees = {"firp", "firp_plus", "hidden_transfer", "medusa"}
    kinds = {*trees, "speed"}
    assert kinds == set(KINDS) == set(found["trained.train"]) and found["trained.answers"]["tokens"] > 100
    assert trees <= set(found["replay"]) and "speed" not in {*found["replay"], *found["trained.tune"]}
    assert set(found["trained.exact"]["methods"]) == {"ar", *kinds}
    assert set(found["trained.teacher"]["corpus"]["conversations"]) == {"arithmetic", "gsm8k", "python"}
    assert all(one["identical"] == one["compared"] > 0 for one in found["trained.exact"]["methods"].values())
    assert set(found["trained.bench"]["identical"]["firp"]) == {"ar", "hf"}
    rows = {row["method"]: row for row in found["trained.bench"]["rows"] if row["dataset"] == "all"}
    assert set(rows) == {"hf", "ar", *kinds}
    pipeline = rows["speed"]["pipeline"]
    assert (pipeline["loops"], pipeline["exits"], pipeline["plain_tokens"]) == (4, [2, 3], 0)
    assert rows["speed"]["accepted_length"] == pytest.approx(4 * pipeline["tokens_per_tick"])
    assert "no gain" in found["trained.bench"]["note"]
    for kind in trees:
        projected = found["replay"][kind]
        assert projected["label"] == "projection"
        assert projected["accepted_length"] == pytest.approx(rows[kind]["accepted_length"])


def test_suite_records_a_failing_part_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(shared: Shared, work: Work) -> None:
        work.values["before"] = 1
        raise RuntimeError("out of luck")

    def works(shared: Shared, work: Work) -> None:
        work.values["after"], work.key = 2, "2 things"
        work.tables.append(Table("Things", ["a"], [["b"]]))

    parts = [part(fails, "first", gives="thing"), part(works, "second"), part(works, "third", needs=("first",))]
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    assert gpu_suite.main(["--device", "cpu", "--output", str(tmp_path)], isolated=False) == 1
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    assert [found[name]["status"] for name in found] == ["failed", "done", "skipped"]
    assert found["first"]["error"] == "RuntimeError: out of luck" and found["first"]["result"] == {"before": 1}
    assert any("raise RuntimeError" in line for line in found["first"]["traceback"])
    assert found["third"]["reason"] == "first gave no result"
    text = (tmp_path / "gpu_suite.md").read_text()
    assert "**first failed:** RuntimeError: out of luck" in text and "## Things" in text
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[:3]] == ["first", "second", "third"] and "2 things" in printed[1]


def test_part_that_overruns_is_stopped_and_keeps_its_values(shared: Shared, monkeypatch: Any) -> None:
    monkeypatch.setattr("suite.work.GRACE", 0.1)

    def endless(shared: Shared, work: Work) -> None:
        work.values["found"] = 1
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    _, record = run_part(part(endless), shared, 0.2, 0.0, [])
    assert record["status"] == "cut" and record["result"] == {"found": 1}
    assert record["cuts"] == ["stopped after 0 s"] and record["seconds"] < 2
    assert signal.getsignal(signal.SIGALRM) == before[0]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(before[1], abs=5)


def test_part_without_enough_time_is_skipped_or_cut(shared: Shared) -> None:
    def choosy(shared: Shared, work: Work) -> None:
        work.values["small"] = work.clock.allows(0.5, "a small thing")
        work.values["large"] = work.clock.allows(50, "a large thing")

    _, record = run_part(part(choosy), shared, 2.0, 0.0, [])
    assert record["result"] == {"small": True, "large": False}
    assert (record["status"], record["cuts"]) == ("cut", ["a large thing: needs about 50 s, 2 s remain"])
    _, record = run_part(part(choosy), shared, 2.0, 5.0, [])
    assert (record["status"], record["reason"]) == ("skipped", "needs at least 5 s, 2 s remain")
    assert Clock(3.0).left() == pytest.approx(3.0, abs=0.1)


def test_shares_divide_the_remaining_time() -> None:
    one, two, three = (Part(str(share), lambda *_: None, share) for share in (10, 20, 30))
    assert allowed(one, [two, three], 120) == pytest.approx(20)
    assert allowed(two, [three], 115) == pytest.approx(46)  # what the first did not use falls to the others
    assert allowed(three, [], 40) == 40
    assert allowed(three, [], -3) == 0


def test_parts_are_selected_with_their_needs() -> None:
    def names(wanted: list[str] | None, real: bool = False) -> list[str]:
        return [item.name for item in select(gpu_suite.offered(real), wanted)]

    trained = [f"trained.{part}" for part in ("teacher", "answers", "train", "bench")]
    assert names(["replay"]) == [*trained, "replay"]
    assert names(["replay"], real=True) == ["real.answers", "real.train", "real.bench", "replay"]
    assert names(["1b", "bandwidth"])[:2] == ["bandwidth", "1b.ar"] and len(names(["1b"])) == 8
    assert names(None) == [item.name for item in gpu_suite.PARTS if not item.name.startswith("real.")]
    order = [group[0].name for group in grouped(gpu_suite.offered(True))]
    assert order[:5] == ["smoke", "bandwidth", "real.answers", "7b.products", "tests"]
    assert order[5:] == ["1b.ar", "135m.ar", "7b.prefill", "speed", "1b.compiled"]
    with pytest.raises(ValueError, match="no part bandwith; there are smoke, bandwidth, 7b"):
        names(["bandwith"])
    for arguments in (["--device", "cpu", "--parts", "x"], [] if not torch.cuda.is_available() else ["--parts", "x"]):
        with pytest.raises(SystemExit):
            gpu_suite.parse(arguments)
    assert gpu_suite.parse(["--device", "cpu", "--quick"]).minutes == 3


def sources(folder: Path) -> Path:
    for number in range(60):
        path = folder / f"package{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"name_{number}_{line} = {line}" for line in range(80)))
    (folder / "package0" / "other.py").write_bytes(b"\xff\xfe not text" * 100)
    return folder


def test_corpus_is_the_same_for_the_same_packages(tmp_path: Path) -> None:
    folder = sources(tmp_path)
    one, two = (corpus.gather(50, 30_000, 4, None, folder) for _ in range(2))
    assert one == two and one.mixed() == two.mixed() and len(one.mixed(3)) == 6
    read = list(corpus.sources(folder, 30_000, held_out=False))
    assert sum(map(len, read)) == 30_000
    assert list(corpus.sources(folder, 5_000, held_out=False))[:2] == read[:2]
    everything = {name: set(corpus.sources(folder, 1 << 30, name)) for name in (True, False)}
    assert everything[True] and not everything[True] & everything[False]
    asked = {item["content"] for source in one.questions.values() for question in source for item in question}
    assert not asked & {item[0]["content"] for item in one.mixed()}


def test_corpus_renders_text_as_the_template_does(tmp_path: Path) -> None:
    found = corpus.gather(50, 30_000, 4, None, sources(tmp_path))
    tokenizer = build_tokenizer(map(corpus.render, found.mixed()), 400)
    assert 300 < len(tokenizer) <= 400
    for conversation in found.mixed()[:20]:
        text = corpus.render(conversation)
        assert text == tokenizer.apply_chat_template(conversation, tokenize=False)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_projection_adds_up_the_steps_at_their_contexts() -> None:
    step = replay.between(100, 200, 4.0, 6.0)  # 0.02 ms more for every token
    plain = replay.between(100, 200, 2.0, 3.0)
    found = replay.project([100], [[3, 2]], step, plain)
    assert (found.tokens, found.steps, found.accepted_length) == (5, 2, 2.5)
    assert found.milliseconds == pytest.approx(4.0 + 4.06)
    assert found.ar_milliseconds == pytest.approx(sum(2 + 0.01 * number for number in range(5)))
    assert found.speedup == pytest.approx(10.1 / 8.06)
    constant = replay.project([10, 900], [[1, 4], [2]], lambda _: 2.0, lambda _: 1.0)
    assert constant.speedup == pytest.approx((7 / 3) / 2)
    fields = described(parse_tree("dynamic:8@3", 4))
    assert replay.contexts([Traced("own", "firp", fields, 4, [100, 120], [[1], [300]])]) == (100, 420)
    assert replay.contexts([Traced("own", "firp", fields, 4, [10], [[1]])]) == (64, 128)


OUTPUT = """
tests/test_gpu.py::test_a PASSED                                         [ 33%]
tests/test_gpu.py::test_b[bf16 - long] FAILED                            [ 66%]
tests/test_gpu.py::test_c SKIPPED (needs a CUDA device)                  [100%]
=========================== short test summary info ============================
SKIPPED [1] tests/test_gpu.py:9: needs a CUDA device
FAILED tests/test_gpu.py::test_b[bf16 - long] - assert 1 == 2
"""
SEVERAL = """
scheduling tests via LoadScheduling

tests/test_gpu.py::test_a
tests/test_gpu.py::test_b
[gw1] [  5%] PASSED tests/test_gpu.py::test_a[firp-1]
[gw0] [ 10%] ERROR tests/test_gpu.py::test_b[x y]
tests/test_gpu.py::test_d
"""


def test_gpu_test_outcomes_are_counted_also_of_a_stopped_run() -> None:
    assert gpu_tests.counts(OUTPUT) == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert gpu_tests.counts(SEVERAL) == {"passed": 1, "failed": 0, "error": 1, "skipped": 0}
    for output, status, error in ((OUTPUT, 1, Failed), ("", 2, Failed), ("", 5, Skipped)):
        work = Work(Clock(5.0), {"status": status, "counts": gpu_tests.counts(output)})
        with pytest.raises(error):
            gpu_tests.report(work, output, cuda=False)
    assert "tests/gpu/test_gpu.py" in gpu_tests.marked_files(ROOT)
    assert gpu_tests.marked_files(ROOT)[0] == "tests/gpu/test_gpu.py"
    assert "tests/integration/test_gpu_suite.py" not in gpu_tests.marked_files(ROOT)


@pytest.mark.parametrize(("shape", "billions"), [(sizes.SHAPE_7B, 7.25), (sizes.SHAPE_1B, 1.24)])
def test_shapes_have_the_size_of_their_names(shape: sizes.Shape, billions: float) -> None:
    model = shapes.empty_model(shape | shapes.NO_TOKENS, torch.device("meta"), torch.bfloat16)
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.config.eos_token_id is None


def test_weight_bytes_leave_out_the_embedding_rows() -> None:
    for family in ("llama", "llama-tied"):
        teacher = tiny_teacher(family)
        every = sum(value.numel() for value in teacher.model.parameters())
        looked_up = teacher.vocab_size * teacher.hidden_size * (family == "llama")
        assert shapes.weight_bytes(teacher) == 4 * (every - looked_up)
    assert shapes.cache_bytes(tiny_teacher("llama"), 10) == 2 * 4 * 2 * 12 * 10 * 4


def test_random_teacher_is_made_once_and_freed(shared: Shared) -> None:
    first = shapes.shaped(shared, "7b")
    assert shapes.shaped(shared, "7b") is first and first.eos_token_ids == ()
    assert shapes.shaped(shared, "1b") is not first
    shared.free(shapes.RANDOM)
    assert not shared.found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_lean_layers_are_timed_beside_uncompiled_ones(shared: Shared) -> None:
    """Their results are saved before transformers' layers are compiled, and the shared teacher keeps its own."""
    stack, saved = shapes.shaped(shared, "1b").stack, []
    run = partial(speed.compiled, name="1b")
    work, record = run_part(part(run), shared, 300, 0.0, [], lambda _, record: saved.append(list(record["result"])))
    assert record["status"] == "done", record
    labels = ["lean layers", "lean layers, compiled", "static cache"]
    assert list(record["result"]) == [row[0] for table in work.tables for row in table.cells] == labels
    assert labels[:2] in saved
    assert shapes.shaped(shared, "1b").stack is stack


def test_lean_layers_that_do_not_compile_fail_after_other_timings(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    stack = shapes.shaped(shared, "1b").stack
    monkeypatch.setattr(torch, "compile", fails)
    _, record = run_part(part(partial(speed.compiled, name="1b")), shared, 300, 0.0, [])
    assert record["status"] == "failed" and record["error"].endswith("no compiler")
    assert list(record["result"]) == ["lean layers", "static cache"]
    assert shapes.shaped(shared, "1b").stack is stack


def test_compiled_lean_layers_need_time(shared: Shared) -> None:
    _, record = run_part(part(partial(speed.compiled, name="1b")), shared, 15, 0.0, [])
    assert record["status"] == "cut" and list(record["result"]) == ["static cache"]
    assert record["cuts"][0].startswith("lean layers, compiled: needs about")


def test_predictors_of_every_kind_are_made_and_pipelines_come_last() -> None:
    for layers in (4, 12, 32):
        assert list(shapes.sections(layers)) == list(KINDS)
    teacher = tiny_teacher("llama")
    made = {
        kind: shapes.random_predictor(teacher, section)
        for kind, section in shapes.sections(teacher.num_layers, steps=2).items()
    }
    assert sorted(made, key=lambda kind: -share(made[kind])) == [
        "firp",
        "firp_plus",
        "hidden_transfer",
        "medusa",
        "speed",
    ]
    assert made["speed"].pipeline == (2, 3, 4)
    states = {layer: torch.zeros(3, 2) for layer in range(5)}
    answer = OutputSequence(torch.arange(3), torch.ones(3), torch.zeros(3, 2), states)
    for predictor in made.values():
        (own,) = stored([answer], predictor)
        assert set(own.hidden) == set(predictor.required_layers) and own.input_ids is answer.input_ids


def test_tuning_fits_its_time() -> None:
    whole, brief = (tune_settings(sizes.FULL, seconds, short) for seconds, short in ((25.0, False), (8.0, True)))
    assert (whole.batches, whole.trial, whole.seconds) == ((1,), True, 5.0)
    assert (brief.batches, brief.trial, brief.seconds) == ((1,), False, pytest.approx(1.6))


def test_kernels_are_classified_by_their_names() -> None:
    names = {
        "_attend": "attention",
        "nvjet_tst_128x8_64x12_1x2_h_bz_TNT": "matrix products",
        "void gemvNSP_kernel<__nv_bfloat16>": "matrix products",
        "void at::native::index_copy_kernel": "K/V, copies, gathers",
        "Memcpy DtoD (Device -> Device)": "K/V, copies, gathers",
        "void at::native::vectorized_layer_norm_kernel": steps.OTHER,
    }
    assert {name: steps.kind_of(name) for name in names} == names


def data_sets(folder: Path) -> Path:
    """A few questions, as files of a data folder."""
    for split, first in (("train", 0), ("test", 50)):
        rows = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(first, first + 12)]
        (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.nightly
def test_suite_runs_the_parts_of_a_real_teacher(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from helpers.gguf_writer import write_gguf

    settings = SETTINGS | {"vocab_size": 1024, "hidden_size": 64, "head_dim": 16, "eos_token_id": 3}
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    path = write_gguf(tmp_path / "tiny.gguf", model)
    teacher = load_teacher(TeacherConfig.model_validate({"model": str(path), "dtype": "float32"}), "cpu")
    given = tmp_path / "given"
    section = {"kind": "medusa", "steps": 4, "own_head": False}
    registry.save_predictor(shapes.random_predictor(teacher, section), given, teacher)
    other = tmp_path / "other"
    registry.save_predictor(shapes.random_predictor(teacher, section), other, tiny_teacher("llama"))
    output = tmp_path / "out"
    options = ["--device", "cpu", "--quick", "--minutes", "0.6", "--parts", "real,replay", "--tokens", "300"]
    options += ["--teacher", str(path), "--data-dir", str(data_sets(tmp_path / "data")), "--output", str(output)]
    options += ["--predictors", str(given), str(other)]
    assert gpu_suite.main(options, isolated=False) == 0
    parts = json.loads((output / "gpu_suite.json").read_text())["parts"]
    assert list(parts) == ["real.answers", "real.train", "real.tune", "real.bench", "real.exact", "replay"]
    assert {item["status"] for item in parts.values()} <= {"done", "cut"}, parts
    found = {name: item["result"] for name, item in parts.items()}
    assert found["real.answers"]["tokens"] >= 300 and len(found["real.answers"]["passes"]) > 1
    kinds = {"firp", "hidden_transfer", "medusa"}
    assert set(found["real.train"]) == kinds
    rows = {row["method"] for row in found["real.bench"]["rows"]}
    assert rows == {"hf", "ar", *kinds, "given"} and list(found["real.bench"]["errors"]) == [str(other)]
    assert all(one["ar"]["compared"] for name, one in found["real.bench"]["identical"].items() if name != "ar")
    assert set(found["real.exact"]["methods"]) == {"ar", *kinds}
    assert all(one["identical"] == one["compared"] > 0 for one in found["real.exact"]["methods"].values())
    assert {*kinds, "given"} <= set(found["replay"])
    with tarfile.open(output / predictors.ARCHIVE) as archive:
        archive.extractall(tmp_path / "scratch" / SAVED, filter="data")
    again = Shared(CPU, torch.float32, sizes.TOY, ROOT, scratch=tmp_path / "scratch", found={"saved": sorted(kinds)})
    assert {kind: one.kind for kind, one in subject.predictors(again, teacher).items()} == {one: one for one in kinds}
    assert sorted(file.name for file in output.iterdir()) == [
        "gpu_suite.json",
        "gpu_suite.log",
        "gpu_suite.md",
        "predictors.tar",
    ]


SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
import gpu_suite
from suite import groups
from suite.work import Part

def gives(shared, work):
    shared.found["bytes_per_second"], work.key = 7.0, "given"

def dies(shared, work):
    work.values["rows"] = [1, 2]
    time.sleep(0.6)
    work.save()
    print("about to die", flush=True)
    os.kill(os.getpid(), 9)

def breaks(shared, work):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def hangs(shared, work):
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
    while True:
        time.sleep(1)

def takes(shared, work):
    work.values["taken"] = shared.found["bytes_per_second"]

groups.GRACE, groups.ENDING = 0.3, 0.3
runs = dict(smoke=takes if {smoke!r} else gives, dies=dies, breaks=breaks, takes=takes, hangs=hangs, last=takes)
gpu_suite.SCRIPT = Path(__file__)
gpu_suite.PARTS = [
    Part(name, run, 1, group=name if name in ("smoke", "hangs") else "g", most=1.0 if name == "hangs" else None)
    for name, run in runs.items()
]
if __name__ == "__main__":
    sys.exit(gpu_suite.main())
"""


def run_with_faults(folder: Path, lost: bool = False) -> tuple[Any, dict[str, Any]]:
    """Run the parts of SCRIPT in processes (`lost`: the first gives nothing); return the process and the parts."""
    script = folder / "suite_with_faults.py"
    script.write_text(SCRIPT.format(scripts=str(ROOT / "scripts"), smoke=lost))
    done = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--output", str(folder / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # another thread would take `hangs`' signal
    )
    assert done.returncode == 1, done.stderr
    return done, json.loads((folder / "out" / "gpu_suite.json").read_text())["parts"]


@pytest.mark.nightly
def test_suite_loses_one_part_to_a_process_that_dies_breaks_or_hangs(tmp_path: Path) -> None:
    done, parts = run_with_faults(tmp_path)
    failed = {"dies", "breaks", "hangs"}
    statuses = {name: item["status"] for name, item in parts.items()}
    assert statuses == {name: "failed" if name in failed else "done" for name in [*failed, "smoke", "takes", "last"]}
    assert parts["dies"]["result"] == {"rows": [1, 2]} and "status -9" in parts["dies"]["error"]
    assert "illegal memory access" in parts["breaks"]["error"] and parts["takes"]["result"] == {"taken": 7.0}
    assert parts["last"]["result"] == {"taken": 7.0}
    assert "about to die" in done.stdout and "about to die" in (tmp_path / "out" / "gpu_suite.log").read_text()


@pytest.mark.nightly
def test_suite_ends_after_a_failed_smoke_part(tmp_path: Path) -> None:
    done, parts = run_with_faults(tmp_path, lost=True)
    assert "nothing else is run" in done.stdout and list(parts) == ["smoke"]


def test_missing_modules_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "NEEDED", ("torch", "no_such_module"))
    monkeypatch.setattr(needs, "FOR_GGUF", ("neither_this",))
    assert needs.missing(["--device", "cpu"]) == ["no_such_module"]
    for name in ("a.gguf", "smollm2-135m"):
        assert needs.missing(["--device=cpu", "--teacher", name]) == ["no_such_module", "neither_this"]


def test_part_that_swallows_its_end_is_stopped_again(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.work.GRACE", 0.1)
    monkeypatch.setattr("suite.work.AGAIN", 0.1)

    def swallows(shared: Shared, work: Work) -> None:
        for _ in range(2):
            try:
                time.sleep(5)
            except BaseException:
                work.values["swallowed"] = work.values.get("swallowed", 0) + 1
                if work.values["swallowed"] == 2:
                    raise

    _, record = run_part(part(swallows), shared, 0.1, 0.0, [])
    assert record["status"] == "cut" and record["result"] == {"swallowed": 2} and record["seconds"] < 2


def test_fatal_device_errors_are_recognised() -> None:
    AcceleratorError = type("AcceleratorError", (RuntimeError,), {})
    assert is_fatal(AcceleratorError("x")) and is_fatal(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_fatal(torch.OutOfMemoryError("CUDA error: out of memory")) and not is_fatal(ValueError("CUDA error"))


def test_remaining_parts_continue_after_a_dead_process() -> None:
    parts = [part(lambda *_: None, name) for name in "abc"]
    found = groups.Found(records={"a": {"status": "done"}, "b": {"status": "running", "result": {"x": 1}}})
    assert [item.name for item in groups.remaining(parts, found, "status -9")] == ["c"]
    assert found.records["b"]["status"] == "failed" and found.records["b"]["result"] == {"x": 1}
    found = groups.Found()
    assert [item.name for item in groups.remaining(parts, found, "cannot start")] == ["b", "c"]
    assert found.records["a"]["error"] == "cannot start"


def test_answers_come_in_mixtures_of_batches_sorted_by_length() -> None:
    prompts = [[0] * (1 + number % 7) for number in range(50)]
    found = list(answers.mixtures(prompts, 3))
    assert [sum(map(len, mixed)) for mixed in found] == [3, 24, 23], "one batch first, which says what its states take"
    for mixed in found:
        lengths = [len(prompt) for batch in mixed for prompt in batch]
        assert lengths == sorted(lengths) and max(map(len, mixed)) <= 3


def test_real_predictors_begin_at_two_thirds_of_the_depth(shared: Shared) -> None:
    made = Real(shared).sections(30)
    assert made["firp"]["layer"] == 20 and made["hidden_transfer"]["layers"] == [20, 21, 22, 23]
    assert Real(shared).sections(4)["hidden_transfer"]["layers"] == [3, 3, 3, 3]
    assert set(made) == {"firp", "firp_plus", "hidden_transfer", "medusa"}


@pytest.mark.parametrize("text", ["dynamic:8@3", "chain", "dynamic:2/1", "static:2x2"])
def test_trees_survive_json_and_tree_files(text: str, tmp_path: Path) -> None:
    tree = parse_tree(text, 4)
    assert str(tree_of(json.loads(json.dumps(described(tree))), 4)) == str(tree)
    write_tree(tmp_path, tree)
    read = read_trees(tmp_path / "tree.json", 4).default
    assert (read.nodes, read.paths, read.budget) == (tree.nodes, tree.paths, tree.budget)
