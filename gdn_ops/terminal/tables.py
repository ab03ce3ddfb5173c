"""Lay out tables and texts as plain text that fits a width; nothing is ever cut off.

A table that is too wide has texts wrapped between words, in the columns that take most room. Where
that does not suffice, each row becomes a block of lines, a line per column.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

Section = tuple[str, Sequence[Sequence[str]]]
"""A heading, or an empty text for none, and rows of cells, which may end early."""

GAP = "  "
NARROWEST = 20


def width() -> int:
    """Return the columns of the terminal: COLUMNS, or its own size, or 80 where there is none."""
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def wrapped(text: str, limit: int | None = None, indent: str = "") -> str:
    """Return a text in lines that fit, those after the first indented; words stay whole."""
    lines = []
    for line in text.splitlines() or [""]:
        first = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            limit or width(),
            subsequent_indent=first + indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def table(head: Sequence[str], sections: Sequence[Section], limit: int | None = None) -> str:
    """Return a table in plain text that fits a width: that of the terminal when not given.

    Args:
        head: the names of the columns.
        sections: the rows; cells that begin with spaces are indented.
        limit: columns of text.
    """
    limit = limit or width()
    sections = [(title, [_full(row, len(head)) for row in rows]) for title, rows in sections]
    rows = [list(head), *(row for _, own in sections for row in own)]
    columns = list(zip(*rows, strict=True))
    widths = _fitted(columns, limit)
    if widths is None:
        return _blocks(head, sections, limit)
    lines = _lines(head, widths)
    for title, own in sections:
        lines += wrapped(title, limit, GAP).splitlines() if title else []
        for row in own:
            lines += _lines(row, widths)
    return "\n".join(lines)


def _full(row: Sequence[str], count: int) -> list[str]:
    return [*row, *[""] * (count - len(row))]


def _longest_word(cell: str) -> int:
    indent = len(cell) - len(cell.lstrip())
    return indent + max(map(len, cell.split()), default=0)


def _fitted(columns: Sequence[Sequence[str]], limit: int) -> list[int] | None:
    """Return widths of columns whose sum fits, None without.

    Made narrower first is the column where that wraps fewest more cells, of these the widest.
    """
    lengths = [[len(cell) for cell in cells] for cells in columns]
    least = [max(map(_longest_word, cells)) for cells in columns]
    widths = [max(own) for own in lengths]
    room = limit - len(GAP) * (len(widths) - 1)
    while sum(widths) > room:
        wide = [i for i, w in enumerate(widths) if w > least[i]]
        if not wide:
            return None
        costs = {i: (lengths[i].count(widths[i]), -widths[i]) for i in wide}
        widths[min(wide, key=costs.__getitem__)] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return a row as lines, each cell wrapped in its column."""
    cells = []
    for cell, w in zip(row, widths, strict=True):
        indent = cell[: len(cell) - len(cell.lstrip())]
        cells.append(wrapped(cell, w, indent and GAP).splitlines() or [""])
    lines = []
    for i in range(max(map(len, cells))):
        parts = (c[i] if i < len(c) else "" for c in cells)
        lines.append(GAP.join(f"{p:<{w}}" for p, w in zip(parts, widths, strict=True)).rstrip())
    return lines


def _blocks(head: Sequence[str], sections: Sequence[Section], limit: int) -> str:
    """Return a block of lines for each row: its first cell, then a line per column."""
    name_width = max(map(len, head[1:]), default=0)
    lines = []
    for title, rows in sections:
        lines += wrapped(title, limit, GAP).splitlines() if title else []
        for row in rows:
            lines += wrapped(row[0], limit, GAP).splitlines()
            indent = row[0][: len(row[0]) - len(row[0].lstrip())] + GAP
            for name, cell in zip(head[1:], row[1:], strict=True):
                if cell:
                    text = f"{indent}{name:<{name_width}}{GAP}{cell}"
                    lines += wrapped(text, limit, " " * (name_width + len(GAP))).splitlines()
    return "\n".join(lines)
