"""Settings of `wmtp prepare`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from weighted_mtp.schemas.configs.common import Config, Positive, RowLength, check_identifier, is_reserved
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting

MAX_DOCUMENT_BYTES = 1 << 23
"""Default bound of a document. Tokenising one takes up to 230 bytes of memory per byte of text."""
SpecialTokens = Literal["parse", "text"]
BYTE_TOKENIZER = "bytes"
"""Name of the tokenizer of bytes."""


class PrepareConfig(Config):
    """Turn a corpus into token shards."""

    input: NameSetting = Field(description="file, directory, glob, or Hugging Face dataset id")
    tokenizer: NameSetting = Field(
        description="Hugging Face tokenizer: directory or id; or 'bytes', where each byte of UTF-8 is a token"
    )
    output: LocationSetting = Field(description="directory of the new shard set")
    trust_remote_code: bool = Field(False, description="run Python code in the directory of --tokenizer")
    format: Literal["auto", "json", "parquet", "text", "csv", "arrow"] = Field(
        "auto", description="format of the files; auto infers it from the file name"
    )
    text_field: str = Field("text", description="field with the text")
    id_field: str | None = Field(None, description="field with the document id; default <file>#<row>")
    number_fields: tuple[str, ...] = Field(
        (), description="numeric fields, such as '[reward]'; stored as columns with one value per sequence"
    )
    label_fields: tuple[str, ...] = Field((), description="string or integer fields, stored the same way")
    sample_by: Literal["document", "paragraph", "line"] = Field(
        "document", description="unit of a text file that forms a document"
    )
    subset: str | None = Field(None, description="configuration of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset")
    max_length: RowLength = Field(4096, description="maximum sequence length, in tokens")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="put BOS before each document; auto follows the tokenizer's default"
    )
    append_eos: bool = Field(False, description="put EOS after each document")
    special_tokens: SpecialTokens = Field(
        "parse",
        description="what to make of strings such as '</s>' in a document: 'parse' gives the control token, 'text' the "
        "tokens of ordinary text",
    )
    max_document_bytes: Annotated[int, Field(gt=0, le=1 << 30)] = Field(
        MAX_DOCUMENT_BYTES, description="largest document, in bytes of UTF-8; larger ones are rejected"
    )
    shard_tokens: Positive = Field(1 << 22, description="tokens per shard; a shard ends once it holds this many")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="tokenizer processes; 0 means one per core")

    @field_validator("number_fields", "label_fields")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_identifier(name)
            written = re.match("loss_|entropy_|gradient_|excess_loss|long_short", name)
            if written or is_reserved(name):
                raise ValueError(f"'{name}' is reserved by wmtp; rename the field in the corpus")
        return names

    @model_validator(mode="after")
    def _check_columns(self) -> "PrepareConfig":
        names = [*self.number_fields, *self.label_fields]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--number_fields and --label_fields name '{twice[0]}' twice; name each field once")
        return self
