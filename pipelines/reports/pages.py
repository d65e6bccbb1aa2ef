"""Prints whole reports, and writes them as HTML pages if requested."""

import io
from pathlib import Path

from rich.console import RenderableType

from weighted_mtp.pipelines.reports.console import WIDTH, new_console
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.schemas.storage.locks import enclosing_shard_set


def check_page(html: Path | None) -> None:
    """Raise UserError unless the name of the page ends in .html or .htm, or if it lies in a shard set."""
    if html and html.suffix not in (".html", ".htm"):
        raise UserError(f"--html {html}: give a name that ends in .html, to avoid overwriting other files")
    if html and (inside := enclosing_shard_set(html)):
        raise UserError(f"--html {html}: lies inside the shard set {inside}; choose another directory")


def show(report: RenderableType, html: Path | None) -> None:
    """Print a report, and write it to `html` if given."""
    new_console(soft_wrap=False).print(report)
    if html:
        page = new_console(soft_wrap=False, record=True, width=WIDTH, file=io.StringIO())
        page.print(report)
        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, page.export_html())
