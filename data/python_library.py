"""Text included in every Python installation: documentation and source code of its standard library.

These are two clearly different domains: a few hundred kilobytes of prose and several megabytes of code. The documents
depend on the Python version, but not on the machine.
"""

import bisect
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from weighted_mtp.schemas.storage.files import atomic_write

Document = tuple[str, str]
"""Name and text."""

SKIPPED_FOLDERS = frozenset({"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"})
SKIPPED_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def documentation() -> Iterator[Document]:
    """Yield the language reference topics listed by `help("topics")`, sorted by name.

    Raises:
        ModuleNotFoundError: the Python installation lacks `pydoc_data`.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"documentation/{name}", topics[name]


def sources() -> Iterator[Document]:
    """Yield the Python modules of the standard library, sorted by path, without tests and files that are not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = SKIPPED_FOLDERS | SKIPPED_TEST_FOLDERS
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        machine_specific = path.parts[0].startswith(("_sysconfigdata", "config-"))
        if not machine_specific and skipped.isdisjoint(path.parts[:-1]):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield f"sources/{path.as_posix()}", text


def split(documents: Iterable[Document], **shares: float) -> dict[str, list[Document]]:
    """Split documents into named parts, for example `split(documents(), train=0.8, held_out=0.2)`.

    The name of a document alone determines its part: adding or removing other documents does not change it. Shares are
    expected values; small parts can be off by a few documents.

    Args:
        shares: share of the documents in each part; they sum to 1.
    """
    assert abs(sum(shares.values()) - 1) < 1e-9
    parts: dict[str, list[Document]] = {part: [] for part in shares}
    ends = list(itertools.accumulate(shares.values()))[:-1]
    for document in documents:
        digest = hashlib.sha256(document[0].encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        parts[list(shares)[bisect.bisect(ends, place)]].append(document)
    return parts


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON Lines with the fields `id` and `text`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for name, text in documents:
            file.write(json.dumps({"id": name, "text": text}).encode() + b"\n")
