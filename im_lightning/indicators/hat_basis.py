"""The basis of the additive rule: per indicator a piecewise-linear function of φ, by hat functions at pool quantiles.

A linear rule cannot say that both extremes are bad. Hat functions can, and their dataset means are linear in the
dataset as those of φ are, so one rule serves run means and single examples. The hats of an indicator sum to 1 and
contain φ itself: φ = Σ knot_k · hat_k. The first hat is left out of the regressors, since the intercept knows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from im_lightning.indicators.transforms import Transform, weighted_mean

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable

HATS = 6
"""Regressors per indicator where the pool has that many different quantiles: seven knots."""
_NARROWEST = 0.02  # of the clipped range: knots closer than this would give a hat hardly any row


def pool_knots(
    table: ScoreTable, transforms: Mapping[str, Transform], hats: int = HATS, most_rows: int = 1_000_000
) -> dict[str, list[float]]:
    """Knots on the φ scale: the two clipping bounds, and pool quantiles of φ at equal steps between them.

    Args:
        table: The scored pool.
        transforms: indicator → φ, with finite bounds.
        hats: Hats wanted beside the first.
        most_rows: Longer pools are thinned evenly, so that a record costs no sorting of millions of rows.

    Returns:
        indicator → increasing knots. An indicator with less than two different ones has no basis and is left out.
    """
    step = max(1, -(-len(table) // most_rows))
    found = {}
    for name, transform in transforms.items():
        if not (math.isfinite(transform.low) and math.isfinite(transform.high)):
            continue
        values = transform.base().apply(table.values[name][::step])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        inner = np.quantile(values, np.arange(1, hats) / hats).tolist()
        knots = [transform.low]
        least = _NARROWEST * (transform.high - transform.low)
        for knot in inner:
            if knot - knots[-1] > least and transform.high - knot > least:
                knots.append(float(knot))
        if transform.high > transform.low:
            found[name] = [*knots, transform.high]
    return found


def hat_values(phi: np.ndarray, knots: list[float]) -> np.ndarray:
    """All hats of φ values: float64 [N, K + 1] for K + 1 knots, rows sum to 1; NaN where φ is missing."""
    columns = [np.interp(phi, knots, np.eye(len(knots))[k]) for k in range(len(knots))]
    out = np.column_stack(columns)
    out[~np.isfinite(phi)] = np.nan
    return out


def basis_means(
    table: ScoreTable,
    transforms: Mapping[str, Transform],
    knots: Mapping[str, list[float]],
    exposures: np.ndarray | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Exposure-weighted means of the hats: what a RunRecord keeps as `basis_means`.

    Args:
        table: The scored rows.
        transforms: indicator → φ.
        knots: indicator → knots.
        exposures: float [N], how often the run saw each row; by default once each.

    Returns:
        indicator → {"knots", "means"}; NaN means where no seen row has a value.
    """
    weight = np.ones(len(table)) if exposures is None else np.asarray(exposures, dtype=np.float64)
    seen = np.flatnonzero(weight)
    out = {}
    for name, points in knots.items():
        hats = hat_values(transforms[name].base().apply(table.values[name][seen]), list(points))
        means = [weighted_mean(column, weight[seen]) for column in hats.T]
        out[name] = {"knots": [float(k) for k in points], "means": means}
    return out


def hat_transforms(indicator: str, transform: Transform, knots: list[float]) -> dict[str, Transform]:
    """The regressors of an indicator under an additive rule: `ppl[0]` … `ppl[K-1]`, hats 1 to K of K + 1 knots."""
    out = {}
    for k in range(1, len(knots)):
        right = knots[k + 1] if k + 1 < len(knots) else math.inf
        hat = (knots[k - 1], knots[k], right)
        out[f"{indicator}[{k - 1}]"] = Transform(transform.kind, transform.low, transform.high, hat)
    return out


def knots_of(transforms: list[Transform]) -> list[float]:
    """The knots behind the hats of one indicator, in order; [] where they are no hats."""
    hats = [t.hat for t in transforms if t.hat is not None]
    return [hats[0][0], *(hat[1] for hat in hats)] if hats else []


def bend_directions(knots: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """How to write a function by its values at K + 1 knots as slope and bends.

    Returns:
        (line [K + 1]: the values of φ itself; bends [K + 1, K − 1]: an orthonormal basis of what is neither constant
        nor linear).
    """
    line = np.asarray(knots, dtype=np.float64)
    plane = np.column_stack([np.ones(len(line)), (line - line.mean()) / (line.std() or 1.0)])
    full = np.linalg.qr(np.column_stack([plane, np.eye(len(line))]))[0][:, : len(line)]
    return line, full[:, 2:]
