"""Coordinate descent for many problems at once: the elastic net, and least squares or ridge under sign constraints.

    minimise  Σ w (y − ŷ)² / (2 Σ w)  +  α r |γ|₁  +  α (1 − r) |γ|² / 2      (as scikit-learn's ElasticNet)

on regressors scaled to unit standard deviation over all runs. Every training set, setting and response of a
cross-validation under permutation is one problem; they are swept together, so numpy's overhead is paid once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from im_lightning.rule.estimators.base import Estimator

SHARES = (1.0, 0.5, 0.25, 0.1, 0.04, 0.01)  # of the α at which the first coefficient leaves 0; the simplest first
MIXTURES = (0.9, 0.5)  # share r of the absolute penalty
SEARCH_TOLERANCE = 1e-5
FINAL_TOLERANCE = 1e-13
_SEARCH_SWEEPS, _FINAL_SWEEPS = 200, 100_000


@dataclass(frozen=True)
class Descent(Estimator):
    """An estimator that is fitted by coordinate descent."""

    method: str
    x: np.ndarray  # float64 [n, p]
    weights: np.ndarray  # float64 [n]
    # (share of the largest α, r) for the elastic net; (penalty per run, 0) for ridge and least squares, as in
    # `smoothers`. The simplest first.
    settings: tuple[tuple[float, float], ...]
    signs: np.ndarray  # int [p]: 1 or −1 where a coefficient may have only this sign, else 0

    @property
    def scale(self) -> np.ndarray:
        """float64 [p], what the regressors are divided by."""
        spread = self.x.std(axis=0)
        return np.where(spread > 0, spread, 1.0)

    def describe(self, setting: int) -> dict[str, float]:
        value, mixture = self.settings[setting]
        if mixture:
            return {"alpha_share": value, "l1_ratio": mixture}
        return {"penalty": value} if len(self.settings) > 1 else {}

    def degrees(self, setting: int, coefficients: np.ndarray, y: np.ndarray) -> float:
        """1 + trace of the hat matrix of ridge on the regressors that are not 0 (Zou, Hastie & Tibshirani 2007)."""
        active = np.flatnonzero(coefficients[1:])
        value, mixture = self.settings[setting]
        w = self.weights / self.weights.sum()
        z = (self.x - w @ self.x) / self.scale
        largest = float(np.abs((z * w[:, None]).T @ (y - w @ y)).max())
        square = value * largest / mixture * (1 - mixture) / max(float(y.std()), 1e-300) if mixture else value
        gram = (z[:, active] * w[:, None]).T @ z[:, active]
        return 1.0 + float(np.trace(np.linalg.solve(gram + square * np.eye(len(active)), gram))) if len(active) else 1.0

    def _solve(
        self, trains: Sequence[np.ndarray], own: list[np.ndarray], y: np.ndarray, final: bool, only: int | None
    ) -> np.ndarray:
        p, count = self.x.shape[1], y.shape[1]
        z = (self.x - self.x.mean(axis=0)) / self.scale
        spread = y.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        centred = (y - y.mean(axis=0)) / spread
        gram, cross = np.empty((len(trains), p, p)), np.empty((len(trains), p, count))
        centres, means = np.empty((len(trains), p)), np.empty((len(trains), count))
        for f, (train, w) in enumerate(zip(trains, own, strict=True)):
            w = w / w.sum()
            centres[f], means[f] = w @ z[train], w @ centred[train]
            inside = z[train] - centres[f]
            gram[f] = (inside * w[:, None]).T @ inside
            cross[f] = (inside * w[:, None]).T @ (centred[train] - means[f])
        wanted = self.settings if only is None else (self.settings[only],)
        tolerance, sweeps = (FINAL_TOLERANCE, _FINAL_SWEEPS) if final else (SEARCH_TOLERANCE, _SEARCH_SWEEPS)
        slopes = np.empty((len(trains), len(wanted), p, count))
        largest = np.abs(cross).max(axis=1)
        warm: dict[float, np.ndarray] = {}
        for place, (value, mixture) in enumerate(wanted):
            alpha = value * largest / mixture if mixture else np.full_like(largest, value)
            start = warm.get(mixture, np.zeros((len(trains), p, count)))
            solved = _sweep(gram, cross, alpha * mixture, alpha * (1.0 - mixture), self.signs, start, tolerance, sweeps)
            warm[mixture] = solved
            slopes[:, place] = solved
        slopes = slopes / self.scale[:, None] * spread
        level = (means * spread + y.mean(axis=0))[:, None, None, :]
        away = (centres * self.scale + self.x.mean(axis=0))[:, None, None, :]
        return np.concatenate([level - away @ slopes, slopes], axis=2)


def elastic_net(x: np.ndarray, weights: np.ndarray, signs: np.ndarray | None = None) -> Descent:
    """The elastic net; α and its mixture are chosen by cross-validation."""
    settings = tuple((share, mixture) for share in SHARES for mixture in MIXTURES)
    free = np.zeros(x.shape[1], dtype=np.int64)
    return Descent("elastic-net", x, weights, settings, free if signs is None else signs)


def constrained(
    method: str, x: np.ndarray, weights: np.ndarray, signs: np.ndarray, penalties: Sequence[float]
) -> Descent:
    """Least squares (penalties (0,)) or ridge whose coefficients may have only the given signs."""
    return Descent(method, x, weights, tuple((penalty, 0.0) for penalty in penalties), signs)


def sign_vector(names: Sequence[str], signs: Mapping[str, int] | None) -> np.ndarray:
    """int [p]: the wanted sign of each regressor, 0 where any will do."""
    return np.array([int(np.sign((signs or {}).get(name, 0))) for name in names], dtype=np.int64)


def _sweep(
    gram: np.ndarray,
    cross: np.ndarray,
    absolute: np.ndarray,
    square: np.ndarray,
    signs: np.ndarray,
    start: np.ndarray,
    tolerance: float,
    sweeps: int,
) -> np.ndarray:
    """Cyclic coordinate descent: gram [F, p, p], cross and start [F, p, B], penalties [F, B]."""
    b = start.copy()
    for _ in range(sweeps):
        change = 0.0
        for j in range(b.shape[1]):
            own = gram[:, j, j][:, None]
            pull = cross[:, j] - (gram[:, j : j + 1] @ b)[:, 0] + own * b[:, j]
            new = np.sign(pull) * np.maximum(np.abs(pull) - absolute, 0.0) / np.maximum(own + square, 1e-300)
            if signs[j]:
                new = np.where(new * signs[j] > 0, new, 0.0)
            change = max(change, float(np.abs(new - b[:, j]).max(initial=0.0)))
            b[:, j] = new
        if change <= tolerance:
            break
    return b
