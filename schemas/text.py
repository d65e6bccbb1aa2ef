"""Foreign text on its way to a terminal, a page, a log or an error."""

MOST_SHOWN = 200
"""Most characters of an id or a label that are shown."""


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


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """The beginning of `text`, if it is longer than `most` characters."""
    return text if len(text) <= most else text[:most] + "..."
