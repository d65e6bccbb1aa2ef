"""`wmtp list`: the catalogue of shard sets."""

from collections.abc import Iterator

from schemas.configs import ListConfig
from schemas.errors import UserError
from schemas.files import MANIFEST
from schemas.locations import Location
from schemas.locks import is_shard_set
from schemas.manifest import Manifest, read_manifest


def run(config: ListConfig) -> None:
    """Print the shard sets found, with their columns; only manifests are read.

    Raises:
        UserError: a directory does not exist, or there is no shard set.
    """
    found: dict[Location, Manifest | UserError] = {}
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


def read(path: Location) -> Manifest | UserError:
    """The manifest of a shard set, or what is wrong with it."""
    try:
        return read_manifest(path)
    except UserError as error:
        return error


def catalogue(found: dict[Location, Manifest | UserError]) -> Iterator[str]:
    """Lines: a shard set, then its columns."""
    paths = {manifest.digest: path for path, manifest in found.items() if isinstance(manifest, Manifest)}
    for path, manifest in found.items():
        if isinstance(manifest, UserError):
            yield str(manifest)
            continue
        source = manifest.derived_from
        origin = manifest.corpus.input if source is None else str(paths.get(source, f"a set not found, {source[:12]}"))
        yield f"{path}: {manifest.tokens:,} tokens, {manifest.bytes:,} bytes, from {origin}"
        width = max(map(len, manifest.columns), default=0)
        yield from (f"    {name:<{width}}  {column.origin.describe()}" for name, column in manifest.columns.items())
