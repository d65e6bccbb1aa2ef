"""An object store on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import uuid4

import pytest
from upath import UPath

from weighted_mtp.schemas.storage.locations import locate


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Address of a bucket on a local S3 server, configured for this process and its children.

    The server runs in a separate process, because vLLM inspects every object of every module, and some objects of web
    servers raise on inspection. Listings have ten objects per page: a few objects need several pages.
    """
    import s3fs

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
    """Wait until a server listens on a local port."""
    for _ in range(600):
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")


@pytest.fixture
def count_received(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """A function that starts counting and returns a list, extended by the content length of each response."""
    import s3fs

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
    """An empty directory in an object store."""
    return locate(f"{bucket}/{uuid4().hex}")
