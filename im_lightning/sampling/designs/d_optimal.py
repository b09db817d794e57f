"""Which designed runs to make: from many candidate subsets those that tell the coefficients of a rule best.

D-optimality: the runs whose information matrix [1 Z]ᵀ[1 Z] has the largest determinant, Z [n, p] the mean regressors of
the runs; that is the smallest volume of the confidence ellipsoid of intercept and coefficients. Scaling a regressor or
writing the same space in other coordinates changes no choice. Runs are added greedily, then exchanged one by one while
that helps (Fedorov, Theory of Optimal Experiments, 1972; Wynn's and Fedorov's exchange), from several starts.

What a fit on designed runs can be expected to tell, from their mean regressors alone: before any of them is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.rng import DESIGN_CHOICE, generator
from im_lightning.errors import RequestError, message
from im_lightning.rule.validation import diagnostics
from im_lightning.sampling.draws.systematic import Floats


@dataclass(frozen=True)
class DesignQuality:
    """What a fit on the runs of a design can be expected to tell, before any of them is made."""

    condition_number: float  # of the standardised design
    vif: Floats  # float64 [p], variance inflation per regressor; 1 is orthogonal, infinity not identified
    # float64 [p], standard error of each coefficient, in units of the residual sd of log loss, for a change of the mean
    # by one pool sd; infinity where it is not identified
    errors: Floats
    spread: Floats  # float64 [p], sd of the run means in pool sd
    largest_distance: float  # largest Mahalanobis distance of a run from their mean
    tilt: float  # how far a tilt by a rule fitted on these runs goes, in sd of its fitted values
    rank: int  # directions that the runs' means span, of p
    log_det: float  # log determinant of the information

    @property
    def reach(self) -> Floats:
        """float64 [p]: how far a tilt may go along each regressor, from the runs' mean, in pool sd."""
        return self.tilt * self.spread


def design_quality(x: ArrayLike) -> DesignQuality:
    """What a fit on runs with these mean regressors (float64 [n, p], in pool sd) can tell; n ≥ p + 2.

    A regressor that does not vary over the runs, or is an exact combination of others, gets infinite errors and VIF.
    """
    means = np.asarray(x, dtype=np.float64)
    p = means.shape[1]
    constant = set(diagnostics.constant_columns(means))
    varies = [j for j in range(p) if j not in constant]
    collinear = {varies[j] for j in diagnostics.collinear_columns(means[:, varies])} if varies else set()
    told = [j for j in varies if j not in collinear]
    vif, errors = np.full(p, np.inf), np.full(p, np.inf)
    if told:
        known = means[:, varies]
        z = known - known.mean(axis=0)
        scale = z.std(axis=0)
        inverse = np.linalg.pinv((z / scale).T @ (z / scale), rcond=diagnostics.SINGULAR_EIGENVALUE, hermitian=True)
        at = [varies.index(j) for j in told]
        errors[told] = np.sqrt(np.diag(inverse)[at]) / scale[at]
        vif[told] = len(means) * np.diag(inverse)[at]
    cov = np.atleast_2d(np.cov(means, rowvar=False))
    same = np.unique(means, axis=0, return_inverse=True)[1].reshape(-1)
    radius, largest = diagnostics.fitted_radius(means, same.tolist())
    reach = min(radius, diagnostics.MAX_REACH)
    condition = math.inf if constant or collinear else diagnostics.condition_number(means)
    spread = means.std(axis=0, ddof=1)
    return DesignQuality(
        condition, vif, errors, spread, largest, reach, diagnostics.region_rank(cov), log_det_information(means)
    )


def log_det_information(x: ArrayLike) -> float:
    """Log determinant of [1 x]ᵀ[1 x] for run means x ([n, p]); minus infinity for a singular design."""
    rows = with_intercept(np.asarray(x, dtype=np.float64))
    sign, value = np.linalg.slogdet(rows.T @ rows)
    return float(value) if sign > 0 else -math.inf


def relative_efficiency(log_det: float, reference: float, p: int) -> float:
    """How many times as many runs of the reference design would tell as much: exp((log det − log det′) / (p + 1)).

    NaN where either design is singular.
    """
    known = math.isfinite(log_det) and math.isfinite(reference)
    return math.exp((log_det - reference) / (p + 1)) if known else math.nan


def with_intercept(x: Floats) -> Floats:
    """A column of ones before x [n, p]."""
    return np.column_stack([np.ones(len(x)), x])


