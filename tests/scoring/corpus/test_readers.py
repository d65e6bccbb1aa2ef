import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.corpus import readers
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
    "content",
    [
        b'[{"text": "a"}, 3, {"text": "b"}, {"text": 1, "text": "c"}]',
        b' \n[\n{"text": "a"},\n3,\n{"text": "b"}, {"text": "c", "text": "c"}]\n',
    ],
)
def test_json_array(content: bytes, tmp_path: Path) -> None:
    expected = ([(0, "a"), (2, "b")], [(1, "not an object"), (3, "field 'text' occurs 2 times")])
    assert read(write(tmp_path / "a.json", content)) == expected
    assert read(write(tmp_path / "a.json.gz", gzip.compress(content))) == expected


def test_json_lines_in_a_file_named_json(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", GOOD * 2)) == ([(0, "good"), (1, "good")], [])


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, ".zstd": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_of_several_frames(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESSORS[suffix]
    line = b'{"text": "%s"}\n' % WORLD
    path = write(tmp_path / f"a.jsonl{suffix}", compress(line) + compress(b"\xff\n" + line))
    assert read(path) == ([(0, WORLD.decode()), (2, WORLD.decode())], [(1, "invalid UTF-8")])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (GOOD.decode().encode("utf-16"), "in UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "in UTF-16"),
        *((COMPRESSORS[suffix](GOOD), f"compressed, .* {suffix}") for suffix in (".gz", ".xz", ".zst")),
    ],
    ids=["utf-16", "lfs", "utf-16-be", ".gz", ".xz", ".zst"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_files_that_are_something_else_from_the_start(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: cannot be read as .* \\(it is {what}"):
        read(write(tmp_path / name, content))


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


def test_csv_files_may_begin_with_blank_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", b"\n\r\ntext,x\n\na,1\n")) == ([(0, "a")], [])
    assert read(write(tmp_path / "a.csv", b"\n\n")) == ([], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_failures_of_a_store_and_of_memory_are_no_damage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = [pa.ArrowMemoryError("malloc failed"), OSError(5, "the store is busy")]
    failures[1].__cause__ = ValueError("503")
    write(tmp_path / name, GOOD)
    for failure in failures:
        monkeypatch.setattr(readers, "open_stream", Mock(side_effect=failure))
        with pytest.raises(type(failure)):
            read(tmp_path / name)


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


@pytest.mark.parametrize("kind", [pa.decimal32(9, 2), pa.decimal64(18, 2), pa.decimal128(38, 2), pa.decimal256(76, 2)])
def test_decimals_are_numbers(kind: pa.DataType, tmp_path: Path) -> None:
    rewards = pa.array([Decimal("0.25"), Decimal("-7.00"), None], kind)
    names = pa.array([Decimal(7), Decimal(8), Decimal(9)], pa.decimal128(38, 0))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "reward": rewards, "id": names}), tmp_path / "a.parquet")
    fields = Fields("text", "id", numbers=("reward",))
    [batch] = read_batches(find_sources(str(tmp_path / "a.parquet")).read, fields)
    documents, rejects = parse_batch(batch, fields)
    assert [(document.id, document.values) for document in documents] == [("7", (0.25,)), ("8", (-7.0,))]
    assert [reject.reason for reject in rejects] == ["field 'reward' is not a number: NoneType"]
    [batch] = read_batches(find_sources(str(tmp_path / "a.parquet")).read, Fields("text", "reward"))
    assert "neither a string nor an integer: Decimal" in parse_batch(batch, Fields("text", "reward"))[1][0].reason


@pytest.mark.parametrize(("name", "save"), COLUMNAR)
def test_two_columns_of_the_same_name(name: str, save: Callable[[Path, pa.Table], None], tmp_path: Path) -> None:
    columns = [pa.array([text] * 3) for text in "abcd"]
    save(tmp_path / name, pa.Table.from_arrays(columns, ["text", "other", "other", "text"]))
    with pytest.raises(UserError, match=f"{name}: cannot be read as .*2 columns are named 'text'.; repair it"):
        read(tmp_path / name)
    save(tmp_path / name, pa.Table.from_arrays(columns, ["a", "other", "other", "text"]))
    assert read(tmp_path / name) == ([(0, "d"), (1, "d"), (2, "d")], [])
    assert read(tmp_path / name, Fields("body"))[1] == [(row, "no field 'body'") for row in range(3)]


def test_two_columns_of_the_same_name_in_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv: cannot be read as csv \(2 columns are named 'text'\)"):
        read(write(tmp_path / "a.csv", b"text,x,x,text\na,b,c,d\n"))
    assert read(write(tmp_path / "a.csv", b"y,x,x,text\na,b,c,d\n")) == ([(0, "d")], [])


SMALL = 8
"""Largest document in tests of bounds, in bytes. Rows have up to 32."""
LARGE = "larger than 8 bytes (--max_document_bytes)"
LARGE_ROW = "row larger than 32 bytes (4 times --max_document_bytes)"


def read_small(path: Path, sample_by: SampleBy = "document") -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Row and text, and row and reason, for documents of at most `SMALL` bytes."""
    documents: list[Document] = []
    rejects: list[RejectedDocument] = []
    for batch in read_batches(find_sources(str(path)).read, TEXT_FIELD, sample_by, SMALL):
        good, bad = parse_batch(batch, TEXT_FIELD, SMALL)
        documents += good
        rejects += bad
    return [(d.row, d.text) for d in documents], [(r.row, r.reason) for r in rejects]


def test_large_lines_of_json_are_rejected(tmp_path: Path) -> None:
    texts = ["12345678", "123456789", "\u00e9\u00e9\u00e9\u00e9", "\u00e9\u00e9\u00e9\u00e91", "x" * 100, "end"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    expected = [(0, texts[0]), (2, texts[2]), (5, "end")], [(1, LARGE), (3, LARGE), (4, LARGE_ROW)]
    assert read_small(write(tmp_path / "a.jsonl", b"\n".join(lines))) == expected
    assert read_small(write(tmp_path / "a.jsonl.xz", lzma.compress(b"\n".join(lines)))) == expected
    assert read_small(write(tmp_path / "a.json", b"[" + b",".join(lines[:4]) + b"]")) == (
        [(0, texts[0]), (2, texts[2])],
        [(1, LARGE), (3, LARGE)],
    )


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", ([], [(0, LARGE)])),
        ("line", ([(0, "12345678"), (3, "a"), (4, "b c d")], [(1, LARGE)])),
        ("paragraph", ([(1, "a\nb c d")], [(0, LARGE)])),
    ],
)
def test_large_texts_are_rejected(
    sample_by: SampleBy, expected: tuple[list[tuple[int, str]], list[tuple[int, str]]], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.txt", b"12345678\n123456789\n\na\nb c d\n")
    assert read_small(path, sample_by) == expected


def test_large_values_of_csv_are_rejected_and_longer_records_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'x,text\n1,12345678\n2,"1234567\n9"\n3,"a\nb"\n')
    assert read_small(path) == ([(0, "12345678"), (2, "a\nb")], [(1, LARGE)])
    for record in (b"2," + b"x" * 40, b'2,"' + b"x\n" * 40):
        with pytest.raises(UserError, match=r"the record at line \d+ has more than 32 characters, perhaps because of"):
            read_small(write(tmp_path / "a.csv", b"x,text\n1,a\n" + record))


@pytest.mark.parametrize(("name", "save"), COLUMNAR)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_large_values_of_columnar_files_are_rejected(
    name: str, save: Callable[[Path, pa.Table], None], kind: pa.DataType, tmp_path: Path
) -> None:
    texts = ["12345678", "123456789", None, "x" * 33, "end"]
    save(tmp_path / name, pa.table({"text": pa.array(texts).cast(kind)}))
    expected = [(1, LARGE), (2, "field 'text' is not a string: NoneType"), (3, LARGE_ROW)]
    assert read_small(tmp_path / name) == ([(0, "12345678"), (4, "end")], expected)


def test_views_of_large_strings_are_not_converted(tmp_path: Path) -> None:
    texts = pa.array(["12345678", "123456789", None, "x" * 33, "end"], pa.string_view())
    to_arrow_file(tmp_path / "a.arrow", pa.table({"text": texts}))
    documents, rejects = read_small(tmp_path / "a.arrow")
    assert (documents, rejects[2]) == ([(0, "12345678"), (4, "end")], (3, LARGE_ROW))


def test_a_row_group_of_large_rows_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ARROW_BYTES", 500)
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", write_statistics=False) as writer:
        for texts in (["a", "b"], ["x" * 1000, "y"], ["c"]):
            writer.write_table(pa.table({"text": texts}))
    content = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", content.replace(b"x" * 1000, b"\xff" * 1000))  # which reading would notice
    assert read_small(tmp_path / "a.parquet") == (
        [(0, "a"), (1, "b"), (4, "c")],
        [(2, LARGE_ROW), (3, LARGE_ROW)],
    )


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * (BATCH_BYTES // 2)}).encode() + b"\n"
    path = write(tmp_path / "a.jsonl", GOOD * (BATCH_ROWS + 1) + long * 5)
    batches = list(read_batches(find_sources(str(path)).read, TEXT_FIELD))
    assert [len(batch.rows) for batch in batches] == [BATCH_ROWS, 3, 2, 1]
    assert [number for batch in batches for number, _ in batch.rows] == list(range(BATCH_ROWS + 6))
