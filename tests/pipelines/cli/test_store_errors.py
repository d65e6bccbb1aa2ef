"""Errors of an object store end in one line."""

import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import s3fs
from upath import UPath

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import locate
from weighted_mtp.scoring.corpus import writer

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def changed_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment changes that reach the client of the store."""
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    """The last line on stderr of a command line that fails with `status`."""
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(params=["verify", "list", "--input", "--tokenizer", "--output"])
def arguments(request: pytest.FixtureRequest, s3: UPath, tokenizer_dir: Path, tmp_path: Path) -> list[str]:
    """Command lines with one store address each."""
    if not request.param.startswith("-"):
        return [request.param, str(s3 / "set")]
    (tmp_path / "a.txt").write_text("text")
    given = {"--input": tmp_path / "a.txt", "--tokenizer": tokenizer_dir, "--output": tmp_path / "out"}
    given[request.param] = s3 / "thing.txt"
    return ["prepare", *(str(word) for setting in given.items() for word in setting)]


def test_missing_credentials_say_what_to_set(
    arguments: list[str], changed_store: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        changed_store.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        changed_store.setenv(name, str(tmp_path / "none"))
    line = complaint(arguments, capsys)
    assert "s3://bucket/" in line
    assert "Unable to locate credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line


def test_wrong_credentials_are_one_line(
    arguments: list[str], changed_store: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_access_after("0")
    try:
        line = complaint(arguments, capsys)
    finally:
        check_access_after("inf")
    assert "s3://bucket/" in line
    assert "; check the credentials and their permissions" in line


def test_a_shard_that_the_store_refuses_is_not_called_damaged(
    make_shard_set: Callable[..., ShardSet], s3: UPath
) -> None:
    shards = make_shard_set(SEQUENCES, parent=s3)
    check_access_after("0")
    try:
        with pytest.raises(PermissionError):
            shards.read(0)
    finally:
        check_access_after("inf")


@pytest.mark.parametrize("arguments", ["list"], indirect=True)
def test_an_endpoint_that_does_not_answer_is_one_line(
    arguments: list[str], changed_store: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        changed_store.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        line = complaint(arguments, capsys)
    assert "Could not connect to the endpoint URL" in line
    assert "AWS_ENDPOINT_URL" in line


def test_a_bucket_that_is_not_there_is_one_line(
    bucket: str, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    output = f"{bucket}-elsewhere/out"
    words = ["prepare", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer_dir), "--output", output]
    line = complaint(words, capsys)
    assert line.startswith(f"wmtp prepare: error: {output}")
    assert line.endswith("The specified bucket does not exist; check the address, and that the bucket exists")
    assert "no such shard set" in complaint(["verify", output], capsys)


def test_a_bucket_that_goes_away_under_a_run_is_one_line(
    bucket: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = locate("s3://vanishing/out")
    output.fs.mkdir("vanishing")
    write = writer.write_shard

    def vanish(*arguments: object) -> object:
        output.fs.rm("vanishing", recursive=True)
        return write(*arguments)

    monkeypatch.setattr(writer, "write_shard", vanish)
    (tmp_path / "a.txt").write_text("text")
    words = ["prepare", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer_dir)]
    line = complaint([*words, "--output", str(output), "--workers", "1"], capsys)
    assert line.startswith("wmtp prepare: error: s3://vanishing/out")
    assert "bucket does not exist" in line


def test_a_store_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    words = ["prepare", "--input", "gs://bucket/a.txt", "--tokenizer", "t", "--output", "out"]
    line = complaint(words, capsys, status=2)
    assert line.startswith("wmtp prepare: error: --input: gs:// cannot be used here")
    assert "install 'weighted-mtp[gcs]'; see 'wmtp prepare --help'" in line
    line = complaint(["verify", "nowhere://bucket/set"], capsys, status=2)
    assert "'nowhere://bucket/set' is neither a path nor an address with s3://, s3a://, gs://, " in line


@pytest.mark.parametrize("status", [403, 404, None])
def test_files_of_web_servers_that_cannot_be_read(
    status: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert status is not None
            self.send_error(status)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.jsonl"
        if status is None:
            server.shutdown()
            server.server_close()
        words = ["prepare", "--input", address, "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
        line = complaint(words, capsys)
        server.shutdown()
    expected = {403: f"{address}: 403, message='Forbidden'", 404: f"--input {address}: no such file or directory"}
    assert line.startswith(f"wmtp prepare: error: {expected.get(status, f'{address}: Connect call failed')}")


def test_addresses_in_tuples_are_named(
    tmp_path: Path, make_shard_set: Callable[..., ShardSet], capsys: pytest.CaptureFixture[str]
) -> None:
    address = "hf://datasets/not a name/x/*.parquet"
    paths = ["--input", str(make_shard_set(SEQUENCES).path), "--output", str(tmp_path / "out")]
    line = complaint(["import", *paths, "--scores", address], capsys)
    assert line.startswith(f"wmtp import: error: {address}: Invalid HF URI")
    assert line.endswith("; check the address")


def test_the_hub_as_a_file_system_needs_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything before the connection treats an address on the hub like any other."""
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    address = "hf://datasets/owner/name/file.parquet"
    paths = ["--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
    line = complaint(["prepare", "--input", address, *paths], capsys)
    assert line.startswith(f"wmtp prepare: error: {address}: ")
    assert "check the network" in line


def check_access_after(requests: str) -> None:
    """Make the server reject requests after this many more."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    header = {"Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(address, requests.encode(), header)):
        pass


def refuse(*_: object, **__: object) -> None:
    raise socket.gaierror("no network in a test")
