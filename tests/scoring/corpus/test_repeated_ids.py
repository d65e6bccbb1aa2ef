import numpy as np

from weighted_mtp.scoring.corpus.repeated_ids import SeenHashes, id_hash


def test_ids_are_found_again_in_any_run() -> None:
    generator = np.random.default_rng(0)
    seen = SeenHashes()
    known: set[int] = set()
    for size in [*generator.integers(0, 200, 100), 0, 5000, 1]:
        hashes = generator.integers(0, 10_000, size, dtype=np.uint64)
        expected = []
        for value in hashes.tolist():
            expected.append(value in known)
            known.add(value)
        assert seen.add(hashes).tolist() == expected
    assert sum(map(len, seen.runs)) == len(known), "eight bytes for each"
    assert len(seen.runs) <= np.log2(len(known)) + 1


def test_hashes_of_ids_do_not_depend_on_the_process() -> None:
    assert id_hash("doc-1") == 4_752_762_565_065_110_614
