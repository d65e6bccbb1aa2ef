"""Sets of the same rows read as one, and everything that shows that the rows are not the same."""

from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Contrast, ImportedValues, ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import write_shard
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import DATA

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
FIRST = [[0, 1, 2], [0, 3], [0, 4, 5, 6]]
SECOND = [[0, -1, -2], [0, -3], [0, -4, -5, -6]]
MakeShardSet = Callable[..., ShardSet]


@pytest.fixture
def a(make_shard_set: MakeShardSet) -> ShardSet:
    return make_shard_set(SEQUENCES, {"loss_a": FIRST}, "a")


@pytest.fixture
def b(make_shard_set: MakeShardSet) -> ShardSet:
    return make_shard_set(SEQUENCES, {"loss_b": SECOND}, "b")


def with_manifest(shards: ShardSet, **changes: object) -> ShardSet:
    return replace(shards, manifest=shards.manifest.model_copy(update=changes))


def with_shards(shards: ShardSet, entries: list[ShardEntry]) -> ShardSet:
    return replace(shards, manifest=shards.manifest.model_copy(update={"shards": entries}))


def with_origin(shards: ShardSet, name: str, **changes: object) -> ShardSet:
    column = shards.manifest.columns[name]
    column = column.model_copy(update={"origin": column.origin.model_copy(update=changes)})
    return with_manifest(shards, columns={name: column})


def test_a_column_is_read_where_it_lies(a: ShardSet, b: ShardSet) -> None:
    zipped = ZippedSets.open([a.path, b.path])
    for column, expected in (("loss_a", [FIRST[2]]), ("loss_b", [SECOND[2]])):
        assert zipped.read(1, [column], 0).to_pydict() == {"input_ids": [SEQUENCES[2]], column: expected}
    assert zipped.read(0, [], 0).to_pydict() == {"input_ids": SEQUENCES[:2]}
    both = zipped.read(1, ["loss_b", "loss_a"], 0).to_pydict()
    assert both == {"input_ids": [SEQUENCES[2]], "loss_b": [SECOND[2]], "loss_a": [FIRST[2]]}
    assert (zipped.holder("loss_a").path, zipped.holder("loss_b").path) == (a.path, b.path)


def test_only_sets_that_are_needed_are_read(a: ShardSet, b: ShardSet) -> None:
    zipped = ZippedSets.open([a.path, b.path])
    file = b.path / DATA / b.manifest.shards[0].name
    file.write_bytes(b"")
    assert zipped.read(0, ["loss_a"], 0).num_rows == zipped.read(0, [], 0).num_rows == 2
    with pytest.raises(UserError, match=f"{file}: shard has 0 bytes instead of"):
        zipped.read(0, ["loss_b"], 0)


@pytest.mark.parametrize("sequences", [[[1, 2, 3], [4, 5], [6, 0, 8, 9]], [[1, 2], [3, 4, 5], [6, 7, 8, 9]]])
def test_other_ids_or_lengths_are_refused_by_file(
    sequences: list[list[int]], a: ShardSet, make_shard_set: MakeShardSet
) -> None:
    scores = [[0.0] * len(sequence) for sequence in sequences]
    other = make_shard_set(sequences, {"loss_b": scores}, "other")
    zipped = ZippedSets.open([a.path, other.path])
    shard = next(i for i in (0, 1) if sequences[2 * i : 2 * i + 2] != SEQUENCES[2 * i : 2 * i + 2])
    assert zipped.read(1 - shard, ["loss_b"], 0).num_rows
    first, second = (shards.file(shard).path for shards in (a, other))
    with pytest.raises(UserError, match=rf"{second}: column 'input_ids' differs from {first} \(row group 0"):
        zipped.read(shard, ["loss_b"], 0)


