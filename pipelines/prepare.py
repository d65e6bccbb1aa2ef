"""`wmtp prepare`: turns a corpus into token shards."""

import time

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.text import describe_files
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.scoring.corpus.writer import CorpusCounts


def run(config: PrepareConfig) -> ShardSet:
    """Tokenise a corpus with a progress bar, and print a summary.

    Raises:
        UserError: the corpus, the tokenizer or the output cannot be used.
    """
    started = time.monotonic()
    counts: CorpusCounts | None = None
    with ProgressBar(unit="tokens", unit_scale=True, desc="prepare", delay=1e-9) as bar:

        def show(current: CorpusCounts) -> None:
            nonlocal counts
            counts = current
            bar.set_postfix_str(f"{counts.documents:,} documents", refresh=False)
            bar.update(counts.tokens - bar.n)

        prepared = prepare(config, show)
    if counts is not None:
        print_summary(prepared, counts, time.monotonic() - started)
    else:
        new_console().print(f"{config.output} is already complete: {prepared.manifest.tokens:,} tokens")
    return prepared


def print_summary(prepared: ShardSet, counts: CorpusCounts, seconds: float) -> None:
    """Print the result and the next command."""
    manifest = prepared.manifest
    table = Table(title=str(prepared.path), show_header=False, title_justify="left")
    if counts.files:
        table.add_row("files", f"{counts.files:,}")
    table.add_row("documents", f"{counts.documents:,}")
    table.add_row("sequences", f"{counts.sequences:,} of at most {manifest.corpus.max_length:,} tokens")
    table.add_row("tokens", f"{counts.tokens:,} ({counts.text_bytes / counts.tokens:.2f} bytes of text each)")
    if manifest.corpus.sequence_columns:
        table.add_row("of each sequence", manifest.corpus.describe_columns())
    table.add_row("shards", f"{len(manifest.shards):,} ({manifest.bytes / counts.tokens:.2f} bytes/token on disk)")
    table.add_row(
        "BOS, EOS",
        ", ".join("added" if a else "not added" for a in (manifest.corpus.adds_bos, manifest.corpus.adds_eos)),
    )
    if counts.with_special_tokens:
        became = "control tokens" if manifest.corpus.special_tokens == "parse" else "ordinary text"
        documents = f"{counts.with_special_tokens:,} of the documents"
        table.add_row("special tokens", f"in the text of {documents}, where they became {became}")
    if counts.double_bos:
        documents = f"{counts.double_bos:,} of the documents"
        table.add_row("two BOS", f"at the start of {documents}; see --special_tokens and --bos")
    table.add_row(
        "rejected rows", f"{counts.rejected:,}" + (f", see {prepared.path / REJECTS}" if counts.rejected else "")
    )
    for kind, count in sorted(counts.rejects.items(), key=lambda item: -item[1])[:5]:
        table.add_row("", f"{count:,} x {kind}")
    table.add_row("time", f"{seconds:,.1f} s, {counts.tokens / seconds:,.0f} tokens/s")
    console = new_console()
    console.print(table)
    if counts.left_out:
        console.print(f"left out {describe_files(counts.left_out)}")
    console.print(shell_command("next: wmtp score --input {} --output SCORED --reference MODEL", prepared.path))
