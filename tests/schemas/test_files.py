import json
from pathlib import Path

import pytest

from schemas.errors import UserError
from schemas.files import atomic_write, claim_output, release_output, sha256_file, write_text


def test_an_exception_leaves_neither_the_file_nor_a_trace(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


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
    output = tmp_path / "a" / "b"
    assert claim_output(output, json.dumps({"x": 1})) is False
    assert claim_output(output, json.dumps({"x": 1})) is True
    with pytest.raises(UserError, match=r"unfinished run with other settings.*--output"):
        claim_output(output, json.dumps({"x": 2}))
    release_output(output)
    assert list(output.iterdir()) == []
    assert claim_output(output, json.dumps({"x": 2})) is False


def test_claim_output_leaves_foreign_things_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for output in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="already holds something else"):
            claim_output(output, "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
