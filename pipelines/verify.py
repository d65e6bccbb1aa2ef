"""`wmtp verify`: compare every byte of a shard set with its manifest."""

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.schemas.configs import VerifyConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.shard_set.verification import verify


def run(config: VerifyConfig) -> None:
    """Print one line for each fault and a summary.

    Raises:
        UserError: not a shard set, or some files are missing, truncated or altered.
    """
    manifest = read_manifest(config.set)
    console = new_console()
    checked = faults = 0
    with ProgressBar(total=manifest.bytes, unit="bytes", unit_scale=True, desc="verify", leave=False) as progress:
        for check in verify(config.set, manifest):
            checked += 1
            progress.update(check.bytes)
            if check.fault:
                faults += 1
                progress.clear()
                console.print(check.fault)
    if faults:
        raise UserError(f"{config.set}: {faults} of {checked} parts differ from the manifest; restore or rewrite them")
    size = f"{manifest.rows:,} sequences, {manifest.tokens:,} tokens, {manifest.bytes:,} bytes"
    console.print(f"{config.set}: all {checked} parts match the manifest ({size})")
