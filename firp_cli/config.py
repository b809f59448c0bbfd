"""Configuration of a run as typed sections: teacher, data, collecting, predictor and training.

The comment after a field gives its meaning and unit; "null" is YAML's name of None.
"""

from __future__ import annotations

import json
import os
from datetime import date
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.errors import UsageError


def _number(value: Any) -> Any:
    """Refuse true and false where a number is expected. YAML reads `yes` and `on` as true."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a text that is not empty; leave the field out for its default")
    return value


Precision = Literal["auto", "float32", "bfloat16", "float16"]
Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_number)]
Text = Annotated[str, AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]  # ~ is the home folder, as in a shell
Seed = Annotated[Int, Field(ge=0, lt=1 << 63)]
ColumnRole = Literal["messages", "question", "answer", "input", "system", "tools", "category"]
Fraction = Annotated[Float, Field(ge=0.0, le=1.0)]

LARGEST_TEMPERATURE = 1_000_000  # above it all tokens are equally probable
SMALLEST_TEMPERATURE = 1e-6  # below it logits over the temperature overflow, or lose their differences to rounding


class Section(BaseModel):
    """Recipe section; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoopedSection(Section):
    """Looped teacher, which runs a block of layers several times: `prelude`, `block` x `loops` in cyclic order, `coda`.

    Everywhere else layers are counted as *effective* ones: `effective` of them share the parameters of `unique`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prelude: NonNegativeInt = 0  # number of layers that run once, before the block
    block: PositiveInt  # number of layers in the block
    coda: NonNegativeInt = 0  # number of layers that run once, after the block
    loops: PositiveInt  # number of times that the block runs
    norm_each_loop: bool = False  # apply the final norm also at the end of every loop (Ouro)

    @property
    def unique(self) -> int:
        """Number of layers with parameters."""
        return self.prelude + self.block + self.coda

    @property
    def effective(self) -> int:
        """Number of layers that a token passes."""
        return self.prelude + self.block * self.loops + self.coda

    @property
    def order(self) -> tuple[int, ...]:
        """Number of the unique layer that runs as each effective layer."""
        block = range(self.prelude, self.prelude + self.block)
        return (*range(self.prelude), *block, *(self.loops - 1) * tuple(block), *range(block.stop, self.unique))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of effective layers that have run at the end of loops 1..loops."""
        return tuple(self.prelude + self.block * loop for loop in range(1, self.loops + 1))


class TeacherConfig(Section):
    """Frozen language model."""

    model: PathText = DEFAULT_TEACHER  # folder, hub id, .gguf file, or name of an embedded or known teacher
    gguf_file: Text | None = None  # name of a GGUF file in that folder or hub repository
    revision: Text | None = None  # branch, tag or commit on the hub; null: the main branch
    dtype: Precision = "auto"  # dtype of weights and states; auto: that of the model's config
    device_map: str | dict[str, str | int] | None = None  # placement of layers, as in transformers; null: one device
    sharding: Literal["none", "zero3"] = "none"  # zero3: each rank stores a part of every matrix (DeepSpeed ZeRO-3)
    chat_template: PathText | None = (
        None  # Jinja file or text, or a shipped name (vicuna, plain); null: the tokenizer's
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict
    )  # variables of the chat template, for example enable_thinking; date (YYYY-MM-DD): the day that it prints
    trust_remote_code: bool = False  # run Python code from the model's repository
    looped: LoopedSection | None = None  # layers that run several times; null: as in the model's config

    @field_validator("template_options", mode="before")
    @classmethod
    def _plain_options(cls, options: Any) -> Any:
        """Write dates as text: YAML reads 2025-01-31 as a date, which JSON records cannot contain."""
        if not isinstance(options, dict):
            return options
        if glued := next((name for name in options if ":" in str(name)), None):
            raise ValueError(f"{glued!r} needs a space after its colon: {str(glued).replace(':', ': ', 1)}")
        try:
            json.dumps(options, default=str)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON value: {error}") from None
        return {name: str(value) if isinstance(value, date) else value for name, value in options.items()}

    @model_validator(mode="after")
    def _single_placement(self) -> TeacherConfig:
        if self.sharding == "zero3" and self.device_map is not None:
            raise ValueError(
                "sharding=zero3 puts layers on ranks, device_map on the devices of one process: remove one of them"
            )
        if self.sharding == "zero3" and self.looped is not None:
            raise ValueError("sharding=zero3 does not support looped layers: remove teacher.sharding")
        return self


