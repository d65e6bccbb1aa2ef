"""Files found through links, and circles that are left out."""

import errno
import os
from pathlib import Path

import pytest

from weighted_mtp.schemas.storage.links import expand, walk_disk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with links to a file, to a directory, to nowhere, and in circles through both directories."""
    for name in ("top/a.txt", "top/sub/b.txt", "top/.hidden/h.txt", "other/c.txt", "other/deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    links = {
        "top/file.txt": "../other/c.txt",
        "top/linked": "../other",
        "top/broken.txt": "nowhere",
        "top/sub/up": "..",
        "top/self": "self",
        "other/deep/back": "../../top",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "top/pipe.txt")
    return tmp_path / "top"


def test_a_walk_follows_links_but_not_in_circles(tree: Path) -> None:
    sizes, unreadable = walk_disk(tree)
    names = ["a.txt", "sub/b.txt", ".hidden/h.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt"]
    assert sizes == dict.fromkeys(names, 4)
    assert sorted(unreadable) == ["broken.txt", "linked/deep/back", "pipe.txt", "self", "sub/up"]


def test_a_link_above_the_top_gives_its_neighbours_once(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "neighbour.txt").write_text("text")
    (tmp_path / "top" / "up").symlink_to("..")
    assert walk_disk(tmp_path / "top") == ({"up/neighbour.txt": 4}, ["up/top"])


@pytest.mark.parametrize("secret", ["b", "z"])
def test_directories_that_cannot_be_read_are_named(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and last; tests may run as root, who can read everything."""
    for name in ("b", "c", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if Path(path).name == secret:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    sizes, unreadable = walk_disk(tmp_path)
    assert sizes == {f"{name}/a.txt": 4 for name in ("b", "c", "z") if name != secret}
    assert unreadable == [secret]


def test_two_links_to_a_directory_are_no_circle(tmp_path: Path) -> None:
    (tmp_path / "top" / "real").mkdir(parents=True)
    (tmp_path / "top" / "real" / "a.txt").write_text("text")
    (tmp_path / "top" / "again").symlink_to("real")
    assert walk_disk(tmp_path / "top") == ({"real/a.txt": 4, "again/a.txt": 4}, [])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "broken.txt", "file.txt", "pipe.txt"]),
        ("*/*.txt", ["linked/c.txt", "sub/b.txt"]),
        (
            "**/*.txt",
            ["a.txt", "broken.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt", "pipe.txt", "sub/b.txt"],
        ),
        ("**/deep/**/*.txt", ["linked/deep/d.txt"]),
        ("*/**/d.txt", ["linked/deep/d.txt"]),
        (".hidden/**/*.txt", [".hidden/h.txt"]),
        ("l*d/**", ["linked/c.txt", "linked/deep", "linked/deep/back", "linked/deep/d.txt"]),
        ("none/**/*.txt", []),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_glob_follows_links_but_not_in_circles(
    pattern: str, expected: list[str], absolute: bool, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    found = {os.path.relpath(path) for path in expand(f"{tree}/{pattern}" if absolute else pattern)}
    assert sorted(found) == expected


def test_a_directory_with_magic_characters_is_expanded_literally(tmp_path: Path) -> None:
    (tmp_path / "a[1]*" / "b").mkdir(parents=True)
    (tmp_path / "a[1]*" / "b" / "c.txt").write_text("text")
    assert list(expand(f"{tmp_path}/**/b/*.txt")) == [f"{tmp_path}/a[1]*/b/c.txt"]
