"""Axes of the report's charts: names of rows, few ticks, ticks in the units of an indicator, legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning.study.report.text import label, short


def row_names(ax: Any, names: Sequence[str], most: int = 24) -> None:
    """The rows' names on the y axis, the first at the top."""
    ax.set_yticks(range(len(names)), [label(name, most) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


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
