"""`wmtp score`: token shards to scored shards.

Everything that can be wrong with the input is checked before an engine starts. A run that stops is continued by the
same command; a run that is finished is left alone.
"""

import json
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import ray
import torch

from weighted_mtp.pipelines.reports.score_summary import Scored, print_dry_run, print_summary
from weighted_mtp.schemas.configs import ConditionConfig, ScoreConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import Condition, Contrast, Manifest, Quantity, ScoreColumn, ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet, find_finished, finish_shard_set
from weighted_mtp.schemas.storage.claims import check_claim, claim_output
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files, write_text
from weighted_mtp.schemas.storage.locations import Location, remove_tree, resolve
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.scoring.conditions.models import ScoringModel, check_length, check_model
from weighted_mtp.scoring.conditions.plan import (
    ScoringPlan,
    measure_condition,
    parse_contrast,
    plan_columns,
    reuse_columns,
)
from weighted_mtp.scoring.conditions.prompts import Prompt, make_prompt
from weighted_mtp.scoring.conditions.short_context import make_short_context
from weighted_mtp.scoring.engines.base import EngineConfig, EngineMethod, EngineName
from weighted_mtp.scoring.engines.choice import choose_engine, choose_method, engine_version, runs_on_gpu
from weighted_mtp.scoring.engines.vllm_arguments import SPEED_ARGS, check_engine_args
from weighted_mtp.scoring.job.contrasts_only import subtract
from weighted_mtp.scoring.job.driver import ScoringJob
from weighted_mtp.scoring.job.ray_cluster import Pool, ray_session
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.units import Reject, clear_attempts, find_done, gather


def run(config: ScoreConfig) -> ShardSet | None:
    """Score a shard set; with `dry_run`, only say what that would take, and return None.

    Raises:
        UserError: the input, a model, the output or the machine is not as it must be.
    """
    if resolve(config.input) == resolve(config.output):
        raise UserError(f"--output {config.output}: is the --input; choose another, which will hold its columns too")
    source = ShardSet.open(config.input)
    source.value_counts(), earlier_rejects(source)  # needed at the end: find out now
    plan = plan_run(config, source)
    engine = choose_engine(config.engine)
    method = plan_method(config, engine, plan)
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if config.dry_run else exclusive(config.output))
        if config.ray_address:
            stack.enter_context(ray_session(config.ray_address))
        pool, engine_config = plan_workers(config, source, engine, method)
        plan = reuse_columns(plan, describe_conditions(plan, engine_config), source.manifest.columns, config.suffix)
        check_new_names(plan, source)
        origins: dict[str, Condition | Contrast] = {**describe_conditions(plan, engine_config), **plan.contrasts}
        request = describe_request(source, origins)
        if finished := find_finished(config.output, request):
            held = f"{finished.manifest.tokens:,} tokens, {', '.join(finished.manifest.columns)}"
            print(f"{config.output} is already complete: {held}")
            return finished
        if config.dry_run:
            check_claim(config.output, request)
            print_dry_run(config.output, source, plan, find_done(config.output, source.manifest.shards))
            return None
        if not claim_output(config.output, request):
            remove_tree(config.output / TOKENIZER)  # of a claim that gave way
        clear_attempts(config.output)
        copy_files(source.tokenizer_path, config.output / TOKENIZER)
        task = ScoringTask(
            source=resolve(config.input),
            output=resolve(config.output),
            plan=plan,
            engine=engine_config,
            bos_token_id=source.manifest.tokenizer.bos_token_id,
        )
        scored = score_missing(task, source.manifest.shards, pool)
        shards = finish(config.output, source, origins, request)
    print_summary(shards, scored)
    return shards


def plan_run(config: ScoreConfig, source: ShardSet) -> ScoringPlan:
    """Find and check the models, and plan the columns they give."""
    found: dict[str, ScoringModel] = {}

    def find(name: str, flag: str, prompt: Prompt | None = None) -> ScoringModel:
        model = found[name] = found.get(name) or check_model(name, flag, source.manifest.tokenizer)
        check_length(model, flag, source.manifest.longest, len(prompt.input_ids) if prompt else 0)
        return model

    reference = find(config.reference, "--reference") if config.reference else None
    base = find(config.base, "--base") if config.base else None
    window = make_short_context(config.short_context, config.short_stride) if config.short_context else None
    plan = plan_columns(reference, base, window, further_quantities(config))
    for name, of in config.conditions.items():
        prompt = make_prompt(of.prompt, f"--conditions.{name}.prompt", source)
        model = find(of.model, f"--conditions.{name}", prompt)
        plan.measurements.update(measure_condition(name, model, prompt, further_quantities(of)))
    plan.contrasts.update({name: parse_contrast(difference) for name, difference in config.contrasts.items()})
    return plan


def further_quantities(config: ScoreConfig | ConditionConfig) -> list[Quantity]:
    """What is measured besides the loss of the reference, or of a condition."""
    wanted: dict[Quantity, bool] = {"entropy": config.entropy, "gradient": config.gradient}
    return [quantity for quantity, flag in wanted.items() if flag]


def check_new_names(plan: ScoringPlan, source: ShardSet) -> None:
    """Raise UserError if a new column has the name of one that came with the corpus."""
    if clash := [name for name in plan.columns if name in source.manifest.corpus.sequence_columns]:
        raise UserError(
            f"--input {source.path}: has a column '{clash[0]}' of its corpus; give the contrast another name"
        )


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
    if "gradient" in plan.quantities:
        raise UserError(
            "--gradient: vLLM computes no gradients; add --engine transformers, in a run of its own if need be"
        )
    check_engine_args(config.engine_args)
    recurrent = [model.name for model in plan.models if model.recurrent]
    method = choose_method(config.engine_method, recurrent)
    if method == "prompt_logprobs" and "entropy" in plan.quantities:
        raise UserError("--entropy: prompt_logprobs returns no entropies; leave it out or use --engine transformers")
    if config.engine_method == "auto" and recurrent:
        print(
            f"wmtp score: warning: {recurrent[0]} has a recurrent state, with which scoring inside vLLM is not tested: "
            "using prompt_logprobs, which is slower; --engine_method pooler overrides that",
            file=sys.stderr,
        )
    return method


