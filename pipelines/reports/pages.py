"""Reports: on the terminal, and as an HTML page where asked."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import write_text

WIDTH = 140
"""Columns of a report where there is no terminal to ask: in a pipe and on an HTML page."""


def check_page(html: Path | None) -> None:
    """Raise UserError if a page of this name could overwrite something that is none."""
    if html and html.suffix not in (".html", ".htm"):
        raise UserError(f"--html {html}: give a name that ends in .html, so that nothing else is overwritten")


def show(report: RenderableType, html: Path | None) -> None:
    """Print a report, and write it as HTML where asked."""
    console = Console(markup=False)
    console.width = console.width if console.is_terminal else WIDTH
    console.print(report)
    if html:
        page = Console(record=True, markup=False, width=WIDTH, file=io.StringIO())
        page.print(report)
        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, page.export_html())


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of token ids exactly as it was, special tokens included."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    """`text` on one line, with line breaks and other control characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
