"""Files of settings that once ended in a traceback, or were read otherwise than written."""

from argparse import ArgumentError
from pathlib import Path

import pytest

from weighted_mtp.pipelines.cli.parser import COMMANDS, parse_arguments
from weighted_mtp.pipelines.cli.usage import describe_usage_error
from weighted_mtp.schemas.configs import TrainConfig

REQUIRED = "input: [a]\nmodel: b\noutput: c\n"


def refused(file: Path, text: str) -> str:
    """The error of `wmtp train` with a file of settings."""
    file.write_text(text)
    arguments = ["train", "--config", str(file)]
    with pytest.raises(ArgumentError) as caught:
        parse_arguments(arguments)
    return describe_usage_error(caught.value, arguments, "train", COMMANDS)


def test_a_null_character_in_place_of_a_group_of_settings(tmp_path: Path) -> None:
    shown = refused(tmp_path / "run.yaml", f'{REQUIRED}heads: "\\0"\n')
    assert shown == f"--config {tmp_path}/run.yaml: not valid YAML (embedded null byte); correct the file"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 0100", "'0100' is read as a number that is not decimal; put it in quotes"),
        ("max_steps: 1:30", "'1:30' is read as a number that is not decimal; put it in quotes"),
        ("seed: 1\nseed: 1", "'seed' is set twice"),
        ("weights: {preset: dense}\nweights: {silent: 1}", "'weights' is set twice"),
        ("weights: {preset: dense, preset: sparse}", "'preset' is set twice"),
        ("weights.silent: 1\nweights: {preset: dense}", "'weights.silent' is set twice"),
    ],
)
def test_settings_have_one_meaning(text: str, problem: str, tmp_path: Path) -> None:
    shown = refused(tmp_path / "run.yaml", REQUIRED + text)
    assert "not valid YAML (line " in shown
    assert problem in shown


def test_settings_that_only_look_alike(tmp_path: Path) -> None:
    text = "input: [a]\nmodel: b\noutput: '0100'\nseed: 10\nweights: {preset: dense, lam: 0.25}\nheads.offsets: [1]\n"
    (tmp_path / "run.yaml").write_text(text)
    _, config = parse_arguments(["train", "--config", str(tmp_path / "run.yaml")])
    assert isinstance(config, TrainConfig)
    assert (config.seed, config.weights.lam, config.heads.offsets, str(config.output)) == (10, 0.25, (1,), "0100")


def test_values_cannot_control_the_terminal(tmp_path: Path) -> None:
    shown = refused(tmp_path / "run.yaml", REQUIRED + 'seed: "\\e]0;own\\a\\e[31mfoo\\u202e"\n')
    assert shown.isprintable()
    assert r"not '\x1b]0;own" in shown
