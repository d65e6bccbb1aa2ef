"""From documents to sequences: token ids of each document, cut into spans of at most `max_length` tokens.

Every tokenizer process imports this module. It does not import `AutoTokenizer`, which would load torch.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.configs.prepare import MAX_DOCUMENT_BYTES, SpecialTokens
from weighted_mtp.schemas.shard_set.shards import SEQUENCE_TYPES, list_column, shard_schema
from weighted_mtp.scoring.corpus.documents import Document, Fields, RejectedDocument, RowBatch, parse_batch
from weighted_mtp.scoring.corpus.special_tokens import special_pattern


class EncodedBatch(NamedTuple):
    """Sequences of a batch in document order, and the rejected rows in row order.

    Attributes:
        table: the columns of an unscored shard, one row per sequence.
        documents: documents with at least one sequence.
        tokens: token ids of these documents.
        text_bytes: size of their texts as UTF-8.
        largest_id: largest of the ids; 0 if there are none.
        rejects: rows without a document.
        double_bos: documents whose first two ids are BOS.
        with_special_tokens: documents whose text contains the string of a special token.
    """

    table: pa.Table
    documents: int
    tokens: int
    text_bytes: int
    largest_id: int
    rejects: list[RejectedDocument]
    double_bos: int
    with_special_tokens: int


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
        kept = text_bytes = double_bos = with_special_tokens = 0
        for document, text_ids in zip(documents, encoded, strict=True):
            if not text_ids:
                rejects.append(RejectedDocument(batch.source, document.row, "text without tokens"))
                continue
            of_document = self.prefix + text_ids + self.suffix
            for start in range(0, len(of_document), self.max_length):
                owners.append(document)
                starts.append(start)
                lengths.append(min(self.max_length, len(of_document) - start))
            flat += of_document
            kept += 1
            text_bytes += len(document.text.encode())
            starts_twice = of_document[0] == self.tokenizer.bos_token_id and of_document[:1] == of_document[1:2]
            double_bos += starts_twice
            with_special_tokens += self.special_pattern is not None and bool(self.special_pattern.search(document.text))
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
        return EncodedBatch(
            table,
            documents=kept,
            tokens=len(flat),
            text_bytes=text_bytes,
            largest_id=int(ids.max(initial=0)),
            rejects=rejects,
            double_bos=double_bos,
            with_special_tokens=with_special_tokens,
        )

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS around it."""
        if not texts:
            return []
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
