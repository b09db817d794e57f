"""Regression diagnostics: collinearity (VIF, condition number), leverage, pure error; and the fitted region.

The region is an ellipsoid around the mean of the run means, in the indicators' means: where the runs are evidence. Its
radius holds 95 % of the runs, each measured from the others, as a coming subset would be. Pure functions of a design
`x` (float64 [n, p], without the intercept) and a response `y` (float64 [n]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

EIGENVALUE_FLOOR = 1e-8  # of the largest; directions below it carry no evidence
INSIDE = 0.95
"""Share of the runs within the fitted region's radius."""
MAX_REACH = 3.0
"""Standard deviations of the fitted values that a tilt goes at most; `docs/statistics.md` says what others gave."""
SINGULAR_EIGENVALUE = 1e-8  # of the correlation matrix, relative to the largest (as the region drops directions)
CONSTANT_SPREAD = 1e-9  # sd relative to the mean's size, below which a regressor does not vary
COLLINEAR_VIF = 10.0
COLLINEAR_CONDITION = 10.0  # a pair that correlates at 0.98


FEWEST_REPEATS = 5
"""Degrees of freedom of the noise from which a ceiling is given."""


class PureError(NamedTuple):
    """Noise between runs on equal subsets."""

    sd: float  # of log loss
    df: int  # its degrees of freedom
    share: float  # of the variance of log loss over the runs

    @property
    def ceiling(self) -> tuple[float, float, float] | None:
        """R² that no rule can be expected to exceed, and its 95 % interval by χ², from 0 to 1; None where the noise is
        known to less than 5 degrees of freedom."""
        from scipy.stats import chi2

        if self.df < FEWEST_REPEATS:
            return None
        low, high = (1 - self.share * self.df / float(chi2.ppf(q, self.df)) for q in (0.025, 0.975))
        return max(1 - self.share, 0.0), max(low, 0.0), max(high, 0.0)


def leverages(x: np.ndarray) -> np.ndarray:
    """Diagonal of the hat matrix of a least-squares fit with intercept, float64 [n]; they sum to p + 1."""
    return np.einsum("ij,ij->i", *(2 * [_basis(x)]))


def variance_inflation(x: np.ndarray) -> np.ndarray:
    """VIF per regressor, float64 [p]: 1 / (1 − R² of it on the others). 1 is orthogonal, above 10 collinear, infinity a
    sum of others, as some are wherever there are more regressors than runs, or one that does not vary."""
    varies = np.delete(np.arange(x.shape[1]), constant_columns(x))
    found, part = np.full(x.shape[1], np.inf), x[:, varies]
    found[varies] = np.diag(np.linalg.pinv(_correlation(part), rcond=SINGULAR_EIGENVALUE, hermitian=True))
    found[varies[collinear_columns(part)]] = np.inf
    return found


def condition_number(x: np.ndarray) -> float:
    """Of the standardised design (columns centred, unit variance): ratio of largest to smallest singular value."""
    eigenvalues = np.linalg.eigvalsh(_correlation(x))
    return float(np.sqrt(eigenvalues[-1] / eigenvalues[0])) if eigenvalues[0] > 0 else float("inf")


def constant_columns(x: np.ndarray) -> list[int]:
    """Regressors that do not vary over the runs."""
    size = np.maximum(np.abs(x).max(axis=0), 1e-300)
    return [int(j) for j in np.flatnonzero(x.std(axis=0) <= CONSTANT_SPREAD * size)]


def collinear_columns(x: np.ndarray) -> list[int]:
    """Regressors that take part in an exact linear dependence; none for a regular design."""
    eigenvalues, vectors = np.linalg.eigh(_correlation(x))
    null = np.abs(vectors[:, eigenvalues <= SINGULAR_EIGENVALUE * eigenvalues[-1]])
    if null.shape[1] == 0:
        return []
    return [int(j) for j in np.flatnonzero((null > 1e-3).any(axis=1))]


