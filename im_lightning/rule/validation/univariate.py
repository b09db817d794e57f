"""Each indicator alone: how the run means of one indicator correlate with the loss, before any rule combines them.

The paper's first look at its runs (arXiv 2307.06290, univariate analysis), with intervals and a correction for asking
about many indicators at once. The unit is the subset: repeats of one subset are averaged first, since they share their
means and would count as evidence twice. An indicator that matters alone may do so through another one
it correlates with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from im_lightning._utils.files import plain
from im_lightning._utils.numbers import holm, number_or_dash
from im_lightning._utils.text_tables import Column, text_table
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import FitData, gather

CONFIDENCE = 0.95
FEWEST = 4
"""Subsets needed for an interval: Fisher's z has variance 1 / (n − 3)."""


def univariate(runs: FitData | Iterable[RunRecord], **choice: Any) -> list[dict[str, Any]]:
    """One row per indicator, JSON-like; None where something cannot be estimated.

    Args:
        runs: What a fit sees (`gather`), or records.
        choice: For records, the arguments of `gather`: indicators, evaluation, regime, force.

    Returns:
        Rows of `indicator`; `label` (with its transform); `subsets` (different ones, the unit of all numbers);
        `pearson` with `pearson_low`, `pearson_high` (95 %, Fisher's z with the larger of the variances 1 / (n − 3)
        and the jackknife's), its two-sided `p` (t test, the same as that of
        the slope of a regression on this indicator alone) and `p_holm`, corrected over the indicators; `spearman` with
        `spearman_low`, `spearman_high` (Fisher's z with the variance of Bonett and Wright, Psychometrika 65, 2000) and
        `spearman_p`; `slope` (log loss per unit of the regressor) and `slope_sd` (per sd of the run means); `ks`, the
        Kolmogorov–Smirnov distance between the half of the subsets with the lower loss and that with the higher (the
        middle one of an odd number left out), `ks_p` and `ks_p_holm`.

    Raises:
        RequestError: as `gather`.
    """
    data = runs if isinstance(runs, FitData) else gather(runs, **choice)
    x, y = subset_means(data.x, data.y, data.groups)
    rows = [_one(x[:, j], y) for j in range(x.shape[1])]
    for name in ("p", "ks_p"):
        corrected = holm([row[name] for row in rows])
        for row, value in zip(rows, corrected, strict=True):
            row[f"{name}_holm"] = float(value)
    named = zip(data.names, rows, strict=True)
    return [plain({"indicator": n, "label": data.transforms[n].label(n), **row}) for n, row in named]


def correlation_matrix(runs: FitData | Iterable[RunRecord], **choice: Any) -> dict[str, Any]:
    """How the indicators correlate with each other over the different subsets.

    Args: as `univariate`.

    Returns:
        `indicators` [p], `labels` [p], `pearson` and `spearman` [p][p]; None for an indicator that does not vary.
    """
    from scipy.stats import rankdata

    data = runs if isinstance(runs, FitData) else gather(runs, **choice)
    x, _ = subset_means(data.x, data.y, data.groups)
    columns = range(x.shape[1])
    ranked = rankdata(x, axis=0)
    return plain(
        {
            "indicators": list(data.names),
            "labels": [data.transforms[n].label(n) for n in data.names],
            "pearson": [[pearson(x[:, i], x[:, j]) for j in columns] for i in columns],
            "spearman": [[pearson(ranked[:, i], ranked[:, j]) for j in columns] for i in columns],
        }
    )


def univariate_table(rows: Sequence[dict[str, Any]], width: int) -> str:
    """The rows of `univariate` as a table of at most `width` columns."""
    columns = [
        Column("alone", right=False),
        Column("Pearson"),
        Column("95 %", rank=2),
        Column("Spearman", rank=1),
        Column("95 % ", rank=4),
        Column("KS", rank=3),
        Column("Pearson p (Holm)"),
    ]
    cells = [
        [
            row["label"],
            number_or_dash(row["pearson"], ".2f"),
            _interval(row["pearson_low"], row["pearson_high"]),
            number_or_dash(row["spearman"], ".2f"),
            _interval(row["spearman_low"], row["spearman_high"]),
            number_or_dash(row["ks"], ".2f"),
            p_value(row["p_holm"]),
        ]
        for row in rows
    ]
    return text_table(columns, cells, width)


