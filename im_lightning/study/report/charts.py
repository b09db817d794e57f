"""Charts with one line or dot per thing: arms, runs, coefficients, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from im_lightning.study.report.axes import few_ticks, legend_above, row_names
from im_lightning.study.report.figures import PALETTE, Figure, Tips, draw

INK, MUTED = PALETTE["ink"], PALETTE["muted"]
ACCENT, WARM = PALETTE["accent"], PALETTE["warm"]
MOST_TIPS = 400  # points drawn one by one with a tooltip; more become one cloud


class Dot(NamedTuple):
    """A value with its interval: name, value, low, high (None where there is none), role of its colour, tooltip."""

    name: str
    value: float
    low: float | None
    high: float | None
    role: str = "accent"
    tip: str = ""


def dots(key: str, title: str, rows: Sequence[Dot], xlabel: str, zero: bool = True) -> Figure:
    """One line per row: a dot, and its interval as a bar."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, row in enumerate(rows):
            colour = PALETTE[row.role]
            if row.low is not None and row.high is not None:
                ax.plot([row.low, row.high], [place, place], color=colour, lw=2.2, solid_capstyle="round")
            ax.plot([row.value], [place], "o", color=colour, ms=6, gid=tips.add(row.tip) if row.tip else None)
        row_names(ax, [row.name for row in rows])
        if zero:
            ax.axvline(0.0, color=MUTED, lw=1)
        ax.grid(axis="x")
        ax.set_xlabel(xlabel)
        few_ticks(ax.xaxis)

    return draw(key, title, paint, 0.7 + 0.27 * len(rows))


class Point(NamedTuple):
    """A run in a scatter plot: x, its interval or None, y, tooltip, role."""

    x: float
    low: float | None
    high: float | None
    y: float
    tip: str
    role: str = "accent"


def against(key: str, title: str, points: Sequence[Point], xlabel: str, ylabel: str) -> Figure:
    """Measured against predicted, with the line of equality."""

    def paint(ax: Any, tips: Tips) -> None:
        every = np.array([v for p in points for v in (p.x, p.y)])
        edges = [float(every.min()), float(every.max())]
        ax.plot(edges, edges, color=MUTED, lw=1, ls="--")
        for p in points:
            if p.low is not None and p.high is not None:
                ax.plot([p.low, p.high], [p.y, p.y], color=PALETTE[p.role], lw=1, alpha=0.3)
        if len(points) > MOST_TIPS:
            ax.plot([p.x for p in points], [p.y for p in points], ".", color=ACCENT, alpha=0.6)
        else:
            for p in points:
                ax.plot([p.x], [p.y], "o", ms=5, color=PALETTE[p.role], alpha=0.85, gid=tips.add(p.tip))
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid()
        few_ticks(ax.xaxis)
        few_ticks(ax.yaxis)

    return draw(key, title, paint, 3.6)


def strips(key: str, title: str, groups: Mapping[str, Sequence[tuple[float, str]]], xlabel: str) -> Figure:
    """One line per group: each value a dot (with its tooltip), the mean a bar."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, values in enumerate(groups.values()):
            x = np.array([v for v, _ in values])
            rng = np.random.default_rng(place)
            y = place + (rng.uniform(-0.2, 0.2, len(x)) if len(x) > 1 else np.zeros(1))
            if len(x) > MOST_TIPS:
                ax.plot(x, y, ".", color=ACCENT, alpha=0.5)
            else:
                for one, at, (_, tip) in zip(x, y, values, strict=True):
                    ax.plot([one], [at], "o", ms=4, color=ACCENT, alpha=0.65, mew=0, gid=tips.add(tip))
            ax.plot([x.mean()] * 2, [place - 0.33, place + 0.33], color=WARM, lw=2)
        row_names(ax, list(groups))
        ax.grid(axis="x")
        ax.set_xlabel(xlabel)
        few_ticks(ax.xaxis)

    return draw(key, title, paint, 0.75 + 0.36 * len(groups))


def pairs(
    key: str, title: str, rows: Sequence[tuple[str, float, float]], names: tuple[str, str], xlabel: str,
    form: str = ".1f",
) -> Figure:  # fmt: skip
    """One line per row: an open dot for before, a full one for after, joined."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, (name, before, after) in enumerate(rows):
            ax.plot([before, after], [place, place], color=MUTED, lw=1)
            tip = f"{name}: {names[0]} {before:{form}}, {names[1]} {after:{form}}"
            ax.plot([before], [place], "o", ms=6, mfc="none", mec=INK, label=names[0] if not place else None)
            ax.plot([after], [place], "o", ms=6, color=ACCENT, label=names[1] if not place else None, gid=tips.add(tip))
        row_names(ax, [name for name, _, _ in rows])
        ax.grid(axis="x")
        ax.set_xlabel(xlabel)
        few_ticks(ax.xaxis)
        legend_above(ax)

    return draw(key, title, paint, 1.0 + 0.27 * len(rows))


def bars(key: str, title: str, rows: Sequence[tuple[str, float]], xlabel: str) -> Figure:
    """One bar per row from zero, blue to the right, orange to the left."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, (name, value) in enumerate(rows):
            colour = ACCENT if value >= 0 else WARM
            ax.barh(place, value, height=0.6, color=colour, alpha=0.8, gid=tips.add(f"{name}: {value:+.3g}"))
        row_names(ax, [name for name, _ in rows])
        ax.axvline(0.0, color=MUTED, lw=1)
        ax.grid(axis="x")
        ax.set_xlabel(xlabel)
        few_ticks(ax.xaxis)

    return draw(key, title, paint, 0.7 + 0.27 * len(rows))
