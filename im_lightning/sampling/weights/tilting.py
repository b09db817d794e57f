"""Exponential tilting: the weights closest to uniform whose mean regressors are a given target.

    w = argmin KL(w ‖ q)  subject to  Σ w_i φ_i = μ      ⇒      w_i ∝ q_i · exp(θ · φ_i)

θ minimises the convex dual log Σ q_i exp(θ · (φ_i − μ)), of dimension p however many rows there are (the exponential
tilting of Efron 1981; entropy balancing of Hainmueller 2012). Damped Newton on it, in the eigenbasis of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from im_lightning.errors import RequestError, message
from im_lightning.sampling.draws.systematic import Floats

EIGENVALUE_FLOOR = 1e-8  # of the largest; the pool does not vary along directions below it
_STRENGTH_STEP = 1e-3  # bisection of the strength ends at this width, relative to the strength asked for
_WHY = {
    "infeasible": "no weights of these rows reach the target",
    "not converged": "weights were looked for and not found, so near the edge of the rows",
}
_GAP = 1e-9  # largest distance of a solution from its target, in sd of the pool
_MOST_STEPS = 100  # of Newton, after which a target is given up
_CONSTANT = 1e-9  # sd relative to a column's size below which it does not vary at all


@dataclass(frozen=True)
class Tilt:
    """A solved tilt."""

    weights: Floats  # float64 [N], sum 1
    theta: Floats  # float64 [p], per unit of φ
    # "converged"; "infeasible" (the target lies outside the convex hull of the rows: a direction was found in which
    # every row lies on one side of it); "not converged" (so close to the hull that Newton did not end)
    status: str
    iterations: int  # Newton steps taken
    # largest distance of the weighted mean from the target along a direction in which the pool varies, in sd
    gap: float
    # part of the target, in pool sd, along directions in which the pool does not vary; it is ignored
    unreachable: float

    @property
    def converged(self) -> bool:
        return self.status == "converged"


class TiltProblem:
    """The tilts of one pool: whitens φ once and solves for any number of targets.

    Columns are scaled to unit variance before the eigenvectors are taken, so that units do not matter.

    Args:
        phi: float64 [N, p], finite.
        base: The weights to stay close to, [N], non-negative; by default uniform.

    Raises:
        RequestError: a value is not finite (the first such row is named), or no row has weight.

    >>> TiltProblem([[0.0], [1.0]]).solve([0.75]).weights.round(3).tolist()
    [0.25, 0.75]
    """

    def __init__(self, phi: ArrayLike, base: ArrayLike | None = None) -> None:
        x = np.asarray(phi, dtype=np.float64)
        if x.ndim != 2 or not np.isfinite(x).all():
            bad = f"shape {x.shape}" if x.ndim != 2 else f"a missing value in row {np.argwhere(~np.isfinite(x))[0][0]}"
            remedy = "pass finite [rows, indicators]; leave such rows out"
            raise RequestError(message("tilt", f"the regressors have {bad}", remedy))
        q = np.ones(len(x)) if base is None else np.asarray(base, dtype=np.float64)
        if q.shape != x.shape[:1] or not np.all(q >= 0) or not 0 < q.sum() < np.inf:
            remedy = "pass one non-negative weight per row, not all 0"
            raise RequestError(message("tilt", "the base weights do not fit", remedy))
        self.base = q / q.sum()
        self.mean = self.base @ x
        deviation = np.sqrt(self.base @ (x - self.mean) ** 2)
        size = np.abs(x).max(axis=0, initial=0.0)
        varies = deviation > _CONSTANT * size
        self.scale = np.where(varies, deviation, np.where(size > 0, size, 1.0))
        centred = np.where(varies, (x - self.mean) / self.scale, 0.0)
        eigenvalues, vectors = np.linalg.eigh((centred * self.base[:, None]).T @ centred)
        kept = eigenvalues > EIGENVALUE_FLOOR * max(float(eigenvalues.max(initial=0.0)), 1e-300)
        self._vectors, self._roots = vectors[:, kept], np.sqrt(eigenvalues[kept])
        self._z = centred @ (self._vectors / self._roots)  # [N, k], mean 0, covariance 1 under the base

    def along(self, direction: ArrayLike) -> Floats:
        """Where each row lies along a direction ([p]) of whitened space: float64 [N], mean 0, variance 1.

        Whitening is by the symmetric root of the correlation matrix, so that the answer does not depend on the signs
        that a linear algebra library gives its eigenvectors. Parts of the direction in which the pool does not vary
        are left out; 0 everywhere if nothing is left.
        """
        inside = self._vectors.T @ np.asarray(direction, dtype=np.float64)
        length = float(np.linalg.norm(inside))
        return self._z @ (inside / length) if length > 0 else np.zeros(len(self._z))

    def towards(
        self, edge: Floats, strength: float, budget: int | None = None, floor: float = 0.0
    ) -> tuple[Tilt | None, float, str]:
        """The tilt furthest towards a target that can be drawn, by bisection of s: mean + s · (edge − mean).

        Args:
            edge: [p], where s is 1.
            strength: The largest s.
            budget: Rows that are drawn without replacement: no row may weigh more than 1 / budget; None for no limit.
            floor: Share of uniform weights mixed in before they are drawn.

        Returns:
            The tilt, None where s is 0 (the base weights); s; why it is below the strength, or "".
        """
        best, reached, reason = None, 0.0, ""
        low, high, s = 0.0, strength, strength
        while s > 0 and high - low > _STRENGTH_STEP * strength:
            tilt = self.solve(self.mean + s * (edge - self.mean), start=None if best is None else best.theta)
            largest = (1.0 - floor) * float(tilt.weights.max()) + floor / len(tilt.weights)
            if tilt.converged and (budget is None or budget * largest <= 1 + 1e-9):
                low, best, reached = s, tilt, s
            else:
                high = s
                reason = "rows would have to be drawn more than once" if tilt.converged else _WHY[tilt.status]
            s = (low + high) / 2 if reached < strength else 0.0
        return best, reached, reason

    def solve(self, target: ArrayLike, start: Floats | None = None) -> Tilt:
        """The tilt whose mean regressors Σ w φ are `target` ([p]). Begins from `start`, the θ of a solution nearby."""
        wanted = (np.asarray(target, dtype=np.float64) - self.mean) / self.scale
        inside = self._vectors.T @ wanted
        unreachable = float(np.linalg.norm(wanted - self._vectors @ inside))
        t = inside / self._roots
        eta = np.zeros(len(t)) if start is None else self._roots * (self._vectors.T @ (start * self.scale))
        dual, weights = self._evaluate(eta, t)
        status, iterations, gap = "not converged", 0, np.inf
        while True:
            gradient = weights @ self._z - t
            gap = float(np.abs(gradient).max(initial=0.0))
            if gap <= _GAP:
                status = "converged"
                break
            if self._separates(eta, t):
                status = "infeasible"
                break
            if iterations == _MOST_STEPS:
                break
            mean = gradient + t
            hessian = (self._z * weights[:, None]).T @ self._z - np.outer(mean, mean)
            ridge = 1e-14 * max(1.0, float(np.trace(hessian)))  # weights on a face of the hull: singular there
            step = np.linalg.solve(hessian + ridge * np.eye(len(t)), gradient)
            moved = self._damped(eta, t, dual, step, float(gradient @ step))
            if moved is None:
                break
            eta, dual, weights = moved
            iterations += 1
        theta = self._vectors @ (eta / self._roots) / self.scale
        return Tilt(weights, theta, status, iterations, gap, unreachable)

    def _evaluate(self, eta: Floats, t: Floats) -> tuple[float, Floats]:
        """The dual at `eta` and the weights there, by a stable log-sum-exp."""
        exponents = self._z @ eta
        top = float(exponents.max())
        masses = self.base * np.exp(exponents - top)
        total = float(masses.sum())
        return float(np.log(total) + top - eta @ t), masses / total

    def _separates(self, eta: Floats, t: Floats) -> bool:
        """Whether every row lies behind the target along `eta`: then no weights have it as their mean."""
        return bool((self._z @ eta)[self.base > 0].max() < eta @ t)

    def _damped(
        self, eta: Floats, t: Floats, dual: float, step: Floats, decrement: float
    ) -> tuple[Floats, float, Floats] | None:
        """The longest of the halved Newton steps that lowers the dual enough; None if rounding leaves none."""
        length = 1.0
        while length > 1e-12:
            candidate = eta - length * step
            value, weights = self._evaluate(candidate, t)
            # Close to the solution the decrease drowns in rounding, and the full step is right.
            if value <= dual - 1e-4 * length * decrement or decrement < 1e-12:
                return candidate, value, weights
            length /= 2
        return None
