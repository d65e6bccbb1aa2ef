"""Columns from tables and iterables in memory, compared with the import of a file with the same rows."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset

from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ImportedValues
from weighted_mtp.schemas.shard_set.shard_set import CARD, STATISTICS, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.scoring.imports import in_memory
from weighted_mtp.scoring.imports import run as module
from weighted_mtp.scoring.imports.run import ImportProgress, add_columns, import_scores
from weighted_mtp.training.weighting.token_weights import token_weights

NAN = math.nan
SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
LOSSES = [[NAN, 1, 2], [NAN, 0.5], [NAN, 4, 9.25, 70], [NAN]]
SCORES = [[1e-6, None, 1 / 3], [-1, 2], None, [0]]
QUALITY = [4.5, 2, 1e-3, 3]
ROWS: list[dict[str, Any]] = [
    {"document_id": f"doc-{n}", "start": 0, "mine": SCORES[n], "quality": QUALITY[n], "group": "ab"[n % 2]}
    for n in range(4)
]


@pytest.fixture
def source(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    columns = {"reward": [0.5, -1.0, 3.0, 2.0]}
    return make_shard_set(SEQUENCES, {"loss_a": LOSSES}, "source", sequence_columns=columns)


def lists_as(make: Callable[[list[float]], Any]) -> Callable[[], list[dict[str, Any]]]:
    """The rows with lists of another kind, and NaN for a missing number."""

    def rows() -> list[dict[str, Any]]:
        numbers = [row["mine"] and [NAN if value is None else value for value in row["mine"]] for row in ROWS]
        return [row | {"mine": None if mine is None else make(mine)} for row, mine in zip(ROWS, numbers, strict=True)]

    return rows


@dataclass
class Stream:
    """An object that has only the Arrow interface."""

    table: pa.Table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


def duckdb_relation() -> duckdb.DuckDBPyRelation:
    table = pa.Table.from_pylist(ROWS)
    return duckdb.connect().from_arrow(table).order("document_id desc")


def numpy_values() -> Iterator[dict[str, Any]]:
    for row in lists_as(np.array)():
        yield row | {"start": np.int32(0), "quality": np.float64(row["quality"]), "group": np.str_(row["group"])}


def tensor_values() -> Iterator[dict[str, Any]]:
    for row in lists_as(lambda values: torch.tensor(values, dtype=torch.float64, requires_grad=True))():
        yield row | {"quality": torch.tensor(row["quality"], dtype=torch.float64)}


POLARS_TYPES = {"mine": pl.List(pl.Float64), "group": pl.Categorical}
KINDS: dict[str, Callable[[], Any]] = {
    "pyarrow": lambda: pa.Table.from_pylist(ROWS),
    "record batches": lambda: pa.Table.from_pylist(ROWS).to_reader(max_chunksize=1),
    "arrow stream": lambda: Stream(pa.Table.from_pylist(ROWS[::-1])),
    "polars": lambda: pl.DataFrame(ROWS),
    "polars categories": lambda: pl.DataFrame(ROWS, schema_overrides=POLARS_TYPES),
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas with another order": lambda: pd.DataFrame(ROWS)[::-1],
    "pandas arrays": lambda: pd.DataFrame(lists_as(np.array)()),
    "pandas index": lambda: pd.DataFrame(ROWS).set_index("document_id"),
    "duckdb": duckdb_relation,
    "datasets": lambda: Dataset.from_list(ROWS),
    "datasets stream": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "dicts": lambda: ROWS,
    "dicts in another order": lambda: ROWS[::-1],
    "generator": lambda: (row for row in ROWS),
    "numpy": numpy_values,
    "torch": tensor_values,
    "tuples": lists_as(tuple),
    "polars series": lists_as(pl.Series),
    "without null": lambda: [{key: value for key, value in row.items() if value is not None} for row in ROWS],
}


def values_of(shards: ShardSet, column: str) -> np.ndarray:
    parts = [shards.read(number, ["input_ids", column])[column] for number in range(len(shards.manifest.shards))]
    return np.concatenate([flat_values(part) for part in parts])


@pytest.mark.parametrize("kind", KINDS)
def test_the_set_is_that_of_a_file_with_the_same_rows(source: ShardSet, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = import_scores(ImportConfig(input=source.path, scores=str(file), output=tmp_path / "of-file"))
    seen: list[ImportProgress] = []
    shards = add_columns(source, tmp_path / "output", KINDS[kind](), report=seen.append)
    assert seen == [ImportProgress(0, 0), ImportProgress(5, 0), ImportProgress(10, 0)]
    for shard in shards.manifest.shards:
        assert (shards.path / DATA / shard.name).read_bytes() == (expected.path / DATA / shard.name).read_bytes()
    assert (shards.path / STATISTICS).read_bytes() == (expected.path / STATISTICS).read_bytes()
    same = {"shards", "corpus", "tokenizer", "statistics_sha256", "derived_from", "format_version", "created_by"}
    assert shards.manifest.model_dump(include=same) == expected.manifest.model_dump(include=same)
    assert shards.manifest.columns.keys() == expected.manifest.columns.keys()
    assert shards.manifest.columns["mine"].statistics == expected.manifest.columns["mine"].statistics
    assert shards.manifest.columns["mine"].statistics.missing == 5
    assert [check.fault for check in verify(shards.path, ShardSet.open(shards.path).manifest) if check.fault] == []


def test_the_origin_has_a_digest_that_follows_from_the_set(source: ShardSet, tmp_path: Path) -> None:
    shards = add_columns(str(source.path), str(tmp_path / "output"), ROWS)
    origin = shards.manifest.columns["mine"].origin
    content = values_of(shards, "mine").astype("<f2").tobytes()
    assert origin == ImportedValues(values_sha256=hashlib.sha256(content).hexdigest())
    assert ShardSet.open(shards.path).manifest.columns["mine"].origin == origin
    line = f"imported from memory (SHA-256 of the values {origin.values_sha256[:12]})"
    assert line in (shards.path / CARD).read_text()
    assert line in shards._repr_html_()
    quality = np.array(QUALITY, "<f4").tobytes()
    labels = b"".join(len(label).to_bytes(8, "little") + label for label in (b"a", b"b", b"a", b"b"))
    assert shards.manifest.request["values"] == {
        "mine": origin.values_sha256,
        "quality": hashlib.sha256(quality).hexdigest(),
        "group": hashlib.sha256(labels).hexdigest(),
    }


def test_the_same_values_return_the_finished_set_and_others_are_refused(source: ShardSet, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shards = add_columns(source, output, ROWS)
    seen: list[ImportProgress] = []
    for same in (KINDS["polars"](), ROWS[::-1], numpy_values()):
        assert add_columns(source, output, same, report=seen.append).manifest == shards.manifest
    assert seen == []
    for name, value in (("mine", [1e-6, None, 0.25]), ("quality", 4.25), ("group", "c")):
        with pytest.raises(UserError, match=rf"output: holds a shard set with other .* \(values\.{name}\)"):
            add_columns(source, output, [ROWS[0] | {name: value}, *ROWS[1:]])
    with pytest.raises(UserError, match="is also the --input"):
        add_columns(source, source.path, ROWS)


def test_a_stopped_call_continues(source: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def interrupt(output: Path, attempt: module.new_attempt) -> None:
        commit(output, attempt)
        written.append(attempt.unit)
        if len(written) == 1:
            raise KeyboardInterrupt

    commit = module.commit
    monkeypatch.setattr(module, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        add_columns(source, tmp_path / "output", ROWS)
    with pytest.raises(UserError, match=r"unfinished run with other settings \(values\.quality\)"):
        add_columns(source, tmp_path / "output", [row | {"quality": 1} for row in ROWS])
    add_columns(source, tmp_path / "output", pl.DataFrame(ROWS))
    assert written == [shard.name for shard in source.manifest.shards], "each shard is written once"


def test_chosen_columns(source: ShardSet, tmp_path: Path) -> None:
    rows = [row | {"unused": object()} for row in ROWS]
    shards = add_columns(source, tmp_path / "a", rows, columns=["mine", "group"])
    assert [*shards.manifest.corpus.sequence_columns, *shards.manifest.columns] == ["reward", "group", "loss_a", "mine"]
    assert shards.manifest.request["columns"] == {"mine": "score", "group": "label"}
    assert "mine" in add_columns(source, tmp_path / "b", pl.DataFrame(ROWS), columns="mine").manifest.columns


def test_values_of_any_precision_are_rounded_once(source: ShardSet, tmp_path: Path) -> None:
    """1 + 2**-11 + 2**-30 is nearest to 1 + 2**-10 in float16, but to 1 from float32."""
    double = 1 + 2**-11 + 2**-30
    brain = torch.tensor([0.1, 3.0], dtype=torch.bfloat16)
    rows = [{"document_id": "doc-0", "x": torch.full((3,), double).double() * 0 + double}]
    rows += [{"document_id": "doc-1", "x": brain}, {"document_id": "doc-2", "x": np.array([1, 2, 3, 4], np.uint8)}]
    found = values_of(add_columns(source, tmp_path / "output", rows), "x")
    assert found[:3].tolist() == [1 + 2**-10] * 3
    assert found[3:5].tolist() == brain.half().tolist()
    assert found[5:9].tolist() == [1, 2, 3, 4]


def test_masked_entries_have_no_score(source: ShardSet, tmp_path: Path) -> None:
    rows = [{"document_id": "doc-1", "x": np.ma.array([7, 2], mask=[True, False])}]
    found = values_of(add_columns(source, tmp_path / "output", rows), "x")
    np.testing.assert_array_equal(found[3:5], [NAN, 2])


def test_a_column_computed_from_the_sequences_weights_them(source: ShardSet, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for sequence in source.sequences(columns=["loss_a"]):
            squared = np.square(sequence.columns["loss_a"])
            yield {"document_id": sequence.document_id, "start": sequence.start, "squared": squared}

    shards = add_columns(source, tmp_path / "output", rows())
    found = np.concatenate(list(token_weights(shards, {"formula": "squared * (squared > 1)"})))
    assert found.tolist() == [0, 0, 4, 0, 0, 0, 16, 85.5625, 4900, 0]


def test_rows_are_numbered_across_batches(source: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory, "BATCH_ROWS", 2)
    for kind in ("dicts", "pyarrow", "polars"):
        add_columns(source, tmp_path / kind, KINDS[kind]())
        rows = pa.Table.from_pylist([*ROWS, ROWS[3]]) if kind == "pyarrow" else [*ROWS, ROWS[3]]
        with pytest.raises(UserError, match=r"^rows\[4\] \(document 'doc-3'\): an earlier row has scores"):
            add_columns(source, tmp_path / "other", rows)
    monkeypatch.setattr(in_memory, "BATCH_NUMBERS", 3)
    shards = add_columns(source, tmp_path / "dicts", ROWS)
    assert values_of(shards, "mine")[3:5].tolist() == [-1, 2]
    with pytest.raises(UserError, match=r"^rows\[3\]: has a field 'late' that the first rows lack"):
        add_columns(source, tmp_path / "other", [*ROWS[:3], ROWS[3] | {"late": 1}])


def test_an_error_of_a_generator_is_not_hidden(source: ShardSet, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        add_columns(source, tmp_path / "output", rows())
    assert not (tmp_path / "output").exists()


def one(value: object, **more: object) -> list[dict[str, Any]]:
    """A good row, and a second one with this value."""
    return [{"document_id": "doc-0", "x": [0, 0, 0]}, {"document_id": "doc-1", "x": value} | more]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (one([1]), r"^rows\[1\] \(document 'doc-1'\): has a list of 1 for a sequence of 2 tokens"),
        (one(np.zeros(3)), r"^rows\[1\] \(document 'doc-1'\): has a list of 3 for a sequence of 2 tokens"),
        (one([]), "has a list of 0 for a sequence of 2 tokens"),
        (one([1, math.inf]), r"^rows\[1\]: 'x' has a value that is infinite or beyond float16"),
        (one([1, 10**400]), r"^rows\[1\]: 'x' has a value that is infinite or beyond float16"),
        (one(np.array([1, 65520.0])), r"^rows\[1\]: 'x' has a value that is infinite or beyond float16"),
        (one([1, "a"]), r"^rows\[1\]: 'x' has a value of type str, not a number; correct it"),
        (one([1, True]), r"^rows\[1\]: 'x' has a value of type bool, not a number"),
        (one([[1], [2]]), r"^rows\[1\]: 'x' has a value of type list, not a number"),
        (one([1, 1j]), r"^rows\[1\]: 'x' has a value of type complex, not a number"),
        (one(np.array([True, False])), r"^rows\[1\]: 'x' is an array of bool, not of numbers"),
        (one(np.array([1, None])), r"^rows\[1\]: 'x' is an array of object, not of numbers"),
        (one(np.zeros((2, 1))), r"^rows\[1\]: 'x' has 2 dimensions, not 1"),
        (one(torch.zeros(1, 2)), r"^rows\[1\]: 'x' has 2 dimensions, not 1"),
        (one("text"), r"^rows\[1\]: 'x' is of type str, not a list of numbers"),
        (one(1), r"^rows\[1\]: 'x' is of type int, not a list of numbers"),
        (one([1, 2], start=0.0), r"^rows\[1\]: 'start' is of type float, not an integer"),
        (one([1, 2], start=True), r"^rows\[1\]: 'start' is of type bool, not an integer"),
        (one([1, 2], start=1 << 70), r"^rows\[1\]: 'start' is no index of a token"),
        (one([1, 2], start=1), r"^rows\[1\] \(document 'doc-1'\): no sequence of .* starts at token 1"),
        (one([1, 2], document_id=1.5), r"^rows\[1\]: 'document_id' is of type float, not a string"),
        (one([1, 2], document_id="\ud800"), r"^rows\[1\]: 'document_id' 'utf-8' codec can't encode"),
        (one([1, 2], document_id=None), r"^rows\[1\]: has no document_id; add it"),
        (one([1, 2], document_id="doc-9"), r"^rows\[1\] \(document 'doc-9'\): no such document in .*of this corpus"),
        (one([1, 2], document_id=7), r"^rows\[1\] \(document '7'\): no such document"),
        (one([1, 2], y=[1, 2, 3]), r"^rows\[1\] \(document 'doc-1'\): 'y' is not as long as the other lists"),
        (one([1, 2]) * 2, r"^rows\[2\] \(document 'doc-0'\): an earlier row"),
        (one([1, 2], y=True), r"^rows\[1\]: 'y' is of type bool, not a list of numbers, a number or a string; convert"),
        (one([1, 2], **{"a b": 1}), "^rows: 'a b' cannot be a column name .*; rename it, or choose other columns"),
        ([{"document_id": "doc-0", 5: [1, 2, 3]}], r"^rows\[0\]: has a field '5', which is no string"),
        ([{"document_id": "doc-0", "x": [1, 2, 3]}, ("doc-1", [1, 2])], r"^rows\[1\]: is of type tuple; give a dict"),
        ([{"document_id": "doc-0", "loss_a": [1, 2, 3]}], "already has a column 'loss_a'; rename yours, or choose"),
        ([{"document_id": "doc-0", "x": None}], "^rows: column 'x' has no value in the first rows"),
        ([{"document_id": "doc-0", "x": 1}], "^rows: 'x' has no value for 3 documents of .*first: 'doc-1'"),
        ([{"document_id": f"doc-{n}", "x": 10**400} for n in range(4)], r"^rows\[0\]: 'x' is infinite in float32"),
        ([{"document_id": f"doc-{n}", "x": "ab"[n]} for n in (0, 1)] * 2, r"^rows\[2\] .*an earlier row"),
        ([{"x": [1, 2, 3]}], "^rows: has no column 'document_id'; add it"),
        ([{"document_id": "doc-0"}], "^rows: has no column besides"),
        ([], "^rows: has no column besides"),
        ([[1, 2]], r"^rows\[0\]: is of type list; give a dict"),
        ({"document_id": ["doc-0"], "x": [[1, 2, 3]]}, "^rows: is of type dict; give a table of pyarrow"),
        ("rows.jsonl", "^rows: is of type str; give a table"),
        (pl.LazyFrame({"document_id": ["doc-0"]}), "^rows: is of type LazyFrame; give a table"),
        (pl.Series([1]), "^rows: cannot be read"),
        (pa.table({"document_id": ["doc-0"], "x": [True]}), "^rows: column 'x' holds 'bool', not a list of numbers"),
        (pa.table({"document_id": ["doc-0"], "x": [[math.inf, 0, 0]]}), r"^rows\[0\]: 'x' has a value that is inf"),
        (pa.table({"document_id": [None], "x": [1.0]}), r"^rows\[0\]: has no document_id"),
        (pa.table({"document_id": [0.5], "x": [1.0]}), "^rows: 'document_id' should be a string; it is double"),
        (pa.table({"document_id": pa.array([], pa.string()), "x": pa.array([], pa.float32())}), "^rows: has no rows"),
        (pa.table([["doc-0"], [1], [2]], ["document_id", "x", "x"]), r"^rows: .*two columns have the same name"),
        (pa.table({"document_id": ["doc-0"], "start": pa.array([1 << 63], pa.uint64()), "x": [[1]]}), "^rows: cannot"),
    ],
)
def test_rows_that_cannot_be_imported(source: ShardSet, tmp_path: Path, rows: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        add_columns(source, tmp_path / "output", rows)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "output").exists()
