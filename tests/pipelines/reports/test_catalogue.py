"""The lines of the catalogue for entries made by hand."""

from collections.abc import Callable
from pathlib import Path

from weighted_mtp.pipelines.reports.catalogue import CatalogueEntry, catalogue, read_entry
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
    assert isinstance(read_entry(tmp_path / "nowhere"), UserError)