def plan_workers(
    config: ScoreConfig, source: ShardSet, engine: EngineName, method: EngineMethod | None
) -> tuple[Pool, EngineConfig]:
    """How many workers there will be, and how their engines run, on the connected cluster or on this machine."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = int(resources.get("GPU", 0)) if resources else torch.cuda.device_count()
    cpus = int(resources.get("CPU", 1)) if resources else len(os.sched_getaffinity(0))
    gpus = gpus if runs_on_gpu(engine) else 0
    if config.gpus_per_worker and not gpus:
        raise UserError(
            f"--gpus_per_worker {config.gpus_per_worker:g}: no GPU that {engine} could use here; leave it out"
        )
    pool = Pool.plan(
        config.workers,
        least=config.min_workers,
        cpus=config.cpus_per_worker or 1.0,
        gpus_per_worker=config.gpus_per_worker,
        gpus=gpus,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    engine_config = EngineConfig(
        name=engine,
        method=method,
        dtype=("bfloat16" if gpus else "float32") if config.dtype == "auto" else config.dtype,
        batch_tokens=config.batch_tokens,
        max_length=source.manifest.longest,
        threads=max(1, int(config.cpus_per_worker or cpus / pool.most)),
        on_gpu=gpus > 0,
        tensor_parallel_size=config.tensor_parallel_size,
        engine_args=config.engine_args,
    )
    return pool, engine_config


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
            prompt=measurement.prompt.text if measurement.prompt else None,
            quantity=measurement.quantity,
        )
        for name, measurement in plan.measurements.items()
    }


def describe_request(source: ShardSet, origins: dict[str, Condition | Contrast]) -> str:
    """What is asked for, as JSON: the input's digest and the columns. Where models lie and how fast does not matter."""
    columns = {name: origin.model_dump(mode="json", exclude={"model", "revision"}) for name, origin in origins.items()}
    return json.dumps({"command": "score", "input": source.manifest.digest, "columns": columns}, indent=2)


def score_missing(task: ScoringTask, shards: list[ShardEntry], pool: Pool) -> Scored:
    """Score the shards that are not done yet, and say how it went."""
    done = find_done(task.output, shards)
    missing = [shard for shard in shards if shard.name not in done]
    if not missing:
        return Scored(resumed=len(done))
    total, tokens = sum(shard.tokens for shard in shards), sum(shard.tokens for shard in missing)
    here = not task.plan.models and not ray.is_initialized()  # contrasts alone: engines and Ray have nothing to do
    pool = pool.for_units(1 if here else len(missing))
    started = None
    incidents = 0
    with ProgressBar(total=total, initial=total - tokens, unit="tok", unit_scale=True, desc="scoring") as bar:

        def report(line: str) -> None:
            nonlocal incidents
            incidents += 1
            bar.write(f"wmtp score: {line}", file=sys.stderr)

        bar.set_postfix_str(f"{len(done)}/{len(shards)} shards, loading models")
        with nullcontext() if here else ray_session(None, pool):
            for progress in subtract(task, missing) if here else ScoringJob(task, missing, pool, report).run():
                if started is None and progress.workers:
                    started = time.monotonic()
                    bar.unpause()  # loading models is no scoring
                bar.n = max(bar.n, total - tokens + progress.tokens)  # a part of it is an estimate
                workers = f"{progress.workers} of {pool.most} workers" if started else "loading models"
                state = f"{len(done) + progress.units}/{len(shards)} shards, {workers}"
                bar.set_postfix_str(state + f", {progress.rejects} rejects" * bool(progress.rejects))
    return Scored(tokens=tokens, resumed=len(done), seconds=time.monotonic() - (started or 0), incidents=incidents)


def finish(output: Location, source: ShardSet, origins: dict[str, Condition | Contrast], request: str) -> ShardSet:
    """Put the records together: manifest, statistics and rejects of a set whose shards are all there."""
    shards = source.manifest.shards
    found = gather(output, [shard.name for shard in shards])
    rejects = earlier_rejects(source) + found.rejects
    if rejects:
        write_text(output / REJECTS, "".join(reject.model_dump_json() + "\n" for reject in rejects))
    sequences = Counter(shard for shard, _ in {(reject.shard, reject.row) for reject in rejects})
    entries = [replace(entry, rejects=sequences[entry.name]) for entry in found.entries]
    counts = source.value_counts() | {name: found.counts[name] for name in origins}
    new = {name: ScoreColumn(origin=origin, statistics=counts[name].statistics()) for name, origin in origins.items()}
    manifest = Manifest(
        corpus=source.manifest.corpus,
        tokenizer=source.manifest.tokenizer,
        columns=source.manifest.columns | new,
        shards=entries,
        derived_from=source.manifest.digest,
        timings=found.timings,
        request=json.loads(request),
    )
    return finish_shard_set(output, manifest, counts)


def earlier_rejects(source: ShardSet) -> list[Reject]:
    """What the input's own `rejects.jsonl` says of sequences that could not be scored under its columns.

    Raises:
        UserError: it is missing or damaged.
    """
    file = source.path / REJECTS
    if not any(shard.rejects for shard in source.manifest.shards):
        return []
    try:
        return [Reject.model_validate_json(line) for line in file.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: missing or damaged ({first_line(error)}); restore it") from error
