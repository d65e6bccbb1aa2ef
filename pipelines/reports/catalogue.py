"""The catalogue printed by `wmtp list`."""

from collections.abc import Iterator
from dataclasses import dataclass

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


def read_entry(path: Location) -> CatalogueEntry | UserError:
    """The entry of a shard set, or the error if its manifest cannot be read."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return error
    return CatalogueEntry(
        digest=manifest.digest,
        derived_from=manifest.derived_from,
        corpus=manifest.corpus.input,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        columns={name: f"{kind} of each document" for name, kind in manifest.corpus.sequence_columns.items()}
        | {name: column.origin.describe() for name, column in manifest.columns.items()},
    )


def catalogue(found: dict[Location, CatalogueEntry | UserError]) -> Iterator[str]:
    """Yield one line for each shard set, followed by one for each of its columns."""
    paths = {entry.digest: path for path, entry in found.items() if isinstance(entry, CatalogueEntry)}
    for path, entry in found.items():
        if isinstance(entry, UserError):
            yield str(entry)
            continue
        source = entry.derived_from
        origin = entry.corpus if source is None else str(paths.get(source, f"a set not found, {source[:12]}"))
        yield f"{path}: {entry.tokens:,} tokens, {entry.bytes:,} bytes, from {origin}"
        width = max(map(len, entry.columns), default=0)
        yield from (f"    {column:<{width}}  {description}" for column, description in entry.columns.items())
