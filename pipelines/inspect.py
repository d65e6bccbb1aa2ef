"""`wmtp inspect`: show the content of a shard set, with the highest and lowest scoring tokens in their text."""

from weighted_mtp.pipelines.reports.pages import check_page, show
from weighted_mtp.pipelines.reports.shard_set_report import build_report
from weighted_mtp.schemas.configs import InspectConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet


def run(config: InspectConfig) -> None:
    """Print the report, and write it as an HTML page if requested."""
    check_page(config.html)
    shards = ShardSet.open(config.set)
    show(build_report(shards, config.column, config.samples), config.html)
