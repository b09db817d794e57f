"""How well predictions of held-out runs rank and meet them, with intervals that are paired over these runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def spearman(a: ArrayLike, b: ArrayLike) -> Floats:
    """Rank correlation along the last axis; 0 where either is constant, which ranks nothing.

    >>> float(spearman([1, 2, 3, 4], [1, 3, 2, 4]))
    0.8
    """
    from scipy.stats import rankdata

    x, y = (np.asarray(rankdata(values, axis=-1), dtype=np.float64) for values in (a, b))
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    norm = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.asarray((x * y).sum(axis=-1) / np.where(norm > 0, norm, np.inf))


def r_squared(actual: ArrayLike, predicted: ArrayLike) -> float:
    """1 less the squared error over that of the held-out runs' own mean."""
    y, f = np.asarray(actual, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    return float(1 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def resampled(sizes: Sequence[int], draws: int = DRAWS) -> list[tuple[Rows, Rows]]:
    """Draws of S seeds and, within each, of its items: of every seed k the draws that it is in (int64 [m], as often as
    it is), and the items that it has there (int64 [m, n_k]).

    Seeds are drawn with replacement, and then items; of one seed the items alone are.
    """
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(sizes), size=(draws, len(sizes)))
    owners = [np.repeat(np.arange(draws), (chosen == k).sum(axis=1)) for k in range(len(sizes))]
    return [(owner, rng.integers(n, size=(len(owner), n))) for owner, n in zip(owners, sizes, strict=True)]


def paired_interval(
    actual: Sequence[Floats], predicted: Sequence[Floats], reference: Sequence[Floats], draws: int = DRAWS
) -> tuple[float, float, float]:
    """Difference of Spearman between two ways, mean over generator seeds, and its 95 % bootstrap interval.

    Args:
        actual: Per seed, log losses of its held-out runs.
        predicted: The predictions of one way.
        reference: Those of the other, which is drawn with the same runs.
        draws: Of the bootstrap.
    """
    trios = list(zip(actual, predicted, reference, strict=True))

    def gap(trio: tuple[Floats, Floats, Floats], rows: Rows) -> Floats:
        y, one, other = (values[rows] for values in trio)
        return spearman(y, one) - spearman(y, other)

    found = [float(gap(trio, np.arange(len(trio[0])))) for trio in trios]
    drawn = np.zeros(draws)
    for trio, (owner, rows) in zip(trios, resampled([len(y) for y in actual], draws), strict=True):
        np.add.at(drawn, owner, gap(trio, rows) / len(trios))
    return float(np.mean(found)), *_limits(drawn)


def gain_interval(gains: Sequence[ArrayLike], draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean gain over generator seeds and their comparison seeds, and its 95 % bootstrap interval over both."""
    values = [np.asarray(one, dtype=np.float64) for one in gains]
    drawn = np.zeros(draws)
    for one, (owner, rows) in zip(values, resampled([len(v) for v in values], draws), strict=True):
        np.add.at(drawn, owner, one[rows].mean(axis=1) / len(values))
    return float(np.mean([v.mean() for v in values])), *_limits(drawn)


def _limits(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
