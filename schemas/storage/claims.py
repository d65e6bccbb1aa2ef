"""Claims on output directories: a run writes its request first. Only the same command can continue it."""

import json

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import LOCK, PROGRESS, differences, read_json_file, write_text
from weighted_mtp.schemas.storage.locations import Location, remove_tree, resolve

CLAIM = "request.json"
"""File in `PROGRESS` with the request of the run."""


def claim_output(output: Location, request: str) -> bool:
    """Claim `output` for the run with the JSON text `request`; return True if an earlier run is continued.

    Writes `.progress/request.json` into an empty directory. A claim without any finished work is replaced.

    Raises:
        UserError: `output` holds other files, or a run with another request; the message names the differences.
    """
    if check_claim(output, request):
        return True
    (output / PROGRESS).mkdir(exist_ok=True)
    write_text(output / PROGRESS / CLAIM, request)
    return False


def claim_empty_output(output: Location, request: str) -> None:
    """Claim `output` as `claim_output` does, for a run that starts over: remove what an earlier run left.

    Raises:
        UserError: as for `claim_output`.
    """
    if claim_output(output, request):
        clear_directory(output)
        claim_output(output, request)


def check_claim(output: Location, request: str) -> bool:
    """The checks of `claim_output`, without writing anything."""
    progress = output / PROGRESS
    if (progress / CLAIM).is_file():
        changed = differences(read_json_file(progress / CLAIM), json.loads(request))
        if not changed:
            return True
        if any(progress.glob("*.parquet")):
            raise UserError(
                f"{output}: holds an unfinished run with other settings ({', '.join(changed)}); "
                "repeat that command, remove the directory, or choose another --output"
            )
    else:
        check_empty(output)
    return False


def check_empty(output: Location) -> None:
    """Raise UserError if the directory `output`, which may be missing, holds more than locks and claims."""
    if output.exists() and any(path.name not in (PROGRESS, LOCK) for path in output.iterdir()):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")


def check_separate(output: Location, source: Location) -> None:
    """Raise UserError if the output of a command is also its input."""
    if resolve(output) == resolve(source):
        raise UserError(f"--output {output}: is also the --input; choose another, which will hold its columns, too")


def clear_directory(directory: Location) -> None:
    """Empty `directory`, which may be missing, but keep its lock."""
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def release_output(output: Location) -> None:
    """Remove the claim of a run that has written its manifest, and temporary files of killed runs."""
    remove_tree(output / PROGRESS)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
