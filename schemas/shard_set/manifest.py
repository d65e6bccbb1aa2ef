"""`manifest.json`: the content of a shard set, and the origin and statistics of its columns."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import canonical_json
from weighted_mtp.schemas.shard_set.value_counts import ColumnStatistics
from weighted_mtp.schemas.storage.files import MANIFEST, PROGRESS, atomic_write
from weighted_mtp.schemas.storage.locations import Location

FORMAT_VERSION: Final = 4
OLD_FORMAT_VERSION = 3
"""The version that `wmtp upgrade` converts."""
Quantity = Literal["loss", "entropy", "gradient"]
SequenceKind = Literal["number", "label"]
TOKEN_COLUMNS = ("document_id", "start", "input_ids")
"""Columns of every shard, which come first."""
ROW_GROUP_TOKENS = 1 << 18
"""A row group ends as soon as it holds this many tokens."""
MAX_LENGTH = 1 << 24
"""Most tokens of a sequence."""
GROUP_BYTES = 64
"""Fewest bytes of a row group in the footer of its file."""
MOST_COLUMNS = 1000
"""Most score and sequence columns of a set. The exact counts of a score column take half a megabyte of memory."""
MOST_TOKEN_IDS = 1 << 22
"""Largest vocabulary. Reports have a number for each id."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)]
"""A name without separators: shards lie directly in `data/`."""
ColumnName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=255)]
PROMPT_SHOWN = 40
"""Most characters of a prompt shown in the description of a condition."""


class ManifestRecord(BaseModel):
    """Base of all records in the manifest: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ShortContext(ManifestRecord):
    """A short context: windows of `size` tokens every `stride` tokens (see `scoring.conditions.short_context`)."""

    size: Annotated[int, Field(gt=0, le=MAX_LENGTH)]
    stride: Annotated[int, Field(gt=0, le=MAX_LENGTH)]


class Condition(ManifestRecord):
    """A model and its context. A condition gives every token one loss and, optionally, other quantities.

    Attributes:
        model: name given by the user.
        revision: commit of a model from the hub.
        fingerprint: identity of weights and config, independent of their location.
        device: device of the engine.
        dtype: compute dtype of the model.
        engine: name of the engine.
        engine_version: version of its package.
        engine_method: how vLLM returned the scores.
        engine_args: vLLM arguments that differ from the defaults.
        tensor_parallel_size: GPUs, or processes on a CPU, that shared the model.
        window: short context; None for the full context.
        prompt: text before every sequence, or None.
        quantity: quantity in the column.
    """

    model: str
    revision: str | None = None
    fingerprint: str
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"]
    engine: str
    engine_version: str
    engine_method: str | None = None
    engine_args: dict[str, Any] = {}
    tensor_parallel_size: Count = 1
    window: ShortContext | None = None
    prompt: str | None = None
    quantity: Quantity = "loss"

    def describe(self) -> str:
        """The condition in one line."""
        model = self.model if self.revision is None else f"{self.model} ({self.revision[:12]})"
        window = f"windows of {self.window.size} every {self.window.stride}" if self.window else "full context"
        engine = " ".join(filter(None, [self.engine, self.engine_version, self.engine_method]))
        arguments = [f"{name} {value}" for name, value in self.engine_args.items()]
        quantity = [self.quantity] if self.quantity != "loss" else []
        prompt = [f"after {quote(self.prompt)}"] if self.prompt else []
        return ", ".join([*quantity, model, *prompt, window, self.dtype, engine, *arguments])


def quote(text: str) -> str:
    """A text, truncated and quoted, on one line."""
    shown = text if len(text) <= PROMPT_SHOWN else text[:PROMPT_SHOWN] + "..."
    return json.dumps(shown, ensure_ascii=False)


class Contrast(ManifestRecord):
    """The difference `minuend - subtrahend` of two columns of the same tokens."""

    minuend: str
    subtrahend: str

    def describe(self) -> str:
        """The contrast in one line."""
        return f"{self.minuend} - {self.subtrahend}"


class ImportedFile(ManifestRecord):
    """A file of imported scores: its name without directories, and its SHA-256."""

    name: str
    sha256: Sha256


class Imported(ManifestRecord):
    """A column of files that another tool wrote, in the order in which they were read."""

    files: Annotated[tuple[ImportedFile, ...], Field(min_length=1)]
    column: ColumnName

    def describe(self) -> str:
        """The origin in one line. Control characters in the name of a file are escaped."""
        first, more = self.files[0], len(self.files) - 1
        others = f" and {more:,} other file{'s' * (more > 1)}" if more else ""
        return f"imported, {self.column} of {first.name!r} (SHA-256 {first.sha256[:12]}){others}"


class ImportedValues(ManifestRecord):
    """A column of values that a program gave in memory: SHA-256 of the column as little-endian float16."""

    values_sha256: Sha256

    def describe(self) -> str:
        """The origin in one line."""
        return f"imported from memory (SHA-256 of the values {self.values_sha256[:12]})"


Origin = Condition | Contrast | Imported | ImportedValues
"""Where the values of a score column come from."""


def same_origin(one: Origin, other: Origin) -> bool:
    """Whether two origins give the same numbers. Ignores the name and revision of a model, and names of files."""
    if isinstance(one, Condition) and isinstance(other, Condition):
        return one.model_copy(update={"model": other.model, "revision": other.revision}) == other
    if isinstance(one, Imported) and isinstance(other, Imported):
        digests = (sorted(file.sha256 for file in imported.files) for imported in (one, other))
        return one.column == other.column and next(digests) == next(digests)
    return one == other


class ScoreColumn(ManifestRecord):
    """A score column: its origin and the statistics of its values."""

    origin: Origin
    statistics: ColumnStatistics


class TokenizerInfo(ManifestRecord):
    """The tokenizer of a corpus.

    `files_sha256` is the digest of its files in `tokenizer/` inside the shard set. All its token ids are below
    `vocab_size`; not every number below it has to be one.
    """

    name: str
    fingerprint: str
    files_sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=MOST_TOKEN_IDS)]
    bos_token_id: Count | None
    eos_token_id: Count | None


class CorpusInfo(ManifestRecord):
    """The corpus and its tokenisation settings.

    `sequence_columns` maps document fields stored as columns to their kinds: `number` is float32, `label` is string.
    `special_tokens` says what strings of special tokens in documents became: control tokens (`parse`, which is not
    written), or ordinary text (`text`).
    `largest_id` is the largest token id that occurs; None in sets of versions that did not record it.
    """

    input: str
    text_field: str
    max_length: Annotated[int, Field(gt=0, le=MAX_LENGTH)]
    adds_bos: bool
    adds_eos: bool
    documents: Count
    rejects: Count
    sequence_columns: dict[ColumnName, SequenceKind] = {}
    # Both are left out at their defaults, to leave the digests of older sets as they are.
    special_tokens: Literal["parse", "text"] = Field("parse", exclude_if=lambda value: value == "parse")
    largest_id: Annotated[Count | None, Field(exclude_if=lambda value: value is None)] = None

    def describe_columns(self) -> str:
        """The sequence columns and their kinds in one line."""
        return ", ".join(f"{name} ({kind})" for name, kind in self.sequence_columns.items()) or "none"


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One Parquet file of the set. A slotted dataclass because a set may have 100,000 of them.

    `longest` is the length of its longest sequence in tokens; `rejects` counts sequences that could not be scored.
    The footer contains a digest of the bytes before it, so `footer_sha256` identifies the file without reading it all.
    """

    name: FileName
    rows: Count
    tokens: Count
    longest: Annotated[int, Field(ge=0, le=MAX_LENGTH)]
    row_groups: Count
    bytes: Count
    sha256: Sha256
    footer_sha256: Sha256
    rejects: Count = 0

    @property
    def is_possible(self) -> bool:
        """Whether a file of `bytes` bytes can hold rows, tokens and row groups in these numbers."""
        return (
            self.row_groups * GROUP_BYTES <= self.bytes
            and self.row_groups <= self.rows <= self.tokens <= self.rows * self.longest
            and self.longest <= self.tokens <= self.row_groups * (ROW_GROUP_TOKENS + self.longest)
            and self.rejects <= self.rows
        )


