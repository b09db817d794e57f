"""Estimators whose predictions are linear in y (least squares, ridge, additive): held-out predictions in closed form.

A fit of a training set under setting l is a matrix C_l with coefficients C_l y; neither it nor the hat matrix depends
on y, so the thousand permutations of a test cost matrix products only. Penalties are per run on regressors scaled to
unit standard deviation over all runs: minimise Σ w (y − ŷ)² / Σ w + penalty · |γ|², as scikit-learn's Ridge with
alpha = penalty · n on standardised columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from im_lightning.indicators.transforms import bend_directions
from im_lightning.rule.estimators.base import Estimator

PENALTIES = tuple(np.logspace(2, -3, 11).tolist())  # strongest first, so that of equal scores the simpler one is taken
POOLED = (0.1, 0.3, 1.0)
"""How freely the slope of a source may differ from the common one."""
BENDS = (0.3, 1.0)
"""How freely an additive rule may bend beside its slopes: the bends' columns are scaled by this."""
WITH_SHARES = "+shares"
_RANK = 1e-9  # singular values below this share of the largest: the training set does not determine the fit


class Maps(NamedTuple):
    """Fits of one training set under every setting."""

    centre: np.ndarray  # float64 [p], weighted mean of the training regressors
    weight: np.ndarray  # float64 [m], weights of the training runs, sum 1: ȳ = weight · y
    slopes: np.ndarray  # float64 [L, p, m]: coefficients = slopes[l] @ y

    def prediction_matrices(self, x: np.ndarray) -> np.ndarray:
        """Predictions of rows x [k, p] as matrices on the training y: float64 [L, k, m]."""
        return self.weight + (x - self.centre) @ self.slopes

    def coefficients(self, y: np.ndarray, setting: int) -> np.ndarray:
        """Intercept and coefficients, float64 [p + 1] (or [p + 1, B] for y [m, B])."""
        slopes = self.slopes[setting] @ y
        return np.concatenate([[self.weight @ y - self.centre @ slopes], slopes])


@dataclass(frozen=True)
class Smoother(Estimator):
    """An estimator that is linear in y under each of its settings."""

    method: str
    x: np.ndarray  # float64 [n, p], regressors
    weights: np.ndarray  # float64 [n], weights of the runs
    spaces: tuple[np.ndarray, ...]  # per space float64 [p, q]: the penalised coordinates γ, coefficients = space @ γ
    penalties: tuple[float, ...]  # per run, the strongest first; (0.0,) for least squares
    freedom: tuple[str, tuple[float, ...]] = ("bend", BENDS)  # what tells the spaces apart, and its value in each

    @cached_property
    def settings(self) -> list[tuple[int, float]]:  # type: ignore[override]
        """(space, penalty) of each setting, the simplest first."""
        return [(s, penalty) for penalty in self.penalties for s in range(len(self.spaces))]

    def describe(self, setting: int) -> dict[str, float]:
        space, penalty = self.settings[setting]
        out = {"penalty": penalty} if len(self.penalties) > 1 else {}
        return {**out, self.freedom[0]: self.freedom[1][space]} if len(self.spaces) > 1 else out

    def maps(self, train: np.ndarray, settings: Sequence[int] | None = None, weights: np.ndarray | None = None) -> Maps:
        """Fits of the m runs at the positions `train` under some settings, by default all; `weights` [m] are instead of
        the runs' own. NaN slopes for least squares where the runs do not determine the fit.
        """
        wanted = range(len(self.settings)) if settings is None else settings
        w = self.weights[train] if weights is None else weights
        w = w / w.sum()
        x = self.x[train]
        centre = w @ x
        root = np.sqrt(w)[:, None]
        slopes = np.empty((len(wanted), x.shape[1], len(train)))
        parts = {}
        for place, setting in enumerate(wanted):
            s, penalty = self.settings[setting]
            if s not in parts:
                z = (x - centre) @ self.spaces[s]
                u, d, vt = np.linalg.svd(root * z, full_matrices=False)
                parts[s] = (u * root).T, d, self.spaces[s] @ vt.T, z.shape[1]
            ut, d, v, q = parts[s]
            if penalty == 0.0 and (len(d) < q or d[-1] <= _RANK * d[0]):
                slopes[place] = np.nan
                continue
            slopes[place] = (v * (d / (d**2 + penalty))) @ ut
        return Maps(centre, w, slopes)

    def degrees(self, setting: int, coefficients: np.ndarray, y: np.ndarray) -> float:
        """Effective number of parameters, the intercept among them: the trace of the hat matrix."""
        return float(np.trace(self.maps(np.arange(len(self.x)), [setting]).prediction_matrices(self.x)[0]))

    def _solve(
        self, trains: Sequence[np.ndarray], own: list[np.ndarray], y: np.ndarray, final: bool, only: int | None
    ) -> np.ndarray:
        wanted = range(len(self.settings)) if only is None else [only]
        fits = [self.maps(train, wanted, w) for train, w in zip(trains, own, strict=True)]
        return np.array(
            [[fit.coefficients(y[t], k) for k in range(len(wanted))] for fit, t in zip(fits, trains, strict=True)]
        )


