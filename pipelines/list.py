"""`wmtp list`: the catalogue of shard sets and training runs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath

from weighted_mtp.pipelines.reports.catalogue import Entry, catalogue, read_entry, unfinished_set
from weighted_mtp.pipelines.reports.run_entry import read_run
from weighted_mtp.schemas.configs import ListConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, PROGRESS, TOKENIZER
from weighted_mtp.schemas.storage.locations import Location, join, walk_files
from weighted_mtp.schemas.storage.training_run import RUN_RECORD, SETTINGS
from weighted_mtp.schemas.text import printable


def run(config: ListConfig) -> None:
    """Print the shard sets and training runs below the directories. Reads only manifests, records and metrics.

    Raises:
        UserError: a directory does not exist, none contains a shard set or a run, or one of these is damaged. The
            others are printed all the same.
    """
    found: dict[Location, Entry] = {}
    for directory in config.directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; check the path")
        found |= find_entries(directory)
    if not found:
        where = ", ".join(map(str, config.directories))
        raise UserError(f"{where}: no shard set or run here; write one with 'wmtp prepare' or 'wmtp train'")
    for line in catalogue(found):
        print(printable(line))
    if damaged := sum(isinstance(entry, UserError) for entry in found.values()):
        raise UserError(f"{damaged:,} of {len(found):,} entries cannot be read (see above); restore or remove them")


def find_entries(directory: Location) -> Iterator[tuple[Location, Entry]]:
    """Yield the path and the entry of each shard set and run in or below a directory, in order of their paths."""
    sizes = {PurePosixPath(name): size for name, size in walk_files(directory).items()}
    names: dict[PurePosixPath, set[str]] = {}  # of the files directly in each folder
    for file in sizes:
        names.setdefault(file.parent, set()).add(file.name)
    runs = dict.fromkeys((folder for folder, files in names.items() if {RUN_RECORD, SETTINGS} <= files), 0)
    for file, size in sizes.items():
        for folder in file.parents:
            if folder in runs:
                runs[folder] += size
    for folder in sorted({*names, *(folder.parent for folder in names if folder.name == PROGRESS)}):
        path = join(directory, folder.as_posix()) if folder.parts else directory
        files = names.get(folder, set())
        if MANIFEST in files and folder / TOKENIZER in names:
            yield path, guarded(path, read_entry)
        elif folder / PROGRESS in names:
            yield path, unfinished_set(names.get(folder / DATA, set()))
        if folder in runs:
            yield path, guarded(path, partial(read_run, size=runs[folder]))


def guarded(path: Location, read: Callable[[Location], Entry]) -> Entry:
    """What `read(path)` returns or raises: one damaged entry must not hide the others."""
    try:
        return read(path)
    except UserError as error:
        return error
    except Exception as error:  # files may be damaged in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{path}: cannot be read ({reason}); restore or remove it")
