"""Checks before the slow imports of a command: of what the settings, the local directories and one request show.

The commands themselves check everything, also when they are called from Python.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from weighted_mtp.pipelines.reports.pages import check_page
from weighted_mtp.schemas.configs import (
    Config,
    EvaluateConfig,
    InspectConfig,
    IterateConfig,
    PrepareConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
    WeightsReportConfig,
    split_paths,
)
from weighted_mtp.schemas.configs.prepare import BYTE_TOKENIZER
from weighted_mtp.schemas.errors import NO_CONFIG, UserError, first_line
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.shard_set.shard_set import check_request
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.claims import check_empty, check_separate
from weighted_mtp.schemas.storage.files import MANIFEST, PROGRESS
from weighted_mtp.schemas.storage.locations import Location, is_address, is_missing_directory, locate
from weighted_mtp.schemas.storage.locks import check_place
from weighted_mtp.schemas.storage.training_run import MODEL, trained_model
from weighted_mtp.schemas.weights.nodes import Node, columns_of, labels_of
from weighted_mtp.scoring.corpus.source_files import find_files
from weighted_mtp.scoring.engines.choice import check_engine_settings, choose_engine
from weighted_mtp.scoring.job.addresses import check_cluster
from weighted_mtp.training.run.preconditions import (
    check_optimizer,
    check_run,
    check_trackers,
    fixed_settings,
    resolve_length,
)


def check_early(config: Config) -> None:
    """Find mistakes in the settings of a command. Locations in object stores are left to the command.

    Raises:
        UserError: a set, a model, a column or a package is missing, or the output is in use or holds something else.
    """
    match config:
        case PrepareConfig():
            if not is_address(config.input) and find_files(config.input, config.format) is None:
                check_hub(config.input, "--input", "README.md", "dataset")
            check_output(config.output, {"command": "prepare"})
            if config.tokenizer != BYTE_TOKENIZER:
                check_model(config.tokenizer, "--tokenizer", "tokenizer_config.json")
        case ScoreConfig():
            check_score(config)
        case TrainConfig():
            check_train(config)
        case EvaluateConfig():
            check_sets([config.input], {}, None)
            check_model(config.model, "--model")
        case IterateConfig():
            check_sets([config.input], {}, None)
            where = {"input": config.input, "output": config.output}
            check_scoring(config.scoring(**where, reference=config.reference))
            check_training(config.training(**where, model=config.base))
            if config.model:
                check_model(config.model, "--model")
        case InspectConfig():
            check_page(config.html)
            for shards in check_sets([config.set], {}, None):
                if config.column is not None:
                    shards.first.require_column(config.column)
        case WeightsReportConfig():
            check_page(config.html)
            check_sets(config.set, config.mix, config.weights.node)
        case VerifyConfig() if isinstance(config.set, Path):
            read_manifest(config.set)


def check_score(config: ScoreConfig) -> None:
    """The early checks of `wmtp score`."""
    check_separate(config.output, config.input)
    known = {"command": "score"}
    for shards in check_sets([config.input], {}, None):
        known["input"] = shards.digest
    check_output(config.output, known)
    check_scoring(config)


def check_scoring(config: ScoreConfig) -> None:
    """The models, the engine and the cluster of `wmtp score`."""
    for flag, name in (("--reference", config.reference), ("--base", config.base)):
        if name:
            check_model(name, flag)
    for name, condition in config.conditions.items():
        check_model(condition.model, f"--conditions.{name}")
    check_engine_settings(choose_engine(config.engine), config)
    if config.ray_address:
        check_cluster(config.ray_address)


def check_train(config: TrainConfig) -> None:
    """The early checks of `wmtp train`."""
    if isinstance(config.output, Path):
        check_place(config.output)
    sets = check_sets(config.input, config.mix, config.weights.node)
    if isinstance(config.output, Path):
        all_opened = len(sets) == 1 + len(config.mix)
        known = {"config": fixed_settings(resolve_length(config, sets))} if all_opened else {}
        check_run(config.output, config.output, known, config.continue_steps)
    check_training(config)


def check_training(config: TrainConfig) -> None:
    """The held-out sets, the model, the trackers and the cluster of `wmtp train`."""
    check_sets(config.eval_input or (), {}, None)
    check_model(config.model, "--model")
    check_trackers(config.trackers)
    check_optimizer(config.optimizer.kind)
    if config.ray_address:
        check_cluster(config.ray_address)


def check_sets(paths: Iterable[Location], mix: Iterable[str], formula: Node | None) -> list[ZippedSets]:
    """Open the sets of a command on the local disk: a set and those zipped with it, and those mixed with it.

    Raises:
        UserError: a set cannot be opened, or lacks a column of `formula`.
    """
    mixed = (map(locate, split_paths(name)) for name in mix)
    groups: list[list[Location]] = [list(group) for group in (paths, *mixed)]
    opened = [ZippedSets.open(group) for group in groups if group and all(isinstance(path, Path) for path in group)]
    for shards in opened:
        for column in (*columns_of(formula), *labels_of(formula)) if formula else ():
            shards.kind(column)
    return opened


def check_model(name: str, flag: str, file: str = "config.json") -> None:
    """Look for a model or a tokenizer.

    Args:
        name: directory, training run, or Hugging Face id, perhaps with a revision.
        flag: command line flag that names it.
        file: a file in JSON that it has.

    Raises:
        UserError: it is not there, or the file is damaged.
    """
    if is_address(name):
        return
    directory: Location = locate(name)
    if trained_model(directory, flag) or (directory / MODEL / file).exists():  # a run, or what MTPModel.save wrote
        directory /= MODEL
    if is_missing_directory(name):
        raise UserError(f"{flag} {name}: no such directory; check the path")
    if not directory.is_dir():
        check_hub(name, flag, file)
    elif (directory / file).exists():
        try:
            json.loads((directory / file).read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {name}: {file} cannot be read ({first_line(error)}); restore it") from error
    elif file == "config.json":
        raise UserError(f"{flag} {name}: {NO_CONFIG}")


def check_hub(name: str, flag: str, file: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Look for a Hugging Face id on the hub or in its cache, with one request: other libraries retry for a minute.

    Raises:
        UserError: it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    try:
        snapshot_download(repository, repo_type=kind, revision=revision or None, allow_patterns=[file])
    except (HfHubHTTPError, OSError, ValueError) as error:
        missing = "directory" if kind == "model" else "file or directory"
        raise UserError(
            f"{flag} {name}: no such {missing}, and not available from the Hugging Face hub or its local cache; "
            "check the name, the revision and the connection"
        ) from error


def check_output(output: Location, known: dict[str, Any]) -> None:
    """Check the output of a command that writes a shard set; `known` is a part of its request.

    Raises:
        UserError: it is not a directory, lies inside a shard set, or holds something else.
    """
    if not isinstance(output, Path):
        return
    check_place(output)
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        check_request(output, manifest, manifest.request | known)
    elif not (output / PROGRESS).exists():
        check_empty(output)
