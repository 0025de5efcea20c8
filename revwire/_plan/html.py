"""A plan as HTML, for notebooks: its table, and the lines around it as they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def as_html(head: str, rows: Sequence[Sequence[str]], lines: Iterable[str]) -> str:
    """A heading, a table whose first row names the columns (none where there are no rows), and lines of text."""
    table = "".join(_row(row, "td" if i else "th") for i, row in enumerate(rows))
    text = escape("\n".join(lines))
    return (
        f"<p><strong>{escape(head)}</strong></p>"
        + (f"<table>{table}</table>" if table else "")
        + (f"<pre>{text}</pre>" if text else "")
    )


def _row(cells: Iterable[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
