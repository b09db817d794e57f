"""Plain-text tables that stay readable on a narrow terminal: columns go by rank, then rows turn into blocks."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 120  # for pipes and files


@dataclass(frozen=True)
class Column:
    """A column: its header, its side, and when it goes (0 never; the highest rank first)."""

    header: str
    right: bool = True
    rank: int = 0


def terminal_width() -> int:
    """Columns of the terminal (or of `COLUMNS`); 120 where the output is not a terminal."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return WIDE
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def text_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    """The table as text of at most `width` columns.

    Columns that do not fit are left out by rank and named below; where even the others do not fit, each row becomes
    a block of its own, `header: value` by line.
    """
    shown = list(range(len(columns)))
    widths = [max(len(c.header), *(len(r[j]) for r in rows)) if rows else len(c.header) for j, c in enumerate(columns)]
    while sum(widths[j] + 2 for j in shown) - 2 > width:
        worst = max(shown, key=lambda j: columns[j].rank)
        if columns[worst].rank == 0:
            return _blocks(columns, rows, width)
        shown.remove(worst)
    lines = [_line([columns[j].header for j in shown], [columns[j] for j in shown], [widths[j] for j in shown])]
    lines.append("-" * (sum(widths[j] + 2 for j in shown) - 2))
    lines += [_line([r[j] for j in shown], [columns[j] for j in shown], [widths[j] for j in shown]) for r in rows]
    hidden = [c.header for j, c in enumerate(columns) if j not in shown]
    if hidden:
        lines += textwrap.wrap(f"(hidden columns: {', '.join(hidden)})", width)
    return "\n".join(lines)


def wrapped(text: str, width: int, bullet: str = "") -> str:
    """The text broken at `width`, its own line breaks kept, later lines indented by the bullet's length."""
    indent = " " * len(bullet)
    out = []
    for number, line in enumerate(text.splitlines()):
        first = bullet if number == 0 else indent
        lines = textwrap.wrap(line, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
        out += lines or [""]
    return "\n".join(out)


def term_list(pairs: Sequence[tuple[str, str]], width: int) -> str:
    """Each term with its text beside it or, where that would leave little room, below it."""
    left = max(len(term) for term, _ in pairs) + 2
    out = []
    for term, text in pairs:
        beside = width - left >= 30
        indent = " " * (left if beside else 4)
        out += [] if beside else [term]
        first = term.ljust(left) if beside else indent
        out += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(out)


def shell_lines(command: str, width: int) -> str:
    """A command, broken so that it can still be copied."""
    if len(command) <= width:
        return command
    narrow = textwrap.TextWrapper(width - 2, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    lines = narrow.wrap(command)  # no example has white space in quotes
    return " \\\n".join(lines)


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts = [cell.rjust(w) if c.right else cell.ljust(w) for cell, c, w in zip(cells, columns, widths, strict=True)]
    return "  ".join(parts).rstrip()


def _blocks(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    out = []
    for row in rows:
        out.append(wrapped(row[0], width))
        for column, cell in list(zip(columns, row, strict=True))[1:]:
            if cell:
                out.append(wrapped(f"{column.header}: {cell}", width, bullet="  "))
    return "\n".join(out)
