"""What the settings of all commands have in common: their base, and types of several of them."""

import keyword
import os.path
import re
from fractions import Fraction as Exact
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from weighted_mtp.schemas.storage.locations import LocationSetting


def split_paths(value: Any) -> Any:
    """One path, or several as a list or with commas between them, as a list. A directory may have a comma in its name.

    Raises:
        ValueError: a comma without a path before and after it.
    """
    if isinstance(value, str) and "," in value and not os.path.isdir(value):
        value = [part.strip() for part in value.split(",")]
        if not all(value):
            raise ValueError("should have a path on both sides of every comma")
    return value if isinstance(value, list | tuple) else [value]


def exact(share: float) -> Exact:
    """The decimal number that was written, not the binary one nearest to it."""
    return Exact(repr(share))


def check_identifier(name: str) -> None:
    """Raise ValueError unless a name can be a part of a column's name."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"'{name}' is no name for a column; use letters, digits and underscores")


def is_taken(name: str) -> bool:
    """Whether every shard has a column of this name, or no formula can read one."""
    return name in RESERVED or keyword.iskeyword(name)


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]
ShardSets = Annotated[tuple[LocationSetting, ...], Field(min_length=1), BeforeValidator(split_paths)]
Share = Annotated[float, Field(gt=0, lt=1)]
RowLength = Annotated[int, Field(ge=2, le=1 << 24)]
Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
RESERVED = ("document_id", "start", "input_ids", "live", "corpus", "batch", "sequence")
"""What a column cannot be called: columns of every shard, and words of formulas."""


class Config(BaseModel):
    """Base of all settings: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    HELP_GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Headings of `--help` and the settings below each; the others come first."""
