"""How far the coefficients would move with other subsets: refits on resampled subsets, penalties as chosen."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.linear import Smoother, least_squares
from im_lightning.rule.splits import group_codes
from im_lightning.rule.validation.cross_validation import Estimator
from im_lightning.rule.validation.model_selection import Candidate

DRAWS = 500
FEWEST = 50
"""Draws that must determine the fit for intervals to be given."""


def bootstrap_coefficients(data: FitData, candidate: Candidate, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Coefficients refitted on subsets drawn with replacement (all runs of a subset together).

    Args:
        data: The runs.
        candidate: The rule; its penalty stays as chosen. Of a best subset the regressors stay as chosen.
        draws: Number of resamples.
        seed: Of the draws.

    Returns:
        float64 [at most draws, p + 1], the intercept first; resamples that do not determine the fit are left out.
    """
    estimator, setting = estimator_behind(data, candidate)
    codes = group_codes(data.groups)
    count = int(codes.max()) + 1
    picks = np.random.default_rng(seed).integers(0, count, (draws, count))
    times = np.stack([np.bincount(p, minlength=count) for p in picks])[:, codes]
    weights = times * data.weights
    if isinstance(estimator, Smoother):
        rows = []
        for w in weights:
            inside = np.flatnonzero(w)
            rows.append(estimator.maps(inside, [setting], w).coefficients(data.y[inside], 0))
        out = np.array(rows)
    else:
        everyone = [np.arange(len(data.y))] * draws
        out = estimator.solve(everyone, data.y[:, None], weights=weights, only=setting)[:, 0, :, 0]
    return out[np.isfinite(out).all(axis=1)]


def estimator_behind(data: FitData, candidate: Candidate) -> tuple[Estimator, int]:
    """The estimator and setting of a candidate; for a best subset least squares on what it kept."""
    if candidate.estimator is not None:
        return candidate.estimator, candidate.setting
    kept = [data.names.index(name) for name in candidate.names]
    return least_squares(data.x[:, kept], data.weights), 0


def intervals(candidate: Candidate, drawn: np.ndarray) -> dict[str, Any]:
    """Per regressor {low, high, sign_stability}: 95 % percentile interval, share of resamples with the rule's sign."""
    if len(drawn) < FEWEST:
        return {}
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    same = (np.sign(drawn) == np.sign(candidate.coefficients)).mean(axis=0)
    return {
        name: {"low": float(low[j]), "high": float(high[j]), "sign_stability": float(same[j])}
        for j, name in enumerate(candidate.names, start=1)
    }
