"""`scripts/gpu_suite.py` at toy size on the CPU, end to end, and what its parts are made of."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, tiny_teacher

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_suite
from build_embedded import build_tokenizer
from suite import corpus, gpu_tests, replay, report, shapes, sizes, steps
from suite.benches import Traced, tune_settings
from suite.predictors import Written, share, stored
from suite.work import Clock, Failed, Part, Shared, Skipped, Table, Work, allowed, run_part, select

from firp_cli.decoding.tree import TreeSpec
from firp_cli.recipe import KINDS

CPU = torch.device("cpu")


@pytest.fixture
def shared() -> Shared:
    return Shared(CPU, torch.float32, sizes.TOY, ROOT)


def part(run: Any, name: str = "made", **options: Any) -> Part:
    return Part(name, run, 1, **options)


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"}) for n in range(20)]
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").write_text("\n".join(lines))
    began = time.perf_counter()
    output = tmp_path / "out"
    options = ["--device", "cpu", "--quick", "--output", str(output), "--data-dir", str(tmp_path / "data")]
    assert gpu_suite.main(options) == 0
    assert time.perf_counter() - began < 100
    found = json.loads((output / "gpu_suite.json").read_text())
    assert found["schema"] == report.SCHEMA and found["environment"]["versions"]["torch"]
    parts = found["parts"]
    assert list(parts) == [item.name for item in gpu_suite.PARTS]
    skipped = parts.pop("tests")
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no CUDA device")
    assert skipped["result"]["counts"]["skipped"] > 50 and not skipped["result"]["counts"]["error"]
    assert {item["status"] for item in parts.values()} <= {"done", "cut"}, parts
    assert all(item["result"] and item["key"] for item in parts.values())
    check_figures(parts)
    text = (output / "gpu_suite.md").read_text()
    assert all(f"| {name} |" in text for name in parts) and "Projection" in text and "python" in text
    assert "Pipelines on one device (no gain there" in text
    assert not list(output.glob(".*"))


def check_figures(parts: dict[str, Any]) -> None:
    """Figures that must hang together."""
    found = {name: item["result"] for name, item in parts.items()}
    ar = found["7b.ar"]
    floor = 1e3 * (ar["weight_bytes"] + ar["cache_bytes"]) / found["bandwidth"]["bytes_per_second"]
    assert ar["floor_milliseconds"] == pytest.approx(floor)
    assert len(found["7b.passes"]["points"]) == len(sizes.TOY.contexts) * len(sizes.TOY.rows)
    trees = {"firp", "hidden_transfer", "medusa"}
    kinds = {*trees, "speed"}
    assert kinds == set(KINDS) == set(found["trained.predictors"]) - {"answers"}
    assert trees <= set(found["replay"]) and "speed" not in {*found["replay"], *found["trained.tune"]}
    assert set(found["trained.exact"]["methods"]) == {"ar", *kinds}
    assert set(found["trained.teacher"]["corpus"]["conversations"]) == {"arithmetic", "gsm8k", "python"}
    assert all(one["identical"] == one["compared"] > 0 for one in found["trained.exact"]["methods"].values())
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


def test_a_failing_part_is_recorded_and_the_others_go_on(
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
    assert gpu_suite.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    assert [found[name]["status"] for name in found] == ["failed", "done", "skipped"]
    assert found["first"]["error"] == "RuntimeError: out of luck" and found["first"]["result"] == {"before": 1}
    assert any("raise RuntimeError" in line for line in found["first"]["traceback"])
    assert found["third"]["reason"] == "first brought nothing"
    text = (tmp_path / "gpu_suite.md").read_text()
    assert "**first failed:** RuntimeError: out of luck" in text and "## Things" in text
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[:3]] == ["first", "second", "third"] and "2 things" in printed[1]


def test_a_part_that_overruns_is_stopped_and_keeps_what_it_found(shared: Shared, monkeypatch: Any) -> None:
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


def test_what_does_not_fit_is_skipped_or_cut(shared: Shared) -> None:
    def choosy(shared: Shared, work: Work) -> None:
        work.values["small"] = work.clock.allows(0.5, "a small thing")
        work.values["large"] = work.clock.allows(50, "a large thing")

    _, record = run_part(part(choosy), shared, 2.0, 0.0, [])
    assert record["result"] == {"small": True, "large": False}
    assert (record["status"], record["cuts"]) == ("cut", ["a large thing: needs about 50 s, 2 s left"])
    _, record = run_part(part(choosy), shared, 2.0, 5.0, [])
    assert (record["status"], record["reason"]) == ("skipped", "needs at least 5 s, 2 s left")
    assert Clock(3.0).left() == pytest.approx(3.0, abs=0.1)


def test_shares_are_of_what_is_left() -> None:
    one, two, three = (Part(str(share), lambda *_: None, share) for share in (10, 20, 30))
    assert allowed(one, [two, three], 120) == pytest.approx(20)
    assert allowed(two, [three], 115) == pytest.approx(46)  # what the first did not use falls to the others
    assert allowed(three, [], 40) == 40
    assert allowed(three, [], -3) == 0


def test_parts_come_with_what_they_need() -> None:
    def names(wanted: list[str] | None) -> list[str]:
        return [item.name for item in select(gpu_suite.PARTS, wanted)]

    assert names(["replay"]) == ["trained.teacher", "trained.predictors", "trained.bench", "replay"]
    assert names(["1b", "bandwidth"])[:2] == ["bandwidth", "1b.ar"] and len(names(["1b"])) == 6
    assert names(None) == [item.name for item in gpu_suite.PARTS]
    with pytest.raises(ValueError, match="no part bandwith; there are bandwidth, tests"):
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


def test_the_same_packages_give_the_same_text(tmp_path: Path) -> None:
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


def test_text_is_rendered_as_the_template_does(tmp_path: Path) -> None:
    found = corpus.gather(50, 30_000, 4, None, sources(tmp_path))
    tokenizer = build_tokenizer(map(corpus.render, found.mixed()), 400)
    assert 300 < len(tokenizer) <= 400
    for conversation in found.mixed()[:20]:
        text = corpus.render(conversation)
        assert text == tokenizer.apply_chat_template(conversation, tokenize=False)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_projection_adds_up_the_steps_at_their_contexts() -> None:
    step = replay.between(100, 200, 4.0, 6.0)  # 0.02 ms more for every token
    plain = replay.between(100, 200, 2.0, 3.0)
    found = replay.project([100], [[3, 2]], step, plain)
    assert (found.tokens, found.steps, found.accepted_length) == (5, 2, 2.5)
    assert found.milliseconds == pytest.approx(4.0 + 4.06)
    assert found.ar_milliseconds == pytest.approx(sum(2 + 0.01 * number for number in range(5)))
    assert found.speedup == pytest.approx(10.1 / 8.06)
    constant = replay.project([10, 900], [[1, 4], [2]], lambda _: 2.0, lambda _: 1.0)
    assert constant.speedup == pytest.approx((7 / 3) / 2)
    traces = [Traced("firp", TreeSpec("none", 1), [100, 120], [[1], [300]])]
    assert replay.contexts(traces) == (100, 420)
    assert replay.contexts([Traced("firp", TreeSpec("none", 1), [10], [[1]])]) == (64, 128)


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


def test_outcomes_are_counted_also_of_a_run_that_was_stopped() -> None:
    assert gpu_tests.counts(OUTPUT) == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert gpu_tests.counts(SEVERAL) == {"passed": 1, "failed": 0, "error": 1, "skipped": 0}
    for output, status, error in ((OUTPUT, 1, Failed), ("", 2, Failed), ("", 5, Skipped)):
        work = Work(Clock(5.0), {"status": status, "counts": gpu_tests.counts(output)})
        with pytest.raises(error):
            gpu_tests.report(work, output, cuda=False)
    assert "tests/test_gpu.py" in gpu_tests.marked_files(ROOT)
    assert "tests/test_gpu_suite.py" not in gpu_tests.marked_files(ROOT)


@pytest.mark.parametrize(("shape", "billions"), [(sizes.SHAPE_7B, 7.25), (sizes.SHAPE_1B, 1.24)])
def test_the_shapes_are_as_large_as_they_are_called(shape: sizes.Shape, billions: float) -> None:
    model = shapes.empty_model(shape | shapes.NO_TOKENS, torch.device("meta"), torch.bfloat16)
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.config.eos_token_id is None


def test_a_step_reads_all_weights_but_the_embedding_rows() -> None:
    for family in ("llama", "llama-tied"):
        teacher = tiny_teacher(family)
        every = sum(value.numel() for value in teacher.model.parameters())
        looked_up = teacher.vocab_size * teacher.hidden_size * (family == "llama")
        assert shapes.weight_bytes(teacher) == 4 * (every - looked_up)
    assert shapes.cache_bytes(tiny_teacher("llama"), 10) == 2 * 4 * 2 * 12 * 10 * 4


def test_a_random_teacher_is_made_once_and_given_back(shared: Shared) -> None:
    first = shapes.shaped(shared, "7b")
    assert shapes.shaped(shared, "7b") is first and first.eos_token_ids == ()
    assert shapes.shaped(shared, "1b") is not first
    shared.free(shapes.RANDOM)
    assert not shared.found


def test_every_kind_has_a_predictor_and_those_of_pipelines_come_last_and_briefly() -> None:
    for layers in (4, 12, 32):
        assert list(shapes.sections(layers)) == list(KINDS)
    teacher = tiny_teacher("llama")
    made = {
        kind: shapes.random_predictor(teacher, section)
        for kind, section in shapes.sections(teacher.num_layers, steps=2).items()
    }
    assert [kind for kind in made if share(made[kind]) < 1] == ["speed"]
    assert made["speed"].pipeline == (2, 3, 4)
    states = {layer: torch.zeros(3, 2) for layer in range(5)}
    answer = Written(torch.arange(3), torch.ones(3), torch.zeros(3, 2), states)
    for predictor in made.values():
        (own,) = stored([answer], predictor)
        assert set(own.hidden) == set(predictor.required_layers) and own.input_ids is answer.input_ids


def test_tuning_does_what_its_time_allows() -> None:
    whole, brief = (tune_settings(sizes.FULL, seconds, short) for seconds, short in ((25.0, False), (8.0, True)))
    assert (whole.batches, whole.trial, whole.seconds) == ((1, 8), True, 5.0)
    assert (brief.batches, brief.trial, brief.seconds) == ((1,), False, pytest.approx(1.6))


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "_attend": "attention",
        "nvjet_tst_128x8_64x12_1x2_h_bz_TNT": "matrix products",
        "void gemvNSP_kernel<__nv_bfloat16>": "matrix products",
        "void at::native::index_copy_kernel": "K/V, copies, gathers",
        "Memcpy DtoD (Device -> Device)": "K/V, copies, gathers",
        "void at::native::vectorized_layer_norm_kernel": steps.OTHER,
    }
    assert {name: steps.kind_of(name) for name in names} == names
