import bz2
import errno
import gzip
import json
import lzma
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from upath import UPath

from weighted_mtp.pipelines.verify import run as verify_command
from weighted_mtp.schemas.configs import PrepareConfig, VerifyConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import CARD, REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage import locks
from weighted_mtp.schemas.storage.files import MANIFEST, PROGRESS, atomic_write, copy_files, write_text
from weighted_mtp.schemas.storage.locations import Location, list_files, walk_files
from weighted_mtp.scoring.corpus import writer
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.scoring.corpus.writer import CorpusCounts


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files with 2500 documents of growing length and three bad rows."""
    root = tmp_path / "corpus"
    root.mkdir()
    lines = [json.dumps({"text": f"document {row} " * (row % 9 + 1)}) for row in range(2500)]
    (root / "a.jsonl").write_text("\n".join([*lines[:2000], "{", "[]"]))
    (root / "b.jsonl").write_text("\n".join(["{}", *lines[2000:]]))
    return root


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def config(corpus: Path | str, tokenizer: Path | str, output: Location, **settings: object) -> PrepareConfig:
    defaults = {"max_length": 16, "shard_tokens": 50_000, "workers": 1}
    return PrepareConfig(input=str(corpus), tokenizer=str(tokenizer), output=output, **{**defaults, **settings})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_everything_arrives_in_order(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    prepared = prepare(config(corpus, tokenizer_dir, tmp_path / "out", bos="always"))
    manifest = prepared.manifest
    rows = [row for shard in range(len(manifest.shards)) for row in prepared.read(shard).to_pylist()]
    documents: dict[str, list[int]] = {}
    for row in rows:
        documents.setdefault(row["document_id"], []).extend(row["input_ids"])
    names = [f"a.jsonl#{row}" for row in range(2000)] + [f"b.jsonl#{row}" for row in range(1, 501)]
    assert list(documents) == names
    assert [len(ids) for ids in documents.values()] == [
        1 + len(f"document {row} " * (row % 9 + 1)) for row in range(2500)
    ]
    assert (manifest.corpus.documents, manifest.corpus.rejects, manifest.rows) == (2500, 3, len(rows))
    assert (manifest.corpus.adds_bos, manifest.corpus.adds_eos) == (True, False)
    assert manifest.tokens == sum(len(row["input_ids"]) for row in rows)


def test_fields_of_the_corpus_become_columns(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": "x" * (20 * row + 1), "reward": row / 8, "prompt": row // 2} for row in range(6)]
    lines = [json.dumps(row) for row in [*rows, {"text": "none"}]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = {"number_fields": ("reward",), "label_fields": ("prompt",), "shard_tokens": 100}
    prepared = prepare(config(tmp_path / "a.jsonl", tokenizer_dir, tmp_path / "out", **settings))
    assert len(prepared.manifest.shards) > 2
    assert prepared.manifest.corpus.sequence_columns == {"reward": "number", "prompt": "label"}
    assert prepared.manifest.corpus.rejects == 1
    assert [check.fault for check in verify(prepared.path, prepared.manifest) if check.fault] == []
    table = pa.concat_tables([prepared.read(shard) for shard in range(len(prepared.manifest.shards))])
    for row in table.to_pylist():
        number = int(row["document_id"].partition("#")[2])
        assert (row["reward"], row["prompt"]) == (number / 8, str(number // 2))
    with pytest.raises(UserError, match=r"other inputs or settings \(number_fields"):
        prepare(config(tmp_path / "a.jsonl", tokenizer_dir, tmp_path / "out", **settings | {"number_fields": ()}))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_document_with_an_id_counts(workers: int, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Also in another file or batch, and whether an id is a string or a number. Rejected rows have no id."""
    rows = [{"id": 7, "text": " "}, *({"id": row % 1500, "text": "x" * 20, "group": row} for row in range(2000))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"id": "3", "text": "other", "group": "other"}))
    settings = {"id_field": "id", "label_fields": ("group",), "workers": workers}
    prepared = prepare(config(tmp_path / "in", tokenizer_dir, tmp_path / "out", **settings))
    assert (prepared.manifest.corpus.documents, prepared.manifest.corpus.rejects) == (1500, 502)
    assert prepared.manifest.tokens == 1500 * 20
    found = pa.concat_tables([prepared.read(shard) for shard in range(len(prepared.manifest.shards))])
    assert found["document_id"].to_pylist() == found["group"].to_pylist()
    assert found.num_rows == 2 * 1500
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert rejects[1] == {"source": "a.jsonl", "row": 1501, "reason": "id of an earlier document: 0"}
    assert rejects[-1] == {"source": "b.jsonl", "row": 0, "reason": "id of an earlier document: 3"}


