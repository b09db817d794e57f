"""How well predictions of held-out runs rank and meet them, with intervals that are paired over these runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
Floats = NDArray[np.float64]


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


def resampled(sizes: Sequence[int], draws: int = DRAWS, seed: int = 0) -> list[list[tuple[int, NDArray[np.int64]]]]:
    """Draws of seeds and, within each, of its items: per draw [(seed's place, its items' places), …].

    Seeds are drawn with replacement, and then items; of one seed the items alone are.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        out.append([(int(k), rng.integers(sizes[k], size=sizes[k])) for k in drawn])
    return out


def paired_interval(
    actual: Sequence[Floats], predicted: Sequence[Floats], reference: Sequence[Floats], draws: int = DRAWS
) -> tuple[float, float, float]:
    """Difference of Spearman between two ways, mean over generator seeds, and its 95 % bootstrap interval.

    Args:
        actual: Per seed, log losses of its held-out runs.
        predicted: The predictions of one way.
        reference: Those of the other, which is drawn with the same runs.
    """
    pairs = list(zip(actual, predicted, reference, strict=True))
    found = float(np.mean([spearman(y, a) - spearman(y, b) for y, a, b in pairs]))
    drawn = []
    for draw in resampled([len(y) for y in actual], draws):
        each = [(pairs[k][0][at], pairs[k][1][at], pairs[k][2][at]) for k, at in draw]
        drawn.append(np.mean([spearman(y, a) - spearman(y, b) for y, a, b in each]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return found, float(low), float(high)


def gain_interval(gains: Sequence[ArrayLike], draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean gain over generator seeds and their comparison seeds, and its 95 % bootstrap interval over both."""
    values = [np.asarray(one, dtype=np.float64) for one in gains]
    drawn = [np.mean([values[k][at].mean() for k, at in draw]) for draw in resampled([len(v) for v in values], draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.mean([v.mean() for v in values])), float(low), float(high)
