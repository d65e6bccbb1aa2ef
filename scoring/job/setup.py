"""Resolves the settings of a scoring run. No other module of the job reads the config.

All errors in settings, input and models are detected here, before an engine starts. `check_inputs` needs no cluster;
`set_up` runs once the cluster is connected.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import torch

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.configs.common import check_identifier, is_reserved
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Condition, Contrast, Quantity, find_clash
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.claims import check_separate
from weighted_mtp.schemas.storage.locations import Location, resolve
from weighted_mtp.scoring.conditions.models import ScoringModel, check_model, check_sequences
from weighted_mtp.scoring.conditions.plan import (
    RENAME,
    ScoringPlan,
    measure_condition,
    parse_contrast,
    plan_columns,
    reuse_columns,
)
from weighted_mtp.scoring.conditions.prompts import Prompt, make_prompt
from weighted_mtp.scoring.conditions.short_context import make_short_context
from weighted_mtp.scoring.engines.base import EngineConfig, EngineMethod, EngineName
from weighted_mtp.scoring.engines.choice import (
    check_engine_settings,
    choose_engine,
    choose_method,
    engine_version,
    runs_on_gpu,
)
from weighted_mtp.scoring.engines.vllm_arguments import SPEED_ARGS, check_engine_args
from weighted_mtp.scoring.job.finish import earlier_rejects
from weighted_mtp.scoring.job.scorer import PROBE_REQUEST, ScoringTask
from weighted_mtp.scoring.job.worker_pool import WorkerPool


@dataclass(frozen=True)
class ScoringInputs:
    """Checked inputs of a run: the token set, all requested columns, and the engine with its method (vLLM only)."""

    source: ShardSet
    plan: ScoringPlan
    engine: EngineName
    method: EngineMethod | None


@dataclass(frozen=True)
class ScoringSetup:
    """A run that is ready to start.

    Attributes:
        source: the shard set to score.
        output: directory of the new one.
        plan: the columns still to compute.
        engine: settings of the engines.
        pool: number and resources of the workers.
        origins: the manifest's description of each new column.
        request: JSON that identifies the run; only the same request continues a stopped run.
    """

    source: ShardSet
    output: Location
    plan: ScoringPlan
    engine: EngineConfig
    pool: WorkerPool
    origins: dict[str, Condition | Contrast]
    request: str

    @property
    def task(self) -> ScoringTask:
        """The part of the setup that workers need."""
        reader = self.source.reader
        return ScoringTask(
            source=replace(reader, directory=resolve(reader.directory)),
            output=resolve(self.output),
            plan=self.plan,
            engine=self.engine,
            bos_token_id=self.source.manifest.tokenizer.bos_token_id,
        )


def check_inputs(config: ScoreConfig, warn: Callable[[str], None]) -> ScoringInputs:
    """Open the input, find and check the models, and plan all requested columns.

    Raises:
        UserError: the input, a model or a setting of the engine is unusable.
    """
    check_separate(config.output, config.input)
    source = ShardSet.open(config.input)
    source.value_counts(), earlier_rejects(source)  # both are needed at the end: fail now if they are damaged
    find = ModelFinder(source, config.trust_remote_code)
    reference = find(config.reference, "--reference") if config.reference else None
    base = find(config.base, "--base") if config.base else None
    window = make_short_context(config.short_context, config.short_stride) if config.short_context else None
    plan = plan_columns(reference, base, window, extra_quantities(config.entropy, config.gradient))
    for name, condition in config.conditions.items():
        prompt = make_prompt(condition.prompt, f"--conditions.{name}.prompt", source)
        model = find(condition.model, f"--conditions.{name}", prompt)
        extra = extra_quantities(condition.entropy, condition.gradient)
        plan.measurements.update(measure_condition(name, model, prompt, extra))
    plan.contrasts.update({name: parse_contrast(difference) for name, difference in config.contrasts.items()})
    engine = choose_engine(config.engine)
    check_engine_settings(engine, config)
    method = plan_method(config.engine_method, config.engine_args, plan, warn) if engine == "vllm" else None
    return ScoringInputs(source, plan, engine, method)


class ModelFinder:
    """Finds each model of a run once and checks that it fits the corpus."""

    def __init__(self, source: ShardSet, trust_remote_code: bool) -> None:
        self.source = source
        self.trust_remote_code = trust_remote_code
        self.found: dict[str, ScoringModel] = {}

    def __call__(self, name: str, flag: str, prompt: Prompt | None = None) -> ScoringModel:
        """The model named `name`, for sequences after a prompt; `flag` is for messages.

        Raises:
            UserError: not found, another tokenizer, too few token ids, or a context that is too short.
        """
        model = self.found.get(name) or check_model(name, flag, self.source, trust_remote_code=self.trust_remote_code)
        self.found[name] = model
        check_sequences(model, flag, self.source, prompt.input_ids if prompt else ())
        return model


def extra_quantities(entropy: bool, gradient: bool) -> list[Quantity]:
    """The quantities to measure besides the loss."""
    wanted: dict[Quantity, bool] = {"entropy": entropy, "gradient": gradient}
    return [quantity for quantity, flag in wanted.items() if flag]


def plan_method(
    wanted: Literal["auto", "pooler", "prompt_logprobs"],
    engine_args: Mapping[str, Any],
    plan: ScoringPlan,
    warn: Callable[[str], None],
) -> EngineMethod:
    """Choose how vLLM returns losses.

    Raises:
        UserError: unknown settings of vLLM, or quantities that it does not compute.
    """
    if "gradient" in plan.quantities:
        raise UserError(
            "--gradient: vLLM computes no gradients; use --engine transformers, in a separate run if necessary"
        )
    check_engine_args(engine_args)
    recurrent = [model.name for model in plan.models if model.recurrent]
    method = choose_method(wanted, recurrent)
    if method == "prompt_logprobs" and "entropy" in plan.quantities:
        raise UserError("--entropy: prompt_logprobs returns no entropies; leave it out or use --engine transformers")
    if wanted == "auto" and recurrent:
        warn(
            f"{recurrent[0]} has a recurrent state, and scoring inside vLLM is not tested for such models: "
            "using prompt_logprobs, which is slower; --engine_method pooler overrides this"
        )
    return method


def set_up(config: ScoreConfig, inputs: ScoringInputs) -> ScoringSetup:
    """Plan the workers for the connected cluster, or this machine, and omit columns already in the input.

    Raises:
        UserError: no such GPU, or a new column whose name is taken.
    """
    manifest = inputs.source.manifest
    cpus, gpus = count_devices(inputs.engine)
    if config.gpus_per_worker and not gpus:
        raise UserError(
            f"--gpus_per_worker {config.gpus_per_worker:g}: no GPU usable by {inputs.engine} here; leave it out"
        )
    pool = WorkerPool.plan(
        config.workers,
        min_workers=config.min_workers,
        cpus=config.cpus_per_worker or 1.0,
        gpus_per_worker=config.gpus_per_worker,
        gpus=gpus,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    engine = EngineConfig(
        name=inputs.engine,
        method=inputs.method,
        dtype=("bfloat16" if gpus else "float32") if config.dtype == "auto" else config.dtype,
        batch_tokens=config.batch_tokens,
        max_length=max(manifest.longest, len(PROBE_REQUEST.input_ids)),
        threads=max(1, int(config.cpus_per_worker or cpus / pool.max_workers)),
        on_gpu=gpus > 0,
        tensor_parallel_size=config.tensor_parallel_size,
        engine_args=config.engine_args,
        trust_remote_code=config.trust_remote_code,
    )
    plan = reuse_columns(inputs.plan, describe_conditions(inputs.plan, engine), manifest.columns, config.suffix)
    check_names(plan.columns, inputs.source)
    origins = describe_conditions(plan, engine) | plan.contrasts
    request = describe_request(inputs.source, origins)
    return ScoringSetup(inputs.source, config.output, plan, engine, pool, origins, request)


def check_names(columns: Collection[str], source: ShardSet) -> None:
    """Check the names of new columns, with their suffix.

    Raises:
        UserError: a set with all columns of `source` cannot have a column of such a name.
    """
    held = source.manifest.corpus.sequence_columns
    for name in columns:
        if name in held:
            raise UserError(f"--input {source.path}: already has a corpus column '{name}'; {RENAME}")
        try:
            check_identifier(name)
        except ValueError as error:
            raise UserError(f"--suffix: {error}") from error
        if is_reserved(name):
            raise UserError(f"--suffix: '{name}' is reserved by wmtp; choose another one")
    if clash := find_clash([*source.manifest.columns, *held, *columns]):
        raise UserError(f"--input {source.path}: {clash}; {RENAME}")


def count_devices(engine: EngineName) -> tuple[int, int]:
    """CPUs and usable GPUs of the connected cluster, or of this machine; no GPUs for an engine without GPU support."""
    if ray.is_initialized():
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    else:
        cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    return cpus, gpus if runs_on_gpu(engine) else 0


def describe_conditions(plan: ScoringPlan, engine: EngineConfig) -> dict[str, Condition]:
    """The manifest's description of each measured column."""
    return {
        name: Condition(
            model=measurement.model.name,
            revision=measurement.model.revision,
            fingerprint=measurement.model.fingerprint,
            device="cuda" if engine.on_gpu else "cpu",
            dtype=engine.dtype,
            engine=engine.name,
            engine_version=engine_version(engine.name),
            engine_method=engine.method,
            engine_args={name: value for name, value in engine.engine_args.items() if name not in SPEED_ARGS},
            tensor_parallel_size=engine.tensor_parallel_size,
            window=measurement.window,
            prompt=measurement.prompt.text if measurement.prompt else None,
            quantity=measurement.quantity,
        )
        for name, measurement in plan.measurements.items()
    }


def describe_request(source: ShardSet, origins: Mapping[str, Condition | Contrast]) -> str:
    """The request as JSON: digest of the input, and the columns, without model locations and speed settings."""
    columns = {name: origin.model_dump(mode="json", exclude={"model", "revision"}) for name, origin in origins.items()}
    return json.dumps({"command": "score", "input": source.manifest.digest, "columns": columns}, indent=2)
