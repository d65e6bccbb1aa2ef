"""From documents to sequences: token ids of each document, cut into spans of at most `max_length` tokens.

Every tokenizer process imports this module. It does not import `AutoTokenizer`, which would load torch.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.configs.prepare import MAX_DOCUMENT_BYTES, SpecialTokens
from weighted_mtp.schemas.errors import TokenizerError, tokenizer_errors
from weighted_mtp.schemas.shard_set.shards import SEQUENCE_TYPES, list_column, shard_schema
from weighted_mtp.schemas.text import printable, shortened
from weighted_mtp.scoring.corpus.documents import Document, Fields, RejectedDocument, RowBatch, parse_batch
from weighted_mtp.scoring.corpus.repeated_ids import id_hash
from weighted_mtp.scoring.corpus.special_tokens import special_pattern

ENCODED_DOCUMENT = np.dtype(
    [
        ("row", np.int64),
        ("id_hash", np.uint64),
        ("sequences", np.int64),
        ("tokens", np.int64),
        ("text_bytes", np.int64),
        ("double_bos", np.bool_),
        ("with_special_tokens", np.bool_),
    ]
)
"""A document: its row in the source, a hash of its id, its sequences, token ids and size of its text as UTF-8, whether
its first two ids are BOS, and whether its text contains the string of a special token."""


class EncodedBatch(NamedTuple):
    """Sequences of a batch in document order, and the rejected rows in row order.

    Attributes:
        source: name of the source.
        table: the columns of an unscored shard, one row per sequence.
        documents: documents with at least one sequence, `ENCODED_DOCUMENT` [documents].
        rejects: rows without a document.
    """

    source: str
    table: pa.Table
    documents: np.ndarray
    rejects: list[RejectedDocument]

    def without_repeated(self, repeated: np.ndarray) -> "EncodedBatch":
        """The batch without documents whose ids are repeated (bool [documents]), which are rejected."""
        sequences = self.documents["sequences"]
        firsts = (np.cumsum(sequences) - sequences)[repeated]
        ids = self.table["document_id"].take(pa.array(firsts)).to_pylist()
        rejects = [
            RejectedDocument(self.source, row, f"id of an earlier document: {printable(shortened(name))}")
            for row, name in zip(self.documents["row"][repeated].tolist(), ids, strict=True)
        ]
        return self._replace(
            table=self.table.filter(pa.array(np.repeat(~repeated, sequences))),
            documents=self.documents[~repeated],
            rejects=sorted([*self.rejects, *rejects], key=lambda reject: reject.row),
        )


@dataclass(frozen=True)
class BatchEncoder:
    """Turns batches of rows into sequences. Picklable; gives the same result in every process.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        prefix: the id of BOS, or empty.
        suffix: the id of EOS, or empty.
        max_length: maximum sequence length, in tokens.
        fields: fields of a record.
        special_tokens: whether strings of special tokens are parsed, or ordinary text.
        max_document_bytes: largest document, in bytes of UTF-8.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: list[int]
    suffix: list[int]
    max_length: int
    fields: Fields
    special_tokens: SpecialTokens = "parse"
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds strings of special tokens."""
        return special_pattern(self.tokenizer)

    def __call__(self, batch: RowBatch) -> EncodedBatch:
        """Check the rows, tokenise each document on its own and cut it into sequences.

        Only the first sequence of a document gets BOS, which counts towards `max_length` and `start`.
        """
        documents, rejects = parse_batch(batch, self.fields, self.max_document_bytes)
        encoded = self.token_ids([document.text for document in documents])
        owners: list[Document] = []  # owners, starts and lengths: one entry per sequence
        starts: list[int] = []
        lengths: list[int] = []
        flat: list[int] = []  # ids of all sequences, concatenated
        kept: list[tuple[int, int, int, int, int, bool, bool]] = []  # as ENCODED_DOCUMENT
        for document, text_ids in zip(documents, encoded, strict=True):
            if isinstance(text_ids, TokenizerError):
                reason = f"text on which the tokenizer fails: {printable(text_ids.reason)}"
                rejects.append(RejectedDocument(batch.source, document.row, reason))
                continue
            if not text_ids:
                rejects.append(RejectedDocument(batch.source, document.row, "text without tokens"))
                continue
            of_document = self.prefix + text_ids + self.suffix
            cuts = range(0, len(of_document), self.max_length)
            for start in cuts:
                owners.append(document)
                starts.append(start)
                lengths.append(min(self.max_length, len(of_document) - start))
            flat += of_document
            size = len(document.text.encode())
            starts_twice = of_document[0] == self.tokenizer.bos_token_id and of_document[:1] == of_document[1:2]
            has_special = self.special_pattern is not None and bool(self.special_pattern.search(document.text))
            kept.append(
                (document.row, id_hash(document.id), len(cuts), len(of_document), size, starts_twice, has_special)
            )
        ids = np.array(flat, dtype=np.int32)
        columns = [
            pa.array([owner.id for owner in owners], pa.string()),
            pa.array(starts, pa.int64()),
            list_column(ids, np.array(lengths, dtype=np.int64)),
        ]
        for index, kind in enumerate(self.fields.columns.values()):
            columns.append(pa.array([owner.values[index] for owner in owners], SEQUENCE_TYPES[kind]))
        schema = shard_schema((), self.fields.columns)
        table = pa.Table.from_arrays(columns, names=schema.names).cast(schema)
        rejects.sort(key=lambda reject: reject.row)
        return EncodedBatch(batch.source, table, np.array(kept, ENCODED_DOCUMENT), rejects)

    def token_ids(self, texts: list[str]) -> list[list[int] | TokenizerError]:
        """Token ids of each text without BOS and EOS around it, or the error of the tokenizer."""
        if not texts:
            return []
        try:
            with tokenizer_errors():
                return self._encode(texts)
        except TokenizerError as error:
            return [error] if len(texts) == 1 else [ids for text in texts for ids in self.token_ids([text])]

    def _encode(self, texts: list[str]) -> list[Any]:
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            split_special_tokens=self.special_tokens == "text",
        )
        return encoding["input_ids"]
