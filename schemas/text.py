"""Foreign text on its way to a terminal, a page, a log or an error."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

MOST_SHOWN = 200
"""Most characters of an id or a label that are shown."""
SHOWN_FILES = 5
"""Most names of files, and most suffixes, in a message."""
SHOWN_NAME = 60
"""Most characters of each."""


def printable(text: str, kept: str = "") -> str:
    """`text` with control characters escaped, such as line breaks, terminal escapes and bidirectional overrides.

    Args:
        text: any text.
        kept: control characters to keep.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def is_utf8(text: str) -> bool:
    """Whether `text` has a form in UTF-8. Names of files may be other bytes, which Python holds as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """The beginning of `text`, if it is longer than `most` characters."""
    return text if len(text) <= most else text[:most] + "..."


def describe_files(names: Sequence[str]) -> str:
    """How many files, how many of each suffix, and the first names: `3 files (2 .md, 1 .bin): a.md, b.md, x.bin`.

    Args:
        names: relative names of files, with "/" as separator.
    """
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in names).most_common()
    kinds = [f"{count:,} {shortened(suffix, SHOWN_NAME)}" for suffix, count in suffixes[:SHOWN_FILES]]
    shown = [shortened(name, SHOWN_NAME) for name in names[:SHOWN_FILES]]
    kinds += ["..."] * (len(suffixes) > SHOWN_FILES)
    shown += ["..."] * (len(names) > SHOWN_FILES)
    return f"{len(names):,} file{'s' * (len(names) > 1)} ({', '.join(kinds)}): {', '.join(shown)}"
