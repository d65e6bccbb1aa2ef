"""Imported columns, compared with arrays written by hand."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Imported
from weighted_mtp.schemas.shard_set.shard_set import CARD, ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import flat_values, write_shard
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.scoring.imports import run as module
from weighted_mtp.scoring.imports.run import ImportProgress, import_scores

NAN = math.nan
SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
LOSSES = [[NAN, 1, 2], [NAN, 0.5], [NAN, 4, 9.25, 70], [NAN]]
SCORES = [[1e-6, 0.25, 1 / 3], [-1, 2], [4, 5, 6, 7], [0]]
ROWS = [{"document_id": f"doc-{n}", "start": 0, "mine": values} for n, values in enumerate(SCORES)]


@pytest.fixture
def source(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    columns = {"reward": [0.5, -1.0, 3.0, 2.0]}
    return make_shard_set(SEQUENCES, {"loss_a": LOSSES}, "source", sequence_columns=columns)


@pytest.fixture
def split_source(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    """Document `a` has two sequences in different shards, `b` one."""
    made = make_shard_set([[1, 2, 3], [4, 5], [6]], {"loss_a": [[NAN, 1, 2], [NAN, 1], [NAN]]}, "made", 1)
    return rewrite_ids(made, ["a", "a", "b"], [0, 3, 0])


def rewrite_ids(made: ShardSet, ids: list[str], starts: list[int]) -> ShardSet:
    """The set with other ids and starts, one sequence in each shard."""
    entries = []
    for number, (name, start) in enumerate(zip(ids, starts, strict=True)):
        table = made.read(number)
        table = table.set_column(0, "document_id", pa.array([name])).set_column(1, "start", pa.array([start]))
        entry = made.manifest.shards[number]
        entries.append(replace(write_shard(made.path / DATA / entry.name, table), name=entry.name))
    manifest = made.manifest.model_copy(update={"shards": entries})
    return finish_shard_set(made.path, manifest, made.value_counts())


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: ShardSet, scores: Path | str, tmp_path: Path, **settings: object) -> ShardSet:
    return import_scores(ImportConfig(input=source.path, scores=str(scores), output=tmp_path / "output", **settings))


def values_of(shards: ShardSet, column: str) -> np.ndarray:
    parts = [shards.read(number, ["input_ids", column])[column] for number in range(len(shards.manifest.shards))]
    return np.concatenate([flat_values(part) for part in parts])


def faults(shards: ShardSet) -> list[str]:
    return [check.fault for check in verify(shards.path, ShardSet.open(shards.path).manifest) if check.fault]


EXPECTED = np.array([value for row in SCORES for value in row], np.float16)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "float32", "float16", "large", "without_start"])
def test_lists_become_float16_columns(source: ShardSet, tmp_path: Path, kind: str) -> None:
    rows = [{key: row[key] for key in row if key != "start" or kind != "without_start"} for row in ROWS[::-1]]
    if kind in ("jsonl", "without_start"):
        file = write_json(tmp_path / "scores.jsonl", rows)
    else:
        file = tmp_path / "scores.parquet"
        element = {"parquet": pa.float64(), "large": pa.float64()}.get(kind) or getattr(pa, kind)()
        mine = [np.array(row["mine"], element.to_pandas_dtype()) for row in rows]
        lists = pa.large_list(element) if kind == "large" else pa.list_(element)
        table = pa.Table.from_pylist(rows).set_column(2, "mine", pa.array(mine, lists))
        pq.write_table(table, file)
    seen: list[ImportProgress] = []
    config = ImportConfig(input=source.path, scores=str(file), output=tmp_path / "output")
    shards = import_scores(config, seen.append)
    np.testing.assert_array_equal(values_of(shards, "mine"), EXPECTED)
    np.testing.assert_array_equal(values_of(shards, "loss_a"), values_of(source, "loss_a"))
    assert seen == [ImportProgress(0, 0), ImportProgress(5, 0), ImportProgress(10, 0)]
    assert faults(shards) == []
    column = shards.manifest.columns["mine"]
    assert isinstance(column.origin, Imported)
    assert column.origin.files[0].name == file.name
    assert (column.statistics.count, column.statistics.missing) == (10, 0)
    assert shards.manifest.derived_from == source.manifest.digest
    assert f"imported, mine of '{file.name}'" in (shards.path / CARD).read_text()
    again: list[ImportProgress] = []
    assert import_scores(config, again.append).manifest == shards.manifest
    assert again == []


def test_missing_rows_lists_and_values_are_nan(source: ShardSet, tmp_path: Path) -> None:
    rows = [
        {"document_id": "doc-0", "mine": [None, 1, NAN], "other": [1, 2, 3]},
        {"document_id": "doc-2", "mine": None, "other": [4, 5, 6, 7]},
    ]
    shards = run(source, write_json(tmp_path / "a.jsonl", rows), tmp_path)
    np.testing.assert_array_equal(values_of(shards, "mine"), np.float16([NAN, 1, NAN] + [NAN] * 7))
    np.testing.assert_array_equal(values_of(shards, "other"), np.float16([1, 2, 3, NAN, NAN, 4, 5, 6, 7, NAN]))
    assert shards.manifest.columns["mine"].statistics.missing == 9
    assert faults(shards) == []


def test_numbers_and_labels_of_documents(source: ShardSet, tmp_path: Path) -> None:
    rows = [{"document_id": f"doc-{n}", "quality": n * 2, "group": "ab"[n % 2]} for n in range(4)]
    shards = run(source, write_json(tmp_path / "a.jsonl", rows), tmp_path)
    assert shards.manifest.corpus.sequence_columns == {"reward": "number", "quality": "number", "group": "label"}
    table = pa.concat_tables([shards.read(0), shards.read(1)])
    assert table["quality"].to_pylist() == [0, 2, 4, 6]
    assert table["group"].to_pylist() == ["a", "b", "a", "b"]
    assert table["reward"].to_pylist() == [0.5, -1.0, 3.0, 2.0]
    assert faults(shards) == []


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"document_id": "a", "start": 3, "mine": [4, 5], "quality": 1},
            {"document_id": "a", "start": 0, "mine": [1, 2, 3], "quality": 1},
            {"document_id": "b", "start": 0, "mine": [6], "quality": 2},
        ],
        [
            {"document_id": "b", "mine": [6], "quality": 2},
            {"document_id": "a", "mine": [1, 2, 3, 4, 5], "quality": 1},
        ],
    ],
    ids=["by sequence", "by document"],
)
def test_documents_of_several_sequences(split_source: ShardSet, tmp_path: Path, rows: list[dict]) -> None:
    shards = run(split_source, write_json(tmp_path / "a.jsonl", rows), tmp_path)
    assert values_of(shards, "mine").tolist() == [1, 2, 3, 4, 5, 6]
    assert [shards.read(n)["quality"][0].as_py() for n in range(3)] == [1, 1, 2]
    assert faults(shards) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"document_id": "a", "mine": [1, 2, 3]}], "has a list of 3 for a document of 5 tokens in several sequences"),
        ([{"document_id": "a", "start": 1, "mine": [1]}], "no sequence of .* starts at token 1"),
        ([{"document_id": "a", "start": 3, "mine": [1]}], "has a list of 1 for a sequence of 2 tokens"),
        (
            [
                {"document_id": "a", "start": 3, "mine": [1, 2]},
                {"document_id": "a", "start": 0, "mine": [1, 2, 3, 4, 5]},
            ],
            r"row 2 \(document 'a'\): an earlier row",
        ),
        (
            [{"document_id": name, "start": start, "x": start} for name, start in (("b", 0), ("a", 0), ("a", 3))],
            "'x' differs between rows of document 'a'",
        ),
    ],
)
def test_sequences_that_do_not_match(split_source: ShardSet, tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(split_source, write_json(tmp_path / "a.jsonl", rows), tmp_path)
    assert not (tmp_path / "output").exists()


def one(value: object, document: object = "doc-1") -> list[dict]:
    """A good row, and a second one with this value."""
    return [{"document_id": "doc-0", "mine": [0, 0, 0]}, {"document_id": document, "mine": value}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (one([1]), r"a\.jsonl: row 2 \(document 'doc-1'\): has a list of 1 for a sequence of 2 tokens"),
        (one([]), "has a list of 0 for a sequence of 2 tokens"),
        (one([1, math.inf]), "row 2: 'mine' has a value that is infinite"),
        (one([1, 65520]), "row 2: 'mine' has a value that is infinite or beyond float16"),
        (one([1, "x"]), "row 2: JSON parse error"),
        (one([1, True]), "row 2: JSON parse error"),
        (one([[1], [2]]), "row 2: JSON parse error"),
        (one("text"), "row 2: JSON parse error"),
        (one([1, 2], document=None), "row 2: has no document_id"),
        (one([1, 2], document="\x1b[31m"), r"document '\\x1b\[31m'\): no such document"),
        (one([1, 2], document="doc-9"), r"row 2 \(document 'doc-9'\): no such document in .*of this corpus"),
        ([ROWS[0], ROWS[0]], r"row 2 \(document 'doc-0'\): an earlier row"),
        ([{"document_id": "doc-0", "input_ids": [1, 2, 3]}], "'input_ids' is reserved"),
        ([{"document_id": "doc-0", "loss_a": [1, 2, 3]}], "already has a column 'loss_a'"),
        ([{"document_id": "doc-0", "reward": 1}], "already has a column 'reward'"),
        ([{"document_id": "doc-0", "a\x1b": 1}], r"'a\\x1b' cannot be a column name"),
        ([{"document_id": "doc-0", "x": True}], "column 'x' holds 'bool', not a list of numbers"),
        ([{"document_id": "doc-0", "x": {"a": 1}}], "not a list of numbers"),
        ([{"document_id": "doc-0", "x": ["a"]}], "not a list of numbers"),
        ([{"document_id": "doc-0", "x": None}], "'x' has no value in the first rows"),
        ([{"document_id": "doc-0", "x": 1}], "'x' has no value for 3 documents of .*first: 'doc-1'"),
        ([{"document_id": f"doc-{n}", "x": 1e39} for n in range(4)], "row 1: 'x' is infinite in float32"),
        ([{"document_id": "doc-0"}], "no column besides"),
        ([{"mine": [1]}], "has no column 'document_id'"),
        ([{"document_id": 1.5, "mine": [1]}], "'document_id' should be a string; it is double"),
        ([{"document_id": "doc-0", "a": [1, 2, 3], "b": [1, 2]}], "'b' is not as long as the other lists"),
    ],
)
def test_files_that_cannot_be_imported(source: ShardSet, tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(source, write_json(tmp_path / "a.jsonl", rows), tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b'{"document_id": "\xff", "x": [1]}\n', b"[" * 100_000])
def test_damaged_json(source: ShardSet, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: ") as caught:
        run(source, tmp_path / "a.jsonl", tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1.0, math.inf, 0]]), "row 1: 'mine' has a value that is infinite"),
        (pa.array([["a", "b", "c"]]), "not a list of numbers"),
        (pa.array([[True, False, True]]), "not a list of numbers"),
        (pa.array([[[1], [2], [3]]]), "not a list of numbers"),
        (pa.array([[1 << 20, 0, 0]]), "beyond float16"),
        (pa.array([None], pa.list_(pa.float32())), None),
        (pa.array([[1, None, 3]], pa.list_(pa.int8())), None),
        (pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3)), None),
    ],
)
def test_types_of_parquet(source: ShardSet, tmp_path: Path, column: pa.Array, message: str | None) -> None:
    pq.write_table(pa.table({"document_id": ["doc-0"], "mine": column}), tmp_path / "a.parquet")
    if message is None:
        found = values_of(run(source, tmp_path / "a.parquet", tmp_path), "mine")[:3]
        expected = np.array(column.to_pylist()[0] or [None] * 3, np.float32)
        np.testing.assert_array_equal(found, expected.astype(np.float16))
        return
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "a.parquet", tmp_path)


def test_damaged_parquet(source: ShardSet, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"document_id": [f"doc-{n}" for n in range(3000)], "x": np.arange(3000.0)})
    pq.write_table(table, file, compression="none", use_dictionary=False)
    content = file.read_bytes()
    bad_text = content.replace(b"doc-1", b"doc\xff1", 1)
    middle = len(content) // 3
    for damaged in (b"", b"PAR1", content[:-9], content[:4] + b"\xff" * 60 + content[64:], bad_text, content[middle:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: ") as caught:
            run(source, file, tmp_path)
        assert str(caught.value).isprintable()


def test_several_files_and_chosen_columns(source: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    folder.mkdir()
    write_json(folder / "b.jsonl", [row | {"text": "x"} for row in ROWS[2:]])
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "a.parquet")
    (folder / "notes.txt").write_text("not scores")
    shards = run(source, folder, tmp_path, columns="mine")
    np.testing.assert_array_equal(values_of(shards, "mine"), EXPECTED)
    origin = shards.manifest.columns["mine"].origin
    assert isinstance(origin, Imported)
    assert [file.name for file in origin.files] == ["a.parquet", "b.jsonl"]
    for scores in (f"{folder}/[ab].*", f"{folder / 'b.jsonl'},{folder / 'a.parquet'}"):
        with pytest.raises(UserError, match=r"has a column 'text' that .*a\.parquet lacks; import one file after"):
            import_scores(ImportConfig(input=source.path, scores=scores, output=tmp_path / "other"))


def test_other_files_for_the_same_output_are_refused(source: ShardSet, tmp_path: Path) -> None:
    run(source, write_json(tmp_path / "a.jsonl", ROWS), tmp_path)
    with pytest.raises(UserError, match=r"other inputs or settings \(files\)"):
        run(source, write_json(tmp_path / "a.jsonl", ROWS[:2]), tmp_path)


def test_a_stopped_import_continues(source: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = write_json(tmp_path / "a.jsonl", ROWS)
    written: list[str] = []

    def interrupt(output: Path, attempt: module.new_attempt) -> None:
        commit(output, attempt)
        written.append(attempt.unit)
        if len(written) == 1:
            raise KeyboardInterrupt

    commit = module.commit
    monkeypatch.setattr(module, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, scores, tmp_path)
    shards = run(source, scores, tmp_path)
    assert written == [shard.name for shard in source.manifest.shards], "each shard is written once"
    np.testing.assert_array_equal(values_of(shards, "mine"), EXPECTED)
    assert faults(shards) == []


def test_a_path_without_score_files(source: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for scores, message in [("nowhere", "no Parquet or JSON Lines file"), ("a.csv", "by its name")]:
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / scores, tmp_path)
    with pytest.raises(UserError, match="is also the --input"):
        import_scores(ImportConfig(input=source.path, scores="x", output=source.path))


@pytest.mark.parametrize("name", ["", "/a.jsonl", "/*.jsonl"])
def test_files_and_output_in_a_store(source: ShardSet, s3: UPath, name: str) -> None:
    (s3 / "scores" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = ImportConfig(input=source.path, scores=f"{s3}/scores{name}", output=s3 / "output")
    shards = import_scores(config)
    np.testing.assert_array_equal(values_of(shards, "mine"), EXPECTED)
    assert faults(shards) == []
    assert import_scores(config).manifest == shards.manifest
