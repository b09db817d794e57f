"""The region of mean regressors that the fitted runs cover: an ellipsoid around their mean."""

from __future__ import annotations

import numpy as np

EIGENVALUE_FLOOR = 1e-8  # of the largest; directions below it carry no evidence
MAX_RADIUS = 3.0


def mahalanobis(points: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Distances of points from the mean of the runs.

    By the pseudo-inverse of the covariance in its eigenbasis, on the correlation scale so that units do not matter;
    directions under 1e-8 of the largest eigenvalue are left out.

    Args:
        points: float64 [k, p] (or [p]).
        mean: float64 [p].
        cov: float64 [p, p].

    Returns:
        float64 [k] (or a scalar array).
    """
    basis, eigenvalues, scale = _eigenbasis(cov)
    projected = ((points - mean) / scale) @ basis
    return np.sqrt((projected**2 / eigenvalues).sum(axis=-1))


def region_rank(cov: np.ndarray) -> int:
    """Directions that count in `mahalanobis`; p unless the runs' means were collinear."""
    return int(_eigenbasis(cov)[0].shape[1])


def fitted_radius(points: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> tuple[float, float]:
    """(radius of the fitted region, largest distance of a run) for run means [n, p]; the radius is at most 3."""
    largest = float(mahalanobis(points, mean, cov).max(initial=0.0))
    return min(largest, MAX_RADIUS), largest


def lower_edge(mean: np.ndarray, cov: np.ndarray, radius: float, coef: np.ndarray) -> np.ndarray:
    """μ₁ = m − r·Cb/√(bᵀCb), float64 [p]; the mean itself where the coefficients give no direction."""
    direction = cov @ coef
    spread = float(coef @ direction)
    return mean.copy() if spread <= 0 else mean - radius * direction / np.sqrt(spread)


def _eigenbasis(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept eigenvectors [p, k] and eigenvalues [k] of the correlation matrix, and the scale [p] that made it one."""
    variances = np.diag(cov)
    scale = np.sqrt(np.where(variances > 0, variances, 1.0))
    eigenvalues, vectors = np.linalg.eigh(cov / np.outer(scale, scale))
    keep = eigenvalues > EIGENVALUE_FLOOR * max(eigenvalues.max(initial=0.0), 1e-300)
    return vectors[:, keep], eigenvalues[keep], scale