def test_special_tokens_as_text_are_recorded(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<s>a</s>")
    parsed = prepare(config(tmp_path / "a.txt", tokenizer_dir, tmp_path / "parsed"))
    assert parsed.manifest.tokens == 3
    assert "special_tokens" not in json.loads((tmp_path / "parsed" / MANIFEST).read_text())["corpus"]
    settings = config(tmp_path / "a.txt", tokenizer_dir, tmp_path / "text", special_tokens="text")
    assert prepare(settings).manifest.tokens == 8
    assert ShardSet.open(tmp_path / "text").manifest.corpus.special_tokens == "text"
    assert prepare(settings).manifest.tokens == 8
    for output, special_tokens in (("parsed", "text"), ("text", "parse")):
        with pytest.raises(UserError, match=r"other inputs or settings \(special_tokens\)"):
            prepare(config(tmp_path / "a.txt", tokenizer_dir, tmp_path / output, special_tokens=special_tokens))


def test_large_documents_are_rejected_and_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345678\n123456789\nabc")
    settings = {"sample_by": "line", "max_document_bytes": 8}
    seen: list[CorpusCounts] = []
    prepared = prepare(config(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out", **settings), seen.append)
    assert (prepared.manifest.corpus.documents, prepared.manifest.corpus.rejects) == (2, 1)
    assert seen[-1].rejects == {"larger than 8 bytes (--max_document_bytes)": 1}


def test_shards_close_at_the_first_sequence_that_fills_them(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tokenizer_dir, tmp_path / "out")).manifest
    assert len(manifest.shards) > 3
    assert all(50_000 <= shard.tokens < 50_016 for shard in manifest.shards[:-1])
    assert manifest.shards[0].name == f"shard-00000-of-{len(manifest.shards):05d}.parquet"


def test_set_is_sound_and_self_contained(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    opened = ShardSet.open(tmp_path / "out")
    assert [check.fault for check in verify(opened.path, opened.manifest) if check.fault] == []
    assert (opened.tokenizer_path / "tokenizer.json").exists()
    assert not (tmp_path / "out" / PROGRESS).exists()
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert [(reject["source"], reject["row"]) for reject in rejects] == [
        ("a.jsonl", 2000),
        ("a.jsonl", 2001),
        ("b.jsonl", 0),
    ]
    assert rejects[2]["reason"] == "no field 'text': the fields are none"


def test_bytes_do_not_depend_on_the_number_of_workers(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(config(corpus, tokenizer_dir, tmp_path / f"out{workers}", workers=workers))
    expected = contents(tmp_path / "out1")
    assert {MANIFEST, REJECTS} <= set(expected)
    assert contents(tmp_path / "out2") == expected


def test_corpus_elsewhere_gives_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(config(Path("corpus"), tokenizer_dir, Path("out")))
    (tmp_path / "elsewhere").mkdir()
    corpus.rename(tmp_path / "elsewhere" / "corpus")
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepare(config(Path("corpus"), tokenizer_dir, Path("out")))
    assert contents(tmp_path / "out") == contents(tmp_path / "elsewhere" / "out")


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A corpus in every format and compression, with files beside it that are none of it."""
    root = tmp_path / "mixed"
    for name in ("a/deep", ".hidden", "_temporary"):
        (root / name).mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"document {row}"}) + "\n" for row in range(300)).encode()
    for suffix, compress in COMPRESSED.items():
        (root / "a" / f"lines.jsonl{suffix}").write_bytes(compress(lines))
    (root / "a" / "deep" / "note[1] #2 ä.txt").write_text("a note\n\nand another")
    (root / "table.csv").write_text("text,other\nfirst,1\n,2\n")
    table = pa.table({"other": [1, 2, 3], "text": ["one", "two", None]})
    pq.write_table(table, root / "table.parquet", row_group_size=2)
    for name, create in {"stream.arrow": pa.ipc.new_stream, "file.arrow": pa.ipc.new_file}.items():
        with create(str(root / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("README.md", "state.json", ".hidden/x.txt", "_temporary/x.txt", "a/.x.txt"):
        (root / name).write_text("not of the corpus")
    return root


def shards(directory: Location) -> dict[str, bytes]:
    """All files without those that name the corpus."""
    return {name: (directory / name).read_bytes() for name in walk_files(directory) if name not in (MANIFEST, CARD)}


@pytest.mark.parametrize(
    "pattern", ["", "/**/*.jsonl*", "/*/*.gz", "/a/deep/note[[]1] #2 ä.txt", "/table.parquet", "/a/*[s].jsonl.?z"]
)
def test_a_remote_corpus_gives_the_bytes_of_a_local_one(
    pattern: str, mixed: Path, tokenizer_dir: Path, tmp_path: Path, s3: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same documents under the same names, from directories, globs and files; the tokenizer and output remote, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3.fs.put(f"{mixed}/", f"{s3.path}/corpus/", recursive=True)
    copy_files(tokenizer_dir, s3 / "tokenizer")
    local = prepare(config(f"{mixed}{pattern}", tokenizer_dir, tmp_path / "out"))
    remote = prepare(config(f"{s3}/corpus{pattern}", str(s3 / "tokenizer"), s3 / "out"))
    assert shards(local.path) == shards(remote.path)
    assert local.manifest.corpus.documents > 0
    assert local.manifest.tokenizer.fingerprint == remote.manifest.tokenizer.fingerprint
    assert [path.name for path in (s3 / "out").iterdir() if path.name.startswith(".")] == []
    assert prepare(config(f"{s3}/corpus{pattern}", str(s3 / "tokenizer"), s3 / "out")).manifest == remote.manifest
    with pytest.raises(UserError, match=r"other inputs or settings \(max_length\)"):
        prepare(config(f"{s3}/corpus{pattern}", str(s3 / "tokenizer"), s3 / "out", max_length=8))


def test_a_remote_parquet_file_is_read_by_column(
    tokenizer_dir: Path, tmp_path: Path, s3: UPath, count_received: Callable[[], list[int]]
) -> None:
    noise = [os.urandom(1 << 16) for _ in range(64)]
    with atomic_write(s3 / "a.parquet") as file:
        pq.write_table(pa.table({"noise": noise, "text": [f"row {row}" for row in range(64)]}), file)
    received = count_received()
    assert prepare(config(str(s3 / "a.parquet"), tokenizer_dir, tmp_path / "out")).manifest.corpus.documents == 64
    assert 0 < sum(received) < 1 << 18


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "no such file or directory"),
        ("corpus/*.nothing", "matches no file"),
        ("empty", "no such file or directory"),
        ("corpus/odd.xyz", "give --format"),
        ("odd", "holds no readable file"),
        ("corpus/cut.jsonl.gz", r"cut.jsonl.gz: cannot be read as json"),
    ],
)
def test_an_invalid_remote_corpus_leaves_no_output(name: str, message: str, tokenizer_dir: Path, s3: UPath) -> None:
    for path in ("corpus/odd.xyz", "odd/odd.xyz"):
        write_text(s3 / path, "x")
    (s3 / "corpus" / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "document"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=message) as error:
        prepare(config(str(s3 / name), tokenizer_dir, s3 / "out"))
    assert str(s3 / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (s3 / "out").exists()


def test_a_remote_output_lies_outside_the_input(tokenizer_dir: Path, s3: UPath) -> None:
    write_text(s3 / "corpus" / "a.txt", "text")
    with pytest.raises(UserError, match="lies inside --input"):
        prepare(config(str(s3 / "corpus"), tokenizer_dir, s3 / "corpus" / "out"))
    write_text(s3 / "out" / "thesis.tex", "years of work")
    with pytest.raises(UserError, match="already holds something else"):
        prepare(config(str(s3 / "corpus"), tokenizer_dir, s3 / "out"))
    assert list(list_files(s3 / "out")) == ["thesis.tex"]


WRITE_AND_DIE = """
import os, signal
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.pipelines.verify import run as verify_command
from weighted_mtp.schemas.configs import PrepareConfig, VerifyConfig
from weighted_mtp.scoring.corpus import writer
write = writer.write_shard
def write_and_die(path, table):
    if path.name == "shard-00002.parquet": os.kill(os.getpid(), signal.SIGKILL)
    return write(path, table)
writer.write_shard = write_and_die
prepare(PrepareConfig.model_validate_json(config))
"""


@pytest.mark.slow
def test_a_killed_run_in_a_store_starts_over(
    corpus: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    s3: UPath,
    start_process: Callable[..., BaseProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(corpus, tokenizer_dir, s3 / "out")
    killed = start_process(WRITE_AND_DIE, config=settings.model_dump_json())
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert set(list_files(s3 / "out" / PROGRESS)) >= {"shard-00000.parquet", "shard-00001.parquet"}
    assert not (s3 / "out" / MANIFEST).exists()
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)
    prepare(settings)
    local = prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert shards(s3 / "out") == shards(local.path)
    assert list_files(s3 / "out" / PROGRESS) == {}


def test_no_rejects_no_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    prepare(config(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out" / REJECTS).exists()


def test_finished_set_is_kept(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(config(corpus, tokenizer_dir, tmp_path / "out", workers=2)).manifest == first.manifest
    with pytest.raises(UserError, match="other inputs or settings"):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out", max_length=8))
    (corpus / "c.txt").write_text("one more file")
    with pytest.raises(UserError, match="other inputs or settings"):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_killed_run_starts_over(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    expected = contents(prepare(config(corpus, tokenizer_dir, tmp_path / "whole")).path)
    child = os.fork()
    if child == 0:
        # Dies after the second shard, as if the machine had lost power.
        write = writer.write_shard

        def write_and_die(path: Path, table: object) -> object:
            if path.name == "shard-00002.parquet":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, table)

        writer.write_shard = write_and_die
        prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "out" / PROGRESS / "shard-00001.parquet").exists()
    with pytest.raises(UserError, match="unfinished run with other settings"):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out", max_length=8))
    prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def test_full_disk_surfaces_and_leaves_nothing(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, table: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(writer, "write_shard", write)
    with pytest.raises(OSError, match="No space left"):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        (
            '{"question": "q", "answer": "a"}\n' * 3,
            r"all 3 rows .* row 0 of a\.jsonl \(no field 'text': .*question, answer.*--text_field",
        ),
        ('{\n  "text": "x"\n}', r"invalid JSON.*; write one object on each line, or one array into a"),
        ('[{"text": "x"}]', r"not an object: list\); write one object on each line"),
        ("{\n{}\n{}\n", r"all 3 rows .*, 2 of them for the same reason as row 1 of a\.jsonl "),
    ],
)
def test_corpus_without_documents_leaves_nothing(
    content: str, message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(config(tmp_path / "a.jsonl", tokenizer_dir, tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_foreign_directory_is_left_alone(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(UserError, match="already holds something else"):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert contents(tmp_path / "out") == {"precious": b"data"}


def test_output_must_not_become_input(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="lies inside --input"):
        prepare(config(tmp_path, tokenizer_dir, tmp_path / "out"))


def test_progress_is_tracked_by_batch_and_only_if_there_is_work(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    for _ in range(2):
        prepare(config(corpus, tokenizer_dir, tmp_path / "out"), lambda counts: seen.append(counts.documents))
    assert seen == sorted(set(seen))
    assert len(seen) > 1
    assert seen[-1] == 2500


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_with_code_of_its_own(
    workers: int, make_own_code: Callable[..., Path], tokenizer_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    own = make_own_code()
    with pytest.raises(UserError, match=r"--tokenizer .*it needs Python code of its own.* add --trust_remote_code"):
        prepare(config(corpus, own, tmp_path / "own", workers=workers))
    settings = {"workers": workers, "trust_remote_code": True}
    prepared = prepare(config(corpus, own, tmp_path / "own", **settings))
    plain = prepare(config(corpus, tokenizer_dir, tmp_path / "plain"))
    assert prepared.read(0).equals(plain.read(0))
    verify_command(VerifyConfig(set=prepared.path))


def test_a_vocabulary_with_a_gap(tokenizer_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """258 tokens, of which `u` has the id 300."""
    copy_files(tokenizer_dir, tmp_path / "gap")
    content = json.loads((tmp_path / "gap" / "tokenizer.json").read_text())
    content["model"]["vocab"]["u"] = 300
    (tmp_path / "gap" / "tokenizer.json").write_text(json.dumps(content))
    prepared = prepare(config(corpus, tmp_path / "gap", tmp_path / "set"))
    assert prepared.manifest.tokenizer.vocab_size == 301
    assert prepared.largest_id == prepared.manifest.corpus.largest_id == 300
    assert (prepared.fits_ids(300), prepared.fits_ids(301)) == (False, True)
    assert max(max(row) for row in prepared.read(0)["input_ids"].to_pylist()) == 300
    verify_command(VerifyConfig(set=prepared.path))