class DataConfig(Section):
    """Conversations for training and the way their hidden states are stored."""

    dataset: Text = DEFAULT_TEACHER  # known name, hub id (ID:CONFIG), file or folder; several with commas
    split: Text = "train"  # split of the data set
    data_dir: PathText | None = None  # folder with NAME/SPLIT.jsonl; null: $FIRP_DATA_DIR
    columns: dict[ColumnRole, Text] = Field(default_factory=dict)  # names of the columns, as {question: q, answer: a}
    limit: PositiveInt | None = None  # conversations wanted of each data set, skipped rows not counted; null: all
    sample: NonNegativeInt | None = None  # seed of a random choice of `limit` conversations; null: the first ones
    max_odd: Fraction = 0.05  # largest share of rows that are skipped because they cannot be used; more: refused
    max_length: PositiveInt = 2048  # maximum tokens of a conversation; longer ones are cut
    mode: Literal["cached", "online", "hybrid"] = (
        "cached"  # states: from the store, computed while training, or computed once and stored
    )
    regenerate: bool = False  # replace the answers by those that the teacher generates
    turns: Literal["all", "first"] = "all"  # user turns that the teacher answers when regenerating
    max_new_tokens: PositiveInt = 512  # maximum tokens of a regenerated answer
    batch_size: PositiveInt = 32  # prompts answered at the same time when regenerating
    pack_tokens: PositiveInt = 2048  # tokens of one teacher forward while collecting
    shard_tokens: PositiveInt = 65536  # tokens of a shard file
    store_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"] = (
        "auto"  # dtype of stored states; auto: the teacher's
    )

    @model_validator(mode="after")
    def _sample_of_some(self) -> DataConfig:
        if self.sample is not None and self.limit is None:
            raise ValueError("sample chooses `limit` conversations at random: set data.limit, or leave sample out")
        return self


class CollectConfig(Section):
    """Generation of answers. Does not affect the contents of the store."""

    responder: Literal["engine", "vllm"] = "engine"  # program that generates answers: firp's engine, or vLLM
    vllm: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of vllm.LLM, as tensor_parallel_size


class Looping(Protocol):
    """Teacher as a predictor section sees it."""

    def boundaries(self, loops: int | None) -> tuple[int, ...]:
        """Return the number of effective layers that have run at the end of each loop."""
        ...


class PredictorSection(Section):
    """Fields that every predictor kind has."""

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        """Transfer layers t_1..t_k; empty for kinds without pseudo states."""
        return ()

    def required_layers(self, teacher: Looping) -> tuple[int, ...]:
        """Return the layers whose states a store must contain, in addition to the final state."""
        return self.transfer_layers[:1]


