"""The settings of every command, as frozen pydantic models.

Field names are the command line's flags and the keys of a YAML file; descriptions are its help.
"""

import keyword
import os.path
import re
from collections.abc import Mapping
from fractions import Fraction as Exact
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.formulas import Call, FormulaError, Node, Number, is_live, mean_of, parse, rename
from schemas.locations import LocationSetting, NameSetting, locate
from schemas.presets import PRESETS


def split_paths(value: Any) -> Any:
    """One path, or several as a list or with commas between them, as a list. A directory may have a comma in its name.

    Raises:
        ValueError: a comma without a path before and after it.
    """
    if isinstance(value, str) and "," in value and not os.path.isdir(value):
        value = [part.strip() for part in value.split(",")]
        if not all(value):
            raise ValueError("should have a path on both sides of every comma")
    return value if isinstance(value, list | tuple) else [value]


def exact(share: float) -> Exact:
    """The decimal number that was written, not the binary one nearest to it."""
    return Exact(repr(share))


def check_identifier(name: str) -> None:
    """Raise ValueError unless a name can be a part of a column's name."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"'{name}' is no name for a column; use letters, digits and underscores")


def is_taken(name: str) -> bool:
    """Whether every shard has a column of this name, or no formula can read one."""
    return name in RESERVED or keyword.iskeyword(name)


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]
ShardSets = Annotated[tuple[LocationSetting, ...], Field(min_length=1), BeforeValidator(split_paths)]
Share = Annotated[float, Field(gt=0, lt=1)]
RowLength = Annotated[int, Field(ge=2, le=1 << 24)]
Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
RESERVED = ("document_id", "start", "input_ids", "live", "corpus", "batch", "sequence")
"""What a column cannot be called: columns of every shard, and words of formulas."""


class Config(BaseModel):
    """Base of all settings: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    HELP_GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Headings of `--help` and the settings below each; the others come first."""


class PrepareConfig(Config):
    """Turn a corpus into token shards."""

    input: Annotated[NameSetting, Field(min_length=1)] = Field(
        description="file, directory, glob, or Hugging Face dataset id"
    )
    tokenizer: NameSetting = Field(description="Hugging Face tokenizer: directory or id")
    output: LocationSetting = Field(description="directory of the new shard set")
    format: Literal["auto", "json", "parquet", "text", "csv", "arrow"] = Field(
        "auto", description="format of the files; auto goes by the file name"
    )
    text_field: str = Field("text", description="field that holds the text")
    id_field: str | None = Field(None, description="field that names the document; default <file>#<row>")
    number_fields: tuple[str, ...] = Field(
        (), description="fields that hold a number, as '[reward]'; become columns of the shards, one value a sequence"
    )
    label_fields: tuple[str, ...] = Field((), description="the same of fields that hold a string or an integer")
    sample_by: Literal["document", "paragraph", "line"] = Field(
        "document", description="what is one document in a text file"
    )
    subset: str | None = Field(None, description="configuration of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset")
    max_length: Annotated[int, Field(ge=2)] = Field(4096, description="longest sequence, in tokens")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="put BOS before each document; auto does what the tokenizer does by itself"
    )
    append_eos: bool = Field(False, description="put EOS after each document")
    shard_tokens: Positive = Field(1 << 22, description="a shard is closed once it holds this many tokens")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="tokenizer processes; 0 is one per core")

    @field_validator("number_fields", "label_fields")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_identifier(name)
            written = re.match("loss_|entropy_|gradient_|excess_loss|long_short", name)
            if written or is_taken(name):
                raise ValueError(f"'{name}' is a name that wmtp uses itself; rename the field in the corpus")
        return names

    @model_validator(mode="after")
    def _check_columns(self) -> "PrepareConfig":
        names = [*self.number_fields, *self.label_fields]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--number_fields and --label_fields name '{twice[0]}' twice; name each field once")
        return self


class ConditionConfig(Config):
    """A model, and a text that it sees before every sequence."""

    model: NameSetting = Field(description="directory or Hugging Face id, id@revision to pin it")
    prompt: str = Field("", description="text before every sequence, after BOS where the sequence starts with it")
    entropy: bool = Field(False, description="write entropy_NAME too")
    gradient: bool = Field(False, description="write gradient_NAME too")


BUILT_IN = ("reference", "base", "short")
"""Conditions that have flags of their own."""


class ScoreConfig(Config):
    """Score every token of a shard set with small frozen models."""

    input: LocationSetting = Field(
        description="shard set to score; columns that it has already are kept and not computed again"
    )
    output: LocationSetting = Field(description="directory of the new shard set")
    reference: NameSetting | None = Field(
        None, description="reference model: directory or Hugging Face id, id@revision to pin it; writes loss_reference"
    )
    base: NameSetting | None = Field(
        None, description="base model; writes loss_base and excess_loss = base - reference"
    )
    entropy: bool = Field(False, description="write entropy_reference too, the entropy of the reference's predictions")
    gradient: bool = Field(
        False,
        description="write gradient_reference too: how much the reference's losses depend on each token as an input; "
        "needs --engine transformers",
    )
    short_context: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens of context; writes loss_short and long_short = short - reference"
    )
    short_stride: Positive | None = Field(None, description="tokens between short contexts; default 3/4 of them")
    conditions: dict[str, ConditionConfig] = Field(
        {},
        description="further conditions by name, as '{bad: {model: small, prompt: \"A wrong answer: \"}}'; "
        "each writes loss_NAME",
    )
    contrasts: dict[str, str] = Field(
        {},
        description="further differences of columns, of this run or of --input, as '{mine: loss_worse - loss_better}'",
    )
    suffix: Annotated[str, Field(pattern="^[a-zA-Z0-9_]*$")] = Field(
        "", description="added to the names of new columns, where the input has columns of these names already"
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto is vllm where it is installed, else transformers"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto is bfloat16 on a GPU and float32 on a CPU"
    )
    engine_method: Literal["auto", "pooler", "prompt_logprobs"] = Field(
        "auto",
        description="how vLLM returns losses: computed inside the engine, or through its public API, which is slower; "
        "auto is pooler where the architecture allows it",
    )
    engine_args: dict[str, Any] = Field(
        {}, description="further vLLM engine arguments, as --engine_args.quantization fp8"
    )
    batch_tokens: Annotated[int, Field(gt=0, le=1 << 20)] = Field(
        8192, description="tokens an engine computes at once; lower it when memory is short"
    )
    tensor_parallel_size: Positive = Field(1, description="GPUs, or processes on a CPU, that share one model (vLLM)")
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="engines; 0 is as many as the GPUs hold, or one on a CPU; more than GPUs share them"
    )
    min_workers: Positive | None = Field(
        None, description="start when this many fit and use up to --workers as nodes come and go; default all"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="CPUs that Ray reserves for a worker and its engine uses; default: reserve 1, use its share",
    )
    gpus_per_worker: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GPUs of a worker, or a share of one; default follows from --workers"
    )
    ray_address: str | None = Field(None, description="Ray cluster to use; default starts Ray on this machine")
    dry_run: bool = Field(False, description="only say what would be computed, what it would cost, and what is there")

    @field_validator("conditions")
    @classmethod
    def _check_conditions(cls, conditions: dict[str, ConditionConfig]) -> dict[str, ConditionConfig]:
        for name in conditions:
            check_identifier(name)
            if name in BUILT_IN:
                raise ValueError(f"'{name}' has flags of its own; choose another name than {', '.join(BUILT_IN)}")
        return conditions

    @field_validator("contrasts")
    @classmethod
    def _check_contrasts(cls, contrasts: dict[str, str]) -> dict[str, str]:
        for name, difference in contrasts.items():
            check_identifier(name)
            if is_taken(name):
                raise ValueError(f"'{name}' is a name that wmtp uses itself; choose another one")
            if not re.fullmatch(r"\s*\w+\s*-\s*\w+\s*", difference):
                raise ValueError(
                    f"{name} should be the difference of two columns, 'loss_a - loss_b', not '{difference}'"
                )
        return contrasts

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        if self.reference is None and not self.conditions and not self.contrasts:
            raise ValueError(
                "--reference missing; give a model to score with, there or in --conditions, "
                "or --contrasts of columns that --input has"
            )
        for name in ("base", "entropy", "gradient", "short_context"):
            if self.reference is None and getattr(self, name):
                raise ValueError(f"--{name} needs --reference")
        taken = {"excess_loss", "long_short"}
        taken |= {f"{of}_{name}" for of in ("loss", "entropy", "gradient") for name in (*BUILT_IN, *self.conditions)}
        if clash := sorted(taken & self.contrasts.keys()):
            raise ValueError(f"--contrasts: {clash[0]} is the name of another column; choose another one")
        if self.workers and self.min_workers and self.min_workers > self.workers:
            raise ValueError("--min_workers must not be larger than --workers")
        if self.gpus_per_worker and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError("--gpus_per_worker must be a whole number or a share of one GPU")
        if self.short_context is None and self.short_stride is not None:
            raise ValueError("--short_stride needs --short_context")
        if self.short_context and self.short_stride and self.short_stride >= self.short_context:
            raise ValueError("--short_stride must be smaller than --short_context, or tokens would have no context")
        return self


class WeightsConfig(Config):
    """How score columns become one weight per target token: a preset, or a formula in the weight language."""

    preset: Literal[
        "uniform", "rho1", "rho1-static", "self-reference-loss", "self-reference-entropy", "self-reference", "dense",
        "sparse", "longce", "ppmi", "npmi", "soft-threshold", "reward", "advantage",
    ] = Field("uniform", description="weighting scheme; docs/weights.md has the formula of each")  # fmt: skip
    formula: str | None = Field(
        None,
        description="scheme in the weight language instead of a preset, as 'normalise(top(excess_loss, 0.6))'; "
        "docs/weights.md describes it",
    )
    column: str | None = Field(
        None, description="score of the preset: a column, or a formula of columns; each preset has its default"
    )
    live: bool = Field(
        False, description="contrast loss_short (or --weights.column) with what the model in training loses"
    )
    fraction: Fraction | None = Field(None, description="share of the tokens that is kept; default 0.6")
    lam: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="dense: share of plain cross-entropy; default 0.75"
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(None, description="longce: largest weight; default 5")
    tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="soft-threshold: score at which the weight reaches its maximum; default 1"
    )
    s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="ppmi, npmi: ratio of probabilities from which on a token counts; default 1"
    )
    silent: Annotated[float, Field(ge=0)] | None = Field(
        None, description="dense, sparse, ppmi, npmi: weight in sequences without any signal; default 0"
    )
    group: str | None = Field(None, description="advantage: column of labels within which rewards are compared")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps in which weights move from 1 to their own"
    )
    control: Literal["none", "shuffled", "random"] = Field(
        "none", description="control experiment: the weights shuffled in each sequence, or LogNormal of equal moments"
    )

    @model_validator(mode="after")
    def _check(self) -> "WeightsConfig":
        used = PRESETS[self.preset].settings if self.formula is None else set()
        own = f"--weights.preset {self.preset}" if self.formula is None else "--weights.formula"
        if self.formula is not None and self.preset != "uniform":
            raise ValueError("--weights.preset and --weights.formula exclude each other")
        for name in ("column", "fraction", "lam", "gamma", "tau", "s", "silent", "group"):
            if getattr(self, name) is not None and name not in used:
                raise ValueError(f"--weights.{name} does nothing with {own}; leave it out")
        if self.live and "live" not in used:
            raise ValueError(f"--weights.live is not for {own}")
        if "group" in used and not (self.group or "").isidentifier():
            raise ValueError(f"{own} needs --weights.group, the name of a column of labels")
        for name, text in (("column", self.column), ("formula", self.formula)):
            try:
                parse(text or "1")
            except FormulaError as error:
                raise ValueError(f"--weights.{name}: {error}") from error
        node = self.node
        if isinstance(node, Call) and node.function == "signed" and self.control == "random":
            raise ValueError("--weights.control random draws no negative weights; use shuffled")
        if isinstance(node, Number) and self.control != "none":
            raise ValueError(f"--weights.control needs other weights than those of {own}")
        return self

    @property
    def text(self) -> str:
        """The formula, with all settings in it."""
        if self.formula is not None:
            return self.formula.strip()
        preset = PRESETS[self.preset]
        column = self.column or (preset.live_column if self.live else preset.column) or ""
        score = column if column.isidentifier() else f"({column})"
        settings: dict[str, Any] = preset.defaults | {
            name: value for name in preset.settings - {"column", "live"} if (value := getattr(self, name)) is not None
        }
        return preset.formula.format(score=f"({score} - live)" if self.live else score, **settings)

    @property
    def node(self) -> Node:
        """The formula as a tree."""
        return parse(self.text)

    @property
    def is_live(self) -> bool:
        """Whether weights depend on the model in training."""
        return is_live(self.node)

    def with_columns(self, names: Mapping[str, str]) -> "WeightsConfig":
        """The same scheme, as a formula, with other names for some columns."""
        formula = rename(self.text, names)
        return WeightsConfig(formula=formula, warmup_ratio=self.warmup_ratio, control=self.control)


class DirectDecodingConfig(Config):
    """Direct multi-token decoding: which layers read the thinking layers' output only once in a cycle."""

    cycle: Annotated[int, Field(gt=0, le=256)] = Field(
        1,
        description="tokens that one pass of all layers is to predict, 4 at most in the paper; 1 for an ordinary model",
    )
    encoding_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="first layers, whose output the decoding layers always read; 0 for the embeddings"
    )
    decoding_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="last layers, which predict alone but at the start of a cycle; 8 of 36 in the paper"
    )

    @model_validator(mode="after")
    def _check_cycle(self) -> "DirectDecodingConfig":
        if self.cycle > 1 and not self.decoding_layers:
            raise ValueError("--heads.dmtd.cycle needs --heads.dmtd.decoding_layers above 0")
        if self.cycle == 1 and (self.encoding_layers or self.decoding_layers):
            raise ValueError("--heads.dmtd.encoding_layers and decoding_layers need --heads.dmtd.cycle above 1")
        return self


