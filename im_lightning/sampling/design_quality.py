"""What a fit on designed runs can be expected to tell, from their mean regressors alone: before any of them is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from im_lightning.rule.region import fitted_radius, region_rank
from im_lightning.rule.validation import diagnostics
from im_lightning.sampling.systematic import Floats


@dataclass(frozen=True)
class DesignQuality:
    """What a fit on the runs of a design can be expected to tell, before any of them is made.

    Args:
        condition_number: Of the standardised design.
        vif: float64 [p], variance inflation per regressor; 1 is orthogonal, infinity not identified.
        errors: float64 [p], standard error of each coefficient, in units of the residual sd of log loss, for a change
            of the mean by one pool sd; infinity where it is not identified.
        spread: float64 [p], sd of the run means in pool sd.
        largest_distance: Largest Mahalanobis distance of a run from their mean.
        radius: Radius of the region that a rule fitted on these runs may use: min(largest distance, 3).
        rank: Directions that the runs' means span, of p.
        log_det: Log determinant of the information.
    """

    condition_number: float
    vif: Floats
    errors: Floats
    spread: Floats
    largest_distance: float
    radius: float
    rank: int
    log_det: float

    @property
    def reach(self) -> Floats:
        """float64 [p]: how far the fitted region extends along each regressor, from the runs' mean, in pool sd."""
        return self.radius * self.spread


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
    radius, largest = fitted_radius(means, means.mean(axis=0), cov)
    condition = math.inf if constant or collinear else diagnostics.condition_number(means)
    spread = means.std(axis=0, ddof=1)
    return DesignQuality(condition, vif, errors, spread, largest, radius, region_rank(cov), log_det_information(means))


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