class CouplingConfig(Section):
    """Head that adjusts a step's state by the token of the parent node (ours, not a paper's)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["mlp", "low_rank", "recurrent"] = (
        "recurrent"  # mlp: of state and token; recurrent: also of the parent's adjusted state; low_rank: of the token
    )
    width: PositiveInt | None = None  # hidden features of the head; null: the hidden size d; low_rank: at most 64
    share: bool = True  # one head for all steps, with a bias of each; false: a head for each step
    candidates: PositiveInt = 256  # M: most probable tokens without the head, among which a node's children are chosen


class TreeSection(PredictorSection):
    """Fields of kinds that draft trees."""

    draft_vocabulary: Annotated[Int, Field(ge=16)] | None = None  # drafts are so many most frequent tokens; null: all


class FirpConfig(TreeSection):
    """FIRP (arXiv 2410.20488): all k steps enter at one layer."""

    kind: Literal["firp"]
    layer: PositiveInt  # transfer layer t, 1 <= t <= L-1
    steps: PositiveInt = 4  # number k of future tokens
    bias: bool = False  # add a bias to each map

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        return (self.layer,) * self.steps


class FirpPlusConfig(FirpConfig):
    """FIRP+ (ours): FIRP whose steps also depend on the token of their parent node."""

    kind: Literal["firp_plus"]  # type: ignore[assignment]
    coupling: CouplingConfig = CouplingConfig()


class HiddenTransferConfig(TreeSection):
    """Hidden Transfer (arXiv 2404.12022): step i enters at layers[i-1]."""

    kind: Literal["hidden_transfer"]
    layers: Annotated[list[PositiveInt], Field(min_length=1)]  # transfer layers t_1 <= t_2 <= ... <= t_k
    bias: bool = False  # add a bias to each map
    coupling: CouplingConfig | None = (
        None  # head that adjusts each step by its parent's token; null: none, as in the paper
    )

    @model_validator(mode="after")
    def _ascending(self) -> HiddenTransferConfig:
        if self.layers != sorted(self.layers):
            raise ValueError(f"layers must not descend: {self.layers}")
        return self

    @property
    def steps(self) -> int:
        """Number k of future tokens."""
        return len(self.layers)

    @property
    def transfer_layers(self) -> tuple[int, ...]:
        return tuple(self.layers)


class MedusaConfig(TreeSection):
    """Medusa (arXiv 2401.10774): residual heads on the final state, the baseline predictor."""

    kind: Literal["medusa"]
    steps: PositiveInt = 4  # number of heads
    resblocks: PositiveInt = 1  # residual blocks of a head
    own_head: bool = True  # a vocabulary matrix for each head, as in the paper; false: the teacher's
    coupling: CouplingConfig | None = (
        None  # head that adjusts each step by its parent's token; null: none, as in the paper
    )

    @model_validator(mode="after")
    def _teachers_head(self) -> MedusaConfig:
        for name in ("coupling", "draft_vocabulary"):
            if self.own_head and getattr(self, name) is not None:
                raise ValueError(f"{name} reads the teacher's vocabulary matrix: set own_head=false")
        return self


class SpeedConfig(PredictorSection):
    """SPEED (arXiv 2310.12072): exit heads after early loops start the next tokens in a pipeline."""

    kind: Literal["speed"]
    loops: PositiveInt | None = None  # groups of layers, for a teacher without sharing; null: the teacher's loops
    exits: Annotated[list[PositiveInt], Field(min_length=1)] | None = (
        None  # loops with an exit head; null: all but the last
    )
    exit_weights: list[PositiveFloat] | None = None  # loss weight of each exit; null: the number of its loop
    bias: bool = False  # add a bias to each map
    threshold: Annotated[Float, Field(gt=0, lt=1)] | None = None  # minimum probability that starts a token; null: none

    @model_validator(mode="after")
    def _ascending(self) -> SpeedConfig:
        if self.exits is not None and self.exits != sorted(set(self.exits)):
            raise ValueError(f"exits must ascend: {self.exits}")
        if self.exit_weights is not None and (self.exits is None or len(self.exit_weights) != len(self.exits)):
            raise ValueError("exit_weights need exits, one weight for each")
        return self

    def exit_loops(self, loops: int) -> tuple[int, ...]:
        """Return the loops with an exit head, of a teacher that runs `loops` of them."""
        return tuple(range(1, loops)) if self.exits is None else tuple(self.exits)

    def required_layers(self, teacher: Looping) -> tuple[int, ...]:
        boundaries = teacher.boundaries(self.loops)
        return tuple(boundaries[loop - 1] for loop in self.exit_loops(len(boundaries)) if loop < len(boundaries))


PredictorConfig = FirpConfig | FirpPlusConfig | HiddenTransferConfig | MedusaConfig | SpeedConfig
KINDS: dict[str, type[PredictorSection]] = {
    get_args(config.model_fields["kind"].annotation)[0]: config for config in get_args(PredictorConfig)
}


class CouplingTraining(Section):
    """First stage of training, for predictors with a coupling: the coupling alone, on drafts that are computed once."""

    epochs: NonNegativeInt = 3  # passes over the training conversations; 0: no first stage
    max_minutes: PositiveFloat | None = None  # maximum minutes from the first optimizer step on; null: no limit
    micro_batch_size: PositiveInt = 8  # conversations of a rank in one forward
    anchors_per_sequence: PositiveInt = 48  # positions of a conversation that train, the same ones in every epoch
    learning_rate: PositiveFloat = 1.0e-3  # peak learning rate of AdamW


class TrainingConfig(Section):
    """Training of the predictor."""

    init: Literal["ridge", "identity", "random"] = "ridge"  # start values; ridge: closed-form least squares
    ridge_lambda: PositiveFloat = 1.0e-2  # damping of the ridge start, relative to the mean diagonal of sum x x^T
    coupling: CouplingTraining = Field(default_factory=CouplingTraining)  # first stage, of predictors with a coupling
    loss: Literal["kl", "cross_entropy", "total_variation"] = "kl"  # distance from the teacher's distribution
    vocabulary: PositiveInt | None = (
        None  # tokens that the loss compares: those of the conversations, and frequent ones; null: all
    )
    hidden_weight: NonNegativeFloat = 0.0  # weight of a smooth-L1 term on the final states
    step_decay: PositiveFloat = 0.8  # weight of step i in the loss: step_decay^(i-1)
    anchors_per_sequence: PositiveInt = 64  # positions of a conversation that train; steps x as many pseudo rows
    epochs: PositiveInt = 1  # passes over the training conversations
    max_steps: NonNegativeInt | None = None  # maximum optimizer steps; 0: start values only; null: epochs alone
    max_minutes: PositiveFloat | None = None  # maximum minutes from the first optimizer step on; null: no limit
    micro_batch_size: PositiveInt = 4  # conversations of a rank in one forward
    gradient_accumulation: PositiveInt = 1  # micro-batches of a rank in one optimizer step
    learning_rate: PositiveFloat = 1.0e-3  # peak learning rate of AdamW
    warmup_ratio: Fraction = 0.03  # share of the optimizer steps with a rising learning rate
    weight_decay: NonNegativeFloat = 0.0  # decoupled weight decay of AdamW
    max_grad_norm: NonNegativeFloat = 1.0  # L2 norm that gradients are clipped to; 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"  # dtype of the predictor's weights in training
    zero_stage: ZeroStage = 0  # ZeRO: shard 1 optimizer states, 2 also gradients, 3 also weights
    validation_fraction: Annotated[Float, Field(ge=0, lt=1)] = 0.05  # share of the conversations that is held out
    validate_every: PositiveInt | None = (
        None  # optimizer steps; null: ten times in a run, with max_minutes at most once a minute
    )
    save_every: PositiveInt | None = None  # optimizer steps between checkpoints; null: as validate_every
    keep_last: PositiveInt = 2  # number of checkpoints to keep
    keep_best: PositiveInt = 1  # number of best validations whose weights to keep
    patience: PositiveInt | None = None  # stop after this many validations without improvement; null: never
    min_improvement: NonNegativeFloat = 0.0  # smallest gain in accepted length that counts, in tokens
    balance: bool = True  # sort conversations by length: little padding, ranks take equally long
    readers: PositiveInt = 1  # threads that read conversations ahead
    preflight: Literal["refuse", "warn", "ignore"] = "refuse"  # reaction to a run that exceeds the devices' memory
    log_every: PositiveInt = 10  # optimizer steps between entries in TensorBoard and wandb
    wandb: Text | None = None  # Weights & Biases project; null: only TensorBoard and metrics.jsonl
    gate_prompts: NonNegativeInt = 8  # prompts to decode after training, as a check; 0: none
    seed: Seed = 0  # of the validation split, the data order, the anchors and random start values


class Recipe(Section):
    """Configuration of a whole run. A recipe file may also have `base`, a recipe whose values it changes."""

    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    collect: CollectConfig = Field(default_factory=CollectConfig)
    predictor: Annotated[PredictorConfig, Field(discriminator="kind")] | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    store: PathText | None = None  # folder of the hidden states, relative to the working directory
    output: PathText | None = None  # folder of the predictor, relative to the working directory

    @model_validator(mode="after")
    def _sharded_teacher(self) -> Recipe:
        """Refuse what ranks with a sharded teacher cannot do: they all must run each forward at the same time."""
        if self.teacher.sharding == "zero3" and self.data.mode != "cached":
            raise ValueError(
                f"teacher.sharding=zero3 cannot compute states while training (data.mode={self.data.mode}): "
                "collect a store first and set data.mode=cached"
            )
        if self.teacher.sharding == "zero3" and self.data.regenerate and self.collect.responder == "engine":
            raise ValueError(
                "teacher.sharding=zero3 cannot generate answers (data.regenerate): set collect.responder=vllm"
            )
        return self


def check_sampling(temperature: float, top_p: float, seed: int = 0) -> None:
    """Raise UsageError for a temperature, top-p or seed out of range."""
    least, most = SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE
    if temperature != 0 and not least <= temperature <= most:
        raise UsageError(f"temperature must be 0 (greedy) or from {least:g} to {most:g}, got {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must be from 0 to 2**63 - 1, got {seed}")
