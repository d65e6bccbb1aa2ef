import errno
import json
import os
import signal
from pathlib import Path

import pytest

from pipelines.prepare import run
from schemas.configs import PrepareConfig
from schemas.errors import UserError
from schemas.files import MANIFEST, PROGRESS
from schemas.shard_set import REJECTS, ShardSet, verify
from scoring import prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files with 2500 documents of growing length and three bad rows."""
    root = tmp_path / "corpus"
    root.mkdir()
    lines = [json.dumps({"text": f"document {row} " * (row % 9 + 1)}) for row in range(2500)]
    (root / "a.jsonl").write_text("\n".join([*lines[:2000], "{", "[]"]))
    (root / "b.jsonl").write_text("\n".join(["{}", *lines[2000:]]))
    return root


def config(corpus: Path, tokenizer: Path, output: Path, **settings: object) -> PrepareConfig:
    defaults = {"max_length": 16, "shard_tokens": 50_000, "workers": 1}
    return PrepareConfig(input=str(corpus), tokenizer=str(tokenizer), output=output, **{**defaults, **settings})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_everything_arrives_in_order(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    prepared = run(config(corpus, tokenizer_dir, tmp_path / "out", bos="always"))
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


def test_shards_close_at_the_first_sequence_that_fills_them(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = run(config(corpus, tokenizer_dir, tmp_path / "out")).manifest
    assert len(manifest.shards) > 3
    assert all(50_000 <= shard.tokens < 50_016 for shard in manifest.shards[:-1])
    assert manifest.shards[0].name == f"shard-00000-of-{len(manifest.shards):05d}.parquet"


def test_set_is_sound_and_self_contained(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    run(config(corpus, tokenizer_dir, tmp_path / "out"))
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
        run(config(corpus, tokenizer_dir, tmp_path / f"out{workers}", workers=workers))
    expected = contents(tmp_path / "out1")
    assert {MANIFEST, REJECTS} <= set(expected)
    assert contents(tmp_path / "out2") == expected


def test_corpus_elsewhere_gives_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(config(Path("corpus"), tokenizer_dir, Path("out")))
    (tmp_path / "elsewhere").mkdir()
    corpus.rename(tmp_path / "elsewhere" / "corpus")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(config(Path("corpus"), tokenizer_dir, Path("out")))
    assert contents(tmp_path / "out") == contents(tmp_path / "elsewhere" / "out")


def test_no_rejects_no_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    run(config(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out" / REJECTS).exists()


def test_finished_set_is_kept(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(config(corpus, tokenizer_dir, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert run(config(corpus, tokenizer_dir, tmp_path / "out", workers=2)).manifest == first.manifest
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="other inputs or settings"):
        run(config(corpus, tokenizer_dir, tmp_path / "out", max_length=8))
    (corpus / "c.txt").write_text("one more file")
    with pytest.raises(UserError, match="other inputs or settings"):
        run(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_killed_run_starts_over(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    expected = contents(run(config(corpus, tokenizer_dir, tmp_path / "whole")).path)
    child = os.fork()
    if child == 0:
        # Dies after the second shard, as if the machine had lost power.
        write = prepare.write_shard

        def write_and_die(path: Path, table: object) -> object:
            if path.name == "shard-00002.parquet":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, table)

        prepare.write_shard = write_and_die
        run(config(corpus, tokenizer_dir, tmp_path / "out"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "out" / PROGRESS / "shard-00001.parquet").exists()
    with pytest.raises(UserError, match="unfinished run with other settings"):
        run(config(corpus, tokenizer_dir, tmp_path / "out", max_length=8))
    run(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def test_full_disk_surfaces_and_leaves_nothing(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, table: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(prepare, "write_shard", write)
    with pytest.raises(OSError, match="No space left"):
        run(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        (
            '{"question": "q", "answer": "a"}\n' * 3,
            r"all 3 rows .* a\.jsonl row 0: no field 'text': .*question, answer.*--text_field",
        ),
        ("{\n{}\n{}\n", r"all 3 rows .*, 2 of them as a\.jsonl row 1"),
    ],
)
def test_corpus_without_documents_leaves_nothing(
    content: str, message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        run(config(tmp_path / "a.jsonl", tokenizer_dir, tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_foreign_directory_is_left_alone(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(UserError, match="already holds something else"):
        run(config(corpus, tokenizer_dir, tmp_path / "out"))
    assert contents(tmp_path / "out") == {"precious": b"data"}
