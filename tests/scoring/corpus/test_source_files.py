from pathlib import Path
from typing import Literal

import pytest
from datasets import Dataset, load_dataset_builder, load_from_disk
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage import locations
from weighted_mtp.scoring.corpus.documents import Fields
from weighted_mtp.scoring.corpus.readers import read_batches
from weighted_mtp.scoring.corpus.source_files import CorpusFile, Format, find_sources


def names(input: str | Path, given: Format | Literal["auto"] = "auto") -> list[str]:
    return [source.name for source in find_sources(str(input), given).read]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a/x.txt",
        "a/y.parquet",
        "c.json.gz",
        "README.md",
        ".hidden.txt",
        "_SUCCESS",
        "state.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_directory_gives_known_files_by_relative_name(tree: Path) -> None:
    found = find_sources(str(tree)).read
    assert [(s.name, s.format) for s in found if isinstance(s, CorpusFile)] == [
        ("a/x.txt", "text"),
        ("a/y.parquet", "parquet"),
        ("b.jsonl", "json"),
        ("c.json.gz", "json"),
    ]


def test_given_format_takes_every_visible_file(tree: Path) -> None:
    assert names(tree, "text") == ["README.md", "a/x.txt", "a/y.parquet", "b.jsonl", "c.json.gz"]


def test_glob_names_are_relative_to_the_fixed_part(tree: Path) -> None:
    assert names(f"{tree}/*/*.txt") == ["a/x.txt"]
    assert names(f"{tree}/**/*.json*") == ["b.jsonl", "c.json.gz", "state.json"]


def test_what_a_directory_has_besides_is_left_out(tree: Path) -> None:
    (tree / "d.jsonl.lz4").touch()
    (tree / "e.jsonl.zstd").touch()
    (tree / "broken.txt").symlink_to("nowhere")
    found = find_sources(str(tree))
    assert [source.name for source in found.read] == ["a/x.txt", "a/y.parquet", "b.jsonl", "c.json.gz", "e.jsonl.zstd"]
    assert found.left_out == [".hidden.txt", "README.md", "_SUCCESS", "broken.txt", "d.jsonl.lz4", "state.json"]
    assert find_sources(str(tree / "b.jsonl")).left_out == []


def test_directory_and_glob_follow_the_same_links(tmp_path: Path) -> None:
    for name in ("corpus/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt", "corpus/own/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    links = {"linked": "../elsewhere", "e.txt": "../elsewhere/b.txt", "broken.txt": "nowhere", "own/circle": ".."}
    for name, target in links.items():
        (tmp_path / "corpus" / name).symlink_to(target)
    below = find_sources(str(tmp_path / "corpus"))
    matching = find_sources(f"{tmp_path}/corpus/**/*.txt")
    assert [source.name for source in below.read] == [
        "a.txt",
        "e.txt",
        "linked/b.txt",
        "linked/deep/c.txt",
        "own/d.txt",
    ]
    assert matching.read == below.read
    assert (below.left_out, matching.left_out) == (["broken.txt", "own/circle"], ["broken.txt"])


def test_directories_that_only_match_a_glob_are_left_out(tree: Path) -> None:
    (tree / "b").mkdir()
    (tree / "b" / "x.txt").touch()
    found = find_sources(f"{tree}/[ab]*")
    assert [source.name for source in found.read] == ["b.jsonl"]
    assert found.left_out == ["a", "b"]
    assert find_sources(f"{tree}/[ab]/**", "text").left_out == []


def test_directories_in_a_store_that_only_match_a_glob_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(locations.PACKAGES, "memory", "fsspec")
    root = UPath(f"memory://store{tmp_path}/corpus")
    for name in ("a.txt", "sub/b.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    assert find_sources(f"{root}/*").left_out == ["sub"]
    assert find_sources(f"{root}/**") == find_sources(str(root))


def test_file_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]
    [batch] = read_batches(find_sources(str(tmp_path / "a[1].txt")).read, Fields("text"))
    assert batch.rows == [(0, {"text": "text"})]


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("./missing", "no such file"),
        ("missing/too/deep", "no such file"),
        ("*.nothing", "matches no file"),
        ("empty", "holds no readable file"),
        ("odd.xyz", "give --format"),
    ],
)
def test_nothing_to_read(input: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("odd.xyz").write_text("x")
    with pytest.raises(UserError, match=message) as error:
        find_sources(input)
    assert "\n" not in str(error.value)


def test_only_the_data_of_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """Calling `map` on a loaded dataset writes another copy of its rows beside them."""
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "train")
    assert len(load_from_disk(tmp_path / "train").map(lambda row: {"n": 1})) == 1
    [cache] = (tmp_path / "train").glob("cache-*.arrow")
    found = find_sources(str(tmp_path))
    assert [source.name for source in found.read] == ["train/data-00000-of-00001.arrow"]
    assert f"train/{cache.name}" in found.left_out


@pytest.mark.parametrize("settings", [{"split": "test"}, {"subset": "en"}])
def test_files_have_no_splits(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="--subset and --split are for datasets of the Hugging Face hub"):
            find_sources(str(path), **settings)


@pytest.mark.parametrize("name", ["http:/host/a.jsonl", "data:a,b.jsonl", "s3:/a.jsonl", "lakefs::a.jsonl"])
def test_file_may_be_called_like_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    for input in (tmp_path, f"{tmp_path}/**", f"{tmp_path}/{name}", f"./{name}", "."):
        [source] = find_sources(str(input)).read
        assert source.path.samefile(tmp_path / name)


@pytest.mark.parametrize("input", ["", "/*.jsonl"])
def test_files_with_names_that_are_no_utf8(input: str, tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jsonl").touch()
    with pytest.raises(UserError, match=r"udce9\.jsonl: the name is not in UTF-8; rename it"):
        find_sources(f"{tmp_path}{input}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub with one data set of 600 rows, which is more than are read at once."""
    file = tmp_path / "hub.jsonl"
    file.write_text("".join(f'{{"text": "row {row}", "other": 1}}\n' for row in range(600)))

    def look_up(name: str, subset: str | None) -> object:
        assert (name, subset) == ("owner/name", "en")
        return load_dataset_builder("json", data_files=[str(file)], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset_builder", look_up)


@pytest.mark.usefixtures("hub")
def test_hub_split_is_streamed() -> None:
    [batch] = read_batches(find_sources("owner/name", subset="en").read, Fields("text"))
    assert batch.source == "owner/name/en/train"
    assert batch.rows == [(row, {"text": f"row {row}"}) for row in range(600)]


@pytest.mark.usefixtures("hub")
def test_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"owner/name: .*test.*--split"):
        find_sources("owner/name", subset="en", split="test")


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(name: str, subset: str | None) -> object:
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset_builder", look_up)
    with pytest.raises(UserError, match="cannot reach the hub") as error:
        find_sources("owner/name")
    assert "\n" not in str(error.value)
