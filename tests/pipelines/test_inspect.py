from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from weighted_mtp.pipelines.inspect import default_column, extremes, run, split_text
from weighted_mtp.pipelines.reports.pages import printable
from weighted_mtp.schemas.configs import InspectConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

MakeShardSet = Callable[..., ShardSet]
TEXTS = ["first\nline", "second one", "third"]


@pytest.fixture
def sequences(tokenizer_dir: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def scores_of(sequences: list[list[int]], seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [[np.nan, *rng.normal(size=len(ids) - 1)] for ids in sequences]


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


def test_printable_escapes_what_would_break_the_line() -> None:
    assert printable("a\tb\r\n\x1b[0m é") == "a\\tb\\r\\n\\x1b[0m é"


def test_the_default_column_is_the_first_contrast(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    losses, excess = scores_of(sequences, 1), scores_of(sequences)
    both = make_shard_set(sequences, {"loss_reference": losses, "excess_loss": excess}, "both")
    assert default_column(both.manifest) == "excess_loss"
    assert default_column(make_shard_set(sequences, {"loss_reference": losses}, "one").manifest) == "loss_reference"
    assert default_column(make_shard_set(sequences, name="none").manifest) is None


def test_bytes_per_token_are_those_of_the_files(
    make_shard_set: MakeShardSet, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = make_shard_set(sequences, {"excess_loss": scores_of(sequences)})
    sizes = shard_set.bytes_per_token()
    assert set(sizes) == {"document_id", "start", "input_ids", "excess_loss"}
    assert all(size > 0 for size in sizes.values())
    assert sum(sizes.values()) < shard_set.manifest.bytes / shard_set.manifest.tokens
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shard_set.SAMPLED_FOOTERS", 1)
    (shard_set.path / shard_set.manifest.shards[-1].name).unlink()
    first = shard_set.manifest.shards[0]
    assert len(shard_set.manifest.shards) > 1
    assert 0 < sum(shard_set.bytes_per_token().values()) < first.bytes / first.tokens


def test_the_report_of_a_scored_set(
    make_shard_set: MakeShardSet, sequences: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"loss_reference": scores_of(sequences, 1), "excess_loss": scores_of(sequences)}
    shard_set = make_shard_set(sequences, columns)
    page = tmp_path / "pages" / "report.html"
    run(InspectConfig(set=shard_set.path, samples=2, html=page))
    report = capsys.readouterr().out
    for shown in ("corpus.jsonl", "m, full context, float32", "loss_base - loss_reference", "highest excess_loss", "»"):
        assert shown in report
    assert "<html>" in page.read_text()
    assert "lowest excess_loss" in page.read_text()


def test_a_set_without_any_score_in_a_column(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    run(InspectConfig(set=make_shard_set([[1], [2]], {"excess_loss": [[np.nan], [np.nan]]}).path))
    assert "no token has a score" in capsys.readouterr().out


def test_an_unscored_set_shows_sequences(
    make_shard_set: MakeShardSet, sequences: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(InspectConfig(set=make_shard_set(sequences).path, samples=2))
    report = capsys.readouterr().out
    assert "first\\nline" in report
    assert "third" in report
    assert "second" not in report


def test_sequence_columns_are_shown(
    make_shard_set: MakeShardSet, sequences: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    carried = {"reward": [0.5, 1.25, -3.0], "group": ["left", "left", "right"]}
    run(InspectConfig(set=make_shard_set(sequences, sequence_columns=carried).path))
    report = capsys.readouterr().out
    for shown in ("the corpus, a number for each document", "the corpus, a label for", "1.25", "-3", "right"):
        assert shown in report


def test_an_unknown_column_is_refused(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    with pytest.raises(UserError, match="no column 'long_short'"):
        run(InspectConfig(set=make_shard_set(sequences).path, column="long_short"))


def test_report_overwrites_nothing_but_pages(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    shard_set = make_shard_set(sequences)
    manifest = (shard_set.path / "manifest.json").read_text()
    with pytest.raises(UserError, match=r"ends in \.html"):
        run(InspectConfig(set=shard_set.path, html=shard_set.path / "manifest.json"))
    assert (shard_set.path / "manifest.json").read_text() == manifest
