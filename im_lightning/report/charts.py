"""The charts of the report: one line or dot per thing (arms, runs, coefficients, sources), and curves over a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from im_lightning.report.svg import PALETTE, RAMP, Figure, Tips, draw
from im_lightning.report.text import label, short

INK, MUTED = PALETTE["ink"], PALETTE["muted"]
ACCENT, WARM = PALETTE["accent"], PALETTE["warm"]
MOST_TIPS = 400  # points drawn one by one with a tooltip; more become one cloud
_LINES = (ACCENT, WARM, PALETTE["good"], PALETTE["violet"])


def row_names(ax: Any, names: Sequence[str], most: int = 24) -> None:
    """The rows' names on the y axis, the first at the top."""
    ax.set_yticks(range(len(names)), [label(name, most) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def rows_over(ax: Any, names: Sequence[str], xlabel: str) -> None:
    """Axes of one row per name over a number."""
    row_names(ax, names)
    ax.grid(axis="x")
    ax.set_xlabel(xlabel)
    few_ticks(ax.xaxis)


def both_axes(ax: Any, xlabel: str, ylabel: str) -> None:
    """Axes of one number over another."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid()
    few_ticks(ax.xaxis)
    few_ticks(ax.yaxis)


def legend_above(ax: Any) -> None:
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.3)


def few_ticks(axis: Any, most: int = 5) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most))


def scale_ticks(ax: Any, kind: str, low: float, high: float) -> None:
    """Ticks at round values of the indicator where the axis is in φ."""
    if kind not in ("log", "log1p"):
        few_ticks(ax.xaxis)
        return
    forward = np.log if kind == "log" else np.log1p
    powers = np.arange(-12, 16)
    for steps in ((1, 2, 5), (1, 3), (1,), (1,), (1,)):
        every = [float(m * 10.0**p) for p in powers for m in steps]
        found = [v for v in every if low <= v <= high]
        found = ([0.0] if kind == "log1p" and low <= 0 else []) + [v for v in found if kind == "log" or v >= 0.3]
        if len(found) <= 6:
            break
    while len(found) > 6:
        found = found[::2]
    if len(found) < 2:
        found = [low, high]
    ax.set_xticks([float(forward(v)) for v in found], [short(v) for v in found])


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
        if zero:
            ax.axvline(0.0, color=MUTED, lw=1)
        rows_over(ax, [row.name for row in rows], xlabel)

    return draw(key, title, paint, 0.7 + 0.27 * len(rows))


class Point(NamedTuple):
    """A run in a scatter plot: x, its interval or None, y, tooltip, role."""

    x: float
    low: float | None
    high: float | None
    y: float
    tip: str
    role: str = "accent"


def against(key: str, title: str, points: Sequence[Point], xlabel: str, ylabel: str, equality: bool = True) -> Figure:
    """One number against another, such as measured against predicted, with the line of equality."""

    def paint(ax: Any, tips: Tips) -> None:
        every = np.array([v for p in points for v in (p.x, p.y)])
        edges = [float(every.min()), float(every.max())]
        if equality:
            ax.plot(edges, edges, color=MUTED, lw=1, ls="--")
        for p in points:
            if p.low is not None and p.high is not None:
                ax.plot([p.low, p.high], [p.y, p.y], color=PALETTE[p.role], lw=1, alpha=0.3)
        if len(points) > MOST_TIPS:
            ax.plot([p.x for p in points], [p.y for p in points], ".", color=ACCENT, alpha=0.6)
        else:
            for p in points:
                ax.plot([p.x], [p.y], "o", ms=5, color=PALETTE[p.role], alpha=0.85, gid=tips.add(p.tip))
        both_axes(ax, xlabel, ylabel)

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
        rows_over(ax, list(groups), xlabel)

    return draw(key, title, paint, 0.75 + 0.36 * len(groups))


def pairs(
    key: str,
    title: str,
    rows: Sequence[tuple[str, float, float]],
    names: tuple[str, str],
    xlabel: str,
    form: str = ".1f",
) -> Figure:
    """One line per row: an open dot for before, a full one for after, joined."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, (name, before, after) in enumerate(rows):
            ax.plot([before, after], [place, place], color=MUTED, lw=1)
            tip = f"{name}: {names[0]} {before:{form}}, {names[1]} {after:{form}}"
            ax.plot([before], [place], "o", ms=6, mfc="none", mec=INK, label=names[0] if not place else None)
            ax.plot([after], [place], "o", ms=6, color=ACCENT, label=names[1] if not place else None, gid=tips.add(tip))
        rows_over(ax, [name for name, _, _ in rows], xlabel)
        legend_above(ax)

    return draw(key, title, paint, 1.0 + 0.27 * len(rows))


def bars(key: str, title: str, rows: Sequence[tuple[str, float]], xlabel: str) -> Figure:
    """One bar per row from zero, blue to the right, orange to the left."""

    def paint(ax: Any, tips: Tips) -> None:
        for place, (name, value) in enumerate(rows):
            colour = ACCENT if value >= 0 else WARM
            ax.barh(place, value, height=0.6, color=colour, alpha=0.8, gid=tips.add(f"{name}: {value:+.3g}"))
        ax.axvline(0.0, color=MUTED, lw=1)
        rows_over(ax, [name for name, _ in rows], xlabel)

    return draw(key, title, paint, 0.7 + 0.27 * len(rows))


def histogram(
    key: str, title: str, values: np.ndarray, sources: Mapping[str, np.ndarray], kind: str, xlabel: str
) -> Figure:
    """How often each value occurs; below, per source, the median, the middle half and the middle 90 %.

    Args:
        key: Of the figure.
        title: Its caption.
        values: float64 [N], finite.
        sources: source → its values; {} for none.
        kind: Scale: "log", "log1p" or "identity".
        xlabel: Of the axis.
    """
    forward = {"log": np.log, "log1p": np.log1p}.get(kind, np.asarray)
    low, high = np.quantile(values, [0.005, 0.995])

    def paint(axes: Any, tips: Tips) -> None:
        top = axes[0] if sources else axes
        inside = forward(values[(values >= low) & (values <= high)])
        whole = kind != "log" and bool((values == np.round(values)).all()) and high - low <= 40
        if whole:
            edges = np.arange(low - 0.5, high + 1.5)
            found = np.histogram(values, edges)[0]
            edges = forward(np.maximum(edges, 0.0)) if kind == "log1p" else edges
        else:
            found, edges = np.histogram(inside, 30)
        top.stairs(100 * found / len(values), edges, fill=True, color=ACCENT, alpha=0.75)
        top.set_ylabel("% of rows")
        top.margins(x=0.02)
        few_ticks(top.yaxis, 3)
        if sources:
            bottom = axes[1]
            for place, (name, column) in enumerate(sources.items()):
                q = forward(np.clip(np.quantile(column, [0.05, 0.25, 0.5, 0.75, 0.95]), low, high))
                bottom.plot(q[[0, 4]], [place, place], color=MUTED, lw=1)
                bottom.plot(q[[1, 3]], [place, place], color=ACCENT, lw=4, alpha=0.75, solid_capstyle="butt")
                tip = f"{name}: median {np.median(column):.4g}, {len(column):,} rows"
                bottom.plot([q[2]], [place], "o", ms=5, color=INK, gid=tips.add(tip))
            row_names(bottom, list(sources), most=14)
        last = axes[-1] if sources else axes
        last.set_xlabel(xlabel)
        scale_ticks(last, kind, low, high)

    if not sources:
        return draw(key, title, paint, 1.9)
    return draw(key, title, paint, 1.75 + 0.22 * len(sources), (1.2, 0.22 * len(sources) + 0.1))


def counts(key: str, title: str, values: np.ndarray, xlabel: str, ylabel: str, mark: float | None = None) -> Figure:
    """A plain histogram, with a vertical mark where there is one."""

    def paint(ax: Any, tips: Tips) -> None:
        found, edges = np.histogram(values, min(30, max(8, len(values) // 3)))
        ax.stairs(found, edges, fill=True, color=ACCENT, alpha=0.75)
        if mark is not None:
            ax.axvline(mark, color=WARM, lw=1.5)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        few_ticks(ax.xaxis)

    return draw(key, title, paint, 2.1)


def matrix(key: str, title: str, names: Sequence[str], values: np.ndarray) -> Figure:
    """Correlations: blue for positive, orange for negative, the stronger the fuller; the number in each cell."""
    n = len(names)

    def paint(ax: Any, tips: Tips) -> None:
        from matplotlib.patches import Rectangle

        for i in range(n):
            for j in range(n):
                r = values[i, j]
                if not math.isfinite(r):
                    ax.text(j, i, "–", ha="center", va="center", color=MUTED)
                    continue
                colour = ACCENT if r >= 0 else WARM
                tip = f"{names[i]} and {names[j]}: {r:.2f}"
                ax.add_patch(
                    Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fc=colour, alpha=0.8 * abs(r), lw=0, gid=tips.add(tip))
                )
                if n <= 12:
                    ax.text(j, i, f"{r:.1f}".replace("-0.0", "0.0"), ha="center", va="center", fontsize=8, color=INK)
        ax.set_xlim(-0.5, n - 0.5)
        shown = [label(name, 18) for name in names]
        ax.set_xticks(range(n), shown, rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(n), shown)
        ax.set_ylim(n - 0.5, -0.5)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    return draw(key, title, paint, max(1.9, min(5.0, 1.3 + 0.29 * n)))


def deciles(key: str, title: str, steps: np.ndarray, losses: np.ndarray, ylabel: str) -> Figure:
    """Loss over steps, one line per decile from blue (lowest) to orange (highest).

    Args:
        key: Of the figure.
        title: Its caption.
        steps: [s] optimiser steps.
        losses: float64 [s, 10], NaN where a decile was not seen.
        ylabel: Of the axis.
    """

    def paint(ax: Any, tips: Tips) -> None:
        for k in range(losses.shape[1]):
            seen = np.isfinite(losses[:, k])
            if seen.any():
                edge = k in (0, losses.shape[1] - 1)
                name = {0: "lowest tenth", losses.shape[1] - 1: "highest tenth"}.get(k)
                marker = "o" if seen.sum() == 1 else None
                ax.plot(steps[seen], losses[seen, k], color=RAMP[k], lw=2.4 if edge else 1.1, marker=marker, label=name)
        both_axes(ax, "optimiser steps", ylabel)
        if ax.get_legend_handles_labels()[0]:
            legend_above(ax)

    return draw(key, title, paint, 2.9)


def profile(key: str, title: str, lines: Mapping[str, np.ndarray], xlabel: str, ylabel: str) -> Figure:
    """Loss by decile, 1 to 10, a line with dots per name; NaN where a decile was not seen."""

    def paint(ax: Any, tips: Tips) -> None:
        for (name, values), colour in zip(lines.items(), _LINES, strict=False):
            seen = np.isfinite(values)
            at = np.arange(1, len(values) + 1)
            ax.plot(at[seen], values[seen], color=colour, lw=1.5, label=label(name))
            for x, y in zip(at[seen], values[seen], strict=True):
                ax.plot([x], [y], "o", ms=4, color=colour, gid=tips.add(f"{name}, tenth {x}: {y:.3f}"))
        both_axes(ax, xlabel, ylabel)
        ax.set_xticks([1, 4, 7, 10])
        if len(lines) > 1:
            legend_above(ax)

    return draw(key, title, paint, 2.6)


def curve(key: str, title: str, x: Sequence[float], y: Sequence[float], kind: str, xlabel: str, ylabel: str) -> Figure:
    """A piecewise-linear function of an indicator; x on the scale of φ (`kind`), ticks in the indicator's units."""

    def paint(ax: Any, tips: Tips) -> None:
        back = {"log": np.exp, "log1p": np.expm1}.get(kind, np.asarray)
        ax.axhline(0.0, color=MUTED, lw=1)
        ax.plot(x, y, color=ACCENT, lw=2)
        for a, b in zip(x, y, strict=True):
            ax.plot([a], [b], "o", ms=5, color=ACCENT, gid=tips.add(f"{float(back(a)):.4g}: {b:+.3g}"))
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid(axis="y")
        few_ticks(ax.yaxis, 4)
        scale_ticks(ax, kind, float(back(x[0])), float(back(x[-1])))

    return draw(key, title, paint, 2.1)
