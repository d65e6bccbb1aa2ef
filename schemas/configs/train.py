"""The settings of `wmtp train`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from weighted_mtp.schemas.configs.common import (
    Config,
    EvaluatedTokens,
    FractionBelowOne,
    Mix,
    Positive,
    PositiveFraction,
    RowLength,
    Seed,
    ShardSets,
    Tracker,
    check_mix,
    exact,
)
from weighted_mtp.schemas.configs.heads import HeadsConfig
from weighted_mtp.schemas.configs.weights import WeightsConfig
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting
from weighted_mtp.schemas.weights.analysis import mean_of


class ObjectiveConfig(Config):
    """The loss of each target token."""

    kind: Literal["cross_entropy", "diversity_or_precision"] = Field(
        "cross_entropy", description="negative log-likelihood, or shaped rewards as in arXiv 2512.22955"
    )
    beta: Annotated[float, Field(ge=-1)] | None = Field(
        None,
        description="the target's reward is (1 - p)^beta: below 0 sharpens, above 0 spreads; default -0.25 with "
        "diversity_or_precision",
    )
    lambda_top: float = Field(0.0, description="reward of the other tokens among the top_k most likely")
    lambda_tail: float = Field(0.0, description="reward of all tokens but the target and the top_k most likely")
    top_k: Positive | None = Field(None, description="number of tokens that lambda_top applies to; default 100")

    @model_validator(mode="after")
    def _check_kind(self) -> "ObjectiveConfig":
        shaped = self.beta is not None or self.lambda_top or self.lambda_tail or self.top_k is not None
        if self.kind == "cross_entropy" and shaped:
            raise ValueError(
                "--objective.beta, lambda_top, lambda_tail and top_k need --objective.kind diversity_or_precision"
            )
        if self.top_k is not None and self.lambda_top == self.lambda_tail:
            raise ValueError("--objective.top_k needs --objective.lambda_top and lambda_tail that differ")
        return self


class OptimizerConfig(Config):
    """AdamW and its learning rate schedule."""

    kind: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="moments in float32, or in 8 bits, which takes a quarter of their memory and needs "
        "'pip install weighted-mtp[adamw8bit]'",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of matrices")
    betas: tuple[FractionBelowOne, FractionBelowOne] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the moments"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="learning rate after the warm-up; wsd (warm-up, stable, decay) decays only at the end",
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="share of the steps for learning rate warm-up"
    )
    decay_ratio: PositiveFraction | None = Field(
        None, description="share of the steps for the decay of wsd; default 0.2"
    )
    min_learning_rate_ratio: FractionBelowOne = Field(
        0.0, description="learning rate at the end of the decay, as a share of the peak"
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimizerConfig":
        if self.decay_ratio is not None and self.schedule != "wsd":
            raise ValueError("--optimizer.decay_ratio needs --optimizer.schedule wsd")
        if self.min_learning_rate_ratio and self.schedule == "constant":
            raise ValueError("--optimizer.min_learning_rate_ratio needs a schedule that decays, not constant")
        if self.schedule == "wsd" and exact(self.warmup_ratio) + exact(self.wsd_decay_ratio) > 1:
            raise ValueError("--optimizer.warmup_ratio and decay_ratio should sum to at most 1")
        return self

    @property
    def wsd_decay_ratio(self) -> float:
        """Share of the steps in which `wsd` decays."""
        return 0.2 if self.decay_ratio is None else self.decay_ratio


class LoRAConfig(Config):
    """Low-rank adapters of the trunk, used with `trainable: lora` and merged into it at the end."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="adapters are scaled by alpha / rank")
    dropout: FractionBelowOne = Field(0.0, description="dropout on adapter inputs")
    targets: tuple[str, ...] = Field(
        ("all-linear",), description="modules to adapt, such as [q_proj,v_proj]; default all linear layers"
    )


class PlanConfig(Config):
    """The devices of `--dry_run`, where they are not those of this machine."""

    processes: Positive | None = Field(
        None, description="processes, one a device; default those of the launcher or of --ray_workers, else 1"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="cuda is a GPU; auto takes one if it is here")
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="memory of a device, GiB; default that of the GPU of this machine"
    )


