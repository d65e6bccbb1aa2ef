"""`wmtp prepare`: a corpus to token shards.

The result depends on the corpus and the settings alone, not on the number of workers. A run that does not end well
leaves nothing behind; one that was killed starts over when it is repeated.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.fingerprints import digest_json, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import CorpusInfo, Manifest
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet, find_finished, finish_shard_set
from weighted_mtp.schemas.storage.files import MANIFEST, TOKENIZER, claim_output, clear_directory
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.scoring.corpus.documents import Fields
from weighted_mtp.scoring.corpus.process_pool import map_in_order
from weighted_mtp.scoring.corpus.readers import read_batches
from weighted_mtp.scoring.corpus.sources import Source, find_sources
from weighted_mtp.scoring.corpus.tokenization import BatchEncoder, EncodedBatch
from weighted_mtp.scoring.corpus.tokenizer import (
    choose_added_tokens,
    describe_tokenizer,
    ids_around,
    load_tokenizer,
    save_tokenizer,
)
from weighted_mtp.scoring.corpus.writer import Tally, write_shards


def run(config: PrepareConfig) -> ShardSet:
    """Tokenise a corpus.

    Raises:
        UserError: the corpus, the tokenizer or the output is not as it must be.
    """
    sources = find_sources(config)
    with exclusive(config.output) as held:
        return prepare(config, sources, held)


def prepare(config: PrepareConfig, sources: list[Source], held: Callable[[], bool]) -> ShardSet:
    """Tokenise `sources` into an output directory that no other process writes as long as `held`."""
    started = time.monotonic()
    tokenizer = load_tokenizer(config.tokenizer)
    added = choose_added_tokens(tokenizer, config.bos, config.append_eos)
    settings = config.model_dump(mode="json", exclude={"tokenizer", "output", "workers"})
    request = json.dumps(
        {
            "command": "prepare",
            **settings,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "added": added._asdict(),
            "sources": digest_json([source.describe() for source in sources]),
        },
        indent=2,
    )
    if finished := find_finished(config.output, request):
        print(f"{config.output} is already complete: {finished.manifest.tokens:,} tokens")
        return finished
    if claim_output(config.output, request):
        clear_directory(config.output)
        claim_output(config.output, request)
    try:
        save_tokenizer(tokenizer, config.output / TOKENIZER)
        prefix, suffix = ids_around(tokenizer, added)
        fields = Fields.of(config)
        encoder = BatchEncoder(tokenizer, prefix, suffix, config.max_length, fields)
        workers = config.workers or len(os.sched_getaffinity(0))
        encoded = map_in_order(
            encoder, read_batches(sources, config), workers, "weighted_mtp.scoring.corpus.tokenization"
        )
        entries, tally = write_shards(config.output, with_progress(encoded), config.shard_tokens)
        manifest = Manifest(
            corpus=CorpusInfo(
                input=config.input,
                text_field=config.text_field,
                max_length=config.max_length,
                adds_bos=added.bos,
                adds_eos=added.eos,
                documents=tally.documents,
                rejects=tally.rejected,
                sequence_columns=fields.columns,
            ),
            tokenizer=describe_tokenizer(tokenizer, config.tokenizer, config.output / TOKENIZER),
            shards=entries,
            request=json.loads(request),
        )
        prepared = finish_shard_set(config.output, manifest, {})
    except BaseException:
        # Nothing here can be continued, and the claim would refuse the settings that the user corrects next.
        if held() and not (config.output / MANIFEST).exists():
            clear_directory(config.output)
        raise
    print_summary(prepared, tally, time.monotonic() - started)
    return prepared


def with_progress(batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """Show documents, tokens and tokens per second on the way."""
    documents = 0
    with ProgressBar(unit="tok", unit_scale=True, desc="prepare") as bar:
        for batch in batches:
            documents += batch.documents
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(batch.tokens)
            yield batch


def print_summary(prepared: ShardSet, tally: Tally, seconds: float) -> None:
    """Print what was written and the next command."""
    manifest = prepared.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    table = Table(title=str(prepared.path), show_header=False, title_justify="left")
    table.add_row("documents", f"{tally.documents:,}")
    table.add_row("sequences", f"{tally.sequences:,} of at most {manifest.corpus.max_length:,} tokens")
    table.add_row("tokens", f"{tally.tokens:,} ({tally.text_bytes / tally.tokens:.2f} bytes of text each)")
    if manifest.corpus.sequence_columns:
        table.add_row("of each sequence", manifest.corpus.describe_columns())
    table.add_row("shards", f"{len(manifest.shards):,} ({size / tally.tokens:.2f} bytes/token on disk)")
    table.add_row(
        "BOS, EOS",
        ", ".join("added" if a else "not added" for a in (manifest.corpus.adds_bos, manifest.corpus.adds_eos)),
    )
    table.add_row(
        "rejected rows", f"{tally.rejected:,}" + (f", see {prepared.path / REJECTS}" if tally.rejected else "")
    )
    for kind, count in sorted(tally.rejects.items(), key=lambda item: -item[1])[:5]:
        table.add_row("", f"{count:,} x {kind}")
    table.add_row("time", f"{seconds:,.1f} s, {tally.tokens / seconds:,.0f} tokens/s")
    console = new_console()
    console.print(table)
    console.print(f"next: wmtp score --input {prepared.path} --output SCORED --reference MODEL")