def subset_means(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """x [n, p] and y [n] averaged over the runs of each subset: [s, p] and [s], in order of first appearance."""
    order = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    codes = np.array([order[g] for g in groups])
    w = np.ones(len(y)) if weights is None else weights
    counts = np.bincount(codes, w)
    means = np.column_stack([np.bincount(codes, w * x[:, j]) / counts for j in range(x.shape[1])])
    return means, np.bincount(codes, w * y) / counts


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; NaN where either does not vary (up to rounding)."""
    a, b = x - x.mean(), y - y.mean()
    for centred, values in ((a, x), (b, y)):
        if not np.sqrt((centred**2).mean()) > 1e-12 * max(float(np.abs(values).max()), 1e-300):
            return math.nan
    a, b = a / np.sqrt(a @ a), b / np.sqrt(b @ b)
    return float(np.clip(a @ b, -1.0, 1.0))


def fisher_interval(r: float, variance: float) -> tuple[float, float]:
    """95 % interval of a correlation whose Fisher z has this variance; NaN where that is not known."""
    from scipy import stats

    if not math.isfinite(r) or not math.isfinite(variance):
        return math.nan, math.nan
    half = stats.norm.ppf(0.5 + CONFIDENCE / 2) * math.sqrt(variance)
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    return math.tanh(z - half), math.tanh(z + half)


def spearman_interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation over n subsets: Fisher's z with the variance of Bonett and Wright
    (Psychometrika 65, 2000). A perfect ranking, whose z is infinite, counts as half a step short of it: a step is what
    two neighbours that change places cost. NaN under four."""
    if n < FEWEST:
        return math.nan, math.nan
    most = 1.0 - 6.0 / (n * (n * n - 1.0))
    return fisher_interval(float(np.clip(rho, -most, most)), (1.0 + rho**2 / 2.0) / (n - 3))


def _jackknifed(x: np.ndarray, y: np.ndarray) -> float:
    """Variance of Fisher's z of Pearson's correlation by leaving out each subset; above 1 / (n − 3) for heavy tails.
    0 where it is not known."""
    n = len(y)
    a, b = x - x.mean(), y - y.mean()
    left = n / (n - 1)
    xy, xx, yy = a @ b - left * a * b, a @ a - left * a**2, b @ b - left * b**2
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.arctanh(np.clip(xy / np.sqrt(xx * yy), -1.0, 1.0))
    return float((n - 1) / n * ((z - z.mean()) ** 2).sum()) if np.isfinite(z).all() else 0.0


def ks_halves(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(Kolmogorov–Smirnov distance, p) of x between the half of lower y and the half of higher y."""
    from scipy import stats

    half = len(y) // 2
    if half < 2:
        return math.nan, math.nan
    order = np.argsort(y, kind="stable")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that p is asymptotic where the exact one cannot be had
        result = stats.ks_2samp(x[order[:half]], x[order[-half:]])
    return float(result.statistic), float(result.pvalue)


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of x [n] and y [n] with intervals and p, as `univariate` has them."""
    from scipy.stats import rankdata

    n = len(y)
    r, rank = pearson(x, y), pearson(rankdata(x), rankdata(y))
    variance = 1.0 / (n - 3) if n >= FEWEST else math.nan
    low, high = fisher_interval(r, max(variance, _jackknifed(x, y)) if math.isfinite(r) else math.nan)
    rank_low, rank_high = spearman_interval(rank, n)
    return {
        "pearson": r,
        "pearson_low": low,
        "pearson_high": high,
        "p": _t_test(r, n),
        "spearman": rank,
        "spearman_low": rank_low,
        "spearman_high": rank_high,
        "spearman_p": _t_test(rank, n),
    }


def _one(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    n, told = len(y), correlation(x, y)
    r = told["pearson"]
    slope = r * float(y.std() / x.std()) if math.isfinite(r) else math.nan
    distance, distance_p = ks_halves(x, y) if math.isfinite(r) else (math.nan, math.nan)
    return {
        "subsets": n,
        **told,
        "slope": slope,
        "slope_sd": slope * float(x.std(ddof=1)) if n > 1 else math.nan,
        "ks": distance,
        "ks_p": distance_p,
    }


def _t_test(r: float, n: int) -> float:
    """Two-sided p of a correlation."""
    from scipy import stats

    if n < 3 or not math.isfinite(r):
        return math.nan
    return 0.0 if abs(r) >= 1 else float(2 * stats.t.sf(abs(r) * math.sqrt((n - 2) / (1 - r**2)), n - 2))


def p_value(value: float | None) -> str:
    """`0.012`, `<0.001`, or a dash."""
    return "<0.001" if value is not None and value < 0.001 else number_or_dash(value, ".3f")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f}, {high:.2f}"
