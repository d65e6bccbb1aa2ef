"""Settings of `wmtp score`."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from weighted_mtp.schemas.configs.common import Config, EngineChoice, Positive, check_identifier, is_reserved
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting


class ConditionConfig(Config):
    """A model and an optional prompt before every sequence."""

    model: NameSetting = Field(description="directory, finished run, or Hugging Face id, id@revision to pin it")
    prompt: str = Field("", description="text before every sequence, after its BOS if it starts with one")
    entropy: bool = Field(False, description="also write entropy_NAME")
    gradient: bool = Field(False, description="also write gradient_NAME")


BUILT_IN = ("reference", "base", "short")
"""Conditions with their own flags."""


class ScoreConfig(Config):
    """Score every token of a shard set with small frozen models."""

    input: LocationSetting = Field(description="shard set to score; its columns are kept, not recomputed")
    output: LocationSetting = Field(description="directory of the new shard set")
    reference: NameSetting | None = Field(
        None,
        description="reference model: directory, finished training run, or Hugging Face id, id@revision to pin it; "
        "writes loss_reference",
    )
    base: NameSetting | None = Field(
        None, description="base model; writes loss_base and excess_loss = base - reference"
    )
    entropy: bool = Field(False, description="also write entropy_reference, the entropy of the reference's predictions")
    gradient: bool = Field(
        False,
        description="also write gradient_reference, the gradient norm of the reference's losses with respect to each "
        "input token; needs --engine transformers",
    )
    short_context: Annotated[int, Field(ge=2)] | None = Field(
        None, description="context size in tokens; writes loss_short and long_short = short - reference"
    )
    short_stride: Positive | None = Field(
        None, description="stride of short-context windows, in tokens; default 3/4 of a window"
    )
    conditions: dict[str, ConditionConfig] = Field(
        {},
        description="more conditions by name, such as '{bad: {model: small, prompt: \"A wrong answer: \"}}'; "
        "each writes loss_NAME",
    )
    contrasts: dict[str, str] = Field(
        {},
        description="more column differences, from this run or --input, such as '{mine: loss_worse - loss_better}', "
        "or '{gain: loss_reference - loss_reference_new}' with --suffix _new",
    )
    suffix: Annotated[str, Field(pattern="^[a-zA-Z0-9_]*$")] = Field(
        "", description="suffix of new column names, if --input already has columns with these names"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code in the directories of the models, which some architectures need"
    )
    engine: EngineChoice = Field("auto", description="auto uses vllm if installed, else transformers")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is bfloat16 on a GPU and float32 on a CPU"
    )
    engine_method: Literal["auto", "pooler", "prompt_logprobs"] = Field(
        "auto",
        description="how vLLM returns losses: computed inside the engine (pooler), or through its slower public API; "
        "auto is pooler, except for recurrent models",
    )
    engine_args: dict[str, Any] = Field(
        {}, description="more vLLM engine arguments, such as --engine_args.quantization fp8"
    )
    batch_tokens: Annotated[int, Field(gt=0, le=1 << 20)] = Field(
        8192, description="tokens per engine batch; lower it if memory runs out"
    )
    tensor_parallel_size: Positive = Field(1, description="GPUs, or CPU processes, per model (vLLM)")
    workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="engines; 0 means as many as fit on the GPUs, or one on a CPU; if more than GPUs, they share them",
    )
    min_workers: Positive | None = Field(
        None, description="start once this many workers fit, and use up to --workers as nodes come and go; default all"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="CPUs per worker, reserved by Ray and used by its engine; default: reserve 1, use an equal share",
    )
    gpus_per_worker: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GPUs per worker, or a fraction of one; default depends on --workers"
    )
    ray_address: str | None = Field(None, description="address of a Ray cluster; by default Ray starts on this machine")
    dry_run: bool = Field(
        False, description="only print the columns to compute, their cost and the shards already done"
    )

    @field_validator("conditions")
    @classmethod
    def _check_conditions(cls, conditions: dict[str, ConditionConfig]) -> dict[str, ConditionConfig]:
        for name in conditions:
            check_identifier(name)
            if name in BUILT_IN:
                raise ValueError(f"'{name}' has its own flags; choose a name other than {', '.join(BUILT_IN)}")
        return conditions

    @field_validator("contrasts")
    @classmethod
    def _check_contrasts(cls, contrasts: dict[str, str]) -> dict[str, str]:
        for name, difference in contrasts.items():
            check_identifier(name)
            if is_reserved(name):
                raise ValueError(f"'{name}' is reserved by wmtp; choose another name")
            if not re.fullmatch(r"\s*\w+\s*-\s*\w+\s*", difference):
                raise ValueError(
                    f"{name} should be the difference of two columns, 'loss_a - loss_b', not '{difference}'"
                )
        return contrasts

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        if self.reference is None and not self.conditions and not self.contrasts:
            raise ValueError(
                "--reference missing; give a scoring model there or in --conditions, "
                "or --contrasts of columns in --input"
            )
        for name in ("base", "entropy", "gradient", "short_context"):
            if self.reference is None and getattr(self, name):
                raise ValueError(f"--{name} needs --reference")
        taken = {"excess_loss", "long_short"}
        quantities = ("loss", "entropy", "gradient")
        taken |= {f"{quantity}_{name}" for quantity in quantities for name in (*BUILT_IN, *self.conditions)}
        if clash := sorted(taken & self.contrasts.keys()):
            raise ValueError(f"--contrasts: {clash[0]} is the name of another column; choose another name")
        if self.workers and self.min_workers and self.min_workers > self.workers:
            raise ValueError("--min_workers must not be larger than --workers")
        if self.gpus_per_worker and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError("--gpus_per_worker must be a whole number or a share of one GPU")
        if self.short_context is None and self.short_stride is not None:
            raise ValueError("--short_stride needs --short_context")
        if self.short_context and self.short_stride and self.short_stride >= self.short_context:
            raise ValueError("--short_stride must be smaller than --short_context, or tokens would have no context")
        return self
