"""Field types that several commands share."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from weighted_mtp.schemas.configs import EvaluateConfig, PrepareConfig, ScoreConfig, TrainConfig, WeightsConfig
from weighted_mtp.schemas.configs.common import (
    RESERVED,
    Config,
    Positive,
    check_identifier,
    exact,
    is_reserved,
    split_paths,
)
from weighted_mtp.schemas.errors import SettingsError, UserError


class Example(Config):
    count: Positive = 1
    share: float = 0.5


def test_paths_are_split_at_commas_unless_a_directory_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").mkdir()
    assert split_paths("a, b") == ["a", "b"]
    assert split_paths("x,y") == ["x,y"]
    assert split_paths("a") == ["a"]
    assert split_paths(["a,b"]) == ["a,b"], "a list is taken as it is"
    for wrong in ("a,", ",a", "a,,b"):
        with pytest.raises(ValueError, match="should have a path on both sides of every comma"):
            split_paths(wrong)


def test_shares_are_the_decimals_that_were_written() -> None:
    assert exact(0.1) + exact(0.2) == Fraction(3, 10)
    assert sum(map(exact, [0.1] * 10)) == 1 != sum([0.1] * 10)


@pytest.mark.parametrize("name", ["a", "_", "loss_2", "Class"])
def test_names_of_columns(name: str) -> None:
    check_identifier(name)
    assert not is_reserved(name)


@pytest.mark.parametrize("name", ["", "2a", "a-b", "a b", "é", "a\n"])
def test_what_is_no_name_of_a_column(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid column name; use letters, digits and underscores"):
        check_identifier(name)


def test_names_of_columns_are_short() -> None:
    check_identifier("a" * 200)
    with pytest.raises(ValueError, match=r"'a{20}\.\.\.' is too long for a column name; use at most 200 characters"):
        check_identifier("a" * 201)


@pytest.mark.parametrize("name", [*RESERVED, "class", "in", "None"])
def test_reserved_names(name: str) -> None:
    assert is_reserved(name)


def test_settings_are_immutable_finite_and_known() -> None:
    example = Example()
    with pytest.raises(ValidationError, match="frozen"):
        example.count = 2
    for wrong in ({"count": 0}, {"share": float("nan")}, {"share": float("inf")}, {"other": 1}):
        with pytest.raises(ValidationError):
            Example.model_validate(wrong)


def test_a_call_with_wrong_settings_raises_one_line() -> None:
    for settings, message in (
        ({"count": 0}, "Example: count: Input should be greater than 0"),
        ({"other": 1, "another": 2}, "Example: other: Extra inputs are not permitted"),
    ):
        with pytest.raises(SettingsError) as caught:
            Example(**settings)
        assert str(caught.value) == message
    with pytest.raises(UserError, match=r"^WeightsConfig: --weights\.lam has no effect with"):
        WeightsConfig(lam=0.5)
    with pytest.raises(UserError, match=r"^TrainConfig: weights\.fraction: Input should be less"):
        TrainConfig(input="a", model="b", output="c", weights={"fraction": 2})


def test_a_name_may_be_a_path() -> None:
    paths: dict[str, Any] = {name: Path(name) for name in ("input", "tokenizer", "output", "reference", "model")}

    def chosen(*names: str) -> dict[str, Any]:
        return {name: paths[name] for name in names}

    assert PrepareConfig(**chosen("input", "tokenizer", "output")).input == "input"
    assert ScoreConfig(**chosen("input", "output", "reference")).reference == "reference"
    assert EvaluateConfig(**chosen("input", "model")).model == "model"
    assert TrainConfig(**chosen("input", "output", "model"), mix={Path("more"): 0.5}).mix == {"more": 0.5}