class HeadsConfig(Config):
    """Which future tokens are predicted, and by what."""

    kind: Literal["parallel", "sequential"] = Field(
        "parallel", description="all heads read the trunk, or each reads the one before it as in DeepSeek-V3"
    )
    block: Literal["residual", "decoder"] = Field(
        "residual", description="a parallel head is x + SiLU(W x), or one decoder layer as in the MTP paper"
    )
    offsets: tuple[Positive, ...] = Field(
        (1, 2, 3, 4), description="distances of the predicted tokens; starts with 1, and may leap as [1,3,5,7]"
    )
    coefficients: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="factor of each offset's loss; default 1; sequential heads share 0.3"
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps in which the factors of all but the first rise from 0"
    )
    top_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="factor of token order prediction (TOP), which one more unembedding learns; 1 in its paper, 0 for "
        "none",
    )
    top_window: Positive | None = Field(
        None, description="tokens ahead whose order is predicted; default the rest of the document"
    )

    dmtd: DirectDecodingConfig = Field(DirectDecodingConfig(), description="direct multi-token decoding")

    @model_validator(mode="after")
    def _check_offsets(self) -> "HeadsConfig":
        if not self.offsets or self.offsets[0] != 1 or list(self.offsets) != sorted(set(self.offsets)):
            raise ValueError("--heads.offsets must start with 1 and increase, for example [1,2,3,4]")
        if self.coefficients is not None and len(self.coefficients) != len(self.offsets):
            raise ValueError(f"--heads.coefficients needs {len(self.offsets)} entries, one for each offset")
        if self.kind == "sequential" and self.block != "residual":
            raise ValueError("--heads.block is for --heads.kind parallel; sequential heads are decoder layers")
        if self.coefficients is not None and not any(self.coefficients):
            raise ValueError("--heads.coefficients must not all be 0, or there is nothing to learn")
        if self.dmtd.cycle > 1 and len(self.offsets) > 1:
            raise ValueError("--heads.dmtd.cycle needs --heads.offsets [1]: layers predict later tokens, not heads")
        if self.top_window is not None and not self.top_coefficient:
            raise ValueError("--heads.top_window needs --heads.top_coefficient above 0")
        return self

    @property
    def loss_coefficients(self) -> tuple[float, ...]:
        """One coefficient for each offset, and for token order prediction that of its own.

        Offsets have 1, those of sequential heads lambda / D with lambda 0.3 (arXiv 2412.19437).
        """
        extra = len(self.offsets) - 1
        default = 0.3 / extra if self.kind == "sequential" and extra else 1.0
        of_offsets = self.coefficients or (1.0,) + (default,) * extra
        return of_offsets + (self.top_coefficient,) * self.predicts_order

    @property
    def predicts_order(self) -> bool:
        """Whether there is token order prediction."""
        return self.top_coefficient > 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what losses are reported for.

        The offsets, `top` for token order prediction, and in a cycle offset 1 by phase.
        """
        phases = range(self.dmtd.cycle) if self.dmtd.cycle > 1 else ()
        return (
            *map(str, self.offsets),
            *("top",) * self.predicts_order,
            *(f"phase_{phase}" for phase in phases),
        )


class ObjectiveConfig(Config):
    """What is minimised for each target token."""

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
    top_k: Positive | None = Field(None, description="how many tokens lambda_top is for; default 100")

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
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of matrices")
    betas: tuple[Moment, Moment] = Field((0.9, 0.95), description="AdamW's moments")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="share of the steps spent warming up")


class LoRAConfig(Config):
    """Low-rank adapters of the trunk, used with `trainable: lora` and merged into it at the end."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="adapters are scaled by alpha / rank")
    dropout: Moment = Field(0.0, description="dropout of the adapters' input")
    targets: tuple[str, ...] = Field(
        ("all-linear",), description="modules that get one, as [q_proj,v_proj]; default all linear layers"
    )


