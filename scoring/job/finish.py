"""The end of a scoring run: manifest, statistics and rejects of a set with all its shards."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.manifest import Manifest, Origin, ScoreColumn, SequenceKind
from weighted_mtp.schemas.shard_set.shard_set import MOST_REJECTS_BYTES, REJECTS, ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import NO_COLUMNS
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.job.units import RejectedSequence, gather


def finish(
    output: Location,
    source: ShardSet,
    origins: Mapping[str, Origin],
    request: str,
    sequence_columns: Mapping[str, SequenceKind] = NO_COLUMNS,
) -> ShardSet:
    """Combine the records of all units, and write rejects, statistics and manifest.

    Args:
        output: directory with the scored shards and their records.
        source: the set that was scored.
        origins: description of each new score column.
        request: JSON that identifies the run.
        sequence_columns: kinds of the new sequence columns.

    Raises:
        UserError: a shard or record was damaged.
    """
    shards = source.manifest.shards
    found = gather(output, [shard.name for shard in shards])
    rejects = earlier_rejects(source) + found.rejects
    if rejects:
        write_text(output / REJECTS, "".join(reject.model_dump_json() + "\n" for reject in rejects))
    sequences = Counter(shard for shard, _ in {(reject.shard, reject.row) for reject in rejects})
    entries = [replace(entry, rejects=sequences[entry.name]) for entry in found.entries]
    counts = source.value_counts() | {name: found.counts[name] for name in origins}
    new = {name: ScoreColumn(origin=origin, statistics=counts[name].statistics()) for name, origin in origins.items()}
    corpus = source.manifest.corpus
    sequence_columns = {**corpus.sequence_columns, **sequence_columns}
    manifest = Manifest(
        corpus=corpus.model_copy(update={"sequence_columns": sequence_columns}),
        tokenizer=source.manifest.tokenizer,
        columns=source.manifest.columns | new,
        shards=entries,
        derived_from=source.manifest.digest,
        timings=found.timings,
        request=json.loads(request),
    )
    return finish_shard_set(output, manifest, counts)


def earlier_rejects(source: ShardSet) -> list[RejectedSequence]:
    """The input's own `rejects.jsonl`: sequences without scores in its columns.

    Raises:
        UserError: it is missing or damaged.
    """
    file = source.path / REJECTS
    if not any(shard.rejects for shard in source.manifest.shards):
        return []
    try:
        if file.stat().st_size > MOST_REJECTS_BYTES:
            raise ValueError(f"larger than {MOST_REJECTS_BYTES:,} bytes")
        return [RejectedSequence.model_validate_json(line) for line in file.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: missing or damaged ({first_line(error)}); restore it") from error
