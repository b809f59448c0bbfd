"""A pipeline over several processes (gloo): the same tokens as in one."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.distributed.launch import relayed_errors, start
from firp_cli.errors import UsageError
from firp_cli.machine import rank, world_size
from firp_cli.teacher.load import wrap_model
from helpers.models import make_predictor, random_prompts, tiny_model, tiny_teacher
from helpers.rank_pool import RankPool

TOKENS = 12
# one group per stage; three groups of four layers (2, 1, 1), an exit left out, a threshold; lean layers or not
CASES: list[tuple[str, bool, float, dict[str, Any]]] = [
    ("llama", True, 0.0, {"loops": 4}),
    ("qwen2-window", True, 0.0, {"loops": 3, "threshold": 0.3}),
    ("llama", False, 0.0, {"loops": 4}),
    ("llama", False, 1.0, {"loops": 4, "exits": [2]}),
]


def decoded(number: int, size: int) -> list[dict[str, Any]]:
    """Tokens and ticks of every case, as rank `number` of `size` finds them."""
    found = []
    prompts = random_prompts(3, seed=5, low=1, high=9)
    for family, lean, temperature, section in CASES:
        teacher = tiny_teacher(family, lean)
        predictor = make_predictor(teacher, kind="speed", **section)
        part = PipelineStages(predictor.loops, number, size)
        sampling = {"temperature": temperature, "seed": 3}
        engine = PipelineEngine(teacher, predictor, guard=False, stages=part, prefill_chunk=4, **sampling)
        generations = engine.generate(prompts, TOKENS)
        ticks = [item.pipeline.ticks for item in generations if item.pipeline]
        found.append({"tokens": [item.token_ids for item in generations], "ticks": ticks})
    return found


def test_bench_over_ranks_asks_every_turn(ranks: RankPool, tmp_path: Path) -> None:
    """The second rank follows with the pipeline's own answers, in batches that a conversation leaves earlier."""
    talks = [["What is 3 plus 4?", "And 2 more?"], ["What is 9 minus 2?"], ["What is 5 times 3?", "Is it?", "Sure?"]]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    command = [
        "bench",
        "speed",
        "--methods",
        "ar,speed",
        "--repeats",
        "1",
        "--max-new-tokens",
        "9",
        "--batch-size",
        "2",
    ]
    command += ["--dataset", str(tmp_path / "talks.jsonl"), "--output", str(tmp_path / "out")]
    assert ranks.run(command, 2, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-2000:]
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    for row in report["rows"]:
        assert (row["prompts"], row["turns"]) == (3, 6)
        assert row["method"] == "ar" or (row["lossless"]["compared"], row["lossless"]["identical"]) == (3, 3)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_write_the_tokens_of_one_process(ranks: RankPool, count: int, tmp_path: Path):
    """Every rank works on its own groups of layers and ends with the same tokens, in as many ticks; sampling too, since
    the last rank alone draws.
    """
    codes = ranks.run([str(tmp_path)], count, tmp_path / "log", script=Path(__file__))
    assert codes == [0] * count, (tmp_path / "log").read_text()
    alone = decoded(0, 1)
    for number in range(count):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == alone


def test_the_stages_are_shared_out():
    for loops in (1, 2, 3, 5, 8):
        for size in range(1, loops + 1):
            parts = [PipelineStages(loops, number, size) for number in range(size)]
            assert [stage for part in parts for stage in part.mine] == list(range(loops))
            lengths = [len(part.mine) for part in parts]
            assert max(lengths) - min(lengths) <= 1
            boundaries = tuple(range(2, 2 * loops + 1, 2))
            layers = [layer for part in parts for layer in part.layers(boundaries, 2 * loops)]
            assert layers == list(range(2 * loops))
    with pytest.raises(UsageError, match="has 2 stages, so at most 2"):
        PipelineStages(2, 0, 3)


def test_a_rank_keeps_its_layers_only():
    teacher = wrap_model(copy.deepcopy(tiny_model("llama")), name="whole")
    whole = sum(parameter.numel() for parameter in teacher.model.parameters())
    fingerprint = teacher.fingerprint
    teacher.release(range(1, 3))
    assert teacher.fingerprint == fingerprint
    left = sum(parameter.numel() for parameter in teacher.model.parameters())
    layer = sum(parameter.numel() for parameter in teacher.layers[1].parameters())
    assert whole - left == 2 * layer


def test_draft_trees_decode_on_one_device():
    teacher = tiny_teacher("llama")
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    with pytest.raises(UsageError, match="firp decodes on one device"):
        make_engine(teacher, predictor, rank=0, ranks=2)


def main() -> None:
    """What each launched rank does."""
    with relayed_errors():
        start()
        values = decoded(rank(), world_size())
        (Path(sys.argv[1]) / f"{rank()}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
