"""Locations on a disk and in an object store, where an S3 server of our own stands for all of them."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import ROW_GROUP_TOKENS
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, atomic_write, copy_files, move, write_text
from weighted_mtp.schemas.storage.locations import (
    Location,
    kind_of,
    list_files,
    local_copy,
    locate,
    remove_tree,
    walk_files,
    walk_tree,
)


@pytest.fixture(params=["disk", pytest.param("store", marks=pytest.mark.integration)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty directory of each kind."""
    return locate(tmp_path) if request.param == "disk" else request.getfixturevalue("s3")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weighted-mtp"


def run_elsewhere(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in another process."""
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


def test_names_become_locations(tmp_path: Path) -> None:
    assert isinstance(locate("corpus"), Path)
    assert locate(f"file://{tmp_path}/x") == locate(f"file://localhost{tmp_path}/x") == tmp_path / "x"
    assert locate("a::b") == Path("a::b")
    assert str(locate("s3://bucket/runs/first/")) == "s3://bucket/runs/first"
    assert locate("s3://bucket/a/") / "b" == locate(UPath("s3://bucket/a/b"))
    assert str(locate("hf://owner/name")) == "hf://owner/name"
    assert str(locate("hf://datasets/owner/name/file.parquet")) == "hf://datasets/owner/name/file.parquet"
    assert pickle.loads(pickle.dumps(locate("s3://bucket/a"))) == locate("s3://bucket/a")


def test_what_is_neither_a_file_nor_a_directory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match=f"^{name}: is a pipe or a device; write its content to a file"):
            kind_of(locate(name))


def test_a_protocol_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs:// cannot be used here .*; install 'weighted-mtp\[gcs\]'"):
        locate("gs://bucket/a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere://bucket/a", "^'nowhere://bucket/a' is neither a path nor an address with s3://, .*, http://;"),
        ("memory://a", "neither a path nor an address"),
        ("data:,a", "neither a path nor an address"),
        ("reference://", "neither a path nor an address"),
        ("github://", "neither a path nor an address"),
        ("generic://a", "neither a path nor an address"),
        ("lakefs://a", "neither a path nor an address"),
        ("async_wrapper://", "neither a path nor an address"),
        ("simplecache::s3://bucket/a", "neither a path nor an address"),
        ("zip://a::s3://bucket/b.zip", "neither a path nor an address"),
        ("s3:/bucket/a", "neither a path nor an address"),
        ("a\n://b", r"^'a\\n://b' is neither"),
        (5, "^should be a string, not 5$"),
        ("s3://", "s3:// should have a bucket or a host after '://'"),
        ("s3:///a", "should have a bucket"),
        ("https:///a", "should have a bucket or a host"),
        ("hf://name", "^hf://name should name an owner, such as hf://owner/name"),
        ("hf://datasets/name/", "should name an owner"),
        ("hf://", "should name an owner"),
        ("caf\udce9", r"^'caf\\udce9' is not in UTF-8; rename it$"),
        ("", "a path should not be empty"),
    ],
)
def test_what_is_no_location(name: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate(name)


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_exception_keeps_the_old_file(place: Location, before: bytes | None) -> None:
    path = place / "file"
    if before:
        path.write_bytes(before)

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list_files(place) == ({"file": 3} if before else {})


def test_the_name_appears_only_when_the_block_ends(place: Location) -> None:
    with atomic_write(place / "file") as file:
        file.write(b"abc")
        assert not (place / "file").exists()
    assert (place / "file").read_bytes() == b"abc"


def test_a_killed_multipart_upload_is_invisible(s3: UPath) -> None:
    """The parts are all there; the process dies before it says that they are one object."""
    script = (
        "import os, signal, sys\n"
        "import s3fs.core\n"
        "from weighted_mtp.schemas.storage.files import atomic_write\n"
        "from weighted_mtp.schemas.storage.locations import locate\n"
        "s3fs.core.calculate_chunksize = lambda *_, **__: 5 << 20\n"
        "call = s3fs.S3FileSystem._call_s3\n"
        "async def die(self, method, *args, **kwargs):\n"
        "    if method == 'complete_multipart_upload': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return await call(self, method, *args, **kwargs)\n"
        "s3fs.S3FileSystem._call_s3 = die\n"
        "with atomic_write(locate(sys.argv[1])) as file: file.write(bytes(11 << 20))\n"
    )
    write_text(s3 / "large", "old")
    assert run_elsewhere(script, s3 / "large").returncode == -9
    assert (s3 / "large").read_text() == "old"
    uploads = s3.fs.call_s3("list_multipart_uploads", Bucket="bucket")["Uploads"]
    assert [upload["Key"] for upload in uploads] == [(s3 / "large").path.removeprefix("bucket/")]


def test_move_replaces(place: Location) -> None:
    write_text(place / "[a] *.txt", "new")
    write_text(place / "b", "old")
    move(place / "[a] *.txt", place / "b")
    assert (place / "b").read_text() == "new"
    assert list_files(place) == {"b": 3}


def test_a_listing_has_only_files_and_is_empty_for_a_missing_directory(place: Location) -> None:
    (place / "folder").mkdir()
    write_text(place / "folder" / "below", "x")
    write_text(place / "file", "xy")
    if isinstance(place, UPath) and place.protocol:
        place.fs.pipe_file(f"{place.path}/", b"")  # what some tools write as the directory
    assert list_files(place) == {"file": 2}
    assert list_files(place / "absent") == {}
    assert list_files(place / "file" / "absent") == {}


def test_writes_of_another_process_are_visible_immediately(place: Location) -> None:
    write_text(place / "a", "x")
    assert list_files(place) == {"a": 1}
    assert not (place / "b").exists()
    script = (
        "import sys\n"
        "from weighted_mtp.schemas.storage.files import write_text\n"
        "from weighted_mtp.schemas.storage.locations import locate\n"
    )
    script += "for name in 'ab': write_text(locate(sys.argv[1]) / name, 'longer')\n"
    assert run_elsewhere(script, place).returncode == 0
    assert (place / "b").exists()
    assert (place / "a").stat().st_size == 6
    assert (place / "a").read_text() == "longer"
    assert list_files(place) == {"a": 6, "b": 6}


def test_more_objects_than_a_listing_has_on_a_page(s3: UPath) -> None:
    s3.fs.pipe({(s3 / f"{number:04d}").path: b"x" for number in range(25)})
    page = s3.fs.call_s3("list_objects_v2", Bucket="bucket", Prefix=s3.path.removeprefix("bucket/"))
    assert len(page["Contents"]) == 10
    assert len(list_files(s3)) == 25
    remove_tree(s3)
    assert list_files(s3) == {}


def test_keys_that_would_leave_a_local_directory_are_left_out(s3: UPath, cache: Path) -> None:
    start = s3.path.removeprefix("bucket/")
    for name in ("a", "..", "../b", "/c", "d/../../e", "f..g"):
        s3.fs.call_s3("put_object", Bucket="bucket", Key=f"{start}/{name}", Body=b"x")
    assert walk_tree(s3) == ({"a": 1, "f..g": 1}, ["..", "../b", "/c", "d/../../e"])
    assert list_files(s3) == {"a": 1, "f..g": 1}
    assert sorted(path.name for path in local_copy(s3).iterdir()) == ["a", "f..g"]


def test_trees_are_removed_and_their_neighbours_are_not(place: Location) -> None:
    for name in ("tree/a", "tree/b/c", "tree-2/a"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(place / name, "x")
    remove_tree(place / "tree")
    remove_tree(place / "tree")
    assert [path.name for path in place.iterdir()] == ["tree-2"]


def test_files_are_copied_between_kinds(s3: UPath, tokenizer_dir: Path, tmp_path: Path) -> None:
    copy_files(tokenizer_dir, s3 / "tokenizer")
    copy_files(s3 / "tokenizer", s3 / "again")
    copy_files(s3 / "again", tmp_path / "back")
    assert directory_digest(tmp_path / "back") == directory_digest(tokenizer_dir)


def test_a_local_directory_is_its_own_copy(tmp_path: Path) -> None:
    assert local_copy(tmp_path) is tmp_path


def test_a_copy_is_made_once_for_each_content(s3: UPath, cache: Path) -> None:
    with pytest.raises(UserError, match="no such directory, or no files in it"):
        local_copy(s3)
    write_text(s3 / "a", "first")
    (s3 / "folder" / "b").write_text("not a file of it")
    first = local_copy(s3)
    written = (first / "a").stat().st_mtime_ns
    assert local_copy(s3) == first
    assert (first / "a").stat().st_mtime_ns == written
    write_text(s3 / "a", "other")
    second = local_copy(s3)
    assert [(copy / "a").read_text() for copy in (first, second)] == ["first", "other"]
    assert sorted(cache.glob("[!.]*")) == sorted([first, second])


COPY = """
from weighted_mtp.schemas.storage.locations import local_copy, locate
said.send(str(local_copy(locate(directory))))
"""


def test_processes_that_copy_at_once_share_a_whole_copy(
    s3: UPath, cache: Path, start_process: Callable[..., BaseProcess]
) -> None:
    content = os.urandom(1 << 20)
    for name in "ab":
        (s3 / name).write_bytes(content)
    pipes = [Pipe() for _ in range(3)]
    processes = [start_process(COPY, directory=str(s3), said=theirs) for _, theirs in pipes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    copies = {ours.recv() for ours, _ in pipes}
    assert [str(path) for path in cache.glob("[!.]*")] == list(copies)
    assert all((Path(next(iter(copies))) / name).read_bytes() == content for name in "ab")


def contents(directory: Location) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in walk_files(directory)}


def test_a_set_in_a_store_is_the_set_on_disk(make_shard_set: Callable[..., ShardSet], s3: UPath) -> None:
    """Byte for byte, and it reads alike."""
    sequences, losses = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 4]]
    local = make_shard_set(sequences, {"loss_reference": losses})
    make_shard_set(sequences, {"loss_reference": losses}, parent=s3)
    assert contents(s3 / "set") == contents(local.path)
    opened = ShardSet.open(str(s3 / "set"))
    assert opened.manifest == local.manifest
    assert opened.read(1, ["document_id", "input_ids"]) == local.read(1, ["document_id", "input_ids"])
    assert opened.bytes_per_token() == local.bytes_per_token()
    assert opened.value_counts()["loss_reference"].statistics() == local.value_counts()["loss_reference"].statistics()
    assert [check.fault for check in verify(opened.path, opened.manifest) if check.fault] == []
    first, second = (opened.path / DATA / shard.name for shard in opened.manifest.shards)
    second.write_bytes(first.read_bytes())
    assert f"{second}: content differs" in " ".join(
        filter(None, (check.fault for check in verify(opened.path, opened.manifest)))
    )
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: shard is missing"):
        ShardSet.open(opened.path)
    (opened.path / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a shard set"):
        ShardSet.open(opened.path)
    with pytest.raises(UserError, match="no such shard set"):
        ShardSet.open(s3 / "nowhere")


def test_a_row_group_is_read_without_the_rest(
    make_shard_set: Callable[..., ShardSet], s3: UPath, count_received: Callable[[], list[int]]
) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, ROW_GROUP_TOKENS).tolist() for _ in range(6)]
    scores = [rng.normal(size=ROW_GROUP_TOKENS).tolist() for _ in range(6)]
    shards = make_shard_set(sequences, {"loss_a": scores, "loss_b": scores}, rows_per_shard=6, parent=s3)
    [entry] = shards.manifest.shards
    assert entry.row_groups == 6
    received = count_received()
    table = shards.read(0, ["loss_b"], row_group=4)
    assert table["loss_b"][0].as_py() == np.array(scores[4], np.float16).tolist()
    column = shards.bytes_per_token()["loss_b"] * entry.tokens / entry.row_groups
    assert sum(received) < 1.1 * column + (200 << 10) < entry.bytes / 3
    assert len(received) < 10


def test_files_that_vanish_or_cannot_be_read_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "below/there", "below/gone", "below/secret"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "to-there").symlink_to("below/there")
    is_file = Path.is_file

    def after_a_change(path: Path) -> bool:
        if path.name == "secret":
            raise PermissionError
        answer = is_file(path)
        if path.name == "gone":
            path.unlink()
        return answer

    monkeypatch.setattr(Path, "is_file", after_a_change)
    assert walk_files(tmp_path) == {"here": 4, "below/there": 4, "to-there": 4}


@pytest.mark.parametrize("name", ["", "nothing://x", "s3://"])
def test_impossible_locations_are_user_errors(name: str) -> None:
    with pytest.raises(UserError):
        ShardSet.open(name)
