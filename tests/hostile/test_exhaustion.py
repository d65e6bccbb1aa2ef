"""Small files that ask for much memory or time end in one line, or their documents are rejected."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import load_causal_lm
from weighted_mtp.scoring.corpus.documents import Fields, MalformedRow, Row
from weighted_mtp.scoring.corpus.readers import read_batches
from weighted_mtp.scoring.corpus.source_files import find_sources
from weighted_mtp.training.model.trunk import load_trunk

SMALL = 1 << 16
"""Largest document in these tests, in bytes."""
MANY = 1 << 24
"""Bytes of a document in these tests."""
HELD = 1 << 23
"""Bytes that a reader may hold: a few pieces of a file."""
LINES = {"a.jsonl.gz": b'{"text": "%s"}\n', "a.txt.gz": b"%s\n"}


def rows_of(path: Path) -> list[Row]:
    """The rows of a file."""
    sources = find_sources(str(path)).read
    return [row for batch in read_batches(sources, Fields("text"), "line", SMALL) for _, row in batch.rows]


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """`peak()` is the most memory that Python has held since the call before, in bytes."""

    def most() -> int:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return held

    tracemalloc.start()
    yield most
    tracemalloc.stop()


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_any_length_is_not_held(name: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    line = LINES[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(line % b"ok" + line % (b"a" * MANY) + line % b"fine"))
    assert path.stat().st_size < SMALL
    assert peak() > MANY
    assert [isinstance(row, MalformedRow) for row in rows_of(path)] == [False, True, False]
    assert peak() < HELD


@pytest.mark.parametrize(
    ("name", "start", "unit", "message"),
    [
        ("a.json.gz", b'[{"text": "ok"}, "', b"a", "element 1 is no valid JSON, or longer than"),
        ("a.json.gz", b"[", b"[", "recursion"),
        ("a.csv.gz", b"text\nok\n", b"a", "the record at line 3 has more than"),
        ("a.csv.gz", b'text\nok\n"', b"a\n", "the record at line [0-9,]+ has more than"),
    ],
    ids=["array", "nested array", "csv line", "csv quote"],
)
def test_what_cannot_be_skipped_is_an_error(
    name: str, start: bytes, unit: bytes, message: str, tmp_path: Path, peak: Callable[[], int]
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(start + unit * (MANY // len(unit))))
    assert peak() > MANY
    with pytest.raises(UserError, match=rf"{name}: cannot be read as \w+ \(.*({message})") as error:
        rows_of(path)
    assert "\n" not in str(error.value)
    assert peak() < HELD


def bomb(levels: int) -> str:
    """YAML with `10**levels` values behind aliases."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb(9), "line 4: more than 10,000 values, aliases included"),
        ("input: &a [*a]\n", "line 1: 'a' contains itself"),
        ("input: &a {b: [*a]}\n", "line 1: 'a' contains itself"),
        ("input: " + "[" * 50_000, "line 1: nested more than 100 deep"),
        ("input: " + "{a: " * 50_000, "line 1: nested more than 100 deep"),
        ("input: [" + "a," * 20_000 + "]", "line 1: more than 10,000 values, aliases included"),
        ("input: '" + "a" * (1 << 20) + "'", "more than 1,048,576 characters"),
    ],
    ids=["aliases", "list in itself", "mapping in itself", "deep lists", "deep mappings", "long", "large"],
)
def test_settings_that_grow(text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["verify", "--config", str(tmp_path / "run.yaml")]) == 2
    line = f"wmtp verify: error: --config {tmp_path}/run.yaml: not valid YAML ({problem}); correct the file\n"
    assert capsys.readouterr().err == line


def test_a_few_aliases_are_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("set: &a nowhere.html\nhtml: *a\n")
    assert main(["inspect", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "nowhere.html: no such shard set" in capsys.readouterr().err


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint with changes to its config."""

    def change(**settings: int) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = AutoConfig.for_model("llama", vocab_size=260, num_hidden_layers=1, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | settings))
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 10_000_000), ("num_experts", 1 << 20), ("head_dim", 10**9)]
)
@pytest.mark.parametrize("from_scratch", [True, False])
def test_a_config_with_more_or_larger_layers_than_any_model(
    name: str, value: int, from_scratch: bool, changed: Callable[..., Path]
) -> None:
    path = changed(**{name: value})
    with pytest.raises(UserError, match=rf"{path}: .*\({name} is {value:,}, and at most [0-9,]+ are possible\)"):
        load_trunk(str(path), from_scratch=from_scratch)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", 1 << 20), ("vocab_size", 1 << 24)])
def test_shapes_are_compared_before_memory_is_allocated(name: str, value: int, changed: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=rf"has shape \(\d+, \d+\) in the checkpoint and \(.*{value}.*\) by its config"):
        load_causal_lm("--model it", changed(**{name: value}), dtype="float32")
