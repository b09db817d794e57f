"""What single runs do to a rule, and how far a run may lie from its prediction."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.linear import Smoother
from im_lightning.rule.splits import Split
from im_lightning.rule.validation.bootstrap import estimator_behind
from im_lightning.rule.validation.model_selection import Candidate, Scheme


def residual_variance(data: FitData, candidate: Candidate) -> tuple[float, float]:
    """(residual variance, residual degrees of freedom), by the effective number of parameters."""
    left = float(data.weights @ (data.y - candidate.fitted) ** 2)
    df = len(data.y) - candidate.degrees
    return (left / df if df > 0 else float("nan")), df


def cooks_distances(data: FitData, candidate: Candidate) -> np.ndarray:
    """Cook's distance of every run: how far all fitted values move without it, per parameter and residual variance.

    By refits without the run, the penalty as chosen: Σ(ŷ − ŷ₋ᵢ)² / (parameters · residual variance). For least squares
    this is the textbook's. NaN where the rest does not determine the fit.
    """
    estimator, setting = estimator_behind(data, candidate)
    n = len(data.y)
    without = [np.delete(np.arange(n), i) for i in range(n)]
    if isinstance(estimator, Smoother):
        refits = np.array([estimator.maps(t, [setting]).coefficients(data.y[t], 0) for t in without])
    else:
        refits = estimator.solve(without, data.y[:, None], final=True, only=setting)[:, 0, :, 0]
    moved = candidate.fitted - refits[:, :1] - refits[:, 1:] @ estimator.x.T
    variance, _ = residual_variance(data, candidate)
    return np.asarray((moved**2) @ data.weights / (candidate.degrees * variance))


def coefficient_covariance(data: FitData, candidate: Candidate) -> np.ndarray | None:
    """Covariance of a smoother's estimates at its penalty, float64 [p + 1, p + 1]; None for coordinate descent.

    The estimates are linear in y: s² A W⁻¹ Aᵀ. Under a penalty this measures their spread, not their bias.
    """
    estimator, setting = estimator_behind(data, candidate)
    variance, df = residual_variance(data, candidate)
    if not isinstance(estimator, Smoother) or df <= 0:
        return None
    maps = estimator.maps(np.arange(len(data.y)), [setting])
    slopes = maps.slopes[0]
    rows = np.vstack([maps.weight - maps.centre @ slopes, slopes])
    return np.asarray(variance * (rows / data.weights) @ rows.T)


def held_out_rows(data: FitData, scheme: Scheme, candidate: Candidate) -> list[dict[str, Any]]:
    """Measured and predicted log loss of every run, predicted without its fold, with a 95 % prediction interval.

    For least squares the interval is the t interval of the fit without the fold. For the others it is the prediction
    ± t · the held-out root mean squared error of the other folds.

    Returns:
        [{run_id, y, prediction, low, high}] by run; None where not estimable.
    """
    from scipy.stats import t as student

    n = len(data.y)
    half = np.full(n, np.nan)
    errors = (data.y - candidate.predictions) ** 2
    for split in scheme.grouped:
        exact = _t_half_widths(data, split, candidate) if candidate.method == "ols" else None
        if exact is not None:
            half[split.test] = exact
        elif len(np.unique(scheme.codes[split.train])) > 2:
            w = data.weights[split.train]
            rmse = float(np.sqrt(w @ errors[split.train] / w.sum()))
            df = len(np.unique(scheme.codes[split.train])) - 1
            half[split.test] = student.ppf(0.975, df) * rmse / np.sqrt(data.weights[split.test])
    return [
        {
            "run_id": record.run_id,
            "y": float(data.y[i]),
            "prediction": _finite(candidate.predictions[i]),
            "low": _finite(candidate.predictions[i] - half[i]),
            "high": _finite(candidate.predictions[i] + half[i]),
        }
        for i, record in enumerate(data.records)
    ]


def _t_half_widths(data: FitData, split: Split, candidate: Candidate) -> np.ndarray | None:
    """Half widths of least squares' 95 % prediction intervals, [k]; None under sign constraints or too few runs."""
    from scipy.stats import t as student

    estimator = candidate.estimator
    df = len(split.train) - len(candidate.coefficients)
    if not isinstance(estimator, Smoother) or df < 1:
        return None
    maps = estimator.maps(split.train, [0])
    y, w = data.y[split.train], data.weights[split.train]
    variance = float(w @ (y - maps.hats(estimator.x[split.train])[0] @ y) ** 2) / df
    hats = maps.hats(estimator.x[split.test])[0]
    spread = variance * (1 / data.weights[split.test] + (hats**2 / w).sum(axis=1))
    return np.asarray(student.ppf(0.975, df) * np.sqrt(spread))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
