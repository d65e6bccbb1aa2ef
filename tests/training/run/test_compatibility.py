"""Settings, model and shard sets that are not compatible."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Llama4TextConfig

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.train import train


def test_a_refused_start_claims_nothing(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """The remedy of the error works on the same output."""
    long = scored_set([300, 20], name="long")
    with pytest.raises(UserError, match="give --sequence_length 128"):
        train(config("run", input=long.path, sequence_length=None))
    assert not (long.path.parent / "run").exists()
    train(config("run", input=long.path, sequence_length=128, max_steps=1))


def test_rows_longer_than_a_chunk_of_attention_are_refused(config: Callable[..., TrainConfig]) -> None:
    """Chunks of Llama 4 start in rows, not in documents."""
    run = config("run", from_scratch=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = Llama4TextConfig(**sizes, vocab_size=258, num_local_experts=2, attention_chunk_size=16)
    settings.save_pretrained(run.model)
    with pytest.raises(UserError, match=r"has chunks of 16 tokens, .*; give --sequence_length 16$"):
        train(run)


def test_tracker_that_is_not_installed_is_named(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="the package for 'aim' is not installed"):
        train(config("run", trackers=("aim",)))
    run = config("board", trackers=("tensorboard",))
    train(run)
    assert list((run.output / "wmtp").rglob("events*"))


def test_wrong_tokenizer_is_refused(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    tokenizer = Path(run.model) / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer is not that of"):
        train(run)
    assert not run.output.exists()


def test_mixed_sets_are_checked_like_the_first(
    config: Callable[..., TrainConfig],
    scored_set: Callable[..., ShardSet],
    make_shard_set: Callable[..., ShardSet],
    other_tokenizer: Path,
) -> None:
    long = scored_set([300, 20], name="long")
    with pytest.raises(UserError, match=r"/long has sequences of up to 300; give --sequence_length 128"):
        train(config("run", mix={str(long.path): 0.1}, sequence_length=None))
    bare = make_shard_set([[1, 2, 3]], name="bare")
    with pytest.raises(UserError, match=r"no column 'long_short' in .*/bare"):
        train(config("run", mix={str(bare.path): 0.1}))
    other = make_shard_set([[1, 2, 3]], name="other", tokenizer=other_tokenizer)
    with pytest.raises(UserError, match=r"/other: its tokenizer is not that of .*/set"):
        train(config("run", mix={str(other.path): 0.1}))
    assert not config("run").output.exists()
