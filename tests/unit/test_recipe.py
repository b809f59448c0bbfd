"""Recipes: refusals name file, line, key and the nearest key; every shipped recipe loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from firp_cli.assets import shipped_recipes
from firp_cli.config import SpeedConfig
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


def test_good_recipe_and_overrides(tmp_path: Path) -> None:
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
        (GOOD + "  epochs: 3\n", [], "recipe.yaml:7: key training.epochs stands twice (first on line 6)"),
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
    ],
)
def test_refusals(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    assert expected in refusal(tmp_path, text, overrides)


def test_a_speed_recipe_and_its_loops(tmp_path: Path) -> None:
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


def test_required_layers_lie_behind_the_exits() -> None:
    class Four:
        def boundaries(self, loops: int | None) -> tuple[int, ...]:
            assert loops == 4
            return (3, 5, 7, 9)

    def layers(exits: list[int] | None) -> tuple[int, ...]:
        return SpeedConfig(kind="speed", loops=4, exits=exits).required_layers(Four())

    assert layers(None) == (3, 5, 7)
    assert layers([1, 3]) == (3, 7)
    assert layers([2]) == (5,)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load_recipe("dem")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_state_every_field(name: str) -> None:
    """A shipped recipe is also documentation: it names a teacher, data, a predictor, a store and an output."""
    path = shipped_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.predictor is not None
    assert recipe.store and recipe.output
    assert {"teacher", "data", "predictor", "training"} <= set(yaml.safe_load(path.read_text()))
