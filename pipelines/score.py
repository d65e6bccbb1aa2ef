"""`wmtp score`: token shards to scored shards.

Everything that can be wrong with the input is checked before an engine starts. A run that stops is continued by the
same command; a run that is finished is left alone.
"""

import json
import os
import sys
import time
from contextlib import ExitStack

import ray
import torch
from tqdm import tqdm

from pipelines.score_summary import print_summary
from schemas.configs import ScoreConfig
from schemas.errors import UserError
from schemas.files import TOKENIZER, claim_output, copy_files
from schemas.locations import Location, resolve
from schemas.locks import exclusive
from schemas.manifest import Column, Condition, Contrast, Manifest, ShardEntry
from schemas.shard_set import ShardSet, find_finished, finish_shard_set
from scoring.conditions import ScoringPlan, plan_columns, reuse_columns
from scoring.engines import (
    SPEED_ARGS,
    EngineConfig,
    EngineMethod,
    EngineName,
    check_engine_args,
    choose_engine,
    choose_method,
    engine_version,
    runs_on_gpu,
)
from scoring.job import Workers, check_resources, ray_session, score_shards
from scoring.models import check_length, check_model
from scoring.scorer import ScoringTask, merge_parts, read_part
from scoring.windows import make_window


def run(config: ScoreConfig) -> ShardSet:
    """Score a shard set.

    Raises:
        UserError: the input, a model, the output or the machine is not as it must be.
    """
    started = time.monotonic()
    source = ShardSet.open(config.input)
    plan = plan_run(config, source)
    check_length(plan.models, source.manifest.longest)
    engine = choose_engine(config.engine)
    method = plan_method(config, engine, plan)
    with ExitStack() as stack:
        stack.enter_context(exclusive(config.output))
        if config.ray_address:
            stack.enter_context(ray_session(config.ray_address))
        gpus = count_gpus() if runs_on_gpu(engine) else 0
        workers = Workers.plan(config.workers, gpus, config.tensor_parallel_size)
        engine_config = EngineConfig(
            name=engine,
            method=method,
            dtype=("bfloat16" if gpus else "float32") if config.dtype == "auto" else config.dtype,
            batch_tokens=config.batch_tokens,
            max_length=source.manifest.longest,
            threads=max(1, count_cpus() // workers.count),
            on_gpu=gpus > 0,
            tensor_parallel_size=config.tensor_parallel_size,
            engine_args=config.engine_args,
        )
        plan = reuse_columns(plan, describe_conditions(plan, engine_config), source.manifest.columns, config.suffix)
        origins: dict[str, Condition | Contrast] = {**describe_conditions(plan, engine_config), **plan.contrasts}
        request = describe_request(source, origins)
        if finished := find_finished(config.output, request):
            held = f"{finished.manifest.tokens:,} tokens, {', '.join(finished.manifest.columns)}"
            print(f"{config.output} is already complete: {held}")
            return finished
        claim_output(config.output, request)
        copy_files(source.tokenizer_path, config.output / TOKENIZER)
        task = ScoringTask(
            source=resolve(config.input),
            output=resolve(config.output),
            plan=plan,
            engine=engine_config,
            bos_token_id=source.manifest.tokenizer.bos_token_id,
        )
        scored_tokens, resumed = score_missing(task, source.manifest.shards, workers)
        scored = finish(config.output, source, origins, request)
    print_summary(scored, scored_tokens, resumed, time.monotonic() - started)
    return scored


def plan_run(config: ScoreConfig, source: ShardSet) -> ScoringPlan:
    """Find and check the models, and plan the columns they give."""
    tokenizer = source.manifest.tokenizer
    reference = check_model(config.reference, "--reference", tokenizer)
    base = check_model(config.base, "--base", tokenizer) if config.base else None
    window = make_window(config.short_context, config.short_stride) if config.short_context else None
    return plan_columns(reference, base, window, config.entropy)


def plan_method(config: ScoreConfig, engine: EngineName, plan: ScoringPlan) -> EngineMethod | None:
    """How vLLM will return losses, None for the transformers engine.

    Raises:
        UserError: settings of vLLM for another engine, unknown ones, or ones that exclude each other.
    """
    if engine != "vllm":
        if config.engine_method != "auto" or config.engine_args or config.tensor_parallel_size > 1:
            raise UserError(
                "--engine_method, --engine_args and --tensor_parallel_size are settings of vLLM; "
                "leave them out with --engine transformers"
            )
        return None
    check_engine_args(config.engine_args)
    recurrent = [model.name for model in plan.models if model.recurrent]
    method = choose_method(config.engine_method, recurrent)
    if method == "prompt_logprobs" and config.entropy:
        raise UserError("--entropy: prompt_logprobs returns no entropies; leave it out or use --engine transformers")
    if config.engine_method == "auto" and recurrent:
        print(
            f"wmtp score: warning: {recurrent[0]} has a recurrent state, with which scoring inside vLLM is not tested: "
            "using prompt_logprobs, which is slower; --engine_method pooler overrides that",
            file=sys.stderr,
        )
    return method


def count_cpus() -> int:
    """CPUs of the connected Ray cluster, or those that this process may use."""
    return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else len(os.sched_getaffinity(0))


def count_gpus() -> int:
    """GPUs of the connected Ray cluster, or of this machine."""
    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else torch.cuda.device_count()


def describe_conditions(plan: ScoringPlan, engine: EngineConfig) -> dict[str, Condition]:
    """What the manifest says about the origin of each measured column."""
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
            quantity=measurement.quantity,
        )
        for name, measurement in plan.measurements.items()
    }


