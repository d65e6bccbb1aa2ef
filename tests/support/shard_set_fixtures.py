"""Shard sets from given token ids and scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import (
    Condition,
    Contrast,
    CorpusInfo,
    Manifest,
    ScoreColumn,
    TokenizerInfo,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import list_column, shard_name, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER, copy_files
from weighted_mtp.schemas.storage.locations import Location


@pytest.fixture
def make_shard_set(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., ShardSet]:
    """Write a finished shard set from given token ids and scores, with `rows_per_shard` sequences per shard.

    Columns named `loss_...` originate from a model, all others from the contrast `loss_base - loss_reference`.
    """

    from transformers import AutoTokenizer

    def make(
        sequences: list[list[int]],
        columns: dict[str, list[list[float]]] | None = None,
        name: str = "set",
        rows_per_shard: int = 2,
        parent: Location = tmp_path,
        sequence_columns: dict[str, list[float] | list[str]] | None = None,
        document_starts: list[int] | None = None,
        document_ids: list[str] | None = None,
        tokenizer: Path = tokenizer_dir,
        largest_id: int | None = None,
    ) -> ShardSet:
        path = parent / name
        copy_files(tokenizer, path / TOKENIZER)
        (path / DATA).mkdir(exist_ok=True)
        scores = {
            column: [np.array(row, np.float16).astype(np.float32) for row in rows]
            for column, rows in (columns or {}).items()
        }
        counts = {column: ValueCounts() for column in scores}
        carried = {column: pa.array(values) for column, values in (sequence_columns or {}).items()}
        first_tokens = document_starts or [0] * len(sequences)
        documents = document_ids or [f"doc-{row}" for row in range(len(sequences))]
        starts = range(0, len(sequences), rows_per_shard)
        shards = []
        for index, start in enumerate(starts):
            rows = range(start, min(start + rows_per_shard, len(sequences)))
            lengths = np.array([len(sequences[row]) for row in rows])
            arrays = {
                "document_id": pa.array([documents[row] for row in rows]),
                "start": pa.array([first_tokens[row] for row in rows], pa.int64()),
                "input_ids": list_column(np.concatenate([np.array(sequences[r], np.int32) for r in rows]), lengths),
            }
            arrays |= {column: values.take(pa.array(rows)) for column, values in carried.items()}
            for column, values in scores.items():
                flat = np.concatenate([values[row] for row in rows])
                counts[column].add(flat)
                arrays[column] = list_column(flat, lengths)
            shards.append(write_shard(path / DATA / shard_name(index, len(starts)), pa.table(arrays)))
        condition = Condition(model="m", fingerprint="f", dtype="float32", engine="transformers", engine_version="5")
        contrast = Contrast(minuend="loss_base", subtrahend="loss_reference")
        manifest = Manifest(
            corpus=CorpusInfo(
                input="corpus.jsonl",
                text_field="text",
                max_length=max(map(len, sequences)),
                adds_bos=False,
                adds_eos=False,
                documents=len(sequences),
                rejects=0,
                sequence_columns={
                    column: "label" if pa.types.is_string(values.type) else "number"
                    for column, values in carried.items()
                },
                largest_id=largest_id,
            ),
            tokenizer=TokenizerInfo(
                name="bytes",
                fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(tokenizer)),
                files_sha256=directory_digest(path / TOKENIZER),
                vocab_size=258,
                bos_token_id=256,
                eos_token_id=257,
            ),
            columns={
                column: ScoreColumn(
                    origin=condition if column.startswith("loss_") else contrast, statistics=counts[column].statistics()
                )
                for column in scores
            },
            shards=shards,
            request={"command": "test"},
        )
        return finish_shard_set(path, manifest, counts)

    return make
