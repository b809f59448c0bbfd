"""Recipes: typed YAML that says which teacher, data, predictor and training a run uses.

Loading touches no device; unknown, duplicate and mistyped keys are refused with file, line, key and the nearest known
key. Embedded teachers, predictors, data and shipped recipes are found here too, in a checkout or inside a wheel.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from firp_cli.errors import RecipeError

DEFAULT_TEACHER = "arithmetic"
Precision = Literal["auto", "float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A recipe section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoopedSection(Section):
    """A teacher that runs a block of layers several times: `prelude`, then `block` x `loops` in cyclic order, `coda`.

    Layers are counted as *effective* ones everywhere else: `effective` of them, of which `unique` have parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prelude: Annotated[int, Field(ge=0)] = 0  # layers that run once, before the block
    block: PositiveInt  # layers of the block
    coda: Annotated[int, Field(ge=0)] = 0  # layers that run once, behind the block
    loops: PositiveInt  # times that the block runs
    norm_each_loop: bool = False  # the final norm is also applied at the end of every loop (Ouro)

    @property
    def unique(self) -> int:
        return self.prelude + self.block + self.coda

    @property
    def effective(self) -> int:
        return self.prelude + self.block * self.loops + self.coda

    @property
    def order(self) -> tuple[int, ...]:
        """The unique layer that each effective layer is."""
        block = range(self.prelude, self.prelude + self.block)
        return (*range(self.prelude), *block, *(self.loops - 1) * tuple(block), *range(block.stop, self.unique))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Effective layers that have run at the end of loops 1..loops."""
        return tuple(self.prelude + self.block * loop for loop in range(1, self.loops + 1))


class TeacherConfig(Section):
    """The frozen language model."""

    model: str = DEFAULT_TEACHER  # folder, hub id, .gguf file, or the name of an embedded or known teacher
    gguf_file: str | None = None  # a GGUF file in that folder or hub repository
    revision: str | None = None  # hub revision
    dtype: Precision = "auto"  # auto: the dtype in the model's own config
    device_map: str | dict[str, str | int] | None = None  # transformers' device_map; null: one device
    sharding: Literal["none", "zero3"] = "none"  # zero3: each rank keeps a part of every matrix (DeepSpeed ZeRO-3)
    trust_remote_code: bool = False  # run code that comes with the model
    looped: LoopedSection | None = None  # which layers run several times; null: as the model's config says

    @model_validator(mode="after")
    def _one_way(self) -> TeacherConfig:
        if self.sharding == "zero3" and self.device_map is not None:
            raise ValueError(
                "sharding=zero3 shares layers out over ranks, device_map over one process's devices: drop one"
            )
        if self.sharding == "zero3" and self.looped is not None:
            raise ValueError("sharding=zero3 does not know looped layers, which every loop needs: leave sharding out")
        return self


class DataConfig(Section):
    """The conversations that hidden states are collected from."""

    dataset: str = DEFAULT_TEACHER  # a known name, a hub id, or a .jsonl file; several with commas
    split: str = "train"
    data_dir: str | None = None  # where NAME/SPLIT.jsonl lies; default: $FIRP_DATA_DIR
    limit: PositiveInt | None = None  # conversations at most, of each data set
    max_length: PositiveInt = 2048  # tokens per conversation; longer ones are cut
    mode: Literal["cached", "online", "hybrid"] = "cached"  # states from the store, made on the fly, or kept once made
    regenerate: bool = False  # the teacher writes its own answers to the prompts
    max_new_tokens: PositiveInt = 512  # length of a regenerated answer at most
    batch_size: PositiveInt = 32  # prompts answered at once when regenerating
    pack_tokens: PositiveInt = 2048  # tokens packed into one teacher forward while collecting
    shard_tokens: PositiveInt = 65536  # tokens per shard file
    store_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"] = "auto"  # auto: the teacher's


class CollectConfig(Section):
    """How a store is filled, where that decides nothing of what stands in it."""

    responder: Literal["engine", "vllm"] = "engine"  # who writes regenerated answers: firp's engine, or vLLM
    vllm: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of vllm.LLM, as tensor_parallel_size


class Looping(Protocol):
    """What a predictor section asks of a teacher: the effective layers that have run at the end of each loop."""

    def boundaries(self, loops: int | None) -> tuple[int, ...]: ...


class PredictorSection(Section):
    """Fields that every predictor kind has."""

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        """t_1..t_k, empty for kinds without pseudo states."""
        return ()

    def required_layers(self, teacher: Looping) -> tuple[int, ...]:
        """The layers that a store must hold beside the final state."""
        return self.transfer_layers[:1]


class FirpConfig(PredictorSection):
    """FIRP (arXiv 2410.20488): all k steps enter at one layer."""

    kind: Literal["firp"]
    layer: PositiveInt  # transfer layer t, 1 <= t <= L-1
    steps: PositiveInt = 4  # k
    bias: bool = False

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        return (self.layer,) * self.steps


class HiddenTransferConfig(PredictorSection):
    """Hidden Transfer (arXiv 2404.12022): step i enters at layers[i-1]."""

    kind: Literal["hidden_transfer"]
    layers: Annotated[list[PositiveInt], Field(min_length=1)]  # t_1 <= t_2 <= ... <= t_k
    bias: bool = False

    @model_validator(mode="after")
    def _ascending(self) -> HiddenTransferConfig:
        if self.layers != sorted(self.layers):
            raise ValueError(f"layers must not descend: {self.layers}")
        return self

    @property
    def steps(self) -> int:
        return len(self.layers)

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        return tuple(self.layers)


class MedusaConfig(PredictorSection):
    """Medusa (arXiv 2401.10774): residual heads on the final state, the baseline predictor."""

    kind: Literal["medusa"]
    steps: PositiveInt = 4  # heads
    resblocks: PositiveInt = 1  # residual blocks per head
    own_head: bool = True  # a vocabulary matrix per head, as in the paper; false: the teacher's head


class SpeedConfig(PredictorSection):
    """SPEED (arXiv 2310.12072): exit heads behind early loops start the next tokens in a pipeline."""

    kind: Literal["speed"]
    loops: PositiveInt | None = None  # groups that the layers of a teacher without sharing form; null: its own loops
    exits: Annotated[list[PositiveInt], Field(min_length=1)] | None = None  # loops that predict; null: all but the last
    exit_weights: list[Annotated[float, Field(gt=0)]] | None = None  # loss weight of each exit; null: its loop's number
    bias: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None  # a token starts only from a surer prediction

    @model_validator(mode="after")
    def _ascending(self) -> SpeedConfig:
        if self.exits is not None and self.exits != sorted(set(self.exits)):
            raise ValueError(f"exits must ascend: {self.exits}")
        if self.exit_weights is not None and (self.exits is None or len(self.exit_weights) != len(self.exits)):
            raise ValueError("exit_weights need exits, one weight for each")
        return self

    def exit_loops(self, loops: int) -> tuple[int, ...]:
        """The loops that predict, of a teacher that runs `loops` of them."""
        return tuple(range(1, loops)) if self.exits is None else tuple(self.exits)

    def required_layers(self, teacher: Looping) -> tuple[int, ...]:
        boundaries = teacher.boundaries(self.loops)
        return tuple(boundaries[loop - 1] for loop in self.exit_loops(len(boundaries)) if loop < len(boundaries))


PredictorConfig = FirpConfig | HiddenTransferConfig | MedusaConfig | SpeedConfig
KINDS: dict[str, type[PredictorSection]] = {
    get_args(config.model_fields["kind"].annotation)[0]: config for config in get_args(PredictorConfig)
}


class TrainingConfig(Section):
    """Optimisation of the predictor."""

    init: Literal["ridge", "identity", "random"] = "ridge"
    ridge_lambda: Annotated[float, Field(gt=0)] = 1.0e-2  # relative to the mean diagonal of sum x x^T
    loss: Literal["kl", "cross_entropy", "total_variation"] = "kl"
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0  # weight of a smooth-L1 term on the final states
    step_decay: Annotated[float, Field(gt=0)] = 0.8  # w_i = step_decay^(i-1)
    anchors_per_sequence: PositiveInt = 64
    epochs: PositiveInt = 1
    max_steps: Annotated[int, Field(ge=0)] | None = None  # optimizer steps, overrides epochs when smaller; 0: init only
    max_minutes: PositiveFloat | None = None  # wall-clock, from the first step on; ends the run early; null: no limit
    micro_batch_size: PositiveInt = 4  # conversations per rank and forward
    gradient_accumulation: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    validate_every: PositiveInt | None = None  # optimizer steps; null: ten times a run; of max_minutes one a minute
    save_every: PositiveInt | None = None  # optimizer steps between resumable checkpoints; null: with validation
    keep_last: PositiveInt = 2  # resumable checkpoints kept
    keep_best: PositiveInt = 1  # weights of the validations with the longest accepted length kept
    patience: PositiveInt | None = None  # validations without a longer accepted length that end the run; null: none do
    min_improvement: Annotated[float, Field(ge=0)] = 0.0  # tokens by which a longer accepted length must be longer
    balance: bool = True  # micro-batches of like lengths, so that ranks take equally long
    readers: PositiveInt = 1  # threads that read ahead
    preflight: Literal["refuse", "warn", "ignore"] = "refuse"  # what a run does that will not fit its devices
    log_every: PositiveInt = 10
    wandb: str | None = None  # Weights & Biases project; null: TensorBoard and metrics.jsonl alone
    gate_prompts: Annotated[int, Field(ge=0)] = 8  # prompts decoded after training; 0: no gate
    seed: int = 0


class Recipe(Section):
    """A whole run. `store` and `output` are folders, relative to where `firp` runs."""

    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    collect: CollectConfig = Field(default_factory=CollectConfig)
    predictor: Annotated[PredictorConfig, Field(discriminator="kind")] | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    store: str | None = None
    output: str | None = None

    @model_validator(mode="after")
    def _in_step(self) -> Recipe:
        """Ranks that hold one teacher together run it at the same time."""
        if self.teacher.sharding == "zero3" and self.data.mode != "cached":
            raise ValueError(
                f"teacher.sharding=zero3 makes no states while training reads (data.mode={self.data.mode}): "
                "collect a store first and set data.mode=cached"
            )
        if self.teacher.sharding == "zero3" and self.data.regenerate and self.collect.responder == "engine":
            raise ValueError(
                "a teacher of teacher.sharding=zero3 writes no answers (data.regenerate): set collect.responder=vllm"
            )
        return self


def embedded_folder(name: str) -> Path:
    """`data` or `recipes`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_embedded" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"this install lacks its embedded `{name}` folder; reinstall firp")


