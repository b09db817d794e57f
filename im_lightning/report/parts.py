"""What a section of the report is made of; the template knows how each part is written, and escapes all text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from im_lightning.report.svg import Figure


@dataclass
class Words:
    """A paragraph.

    Args:
        text: What it says.
        kind: "plain", "verdict", "good", "bad" or "note".
    """

    text: str
    kind: str = "plain"
    is_a: str = "words"


@dataclass
class Head:
    """A column.

    Args:
        name: Its header.
        help: One sentence on what it shows; listed below the table.
        right: Whether it is set to the right, as numbers are.
    """

    name: str
    help: str = ""
    right: bool = True


@dataclass
class Table:
    """A table.

    Args:
        title: What it lists.
        heads: [k] columns.
        rows: [n][k] cells.
        strong: Rows to set in bold.
        left_out: What stands below about rows that are not shown.
        folded: Whether it opens only on demand.
        search: Whether a reader can search it, and sort it by its headings.
    """

    title: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    left_out: str = ""
    folded: bool = False
    search: bool = False
    is_a: str = "table"


@dataclass
class Figures:
    """Figures side by side where there is room."""

    items: list[Figure]
    is_a: str = "figures"


@dataclass
class Bullets:
    """A list of sentences."""

    items: list[str]
    is_a: str = "bullets"


@dataclass
class Printed:
    """What a command prints, as it prints it."""

    title: str
    text: str
    is_a: str = "printed"


@dataclass
class Shown:
    """One example of the pool.

    Args:
        heading: Row, source and prediction.
        facts: Its indicators.
        turns: (who, text, characters in full, whether it was cut).
    """

    heading: str
    facts: str
    turns: list[tuple[str, str, int, bool]]


@dataclass
class Examples:
    """Examples as text, under one title."""

    title: str
    items: list[Shown]
    is_a: str = "examples"


@dataclass
class Section:
    """One section of the page.

    Args:
        key: Its anchor.
        title: Its heading.
        lead: One or two sentences: what it shows and how to read it.
        parts: What it holds.
        absent: Where its input was not given: which argument adds it.
        short: Sentences for the summary at the top, (text, kind).
    """

    key: str
    title: str
    lead: str = ""
    parts: list[Any] = field(default_factory=list)
    absent: str = ""
    short: list[tuple[str, str]] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        return [figure for part in self.parts if isinstance(part, Figures) for figure in part.items]
