"""`wmtp weights` reports the weights that training uses, and what it sampled."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from weighted_mtp.pipelines.weights import EXCERPT_TOKENS, RowGroup, draw_groups, run, weigh_row_groups
from weighted_mtp.schemas.configs import WeightsConfig, WeightsReportConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Manifest, ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.weighting import make_weighting

MakeShardSet = Callable[..., ShardSet]
TEXTS = ["one two", "three", "x", "four 4 five"]
NAN = float("nan")


@pytest.fixture
def sequences(tokenizer_dir: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture
def scored(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> ShardSet:
    """Excess losses: 1 for the letter e, 0.5 for the space, else -1; none for the third letter of each text."""
    score = {"e": 1.0, " ": 0.5}
    rows = [[NAN if at in (0, 2) else score.get(letter, -1.0) for at, letter in enumerate(text)] for text in TEXTS]
    losses = [[2.0 - value for value in row] for row in rows]
    return make_shard_set(sequences, {"excess_loss": rows, "loss_reference": losses})


def report(capsys: pytest.CaptureFixture[str], *sets: ShardSet, **settings: object) -> str:
    weights = settings.pop("weights", {})
    run(WeightsReportConfig.model_validate({"set": [s.path for s in sets], "weights": weights, **settings}))
    return capsys.readouterr().out


def test_numbers_of_a_tiny_corpus_worked_out_by_hand(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 20 targets 17 have a score; of these 3 e (the first is unscored) and 3 spaces are above 0.

    one two: n e* _ t w o; three: h r* e e; x: nothing; four 4 five: o u* r _ 4 _ f i v e, * without a score.
    """
    text = report(capsys, scored, weights={"formula": "clip(excess_loss, 0, 1)"})
    for line in (
        "clip(excess_loss, 0, 1)",
        "24 of 24 tokens",
        "20 of 24 tokens; the first of a sequence is not a target",
        "85.00% of the targets",
        "30.00% of the targets have weight",
        "0.2250 over all targets; absolute, over kept targets, 0.7500",
        f"{4.5**2 / 3.75 / 20:.2%} of the targets",
        "0 of 3 have no weight at all",
    ):
        assert line in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["0", "70.00%"] in [row[:2] for row in cells]
    assert ["0.5", "15.00%"] in [row[:2] for row in cells]
    by_class = {row[0]: row[1:5] for row in cells if row[0] in ("word continuation", "space, line break", "digits")}
    assert by_class == {
        "word continuation": ["80.00%", "18.8%", "0.1875", "66.67%"],
        "space, line break": ["15.00%", "100.0%", "0.5000", "33.33%"],
        "digits": ["5.00%", "0.0%", "0.0000", "0.00%"],
    }


def test_excerpts_show_what_is_kept(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, scored, weights={"formula": "clip(excess_loss, 0, 1)"}, samples=4)
    assert "doc-0, tokens 0 to 6" in text
    assert "o‹ne› ‹two›" in text
    assert "doc-1, tokens 0 to 4" in text
    assert "t‹hr›ee" in text
    assert "texts with" not in report(capsys, scored, samples=0)