class TrainConfig(Config):
    """Train a language model on scored shards with a weighted multi-token-prediction loss."""

    HELP_GROUPS = {
        "what learns": ("model", "from_scratch", "trainable", "attention", "dtype"),
        "steps": ("batch_size", "sequence_length", "max_steps", "epochs", "normalization", "seed", "max_bad_steps"),
        "speed and memory": ("micro_batch_size", "loader_workers", "activation_checkpointing", "compile"),
        "several devices (see also accelerate launch)": ("fsdp", "ray_workers", "ray_address"),
        "evaluation, checkpoints and logs": (
            "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints", "log_every", "trackers",
        ),
    }  # fmt: skip

    input: ShardSets = Field(
        description="shard set to train on; A,B trains on A with the score columns of B too, a set of the same rows"
    )
    mix: dict[str, Share] = Field(
        {},
        description="further shard sets and their shares of the rows, as '{scored/code: 0.3}'; --input gives the rest",
    )
    model: NameSetting = Field(
        description="Hugging Face decoder-only model: directory or id; or a finished run, with its heads"
    )
    output: LocationSetting = Field(description="directory of the run")
    from_scratch: bool = Field(False, description="use the model's config only and start from random weights")
    weights: WeightsConfig = Field(WeightsConfig(), description="token weights")
    heads: HeadsConfig = Field(HeadsConfig(), description="prediction heads")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="what is minimised")
    trainable: Literal["all", "heads", "lora"] = Field(
        "all", description="what learns: trunk and heads, the extra heads alone, or these and low-rank adapters"
    )
    lora: LoRAConfig = Field(LoRAConfig(), description="low-rank adapters, with --trainable lora")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and schedule")
    normalization: Literal["tokens", "weight_sum"] = Field(
        "tokens",
        description="divide by the number of target tokens, or by the sum of their weights",
    )
    sequence_length: RowLength | None = Field(
        None, description="tokens in a packed training row; default is the largest max_length of the shard sets"
    )
    batch_size: Positive = Field(32, description="rows per optimizer step, all devices together")
    micro_batch_size: Positive = Field(4, description="rows per forward pass on one device")
    max_steps: Positive | None = Field(None, description="optimizer steps; default follows from epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over --input when max_steps is unset")
    seed: Seed = Field(0, description="seed of initialisation and data order")
    loader_workers: Positive = Field(1, description="threads that read and pack ahead, of each shard set")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto is bfloat16 on a GPU and float32 on a CPU; parameters stay float32"
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="attention implementation of transformers; auto is flash_attention_2 on a GPU that has it"
    )
    max_bad_steps: Annotated[int, Field(ge=0)] = Field(
        3, description="stop after more than this many steps in a row whose loss or gradient is not finite"
    )
    fsdp: bool = Field(
        False, description="shard parameters, gradients and moments over the processes (FSDP2) instead of copying them"
    )
    activation_checkpointing: bool = Field(
        False, description="compute decoder layers again in the backward pass: less memory, more time"
    )
    compile: bool = Field(False, description="compile decoder layers with torch.compile; needs a C++ compiler")
    ray_workers: Positive | None = Field(
        None, description="train in this many processes that Ray starts, each on a GPU where there are GPUs"
    )
    ray_address: str | None = Field(
        None, description="Ray cluster for --ray_workers; default starts Ray on this machine"
    )
    eval_input: ShardSets | None = Field(None, description="held-out shard set")
    eval_every: Positive | None = Field(None, description="steps between evaluations; default only at the end")
    eval_tokens: Positive | None = Field(None, description="evaluate on at most this many tokens; default all")
    checkpoint_every: Positive | None = Field(
        None, description="steps between checkpoints; default a tenth of all steps"
    )
    keep_checkpoints: Positive = Field(2, description="how many checkpoints stay on disk")
    log_every: Positive = Field(10, description="steps between lines in metrics.jsonl")
    trackers: tuple[Tracker, ...] = Field((), description="accelerate trackers, for example '[tensorboard]'")

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, mix: dict[str, float]) -> dict[str, float]:
        if sum(map(exact, mix.values())) >= 1:
            raise ValueError("shares should sum to less than 1, to leave some rows to --input")
        for name in mix:
            for path in split_paths(name):
                locate(path)
        return mix

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.sequence_length is not None and self.heads.offsets[-1] >= self.sequence_length:
            raise ValueError("--sequence_length must be larger than the largest of --heads.offsets")
        if self.normalization == "weight_sum" and self.weights.is_live and mean_of(self.weights.node) is None:
            raise ValueError(
                "--normalization weight_sum needs the sum of the weights before they are known: put "
                "normalise(..., by=batch) around the formula, or use --normalization tokens"
            )
        if self.trainable == "heads" and len(self.heads.offsets) == 1:
            raise ValueError("--trainable heads needs heads besides the model's own, as --heads.offsets [1,2,3,4]")
        if self.trainable == "heads" and not any(self.heads.loss_coefficients[1 : len(self.heads.offsets)]):
            raise ValueError("--trainable heads needs a factor above 0 among --heads.coefficients after the first")
        if self.trainable != "lora" and self.lora != LoRAConfig():
            raise ValueError("--lora needs --trainable lora")
        if self.ray_address and not self.ray_workers:
            raise ValueError("--ray_address needs --ray_workers")
        return self


