"""`wmtp list`: the catalogue of shard sets."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.configs import ListConfig
from schemas.errors import UserError
from schemas.files import MANIFEST, TOKENIZER
from schemas.manifest import Manifest, read_manifest


def run(config: ListConfig) -> None:
    """Print a table of the shard sets found; only manifests are read.

    Raises:
        UserError: a directory does not exist, or there is no shard set.
    """
    found: dict[Path, Manifest | UserError] = {}
    for directory in config.directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; check the path")
        for manifest in sorted(directory.rglob(MANIFEST)):
            if (manifest.parent / TOKENIZER).is_dir():
                found[manifest.parent] = read(manifest.parent)
    if not found:
        looked = ", ".join(map(str, config.directories))
        raise UserError(f"{looked}: no shard set here; write one with 'wmtp prepare'")
    Console(markup=False).print(catalogue(found))


def read(path: Path) -> Manifest | UserError:
    """The manifest of a shard set, or what is wrong with it."""
    try:
        return read_manifest(path)
    except UserError as error:
        return error


def catalogue(found: dict[Path, Manifest | UserError]) -> Table:
    """One row for each shard set and its columns."""
    paths = {manifest.digest: path for path, manifest in found.items() if isinstance(manifest, Manifest)}
    table = Table("set", "from", "tokens", "bytes", "columns", show_lines=True)
    for path, manifest in found.items():
        if isinstance(manifest, UserError):
            table.add_row(Text(str(path)), "", "", "", Text(str(manifest)))
            continue
        source = manifest.derived_from
        origin = manifest.corpus.input if source is None else str(paths.get(source, f"a set not found, {source[:12]}"))
        columns = [f"{name}: {column.origin.describe()}" for name, column in manifest.columns.items()]
        size = sum(shard.bytes for shard in manifest.shards)
        table.add_row(
            Text(str(path)), Text(origin), f"{manifest.tokens:,}", f"{size:,}", Text("\n".join(columns) or "none yet")
        )
    return table