def describe_request(source: ShardSet, origins: dict[str, Condition | Contrast]) -> str:
    """What is asked for, as JSON: the input's digest and the columns. Where models lie and how fast does not matter."""
    columns = {name: origin.model_dump(mode="json", exclude={"model", "revision"}) for name, origin in origins.items()}
    return json.dumps({"command": "score", "input": source.manifest.digest, "columns": columns}, indent=2)


def score_missing(task: ScoringTask, shards: list[ShardEntry], workers: Workers) -> tuple[int, int]:
    """Score the shards that are not done yet.

    Returns:
        Tokens scored by this run, and how many shards were done before.
    """
    missing = [shard for shard in shards if read_part(task.output, shard.name) is None]
    tokens, total = sum(shard.tokens for shard in missing), sum(shard.tokens for shard in shards)
    resumed = done = len(shards) - len(missing)
    if not missing:
        return 0, resumed
    workers = Workers(min(workers.count, len(missing)), workers.gpus)
    with tqdm(total=total, initial=total - tokens, unit="tok", unit_scale=True, desc="scoring") as bar:
        bar.set_postfix_str(f"{done}/{len(shards)} shards, loading models")
        with ray_session(None, workers):
            check_resources(workers)
            for scored in score_shards(task, missing, workers):
                done += 1
                bar.update(scored)
                bar.set_postfix_str(f"{done}/{len(shards)} shards")
    return tokens, resumed


def finish(output: Location, source: ShardSet, origins: dict[str, Condition | Contrast], request: str) -> ShardSet:
    """Put the parts together: manifest and statistics of a set whose shards are all there."""
    names = [shard.name for shard in source.manifest.shards]
    entries = [entry for name in names if (entry := read_part(output, name))]
    if len(entries) < len(names):
        raise UserError(
            f"--output {output}: {len(names) - len(entries)} shards that workers wrote are not there; "
            "give a directory on a file system that all nodes of the cluster share"
        )
    merged = merge_parts(output, names)
    counts = source.value_counts() | {name: merged[name] for name in origins}
    new = {name: Column(origin=origin, statistics=counts[name].statistics()) for name, origin in origins.items()}
    manifest = Manifest(
        corpus=source.manifest.corpus,
        tokenizer=source.manifest.tokenizer,
        columns=source.manifest.columns | new,
        shards=entries,
        derived_from=source.manifest.digest,
        request=json.loads(request),
    )
    return finish_shard_set(output, manifest, counts)
