"""tree.json: trees by machine, teacher, temperature, batch size and context."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firp_cli.decoding.tree_file import TunedTrees, described, read_trees, spec_of, update_trees
from firp_cli.decoding.tree_spec import TreeSpec, default_tree, parse_tree, static_tree
from firp_cli.errors import UsageError
from firp_cli.results import Prediction, as_json
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TREES_SCHEMA, TunedTree
from helpers.models import make_predictor

HERE: dict[str, Any] = {"device": "a CPU", "threads": 2, "graphs": False}
THERE: dict[str, Any] = {**HERE, "threads": 4}
DEFAULT = parse_tree("dynamic:8", 4)


def entry(batch: int = 1, tree: str = "dynamic:6", **fields: Any) -> TunedTree:
    given = {"machine": HERE, "teacher": "abc", "context": 128, "temperature": 0.0, **fields}
    return TunedTree(batch_size=batch, tree=tree, predicted=Prediction(2.5, 2.0, 1.0, 1.25), **given)


def trees(*entries: TunedTree) -> TunedTrees:
    return TunedTrees(DEFAULT, 4, entries)


@pytest.mark.parametrize(
    ("batch", "context", "tree"),
    [
        (1, 128, "dynamic:11"),
        (1, 1, "dynamic:11"),
        (2, 128, "dynamic:14"),  # as far from 1 as from 4: the larger one
        (3, 128, "dynamic:14"),
        (8, 128, "dynamic:26"),
        (1000, 128, "dynamic:26"),
        (1, 361, "dynamic:11"),
        (1, 363, "dynamic:21"),
        (1, 362, "dynamic:11"),
        (4, 9999, "dynamic:14"),
    ],
)
def test_entry_is_the_nearest_by_factors(batch: int, context: int, tree: str) -> None:
    """Batch sizes 1, 4, 16; the size decides first, then the context, 128 or 1024 for a single sequence."""
    tuned = trees(
        entry(1, "dynamic:11"), entry(1, "dynamic:21", context=1024), entry(4, "dynamic:14"), entry(16, "dynamic:26")
    )
    assert str(tuned.at(batch, context)) == tree
    chosen = tuned.entry(batch, context)
    assert chosen is not None and chosen.tree == tree


def test_trees_without_entries_give_the_default() -> None:
    assert trees().at(3, 100) == DEFAULT
    assert trees().entry(3, 100) is None


def test_fitting_keeps_one_machine_and_teacher() -> None:
    all_entries = (entry(1), entry(2, machine=THERE), entry(4, teacher="xyz"), entry(8))
    found = trees(*all_entries).fitting(dict(HERE), "abc", 0.0)
    assert [item.batch_size for item in found.entries] == [1, 8]
    assert (found.default, found.steps) == (DEFAULT, 4)
    assert trees(*all_entries).fitting({}, "abc", 0.0).entries == ()


def test_fitting_does_not_mix_greedy_and_sampling() -> None:
    some = [entry(number, temperature=number / 10) for number in (0, 2, 7, 8)]
    for temperature, expected in ((0.0, 0.0), (0.1, 0.2), (0.4, 0.2), (0.5, 0.7), (0.74, 0.7), (2.0, 0.8)):
        found = trees(*some).fitting(HERE, "abc", temperature)
        assert [item.temperature for item in found.entries] == [expected]
    assert trees(some[0]).fitting(HERE, "abc", 1.0).entries == ()
    assert trees(*some[1:]).fitting(HERE, "abc", 0.0).entries == ()


SPECS = [
    "none",
    "dynamic:8",
    "dynamic:8/3",
    "dynamic:8/3@2",
    "chain",
    "chain@2",
    "chain/2",
    "chain/3@1",
    "static:3x2",
    "static:3x2/3@2",
    "static:1x1",
]


@pytest.mark.parametrize("text", SPECS)
def test_entries_round_trip_their_tree(text: str) -> None:
    spec = parse_tree(text, 4)
    item = replace(entry(), **described(spec))
    assert spec_of(item, 4) == spec
    assert spec_of(TunedTree.from_json(json.loads(json.dumps(as_json(item)))), 4) == spec
    assert (item.nodes, item.steps) == (spec.nodes, spec.steps)


@pytest.mark.parametrize("limits", [{}, {"budget": 2}, {"steps": 3}, {"steps": 4, "budget": 1}])
@pytest.mark.parametrize("name", ["", "own"])
def test_entries_round_trip_paths_without_a_shape(name: str, limits: dict[str, int]) -> None:
    spec = replace(static_tree([(0,), (1,), (0, 0), (0, 2), (0, 0, 0)], 4, name), **limits)  # type: ignore[arg-type]
    assert spec_of(replace(entry(), **described(spec)), 4) == spec


def test_cut_chain_with_other_steps_is_named_static() -> None:
    cut = parse_tree("chain/2", 4)
    for steps, text in ((2, "chain/2@1"), (3, "static:1x1/3@1"), (None, "static:1x1@1")):
        spec = replace(cut, steps=steps, budget=1)
        assert str(spec) == text
        assert parse_tree(text, 4) == spec == spec_of(replace(entry(), **described(spec)), 4)


def write(path: Path, **value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_read_trees_reads_files_of_every_kind(tmp_path: Path, teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=4)
    file = tmp_path / "tree.json"
    entries = [as_json(entry(1)), as_json(entry(4, "none"))]
    for value, tree, count in (
        ({"tree": "dynamic:5/2@1"}, "dynamic:5/2@1", 0),
        ({"tree": "none"}, "none", 0),
        ({"paths": [[0], [1]], "name": "own"}, "own", 0),
        ({"paths": [[0], [1]], "steps": 3, "budget": 2, "name": "own"}, "own/3@2", 0),
        ({"entries": entries}, "dynamic:8", 2),
        ({"schema": TREES_SCHEMA, "tree": "chain", "entries": entries}, "chain", 2),
        ({"schema": TREES_SCHEMA, "paths": [[0]], "name": "two", "entries": entries}, "two", 2),
    ):
        write(file, **value)  # type: ignore[arg-type]
        found = read_trees(file, 4)
        assert (str(found.default), len(found.entries), found.steps) == (tree, count, 4)
        assert default_tree(tmp_path, predictor) == parse_tree(str(file), 4) == found.default
        assert [str(found.at(batch, 9)) for batch in (1, 4)] == (["dynamic:6", "none"] if count else [tree, tree])


GOOD: dict[str, Any] = as_json(entry())
DAMAGED: list[tuple[Any, str]] = [
    ("[1, 2]", "is not a tree file: it needs `tree` "),
    ("{", "is not a tree file .*: it needs `tree` "),
    ({}, "is not a tree file: it needs"),
    ({"tree": 8}, "`tree` must be a spec such as dynamic:8, not 8"),
    ({"tree": "spiral"}, "tree.json: no tree 'spiral'"),
    ({"tree": "dynamic:8/5"}, "give the number of draft steps after /, 1 to 4"),
    ({"paths": [["x"]]}, "`paths` must be lists of candidate positions"),
    ({"paths": 3}, "`paths` must be lists of candidate positions"),
    ({"paths": []}, "a tree without paths drafts nothing"),
    ({"paths": [[0]], "steps": 5}, "`steps` must be 1 to 4 and `budget` at least 1"),
    ({"paths": [[0]], "budget": 0}, "`steps` must be 1 to 4 and `budget` at least 1"),
    ({"paths": [[0], [0, 0]], "steps": 1}, "is 2 deep, it needs at least as many draft steps"),
    ({"entries": {}}, "schema firp.trees/1 `entries` is a list"),
    ({"paths": [[float("inf")]]}, "`paths` must be lists of candidate positions"),
    ("[" * 100_000, "nested too deeply"),
    ({"schema": "firp.trees/9", "entries": []}, "has schema 'firp.trees/9', this firp reads"),
    ({"entries": [3]}, r"entry 0 is damaged \(.*\): `firp tune` writes a new one"),
    ({"entries": [GOOD, {"tree": "chain"}]}, "entry 1 is damaged"),
    ({"entries": [{**GOOD, "predicted": None}]}, "entry 0 is damaged"),
    ({"entries": [{**GOOD, "batch_size": "1"}]}, "entry 0 is damaged"),
    ({"entries": [{**GOOD, "colour": 1}]}, "entry 0 is damaged"),
    ({"entries": [GOOD, {**GOOD, "tree": "dynamic:1"}]}, "entry 1: .*no tree 'dynamic:1'"),
    ({"entries": [{**GOOD, "tree": "tuned:2", "paths": [[0, 0]]}]}, "entry 0: .*lacks its parent"),
]


@pytest.mark.parametrize(("value", "message"), DAMAGED)
def test_damaged_file_is_refused_in_one_line(value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UsageError, match=message) as caught:
        read_trees(file, 4)
    assert "\n" not in str(caught.value)
    assert "tree.json" in str(caught.value)


def test_folder_or_broken_link_is_no_tree_file(tmp_path: Path) -> None:
    predictor = SimpleNamespace(steps=4)
    assert str(default_tree(tmp_path, predictor)) == "dynamic:8"  # type: ignore[arg-type]
    (tmp_path / "tree.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"tree.json is not a tree file .*No such file"):
        default_tree(tmp_path, predictor)  # type: ignore[arg-type]
    (tmp_path / "tree.json").unlink()
    (tmp_path / "tree.json").mkdir()
    with pytest.raises(UsageError, match=r"tree.json is not a tree file .*Is a directory"):
        default_tree(tmp_path, predictor)  # type: ignore[arg-type]


def test_update_replaces_entries_of_the_same_key(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    first = update_trees(file, [entry(1), entry(4)])
    assert first == {"schema": TREES_SCHEMA, "entries": [as_json(entry(1)), as_json(entry(4))]}
    others = [
        entry(1, machine=THERE),
        entry(1, teacher="xyz"),
        entry(1, temperature=0.7),
        entry(1, context=512),
        entry(2),
    ]
    write(file, paths=[[0], [1]], name="own", entries=[as_json(item) for item in (entry(1, "chain"), *others)])
    second = update_trees(file, [entry(1, "dynamic:9", context=140), entry(16, "none")])  # nearly the same context
    assert {name: second[name] for name in second if name != "entries"} == {
        "schema": TREES_SCHEMA,
        "paths": [[0], [1]],
        "name": "own",
    }
    kept = [TunedTree.from_json(item) for item in second["entries"]]
    assert kept == [*others, entry(1, "dynamic:9", context=140), entry(16, "none")]
    write(file, **second)
    assert len(read_trees(file, 4).entries) == 7
    assert update_trees(file, []) == second
    file.write_text("{}")
    with pytest.raises(UsageError, match="not a tree file"):
        update_trees(file, [entry(1)])


@pytest.mark.parametrize("text", SPECS)
def test_specifications_round_trip(text: str) -> None:
    spec = parse_tree(text, 4)
    assert str(spec) == text
    assert parse_tree(str(spec), 4) == spec


@pytest.mark.parametrize(
    ("text", "depth", "drafting"),
    [
        ("none", 0, 0),
        ("dynamic:8", 4, 4),
        ("dynamic:8/3", 3, 3),
        ("dynamic:8/3@2", 3, 3),
        ("dynamic:3", 4, 2),  # two nodes below the root: no path is longer
        ("dynamic:3@1", 4, 4),
        ("chain", 4, 4),
        ("chain/3", 3, 3),
        ("chain/3@1", 3, 3),
        ("static:2x2", 2, 2),
        ("static:2x2@1", 2, 4),
        ("static:2x2@99", 2, 2),
        ("static:2x2/3", 2, 2),
        ("static:2x2/3@1", 2, 3),
    ],
)
def test_drafting_is_the_number_of_needed_steps(text: str, depth: int, drafting: int) -> None:
    spec = parse_tree(text, 4)
    assert (spec.depth(4), spec.drafting(4)) == (depth, drafting)


@pytest.mark.parametrize("run", ["0", "5", "x", "-1", "", "1.5"])
def test_invalid_steps_are_refused(run: str) -> None:
    for shape in ("dynamic:8", "chain", "static:2"):
        with pytest.raises(UsageError, match="give the number of draft steps after /, 1 to 4"):
            parse_tree(f"{shape}/{run}", 4)


def test_limits_that_do_not_fit_are_refused() -> None:
    for bad in ("none/2", "none@1", "none/1@1"):
        with pytest.raises(UsageError, match="none has no draft to limit"):
            parse_tree(bad, 4)
    with pytest.raises(UsageError, match="'static:2x2/1' is 2 deep, it needs at least as many draft steps"):
        parse_tree("static:2x2/1", 4)
    with pytest.raises(UsageError, match=r"no tree 'no/such/tree\.json'"):
        parse_tree("no/such/tree.json", 4)


def test_limits_may_follow_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "tree.json", tree="dynamic:5")
    assert parse_tree(f"{file}/2@3", 4) == TreeSpec("dynamic", 5, budget=3, steps=2)
    own = write(tmp_path / "own.json", paths=[[0], [0, 1]], name="own")
    assert str(parse_tree(f"{own}/3", 4)) == "own/3"
    with pytest.raises(UsageError, match="2 deep"):
        parse_tree(f"{own}/1", 4)