class IterateConfig(Config):
    """Score and train in turn: the model that a round trains is the reference of the next."""

    input: LocationSetting = Field(description="shard set to score and to train on")
    output: LocationSetting = Field(description="directory of the rounds")
    reference: NameSetting = Field(description="reference model of the first round: directory or Hugging Face id")
    base: NameSetting = Field(description="base model of all rounds: directory or Hugging Face id")
    model: NameSetting | None = Field(None, description="model that the first round trains; default is --base")
    rounds: Positive = Field(2, description="how many rounds; more may be added when the command is repeated")
    fresh: bool = Field(False, description="train --model anew in each round instead of what the round before trained")
    score: dict[str, Any] = Field({}, description="settings of 'wmtp score', as --score.short_context 512")
    train: dict[str, Any] = Field(
        {}, description="settings of 'wmtp train', as --train '{weights: {preset: rho1-static}, max_steps: 1000}'"
    )

    def scoring(self, **settings: Any) -> ScoreConfig:
        """Settings of the scoring in a round: its own, the user's, and those that are the same in all of them."""
        suffix = f"{self.score.get('suffix', '')}{settings.pop('suffix', '')}"
        return ScoreConfig.model_validate(self.score | {"base": self.base, "suffix": suffix} | settings)

    def training(self, **settings: Any) -> TrainConfig:
        """Settings of the training in a round: its own and the user's."""
        return TrainConfig.model_validate(self.train | settings)

    @model_validator(mode="after")
    def _check(self) -> "IterateConfig":
        for name, given, own in (("score", self.score, SCORE_OWN), ("train", self.train, TRAIN_OWN)):
            if taken := sorted(own & given.keys()):
                raise ValueError(f"--{name}.{taken[0]}: follows from the other settings; leave it out")
        where = {"input": self.input, "output": self.output}
        try:
            name = "score"
            self.scoring(**where, reference=self.reference)
            name = "train"
            training = self.training(**where, model=self.base)
        except ValidationError as error:
            finding = error.errors()[0]
            key = ".".join([name, *(part for part in finding["loc"] if isinstance(part, str))])
            unknown = finding["type"] == "extra_forbidden"
            reason = "no such setting" if unknown else finding["msg"].removeprefix("Value error, ")
            raise ValueError(f"--{key}: {reason}; see 'wmtp {name} --help'") from error
        if isinstance(training.weights.node, Number):
            raise ValueError("--train.weights.preset: choose a scheme, or nothing of the scoring would be used")
        return self


