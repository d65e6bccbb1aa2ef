"""Tokenizers of models and of sets agree on the ids that occur."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.tokenizers import check_same_tokenizer, first_difference, fits

MakeSet = Callable[..., ShardSet]


@pytest.fixture
def plain(tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def padded(tokenizer_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def edited(tokenizer_dir: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Any:
    """The test tokenizer with changes in its JSON."""
    shutil.copytree(tokenizer_dir, path)
    content = json.loads((path / "tokenizer.json").read_text())
    edit(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(padding=None), None),
        (lambda c: c["model"]["vocab"].update({"#": 3, "$": 2}), 2),
        (lambda c: c["model"]["vocab"].pop("~"), 93),
        (lambda c: c["model"]["vocab"].update(unused=258), 258),
        (lambda c: c["added_tokens"][1].update(lstrip=True), 257),
        (lambda c: c["model"]["merges"].append(["a", "!"]) or c["model"]["vocab"].update({"a!": 258}), 0),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), 0),
        (lambda c: c.update(normalizer={"type": "NFC"}), 0),
    ],
)
def test_the_first_id_that_means_something_else(
    edit: Callable[[dict[str, Any]], object], expected: int | None, plain: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = edited(tokenizer_dir, tmp_path / "other", edit)
    assert first_difference(plain, other) == first_difference(other, plain) == expected


def test_pieces_of_a_unigram_model() -> None:
    one, other = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], unk_id=0)))
        for pieces in ([("a", -1.0), ("b", -2.0)], [("a", -1.0), ("b", -2.5)])
    )
    assert first_difference(one, one) is None
    assert first_difference(one, other) == 2


def test_a_token_that_does_not_occur_may_differ(plain: Any, padded: Any, make_shard_set: MakeSet) -> None:
    """One padding token more in a model's tokenizer, and one less."""
    recorded = make_shard_set([[1, 257]], name="recorded", largest_id=257)
    counted = make_shard_set([[1, 257]], name="counted")
    assert all(fits(tokenizer, shards) for tokenizer in (plain, padded) for shards in (recorded, counted))


def test_a_token_that_occurs_may_not_differ(
    plain: Any, other_tokenizer: Path, make_shard_set: MakeSet, tokenizer_dir: Path, tmp_path: Path
) -> None:
    swapped = AutoTokenizer.from_pretrained(other_tokenizer)
    assert not fits(swapped, make_shard_set([[0, 5]], name="zero"))
    assert not fits(swapped, make_shard_set([[2, 5]], name="beyond"))
    without = edited(tokenizer_dir, tmp_path / "without", lambda c: c["model"]["vocab"].pop("~"))
    assert fits(without, make_shard_set([[2, 92]], name="below"))
    assert not fits(without, make_shard_set([[2, 93]], name="at"))


def test_sets_with_the_same_tokens_can_be_mixed(
    padded: Any, other_tokenizer: Path, make_shard_set: MakeSet, tmp_path: Path
) -> None:
    padded.save_pretrained(tmp_path / "padded")
    plain_set = make_shard_set([[1, 2]], name="plain")
    padded_set = make_shard_set([[1, 2]], name="padded-set", tokenizer=tmp_path / "padded")
    check_same_tokenizer(plain_set, padded_set)
    other = make_shard_set([[1, 2]], name="other", tokenizer=other_tokenizer)
    with pytest.raises(UserError, match=r"/other: its tokenizer is not that of .*/plain; prepare both with the same"):
        check_same_tokenizer(plain_set, other)


def test_the_largest_id_is_recorded_or_counted(make_shard_set: MakeSet) -> None:
    counted = make_shard_set([[1, 9], [200, 3], [7]], rows_per_shard=1)
    assert counted.largest_id == 200
    assert [counted.fits_ids(size) for size in (200, 201, 258)] == [False, True, True]
    recorded = make_shard_set([[1, 9]], name="recorded", largest_id=9)
    assert recorded.largest_id == 9
    assert [recorded.fits_ids(size) for size in (9, 10)] == [False, True]


def test_no_id_is_larger_than_the_recorded_one(make_shard_set: MakeSet) -> None:
    """Or a model that has embeddings for the recorded ids would fail in the middle of its training."""
    forged = make_shard_set([[1, 9]], largest_id=8)
    with pytest.raises(UserError, match="has a token id outside the range 0 to 8"):
        forged.read(0)


def test_the_digest_of_a_set_without_the_largest_id_stays(make_shard_set: MakeSet) -> None:
    """Sets of earlier versions can be read, and runs on them resumed."""
    manifest = make_shard_set([[1, 9]]).manifest
    assert "largest_id" not in manifest.model_dump(mode="json")["corpus"]
    assert make_shard_set([[1, 9]], name="new", largest_id=9).manifest.digest != manifest.digest