def pure_error(y: np.ndarray, groups: Sequence[str]) -> PureError | None:
    """Noise between runs that share a subset (another training seed); None without repeats."""
    total, df = 0.0, 0
    names = np.asarray(groups, dtype=str)
    for name in np.unique(names):
        inside = y[names == name]
        total += float(((inside - inside.mean()) ** 2).sum())
        df += len(inside) - 1
    variance = float(y.var(ddof=1)) if len(y) > 1 else 0.0
    if df == 0 or variance == 0:
        return None
    return PureError(float(np.sqrt(total / df)), df, total / df / variance)


def mahalanobis(points: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Distances, float64 [k] (or a scalar array), of points [k, p] (or [p]) from the mean of the runs.

    By the pseudo-inverse of the covariance in its eigenbasis, on the correlation scale so that units do not matter;
    directions under 1e-8 of the largest eigenvalue are left out.
    """
    basis, eigenvalues, scale = _eigenbasis(cov)
    projected = ((points - mean) / scale) @ basis
    return np.sqrt((projected**2 / eigenvalues).sum(axis=-1))


def region_rank(cov: np.ndarray) -> int:
    """Directions that count in `mahalanobis`; p unless the runs' means were collinear."""
    return int(_eigenbasis(cov)[0].shape[1])


def without_itself(points: np.ndarray, groups: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Distance of every run from the mean and covariance of the other subsets' runs, float64 [n]; points [n, q].

    In closed form from the distances d to all runs: with h = d² / (n − 1), n runs and k of the same subset, it is
    √((n − k − 1) (n / (n − k))² h / (1 − h k n / (n − k))). Infinite where a subset alone spans a direction.
    """
    n = len(points)
    share = mahalanobis(points, points.mean(axis=0), np.atleast_2d(np.cov(points, rowvar=False))) ** 2 / (n - 1)
    codes = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    k = np.bincount(codes)[codes].astype(np.float64)
    rest, left = n - k, 1.0 - share * k * n / np.maximum(n - k, 1.0)
    known = (left > 1e-9) & (rest > 1)
    squares = np.full(n, np.inf)
    squares[known] = ((rest - 1) * (n / np.maximum(rest, 1)) ** 2 * share)[known] / left[known]
    return np.sqrt(squares)


def fitted_radius(points: np.ndarray, groups: Sequence[Any] | np.ndarray) -> tuple[float, float]:
    """(radius of the fitted region, largest distance of a run) for run means [n, q] of the subsets `groups`.

    The radius is the 95 % quantile of the runs' distances, each without its subset; the largest distance itself where
    too few subsets are left to measure from.
    """
    mean, cov = points.mean(axis=0), np.atleast_2d(np.cov(points, rowvar=False))
    largest = float(mahalanobis(points, mean, cov).max(initial=0.0))
    radius = float(np.quantile(without_itself(points, groups), INSIDE, method="inverted_cdf"))
    return (radius if np.isfinite(radius) else largest), largest


def lower_edge(mean: np.ndarray, cov: np.ndarray, reach: float, coef: np.ndarray) -> np.ndarray:
    """μ₁ = m − reach·Cb/√(bᵀCb), float64 [p], `reach` sd of the fitted values from the mean m; m itself where the
    coefficients give no direction."""
    direction = cov @ coef
    spread = float(coef @ direction)
    return mean.copy() if spread <= 0 else mean - reach * direction / np.sqrt(spread)


def _basis(x: np.ndarray) -> np.ndarray:
    """Orthonormal basis [n, p + 1] of the intercept and the standardised regressors."""
    scale = np.where(x.std(axis=0) > 0, x.std(axis=0), 1.0)
    return np.linalg.qr(np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / scale]))[0]


def _correlation(x: np.ndarray) -> np.ndarray:
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    return z.T @ z / len(z)


def _eigenbasis(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept eigenvectors [p, k] and eigenvalues [k] of the correlation matrix, and the scale [p] that made it one."""
    variances = np.diag(cov)
    scale = np.sqrt(np.where(variances > 0, variances, 1.0))
    eigenvalues, vectors = np.linalg.eigh(cov / np.outer(scale, scale))
    keep = eigenvalues > EIGENVALUE_FLOOR * max(eigenvalues.max(initial=0.0), 1e-300)
    return vectors[:, keep], eigenvalues[keep], scale
