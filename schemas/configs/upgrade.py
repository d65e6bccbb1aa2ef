"""Settings of `wmtp upgrade`."""

from pydantic import Field

from weighted_mtp.schemas.configs.common import Config
from weighted_mtp.schemas.storage.locations import LocationSetting


class UpgradeConfig(Config):
    """Convert a shard set of an older format."""

    set: LocationSetting = Field(description="shard set of format 3; it stays as it is")
    output: LocationSetting = Field(description="directory of the converted set")
