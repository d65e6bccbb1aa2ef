"""What a notebook shows for a shard set."""

from collections.abc import Callable

import pytest

from weighted_mtp.schemas.shard_set.notebook import describe_html, score_text
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

LOSSES = [[float("nan"), 1.0, 3.0], [float("nan"), 2.0]]


def test_the_line_has_path_size_and_columns(make_shard_set: Callable[..., ShardSet]) -> None:
    shards = make_shard_set([[1, 2, 3], [4, 5]], {"loss_a": LOSSES}, sequence_columns={"reward": [1.0, 2.0]})
    assert repr(shards) == f"ShardSet('{shards.path}', 5 tokens in 2 sequences, columns: reward, loss_a)"
    plain = make_shard_set([[1, 2]], name="plain")
    assert repr(plain).endswith("2 tokens in 1 sequences, columns: none)")


def test_the_page_has_origins_and_statistics_and_escapes_them(make_shard_set: Callable[..., ShardSet]) -> None:
    shards = make_shard_set(
        [[1, 2, 3], [4, 5]], {"loss_a": LOSSES, "gain": LOSSES}, name="<i>", sequence_columns={"reward": [1.0, 2.0]}
    )
    page = shards._repr_html_()
    assert "<i>" not in page
    assert "&lt;i&gt;" in page
    assert "5 tokens in 2 sequences of 2 documents" in page
    assert "<tr><td>reward</td><td>a number for each document</td></tr>" in page
    assert "<td>loss_a</td><td>m, full context, float32, transformers 5</td><td>2</td><td>2.000</td>" in page
    assert "<td>gain</td><td>loss_base - loss_reference</td>" in page
    assert page.count("<th>") == 8
    column = shards.manifest.columns["loss_a"]
    foreign = column.model_copy(update={"origin": column.origin.model_copy(update={"model": "<b>m"})})
    assert "<td>&lt;b&gt;m, full context" in describe_html(
        shards.path, shards.manifest.model_copy(update={"columns": {"loss_a": foreign}})
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0.000"),
        (2.0, "2.000"),
        (-12.34567, "-12.346"),
        (0.0012, "0.001"),
        (0.0005, "0.001"),
        (0.00049, "0.00049"),
        (-0.0001234, "-0.000123"),
        (5.96e-8, "5.96e-08"),
        (float("nan"), "nan"),
    ],
)
def test_small_scores_keep_three_digits(number: float, text: str) -> None:
    assert score_text(number) == text


def test_statistics_of_tiny_scores_are_not_zero(make_shard_set: Callable[..., ShardSet]) -> None:
    shards = make_shard_set([[1, 2, 3]], {"loss_a": [[float("nan"), 2**-20, 3 * 2**-20]]})
    assert "<td>1.91e-06</td><td>9.54e-07</td>" in shards._repr_html_()
