import json
import subprocess
import sys
from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import (
    MANIFEST,
    PROGRESS,
    TOKENIZER,
    atomic_write,
    claim_output,
    differences,
    release_output,
    sha256_file,
    write_text,
)
from weighted_mtp.schemas.storage.locks import exclusive


def test_an_exception_leaves_neither_the_file_nor_a_trace(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_write(tmp_path / "file"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "file")


def test_an_exception_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_claim_output_continues_the_same_request_and_refuses_another(tmp_path: Path) -> None:
    assert claim_output(tmp_path, json.dumps({"x": 1})) is False
    assert claim_output(tmp_path, json.dumps({"x": 1})) is True
    (tmp_path / PROGRESS / "shard.parquet").touch()
    with pytest.raises(UserError, match=r"unfinished run with other settings \(x\).*--output"):
        claim_output(tmp_path, json.dumps({"x": 2}))
    release_output(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert claim_output(tmp_path, json.dumps({"x": 2})) is False


def test_a_claim_under_which_nothing_was_done_gives_way(tmp_path: Path) -> None:
    claim_output(tmp_path, json.dumps({"x": 1}))
    assert claim_output(tmp_path, json.dumps({"x": 2})) is False
    assert claim_output(tmp_path, json.dumps({"x": 2})) is True
    (tmp_path / PROGRESS / "request.json").unlink()  # as a kill between making the folder and the file leaves it
    assert claim_output(tmp_path, json.dumps({"x": 3})) is False


def test_claim_output_leaves_foreign_things_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already holds something else"):
        claim_output(tmp_path, "{}")
    with pytest.raises(UserError, match="is, or lies below, a file"), exclusive(tmp_path / "thesis.tex"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    """A second process is refused while the first runs, and the lock goes with the process."""
    output = tmp_path / "out"
    script = (
        "import sys\nfrom pathlib import Path\nfrom weighted_mtp.schemas.storage.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing it"), exclusive(output):
            pass
        holder.kill()
    with exclusive(output):
        pass


def test_an_empty_directory_is_left_as_it_was_found(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "not-there"):
        with pytest.raises(RuntimeError), exclusive(tmp_path / name):
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_is_written_into_a_shard_set(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).touch()
    (tmp_path / TOKENIZER).mkdir()
    with pytest.raises(UserError, match="lies inside the shard set"), exclusive(tmp_path / "a" / "b"):
        pass


def test_differences_are_named() -> None:
    before, after = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(before, after) == ["a.c", "d", "e"]
    assert differences(before, before) == []
    assert differences(123, after) == ["everything"]
