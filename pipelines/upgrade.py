"""`wmtp upgrade`: converts a shard set of an older format."""

from weighted_mtp.schemas.configs import UpgradeConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.upgrade import upgrade


def run(config: UpgradeConfig) -> ShardSet:
    """Convert a set with a progress bar, and print its size.

    Raises:
        UserError: not a set of the older format, a damaged one, or an unsuitable output.
    """
    with ProgressBar(unit="tokens", unit_scale=True, desc="upgrade", leave=False) as bar:

        def show(shard: ShardEntry) -> None:
            bar.update(shard.tokens)

        upgraded = upgrade(config.set, config.output, show)
    manifest = upgraded.manifest
    print(f"{config.output}: {manifest.tokens:,} tokens, {', '.join(manifest.columns) or 'no scores'}")
    return upgraded