def least_squares(x: np.ndarray, weights: np.ndarray) -> Smoother:
    """Ordinary (weighted) least squares; scaled for the sake of its digits only."""
    return Smoother("ols", x, weights, (_scaling(x),), (0.0,))


def ridge(x: np.ndarray, weights: np.ndarray) -> Smoother:
    """Ridge regression on standardised regressors; the penalty is chosen by cross-validation."""
    return Smoother("ridge", x, weights, (_scaling(x),), PENALTIES)


def additive(hats: Mapping[str, tuple[list[float], np.ndarray]], weights: np.ndarray) -> Smoother:
    """Piecewise-linear functions of the indicators, by ridge on the dataset means of their hat functions.

    Each function is a slope and bends. The slopes are penalised as ridge does; the bends of an indicator share one
    scale, so that directions in which the runs hardly differ are held straight. Without bends it is the ridge rule.
    `hats` is indicator → (K + 1 knots, means [n, K + 1]); the regressors are hat 1 … hat K of each indicator, in order.
    """
    columns, lines, bends = [], [], []
    for knots, means in hats.values():
        line, directions = bend_directions(knots)
        columns.append(means[:, 1:])
        lines.append((line[1:] - line[0])[:, None] / max((means @ line).std(), 1e-300))
        spread = np.sqrt((means @ directions).var(axis=0).mean()) if directions.shape[1] else 1.0
        bends.append((directions[1:] - directions[0]) / max(spread, 1e-300))
    x = np.column_stack(columns)
    spaces = tuple(np.column_stack([_block(lines), bend * _block(bends)]) for bend in BENDS)
    return Smoother("additive", x, weights, spaces, PENALTIES)


def with_shares(estimator: Smoother, shares: np.ndarray) -> Smoother:
    """The estimator with shares of sources beside its regressors, float64 [n, K], which sum to a constant.

    All shares are penalised alike, as ridge does it; the regressors are those of all but the last, with slopes that are
    contrasts with it, so that nothing is singular.
    """
    scale = np.where(shares.std(axis=0) > 0, shares.std(axis=0), 1.0)
    contrast = np.column_stack([np.diag(1.0 / scale[:-1]), np.full(len(scale) - 1, -1.0 / scale[-1])])
    x = np.column_stack([estimator.x, shares[:, :-1]])
    spaces = tuple(_block([space, contrast]) for space in estimator.spaces)
    return replace(estimator, method=f"{estimator.method}{WITH_SHARES}", x=x, spaces=spaces)


def partial_pooling(parts: Sequence[np.ndarray], shares: np.ndarray, weights: np.ndarray) -> Smoother:
    """Slopes of its own for every source, drawn towards a common one: ridge with a block penalty.

        minimise Σ w (y − ŷ)² / Σ w + penalty · (Σ (β_j s_j)² + Σ (α_k t_k)² + Σ (δ_jk s_j)² / pooled²)

    with slope β_j + δ_jk of indicator j within source k, and α_k of the source's share; s and t are standard deviations
    over the runs. A source's own slopes turn about its mean row, so that they say nothing of its level.

    Args:
        parts: Of each of K sources the mean over a run's rows of φ, counted as 0 in rows of others: float64 [n, p].
        shares: Of the sources, float64 [n, K].
        weights: Of the runs.
    """
    count, p = len(parts), parts[0].shape[1]
    total = np.sum(parts, axis=0)
    slope = np.diag(_scaling(total))
    share = np.diag(_scaling(shares))
    spaces = []
    for pooled in POOLED:
        own = np.diag(np.tile(slope * pooled, count))  # of indicator j in source k, at row and column k · p + j
        middle = np.array([part.sum(axis=0) / max(of.sum(), 1e-300) for part, of in zip(parts, shares.T, strict=True)])
        level = -_block([row[None, :] for row in middle * slope * pooled])
        zero = np.zeros((count * p, count))
        full = np.block(
            [[np.tile(np.diag(slope), (count, 1)), zero, own], [np.zeros((count, p)), np.diag(share), level]]
        )
        spaces.append(np.vstack([full[: count * p], full[count * p : -1] - full[-1]]))
    x = np.column_stack([*parts, shares[:, :-1]])
    return Smoother("partial-pooling", x, weights, tuple(spaces), PENALTIES, ("pooled", POOLED))


def _scaling(x: np.ndarray) -> np.ndarray:
    spread = x.std(axis=0)
    return np.diag(1.0 / np.where(spread > 0, spread, 1.0))


def _block(parts: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.linalg import block_diag

    return np.asarray(block_diag(*parts), dtype=np.float64)
