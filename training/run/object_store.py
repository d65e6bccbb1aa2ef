"""A training run in an object store: the run uses a local directory and copies its files to the store.

Stores cannot rename objects. A checkpoint is therefore complete once an object with the sizes of its files has been
uploaded after them. A run is finished once `summary.json` has been uploaded after its model.
"""

import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import read_json_file, write_text
from weighted_mtp.schemas.storage.locations import cache_directory, list_files, remove_tree, walk_files
from weighted_mtp.schemas.storage.training_run import CHECKPOINTS, SUMMARY
from weighted_mtp.training.run.preconditions import FILES

COMPLETE = "complete.json"
"""Object with the sizes of a checkpoint's other files, uploaded after them."""


class ObjectStoreCopy:
    """The two locations of a run: `path`, used by all processes on this machine, and `remote` in the store.

    Each machine has its own `path`. One process per machine copies it.
    """

    def __init__(self, remote: UPath) -> None:
        self.remote = remote
        # Include the host name: machines may share a cache directory.
        name = hashlib.sha256(f"{socket.gethostname()} {remote}".encode()).hexdigest()
        self.path = cache_directory() / "runs" / name

    def download_records(self) -> None:
        """Download the records of the run into an empty `path`."""
        self.close()
        self.path.mkdir(parents=True)
        found = list_files(self.remote)
        for name in FILES:
            if name in found:
                self._get(name)

    def download_checkpoint(self) -> None:
        """Download the newest complete checkpoint, if there is one."""
        complete = self._complete_checkpoints()
        if complete:
            newest = max(complete)
            for name in complete[newest]:
                self._get(f"{CHECKPOINTS}/{newest}/{name}")

    def upload(self, source: Path, name: str) -> None:
        """Upload a file, or all files below a directory, under `name`; a missing source is skipped."""
        if source.is_file():
            self.remote.fs.put_file(str(source), (self.remote / name).path)
            return
        # Configs last: readers identify a model or heads by the config.
        files = sorted(walk_files(source), key=lambda file: (file.endswith("config.json"), file))
        for file in files:
            self.remote.fs.put_file(str(source / file), (self.remote / name / file).path)

    def complete_checkpoint(self, name: str, keep: int) -> None:
        """Mark a checkpoint as complete after all processes have uploaded its files; keep only the newest `keep`."""
        directory = self.remote / CHECKPOINTS / name
        write_text(directory / COMPLETE, json.dumps(walk_files(directory), indent=2) + "\n")
        self.remove_checkpoints(keep)

    def remove_checkpoints(self, keep: int) -> None:
        """Remove incomplete checkpoints, and all but the newest `keep` complete ones."""
        kept = sorted(self._complete_checkpoints())[-keep:]
        for name in {file.split("/")[0] for file in walk_files(self.remote / CHECKPOINTS)} - set(kept):
            remove_tree(self.remote / CHECKPOINTS / name)

    def remove_summary(self) -> None:
        """Remove the object that marks the run as finished."""
        (self.remote / SUMMARY).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove `path`; the store has everything needed to resume."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _get(self, name: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self.remote.fs.get_file((self.remote / name).path, str(self.path / name))

    def _complete_checkpoints(self) -> dict[str, list[str]]:
        """Files of each complete checkpoint in the store."""
        sizes = walk_files(self.remote / CHECKPOINTS)
        complete: dict[str, list[str]] = {}
        for marker in (name for name in sizes if re.fullmatch(f"step-[0-9]+/{re.escape(COMPLETE)}", name)):
            checkpoint = marker.split("/")[0]
            files = read_json_file(self.remote / CHECKPOINTS / marker)
            if not isinstance(files, dict):
                raise UserError(f"{self.remote / CHECKPOINTS / marker}: is damaged; remove its directory and rerun")
            # Only names of the listing, which lie inside, become local paths.
            if all(sizes.get(f"{checkpoint}/{name}") == size for name, size in files.items()):
                complete[checkpoint] = list(files)
        return complete