class TrainConfig(Config):
    """Train a language model on scored shards with a weighted multi-token-prediction loss."""

    HELP_GROUPS: ClassVar = {
        "model and trainable parameters": (
            "model", "from_scratch", "trust_remote_code", "trainable", "attention", "dtype",
        ),
        "steps": (
            "batch_size", "sequence_length", "max_steps", "epochs", "continue_steps", "normalization", "seed",
            "max_bad_steps",
        ),
        "speed and memory": ("micro_batch_size", "loader_workers", "activation_checkpointing", "compile"),
        "several devices (see also accelerate launch)": ("fsdp", "ray_workers", "ray_address"),
        "evaluation, checkpoints and logs": (
            "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "max_checkpoints", "keep_checkpoints",
            "log_every", "trackers",
        ),
    }  # fmt: skip

    input: ShardSets = Field(
        description="shard set to train on; A,B also reads the score columns of B, a set with the same rows"
    )
    mix: Mix = Field(
        {},
        description="more shard sets and their shares of the rows: '{scored/code: 0.3}'; --input gives the rest",
    )
    model: NameSetting = Field(
        description="Hugging Face decoder-only model: directory or id; or a finished run, with its heads"
    )
    output: LocationSetting = Field(description="directory of the run")
    from_scratch: bool = Field(False, description="start from random weights, using only the model's config")
    trust_remote_code: bool = Field(False, description="run Python code in the directory of --model")
    weights: WeightsConfig = Field(WeightsConfig(), description="token weights")
    heads: HeadsConfig = Field(HeadsConfig(), description="prediction heads")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="training objective")
    trainable: Literal["all", "heads", "lora"] = Field(
        "all", description="parameters to train: all, the extra heads, or the extra heads and adapters"
    )
    lora: LoRAConfig = Field(LoRAConfig(), description="low-rank adapters, with --trainable lora")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and schedule")
    normalization: Literal["tokens", "weight_sum"] = Field(
        "tokens",
        description="divide the loss by the number of target tokens, or by the sum of their weights",
    )
    sequence_length: RowLength | None = Field(
        None, description="tokens in a packed training row; default is the largest max_length of the shard sets"
    )
    batch_size: Positive = Field(32, description="rows per optimizer step, across all devices")
    micro_batch_size: Positive = Field(4, description="rows per forward pass on one device")
    max_steps: Positive | None = Field(None, description="optimizer steps; default depends on --epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over --input when max_steps is unset")
    continue_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="more optimizer steps after those of max_steps or epochs; also continues a finished run if it was "
        "trained with --keep_checkpoints. The learning rate is then constant: the peak with the constant schedule, "
        "else a tenth of it. No warm-up is repeated, and the data continues where it stopped",
    )
    seed: Seed = Field(0, description="seed of initialisation and data order")
    loader_workers: Positive = Field(1, description="threads per shard set for reading and packing ahead")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is bfloat16 on a GPU and float32 on a CPU; parameters stay float32"
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="attention implementation of transformers; auto is flash_attention_2 on a GPU that has it"
    )
    max_bad_steps: Annotated[int, Field(ge=0)] = Field(
        3, description="stop after more than this many consecutive steps with a non-finite loss or gradient"
    )
    fsdp: bool = Field(
        False, description="shard parameters, gradients and moments across processes (FSDP2) instead of copying them"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute decoder layers in the backward pass: less memory, more time"
    )
    compile: bool = Field(False, description="compile decoder layers with torch.compile; needs a C++ compiler")
    ray_workers: Positive | None = Field(
        None, description="training processes started by Ray, each on a GPU if available"
    )
    ray_address: str | None = Field(
        None, description="Ray cluster for --ray_workers; by default Ray starts on this machine"
    )
    eval_input: ShardSets | None = Field(None, description="held-out shard set")
    eval_every: Positive | None = Field(None, description="steps between evaluations; by default only at the end")
    eval_tokens: EvaluatedTokens | None = Field(
        None, description="number of tokens to evaluate, from the start of --eval_input; default all"
    )
    checkpoint_every: Positive | None = Field(
        None, description="steps between checkpoints; default a tenth of all steps"
    )
    max_checkpoints: Positive = Field(2, description="number of checkpoints to hold while training")
    keep_checkpoints: bool = Field(
        False, description="keep the last checkpoints when the run is finished, instead of removing them"
    )
    log_every: Positive = Field(10, description="steps between lines in metrics.jsonl")
    trackers: tuple[Tracker, ...] = Field((), description="accelerate trackers, for example '[tensorboard]'")
    dry_run: bool = Field(
        False,
        description="only print the length of the run and the memory that each device needs; --model may be a "
        "config.json without weights, and --plan names devices that are not here",
    )
    plan: PlanConfig = Field(PlanConfig(), description="other devices than those of this machine, with --dry_run")

    _check_mix = field_validator("mix")(check_mix)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.sequence_length is not None and self.heads.offsets[-1] >= self.sequence_length:
            raise ValueError("--sequence_length must be larger than the largest of --heads.offsets")
        if self.normalization == "weight_sum" and self.weights.is_live and mean_of(self.weights.node) is None:
            raise ValueError(
                "--normalization weight_sum needs the sum of the weights in advance: wrap the formula in "
                "normalise(..., by=batch), or use --normalization tokens"
            )
        if self.trainable == "heads" and len(self.heads.offsets) == 1:
            raise ValueError("--trainable heads needs extra heads, such as --heads.offsets [1,2,3,4]")
        if self.trainable == "heads" and not any(self.heads.loss_coefficients[1 : len(self.heads.offsets)]):
            raise ValueError("--trainable heads needs a value above 0 among --heads.coefficients after the first")
        if self.trainable != "lora" and self.lora != LoRAConfig():
            raise ValueError("--lora needs --trainable lora")
        if self.ray_address and not self.ray_workers:
            raise ValueError("--ray_address needs --ray_workers")
        if not self.dry_run and self.plan != PlanConfig():
            raise ValueError("--plan needs --dry_run")
        return self
