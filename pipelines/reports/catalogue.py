"""The catalogue printed by `wmtp list`."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from weighted_mtp.pipelines.reports.run_entry import RunEntry
from weighted_mtp.pipelines.reports.train_summary import prediction_title
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.storage.locations import Location


@dataclass(frozen=True)
class CatalogueEntry:
    """Facts about one shard set. The manifest is not kept, because manifests of large sets use much memory."""

    digest: str
    derived_from: str | None
    corpus: str
    tokens: int
    bytes: int
    columns: dict[str, str]


@dataclass(frozen=True)
class UnfinishedSet:
    """A shard set without a manifest: shards with their final names, and how many there will be if that is known."""

    shards: int
    total: int | None


Entry = CatalogueEntry | RunEntry | UnfinishedSet | UserError
SHARD_NAME = re.compile(r"shard-\d+-of-(\d{1,9})\.parquet")


def read_entry(path: Location) -> CatalogueEntry:
    """The entry of a shard set.

    Raises:
        UserError: its manifest cannot be read.
    """
    manifest = read_manifest(path)
    return CatalogueEntry(
        digest=manifest.digest,
        derived_from=manifest.derived_from,
        corpus=manifest.corpus.input,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        columns={name: f"{kind} of each document" for name, kind in manifest.corpus.sequence_columns.items()}
        | {name: column.origin.describe() for name, column in manifest.columns.items()},
    )


def unfinished_set(names: Iterable[str]) -> UnfinishedSet:
    """The entry of an unfinished shard set, from the names of the files in its `data/`."""
    shards = [match for name in names if (match := SHARD_NAME.fullmatch(name))]
    return UnfinishedSet(len(shards), max((int(match[1]) for match in shards), default=None))


def catalogue(found: Mapping[Location, Entry]) -> Iterator[str]:
    """Yield one line for each entry, followed by one for each column of a set, or for each input of a run."""
    paths = {entry.digest: str(path) for path, entry in found.items() if isinstance(entry, CatalogueEntry)}
    for path, entry in found.items():
        if isinstance(entry, UserError):
            yield str(entry)
        elif isinstance(entry, UnfinishedSet):
            total = "" if entry.total is None else f" of {entry.total:,}"
            yield f"{path}: unfinished shard set, {entry.shards:,}{total} shards done"
        elif isinstance(entry, RunEntry):
            yield f"{path}: {describe_run(entry)}"
            yield f"    input  {name_sets(entry.input, paths)}"
            yield from (f"    mix    {share} {name_sets(digests, paths)}" for share, digests in entry.mix)
        else:
            origin = entry.corpus if entry.derived_from is None else name_sets([entry.derived_from], paths)
            yield f"{path}: {entry.tokens:,} tokens, {entry.bytes:,} bytes, from {origin}"
            width = max(map(len, entry.columns), default=0)
            yield from (f"    {column:<{width}}  {description}" for column, description in entry.columns.items())


def describe_run(entry: RunEntry) -> str:
    """Progress, last losses in nats, and size of a run."""
    total = "" if entry.total is None else f" of {entry.total:,}"
    parts = [f"{'' if entry.finished else 'unfinished '}training run, {entry.steps:,}{total} steps"]
    if entry.loss is not None:
        parts.append(f"loss {entry.loss:.5g}")
    if entry.held_out:
        losses = [f"{loss:.5g} ({prediction_title(part)})" for part, loss in entry.held_out.items()]
        parts.append(f"held-out loss {', '.join(losses)}")
    return ", ".join([*parts, f"{entry.bytes:,} bytes"])


def name_sets(digests: Iterable[str], paths: Mapping[str, str]) -> str:
    """The listed paths of shard sets."""
    return ", ".join(paths.get(digest, f"a set not found, {digest[:12]}") for digest in digests)