def test_weights_are_those_of_training(make_shard_set: MakeShardSet) -> None:
    """Random controls included: the loader's rows, of one sequence each, have the same weights."""
    rng = np.random.default_rng(0)
    rows = [[*range(length)] for length in (5, 7, 9, 6)]
    scores = [[NAN, *rng.normal(size=len(row) - 1)] for row in rows]
    shards = ZippedSets((make_shard_set(rows, {"excess_loss": scores}),))
    config = WeightsConfig(preset="rho1-static", control="random")
    report_config = WeightsReportConfig(set=shards.first.path, weights=config, seed=5)
    groups = draw_groups(shards.first.manifest, 10**6, 5)
    assert groups == [RowGroup(0, 0), RowGroup(1, 0)]
    statistics, _ = weigh_row_groups(shards, make_weighting(config, shards), groups, report_config)
    batch = next(RowLoader(shards, make_weighting(config, shards), 9, seed=5).batches(4))
    np.testing.assert_array_equal(statistics.ascending, np.sort(batch.weights[batch.position_ids > 0]))


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"preset": "sparse"}, True),
        ({"preset": "ppmi"}, True),
        ({"preset": "npmi", "live": True}, True),
        ({"preset": "dense", "lam": 0.0}, True),
        ({"preset": "sparse", "silent": 1}, False),
        ({"preset": "dense"}, False),
        ({"formula": "normalise(abs(long_short), by=sequence)"}, False),
    ],
)
def test_a_remedy_for_documents_not_longer_than_the_short_context(
    settings: dict[str, object], shown: bool, make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first has a contrast in both directions, the second none; `dense` gives it its share of cross-entropy."""
    scores = {"long_short": [[NAN, 1.0, -1.0], [NAN, 0.0, 0.0]], "loss_short": [[NAN, 2.0, 1.0], [NAN, 1.0, 1.0]]}
    scored = make_shard_set([[1, 2, 3], [4, 5, 6]], scores | {"loss_base": [[NAN, 1.0, 2.0], [NAN, 1.0, 1.0]]})
    live = {"live_column": "loss_base"} if "live" in settings else {}
    text = report(capsys, scored, weights=settings, **live)
    assert ("no longer than the short context; --weights.silent 1 gives weight 1" in text) == shown


def test_columns_of_several_sets_and_of_the_corpus(
    scored: ShardSet, make_shard_set: MakeShardSet, sequences: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    ones = [[1.0] * len(row) for row in sequences]
    other = make_shard_set(sequences, {"loss_other": ones}, "other")
    text = report(capsys, scored, other, weights={"formula": "relu(excess_loss) * loss_other"})
    assert str(scored.path) in text
    assert str(other.path) in text
    assert "30.00% of the targets have weight" in text
    rewarded = make_shard_set(sequences, name="rewarded", sequence_columns={"reward": [1.0, 0.0, 1.0, -0.5]})
    text = report(capsys, rewarded, weights={"preset": "reward"})
    assert f"{(6 * 1 - 10 * 0.5) / 20:.4f} over all targets" in text
    assert "1 of 3 have no weight at all" in text
    assert "100.00% of the targets\n" not in text
    assert "80.00% of the targets have weight" in text
    assert "-‹" in text


def test_a_column_replaces_the_live_loss(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches are row groups, of 8 targets with a score and of 9: the top third is 3, and those tied with them."""
    settings = {"live_column": "loss_reference", "weights": {"formula": "top(live, 0.33)"}}
    text = report(capsys, scored, **settings)
    assert "replaced by loss_reference" in text
    assert "each row group is treated as a batch" in text
    first, second = 5, 6  # losses of 3, tied at the threshold, of letters that are neither e nor space
    assert f"{(first + second) / 20:.2%} of the targets have weight" in text
    with pytest.raises(UserError, match="no column 'loss_base'"):
        report(capsys, scored, **settings | {"live_column": "loss_base"})


def test_of_a_large_set_some_row_groups_are_drawn(
    make_shard_set: MakeShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 8)
    rows = [[1, 2, 3, 4]] * 40
    shards = make_shard_set(rows, {"excess_loss": [[NAN, row, row, row] for row in range(40)]}, rows_per_shard=14)
    assert [shard.row_groups for shard in shards.manifest.shards] == [7, 7, 6]
    all_groups = [RowGroup(shard, group) for shard, groups in enumerate((7, 7, 6)) for group in range(groups)]
    assert draw_groups(shards.manifest, 160, 0) == draw_groups(shards.manifest, 10**9, 0) == all_groups
    drawn = draw_groups(shards.manifest, 40, 0)
    assert len(drawn) == 5
    assert drawn == sorted(drawn, key=all_groups.index)
    assert drawn == draw_groups(shards.manifest, 40, 0) != draw_groups(shards.manifest, 40, 1)
    assert len(draw_groups(shards.manifest, 1, 0)) == 1
    text = report(capsys, shards, max_tokens=40, seed=3)
    assert "40 of 160 tokens: 5 of 20 row groups, drawn at random with seed 3" in text
    assert text == report(capsys, shards, max_tokens=40, seed=3)


def test_a_sample_of_very_many_row_groups_takes_no_list_of_all() -> None:
    entries = [ShardEntry("a", 10**9, 10**12, 10, 10**7, 1, "0" * 64, "0" * 64)] * 100
    manifest = Manifest.model_construct(shards=entries)
    drawn = draw_groups(manifest, 10**7, 0)
    assert len(drawn) == 100
    assert all(0 <= group.number < 10**7 and 0 <= group.shard < 100 for group in drawn)


def test_excerpts_of_long_sequences_are_windows(make_shard_set: MakeShardSet) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 200, length).tolist() for length in (900, 1, 40)]
    scores = [[NAN, *rng.normal(size=len(row) - 1)] for row in rows]
    shards = ZippedSets((make_shard_set(rows, {"excess_loss": scores}, rows_per_shard=3),))
    config = WeightsReportConfig(set=shards.first.path, weights=WeightsConfig(formula="abs(excess_loss)"), samples=9)
    weighting = make_weighting(config.weights, shards)
    _, excerpts = weigh_row_groups(shards, weighting, draw_groups(shards.first.manifest, 10**6, 0), config)
    assert [excerpt.document_id for excerpt in excerpts] == ["doc-0", "doc-2"], "each sequence once, no target no text"
    long, short = excerpts
    assert (len(long.ids), len(short.ids)) == (EXCERPT_TOKENS, 40)
    assert (long.begins, long.ends, short.begins, short.ends) == (False, False, True, True)
    assert np.isnan(short.weights[0])
    for row, excerpt in ((0, long), (2, short)):
        shown = slice(excerpt.position, excerpt.position + len(excerpt.ids))
        assert excerpt.ids.tolist() == rows[row][shown]
        expected = np.abs(np.array(scores[row], np.float16)[shown]).astype(np.float32)
        np.testing.assert_array_equal(excerpt.weights, expected)


