"""Input of every hostile test: small correct sets and files, to be mutated."""

import gzip
import json
import lzma
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forging import rewrite_manifest
from format_3 import write_format_3

from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet

MOST_SECONDS = 60
SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12], [13]]
ROWS = [
    {"text": "first text", "reward": 0.5, "group": "a"},
    {"text": "second\none", "reward": -1.0, "group": "b"},
    {"text": "third λ", "reward": 3.0, "group": "a"},
]


@pytest.fixture
def directory(make_shard_set: Callable[..., ShardSet], tmp_path: Path) -> Path:
    """A set `good` with all kinds of columns and a reject, a set `old` of format 3, and `files` of text and scores."""
    rng = np.random.default_rng(0)

    def make(name: str) -> ShardSet:
        scores = {
            column: [[np.nan, *map(abs, rng.normal(2, 1, len(ids) - 1))] for ids in SEQUENCES]
            for column in ("loss_a", "loss_b", "gain")
        }
        per_document = {"reward": [0.5, -1.0, 3.0, 2.0, 1.0], "group": ["a", "b", "a", "b", "b"]}
        return make_shard_set(SEQUENCES, scores, name, rows_per_shard=3, sequence_columns=per_document)

    write_format_3(make("current"), tmp_path / "old")
    good = make("good")
    name = good.manifest.shards[1].name
    reject = {"shard": name, "row": 1, "document_id": "doc-4", "start": 0, "model": "f", "reason": "too long"}
    (good.path / REJECTS).write_text(json.dumps(reject) + "\n")
    rewrite_manifest(good.path, lambda m: m["shards"][1].update(rejects=1))
    write_files(tmp_path / "files")
    (tmp_path / "work").mkdir()
    return tmp_path


def write_files(path: Path) -> None:
    """Files of a corpus in all formats, and files of scores for the documents of the set."""
    path.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    (path / "corpus.jsonl").write_bytes(lines)
    (path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (path / "corpus.jsonl.xz").write_bytes(lzma.compress(lines))
    with pa.CompressedOutputStream(str(path / "corpus.jsonl.zst"), "zstd") as file:
        file.write(lines)
    (path / "corpus-list.json").write_text(json.dumps(ROWS))
    (path / "corpus.txt").write_text("one\n\ntwo\n")
    (path / "corpus.csv").write_text(
        "text,reward,group\n" + "".join("{text!r},{reward},{group}\n".format(**r) for r in ROWS)
    )
    pq.write_table(table, path / "corpus.parquet")
    for name, new in (("corpus.arrow", pa.ipc.new_file), ("corpus-stream.arrow", pa.ipc.new_stream)):
        with new(path / name, table.schema) as writer:
            writer.write_table(table)
    scores = [
        {"document_id": f"doc-{number}", "start": 0, "mine": [0.5] * len(ids), "price": float(number), "kind": "k"}
        for number, ids in enumerate(SEQUENCES)
    ]
    (path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    pq.write_table(pa.Table.from_pylist(scores), path / "scores.parquet")


@pytest.fixture(autouse=True)
def _no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interrupt a test that reads without end."""

    def interrupt(*_: object) -> None:
        pytest.fail("reads without end")  # no Exception, which the test could expect

    if request.node.get_closest_marker("slow"):
        yield
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
