"""Mutations of shard sets, as values that hypothesis draws and shrinks and whose `repr` reproduces them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forging import describe_file
from hypothesis import strategies as st

from weighted_mtp.schemas.shard_set.fingerprints import digest_json, directory_digest
from weighted_mtp.schemas.shard_set.shard_set import STATISTICS
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, sha256_file

Where = tuple[str | int, ...]


def nested(levels: int, kind: type = list) -> Any:
    """A list or object inside another, and so on."""
    value: Any = kind()
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


HOSTILE_TEXT = (
    "",
    "\x1b]0;title\x07",
    "\u202ereversed",
    "\ud800",
    "a\nb",
    "x" * 5000,
    "../../etc/passwd",
    "\0",
    "Loss_A",
)
HOSTILE_NUMBERS = (0, 1, -1, 3, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, -(10**30), 10**4000, 0.5, 1e308)
HOSTILE_JSON = (
    None, True, False, float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, nested(90), nested(600, dict),
    *HOSTILE_TEXT, *HOSTILE_NUMBERS,
)  # fmt: skip


def hostile_json(number: int) -> Any:
    """A new copy of a value of `HOSTILE_JSON`. Some are nested too deep for `copy`."""
    return json.loads(json.dumps(HOSTILE_JSON[number]))


def places(value: Any, at: Where = ()) -> Iterator[Where]:
    """The place of every value inside a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*at, key))


@dataclass(frozen=True)
class EditJson:
    """Sets, removes, copies or adds a value of a JSON file. `value` is an index in `HOSTILE_JSON`."""

    file: str
    at: Where
    action: str
    value: int

    def apply(self, path: Path) -> None:
        """Edit the file, if the place still exists."""
        content = json.loads((path / self.file).read_text())
        hostile = hostile_json(self.value)
        if not self.at:
            content = hostile
        else:
            *outer, last = self.at
            holder = content
            for key in outer:
                holder = holder[key]
            if self.action == "set":
                holder[last] = hostile
            elif self.action == "remove":
                del holder[last]
            elif self.action == "double":
                if isinstance(holder, list):
                    holder.append(holder[last])
                else:
                    holder[str(hostile)[:400]] = holder[last]
            elif self.action == "wrap":
                holder[last] = [holder[last]] if self.value % 2 else {"a": holder[last]}
            elif isinstance(holder[last], int | float):
                holder[last] += self.value - len(HOSTILE_JSON) // 2
        (path / self.file).write_text(json.dumps(content))


@dataclass(frozen=True)
class EditBytes:
    """Overwrites, removes or inserts bytes at a share of the length of a file."""

    file: str
    at: float
    action: str
    data: bytes

    def apply(self, path: Path) -> None:
        """Edit the file."""
        content = (path / self.file).read_bytes()
        place = int(self.at * len(content))
        if self.action == "cut":
            content = content[:place]
        elif self.action == "insert":
            content = content[:place] + self.data + content[place:]
        else:
            content = content[:place] + self.data + content[place + len(self.data) :]
        (path / self.file).write_bytes(content)


@dataclass(frozen=True)
class ReplaceFile:
    """Replaces a file, or a directory, by something else."""

    file: str
    kind: str

    def apply(self, path: Path) -> None:
        """Replace the file."""
        file = path / self.file
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
        if self.kind == "directory":
            file.mkdir()
        elif self.kind == "fifo":
            os.mkfifo(file)
        elif self.kind == "empty":
            file.touch()
        elif self.kind == "sparse":
            with open(file, "wb") as opened:
                opened.truncate(1 << 40)
        elif self.kind != "missing":
            file.symlink_to(
                {"loop": file.name, "dangling": "nowhere", "zero": "/dev/zero", "outside": "/etc"}[self.kind]
            )


