"""`wmtp verify`: compares every byte and value of a shard set with its manifest."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.schemas.configs import VerifyConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import OwnCodeError
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.verification import FileCheck, verify
from weighted_mtp.schemas.storage.files import TOKENIZER
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer
from weighted_mtp.scoring.job.finish import earlier_rejects
from weighted_mtp.scoring.tokenizer import describe_tokenizer


def run(config: VerifyConfig) -> None:
    """Print one line for each fault and a summary.

    Raises:
        UserError: not a shard set, or some files are missing, truncated or altered.
    """
    manifest = read_manifest(config.set)
    shards = ShardSet(config.set, manifest)
    console = new_console()
    parts: set[str] = set()
    faulty: set[str] = set()
    with ProgressBar(total=manifest.bytes, unit="bytes", unit_scale=True, desc="verify", leave=False) as progress:
        for check in chain(verify(config.set, manifest), check_tokenizer(shards), check_rejects(shards)):
            parts.add(check.name)
            progress.update(check.bytes)
            if check.fault:
                faulty.add(check.name)
                progress.clear()
                console.print(check.fault)
    if faulty:
        raise UserError(
            f"{config.set}: {len(faulty):,} of {len(parts):,} parts differ from the manifest; restore or rewrite them"
        )
    size = f"{manifest.rows:,} sequences, {manifest.tokens:,} tokens, {manifest.bytes:,} bytes"
    console.print(f"{config.set}: all {len(parts):,} parts match the manifest ({size})")


def check_tokenizer(shards: ShardSet) -> Iterator[FileCheck]:
    """Compare what the tokenizer does with its description in the manifest, unless it needs Python code to do it."""
    try:
        tokenizer = load_corpus_tokenizer(shards)
    except OwnCodeError:
        return
    except UserError as error:
        yield FileCheck(TOKENIZER, 0, str(error))
        return
    expected = shards.manifest.tokenizer
    found = describe_tokenizer(tokenizer, expected.name, shards.tokenizer_path)
    # Earlier versions recorded the number of tokens, which is smaller if some ids are left out.
    if expected not in (found, found.model_copy(update={"vocab_size": len(tokenizer)})):
        yield FileCheck(TOKENIZER, 0, f"{shards.tokenizer_path}: vocabulary, BOS or EOS are not those in the manifest")


def check_rejects(shards: ShardSet) -> Iterator[FileCheck]:
    """Compare the rejected sequences of a scored set with their numbers in the manifest."""
    try:
        rejects = {(reject.shard, reject.row) for reject in earlier_rejects(shards)}
    except UserError as error:
        yield FileCheck(REJECTS, 0, str(error))
        return
    if Counter(shard for shard, _ in rejects) != +Counter({s.name: s.rejects for s in shards.manifest.shards}):
        yield FileCheck(REJECTS, 0, f"{shards.path / REJECTS}: sequences differ from the numbers in the manifest")
