"""Choosing by any column of a score table: ranks, shares that stay, quotas per group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import source_codes
from im_lightning.sampling.draws.systematic import Floats, Rows

SOURCE = "source"
MOST_GROUPS = 10_000
_ORDERS = ("high", "low")


@dataclass(frozen=True)
class Column:
    """A column to rank by: its name, whether low values come first, and the share of rows that stays; None for all."""

    name: str
    low: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Ranking:
    """By which scores rows are taken, what share of them stays, and how many of each group."""

    by: str | None = None
    """Columns of the score table, the first first: NAME[:low][:SHARE],…; high values first. With a share only that part
    of the rows stays (reward:0.5,ppl:low); one without is followed by the next where its values are equal."""
    keep: float | None = None
    """Share of the rows that stays, of those ranked by --by."""
    quota: str | None = None
    """Most rows per group, GROUP=ROWS,…, as a share of the budget where below 1; * is every group not named."""
    group: str = SOURCE
    """What --quota is about: source, or a column of the score table with few values."""

    def __post_init__(self) -> None:
        if self.by is not None and not self.columns:
            raise RequestError(message(f"by={self.by!r}", "it names no column", "give one, as in --by reward"))
        if self.keep is not None:
            _share(f"keep={self.keep}", self.keep)
        if self.keep is not None and self.by is None:
            raise RequestError(message("keep", "it is not said by which column", "pass --by (by=) with it"))
        if self.keep is not None and self.columns[-1].share is not None:
            cause = f"the last column of by={self.by} has a share of its own"
            raise RequestError(message(f"keep={self.keep}", cause, "give one of them"))

    @cached_property
    def columns(self) -> list[Column]:
        """What `by` says.

        Raises:
            RequestError: it cannot be read.
        """
        return [_column(text.strip()) for text in (self.by or "").split(",") if text.strip()]

    @property
    def narrows(self) -> bool:
        """Whether it leaves out rows, whatever the budget."""
        return self.keep is not None or self.quota is not None or any(c.share is not None for c in self.columns)

    def order(self, table: ScoreTable, usable: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Rows, list[Rows]]:
        """The usable rows that stay, best first, equal ones in random order; and per column those that it leaves out.

        Args:
            table: Scores of N rows.
            usable: bool [N]; rows with a value in every column of `by`.
            rng: Decides among equal rows.
        """
        rows = np.flatnonzero(usable)
        rng.shuffle(rows)
        out: list[Rows] = []
        ranked: list[Floats] = []
        for place, column in enumerate(self.columns):
            values = table.values[column.name]
            key = values if column.low else -values
            last = place == len(self.columns) - 1
            share = self.keep if last and column.share is None else column.share
            if column.share is None or last:
                ranked.append(key)
            if column.share is None and not last:
                out.append(rows[:0])
                continue
            keys = ranked if last else [key]
            rows = rows[np.lexsort([k[rows] for k in reversed(keys)])]
            kept = len(rows) if share is None else max(1, round(share * len(rows)))
            out.append(rows[kept:])
            rows = rows[:kept]
        return rows, out

    def quotas(self, table: ScoreTable, budget: int | None) -> Quotas | None:
        """How many rows each group may give.

        Raises:
            RequestError: a quota that cannot be read, a group that is not there, a share without a budget in rows.
        """
        if self.quota is None:
            return None
        names, code = _groups(table, self.group)
        most = np.full(len(names), np.iinfo(np.int64).max)
        asked = dict(_quota(part.strip(), budget) for part in self.quota.split(",") if part.strip())
        if "*" in asked:
            most[:] = asked["*"]
        unknown = [name for name in asked if name != "*" and name not in names]
        if unknown:
            known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            cause = f"there is no {self.group} {', '.join(unknown)}"
            raise RequestError(message(f"quota {self.quota}", cause, f"name some of {known}"))
        for place, name in enumerate(names):
            most[place] = asked.get(name, most[place])
        return Quotas(names, code, most)


@dataclass
class Quotas:
    """Rows that each of g groups may still give: names [g], the group of each row, int64 [N], and `left`, int64 [g]."""

    names: list[str]
    group: NDArray[np.int64]
    left: NDArray[np.int64]

    def allows(self, row: int) -> bool:
        return bool(self.left[self.group[row]] > 0)

    def take(self, row: int) -> None:
        self.left[self.group[row]] -= 1


def _column(text: str) -> Column:
    name, *rest = text.split(":")
    low, share = False, None
    for part in rest:
        if part in _ORDERS:
            low = part == "low"
            continue
        try:
            share = float(part)
        except ValueError as error:
            cause = f"{part!r} is neither high, low nor a share"
            raise RequestError(message(f"by {text}", cause, "write NAME, NAME:low or NAME:low:0.5")) from error
        _share(f"by {text}", share)
    return Column(name, low, share)


def _share(what: str, value: float) -> None:
    if not 0 < value <= 1:
        raise RequestError(message(what, "a share of rows lies above 0, and at 1 at most", "give such as 0.5"))


def _quota(text: str, budget: int | None) -> tuple[str, int]:
    """A group and its rows."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (equals and name) or not 0 <= value < math.inf or (value >= 1 and value != int(value)):
        cause = "it does not say a number of rows, or a share of the budget, of a group"
        raise RequestError(
            message(f"quota {text}", cause, "write GROUP=ROWS or GROUP=SHARE, such as web=500 or web=0.2")
        )
    if 0 < value < 1:
        if budget is None:
            cause = "it is a share, and there is no budget in rows"
            raise RequestError(message(f"quota {text}", cause, "give a number of rows, or pass --budget (budget=)"))
        value = math.floor(value * budget + 1e-9)
    return name, int(value)


def _groups(table: ScoreTable, column: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the groups, and the group of each row."""
    if column == SOURCE:
        return source_codes(table.source)
    values, code = np.unique(table.matrix([column])[:, 0], return_inverse=True)
    if len(values) > MOST_GROUPS:
        cause = f"it has {len(values):,} different values"
        raise RequestError(
            message(f"group {column}", cause, "name a column that says a group, such as a topic's number")
        )
    names = ["none" if math.isnan(value) else repr(value).removesuffix(".0") for value in values.tolist()]
    return names, code.astype(np.int64)