def teacher_source(model: str) -> str:
    """What `from_pretrained` gets: an existing folder as it is, an embedded teacher's folder, or the hub id."""
    if Path(model).is_dir():
        return model
    embedded = embedded_folder("data") / "teachers" / model
    return str(embedded) if embedded.is_dir() else model


def embedded_teachers() -> list[str]:
    """Names of the teachers whose weights travel with the package."""
    return sorted(path.parent.name for path in (embedded_folder("data") / "teachers").glob("*/config.json"))


def embedded_predictors() -> dict[str, Path]:
    """Predictor folders that travel with the package, by name."""
    folder = embedded_folder("data") / "predictors"
    return {path.name: path for path in sorted(folder.glob("*")) if (path / "config.json").is_file()}


def shipped_recipes() -> dict[str, Path]:
    """Shipped recipe files by name."""
    return {path.stem: path for path in sorted(embedded_folder("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file: a path, or the name of a shipped one. Raises RecipeError with the nearest name."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"no recipe file {name!r} and no shipped recipe of that name{nearest(name, shipped)}")


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` or `; known: a, b`."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def load_recipe(name: str | None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by path or shipped name, apply `section.field=value` overrides, and validate.

    Raises RecipeError naming the file, line and key.
    """
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    origin = "command line"
    if name is not None:
        path = find_recipe(name)
        origin = str(path)
        values, lines = _read_yaml(path.read_text(encoding="utf-8"), origin)
    for override in overrides or []:
        _apply_override(values, lines, override)
    return validate_recipe(values, origin, lines)


def validate_recipe(
    values: dict[str, Any], origin: str = "recipe", lines: dict[tuple[str, ...], int] | None = None
) -> Recipe:
    """A Recipe from plain values. Raises RecipeError naming where the fault stands."""
    predictor = values.get("predictor")
    if isinstance(predictor, dict):
        kind = predictor.get("kind")
        if kind not in KINDS:
            where = _where(origin, lines, ("predictor", "kind") if "kind" in predictor else ("predictor",))
            raise RecipeError(f"{where}: unknown predictor kind {kind!r}{nearest(str(kind), KINDS)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin, lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def _where(origin: str, lines: dict[tuple[str, ...], int] | None, key: tuple[str, ...]) -> str:
    line = (lines or {}).get(key)
    if line == 0:
        return f"command line, key {'.'.join(key)}"
    return f"{origin}:{line}: key {'.'.join(key)}" if line else f"{origin}: key {'.'.join(key)}"


def _explain(error: ValidationError, origin: str, lines: dict[tuple[str, ...], int] | None) -> str:
    """The first fault of a validation error, in the words of the recipe."""
    fault = min(
        error.errors(), key=lambda item: item["type"] != "extra_forbidden"
    )  # a misspelt key explains a missing one
    key = tuple(str(part) for part in fault["loc"])
    if len(key) > 1 and key[0] == "predictor" and key[1] in KINDS:
        key = (key[0], *key[2:])  # pydantic puts the union's tag into the path
    where = _where(origin, lines, key)
    if fault["type"] == "extra_forbidden":
        section: Any = Recipe
        if key[0] in Recipe.model_fields and len(key) > 1:
            section = KINDS.get(str(fault["loc"][1])) or Recipe.model_fields[key[0]].annotation
        if key[:2] == ("teacher", "looped"):
            section = LoopedSection
        return f"{where}: unknown key{nearest(key[-1], section.model_fields)}"
    if fault["type"] == "missing":
        return f"{where}: required{' for this predictor kind' if key[0] == 'predictor' else ''}"
    if isinstance(fault["input"], dict) and fault["type"] == "value_error":  # the fields of a section do not fit
        return f"{where.removesuffix(': key ')}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where}: {fault['msg']} (got {fault['input']!r})"


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Plain values and the line of every key. Raises RecipeError on bad YAML and duplicate keys."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{origin}:{line}: not valid YAML: {error.problem}") from None
    if root is None:
        return {}, {}
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, got {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _walk(root, (), lines, origin)
    return values, lines


def _walk(node: yaml.Node, prefix: tuple[str, ...], lines: dict[tuple[str, ...], int], origin: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(f"{origin}:{line}: key {'.'.join(key)} stands twice (first on line {lines[key]})")
        lines[key] = line
        _walk(value_node, key, lines, origin)


def _apply_override(values: dict[str, Any], lines: dict[tuple[str, ...], int], override: str) -> None:
    name, separator, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not separator or not all(key):
        raise RecipeError(f"override {override!r} is not of the form section.field=value")
    target = values
    for part in key[:-1]:
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {part} is not a section")
        target = inner
    try:
        target[key[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None
    lines[key] = 0  # 0 marks the command line
