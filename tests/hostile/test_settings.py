"""Files of settings that once ended in a traceback."""

from argparse import ArgumentError
from pathlib import Path

import pytest

from weighted_mtp.pipelines.cli.parser import COMMANDS, parse_arguments
from weighted_mtp.pipelines.cli.usage import describe_usage_error


def test_a_null_character_in_place_of_a_group_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('input: [a]\nmodel: b\noutput: c\nheads: "\\0"\n')
    arguments = ["train", "--config", str(file)]
    with pytest.raises(ArgumentError) as caught:
        parse_arguments(arguments)
    shown = describe_usage_error(caught.value, arguments, "train", COMMANDS)
    assert shown == f"--config {file}: not valid YAML (embedded null byte); correct the file"
