"""How objects show themselves in a notebook: a table that follows the notebook's own colors, every text escaped."""

from collections.abc import Sequence
from html import escape


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a titled table.

    Args:
        title: in plain text.
        headers: of the columns; empty, there is no head.
        rows: of plain text.
    """
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in headers)
    body = "".join(
        f"<tr>{''.join(f'<td style=text-align:left>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<p><b>{escape(title)}</b></p><table>{f'<thead><tr>{head}</tr></thead>' if head else ''}{body}</table>"
