"""`wmtp verify`: compare every byte of a shard set with its manifest."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from tqdm import tqdm
from transformers import AutoTokenizer

from schemas.configs import VerifyConfig
from schemas.errors import UserError
from schemas.fingerprints import tokenizer_fingerprint
from schemas.manifest import Manifest, read_manifest
from schemas.shard_set import TOKENIZER, FileCheck, verify


def run(config: VerifyConfig) -> None:
    """Print one line for each fault and a summary.

    Raises:
        UserError: not a shard set, or at least one of its parts is missing, truncated or altered.
    """
    manifest = read_manifest(config.set)
    total = sum(shard.bytes for shard in manifest.shards)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    checked = faults = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", leave=False) as progress:
        for check in checks(config.set, manifest):
            checked += 1
            progress.update(check.bytes)
            if check.fault:
                faults += 1
                progress.clear()
                console.print(check.fault)
    if faults:
        raise UserError(f"{config.set}: {faults} of {checked} parts differ from the manifest; restore or rewrite them")
    size = f"{manifest.rows:,} sequences, {manifest.tokens:,} tokens, {total:,} bytes"
    console.print(f"{config.set}: all {checked} parts are what the manifest says ({size})")


def checks(path: Path, manifest: Manifest) -> Iterator[FileCheck]:
    """Check shards, statistics and tokenizer."""
    yield from verify(path, manifest)
    yield FileCheck(TOKENIZER, 0, check_tokenizer(path / TOKENIZER, manifest.tokenizer.fingerprint))


def check_tokenizer(directory: Path, fingerprint: str) -> str | None:
    """What is wrong with the tokenizer of a set, None when it maps text to ids as it did for the corpus."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError):
        return f"{directory}: missing or damaged tokenizer"
    same = tokenizer_fingerprint(tokenizer) == fingerprint
    return None if same else f"{directory}: not the tokenizer of the corpus (fingerprint)"
