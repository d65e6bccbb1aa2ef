"""Score files that other tools wrote: finding and opening Parquet and JSON Lines."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shards import is_text
from weighted_mtp.schemas.storage.compression import data_suffix
from weighted_mtp.schemas.storage.links import expand
from weighted_mtp.schemas.storage.locations import Location, join, kind_of, locate, walk_tree
from weighted_mtp.schemas.text import describe_files, is_utf8, printable
from weighted_mtp.scoring.imports.json_lines import COMPRESSED, parse_lines, read_lines
from weighted_mtp.scoring.imports.sources import (
    BATCH_ROWS,
    KEYS,
    ColumnSize,
    Kind,
    RowBatch,
    ScoreSource,
    damage_reported,
    is_numeric,
)

logger = logging.getLogger("weighted_mtp")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
JSON_TYPES: dict[Kind, pa.DataType] = {"score": pa.list_(pa.float64()), "number": pa.float64(), "label": pa.string()}
KNOWN = f".parquet, {', '.join(JSON_SUFFIXES)}; JSON Lines also with {', '.join(COMPRESSED)}"


def find_score_files(names: Sequence[str]) -> list[Location]:
    """Files of scores in reading order: each name is a file, a directory, or a glob. A file counts once.

    On a disk, links are followed, but not in circles. Files of other kinds in a directory are left out, and logged.

    Raises:
        UserError: a name matches no Parquet or JSON Lines file, or something else.
    """
    found: dict[str, Location] = {}
    left_out: list[str] = []
    for name in names:
        path: Location = locate(name)
        files: list[Location]
        kind = kind_of(path)
        if kind == "file":
            files = [path]
        elif kind == "directory":
            inside, others = walk_tree(path)
            files = [join(path, file) for file in sorted(inside) if is_wanted(file)]
            left_out += sorted([*others, *(file for file in inside if not is_wanted(file))])
        elif isinstance(path, Path):
            matches = map(Path, sorted(set(expand(str(path)))))
            files = [match for match in matches if kind_of(match) != "directory"]
        else:
            files = [locate(path.fs.unstrip_protocol(match)) for match in sorted(path.fs.glob(path.path))]
        if not files:
            raise UserError(f"--scores {name}: no Parquet or JSON Lines file ({KNOWN}); check the path")
        found |= {str(file): file for file in files}
    for file in found.values():
        if not is_utf8(str(file)):
            raise UserError(f"{printable(str(file))}: the name is not in UTF-8; rename it")
        if not (is_parquet(file) or is_json(file)):
            raise UserError(f"{file}: is no Parquet or JSON Lines file by its name ({KNOWN}); convert it")
    if left_out:
        logger.info("--scores: left out %s", describe_files(left_out))
    return list(found.values())


def is_wanted(name: str) -> bool:
    """Whether a file in a directory of score files is one, by its name. Hidden files are not."""
    file = PurePosixPath(name)
    return not any(part.startswith((".", "_")) for part in file.parts) and (is_parquet(file) or is_json(file))


def is_parquet(path: PurePath | Location) -> bool:
    """Whether a file is Parquet by its name."""
    return path.suffix.lower() == ".parquet"


def is_json(path: PurePath | Location) -> bool:
    """Whether a file is JSON Lines by its name, perhaps compressed."""
    return data_suffix(path) in JSON_SUFFIXES and path.suffix.lower() in (*JSON_SUFFIXES, *COMPRESSED)


@dataclass(frozen=True)
class ScoreFile(ScoreSource):
    """A file of score rows."""

    path: Location


def open_score_file(path: Location) -> ScoreFile:
    """Read names and types of the columns of a file.

    Raises:
        UserError: the file cannot be read.
    """
    with damage_reported(str(path)):
        if is_parquet(path):
            with path.open("rb") as source:
                schema = pq.read_schema(source)
        else:
            lines = next(read_lines(path), None)
            if lines is None:
                raise ValueError("it has no rows")
            schema = parse_lines(lines).schema
        if len(set(schema.names)) < len(schema.names):
            raise ValueError("two columns have the same name")
    types = dict(zip(schema.names, schema.types, strict=True))
    return (ParquetFile if is_parquet(path) else JsonFile)(str(path), types, path)


class ParquetFile(ScoreFile):
    """A Parquet file."""

    def sizes(self) -> Mapping[str, ColumnSize]:
        """Sizes of all columns, from the metadata."""
        sizes: dict[str, ColumnSize] = {}
        with damage_reported(self.name), self.path.open("rb") as source:
            metadata = pq.read_metadata(source)
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for chunk in map(group.column, range(group.num_columns)):
                    name = chunk.path_in_schema.split(".")[0]
                    values, size = sizes.get(name, (0, 0))
                    sizes[name] = ColumnSize(values + chunk.num_values, size + chunk.total_uncompressed_size)
        return sizes

    def batches(self, kinds: Mapping[str, Kind]) -> Iterator[RowBatch]:
        """Batches of at most `BATCH_ROWS` rows."""
        names = [name for name in (*KEYS, *kinds) if name in self.types]
        # A dictionary of long strings stays small; its values in each row would not.
        texts = [name for name in names if is_text(self.types[name])]
        first = 0
        with (
            damage_reported(self.name),
            self.path.open("rb") as source,
            pq.ParquetFile(source, read_dictionary=texts) as file,
        ):
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield RowBatch(np.arange(first, first + batch.num_rows), pa.Table.from_batches([batch]))
                first += batch.num_rows


class JsonFile(ScoreFile):
    """A file of JSON Lines. Its row numbers are line numbers."""

    def batches(self, kinds: Mapping[str, Kind]) -> Iterator[RowBatch]:
        """Batches of about `BATCH_BYTES` bytes of JSON."""
        id_type = self.types["document_id"]
        if not is_numeric(id_type):  # numbers with a fraction are refused later, by name
            id_type = pa.string()
        types = {"document_id": id_type, "start": pa.int64()} | {name: JSON_TYPES[kind] for name, kind in kinds.items()}
        schema = pa.schema([(name, type_) for name, type_ in types.items() if name in self.types])
        complete = set(self.types) == set(schema.names)
        with damage_reported(self.name):
            for lines in read_lines(self.path):
                yield RowBatch(lines.numbers, parse_lines(lines, schema, "error" if complete else "ignore"))
