"""Shards of small sequences, closed and named by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from shard_files import read_shard

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import REJECTS
from weighted_mtp.schemas.shard_set.shards import list_column, shard_schema
from weighted_mtp.schemas.storage.files import DATA, PROGRESS
from weighted_mtp.scoring.corpus.documents import RejectedDocument
from weighted_mtp.scoring.corpus.tokenization import ENCODED_DOCUMENT, EncodedBatch
from weighted_mtp.scoring.corpus.writer import CorpusCounts, ShardWriter, why_empty, write_shards


def ignore(counts: CorpusCounts) -> None:
    """Report nothing."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / PROGRESS).mkdir()
    return tmp_path


def table(lengths: list[int], first: int = 0) -> pa.Table:
    """Sequences of these lengths whose tokens count from `first`."""
    total = sum(lengths)
    ids = list_column(np.arange(first, first + total, dtype=np.int32), np.array(lengths, np.int64))
    names = pa.array([f"d{number}" for number in range(len(lengths))], pa.string())
    starts = pa.array([0] * len(lengths), pa.int64())
    return pa.table([names, starts, ids], schema=shard_schema())


def batch(lengths: list[int], rejects: tuple[RejectedDocument, ...] = ()) -> EncodedBatch:
    documents = [(row, row, 1, length, 10 * length, row == 0, True) for row, length in enumerate(lengths)]
    return EncodedBatch("a.jsonl", table(lengths), np.array(documents, ENCODED_DOCUMENT), list(rejects))


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[3, 3, 3, 10, 1]], [6, 13, 1]),
        ([[3], [3], [], [3, 10], [1]], [6, 13, 1]),
        ([[5, 5]], [5, 5]),
        ([[4]], [4]),
        ([[20], [1, 1, 1, 1, 1]], [20, 5]),
    ],
)
def test_a_shard_ends_with_the_sequence_that_fills_it(
    batches: list[list[int]], expected: list[int], output: Path
) -> None:
    """A shard holds five tokens; where batches end does not matter."""
    writer, first = ShardWriter(output, 5), 0
    for lengths in batches:
        writer.add(table(lengths, first))
        first += sum(lengths)
    entries = writer.finish()
    assert [entry.tokens for entry in entries] == expected
    names = [f"shard-{index:05d}-of-{len(expected):05d}.parquet" for index in range(len(expected))]
    assert [entry.name for entry in entries] == names
    assert sorted(file.name for file in (output / DATA).glob("*.parquet")) == names
    rows = [ids for name in names for ids in read_shard(output / DATA / name)["input_ids"].to_pylist()]
    assert [len(ids) for ids in rows] == [length for lengths in batches for length in lengths]
    assert [token for ids in rows for token in ids] == list(range(first))


def test_shards_have_their_names_only_at_the_end(output: Path) -> None:
    writer = ShardWriter(output, 5)
    writer.add(table([5, 5, 1]))
    assert list((output / DATA).glob("*.parquet")) == []
    assert len(list((output / PROGRESS).iterdir())) == 2, "the last sequence is still held"
    assert len(writer.finish()) == 3
    assert list((output / PROGRESS).iterdir()) == []


def test_totals_and_rejects_of_all_batches(output: Path) -> None:
    rejects = [RejectedDocument("a.jsonl", row, f"no text: {row}") for row in (1, 4)]
    rejects.append(RejectedDocument("b.jsonl", 0, "blank"))
    counts = CorpusCounts()
    batches = [batch([3, 3], (rejects[0],)), batch([1], tuple(rejects[1:]))]
    entries = write_shards(output, batches, 5, counts, ignore)
    assert [entry.tokens for entry in entries] == [6, 1]
    assert (counts.documents, counts.sequences, counts.tokens, counts.text_bytes) == (3, 3, 7, 70)
    assert (counts.double_bos, counts.with_special_tokens, counts.largest_id) == (2, 3, 5)
    assert (counts.rejects, counts.rejected) == ({"no text": 2, "blank": 1}, 3)
    assert counts.examples == {"no text": rejects[0], "blank": rejects[2]}
    lines = [json.loads(line) for line in (output / REJECTS).read_text().splitlines()]
    assert lines == [reject._asdict() for reject in rejects]


def test_without_rejects_there_is_no_file_of_them(output: Path) -> None:
    write_shards(output, [batch([2])], 5, CorpusCounts(), ignore)
    assert not (output / REJECTS).exists()


def test_a_corpus_without_documents_names_the_most_frequent_reason(output: Path) -> None:
    assert why_empty(CorpusCounts()) == "--input: holds no rows; check that the files are not empty"
    rejects = [RejectedDocument("a.jsonl", 0, "blank")]
    rejects += [RejectedDocument("a.jsonl", row, f"no text: {row}") for row in (1, 2)]
    with pytest.raises(UserError) as caught:
        write_shards(output, [batch([], tuple(rejects))], 5, CorpusCounts(), ignore)
    assert str(caught.value).startswith(
        "--input: all 3 rows were rejected, 2 of them for the same reason as row 1 of a.jsonl (no text: 1); check "
    )
