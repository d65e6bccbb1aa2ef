"""Fixtures shared by all tests. Everything is built here: no downloads."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
import s3fs
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from upath import UPath

from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import (
    Column,
    Condition,
    Contrast,
    CorpusInfo,
    Manifest,
    ShardEntry,
    TokenizerInfo,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import list_column, shard_name, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files
from weighted_mtp.schemas.storage.locations import Location, locate
from weighted_mtp.scoring.job.scorer import ScoringTask, load_model
from weighted_mtp.scoring.job.units import Unit, commit, find_done, new_attempt
from weighted_mtp.scoring.job.worker import ScoringWorker

PRELOADED = [
    "weighted_mtp.training.run.train",
    "weighted_mtp.pipelines.prepare",
    "s3fs",
    "pandas",
    "transformers.models.llama.modeling_llama",
]
OWN_ENVIRONMENT = "import os\nos.environ.clear()\nos.environ.update(environment)\n"

settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.load_profile("default")

# A shell that starts this in the background lets it ignore what Ctrl-C sends; tests send it to themselves and others.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of many models in vLLM last: it rewrites classes of transformers, for good, in its process."""
    items.sort(key=lambda item: item.path.name == "test_vllm_scorer.py")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level BPE tokenizer without merges: 256 byte tokens, `<s>` = 256, `</s>` = 257; adds neither itself.

    The ids of the bytes follow the sorted byte-level alphabet, so they are a permutation of the byte values.
    """
    path = tmp_path_factory.mktemp("tokenizer")
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def make_shard_set(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., ShardSet]:
    """Write a finished shard set from token ids and scores of one's own, `rows_per_shard` sequences to a shard.

    Columns named `loss_...` are said to come from a model, all others to be `loss_base - loss_reference`.
    """

    def make(
        sequences: list[list[int]],
        columns: dict[str, list[list[float]]] | None = None,
        name: str = "set",
        rows_per_shard: int = 2,
        parent: Location = tmp_path,
        sequence_columns: dict[str, list[float] | list[str]] | None = None,
        document_starts: list[int] | None = None,
    ) -> ShardSet:
        path = parent / name
        copy_files(tokenizer_dir, path / TOKENIZER)
        scores = {column: [np.array(row, np.float16) for row in rows] for column, rows in (columns or {}).items()}
        counts = {column: ValueCounts() for column in scores}
        carried = {column: pa.array(values) for column, values in (sequence_columns or {}).items()}
        starts = range(0, len(sequences), rows_per_shard)
        shards = []
        for index, start in enumerate(starts):
            rows = range(start, min(start + rows_per_shard, len(sequences)))
            lengths = np.array([len(sequences[row]) for row in rows])
            arrays = {
                "document_id": pa.array([f"doc-{row}" for row in rows]),
                "start": pa.array([document_starts[row] if document_starts else 0 for row in rows], pa.int64()),
                "input_ids": list_column(np.concatenate([np.array(sequences[r], np.int32) for r in rows]), lengths),
            }
            arrays |= {column: values.take(pa.array(rows)) for column, values in carried.items()}
            for column, values in scores.items():
                flat = np.concatenate([values[row] for row in rows])
                counts[column].add(flat)
                arrays[column] = list_column(flat, lengths)
            shards.append(write_shard(path / shard_name(index, len(starts)), pa.table(arrays)))
        condition = Condition(model="m", fingerprint="f", dtype="float32", engine="transformers", engine_version="5")
        contrast = Contrast(minuend="loss_base", subtrahend="loss_reference")
        manifest = Manifest(
            corpus=CorpusInfo(
                input="corpus.jsonl",
                text_field="text",
                max_length=max(map(len, sequences)),
                adds_bos=False,
                adds_eos=False,
                documents=len(sequences),
                rejects=0,
                sequence_columns={
                    column: "label" if pa.types.is_string(values.type) else "number"
                    for column, values in carried.items()
                },
            ),
            tokenizer=TokenizerInfo(
                name="bytes",
                fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(tokenizer_dir)),
                files_sha256=directory_digest(path / TOKENIZER),
                vocab_size=258,
                bos_token_id=256,
                eos_token_id=257,
            ),
            columns={
                column: Column(
                    origin=condition if column.startswith("loss_") else contrast, statistics=counts[column].statistics()
                )
                for column in scores
            },
            shards=shards,
            request={"command": "test"},
        )
        return finish_shard_set(path, manifest, counts)

    return make


@pytest.fixture(scope="session")
def make_model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a Llama checkpoint with random weights that matter, and the test tokenizer.

    Its heads have 32 dimensions, the fewest that vLLM supports on a CPU.
    """

    def make(seed: int = 0, **settings: int) -> Path:
        path = tmp_path_factory.mktemp("model") / f"llama-{seed}"
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
        }
        LlamaForCausalLM(LlamaConfig(**sizes | settings, initializer_range=0.2)).save_pretrained(path)
        shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
        return path

    return make


