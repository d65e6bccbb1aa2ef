"""Converting a shard set of format 3 to the current format.

Format 3 had float16 scores, losses with all their float16 digits, its shards beside the manifest, and no digests of
footers.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import digest_json
from weighted_mtp.schemas.shard_set.manifest import (
    MOST_MANIFEST_BYTES,
    OLD_FORMAT_VERSION,
    CorpusInfo,
    Count,
    FileName,
    Manifest,
    ScoreColumn,
    ShardEntry,
    Timings,
    TokenizerInfo,
)
from weighted_mtp.schemas.shard_set.rounding import round_nats
from weighted_mtp.schemas.shard_set.shard_set import (
    MOST_REJECTS_BYTES,
    REJECTS,
    ShardSet,
    check_tokenizer,
    find_finished,
    find_foreign_entry,
    finish_shard_set,
)
from weighted_mtp.schemas.shard_set.shards import (
    RESTORE,
    SCORE_TYPE,
    ShardReader,
    flat_values,
    list_column,
    list_lengths,
    shard_schema,
    write_shard,
)
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.claims import claim_empty_output
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, atomic_write, copy_files
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.locks import exclusive

OLD_SCORE_TYPE = pa.list_(pa.field("element", pa.float16(), nullable=False))
FILE_NAME = TypeAdapter(FileName)
COUNT = TypeAdapter(Count)


def upgrade(source: Location, output: Location, report: Callable[[ShardEntry], None] = lambda shard: None) -> ShardSet:
    """Convert a set of format 3 into a new set, unless `output` already holds the result.

    Losses and entropies are rounded to multiples of 1/512 nat; contrasts and gradients keep their values.

    Args:
        source: the set of format 3, which stays as it is.
        output: directory of the new set.
        report: receives every shard that was written.

    Raises:
        UserError: not a set of format 3, a damaged one, or an output that holds something else.
    """
    content = read_old_manifest(source)
    if fault := find_foreign_entry(source):
        raise UserError(f"{fault}; {RESTORE}")
    request = json.dumps({"command": "upgrade", "input": content["digest"]})
    with exclusive(output):
        if finished := find_finished(output, request):
            return finished
        claim_empty_output(output, request)
        return write_upgraded(source, output, content, json.loads(request), report)


def read_old_manifest(source: Location) -> dict[str, Any]:
    """The content of a manifest of format 3 whose digest is right.

    Raises:
        UserError: there is none.
    """
    path = source / MANIFEST
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise ValueError(f"larger than {MOST_MANIFEST_BYTES:,} bytes")
        content = json.loads(path.read_text())
        if content["format_version"] != OLD_FORMAT_VERSION:
            raise UserError(f"{source}: has format version {content['format_version']}; there is nothing to upgrade")
        described = {key: value for key, value in content.items() if key not in ("digest", "timings")}
        if content["digest"] != digest_json(described):
            raise UserError(f"{path}: was changed after it was written; restore the original")
    except FileNotFoundError as error:
        raise UserError(f"{source}: not a shard set ({MANIFEST} is missing); check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a valid manifest ({first_line(error)}); restore the file") from error
    return content


def write_upgraded(
    source: Location,
    output: Location,
    content: dict[str, Any],
    request: dict[str, Any],
    report: Callable[[ShardEntry], None],
) -> ShardSet:
    """Write all files of the new set into the claimed directory `output`."""
    try:
        corpus = CorpusInfo.model_validate(content["corpus"])
        tokenizer = TokenizerInfo.model_validate(content["tokenizer"])
        columns = {name: ScoreColumn.model_validate(column) for name, column in content["columns"].items()}
        timings = content["timings"] and Timings.model_validate(content["timings"])
        old_shards = [
            (
                FILE_NAME.validate_python(shard["name"]),
                COUNT.validate_python(shard["bytes"]),
                str(shard["sha256"]),
                COUNT.validate_python(shard["rejects"]),
            )
            for shard in content["shards"]
        ]
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source / MANIFEST}: not a valid manifest ({first_line(error)}); restore the file") from error
    if fault := check_tokenizer(source, tokenizer):
        raise UserError(f"{fault}; {RESTORE}")
    copy_files(source / TOKENIZER, output / TOKENIZER)
    (output / DATA).mkdir(exist_ok=True)
    in_nats = [name for name, column in columns.items() if getattr(column.origin, "quantity", "") != "gradient"]
    counts = {name: ValueCounts() for name in columns}
    entries = []
    schema = shard_schema(tuple(columns), corpus.sequence_columns)
    for name, size, sha256, rejects in old_shards:
        table = read_old_shard(source / name, size, sha256, schema)
        for column in columns:
            values = flat_values(table[column]).astype(np.float32)
            if column in in_nats:
                values = round_nats(values)
            counts[column].add(values)
            index = table.schema.get_field_index(column)
            lists = list_column(values, list_lengths(table[column]))
            table = table.set_column(index, pa.field(column, SCORE_TYPE, nullable=False), lists.cast(SCORE_TYPE))
        entry = write_shard(output / DATA / name, table)
        ShardReader(source, schema, tokenizer.vocab_size).file(entry).check(table)
        entries.append(replace(entry, rejects=rejects))
        report(entries[-1])
    if (source / REJECTS).is_file():
        if (source / REJECTS).stat().st_size > MOST_REJECTS_BYTES:
            raise UserError(f"{source / REJECTS}: larger than {MOST_REJECTS_BYTES:,} bytes; {RESTORE}")
        with atomic_write(output / REJECTS) as file:
            file.write((source / REJECTS).read_bytes())
    scored = {
        name: ScoreColumn(origin=column.origin, statistics=counts[name].statistics())
        for name, column in columns.items()
    }
    try:
        manifest = Manifest(
            corpus=corpus,
            tokenizer=tokenizer,
            columns=scored,
            shards=entries,
            derived_from=content["digest"],
            timings=timings,
            request=request,
        )
        assert manifest.digest  # not for values that are nested too deep
    except ValueError as error:
        raise UserError(f"{source / MANIFEST}: not a valid manifest ({first_line(error)}); restore the file") from error
    return finish_shard_set(output, manifest, counts)


def read_old_shard(path: Location, size: int, sha256: str, schema: pa.Schema) -> pa.Table:
    """Read a shard of format 3 whose size and digest are right. `schema` is that of the new file.

    Raises:
        UserError: it is missing, another file, or has other columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: shard is missing; {RESTORE}")
    if path.stat().st_size != size:
        raise UserError(f"{path}: content differs from the manifest; {RESTORE}")
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path}: content differs from the manifest; {RESTORE}")
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:  # Arrow also raises errors of the system for damaged files
        raise UserError(f"{path}: shard is damaged ({first_line(error)}); {RESTORE}") from error
    old = [field.with_type(OLD_SCORE_TYPE) if field.type == SCORE_TYPE else field for field in schema]
    if not table.schema.equals(pa.schema(old)):
        raise UserError(f"{path}: columns differ from the manifest; {RESTORE}")
    return table
