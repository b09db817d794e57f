"""What an in-sample fit does not tell: collinearity, leverage, and the noise that no rule can explain.

Pure functions of a design `x` (float64 [n, p], without the intercept) and a response `y` (float64 [n]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SINGULAR_EIGENVALUE = 1e-8  # of the correlation matrix, relative to the largest (as the region drops directions)
CONSTANT_SPREAD = 1e-9  # sd relative to the mean's size, below which a regressor does not vary
COLLINEAR_VIF = 10.0
COLLINEAR_CONDITION = 30.0


class PureError(NamedTuple):
    """Noise between runs on equal subsets: `sd` of log loss, its degrees of freedom, its share of the variance."""

    sd: float
    df: int
    share: float


def leverages(x: np.ndarray) -> np.ndarray:
    """Diagonal of the hat matrix of a least-squares fit with intercept, float64 [n]; they sum to p + 1."""
    return np.einsum("ij,ij->i", *(2 * [_basis(x)]))


def variance_inflation(x: np.ndarray) -> np.ndarray:
    """VIF per regressor, float64 [p]: 1 / (1 − R² of it on the others). 1 is orthogonal, above 10 collinear."""
    return np.diag(np.linalg.inv(_correlation(x))).copy()


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
    return PureError(float(np.sqrt(total / df)), df, min(total / df / variance, 1.0))


def _basis(x: np.ndarray) -> np.ndarray:
    """Orthonormal basis [n, p + 1] of the intercept and the standardised regressors."""
    scale = np.where(x.std(axis=0) > 0, x.std(axis=0), 1.0)
    return np.linalg.qr(np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / scale]))[0]


def _correlation(x: np.ndarray) -> np.ndarray:
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    return z.T @ z / len(z)