COLUMN_TYPES = (
    pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string(),
    pa.large_string(), pa.binary(), pa.bool_(), pa.null(), pa.timestamp("us"), pa.decimal128(38, 2),
    pa.dictionary(pa.int32(), pa.string()), pa.struct({"a": pa.int32()}), pa.list_(pa.int32()), pa.list_(pa.int64()),
    pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.string()), pa.list_(pa.list_(pa.float32())),
    pa.large_list(pa.int32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3), pa.map_(pa.string(), pa.int32()),
)  # fmt: skip
COLUMN_ACTIONS = (
    "null", "nan", "inf", "huge", "negative", "longer", "shorter", "empty", "double", "drop", "reverse", "rename",
    "text", "not_utf8", "nullable", "large_text",
)  # fmt: skip
ROW_ACTIONS = ("none", "first", "double", "group_each", "empty_group", "plain", "metadata")


@dataclass(frozen=True)
class EditColumn:
    """Edits a column of a shard, of the statistics or of another Parquet file; `value` chooses among variants."""

    file: str
    column: int
    action: str
    value: int

    def apply(self, path: Path) -> None:
        """Edit the column."""
        table = read_table(path / self.file)
        index = self.column % table.num_columns
        write_table(edit_column(table, index, self.action, self.value), path / self.file)


@dataclass(frozen=True)
class EditType:
    """Gives a column of a table another type, with values of this type; `kind` is an index in `COLUMN_TYPES`."""

    file: str
    column: int
    kind: int

    def apply(self, path: Path) -> None:
        """Edit the column."""
        table = read_table(path / self.file)
        index = self.column % table.num_columns
        kind = COLUMN_TYPES[self.kind]
        values = pa.array([value_of(kind)] * table.num_rows, kind)
        write_table(table.set_column(index, pa.field(table.column_names[index], kind, False), values), path / self.file)


@dataclass(frozen=True)
class EditRows:
    """Edits all columns of a table."""

    file: str
    action: str

    def apply(self, path: Path) -> None:
        """Edit the rows."""
        table = read_table(path / self.file)
        settings: dict[str, Any] = {}
        if self.action == "none":
            table = table.slice(0, 0)
        elif self.action == "first":
            table = table.slice(0, 1)
        elif self.action == "double":
            table = pa.concat_tables([table, table]).cast(table.schema)
        elif self.action == "group_each":
            settings = {"row_group_size": 1}
        elif self.action == "plain":
            settings = {"use_dictionary": False, "compression": "none"}
        elif self.action == "metadata":
            table = table.replace_schema_metadata({b"\xff": b"\0" * 100})
        write_table(table, path / self.file, empty_group=self.action == "empty_group", **settings)


def value_of(kind: pa.DataType) -> Any:
    """A value of an Arrow type."""
    if pa.types.is_nested(kind):
        if pa.types.is_struct(kind):
            return {"a": 1}
        if pa.types.is_map(kind):
            return [("a", 1)]
        length = kind.list_size if pa.types.is_fixed_size_list(kind) else 2
        return [value_of(kind.value_type)] * length
    if pa.types.is_null(kind):
        return None
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "a"
    if pa.types.is_float16(kind):
        return np.float16(1)
    return b"a" if pa.types.is_binary(kind) else True if pa.types.is_boolean(kind) else 1


def edit_column(table: pa.Table, index: int, action: str, value: int) -> pa.Table:
    """The table with one column edited."""
    field, values = table.schema.field(index), table.column(index).to_pylist()
    is_list = pa.types.is_list(field.type)
    if action == "drop":
        return table.remove_column(index)
    if action == "double":
        return table.append_column(field, table.column(index))
    if action == "rename":
        names = list(table.column_names)
        names[index] = ("Loss_A", "loss_a", "", "a b", "\ud7ff\n", "start", "x" * 300)[value % 7]
        return table.rename_columns(names)
    if action == "nullable":
        return table.set_column(index, field.with_nullable(True), table.column(index))
    if action == "reverse":
        values = values[::-1]
    row = value % max(1, len(values))
    if values:
        values[row] = (
            edited_value(values[row], action, value) if not is_list else edited_list(values[row], action, value)
        )
    if action == "not_utf8" and pa.types.is_string(field.type):
        column = pa.array([b"\xff\xfe"] * len(values), pa.binary())
        spoilt = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
        return table.set_column(index, field, spoilt)
    with_null = any(one is None or (is_list and None in one) for one in values)
    kind = pa.list_(pa.field("element", field.type.value_type, True)) if is_list and with_null else field.type
    try:
        column = pa.array(values, kind)
    except (OverflowError, pa.ArrowInvalid):  # an edited number that the type, of an earlier edit, does not have
        return table
    return table.set_column(index, pa.field(field.name, kind, with_null or field.nullable), column)