def test_notes_where_little_is_left(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[1] * 251] * 8
    few = [[NAN, *[1.0] * 10, *[-1.0] * 240]] * 8
    heavy = [[NAN, 5000.0, *[0.01] * 249]] * 8
    shards = make_shard_set(rows, {"excess_loss": few, "loss_x": heavy})
    text = report(capsys, shards, weights={"preset": "soft-threshold"})
    assert "│ note" in text
    assert "96.0% of the targets have weight 0" in text
    assert "outweigh" not in text
    text = report(capsys, shards, weights={"formula": "loss_x"})
    assert "a few weights outweigh all others" in text
    assert "have weight 0" not in text
    assert "│ note" not in report(capsys, shards, weights={"formula": "clip(loss_x, 0, 1)"})


def test_a_page_is_written_and_nothing_else_overwritten(
    scored: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "weights.html"
    report(capsys, scored, weights={"preset": "rho1-static"}, html=page)
    assert "weights by class of token" in page.read_text()
    assert "background-color: #a1d99b" in page.read_text()
    with pytest.raises(UserError, match=r"ends in \.html"):
        report(capsys, scored, html=scored.path / "manifest.json")


def test_nothing_to_predict(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no sequence has two tokens"):
        report(capsys, make_shard_set([[1], [2]]))


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the table with this title: of the targets, kept, mean weight, of all weight."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.strip() == f"weights by {title}")
    body = list(takewhile(lambda line: not line.startswith("└"), lines))[3:]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in body]
    return {row[0]: row[1:5] for row in rows if row[1]}  # a long name goes on in a line of its own


def test_weights_by_label(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters and markup in labels are shown, not followed."""
    rows, scores = [[1, 2, 3], [1, 2], [1, 2, 3, 4]], [[NAN, 1.0, 0.0], [NAN, 3.0], [NAN, 0.0, 0.0, 1.0]]
    kinds: dict[str, list[float] | list[str]] = {"kind": ["[red]a\x1b", "b", "b"], "reward": [1.0, 2.0, 3.0]}
    shards = make_shard_set(rows, {"excess_loss": scores}, sequence_columns=kinds)
    text = report(capsys, shards, weights={"formula": "abs(excess_loss)"})
    assert rows_of(text, "kind") == {
        "b": ["66.67%", "50.0%", "1.0000", "80.00%"],
        "[red]a\\x1b": ["33.33%", "50.0%", "0.5000", "20.00%"],
    }
    assert "weights by reward" not in text
    by_kind = report(capsys, shards, weights={"formula": "abs(standardise(reward, by=kind))"})
    assert rows_of(by_kind, "kind")["b"][1] == "100.0%", "a label may also be part of the formula"


def test_weights_by_set_of_a_mixture(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Each set counts with its share of the rows, whatever its size, and has its own thresholds.

    The first has 2 targets in 3 tokens, the second 3 in 4: in proportion 0.75 * 2 / 3 = 0.5 and 0.25 * 3 / 4 = 0.1875.
    """
    first = make_shard_set([[1, 2, 3]] * 8, {"excess_loss": [[NAN, 2.0, -1.0]] * 8}, "first")
    second = make_shard_set([[1, 2, 3, 4]], {"excess_loss": [[NAN, 6.0, 1.0, 2.0]]}, "second")
    text = report(capsys, first, mix={str(second.path): 0.25}, weights={"formula": "relu(excess_loss)"})
    weight = 0.5 * 1 + 0.1875 * 3
    assert list(rows_of(text, "set of the mixture").values()) == [
        [f"{0.5 / 0.6875:.2%}", "50.0%", "1.0000", f"{0.5 / weight:.2%}"],
        [f"{0.1875 / 0.6875:.2%}", "100.0%", "3.0000", f"{0.1875 * 3 / weight:.2%}"],
    ]
    assert "1.0000 over all targets" in text, "the rest of the report is about the first set"
    text = report(capsys, first, mix={str(second.path): 0.25}, weights={"formula": "top(excess_loss, 0.3)"})
    assert [row[1] for row in rows_of(text, "set of the mixture").values()] == ["50.0%", "33.3%"]
    assert "set of the mixture" not in report(capsys, first)


def test_sets_of_a_mixture_must_suit_the_weights(
    make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str], other_tokenizer: Path
) -> None:
    first = make_shard_set([[1, 2]], {"excess_loss": [[NAN, 2.0]]}, "first")
    bare, short = make_shard_set([[1, 2]], name="bare"), make_shard_set([[1]], {"excess_loss": [[NAN]]}, "short")
    weights = {"formula": "relu(excess_loss)"}
    with pytest.raises(UserError, match=r"no column 'excess_loss' in .*/bare"):
        report(capsys, first, mix={str(bare.path): 0.1}, weights=weights)
    with pytest.raises(UserError, match=r"/short: no sequence has two tokens"):
        report(capsys, first, mix={str(short.path): 0.1}, weights=weights)
    other = make_shard_set([[1, 2]], name="other", tokenizer=other_tokenizer)
    with pytest.raises(UserError, match=r"/other: its tokenizer is not that of .*/first"):
        report(capsys, first, mix={str(other.path): 0.1}, weights=weights)
