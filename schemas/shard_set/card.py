"""The `README.md` of a shard set: a data set card for people and for the Hugging Face hub."""

from pathlib import PurePosixPath

from weighted_mtp.schemas.shard_set.manifest import TOKEN_COLUMNS, Condition, Manifest, Origin
from weighted_mtp.schemas.storage.files import DATA

CARD = """\
---
configs:
- config_name: default
  data_files: {data}/*.parquet
---

# {title}

{tokens:,} tokens of {documents:,} documents in {rows:,} sequences, from {corpus}, with the tokenizer {tokenizer}.
Written by {writer}.

| column | type | |
|---|---|---|
{columns}

A row is a sequence: consecutive tokens of one document. Entry i of a list belongs to token i of `input_ids`. A score
that could not be computed is NaN, as is the loss of a first token without context. Scores are float32 columns of
float16 values. `tokenizer/` has the tokenizer, and `manifest.json` describes each column exactly.

## Reading it

In the directory of this file:

```python
datasets.load_dataset(".", split="train")
polars.scan_parquet("{data}/*.parquet")
pandas.read_parquet("{data}")
duckdb.sql("FROM '{data}/*.parquet'")
```

`wmtp inspect .` shows it, `wmtp verify .` checks it, and `wmtp train --input .` trains on it.
"""
TOKEN_CELLS = (
    ("string", "document"),
    ("int64", "index of the first token in its document"),
    ("list of int32", "token ids"),
)
"""Type and meaning of `TOKEN_COLUMNS`."""


def describe_set(manifest: Manifest) -> str:
    """The content of `README.md`. It has names of the corpus and of models, but not their directories."""
    rows = [(name, *cells) for name, cells in zip(TOKEN_COLUMNS, TOKEN_CELLS, strict=True)]
    for name, kind in manifest.corpus.sequence_columns.items():
        rows.append((name, "float32" if kind == "number" else "string", f"{kind} of the document"))
    for name, column in manifest.columns.items():
        rows.append((name, "list of float32", code(describe_origin(column.origin))))
    return CARD.format(
        data=DATA,
        title="Scored tokens" if manifest.columns else "Tokens",
        tokens=manifest.tokens,
        documents=manifest.corpus.documents,
        rows=manifest.rows,
        corpus=code(last_part(manifest.corpus.input)),
        tokenizer=code(last_part(manifest.tokenizer.name)),
        writer=code(manifest.created_by),
        columns="\n".join(f"| `{name}` | {kind} | {text} |" for name, kind, text in rows),
    )


def describe_origin(origin: Origin) -> str:
    """The origin of a column in one line, without directories."""
    if isinstance(origin, Condition) and origin.revision is None:
        origin = origin.model_copy(update={"model": last_part(origin.model)})
    return origin.describe()


def last_part(name: str) -> str:
    """The last part of a path, an address or a Hugging Face id."""
    return PurePosixPath(name).name or name


def code(text: str) -> str:
    """Foreign text as code in a Markdown table: without characters that could end the code, the cell or the line."""
    return "`" + "".join(c if c.isprintable() and c not in "`|" else " " for c in text) + "`"