def edited_value(value: Any, action: str, variant: int) -> Any:
    """A number or a string edited; unchanged if the action does not apply."""
    if action == "null":
        return None
    if isinstance(value, str):
        text = {"text": HOSTILE_TEXT[variant % len(HOSTILE_TEXT)].replace("\ud800", "?"), "large_text": "y" * (1 << 17)}
        return text.get(action, value)
    if isinstance(value, float):
        return {"nan": float("nan"), "inf": float("inf"), "huge": 3e38, "negative": -0.1}.get(action, value)
    if isinstance(value, int):
        return {"huge": (1 << 31) - 1, "negative": -1}.get(action, value)
    return value


def edited_list(values: list[Any] | None, action: str, variant: int) -> list[Any] | None:
    """A list edited: its length, or one of its values."""
    if action == "null" and variant % 2:
        return None
    if not values or action in ("empty",):
        return []
    if action == "longer":
        return [*values, values[-1]]
    if action == "shorter":
        return values[:-1]
    at = variant % len(values)
    return [*values[:at], edited_value(values[at], action, variant), *values[at + 1 :]]


def read_table(path: Path) -> pa.Table:
    """A table from a Parquet or Arrow file."""
    if path.suffix == ".arrow":
        with pa.ipc.open_file(path) as reader:
            return reader.read_all()
    return pq.ParquetFile(path).read()


def write_table(table: pa.Table, path: Path, empty_group: bool = False, **settings: Any) -> None:
    """Write a table as Parquet or Arrow, perhaps with an empty row group before it."""
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        return
    size = settings.pop("row_group_size", None)
    with pq.ParquetWriter(path, table.schema, **settings) as writer:
        if empty_group:
            writer.write_table(table.slice(0, 0))
        writer.write_table(table, row_group_size=size)


FRAGMENTS = (
    b"\0",
    b"\n",
    b"\xff",
    b"[" * 2000,
    b'{"a":',
    b"1e999",
    b"\\ud800",
    b"null",
    b'"',
    b",",
    b"\n\n",
    b"\xef\xbb\xbf",
)
Mutation = EditJson | EditBytes | ReplaceFile | EditColumn | EditType | EditRows


def set_mutations(base: Path) -> st.SearchStrategy[Mutation]:
    """Mutations of the set in `base`."""
    files = [file.relative_to(base).as_posix() for file in sorted(base.rglob("*")) if file.is_file()]
    tables = [file for file in files if file.endswith((".parquet", ".arrow"))]
    jsons = [file for file in files if file.endswith(".json")]
    values = {file: list(places(json.loads((base / file).read_text()))) for file in jsons}
    # The long vocabulary would hide all other places of a tokenizer.
    short = {file: [at for at in found if "vocab" not in at[:-1]] for file, found in values.items()}
    index = st.integers(0, len(HOSTILE_JSON) - 1)
    edit_manifest = st.builds(
        EditJson,
        st.just(MANIFEST),
        st.sampled_from(short[MANIFEST]),
        st.sampled_from(["set", "set", "remove", "double", "wrap", "add"]),
        index,
    )
    others = [file for file in jsons if file != MANIFEST]
    edit_json = st.sampled_from(others).flatmap(
        lambda file: st.builds(
            EditJson, st.just(file), st.sampled_from(short[file]), st.sampled_from(["set", "remove", "wrap"]), index
        )
    )
    column, variant = st.integers(0, 8), st.integers(0, 20)
    return st.one_of(
        edit_manifest,
        edit_manifest,
        st.builds(EditColumn, st.sampled_from(tables), column, st.sampled_from(COLUMN_ACTIONS), variant),
        st.builds(EditType, st.sampled_from(tables), column, st.integers(0, len(COLUMN_TYPES) - 1)),
        st.builds(EditRows, st.sampled_from(tables), st.sampled_from(ROW_ACTIONS)),
        edits_of_bytes(files),
        edit_json,
        st.builds(
            ReplaceFile,
            st.sampled_from([*files, DATA, TOKENIZER]),
            st.sampled_from(["missing", "directory", "fifo", "empty", "sparse", "loop", "dangling", "zero", "outside"]),
        ),
    )


