"""Configuration of a run as typed sections: teacher, data, collecting, predictor and training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from firp_cli.assets import DEFAULT_TEACHER

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A recipe section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoopedSection(Section):
    """A teacher that runs a block of layers several times: `prelude`, then `block` x `loops` in cyclic order, `coda`.

    Layers are counted as *effective* ones run_on_all else: `effective` of them, of which `unique` have parameters.
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
