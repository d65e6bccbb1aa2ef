"""Base class of all settings, and field types shared by several commands."""

import keyword
import os.path
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from weighted_mtp.schemas.errors import SettingsError, first_line
from weighted_mtp.schemas.storage.locations import LocationSetting, NameText, expand_home, locate

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # has no public name


def split_paths(value: Any) -> Any:
    """Convert a path, comma-separated paths or a list of paths to a list. Names of directories may contain commas.

    Raises:
        ValueError: a comma without a path on both sides.
    """
    if isinstance(value, str) and "," in value and not os.path.isdir(value):
        value = [part.strip() for part in value.split(",")]
        if not all(value):
            raise ValueError("should have a path on both sides of every comma")
    return value if isinstance(value, list | tuple) else [value]


def exact(share: float) -> Fraction:
    """The shortest decimal number that rounds to `share`, as written by the user, not its binary value."""
    return Fraction(repr(share))


def check_mix(mix: dict[str, float]) -> dict[str, float]:
    """Check shard sets and their shares of the rows, and expand `~` in their paths.

    Raises:
        ValueError: the shares leave no rows for the set that is not among them, or a name is not a location.
    """
    if sum(map(exact, mix.values())) >= 1:
        raise ValueError("shares should sum to less than 1, to leave some rows for the first set")
    for name in mix:
        for path in split_paths(name):
            locate(path)
    return {",".join(map(expand_home, split_paths(name))): share for name, share in mix.items()}


def check_identifier(name: str) -> None:
    """Raise ValueError unless `name` can be a column name, or part of one."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"'{name}' is not a valid column name; use letters, digits and underscores")
    if len(name) > MOST_NAME:
        raise ValueError(f"'{name[:20]}...' is too long for a column name; use at most {MOST_NAME} characters")


def is_reserved(name: str) -> bool:
    """Whether `name` is reserved for shards or formulas, or is a Python keyword, which formulas cannot contain."""
    return name in RESERVED or keyword.iskeyword(name)


Positive = Annotated[int, Field(gt=0)]
EngineChoice = Literal["auto", "vllm", "transformers"]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]
ShardSets = Annotated[tuple[LocationSetting, ...], Field(min_length=1), BeforeValidator(split_paths)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
Mix = dict[NameText, ProperFraction]
"""Names of shard sets, as in `ShardSets`, and the share of the rows that each gives. See `check_mix`."""
EvaluatedTokens = Annotated[int, Field(ge=2)]
RowLength = Annotated[int, Field(ge=2, le=1 << 24)]
Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
MOST_NAME = 200
"""Longest name given for a column, or for part of one. Names in the manifest have at most 255 characters."""
RESERVED = ("document_id", "start", "input_ids", "live", "corpus", "batch", "sequence")
"""Reserved column names: columns of every shard, and keywords of formulas."""


class _OneLineErrors(ModelMetaclass):
    """Calls of a class raise SettingsError. `model_validate` raises ValidationError, also for nested settings."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise SettingsError(f"{self.__name__}: {first_line(error)}") from error


class Config(BaseModel, metaclass=_OneLineErrors):
    """Base of all settings: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    HELP_GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Headings of `--help` and the settings under each. Other settings come first."""