SCORE_OWN = {"input", "output", "reference", "base", "dry_run"}
TRAIN_OWN = {"input", "output", "model"}
"""Settings of the parts of a round that `wmtp iterate` makes itself."""


class EvaluateConfig(Config):
    """Measure the held-out loss of each head of a trained model."""

    model: NameSetting = Field(description="directory of a run, or a Hugging Face model: directory or id")
    input: LocationSetting = Field(description="held-out shard set")
    sequence_length: RowLength | None = Field(
        None, description="tokens in a packed row; default as in training, else the max_length of the shard set"
    )
    batch_size: Positive = Field(8, description="rows per forward pass")
    max_tokens: Positive | None = Field(None, description="stop after this many tokens; default all")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto is bfloat16 on a GPU and float32 on a CPU"
    )


class InspectConfig(Config):
    """Show what a shard set holds."""

    set: LocationSetting = Field(description="shard set")
    column: str | None = Field(None, description="score column whose extremes are shown; default the first contrast")
    samples: Annotated[int, Field(ge=0)] = Field(5, description="how many highest and lowest scoring tokens to show")
    html: Path | None = Field(None, description="also write the report as an HTML page")


class WeightsReportConfig(Config):
    """Show the weights that a scheme gives, before training with them."""

    set: ShardSets = Field(description="shard set; A,B reads score columns of B too, a set of the same rows")
    weights: WeightsConfig = Field(WeightsConfig(), description="token weights")
    live_column: str | None = Field(
        None, description="column that stands for what the model in training would lose, as loss_base"
    )
    samples: Annotated[int, Field(ge=0)] = Field(3, description="how many pieces of text to show with their weights")
    max_tokens: Positive = Field(
        10_000_000, description="look at about this many tokens, in row groups drawn at random from a larger set"
    )
    seed: Seed = Field(0, description="seed of what is drawn, and of random controls as in training")
    html: Path | None = Field(None, description="also write the report as an HTML page")

    @model_validator(mode="after")
    def _check(self) -> "WeightsReportConfig":
        if self.weights.is_live and self.live_column is None:
            raise ValueError(
                "these weights depend on what the model in training loses; name a column that stands for it, "
                "as --live_column loss_base"
            )
        if self.live_column is not None and not self.weights.is_live:
            raise ValueError("--live_column: these weights do not depend on the model in training; leave it out")
        return self


class VerifyConfig(Config):
    """Check every byte of a shard set against its manifest."""

    set: LocationSetting = Field(description="shard set")


class ListConfig(Config):
    """Show the shard sets in directories: columns, sizes, and what was derived from what."""

    directories: list[LocationSetting] = Field(description="where to look, all levels deep")


class DemoConfig(Config):
    """Run the whole job on text that every Python installation has."""

    output: Path = Field(Path("runs/demo"), description="directory for everything the demo writes")
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="engine of the scoring step")
    base_steps: Positive = Field(400, description="training steps of the base model")
    reference_steps: Positive = Field(100, description="further steps that make the reference model")
    student_steps: Positive = Field(200, description="steps of each student")
    seed: Seed = Field(0, description="seed of everything random")
