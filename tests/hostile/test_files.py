"""Corpora and score files that once crashed the interpreter or ended in something else than one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weighted_mtp.schemas.configs import ImportConfig, PrepareConfig, ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.scoring.imports.run import add_columns, import_scores
from weighted_mtp.scoring.job.run import score


def prepared(directory: Path, name: str, **settings: object) -> ShardSet:
    return prepare(
        PrepareConfig(
            input=str(directory / "files" / name),
            tokenizer=str(directory / "good" / "tokenizer"),
            output=directory / "new",
            workers=1,
            **settings,
        )
    )


def imported(directory: Path, name: str) -> ShardSet:
    return import_scores(
        ImportConfig(input=directory / "good", scores=(str(directory / "files" / name),), output=directory / "new")
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: b"null" + lines,
        lambda lines: lines + b"null\n",
        lambda lines: lines.replace(b"}\n", b"} null\n", 1),
        lambda lines: lines.replace(b"}\n", b"}null", 1),
        lambda lines: lines.replace(b"}\n", b"}null", 1) + b'{"a": [}\n',
        lambda lines: b"1\n" + lines,
    ],
    ids=["before", "last", "after", "between", "between_and_damage", "number"],
)
def test_a_value_outside_of_the_objects_of_score_rows_is_refused(edit, directory: Path) -> None:
    """Arrow's parser of JSON crashes on null."""
    file = directory / "files" / "scores.jsonl"
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(UserError, match="not one object in each line"):
        imported(directory, "scores.jsonl")


@pytest.mark.parametrize("name", ["corpus.arrow", "corpus-stream.arrow"])
def test_offsets_beyond_an_arrow_file_are_refused(name: str, directory: Path) -> None:
    file = directory / "files" / name
    content = file.read_bytes()
    texts = ["first text", "second\none", "third λ"]
    offsets = np.cumsum([0, *(len(text.encode()) for text in texts)]).astype(np.int32).tobytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:4] + np.int32(1 << 30).tobytes() + offsets[8:]))
    with pytest.raises(UserError, match="cannot be read as arrow"):
        prepared(directory, name)


@pytest.mark.parametrize("name", ["corpus.arrow", "corpus-stream.arrow"])
def test_texts_of_arrow_files_that_are_no_unicode_are_rejected_alone(name: str, directory: Path) -> None:
    file = directory / "files" / name
    file.write_bytes(file.read_bytes().replace(b"third", b"th\xffrd"))
    assert prepared(directory, name).manifest.corpus.documents == 2


def test_names_of_fields_cannot_break_the_message(directory: Path) -> None:
    table = pa.table({"a\nb\x1b": ["x"], "c" * 1000: ["x"]})
    pq.write_table(table, directory / "files" / "names.parquet")
    with pytest.raises(UserError) as caught:
        prepared(directory, "names.parquet")
    assert r"the fields are a\nb\x1b, ccc" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("field", ["id_field", "label_fields"])
def test_documents_with_long_ids_or_labels_are_rejected(field: str, directory: Path) -> None:
    rows = [{"text": "text", "name": "λ" * length} for length in (1 << 15, (1 << 15) + 1)]
    (directory / "files" / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepared(directory, "long.jsonl", **{field: "name" if field == "id_field" else ("name",)})
    assert (made.manifest.corpus.documents, made.manifest.corpus.rejects) == (1, 1)
    assert "field 'name' is larger than 65,536 bytes" in (directory / "new" / REJECTS).read_text()
    assert len(list(made.sequences())) == 1


def test_long_labels_are_not_imported(directory: Path) -> None:
    rows = [{"document_id": f"doc-{number}", "kind": "y" * (65_532 + number)} for number in range(5)]
    add_columns(directory / "good", directory / "new", rows)
    rows[4]["kind"] += "y"
    with pytest.raises(UserError, match=r"rows\[4\]: 'kind' is longer than 65,536 bytes; shorten it"):
        add_columns(directory / "good", directory / "other", rows)


DIFFER = "columns '{}' and '{}' differ only by case, and DuckDB could not read them"


@pytest.mark.parametrize(("held", "name"), [("loss_a", "Loss_A"), ("reward", "REWARD"), ("start", "Start")])
def test_columns_that_differ_only_by_case_are_not_imported(held: str, name: str, directory: Path) -> None:
    rows = [{"document_id": f"doc-{number}", name: 1.0} for number in range(5)]
    with pytest.raises(UserError, match=DIFFER.format(held, name)):
        add_columns(directory / "good", directory / "new", rows)


def test_columns_that_differ_only_by_case_are_not_prepared(directory: Path) -> None:
    with pytest.raises(UserError, match=DIFFER.format("a", "A")):
        prepared(directory, "corpus.jsonl", number_fields=("a",), label_fields=("A",))
    with pytest.raises(UserError, match=DIFFER.format("input_ids", "Input_Ids")):
        prepared(directory, "corpus.jsonl", number_fields=("Input_Ids",))


@pytest.mark.parametrize(
    ("name", "suffix", "reason"),
    [
        ("Gain", "", DIFFER.format("gain", "Gain")),
        ("input", "_ids", "--suffix: 'input_ids' is reserved by wmtp; choose another one"),
        ("more", "x" * 300, "--suffix: 'morexxxxxxxxxxxxxxxx...' is too long for a column name"),
    ],
    ids=["case", "reserved", "long"],
)
def test_impossible_names_of_new_scores_are_refused_before_scoring(
    name: str, suffix: str, reason: str, directory: Path
) -> None:
    contrasts = {name: "loss_a - loss_b"}
    with pytest.raises(UserError) as caught:
        score(ScoreConfig(input=directory / "good", output=directory / "new", contrasts=contrasts, suffix=suffix))
    assert reason in str(caught.value)


def test_more_than_a_thousand_columns_are_not_imported(directory: Path) -> None:
    rows = [{"document_id": f"doc-{number}", **{f"x{column}": 1.0 for column in range(1000)}} for number in range(5)]
    with pytest.raises(UserError, match="there would be more than 1,000 columns"):
        add_columns(directory / "good", directory / "new", rows)


def test_sequences_longer_than_the_format_allows_are_refused_before_tokenising() -> None:
    with pytest.raises(UserError, match="less than or equal to 16777216"):
        PrepareConfig(input="a", tokenizer="b", output="c", max_length=(1 << 24) + 1)
