"""The paper's own procedure, for comparison only: the best subset of regressors by R², then by p-values.

InstructMining (arXiv 2307.06290) kept the indicators whose multivariate fit had the best R² and significant
coefficients; it does not say more. Read here as: of every number of regressors the subset of largest R²; of these the
largest whose every coefficient has p ≤ 0.05, else the best single regressor. Its in-sample R² and p-values flatter it,
as the choice among 2^p subsets is not in them; its held-out numbers here repeat the choice in every training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from im_lightning.rule.estimators.base import NO_CHOICE, Estimator

MOST = 12
"""Regressors up to which all subsets are tried (4,096 fits)."""
LEVEL = 0.05
_SINGULAR = 1e-10  # smallest eigenvalue of a correlation matrix


@dataclass(frozen=True)
class BestSubset(Estimator):
    """The procedure as an estimator, the subset chosen anew in every training set; without settings to choose."""

    x: np.ndarray  # float64 [n, p], p ≤ 12
    weights: np.ndarray  # float64 [n]

    method = "best-subset"
    settings = NO_CHOICE

    def degrees(self, setting: int, coefficients: np.ndarray, y: np.ndarray) -> float:
        """Number of coefficients that were kept."""
        return 1.0 + np.count_nonzero(coefficients[1:])

    def _solve(
        self, trains: Sequence[np.ndarray], own: list[np.ndarray], y: np.ndarray, final: bool, only: int | None
    ) -> np.ndarray:
        """0 for the regressors left out."""
        out = np.zeros((len(trains), 1, self.x.shape[1] + 1, y.shape[1]))
        for f, (train, w) in enumerate(zip(trains, own, strict=True)):
            x = self.x[train]
            root = np.sqrt(w)
            for b, response in enumerate(y[train].T):
                kept = np.array(best_subset(x, response, w), dtype=np.int64)
                full = np.column_stack([np.ones(len(train)), x[:, kept]])
                fitted = np.linalg.lstsq(full * root[:, None], response * root, rcond=None)[0]
                out[f, 0, [0, *(kept + 1)], b] = fitted
        return out


def best_subset(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[int, ...]:
    """The chosen regressors, as column numbers, of x float64 [n, p], y [n] and weights [n]."""
    from scipy.special import stdtr

    n, p = x.shape
    w = weights / weights.sum()
    z = x - w @ x
    spread = np.sqrt(w @ z**2)
    z = z / np.where(spread > 0, spread, 1.0)
    centred = y - w @ y
    gram, cross, total = (z * w[:, None]).T @ z, (z * w[:, None]).T @ centred, float(w @ centred**2)
    regular = np.linalg.eigvalsh(gram)[0] > _SINGULAR  # then every subset is
    chosen: tuple[int, ...] = ()
    for size in range(1, min(p, n - 2) + 1):
        sets = np.array(list(combinations(range(p), size)))
        grams = gram[sets[:, :, None], sets[:, None, :]]
        if not regular:
            usable = np.linalg.eigvalsh(grams)[:, 0] > _SINGULAR
            if not usable.any():
                break
            sets, grams = sets[usable], grams[usable]
        b = np.linalg.solve(grams, cross[sets][..., None])[..., 0]
        best = int(np.argmax((b * cross[sets]).sum(axis=1)))
        left = max(total - float(b[best] @ cross[sets[best]]), 0.0)
        df = n - size - 1
        se = np.sqrt(np.diag(np.linalg.inv(grams[best])) * left / df)
        with np.errstate(divide="ignore"):
            p_values = 2 * stdtr(df, -np.abs(b[best]) / se)
        if size == 1 or (p_values <= LEVEL).all():
            chosen = tuple(int(j) for j in sets[best])
    return chosen
