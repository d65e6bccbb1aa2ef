from collections.abc import Callable

import numpy as np
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import STATISTICS, ShardSet
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA, MANIFEST

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 4]]
MakeShardSet = Callable[..., ShardSet]


@pytest.fixture
def scored(make_shard_set: MakeShardSet) -> ShardSet:
    return make_shard_set(SEQUENCES, {"loss_reference": LOSSES})


def faults(shard_set: ShardSet) -> list[str]:
    return [check.fault for check in verify(shard_set.path, shard_set.manifest) if check.fault]


def test_a_set_opens_as_it_was_written(scored: ShardSet) -> None:
    opened = ShardSet.open(scored.path)
    assert opened.manifest == scored.manifest
    assert (opened.manifest.rows, opened.manifest.tokens, len(opened.manifest.shards)) == (3, 9, 2)
    assert opened.read(1, ["input_ids"])["input_ids"].to_pylist() == [[6, 7, 8, 9]]
    assert opened.value_counts()["loss_reference"].statistics().mean == pytest.approx(15.5 / 6)
    assert opened.manifest.columns["loss_reference"].statistics.missing == 3
    assert (scored.path / MANIFEST).exists()
    assert faults(scored) == []


def test_an_unscored_set_has_no_statistics(make_shard_set: MakeShardSet) -> None:
    corpus = make_shard_set(SEQUENCES)
    assert ShardSet.open(corpus.path).value_counts() == {}
    assert not (corpus.path / STATISTICS).exists()
    with pytest.raises(UserError, match=r"no column 'excess_loss' \(score columns: none\); add it with 'wmtp score'"):
        corpus.require_column("excess_loss")


def test_a_missing_or_truncated_shard_is_refused_by_name(scored: ShardSet) -> None:
    first, second = (scored.path / DATA / shard.name for shard in scored.manifest.shards)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{second.name}: shard has \d+ bytes instead of \d+"):
        ShardSet.open(scored.path)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: shard is missing"):
        ShardSet.open(scored.path)


def test_verify_lists_every_fault(scored: ShardSet) -> None:
    first, second = (scored.path / DATA / shard.name for shard in scored.manifest.shards)
    first.unlink()
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    (scored.path / STATISTICS).write_bytes(b"")
    assert faults(scored) == [
        f"{first}: missing",
        f"{second}: content differs from the manifest (sha256)",
        f"{scored.path / STATISTICS}: content differs from the manifest",
    ]


def test_sequence_columns_are_part_of_the_schema(make_shard_set: MakeShardSet) -> None:
    columns = {"reward": [0.5, -1.0, 3.0], "group": ["a", "b", "a"]}
    shards = make_shard_set(SEQUENCES, sequence_columns=columns)
    assert shards.manifest.corpus.sequence_columns == {"reward": "number", "group": "label"}
    assert faults(shards) == []
    assert shards.bytes_per_token().keys() == {"document_id", "start", "input_ids", "reward", "group"}
    corpus = shards.manifest.corpus.model_copy(update={"sequence_columns": {"reward": "label", "group": "label"}})
    other = shards.manifest.model_copy(update={"corpus": corpus})
    found = [check.fault for check in verify(shards.path, other)]
    assert found[0] == f"{shards.path / DATA / shards.manifest.shards[0].name}: columns differ from the manifest"


def test_altered_statistics_are_refused(scored: ShardSet) -> None:
    (scored.path / STATISTICS).unlink()
    with pytest.raises(UserError, match="is missing"):
        scored.value_counts()


def test_another_tokenizer_is_refused(scored: ShardSet) -> None:
    file = scored.path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A"', 1))
    with pytest.raises(UserError, match="not the tokenizer of the corpus"):
        ShardSet.open(scored.path)
