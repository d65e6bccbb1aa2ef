"""The weight language: what it reads, what it refuses, and what it knows of a formula without any data."""

import math

import pytest

from weighted_mtp.schemas.configs import TrainConfig, WeightsConfig
from weighted_mtp.schemas.weights.language import (
    POSITIVE,
    UNBOUNDED,
    Call,
    Column,
    FormulaError,
    Number,
    bounds,
    columns_of,
    is_live,
    labels_of,
    mean_of,
    parse,
    rename,
    waits_for_batch,
)
from weighted_mtp.schemas.weights.presets import PRESETS

X, Y = Column("x"), Column("y")


def test_operators_bind_as_in_python() -> None:
    assert parse("x - y * 2") == Call("-", (X, Call("*", (Y, Number(2.0)))))
    assert parse("(x - y) / -2") == Call("/", (Call("-", (X, Y)), Number(-2.0)))
    assert parse(" 1 + 2 * 3 ") == Number(7.0)
    assert parse("x >= log(2)") == Call(">=", (X, Number(math.log(2))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("negate(x)", "-x"),
        ("shift(x, 2)", "x + 2"),
        ("scale(x, 2)", "2 * x"),
        ("relu(x)", "clip(x, low=0)"),
        ("interpolate(x, 0.75)", "0.75 + 0.25 * x"),
        ("top(x, 0.5)", "top(x, fraction=0.5, by=corpus)"),
        ("top(live - x, 0.5)", "top(live - x, 0.5, by=batch)"),
        ("normalise(x)", "normalise(x, 0, by=corpus)"),
    ],
)
def test_two_ways_to_write_the_same(one: str, other: str) -> None:
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("top(x", r"cannot be read \('\(' was never closed\)"),
        ("norm(x)", r"no function norm\(\); did you mean normalise\(\)\?"),
        ("__import__('os')", "no function __import__"),
        ("x.y", "'x.y' is not of the language"),
        ("x if y else 1", "is not of the language"),
        ("x < y < 1", "is not of the language"),
        ("[x]", "is not of the language"),
        ("'x'", "'x' is not a number"),
        ("True * x", "True is not a number"),
        ("1e999", "a number is too large"),
        ("1 / 0", "division by 0"),
        ("x / 0", "division by 0"),
        ("1e39 * x", "a number is too large"),
        ("+".join("x" * 300), "more than 100 operations inside each other"),
        ("standardise(rank(x, by=sequence), by=prompt)", "of what is compared with other tokens already"),
        ("2 > 1", "compares two numbers"),
        ("top(x)", "needs a number for fraction"),
        ("top(x, y)", "needs a number for fraction"),
        ("top(x, 0)", "a fraction above 0 and not above 1"),
        ("top(x, 0.5, 0.5)", r"top\(\) takes top\(x, fraction, by\)"),
        ("top(x, 0.5, fraction=0.5)", "is given fraction twice"),
        ("top(x, fraction=0.5, k=3)", "not k"),
        ("top(1, 0.5)", r"top\(\) of a number"),
        ("top(x, 0.5, by=3)", "by=3: is one of corpus, batch, sequence"),
        ("top(x, 0.5, by=prompt)", r"only standardise\(\) goes by labels"),
        ("top(live, 0.5, by=corpus)", "known for the batch at hand only"),
        ("standardise(top(x, 0.5, by=batch), by=corpus)", "known for the batch at hand only"),
        ("abs(x, by=corpus)", r"abs\(\) takes abs\(x\), not by"),
        ("clip(x, 2, 1)", "low not above high"),
        ("top(x, 0.5, by=corpus, by=batch)", "cannot be read|the same argument twice"),
        ("interpolate(x, 2)", "lam from 0 to 1"),
        ("normalise(x, -1)", "silent not below 0"),
        ("log(0)", r"log\(\) takes one number above 0"),
        ("log(x)", r"log\(\) takes one number above 0"),
        ("1 + signed(x)", "goes around the whole formula"),
        ("(" * 1000 + "x" + ")" * 1000, "cannot be read"),
        ("-" * 5000 + "x", "cannot be read"),
        ("x" * 20_000, "longer than 10,000 characters"),
        ("x\0", "cannot be read"),
    ],
)
def test_what_is_not_a_formula_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_what_a_formula_reads() -> None:
    node = parse("signed(standardise(reward, by=prompt)) ")
    assert (columns_of(node), labels_of(node)) == (["reward"], ["prompt"])
    node = parse("top(live - loss_a, 0.5) * sigmoid(loss_b - loss_a)")
    assert (columns_of(node), labels_of(node)) == (["loss_a", "loss_b"], [])
    assert is_live(node)
    assert waits_for_batch(node)
    static = parse("top(loss_a, 0.5, by=batch)")
    assert not is_live(static)
    assert waits_for_batch(static)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1.0),
        ("normalise(live, by=batch)", 1.0),
        ("softmax(live, by=sequence)", 1.0),
        ("interpolate(normalise(live, by=batch), 0.3)", 1.0),
        ("0.5 * normalise(live, by=batch) + 0.5 * softmax(x, by=sequence)", 1.0),
        ("normalise(x)", None),
        ("normalise(live, by=batch) * normalise(x, by=batch)", None),
        ("normalise(relu(live - 1), by=batch)", None),
        ("normalise(relu(live - 1), 1, by=batch)", 1.0),
        ("normalise(top(live - 1, 0.5), by=batch)", 1.0),
        ("normalise(top(relu(live - 1), 0.5), by=batch)", None),
        ("live", None),
        ("top(live, 0.5)", None),
    ],
)
def test_the_mean_over_a_batch_where_it_is_known(text: str, expected: float | None) -> None:
    assert mean_of(parse(text)) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss", (0, math.inf)),
        ("score", UNBOUNDED),
        ("-loss", (-math.inf, 0)),
        ("abs(score)", (0, math.inf)),
        ("abs(clip(score, -3, 2))", (0, 3)),
        ("abs(clip(score, 1, 2))", (1, 2)),
        ("loss * loss + 1", (1, math.inf)),
        ("-loss * -loss", (0, math.inf)),
        ("2 - sigmoid(score)", (1, 2)),
        ("loss / loss", (0, math.inf)),
        ("loss / score", UNBOUNDED),
        ("exp(score)", (0, math.inf)),
        ("relu(score)", (0, math.inf)),
        ("clip(loss, -1, 1)", (0, 1)),
        ("score > 1", (0, 1)),
        ("top(score, 0.5) * rank(score)", (0, 1)),
        ("standardise(loss)", UNBOUNDED),
        ("signed(standardise(loss))", UNBOUNDED),
    ],
)
def test_bounds(text: str, expected: tuple[float, float]) -> None:
    assert bounds(parse(text), lambda name: POSITIVE if name == "loss" else UNBOUNDED) == expected


