"""The law with an offset: L = c + exp(a + b·x), the form in which loss follows mixtures of training data.

Data mixing laws (arXiv 2403.16952) and olmix (arXiv 2602.12237) fit it to shares of sources; `log L = a + b·x` is its
case c = 0. The index a + b·x stays linear in x. Fitted to log L, so that errors mean the same as for the other rules,
by Levenberg-Marquardt from the best of several c for which log(L − c) is a weighted linear regression; least squares,
or Huber's loss, which a few runs that went wrong pull less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from im_lightning.rule.estimators.base import NO_CHOICE, Estimator

METHODS = ("offset", "offset-robust")
STARTS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98)
"""The offsets tried first, in shares of the least loss trained on."""
HUBER = 1.345
"""Residuals above this many standard deviations (by their median) count linearly; 95 % efficient for normal errors."""
_RIDGE = 1e-9  # per run, on standardised regressors: keeps an undetermined direction at 0
_STEPS, _FINAL_STEPS = 10, 200
_LEAST = 1e-3  # nats per token: the search for c is over its logarithm


@dataclass(frozen=True)
class Offset(Estimator):
    """The law as an estimator; without settings to choose."""

    method: str  # "offset" (least squares) or "offset-robust" (Huber's loss)
    x: np.ndarray  # float64 [n, p], regressors
    weights: np.ndarray  # float64 [n], weights of the runs

    settings = NO_CHOICE

    def degrees(self, setting: int, coefficients: np.ndarray, y: np.ndarray) -> float:
        """Number of coefficients, the offset among them."""
        return float(len(coefficients))

    def _solve(
        self, trains: Sequence[np.ndarray], own: list[np.ndarray], y: np.ndarray, final: bool, only: int | None
    ) -> np.ndarray:
        """Float64 [F, 1, p + 2, B]: intercept, slopes, offset c (nats per token). NaN where a training set has no more
        runs than p + 2.
        """
        scale = np.where(self.x.std(axis=0) > 0, self.x.std(axis=0), 1.0)
        z = np.column_stack([np.ones(len(self.x)), (self.x - self.x.mean(axis=0)) / scale])
        out = np.full((len(trains), 1, self.x.shape[1] + 2, y.shape[1]), np.nan)
        for f, (train, w) in enumerate(zip(trains, own, strict=True)):
            inside = train[w > 0]
            if len(inside) <= self.x.shape[1] + 2:
                continue
            problem = _Problems(z[inside], y[inside], w[w > 0] / w.sum(), self.method == "offset-robust")
            solved = problem.solve(_FINAL_STEPS if final else _STEPS)
            slopes = solved[:, 1:-1] / scale
            out[f, 0] = np.column_stack([solved[:, 0] - slopes @ self.x.mean(axis=0), slopes, np.exp(solved[:, -1])]).T
        return out


class _Problems:
    """B responses on one training set: z [n, p + 1] with a column of ones, y [n, B], w [n] with sum 1.

    Parameters float64 [B, p + 2]: intercept and slopes on standardised regressors, log c.
    """

    def __init__(self, z: np.ndarray, y: np.ndarray, w: np.ndarray, robust: bool) -> None:
        self.z, self.y, self.w, self.robust = z, y, w, robust
        self.ridge = np.full(z.shape[1] + 1, _RIDGE)

    def solve(self, steps: int) -> np.ndarray:
        """Damped Gauss-Newton steps until none helps, all responses together."""
        found = self.start()
        damping = np.full(len(found), 1e-3)
        for _ in range(steps):
            w = self.row_weights(found)
            before = self.cost(found, w)
            step = self.step(found, w, damping)
            new = found + np.clip(step, -5.0, 5.0)
            better = self.cost(new, w) <= before
            found = np.where(better[:, None], new, found)
            damping = np.clip(np.where(better, damping / 4, damping * 8), 1e-9, 1e8)
            if np.abs(step[better]).max(initial=0.0) < 1e-9 and (better | (damping > 1e7)).all():
                break
        return found

    def start(self) -> np.ndarray:
        """Of the fits with a given c the best: log(L − c) by least squares, weighted by its slope in log L."""
        loss = np.exp(self.y)
        best, least = np.empty(0), np.full(self.y.shape[1], np.inf)
        for share in STARTS:
            c = np.maximum(loss.min(axis=0) * share, _LEAST * (1 if share else 1e-6))
            w = self.w[:, None] * np.maximum(1 - c / loss, 1e-6) ** 2
            gram = np.einsum("ni,nb,nj->bij", self.z, w, self.z) + np.diag(self.ridge[:-1])
            cross = np.einsum("ni,nb->bi", self.z, w * np.log(np.maximum(loss - c, 1e-12)))
            found = np.column_stack([np.linalg.solve(gram, cross[..., None])[..., 0], np.log(c)])
            cost = self.cost(found, np.broadcast_to(self.w[:, None], self.y.shape))
            best = found if not len(best) else np.where((cost < least)[:, None], found, best)
            least = np.minimum(cost, least)
        return best

    def parts(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residuals in log L [n, B], share of exp(index) in the loss [n, B])."""
        above = np.exp(np.clip(self.z @ found[:, :-1].T, -50.0, 50.0))
        loss = np.exp(found[:, -1]) + above
        return self.y - np.log(loss), above / loss

    def cost(self, found: np.ndarray, w: np.ndarray) -> np.ndarray:
        """float64 [B]."""
        return np.asarray((w * self.parts(found)[0] ** 2).sum(axis=0) + found**2 @ self.ridge)

    def row_weights(self, found: np.ndarray) -> np.ndarray:
        """Weights of the squared residuals, [n, B]: under Huber's loss less for those far out."""
        missed = np.abs(self.parts(found)[0])
        if not self.robust:
            return np.broadcast_to(self.w[:, None], missed.shape)
        wide = HUBER * 1.4826 * np.median(missed, axis=0)
        return np.asarray(self.w[:, None] * np.minimum(1.0, (wide + 1e-300) / np.maximum(missed, 1e-300)))

    def step(self, found: np.ndarray, w: np.ndarray, damping: np.ndarray) -> np.ndarray:
        """float64 [B, p + 2]."""
        missed, share = self.parts(found)
        jacobian = np.concatenate([share.T[..., None] * self.z, 1 - share.T[..., None]], axis=2)
        weighted = (jacobian * w.T[..., None]).transpose(0, 2, 1)
        square = weighted @ jacobian + np.diag(self.ridge)
        pull = (weighted @ missed.T[..., None])[..., 0] - self.ridge * found
        own = np.einsum("bii->bi", square)
        square = square + (damping[:, None] * own + 1e-15)[..., None] * np.eye(own.shape[1])
        return np.asarray(np.linalg.solve(square, pull[..., None])[..., 0])
