"""The highest and lowest scoring tokens of a set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from text_sets import TEXTS, scores_of
from transformers import AutoTokenizer

from weighted_mtp.pipelines.reports.tokens.extreme_tokens import extremes, split_text
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

MakeShardSet = Callable[..., ShardSet]


def test_extremes_are_those_of_all_tokens_sorted(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    columns = {"loss_reference": scores_of(sequences, 1), "excess_loss": scores_of(sequences)}
    highest, lowest = extremes(make_shard_set(sequences, columns), "excess_loss", 4)
    every = sorted(float(np.float16(s)) for row in columns["excess_loss"] for s in row if not np.isnan(s))
    assert [token.score for token in lowest] == every[:4]
    assert [token.score for token in highest] == every[:-5:-1]
    for token in highest + lowest:
        row = int(token.document_id.removeprefix("doc-"))
        assert sequences[row][token.position] == token.token
        assert [*token.before, token.token, *token.after] == sequences[row][max(0, token.position - 24) :][:33]
        assert np.float16(columns["excess_loss"][row][token.position]) == token.score


def test_of_equal_scores_the_first_token_is_shown(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    scores = [[np.nan, *[1.0] * (len(ids) - 1)] for ids in sequences]
    highest, lowest = extremes(make_shard_set(sequences, {"long_short": scores}), "long_short", 2)
    assert [(token.document_id, token.position) for token in highest] == [("doc-0", 1), ("doc-0", 2)]
    assert highest == lowest


def test_the_marked_token_stands_in_its_text(tokenizer_dir: Path, make_shard_set: MakeShardSet) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer(TEXTS[0])["input_ids"]
    scores = [[np.nan] + [0.0] * (len(ids) - 1)]
    scores[0][5] = 9.0
    highest, _ = extremes(make_shard_set([ids], {"long_short": scores}), "long_short", 1)
    assert split_text(tokenizer, highest[0]) == ("first", "\\n", "line")
