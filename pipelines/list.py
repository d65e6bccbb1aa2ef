"""`wmtp list`: the catalogue of shard sets."""

from weighted_mtp.pipelines.reports.catalogue import CatalogueEntry, catalogue, read_entry
from weighted_mtp.schemas.configs import ListConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import MANIFEST
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.locks import is_shard_set


def run(config: ListConfig) -> None:
    """Print the shard sets below the directories, with their columns. Reads only manifests.

    Raises:
        UserError: a directory does not exist, or none contains a shard set.
    """
    found: dict[Location, CatalogueEntry | UserError] = {}
    for directory in config.directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; check the path")
        for manifest in sorted(directory.rglob(MANIFEST)):
            if is_shard_set(manifest.parent):
                found[manifest.parent] = read_entry(manifest.parent)
    if not found:
        where = ", ".join(map(str, config.directories))
        raise UserError(f"{where}: no shard set here; write one with 'wmtp prepare'")
    for line in catalogue(found):
        print(line)
