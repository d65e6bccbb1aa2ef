"""`wmtp list`: the catalogue of shard sets."""

from collections.abc import Iterator
from dataclasses import dataclass

from weighted_mtp.schemas.configs import ListConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.storage.files import MANIFEST
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.locks import is_shard_set


@dataclass(frozen=True)
class Listed:
    """What the catalogue says about a shard set, which is little: manifests of large sets take memory."""

    digest: str
    derived_from: str | None
    corpus: str
    tokens: int
    bytes: int
    columns: dict[str, str]


def run(config: ListConfig) -> None:
    """Print the shard sets found, with their columns; only manifests are read.

    Raises:
        UserError: a directory does not exist, or there is no shard set.
    """
    found: dict[Location, Listed | UserError] = {}
    for directory in config.directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; check the path")
        for manifest in sorted(directory.rglob(MANIFEST)):
            if is_shard_set(manifest.parent):
                found[manifest.parent] = read(manifest.parent)
    if not found:
        looked = ", ".join(map(str, config.directories))
        raise UserError(f"{looked}: no shard set here; write one with 'wmtp prepare'")
    for line in catalogue(found):
        print(line)


def read(path: Location) -> Listed | UserError:
    """What the manifest of a shard set says, or what is wrong with it."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return error
    return Listed(
        digest=manifest.digest,
        derived_from=manifest.derived_from,
        corpus=manifest.corpus.input,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        columns={name: f"{kind} of each document" for name, kind in manifest.corpus.sequence_columns.items()}
        | {name: column.origin.describe() for name, column in manifest.columns.items()},
    )


def catalogue(found: dict[Location, Listed | UserError]) -> Iterator[str]:
    """Lines: a shard set, then its columns."""
    paths = {listed.digest: path for path, listed in found.items() if isinstance(listed, Listed)}
    for path, listed in found.items():
        if isinstance(listed, UserError):
            yield str(listed)
            continue
        source = listed.derived_from
        origin = listed.corpus if source is None else str(paths.get(source, f"a set not found, {source[:12]}"))
        yield f"{path}: {listed.tokens:,} tokens, {listed.bytes:,} bytes, from {origin}"
        width = max(map(len, listed.columns), default=0)
        yield from (f"    {name:<{width}}  {described}" for name, described in listed.columns.items())