REPEATED_SHARE = 0.1  # of the runs, at least, repeat a subset with another training seed: the noise ceiling
REPEATS = 10
"""Repeats for a noise ceiling that says something: under five it is not given."""
_RIDGE = 1e-9  # of the mean diagonal, so that the first few runs, and collinear regressors, have a finite determinant
_STARTS = 4  # random ones beside the greedy one
_RANDOM_DESIGNS = 200


@dataclass(frozen=True)
class ChosenRuns:
    """Runs of a design."""

    subsets: NDArray[np.int64]  # int64 [n - k], candidates, all different
    repeats: NDArray[np.int64]  # int64 [k], those of them to repeat with another training seed, all different
    log_det: float  # log determinant of the information of all n runs, standardised regressors

    @property
    def runs(self) -> NDArray[np.int64]:
        """int64 [n], a candidate per run, the repeats last."""
        return np.concatenate([self.subsets, self.repeats])


def repeats_of(runs: int, regressors: int = 0) -> int:
    """How many of the runs repeat a subset unless told otherwise: a tenth, rounded up, or ten of them if these are at
    most a quarter of the runs and leave three subsets more than regressors."""
    least = math.ceil(REPEATED_SHARE * runs)
    return max(least, min(REPEATS, runs // 4, runs - regressors - 3))


def d_optimal_runs(
    x: ArrayLike,
    runs: int,
    repeats: int = 0,
    serves: ArrayLike | None = None,
    least: ArrayLike = (),
) -> ChosenRuns:
    """Chooses runs from candidates, for the largest determinant of the information: the best of several starts.

    Args:
        x: float64 [C, p], mean regressors of the candidate subsets.
        runs: Runs to make, n.
        repeats: How many of them, k, repeat a subset; fewer than half.
        serves: bool [C, R], which of R wishes a candidate fulfils, such as to leave a certain source out.
        least: int [R], how many of the subsets have to fulfil each wish.

    Raises:
        RequestError: more subsets wanted than there are candidates, or than fulfil a wish; half of the runs or more
            repeated.
    """
    points = _standardised(np.asarray(x, dtype=np.float64))
    wishes = np.zeros((len(points), 0), dtype=bool) if serves is None else np.asarray(serves, dtype=bool)
    quota, subsets = _Quota(wishes, np.asarray(least, dtype=np.int64)), runs - repeats
    if not 0 <= repeats < runs / 2:
        cause = f"{repeats} of {runs} runs would repeat a subset"
        raise RequestError(message("repeats", cause, f"repeat from 0 to {max(0, (runs - 1) // 2)} of them"))
    if not 1 <= subsets <= len(points) or (quota.least > np.minimum(subsets, wishes.sum(axis=0))).any():
        wanted = (
            f", {int(quota.least.max())} of them of a kind that {int(wishes.sum(axis=0).min())} are"
            if wishes.shape[1]
            else ""
        )
        cause = f"{subsets} different subsets are wanted{wanted}; there are {len(points)} candidates"
        raise RequestError(message("design", cause, "draw more candidates, or ask for fewer runs"))
    rows = with_intercept(points)
    rng = generator(0, purpose=DESIGN_CHOICE)
    best, best_value = np.empty(0, dtype=np.int64), -math.inf
    for start in range(1 + _STARTS):
        first = _greedy(rows, subsets, quota) if start == 0 else _random(rng, subsets, quota)
        chosen = _exchange(rows, first, quota)
        value = float(np.linalg.slogdet(_regular(rows, chosen))[1])
        if value > best_value + 1e-9:
            best, best_value = chosen, value
    again = _repeat(rows, best, repeats)
    return ChosenRuns(best, again, log_det_information(points[np.concatenate([best, again])]))


def random_log_det(x: ArrayLike, runs: int, repeats: int = 0) -> float:
    """Median log determinant of designs that take their subsets from the candidates at random, standardised alike."""
    points = _standardised(np.asarray(x, dtype=np.float64))
    rng = generator(0, epoch=1, purpose=DESIGN_CHOICE)
    values = []
    for _ in range(_RANDOM_DESIGNS):
        chosen = rng.permutation(len(points))[: runs - repeats]
        values.append(log_det_information(points[np.concatenate([chosen, chosen[:repeats]])]))
    return float(np.median(values))


def _standardised(x: Floats) -> Floats:
    """Columns of the candidates centred, unit variance; those that do not vary are left out."""
    if x.ndim != 2 or not np.isfinite(x).all():
        raise RequestError(message("design", "the means of the candidates are not finite", "score what is missing"))
    kept = x[:, [j for j in range(x.shape[1]) if j not in set(diagnostics.constant_columns(x))]]
    return (kept - kept.mean(axis=0)) / kept.std(axis=0)


def _regular(rows: Floats, chosen: NDArray[np.int64]) -> Floats:
    """Information of the chosen rows, a trace of a ridge added."""
    return rows[chosen].T @ rows[chosen] + _RIDGE * max(1, len(chosen)) * np.eye(rows.shape[1])


@dataclass(frozen=True)
class _Quota:
    """Which wishes a candidate fulfils, bool [C, R], and how many of the chosen must fulfil each, int [R]."""

    serves: NDArray[np.bool_]
    least: NDArray[np.int64]

    def short(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R] how many more must fulfil each."""
        return np.asarray(np.maximum(self.least - self.serves[chosen].sum(axis=0), 0))

    def allowed(self, chosen: NDArray[np.int64], left: int) -> NDArray[np.bool_]:
        """bool [C]: which candidates may be added where `left` more are to come: as wishes press, those that fulfil
        most of them."""
        short = self.short(chosen)
        ok = np.ones(len(self.serves), dtype=bool)
        ok[chosen] = False
        if short.sum() >= left:
            fulfilled = np.where(ok, self.serves @ (short > 0).astype(np.int64), -1)
            ok &= fulfilled == fulfilled.max()
        return ok

    def forbidden(self, chosen: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n, C − n]: exchanges after which a wish that is just fulfilled no longer is."""
        scarce = self.serves[chosen].sum(axis=0) <= self.least
        lost = (self.serves[chosen] & scarce).astype(np.int64)
        return np.asarray(lost @ (~self.serves[others]).astype(np.int64).T > 0)


def _greedy(rows: Floats, count: int, quota: _Quota) -> NDArray[np.int64]:
    """Adds the run that raises the determinant most, one after the other."""
    chosen = np.empty(0, dtype=np.int64)
    matrix = _RIDGE * np.eye(rows.shape[1])
    for step in range(count):
        gains = np.einsum("ij,ij->i", rows, np.linalg.solve(matrix, rows.T).T)
        best = int(np.argmax(np.where(quota.allowed(chosen, count - step), gains, -np.inf)))
        chosen = np.append(chosen, best)
        matrix = matrix + np.outer(rows[best], rows[best])
    return chosen


def _random(rng: np.random.Generator, count: int, quota: _Quota) -> NDArray[np.int64]:
    """Candidates as they come, as far as the quota goes."""
    chosen = np.empty(0, dtype=np.int64)
    order = rng.permutation(len(quota.serves))
    for step in range(count):
        allowed = quota.allowed(chosen, count - step)
        chosen = np.append(chosen, order[np.argmax(allowed[order])])
    return chosen


def _exchange(rows: Floats, chosen: NDArray[np.int64], quota: _Quota) -> NDArray[np.int64]:
    """Exchanges a chosen run for another candidate, the best exchange first, until none raises the determinant.

    The factor by which it changes is (1 + v_jj)(1 − v_ii) + v_ij² for v = rows · M⁻¹ · rowsᵀ.
    """
    chosen = chosen.copy()
    for _ in range(50 * len(chosen)):
        others = np.setdiff1d(np.arange(len(rows)), chosen)
        if not len(others):
            break
        half = np.linalg.solve(np.linalg.cholesky(_regular(rows, chosen)), rows.T)  # [p + 1, C]
        inside, outside = half[:, chosen], half[:, others]
        own_in, own_out = (inside**2).sum(axis=0), (outside**2).sum(axis=0)
        factor = np.outer(1.0 - own_in, 1.0 + own_out) + (inside.T @ outside) ** 2
        factor[quota.forbidden(chosen, others)] = 0.0
        at, by = np.unravel_index(int(np.argmax(factor)), factor.shape)
        if factor[at, by] <= 1.0 + 1e-9:
            break
        chosen[at] = others[by]
    return chosen


def _repeat(rows: Floats, chosen: NDArray[np.int64], repeats: int) -> NDArray[np.int64]:
    """The chosen runs whose repetition tells most, each once."""
    again: list[int] = []
    for _ in range(repeats):
        matrix = _regular(rows, np.concatenate([chosen, np.array(again, dtype=np.int64)]))
        left = np.setdiff1d(chosen, again)
        gains = np.einsum("ij,ij->i", rows[left], np.linalg.solve(matrix, rows[left].T).T)
        again.append(int(left[np.argmax(gains)]))
    return np.array(again, dtype=np.int64)
