"""Recipes: refusals name file, line, key and the nearest key; bases are merged; every shipped recipe loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from firp_cli.assets import embedded_folder, shipped_recipes
from firp_cli.config import FirpConfig, FirpPlusConfig, MedusaConfig, SpeedConfig
from firp_cli.errors import RecipeError
from firp_cli.recipe import dump_recipe, load_recipe

GOOD = """\
teacher: {model: arithmetic}
data:
  dataset: gsm8k
predictor: {kind: firp, layer: 3}
training:
  epochs: 2
"""

SPEED = """\
teacher: {model: arithmetic, looped: {prelude: 1, block: 2, coda: 1, loops: 3}}
predictor: {kind: speed, exits: [1, 2], exit_weights: [1.0, 3.0]}
"""


def refusal(tmp_path: Path, text: str, overrides: list[str] | None = None) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "recipe.yaml")


def test_recipe_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(str(path), ["training.learning_rate=1e-4", "predictor.steps=2", "data.limit=7", "store=there"])
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.epochs == 2
    assert recipe.predictor is not None
    assert recipe.predictor.transfer_layers == (3, 3)
    assert recipe.data.limit == 7
    assert recipe.store == "there"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(str(again)) == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (GOOD + "  epoch: 3\n", [], "recipe.yaml:7: key training.epoch: unknown key; did you mean 'epochs'?"),
        (GOOD + "  epochs: 3\n", [], "recipe.yaml:7: duplicate key training.epochs (first on line 6)"),
        (GOOD.replace("epochs: 2", "epochs: many"), [], "recipe.yaml:6: key training.epochs"),
        (GOOD.replace("epochs: 2", "epochs: 0"), [], "greater than or equal to 1"),
        (
            GOOD.replace("layer: 3", "layr: 3"),
            [],
            "recipe.yaml:4: key predictor.layr: unknown key; did you mean 'layer'?",
        ),
        (GOOD.replace("kind: firp", "kind: fipr"), [], "unknown predictor kind 'fipr'; did you mean 'firp'?"),
        (GOOD.replace("layer: 3", "layer: 3, steps: 0"), [], "predictor.steps"),
        (GOOD + "trainer: {}\n", [], "recipe.yaml:7: key trainer: unknown key; did you mean 'training'?"),
        (GOOD, ["training.epoch=3"], "command line, key training.epoch: unknown key; did you mean 'epochs'?"),
        (GOOD, ["training.epochs=x"], "command line, key training.epochs"),
        (GOOD, ["training"], "section.field=value"),
        ("teacher: {model: [}\n", [], "recipe.yaml:1: not valid YAML"),
        ("- 1\n", [], "mapping of sections"),
        (GOOD.replace("{kind: firp, layer: 3}", "{kind: hidden_transfer, layers: [3, 2]}"), [], "must not descend"),
        (SPEED, ["predictor.exits=[2, 1]"], "exits must ascend: [2, 1]"),
        (SPEED, ["predictor.exits=[1, 1]"], "exits must ascend: [1, 1]"),
        (SPEED, ["predictor.exits=[0, 1]"], "predictor.exits.0"),
        (SPEED, ["predictor.exits=[]"], "at least 1 item"),
        (SPEED, ["predictor.exit_weights=[1.0]"], "exit_weights need exits, one weight for each"),
        (SPEED, ["predictor.exits=null"], "exit_weights need exits, one weight for each"),
        (SPEED, ["predictor.exit_weights=[1.0, 0.0]"], "predictor.exit_weights.1"),
        (SPEED, ["predictor.threshold=1.0"], "less than 1"),
        (SPEED, ["predictor.threshold=0.0"], "greater than 0"),
        (SPEED, ["predictor.loops=0"], "predictor.loops"),
        (SPEED, ["predictor.exit=[1]"], "key predictor.exit: unknown key; did you mean 'exits'?"),
        (SPEED, ["teacher.looped={block: 2, loops: 0}"], "teacher.looped.loops"),
        (SPEED, ["teacher.looped={loops: 2}"], "teacher.looped.block"),
        (SPEED, ["teacher.looped.prelude=-1"], "teacher.looped.prelude"),
        (SPEED, ["teacher.looped.norm=true"], "key teacher.looped.norm: unknown key"),
        ("# nothing\n", [], "recipe.yaml: the recipe is empty"),
        ("data: &a {limit: *a}\n", [], "an alias (*) stands inside its own anchor (&)"),
        ("collect: {vllm: &a [*a]}\n", [], "an alias (*) stands inside its own anchor (&)"),
        ('store: ""\n', [], "recipe.yaml:1: key store: expected a text that is not empty"),
        (GOOD.replace("epochs: 2", "epochs: true"), [], "recipe.yaml:6: key training.epochs: expected a number"),
        (GOOD.replace("layer: 3", "layer: yes"), [], "key predictor.layer: expected a number (got True)"),
        (GOOD, ["data.limit=yes"], "command line, key data.limit: expected a number"),
        (GOOD, ["training.zero_stage=on"], "training.zero_stage: expected a number"),
        (GOOD, ["training.seed=true"], "training.seed: expected a number"),
        (GOOD, ["data.limit=1:30"], "valid integer"),
        (GOOD, ["training.step_decay=1:30.5"], "valid number"),
        (GOOD, ["training.step_decay=.inf"], "finite number"),
        (GOOD, ["training.ridge_lambda=inf"], "finite number"),
        (GOOD, ["data.limit= "], "has no value; data.limit=null stands for none"),
        ("data: {limit: 3}\n", ["data.limit=null", "data.sample=3"], "command line, key data: sample chooses"),
    ],
)
def test_faulty_recipe_is_refused(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    assert expected in refusal(tmp_path, text, overrides)


def test_numbers_are_decimal_and_home_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML 1.1 reads 010 as 8 and 12:30 as 750; text that looks like a number survives a round trip."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {limit: 010, split: 12:30, data_dir: ~/sets}\nteacher: {revision: 007}\nstore: ~/x\n")
    recipe = load_recipe(str(path), ["training.learning_rate=1e-3", "data.max_length=0x10"])
    assert (recipe.data.limit, recipe.data.split, recipe.teacher.revision) == (10, "12:30", "007")
    assert (recipe.store, recipe.data.data_dir) == (f"{tmp_path}/x", f"{tmp_path}/sets")
    assert (recipe.training.learning_rate, recipe.data.max_length) == (1e-3, 16)
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


def test_speed_recipe_describes_loops(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SPEED)
    recipe = load_recipe(str(path), ["predictor.threshold=0.5"])
    predictor, looped = recipe.predictor, recipe.teacher.looped
    assert isinstance(predictor, SpeedConfig)
    assert looped is not None
    assert (predictor.exit_loops(3), predictor.threshold, predictor.loops) == ((1, 2), 0.5, None)
    assert SpeedConfig(kind="speed").exit_loops(4) == (1, 2, 3)
    assert SpeedConfig(kind="speed").exit_loops(1) == ()
    assert (looped.unique, looped.effective, looped.boundaries) == (4, 8, (3, 5, 7))
    assert looped.order == (0, 1, 2, 1, 2, 1, 2, 3)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(str(again)) == recipe


def test_required_layers_follow_the_exits() -> None:
    class Four:
        def boundaries(self, loops: int | None) -> tuple[int, ...]:
            assert loops == 4
            return (3, 5, 7, 9)

    def layers(exits: list[int] | None) -> tuple[int, ...]:
        return SpeedConfig(kind="speed", loops=4, exits=exits).required_layers(Four())

    assert layers(None) == (3, 5, 7)
    assert layers([1, 3]) == (3, 7)
    assert layers([2]) == (5,)


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load_recipe("dem")


@pytest.mark.parametrize("path", sorted(embedded_folder("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_is_short_and_resolves(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert len(path.read_text().splitlines()) <= 25
    assert "_" not in path.stem
    if path.stem in shipped_recipes():
        assert recipe.predictor is not None and recipe.store and recipe.output
    dump = dump_recipe(recipe)
    assert not re.search("^base:", dump, re.MULTILINE)
    (tmp_path / "whole.yaml").write_text(dump)
    assert load_recipe(str(tmp_path / "whole.yaml")) == recipe


def test_old_recipe_name_is_accepted_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert load_recipe("demo-hidden_transfer") == load_recipe("demo-hidden-transfer")
    (record,) = caplog.records
    assert record.name == "firp" and "now named demo-hidden-transfer" in record.getMessage()


def derived(tmp_path: Path, files: dict[str, str]) -> str:
    """Write recipe files and return the path of the first one."""
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return str(tmp_path / f"{next(iter(files))}.yaml")


def test_base_is_merged_key_by_key(tmp_path: Path) -> None:
    top = "base: sub/middle.yaml\npredictor: {steps: 2}\nstore: mine\n"
    middle = "base: ../bottom.yaml\ntraining: {epochs: 3}\ncollect: {vllm: {seed: 1}}\n"
    bottom = GOOD + "collect: {responder: vllm, vllm: {max_model_len: 9}}\nstore: theirs\n"
    path = derived(tmp_path, {"top": top, "sub/middle": middle, "bottom": bottom})
    recipe = load_recipe(path, ["training.seed=5"])
    assert (recipe.training.epochs, recipe.training.seed, recipe.data.dataset, recipe.store) == (3, 5, "gsm8k", "mine")
    assert recipe.predictor == FirpConfig(kind="firp", layer=3, steps=2)
    assert (recipe.collect.responder, recipe.collect.vllm) == ("vllm", {"seed": 1})


def test_predictor_of_another_kind_replaces_that_of_the_base(tmp_path: Path) -> None:
    top = "base: demo\npredictor: {kind: medusa}\n"
    recipe = load_recipe(derived(tmp_path, {"top": top}))
    assert recipe.predictor == MedusaConfig(kind="medusa")
    assert recipe.data == load_recipe("demo").data


@pytest.mark.parametrize(
    ("top", "bottom", "expected"),
    [
        ("predictor: {layer: 4}\n", GOOD + "  epoch: 3\n", "bottom.yaml:7: key training.epoch: unknown key"),
        ("predictor: {layr: 4}\n", GOOD, "top.yaml:2: key predictor.layr: unknown key; did you mean 'layer'?"),
        ("training: {epochs: 0}\n", GOOD, "top.yaml:2: key training.epochs: "),
        ("\npredictor: {kind: fipr}\n", GOOD, "top.yaml:3: key predictor.kind: unknown predictor kind"),
        ("predictor: {kind: firp}\n", SPEED, "top.yaml:2: key predictor.layer: required for this predictor kind"),
        ("training: {}\n", SPEED.replace("[1, 2]", "[0, 2]"), "bottom.yaml:2: key predictor.exits.0: "),
        ("teacher: {looped: {loops: 2}}\n", SPEED, "top.yaml:2: key teacher.looped.block: required"),
        ("data: {mode: online}\n", GOOD.replace("tic}", "tic, sharding: zero3}"), "top.yaml: teacher.sharding=zero3"),
        ("", GOOD + "epochs: 3\n", "bottom.yaml:7: key epochs: unknown key"),
        ("", "base: 3\n", "bottom.yaml:1: key base: name a shipped recipe or a file (got 3)"),
        ("", "base: dem\n", "bottom.yaml:1: key base: no recipe file 'dem' and no shipped recipe of that name; did"),
        ("", "base: top.yaml\n", "circle: top.yaml -> bottom.yaml -> top.yaml; remove one `base`"),
        ("", "base: bottom.yaml\n", "circle: top.yaml -> bottom.yaml -> bottom.yaml"),
    ],
)
def test_base_refusals_name_the_file(tmp_path: Path, top: str, bottom: str, expected: str) -> None:
    path = derived(tmp_path, {"top": f"base: bottom.yaml\n{top}", "bottom": bottom})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value).replace(f"{tmp_path}/", "")


def test_base_is_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived(tmp_path, {"here": GOOD})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"there/top\.yaml:1: key base: no recipe file 'here\.yaml'"):
        load_recipe(derived(tmp_path, {"there/top": "base: here.yaml\n"}))


def test_coupling_sections_are_checked(tmp_path: Path) -> None:
    plus = "predictor: {kind: firp-plus, layer: 3, coupling: {form: recurrent, candidates: 9}}\n"
    path = tmp_path / "recipe.yaml"
    for kind in ("firp-plus", "firp_plus"):
        path.write_text(plus.replace("firp-plus", kind))
        predictor = load_recipe(str(path), ["predictor.coupling.share=false", "training.coupling.epochs=0"]).predictor
        assert isinstance(predictor, FirpPlusConfig) and predictor.kind == "firp_plus"
        coupling = predictor.coupling
        assert (coupling.form, coupling.candidates, coupling.share, coupling.width) == ("recurrent", 9, False, None)
    recipe = load_recipe(str(path))
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe and load_recipe(recipe, ["predictor.steps=2"]).predictor is not None
    assert load_recipe(None, ["predictor.kind=firp-plus", "predictor.layer=2"]).predictor == FirpPlusConfig(
        kind="firp_plus", layer=2
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "predictor:\n  kind: firp-plus\n  layer: 3\n  coupling:\n    candidate: 9\n",
            "recipe.yaml:5: key predictor.coupling.candidate: unknown key; did you mean 'candidates'?",
        ),
        (
            "predictor: {kind: medusa, own_head: false, coupling: {from: mlp}}\n",
            "recipe.yaml:1: key predictor.coupling.from: unknown key; did you mean 'form'?",
        ),
        (
            "training:\n  coupling:\n    epoch: 3\n",
            "recipe.yaml:3: key training.coupling.epoch: unknown key; did you mean 'epochs'?",
        ),
        ("predictor: {kind: firp_plus, layer: 3, coupling: {form: gru}}\n", "key predictor.coupling.form"),
        ("predictor: {kind: firp_plus, layer: 3, coupling: {width: 0}}\n", "greater than or equal to 1"),
        ("predictor: {kind: firp, layer: 3, coupling: {}}\n", "key predictor.coupling: unknown key"),
        ("predictor: {kind: firp-pluss, layer: 3}\n", "did you mean 'firp_plus'?"),
    ],
)
def test_coupling_errors_name_the_nearest_key(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize(("value", "kind"), [("2024-07-26", "date"), ("2024", "int"), ("1.5", "float")])
def test_text_that_yaml_reads_as_another_value_is_to_be_quoted(value: str, kind: str) -> None:
    with pytest.raises(RecipeError, match=f"YAML reads a {kind}") as refused:
        load_recipe(None, [f"output={value}"])
    (word,) = shlex.split(str(refused.value)[str(refused.value).index("output='") :].rstrip(")"))
    assert load_recipe(None, [word]).output == value
