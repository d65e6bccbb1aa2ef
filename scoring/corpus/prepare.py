"""Preparing a corpus: from files to a token shard set.

The result depends only on the corpus and the settings, not on the number of workers. A failed run leaves nothing
behind. A killed run starts over when repeated.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.configs.prepare import BYTE_TOKENIZER
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import load_tokenizer
from weighted_mtp.schemas.shard_set.fingerprints import digest_json, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import MOST_TOKEN_IDS, CorpusInfo, Manifest, find_clash
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, find_finished, finish_shard_set
from weighted_mtp.schemas.storage.claims import claim_empty_output, clear_directory
from weighted_mtp.schemas.storage.files import MANIFEST, TOKENIZER
from weighted_mtp.schemas.storage.locations import Location, kind_of, local_name, locate, resolve
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.scoring.corpus.byte_tokenizer import make_byte_tokenizer
from weighted_mtp.scoring.corpus.documents import Fields
from weighted_mtp.scoring.corpus.process_pool import map_in_order
from weighted_mtp.scoring.corpus.readers import read_batches
from weighted_mtp.scoring.corpus.source_files import CorpusFile, Source, Sources, find_sources
from weighted_mtp.scoring.corpus.special_tokens import AddedTokens, added_ids, check_text_mode, choose_added_tokens
from weighted_mtp.scoring.corpus.tokenization import BatchEncoder
from weighted_mtp.scoring.corpus.writer import CorpusCounts, write_shards
from weighted_mtp.scoring.tokenizer import count_ids, describe_tokenizer, save_tokenizer

Report = Callable[[CorpusCounts], None]


def prepare(config: PrepareConfig, report: Report = lambda counts: None) -> ShardSet:
    """Tokenise a corpus into a shard set, unless `config.output` already holds the result.

    Args:
        config: all settings.
        report: receives the running totals after every batch. Not called if there is nothing to do.

    Raises:
        UserError: the corpus, the tokenizer or the output cannot be used.
    """
    check_outside(config.output, config.input)
    if clash := find_clash((*config.number_fields, *config.label_fields)):
        raise UserError(f"--number_fields and --label_fields: {clash}; rename fields of the corpus, or choose fewer")
    sources = find_sources(config.input, config.format, config.subset, config.split)
    with exclusive(config.output) as held:
        tokenizer = find_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        if (ids := count_ids(tokenizer)) > MOST_TOKEN_IDS:
            raise UserError(
                f"--tokenizer {config.tokenizer}: has the token id {ids - 1:,}; use one with ids below "
                f"{MOST_TOKEN_IDS:,}"
            )
        added = choose_added_tokens(tokenizer, config.bos, config.append_eos)
        if config.special_tokens == "text":
            check_text_mode(tokenizer)
        request = describe_request(config, tokenizer, added, sources.read)
        if finished := find_finished(config.output, request):
            return finished
        claim_empty_output(config.output, request)
        try:
            return write_shard_set(config, tokenizer, added, sources, request, report)
        except BaseException:
            # The run cannot be continued, and its claim would block corrected settings.
            if held() and not (config.output / MANIFEST).exists():
                clear_directory(config.output)
            raise


def find_tokenizer(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `--tokenizer`, or make that of bytes.

    Raises:
        UserError: it cannot be loaded.
    """
    if name == BYTE_TOKENIZER:
        return make_byte_tokenizer()
    return load_tokenizer(
        local_name(name),
        f"--tokenizer {name}: cannot be loaded",
        "give a directory written by save_pretrained or a Hugging Face id",
        trust_remote_code=trust_remote_code,
    )


def check_outside(output: Location, corpus: str) -> None:
    """Raise UserError if `output` lies inside the directory of the corpus: its shards would become input."""
    path = locate(corpus)
    if resolve(path) in resolve(output).parents and kind_of(path) == "directory":
        raise UserError(f"--output {output}: lies inside --input {path}; choose a directory outside it")


def describe_request(
    config: PrepareConfig, tokenizer: PreTrainedTokenizerBase, added: AddedTokens, sources: list[Source]
) -> str:
    """Settings and inputs that determine the result, as JSON."""
    request: dict[str, Any] = {
        "command": "prepare",
        **config.model_dump(mode="json", exclude={"tokenizer", "output", "workers", "trust_remote_code"}),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "added": added._asdict(),
        "sources": digest_json([source.describe() for source in sources]),
    }
    return json.dumps(request, indent=2)


def write_shard_set(
    config: PrepareConfig,
    tokenizer: PreTrainedTokenizerBase,
    added: AddedTokens,
    sources: Sources,
    request: str,
    report: Report,
) -> ShardSet:
    """Write tokenizer, shards and manifest into the claimed directory `config.output`."""
    save_tokenizer(tokenizer, config.output / TOKENIZER)
    prefix, suffix = added_ids(tokenizer, added)
    fields = Fields(config.text_field, config.id_field, config.number_fields, config.label_fields)
    encoded = map_in_order(
        BatchEncoder(
            tokenizer, prefix, suffix, config.max_length, fields, config.special_tokens, config.max_document_bytes
        ),
        read_batches(sources.read, fields, config.sample_by, config.max_document_bytes),
        workers=config.workers or len(os.sched_getaffinity(0)),
        preload="weighted_mtp.scoring.corpus.tokenization",
    )
    files = sum(isinstance(source, CorpusFile) for source in sources.read)
    counts = CorpusCounts(files=files, left_out=sources.left_out)
    given_ids = config.id_field is not None
    entries = write_shards(config.output, encoded, config.shard_tokens, counts, report, given_ids=given_ids)
    manifest = Manifest(
        corpus=CorpusInfo(
            input=config.input,
            text_field=config.text_field,
            max_length=config.max_length,
            adds_bos=added.bos,
            adds_eos=added.eos,
            documents=counts.documents,
            rejects=counts.rejected,
            sequence_columns=fields.columns,
            special_tokens=config.special_tokens,
            largest_id=counts.largest_id,
        ),
        tokenizer=describe_tokenizer(tokenizer, config.tokenizer, config.output / TOKENIZER),
        shards=entries,
        request=json.loads(request),
    )
    return finish_shard_set(config.output, manifest, {})
