import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.corpus.documents import Document, Fields, RejectedDocument, parse_batch
from weighted_mtp.scoring.corpus.readers import BATCH_BYTES, BATCH_ROWS, SampleBy, read_batches
from weighted_mtp.scoring.corpus.source_files import find_sources

TEXT_FIELD = Fields("text")
GOOD = b'{"text": "good"}\n'
WORLD = "caf\u00e9 \u2028 \u0085 \U0001f30d".encode()


def read(
    path: Path, fields: Fields = TEXT_FIELD, sample_by: SampleBy = "document"
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(row, text) of the documents and (row, kind) of the rejects of a file."""
    documents: list[Document] = []
    rejects: list[RejectedDocument] = []
    for batch in read_batches(find_sources(str(path)).read, fields, sample_by):
        good, bad = parse_batch(batch, fields)
        documents += good
        rejects += bad
    return [(d.row, d.text) for d in documents], [(r.row, r.kind) for r in rejects]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_numbers_of_csv_files_are_read_from_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,reward,group\na,0.5,1\nb,,1\nc,nan,1\nd,-2,x\n")
    fields = Fields("text", numbers=("reward",), labels=("group",))
    [batch] = read_batches(find_sources(str(path)).read, fields)
    documents, rejects = parse_batch(batch, fields)
    assert [document.values for document in documents] == [(0.5, "1"), (-2.0, "x")]
    assert [reject.row for reject in rejects] == [1, 2]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int64()])
def test_numbers_of_columnar_files(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "other": [0, 0], "reward": pa.array([2, None], pa.int64()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    fields = Fields("text", numbers=("reward",))
    [batch] = read_batches(find_sources(str(tmp_path / "a.parquet")).read, fields)
    assert batch.rows[0][1] == {"text": "a", "reward": 2}
    documents, rejects = parse_batch(batch, fields)
    assert [document.values for document in documents] == [(2.0,)]
    assert [reject.kind for reject in rejects] == ["field 'reward' is not a number"]


def test_line_ends_and_blank_lines_keep_row_numbers(tmp_path: Path) -> None:
    """Row numbers are line numbers; U+2028 and U+0085 end no line; a BOM and a missing last newline are harmless."""
    lines = [b"\xef\xbb\xbf" + GOOD[:-1], b"", b"  \t", b'{"text": "%s"}' % WORLD, b"", GOOD[:-1]]
    for end in (b"\n", b"\r\n"):
        documents, rejects = read(write(tmp_path / "a.jsonl", end.join(lines)))
        assert documents == [(0, "good"), (3, WORLD.decode()), (5, "good")]
        assert rejects == []


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}, 3, {"text": "b"}]', b' \n[\n{"text": "a"},\n3,\n{"text": "b"}]\n']
)
def test_json_array(content: bytes, tmp_path: Path) -> None:
    expected = ([(0, "a"), (2, "b")], [(1, "not an object")])
    assert read(write(tmp_path / "a.json", content)) == expected
    assert read(write(tmp_path / "a.json.gz", gzip.compress(content))) == expected


def test_json_lines_in_a_file_named_json(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", GOOD * 2)) == ([(0, "good"), (1, "good")], [])


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_of_several_frames(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESSORS[suffix]
    line = b'{"text": "%s"}\n' % WORLD
    path = write(tmp_path / f"a.jsonl{suffix}", compress(line) + compress(b"\xff\n" + line))
    assert read(path) == ([(0, WORLD.decode()), (2, WORLD.decode())], [(1, "invalid UTF-8")])


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_truncated_archive_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    whole = COMPRESSORS[suffix](b"text\n" + b"".join(b'{"text": "%d"}\n' % (row**5) for row in range(20_000)))
    path = write(tmp_path / (name + suffix), whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}{suffix}: cannot be read"):
        read(path)


TEXT = b"one\ntwo\n\n \nthree\r\n\r\nfour"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", [(0, TEXT.decode())]),
        ("line", [(0, "one"), (1, "two"), (4, "three"), (6, "four")]),
        ("paragraph", [(0, "one\ntwo"), (1, "three"), (2, "four")]),
    ],
)
def test_text_files(sample_by: SampleBy, expected: list[tuple[int, str]], tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", TEXT), sample_by=sample_by) == (expected, [])


@pytest.mark.parametrize("sample_by", ["document", "line", "paragraph"])
def test_text_that_is_not_utf8_is_an_error(sample_by: SampleBy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read as text .*utf-8"):
        read(write(tmp_path / "latin.txt", "caf\u00e9\n".encode("latin-1")), sample_by=sample_by)


def test_empty_text_file_is_a_reject(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"")) == ([], [(0, "empty text")])


def test_csv(tmp_path: Path) -> None:
    """Nothing is converted, quoted line breaks belong to the value, and bad records are rejected one by one."""
    rows = [b"id,text", b"1,NA", b"", b'2,"a\r\n""b"""', b"3,", b"4", b"5,x,y", b'6,"z"z', b"7,\xff", b"8,007"]
    documents, rejects = read(write(tmp_path / "a.csv", b"\r\n".join(rows)), Fields("text", "id"))
    assert documents == [(0, "NA"), (1, 'a\r\n"b"'), (7, "007")]
    assert [kind for _, kind in rejects] == [
        "empty text",
        "invalid CSV",
        "invalid CSV",
        "invalid CSV",
        "field 'text' is not valid Unicode",
    ]


def test_tsv(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.tsv", b"id\ttext\n1\ta, b\n")) == ([(0, "a, b")], [])


def to_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=2)


def to_arrow_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def to_arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


COLUMNAR = [("a.parquet", to_parquet), ("a.arrow", to_arrow_file), ("a.arrow", to_arrow_stream)]


@pytest.mark.parametrize(("name", "save"), COLUMNAR)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_columnar_files(name: str, save: Callable[[Path, pa.Table], None], kind: pa.DataType, tmp_path: Path) -> None:
    texts = pa.array(["a", None, "b", " ", "c"]).cast(kind)
    save(tmp_path / name, pa.table({"other": [1] * 5, "text": texts}))
    expected = [(1, "field 'text' is not a string"), (3, "empty text")]
    assert read(tmp_path / name) == ([(0, "a"), (2, "b"), (4, "c")], expected)


@pytest.mark.parametrize(("name", "save"), COLUMNAR)
def test_columnar_text_of_another_type_or_invalid(
    name: str, save: Callable[[Path, pa.Table], None], tmp_path: Path
) -> None:
    bad = pa.StringArray.from_buffers(
        3, pa.array([b"ab", b"\xff", b"c"]).buffers()[1], pa.array([b"ab\xffc"]).buffers()[2]
    )
    save(tmp_path / name, pa.table({"text": bad, "number": [1, 2, 3]}))
    assert read(tmp_path / name) == ([(0, "ab"), (2, "c")], [(1, "field 'text' is not valid Unicode")])
    assert [kind for _, kind in read(tmp_path / name, Fields("number"))[1]] == ["field 'number' is not a string"] * 3
    assert read(tmp_path / name, Fields("body"))[1] == [(row, "no field 'body'") for row in range(3)]


def test_data_set_saved_by_datasets(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ([(0, "a"), (1, "b")], [])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.xz"])
def test_file_with_a_misleading_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: cannot be read") as error:
        read(write(tmp_path / name, b"plain text\n" * 10))
    assert "\n" not in str(error.value)


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * (BATCH_BYTES // 2)}).encode() + b"\n"
    path = write(tmp_path / "a.jsonl", GOOD * (BATCH_ROWS + 1) + long * 5)
    batches = list(read_batches(find_sources(str(path)).read, TEXT_FIELD))
    assert [len(batch.rows) for batch in batches] == [BATCH_ROWS, 3, 2, 1]
    assert [number for batch in batches for number, _ in batch.rows] == list(range(BATCH_ROWS + 6))
