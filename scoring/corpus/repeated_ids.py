"""Finding documents with the id of an earlier one, with eight bytes of memory for each document."""

import hashlib

import numpy as np


def id_hash(name: str) -> int:
    """A hash of 64 bits. Two of 10^8 different ids have the same one with a probability of 3 in 10,000."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class SeenHashes:
    """A set of hashes in sorted arrays, each less than half as long as the one before it."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes, uint64 [hashes]. Returns which of them were already there, or occur earlier among them."""
        new, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(new), bool)
        for run in self.runs:
            known |= run[np.minimum(np.searchsorted(run, new), len(run) - 1)] == new
        repeated = np.ones(len(hashes), bool)
        repeated[first[~known]] = False
        if not known.all():
            self.runs.append(new[~known])
        while len(self.runs) > 1 and 2 * len(self.runs[-1]) >= len(self.runs[-2]):
            last = self.runs.pop()
            self.runs[-1] = np.sort(np.concatenate([self.runs[-1], last]), kind="stable")  # merges in linear time
        return repeated