@pytest.mark.parametrize(
    ("sequences", "rows_per_shard", "difference"),
    [
        (SEQUENCES, 1, "3 shards instead of 2"),
        ([*SEQUENCES, [1]], 2, "shard-00001-of-00002.parquet has 2 rows instead of 1"),
        ([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 2, "shard-00000-of-00002.parquet has 4 tokens instead of 5"),
    ],
)
def test_other_shards_are_refused_when_the_sets_are_opened(
    sequences: list[list[int]], rows_per_shard: int, difference: str, a: ShardSet, make_shard_set: MakeShardSet
) -> None:
    other = make_shard_set(sequences, name="other", rows_per_shard=rows_per_shard)
    with pytest.raises(UserError) as caught:
        ZippedSets.open([a.path, other.path])
    assert f"{other.path}: not the same corpus as {a.path} ({difference}); give sets" in str(caught.value)


def test_other_row_groups_are_refused(
    a: ShardSet, make_shard_set: MakeShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 2)
    other = make_shard_set(SEQUENCES, name="other")
    with pytest.raises(UserError, match="has 2 row groups instead of 1"):
        ZippedSets.open([a.path, other.path])


def test_another_tokenizer_is_refused(a: ShardSet, b: ShardSet) -> None:
    tokenizer = b.manifest.tokenizer.model_copy(update={"name": "words", "fingerprint": "0"})
    with pytest.raises(UserError, match=f"{b.path}: .* as {a.path} .another tokenizer: words, not bytes"):
        ZippedSets((a, with_manifest(b, tokenizer=tokenizer)))


REWARDS, GROUPS = [0.0, 1.0, 0.5], ["x", "y", "x"]


def test_sequence_columns_are_read_where_they_lie(a: ShardSet, make_shard_set: MakeShardSet) -> None:
    columns = {"reward": REWARDS, "group": GROUPS}
    more = make_shard_set(SEQUENCES, name="more", sequence_columns=columns)
    last = make_shard_set(SEQUENCES, {"loss_b": SECOND}, "last", sequence_columns={"size": [3.0, 2.0, 4.0], **columns})
    zipped = ZippedSets((a, more, last))
    assert zipped.sequence_columns == {"reward": "number", "group": "label", "size": "number"}
    assert zipped.kind("group") == "label"
    assert zipped.holder("reward").path == more.path
    table = zipped.read_sequences(0, ["start", "group", "size", "reward"])
    assert table.to_pydict() == {"start": [0, 0], "group": ["x", "y"], "size": [3, 2], "reward": [0, 1]}
    assert zipped.read_sequences(1, ["input_ids", "reward"]).to_pydict() == {
        "input_ids": SEQUENCES[2:],
        "reward": [0.5],
    }
    assert zipped.read(1, ["loss_b", "group", "loss_a"], 0).to_pydict() == {
        "input_ids": SEQUENCES[2:], "loss_a": FIRST[2:], "group": ["x"], "loss_b": SECOND[2:]
    }  # fmt: skip


def test_other_values_of_a_sequence_column_are_refused(a: ShardSet, make_shard_set: MakeShardSet) -> None:
    one = make_shard_set(SEQUENCES, name="one", sequence_columns={"reward": REWARDS})
    columns = {"reward": [0.0, 1.0, 2.0], "group": GROUPS}
    other = make_shard_set(SEQUENCES, {"loss_b": SECOND}, "other", sequence_columns=columns)
    zipped = ZippedSets((a, one, other))
    first, second = (shards.file(1).path for shards in (one, other))
    message = f"{second}: column 'reward' differs from {first}{{}}; import one of them under another name"
    for names in (["reward"], ["reward", "group"], ["group", "reward"]):
        assert zipped.read_sequences(0, names).num_rows == 2
        with pytest.raises(UserError) as caught:
            zipped.read_sequences(1, names)
        assert str(caught.value) == message.format("")
    with pytest.raises(UserError) as caught:
        zipped.read(1, ["reward", "loss_b"], 0)
    assert str(caught.value) == message.format(" (row group 0)")


@pytest.mark.parametrize(("column", "values"), [("document_id", ["doc-0", "doc-2"]), ("start", [0, 1])])
def test_other_documents_are_refused_when_sequence_columns_are_read(
    column: str, values: list, a: ShardSet, make_shard_set: MakeShardSet
) -> None:
    other = make_shard_set(SEQUENCES, name="other", sequence_columns={"group": GROUPS})
    table = other.read(0)
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    entry = write_shard(other.file(0).path, table)
    zipped = ZippedSets((a, with_shards(other, [entry, other.manifest.shards[1]])))
    assert zipped.read_sequences(1, ["group"]).to_pydict() == {"group": ["x"]}
    with pytest.raises(UserError, match=f"other.*: column '{column}' differs from .*; give sets that were scored from"):
        zipped.read_sequences(0, ["group"])


def test_columns_of_other_kinds_are_refused(a: ShardSet, make_shard_set: MakeShardSet) -> None:
    number, label = (
        make_shard_set(SEQUENCES, name=name, sequence_columns={"reward": values})
        for name, values in (("number", REWARDS), ("label", GROUPS))
    )
    with pytest.raises(UserError, match="both have a column 'reward', a number and a label; import one of them"):
        ZippedSets((a, number, label))
    taken = make_shard_set(SEQUENCES, name="taken", sequence_columns={"loss_a": GROUPS})
    for sets, kinds in (((a, taken), "a score and a label"), ((taken, a), "a label and a score")):
        with pytest.raises(UserError, match=f"both have a column 'loss_a', {kinds}; import"):
            ZippedSets(sets)


def test_a_third_set_is_checked_too(a: ShardSet, b: ShardSet, make_shard_set: MakeShardSet) -> None:
    third = make_shard_set(SEQUENCES, {"loss_b": FIRST}, "third")
    with pytest.raises(UserError, match=f"{b.path} and {third.path}: both have a column 'loss_b', of different origin"):
        ZippedSets((a, b, with_origin(third, "loss_b", fingerprint="another model")))


def test_a_column_of_the_same_origin_is_read_from_the_first_set(a: ShardSet, make_shard_set: MakeShardSet) -> None:
    """Two people may call the same model by two names: its fingerprint counts."""
    again = make_shard_set(SEQUENCES, {"loss_a": FIRST}, "again")
    zipped = ZippedSets((a, with_origin(again, "loss_a", model="elsewhere/m")))
    assert zipped.holder("loss_a").path == a.path


def test_contrasts_of_different_columns_are_refused(make_shard_set: MakeShardSet) -> None:
    one, other = (make_shard_set(SEQUENCES, {"excess_loss": FIRST}, name) for name in ("one", "other"))
    assert ZippedSets((one, other)).holder("excess_loss").path == one.path
    assert isinstance(other.manifest.columns["excess_loss"].origin, Contrast)
    with pytest.raises(UserError, match=r"both have a column 'excess_loss'.* 'wmtp score --suffix'"):
        ZippedSets((one, with_origin(other, "excess_loss", minuend="loss_base_b")))


def test_a_clash_with_an_imported_column_is_not_solved_by_scoring(a: ShardSet) -> None:
    column = a.manifest.columns["loss_a"]
    columns = [column.model_copy(update={"origin": ImportedValues(values_sha256=digit * 64)}) for digit in "ab"]
    one, other = (with_manifest(a, columns={"loss_a": imported}) for imported in columns)
    for sets in ((one, other), (a, other), (one, a)):
        with pytest.raises(UserError, match="of different origin; import one of them under another name"):
            ZippedSets(sets)


def test_a_missing_column_names_all_sets_and_their_columns(
    a: ShardSet, b: ShardSet, make_shard_set: MakeShardSet
) -> None:
    corpus = make_shard_set(SEQUENCES, name="corpus")
    with pytest.raises(UserError) as caught:
        ZippedSets((a, b, corpus)).holder("excess_loss")
    assert str(caught.value) == (
        f"no column 'excess_loss' in {a.path} (columns: loss_a) or {b.path} (columns: loss_b) "
        f"or {corpus.path} (columns: none); add it with 'wmtp score' or 'wmtp import', "
        "or from the corpus with 'wmtp prepare --number_fields' or '--label_fields'"
    )


def test_the_digest_covers_all_sets_in_order(a: ShardSet, b: ShardSet) -> None:
    assert ZippedSets((a,)).digest == a.manifest.digest
    assert len({ZippedSets(sets).digest for sets in ((a,), (b,), (a, b), (b, a))}) == 4
