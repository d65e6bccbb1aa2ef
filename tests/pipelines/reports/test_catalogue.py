"""The lines of the catalogue for entries made by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from weighted_mtp.pipelines.reports.catalogue import (
    CatalogueEntry,
    UnfinishedSet,
    catalogue,
    read_entry,
    unfinished_set,
)
from weighted_mtp.pipelines.reports.run_entry import RunEntry
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

TOKENS = CatalogueEntry("a" * 64, None, "corpus.jsonl", 1234567, 5000, {})
SCORED = CatalogueEntry("b" * 64, "a" * 64, "corpus.jsonl", 7, 80, {"reward": "number", "x": "contrast"})


def test_lineage_and_columns() -> None:
    assert list(catalogue({Path("tokens"): TOKENS, Path("scored"): SCORED})) == [
        "tokens: 1,234,567 tokens, 5,000 bytes, from corpus.jsonl",
        "scored: 7 tokens, 80 bytes, from tokens",
        "    reward  number",
        "    x       contrast",
    ]


def test_a_source_that_is_elsewhere_and_a_set_that_is_damaged() -> None:
    damaged = UserError("bad/manifest.json: is damaged")
    lines = list(catalogue({Path("bad"): damaged, Path("scored"): SCORED}))
    assert lines[:2] == [str(damaged), "scored: 7 tokens, 80 bytes, from a set not found, aaaaaaaaaaaa"]


def test_the_entry_of_a_set(make_shard_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    made = make_shard_set([[1, 2], [3]], {"excess_loss": [[0, 1], [0]]}, sequence_columns={"group": ["a", "b"]})
    assert read_entry(made.path) == CatalogueEntry(
        digest=made.manifest.digest,
        derived_from=None,
        corpus="corpus.jsonl",
        tokens=3,
        bytes=made.manifest.bytes,
        columns={"group": "label of each document", "excess_loss": "loss_base - loss_reference"},
    )
    with pytest.raises(UserError, match="no such shard set"):
        read_entry(tmp_path / "nowhere")


def test_runs_with_their_inputs_and_unfinished_sets() -> None:
    held_out = {"1": 2.75, "top": 3.0}
    mix = [("0.3", ["c" * 64])]
    done = RunEntry(True, 1500, 1500, 2.123456, held_out, ["a" * 64, "b" * 64], mix, 12345)
    stopped = RunEntry(False, 0, None, None, {}, ["a" * 64], [], 10)
    found = {Path("tokens"): TOKENS, Path("done"): done, Path("stopped"): stopped, Path("half"): UnfinishedSet(3, 8)}
    assert list(catalogue(found))[1:] == [
        "done: training run, 1,500 of 1,500 steps, loss 2.1235, held-out loss 2.75 (offset 1), 3 (token order), "
        "12,345 bytes",
        f"    input  tokens, a set not found, {'b' * 12}",
        f"    mix    0.3 a set not found, {'c' * 12}",
        "stopped: unfinished training run, 0 steps, 10 bytes",
        "    input  tokens",
        "half: unfinished shard set, 3 of 8 shards done",
    ]


def test_shards_of_an_unfinished_set() -> None:
    names = ["shard-00000-of-00012.parquet", "shard-00007-of-00012.parquet", "rejects.jsonl", "shard-1.parquet"]
    assert unfinished_set(names) == UnfinishedSet(2, 12)
    assert unfinished_set([]) == UnfinishedSet(0, None)