@pytest.fixture(scope="session")
def start_process() -> Callable[..., BaseProcess]:
    """`start_process(script, environment=None, **variables)` runs a script with global variables in a clean process.

    It has this process's environment and `environment`. What takes seconds is imported already.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(script: str, environment: dict[str, str] | None = None, **variables: object) -> BaseProcess:
        variables["environment"] = {**os.environ, **(environment or {})}
        process = context.Process(target=exec, args=(OWN_ENVIRONMENT + script, variables), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def score_in_process() -> Callable[..., None]:
    """What can stand for `score_missing`: its worker is in this process, which Ray takes seconds to start.

    It loads engines with `load`.
    """

    def score(task: ScoringTask, shards: list[ShardEntry], *_: object, load: Callable = load_model) -> None:
        worker = ScoringWorker(pickle.loads(pickle.dumps(task)), load)
        done = find_done(task.output, shards)
        units = [Unit(shard, new_attempt(shard.name)) for shard in shards if shard.name not in done]
        for outcome in [worker.start(), *map(worker.score, units)]:
            if outcome.error:
                raise outcome.error
            assert outcome.kind == "done"
        for unit in units:
            commit(task.output, unit.attempt)

    return score


@pytest.fixture
def score_here(score_in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[ScoringTask]:
    """Let the worker of a run be in this process; gives the tasks that it had."""
    tasks: list[ScoringTask] = []

    def score(task: ScoringTask, *rest: object) -> None:
        tasks.append(task)
        score_in_process(task, *rest)

    monkeypatch.setattr("weighted_mtp.scoring.job.run.score_missing", score)
    return tasks


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skip where vLLM is not installed, except in CI: there it must be."""
    if find_spec("vllm") is None:
        assert not os.environ.get("CI"), "CI must run with vLLM: install weighted-mtp[cpu]"
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Address of a bucket on an S3 server of our own, which this process and those it starts will use.

    The server is a process of its own: vLLM touches every object of every module, which those of web servers dislike.
    Its listings have pages of ten objects, so that few are enough to fill several.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "10"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_server(port)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.kill()
    server.wait()


def wait_for_server(port: int) -> None:
    """Return once something listens at a port of this machine."""
    for _ in range(600):
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")


@pytest.fixture
def count_received(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Call it to start counting: the list it returns gets the bytes of content of every answer of the store."""

    def start() -> list[int]:
        received: list[int] = []
        call = s3fs.S3FileSystem._call_s3

        async def count(self: s3fs.S3FileSystem, method: str, *args: object, **kwargs: object) -> dict:
            answer = await call(self, method, *args, **kwargs)
            received.append(answer["ContentLength"] if method == "get_object" else 0)
            return answer

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
        return received

    return start


@pytest.fixture
def s3(bucket: str) -> UPath:
    """A directory in an object store in which nothing is yet."""
    return locate(f"{bucket}/{uuid4().hex}")