def test_what_may_be_negative_is_not_normalised() -> None:
    with pytest.raises(FormulaError, match=r"normalise\(\) of what may be negative; put abs\(\)"):
        bounds(parse("normalise(score)"), lambda name: UNBOUNDED)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_formula(preset: str) -> None:
    config = WeightsConfig(preset=preset, group="prompt" if preset == "advantage" else None)
    again = WeightsConfig(formula=config.text)
    assert again.node == config.node
    assert again.is_live == (preset == "rho1")


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.live_column])
def test_live_variants_contrast_with_the_model_in_training(preset: str) -> None:
    config = WeightsConfig(preset=preset, live=True)
    assert config.is_live
    assert "(loss_short - live)" in config.text


def test_other_names_for_columns() -> None:
    names = {"loss_a": "loss_a_2", "top": "top_2", "y": "y_2"}
    assert rename("top(loss_a - top, 0.5, by=y) / y", names) == "top(loss_a_2 - top_2, 0.5, by=y_2) / y_2"
    weights = WeightsConfig(preset="dense", warmup_ratio=0.1, control="random").with_columns({"long_short": "ls"})
    assert weights.text == "interpolate(normalise(abs(ls), silent=0.0, by=sequence), 0.75)"
    assert (weights.warmup_ratio, weights.control) == (0.1, "random")


def test_settings_become_part_of_the_formula() -> None:
    config = WeightsConfig(preset="sparse", column="loss_a - loss_b", fraction=0.25, silent=1.0)
    assert config.text == "normalise(top(abs((loss_a - loss_b)), 0.25, by=sequence), silent=1.0, by=sequence)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "rho1-static", "tau": 2.0}, "--weights.tau does nothing with --weights.preset rho1-static"),
        ({"preset": "uniform", "column": "x"}, "--weights.column does nothing with --weights.preset uniform"),
        ({"formula": "x", "fraction": 0.5}, "--weights.fraction does nothing with --weights.formula"),
        ({"formula": "x", "preset": "dense"}, "exclude each other"),
        ({"formula": "top(x)"}, r"--weights.formula: 'top\(x\)': top\(\) needs a number"),
        ({"preset": "dense", "column": "a b"}, "--weights.column: 'a b': cannot be read"),
        ({"preset": "soft-threshold", "live": True}, "--weights.live is not for --weights.preset soft-threshold"),
        ({"preset": "advantage"}, "needs --weights.group"),
        ({"control": "shuffled"}, "--weights.control needs other weights"),
        ({"formula": "2", "control": "random"}, "--weights.control needs other weights"),
        ({"preset": "reward", "control": "random"}, "--weights.control random draws no negative weights"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightsConfig(**settings)


def test_the_sum_of_live_weights_must_be_known() -> None:
    settings = {"input": "set", "model": "m", "output": "run", "normalization": "weight_sum"}
    with pytest.raises(ValueError, match="--normalization weight_sum needs the sum of the weights before"):
        TrainConfig(**settings, weights=WeightsConfig(preset="longce", live=True))
    assert TrainConfig(**settings, weights=WeightsConfig(preset="rho1")).weights.is_live
