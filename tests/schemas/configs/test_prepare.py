"""The settings of `wmtp prepare`: names of columns."""

from typing import Any

import pytest

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.errors import UserError

SETTINGS = {"input": "corpus.jsonl", "tokenizer": "t", "output": "tokens"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"number_fields": ("a-b",)}, "'a-b' is not a valid column name"),
        ({"label_fields": ("input_ids",)}, "'input_ids' is reserved by wmtp; rename the field"),
        ({"label_fields": ("lambda",)}, "'lambda' is reserved by wmtp"),
        *[
            ({"number_fields": (name,)}, f"'{name}' is reserved by wmtp")
            for name in ("loss_a", "entropy_a", "gradient_a", "excess_loss_2", "long_short")
        ],
        ({"number_fields": ("a",), "label_fields": ("a",)}, "name 'a' twice; name each field once"),
        ({"input": ""}, "a path should not be empty"),
        ({"max_length": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PrepareConfig(**SETTINGS | settings)


def test_names_that_only_resemble_those_of_scores() -> None:
    config = PrepareConfig(**SETTINGS, number_fields=("my_loss_a",), label_fields=("loss", "entropy"))
    assert (config.number_fields, config.label_fields) == (("my_loss_a",), ("loss", "entropy"))