def table_mutations(base: Path) -> st.SearchStrategy[Mutation]:
    """Mutations of the files in `base`: of all bytes, and of the columns of Parquet files."""
    files = sorted(file.name for file in base.iterdir())
    tables = [file for file in files if file.endswith(".parquet")]
    column, variant = st.integers(0, 8), st.integers(0, 20)
    return st.one_of(
        st.builds(EditColumn, st.sampled_from(tables), column, st.sampled_from(COLUMN_ACTIONS), variant),
        st.builds(EditType, st.sampled_from(tables), column, st.integers(0, len(COLUMN_TYPES) - 1)),
        st.builds(EditRows, st.sampled_from(tables), st.sampled_from(ROW_ACTIONS)),
        edits_of_bytes(files),
        edits_of_bytes(files),
    )


def edits_of_bytes(files: list[str]) -> st.SearchStrategy[EditBytes]:
    """Edits of the bytes of files."""
    return st.builds(
        EditBytes,
        st.sampled_from(files),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "set", "cut", "insert"]),
        st.binary(min_size=1, max_size=8) | st.sampled_from(FRAGMENTS),
    )


def mutate(path: Path, edits: list[Mutation], signed: bool) -> None:
    """Apply mutations, as far as they still make sense after the earlier ones.

    Args:
        path: the set.
        edits: the mutations.
        signed: whether to make the manifest describe the mutated files, and its digest that of its content.
    """
    for edit in edits:
        with suppress(KeyError, IndexError, TypeError, ValueError, RecursionError, OSError, pa.ArrowException):
            if isinstance(edit, ReplaceFile) or is_small(path / edit.file):
                edit.apply(path)
    if signed and is_small(path / MANIFEST):
        touched = {edit.file for edit in edits if edit.file != MANIFEST}
        with suppress(Exception):
            sign(path, touched)


def is_small(file: Path) -> bool:
    """Whether a path is a file that can be read here."""
    return file.is_file() and file.stat().st_size < 1 << 20


def sign(path: Path, touched: set[str]) -> None:
    """Make the manifest describe the files in `touched`, and its digest that of its content."""
    content = json.loads((path / MANIFEST).read_text())
    for entry in content["shards"]:
        file = next(path / name for name in (f"{DATA}/{entry['name']}", entry["name"]) if (path / name).exists())
        if file.relative_to(path).as_posix() in touched and is_small(file):
            with suppress(pa.ArrowException):
                entry.update(describe_file(file))
            entry.update(bytes=file.stat().st_size, sha256=sha256_file(file))
            with suppress(pa.ArrowException, KeyError, AttributeError):
                lists = pq.ParquetFile(file).read(["input_ids"])["input_ids"]
                lengths = [len(ids) for ids in lists.to_pylist()]
                entry.update(tokens=sum(lengths), longest=max(lengths, default=0))
    statistics = path / STATISTICS
    if STATISTICS in touched and is_small(statistics):
        content["statistics_sha256"] = sha256_file(statistics)
    if all(map(is_small, (path / TOKENIZER).iterdir())):
        content["tokenizer"]["files_sha256"] = directory_digest(path / TOKENIZER)
    content["digest"] = digest_json({key: value for key, value in content.items() if key not in ("digest", "timings")})
    (path / MANIFEST).write_text(json.dumps(content))
