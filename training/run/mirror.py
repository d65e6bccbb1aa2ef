"""A training run in an object store: it works in a local directory, and this keeps the store's copy of it.

A store has no rename, so a checkpoint counts once an object that lists its files and their sizes follows them, and a
run is finished once `summary.json` follows its model.
"""

import hashlib
import json
import shutil
import socket
from pathlib import Path

from upath import UPath

from weighted_mtp.schemas.storage.files import read_json, write_text
from weighted_mtp.schemas.storage.locations import cache_directory, list_files, remove_tree, walk

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
"""Object of a checkpoint that holds the sizes of the others, and is uploaded after them."""
RECORDS = ("run.json", "config.yaml", "metrics.jsonl", "summary.json")


class Mirror:
    """The two places of a run: `path` on this machine, where all its processes work, and `remote`.

    On several machines each has a `path` of its own, for which one process of the machine speaks.
    """

    def __init__(self, remote: UPath) -> None:
        self.remote = remote
        # Machines may share a cache directory.
        name = hashlib.sha256(f"{socket.gethostname()} {remote}".encode()).hexdigest()
        self.path = cache_directory() / "runs" / name

    def download(self) -> None:
        """Start `path` anew with what a run needs to go on: its records, and its newest complete checkpoint."""
        self.close()
        self.path.mkdir(parents=True)
        found = list_files(self.remote)
        for name in RECORDS:
            if name in found:
                self._get(name)
        complete = self._complete_checkpoints()
        if complete and "summary.json" not in found:
            newest = max(complete)
            for name in complete[newest]:
                self._get(f"{CHECKPOINTS}/{newest}/{name}")

    def upload(self, source: Path, name: str) -> None:
        """Upload a file, or the files below a directory, under `name`; nothing if there is none."""
        if source.is_file():
            self.remote.fs.put_file(str(source), (self.remote / name).path)
            return
        # Readers take a directory for a model or for heads by its config.
        files = sorted(walk(source), key=lambda file: (file.endswith("config.json"), file))
        for file in files:
            self.remote.fs.put_file(str(source / file), (self.remote / name / file).path)

    def complete_checkpoint(self, name: str, keep: int) -> None:
        """Make a checkpoint count whose files all processes have uploaded; remove all but the newest `keep`."""
        directory = self.remote / CHECKPOINTS / name
        write_text(directory / COMPLETE, json.dumps(walk(directory), indent=2) + "\n")
        self.remove_checkpoints(keep)

    def remove_checkpoints(self, keep: int) -> None:
        """Remove checkpoints whose upload was interrupted, and all but the newest `keep` of the others."""
        kept = sorted(self._complete_checkpoints())[-keep:]
        for name in {file.split("/")[0] for file in walk(self.remote / CHECKPOINTS)} - set(kept):
            remove_tree(self.remote / CHECKPOINTS / name)

    def close(self) -> None:
        """Remove `path`; all that a run needs to go on is in the store."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _get(self, name: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self.remote.fs.get_file((self.remote / name).path, str(self.path / name))

    def _complete_checkpoints(self) -> dict[str, list[str]]:
        """The files of each checkpoint in the store that has all of them."""
        sizes = walk(self.remote / CHECKPOINTS)
        complete: dict[str, list[str]] = {}
        for marker in (name for name in sizes if name.endswith(f"/{COMPLETE}")):
            checkpoint = marker.split("/")[0]
            files: dict[str, int] = read_json(self.remote / CHECKPOINTS / marker)
            if all(sizes.get(f"{checkpoint}/{name}") == size for name, size in files.items()):
                complete[checkpoint] = list(files)
        return complete
