"""The benchmark's table, for a terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.registry import Ratio

_HEADS = ("work", "ratio", "bar", "met", "ours", "against", "note")


def markdown(ratios: Sequence[Ratio]) -> str:
    """A Markdown table, one line per ratio."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|---|--:|--:|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(r)) + " |" for r in ratios)])


def plain(ratios: Sequence[Ratio]) -> str:
    """The same in columns; notes on lines of their own."""
    table = [_HEADS[:-1], *(cells(r)[:-1] for r in ratios)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for index, row in enumerate(table):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index and ratios[index - 1].note:
            lines.append(f"    {ratios[index - 1].note}")
    return "\n".join(lines)


def cells(r: Ratio) -> tuple[str, ...]:
    met = {True: "yes", False: "**no**", None: ""}[r.met]
    bar = "" if r.bar is None else f"{'≥' if r.at_least else '≤'} {r.bar:.{r.digits}f}"
    return (r.work, f"{r.value:.{r.digits}f}", bar, met, r.ours, r.other, r.note)