SHARD_ENTRY = TypeAdapter(ShardEntry)
SHARD_ENTRIES = TypeAdapter(list[ShardEntry])
MOST_MANIFEST_BYTES = 1 << 28
"""Largest manifest that is read; a shard takes about 400 bytes."""
SHARDS_AT_ONCE = 1000
"""Shards converted to JSON at once; converting all of them would take several times the memory of the manifest."""


def find_clash(names: Iterable[str]) -> str | None:
    """Why a set cannot be made with columns of these names besides `TOKEN_COLUMNS`; None if it can."""
    known = {name.lower(): name for name in TOKEN_COLUMNS}
    for name in names:
        if (other := known.setdefault(name.lower(), name)) != name:
            return f"columns '{other}' and '{name}' differ only by case, and DuckDB could not read them"
    if len(known) > len(TOKEN_COLUMNS) + MOST_COLUMNS:
        return f"there would be more than {MOST_COLUMNS:,} columns"
    return None


class Timings(ManifestRecord):
    """Duration of scoring: seconds per shard, in order, for reading, scoring and writing."""

    read_seconds: list[float] = []
    score_seconds: list[float] = []
    write_seconds: list[float] = []


class Manifest(ManifestRecord):
    """Description of a shard set.

    `columns` is empty for an unscored corpus. `request` holds the command's settings and the digests of its inputs, to
    recognise a repeated command. `derived_from` is the digest of the set that was scored.
    """

    format_version: Literal[4] = FORMAT_VERSION
    created_by: str = f"weighted-mtp {version('weighted-mtp')}"
    corpus: CorpusInfo
    tokenizer: TokenizerInfo
    columns: dict[ColumnName, ScoreColumn] = {}
    shards: list[ShardEntry]
    statistics_sha256: Sha256 | None = None
    derived_from: str | None = None
    timings: Timings | None = None
    request: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        names = {shard.name for shard in self.shards}
        if len(names) < len(self.shards):
            raise ValueError("a shard is listed twice")
        for shard in self.shards:
            if not shard.is_possible or shard.longest > self.corpus.max_length:
                raise ValueError(f"the numbers of {shard.name} are impossible")
        columns = [*TOKEN_COLUMNS, *self.corpus.sequence_columns, *self.columns]
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have the same name")
        if len(columns) > len(TOKEN_COLUMNS) + MOST_COLUMNS:
            raise ValueError(f"more than {MOST_COLUMNS:,} columns")
        if self.corpus.documents > self.rows:
            raise ValueError("more documents than sequences")
        for name, column in self.columns.items():
            if column.statistics.count + column.statistics.missing != self.tokens:
                raise ValueError(f"the statistics of '{name}' do not count every token")
        ids = (self.corpus.largest_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        if any(token is not None and token >= self.tokenizer.vocab_size for token in ids):
            raise ValueError("largest_id, bos_token_id or eos_token_id is outside the vocabulary")
        return self

    @property
    def digest(self) -> str:
        """Identity of the shard set: SHA-256 of the canonical JSON of the manifest without timings."""
        sha256 = hashlib.sha256()
        for piece in canonical_pieces(self):
            sha256.update(piece)
        return sha256.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def rows(self) -> int:
        """Sequences in all shards."""
        return sum(shard.rows for shard in self.shards)

    def row_groups(self) -> Iterator[tuple[int, int]]:
        """The number of a shard and of a row group in it, for all row groups in order."""
        return ((number, group) for number, shard in enumerate(self.shards) for group in range(shard.row_groups))

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence."""
        return max((shard.longest for shard in self.shards), default=0)


def canonical_pieces(manifest: Manifest) -> Iterator[bytes]:
    """The canonical JSON of a manifest without timings, in pieces."""
    content = manifest.model_dump(mode="json", exclude={"timings", "shards"})
    before = canonical_json({name: value for name, value in content.items() if name < "shards"})
    after = canonical_json({name: value for name, value in content.items() if name > "shards"})
    yield before.removesuffix(b"}") + b',"shards":['
    for first in range(0, len(manifest.shards), SHARDS_AT_ONCE):
        some = SHARD_ENTRIES.dump_python(manifest.shards[first : first + SHARDS_AT_ONCE])
        yield b"," * bool(first) + canonical_json(some)[1:-1]
    yield b"]," + after.removeprefix(b"{")


def write_manifest(directory: Location, manifest: Manifest) -> None:
    """Write `manifest.json` with its digest, atomically, one line per shard.

    The manifest makes a directory a shard set.
    """
    content = manifest.model_dump(mode="json", exclude={"shards", "timings"}) | {"digest": manifest.digest}
    timings = manifest.timings.model_dump_json() if manifest.timings else "null"
    with atomic_write(directory / MANIFEST) as file:
        file.write(json.dumps(content, indent=2).removesuffix("\n}").encode())
        file.write(f',\n  "timings": {timings},\n  "shards": ['.encode())
        for index, shard in enumerate(manifest.shards):
            file.write(b",\n    " if index else b"\n    ")
            file.write(SHARD_ENTRY.dump_json(shard))
        file.write(b"\n  ]\n}\n")


def read_manifest(directory: Location) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        UserError: the file is missing, not JSON, of another format version, or was edited.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such shard set; check the path or write it with 'wmtp prepare'")
    if not path.is_file():
        if not (directory / PROGRESS).exists():
            raise UserError(f"{directory}: not a shard set ({MANIFEST} is missing); check the path")
        raise UserError(
            f"{directory}: not a finished shard set ({MANIFEST} is missing); "
            "rerun the 'wmtp prepare' or 'wmtp score' command that writes it"
        )
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise ValueError(f"larger than {MOST_MANIFEST_BYTES:,} bytes")
        content: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        digest = content.pop("digest", None)
        found = content.get("format_version")
        if found == OLD_FORMAT_VERSION:
            raise UserError(
                f"{path}: has format version {found}; convert it with 'wmtp upgrade {directory} --output NEW'"
            )
        if found != FORMAT_VERSION:
            raise UserError(f"{path}: format version {found} is not {FORMAT_VERSION}; install the wmtp that wrote it")
        manifest = Manifest.model_validate(content)
        if manifest.columns and manifest.statistics_sha256 is None:
            raise ValueError("it has columns but no statistics")
        same = digest == manifest.digest
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: not a valid manifest ({reason}); restore the file or rewrite the set") from error
    if not same:
        raise UserError(f"{path}: was changed after it was written; restore the original or rewrite the set")
    return manifest
