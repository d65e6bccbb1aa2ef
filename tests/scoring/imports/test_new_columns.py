"""The place of new columns in a shard."""

from collections.abc import Callable

import polars as pl

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.imports.in_memory import open_rows
from weighted_mtp.scoring.imports.matching import match_rows
from weighted_mtp.scoring.imports.new_columns import NewColumns
from weighted_mtp.scoring.imports.score_rows import read_rows
from weighted_mtp.scoring.imports.sources import choose_columns


def columns_of(source: ShardSet, rows: pl.DataFrame) -> NewColumns:
    opened = open_rows(rows, ())
    kinds = choose_columns([opened], ())
    read = read_rows([opened], kinds, source.manifest.tokens)
    return NewColumns(source, kinds, read, match_rows(source, read))


def test_columns_follow_those_of_their_kind(make_shard_set: Callable[..., ShardSet]) -> None:
    source = make_shard_set([[1, 2], [3], [4]], {"loss_a": [[0, 1], [2], [3]]}, sequence_columns={"reward": [0.0] * 3})
    rows = {"document_id": ["doc-2", "doc-0", "doc-1"], "x": [[5.0], [1, 2], [3]]}
    rows |= {"group": ["c", "a", "b"], "y": [[9.0], [7, 8], None], "n": [2, 0, 1]}
    columns = columns_of(source, pl.DataFrame(rows, strict=False))
    assert columns.score_columns == ("x", "y")
    assert columns.sequence_columns == {"group": "label", "n": "number"}
    first, last = (columns.append(source.read(number), first) for number, first in ((0, 0), (1, 2)))
    names = ["document_id", "start", "input_ids", "reward", "group", "n", "loss_a", "x", "y"]
    assert first.column_names == last.column_names == names
    assert first["group"].to_pylist() == ["a", "b"]
    assert last.select(["group", "n", "x", "y"]).to_pylist() == [{"group": "c", "n": 2, "x": [5], "y": [9]}]


def test_digests_do_not_depend_on_the_order_or_the_division_of_rows(make_shard_set: Callable[..., ShardSet]) -> None:
    source = make_shard_set([[1, 2], [3]])
    rows = pl.DataFrame({"document_id": ["doc-0", "doc-1"], "x": [[1.0, None], [3]], "n": [1, 2]})
    expected = columns_of(source, rows).digests()
    assert columns_of(source, rows.reverse()).digests() == expected
    nan = rows.with_columns(pl.col("x").list.eval(pl.element().fill_null(-float("nan"))))
    assert columns_of(source, nan).digests() == expected
    other = columns_of(source, rows.with_columns(n=pl.Series([2, 1]))).digests()
    assert [name for name in expected if other[name] != expected[name]] == ["n"]
