"""Settings of `wmtp import`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from weighted_mtp.schemas.configs.common import Config, split_paths
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting


def split_names(value: Any) -> Any:
    """Convert comma-separated names to a list."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


ScoreFiles = Annotated[tuple[NameSetting, ...], Field(min_length=1), BeforeValidator(split_paths)]
ColumnNames = Annotated[tuple[str, ...], BeforeValidator(split_names)]


class ImportConfig(Config):
    """Add columns that other tools computed to a shard set."""

    input: LocationSetting = Field(description="shard set; its columns are kept")
    scores: ScoreFiles = Field(
        description="Parquet or JSON Lines files with document_id, start and scores: files separated by commas, "
        "directories or globs"
    )
    output: LocationSetting = Field(description="directory of the new shard set")
    columns: ColumnNames = Field((), description="columns to add, separated by commas; default all of the files")
