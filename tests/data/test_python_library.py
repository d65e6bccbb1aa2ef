import json
from pathlib import Path

import pytest

from weighted_mtp.data.python_library import documentation, sources, split, write_jsonl


def test_the_documentation_is_prose_with_names() -> None:
    documents = dict(documentation())
    assert list(documents) == sorted(documents)
    assert "subscription" in documents["documentation/subscriptions"]
    assert sum(map(len, documents.values())) > 300_000


def test_the_sources_are_modules_without_tests() -> None:
    documents = list(sources())
    names = [name for name, _ in documents]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert "sources/json/decoder.py" in names
    assert len(set(names)) == len(names)
    for folder in ("/test/", "/tests/", "site-packages", "idlelib", "__pycache__", "pydoc_data", "_sysconfigdata"):
        assert not any(folder in name for name in names)
    assert all(text.strip() for _, text in documents)
    assert documents == list(sources())


def test_split_deals_every_document_once_and_by_its_name_alone() -> None:
    documents = [(f"doc-{i}", "text") for i in range(2000)]
    parts = split(documents, train=0.7, held_out=0.2, rest=0.1)
    assert sorted(document for part in parts.values() for document in part) == sorted(documents)
    # Three standard deviations of a binomial count are at most 0.031 of 2000.
    for part, share in {"train": 0.7, "held_out": 0.2, "rest": 0.1}.items():
        assert len(parts[part]) / 2000 == pytest.approx(share, abs=0.031)
    fewer = split(documents[::3], train=0.7, held_out=0.2, rest=0.1)
    assert set(fewer["held_out"]) == set(parts["held_out"]) & set(documents[::3])


def test_write_jsonl_writes_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "corpora" / "text.jsonl"
    write_jsonl(path, [("a", "first\nsecond"), ("b", "ä")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": "a", "text": "first\nsecond"},
        {"id": "b", "text": "ä"},
    ]
