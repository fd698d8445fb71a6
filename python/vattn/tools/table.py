"""Tables for people: rich's on a terminal that has it, aligned plain text anywhere else.

Promise: with output redirected, or without the ``vattn[cli]`` extra, what is printed is plain text without colours or
control codes. Thread: the one that owns the output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO | None = None) -> None:
    """Print a table; the first column is aligned left, the others right."""
    out = sys.stdout if file is None else file
    if out.isatty() and _print_rich(title, columns, rows, out):
        return
    print(plain_table(title, columns, rows), file=out)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as text."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = [title] if title else []
    rule = ["-" * width for width in widths]
    for row in (columns, rule, *rows):
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=Text(title) if title else None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, not str: a path such as [a] is no markup
    Console(file=out).print(table)
    return True
