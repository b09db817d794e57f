"""Differences between arms with uncertainty over seeds and evaluation examples at once: a two-way bootstrap.

Every arm is trained with S seeds and evaluated on the same E examples. Both are samples: other seeds would draw other
candidate rows and train otherwise, other examples would be answered otherwise. Resampling seeds and examples
independently of one another (the pigeonhole bootstrap: A. Owen, Annals of Applied Statistics 1, 2007) carries both into
one standard error, errs on the side of too large a one, and needs no model of how the two interact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning.errors import RequestError, message

DRAWS = 4000
_BLOCK = 1 << 22  # numbers alive at once


@dataclass(frozen=True)
class TwoWay:
    """A difference in nats per token and its two-way uncertainty.

    Args:
        difference: Mean over seeds of (summed nats of all examples / their tokens).
        se: Standard error over seeds and examples; NaN with one seed.
        df: Degrees of freedom of that standard error, from S − 1 (all of it from the seeds) to E − 1 (none of it).
        half_width: Of the 95 % interval, by the t distribution.
        p: Two-sided, of the same t; an interval excludes zero exactly where p is below 0.05.
    """

    difference: float
    se: float
    df: float
    half_width: float
    p: float


def two_way_bootstrap(
    sums: ArrayLike, tokens: ArrayLike, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> TwoWay:
    """Mean difference between two arms and its two-way bootstrap standard error.

    Each draw takes S − 1 of the S seeds (so that the seeds' part of the variance is not too small: Rao and Wu, Journal
    of the American Statistical Association 83, 1988) and E of the E examples, both with replacement, and divides summed
    nats by the tokens of the examples drawn. Five seeds know little of their own spread, which a percentile of the
    bootstrap would hide: the quantile is that of t, with the degrees of freedom of the two parts of the variance after
    Satterthwaite (S − 1 for what the seeds' means show, E − 1 for the rest).

    Args:
        sums: float64 [S, E], summed nats of the arm minus those of the other, per seed and example.
        tokens: int [E], supervised tokens of the examples.
        confidence: Of the interval.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        RequestError: the shapes do not fit, or there is no token.
    """
    from scipy import stats

    d, c = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if d.ndim != 2 or c.shape != d.shape[1:] or not c.sum():
        cause = f"differences of shape {d.shape} with {c.shape[0] if c.ndim else 0} token counts"
        raise RequestError(message("two-way bootstrap", cause, "give [seeds, examples] and one count per example"))
    count, examples = d.shape
    difference = float(d.sum() / (count * c.sum()))
    if count < 2:
        return TwoWay(difference, math.nan, math.nan, math.nan, math.nan)
    rng, means = np.random.default_rng(seed), list[NDArray[np.float64]]()
    block = max(1, _BLOCK // examples)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        seeds = rng.multinomial(count - 1, np.full(count, 1.0 / count), size) / (count - 1)
        drawn = rng.multinomial(examples, np.full(examples, 1.0 / examples), size)
        means.append(np.einsum("be,be->b", seeds @ d, drawn) / (drawn @ c))
    variance = float(np.concatenate(means).var(ddof=1))
    if variance == 0.0:  # arms that are the same rows
        return TwoWay(difference, 0.0, count - 1.0, 0.0, 1.0 if difference == 0.0 else 0.0)
    of_seeds = min(float((d.sum(axis=1) / c.sum()).var(ddof=1)) / count, variance)
    rest = (variance - of_seeds) ** 2 / max(1, examples - 1)
    df = variance**2 / (of_seeds**2 / (count - 1) + rest)
    se = math.sqrt(variance)
    half = float(stats.t.ppf(0.5 + confidence / 2, df) * se)
    return TwoWay(difference, se, df, half, float(2.0 * stats.t.sf(abs(difference) / se, df)))
