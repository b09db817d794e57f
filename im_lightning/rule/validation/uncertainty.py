"""How sure a fit is: coefficient table and covariance, bootstrap of the subsets, influence, prediction intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from im_lightning.errors import RequestError, message
from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.linear import Smoother
from im_lightning.rule.validation import diagnostics
from im_lightning.rule.validation.cross_validation import Predictor, Split, mean_predictions, predictions
from im_lightning.rule.validation.model_selection import Candidate, Scheme

DRAWS = 500
FEWEST = 50
"""Draws that must determine the fit for intervals to be given."""


def is_least_squares(chosen: Candidate) -> bool:
    """Whether the rule is a plain least-squares fit, for which t, p and F mean what textbooks say."""
    return chosen.method in ("ols", "best-subset") and isinstance(chosen.fixed, Smoother)


def coefficient_table(
    data: FitData, chosen: Candidate, covariance: np.ndarray | None, stability: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per term. t, p and their interval belong to least squares alone; else low and high are bootstrapped."""
    from scipy.stats import t as student

    linear = bool(chosen.names) and not chosen.method.startswith(("additive", "partial"))
    vif = diagnostics.variance_inflation(chosen.fixed.x) if linear else np.empty(0)
    df = residual_variance(data, chosen)[1]
    rows = []
    for j, term in enumerate(["intercept", *chosen.names]):
        estimate, se, t, p = float(chosen.coefficients[j]), None, None, None
        low, high = (stability.get(term, {}).get(bound) for bound in ("low", "high"))
        if covariance is not None:
            se = float(np.sqrt(max(covariance[j, j], 0.0)))
        if is_least_squares(chosen):
            low = high = None
        if is_least_squares(chosen) and se and df > 0:
            t, half = estimate / se, float(student.ppf(0.975, df)) * se
            p, low, high = 2 * float(student.sf(abs(t), df)), estimate - half, estimate + half
        row = {"term": term, "estimate": estimate, "se": se, "t": t, "p": p, "low": low, "high": high}
        rows.append({**row, "vif": float(vif[j - 1]) if j and len(vif) else None})
    return rows


def f_test(data: FitData, chosen: Candidate, covariance: np.ndarray | None) -> tuple[float | None, float | None]:
    """F of all regressors of a least-squares fit together, and its p; None for other fits or where no error is left."""
    from scipy.stats import f

    count = len(chosen.names)
    if not count or covariance is None or not is_least_squares(chosen) or not (np.diag(covariance) > 0).all():
        return None, None
    se = np.sqrt(np.diag(covariance))[1:]
    t = chosen.coefficients[1:] / se
    value = float(t @ np.linalg.solve(covariance[1:, 1:] / np.outer(se, se), t)) / count
    return value, float(f.sf(value, count, residual_variance(data, chosen)[1]))


def bootstrap_coefficients(data: FitData, candidate: Candidate, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Coefficients refitted on subsets drawn with replacement (all runs of a subset together), the penalty, or the
    regressors of a best subset, as chosen. With both chosen again: `refits.bootstrapped_rules`.

    Returns:
        float64 [at most draws, p + 1 (p + 2 with an offset)], as a candidate's coefficients; resamples that do not
        determine the fit are left out.

    Raises:
        RequestError: fewer draws than none.
    """
    if draws < 0:
        raise RequestError(message(f"{draws} resamples", "it is negative", "give a number of them, 0 for none"))
    estimator, setting = candidate.fixed, candidate.setting
    drawn = resampled(sorted(set(data.groups)), repeat(np.random.default_rng(seed), draws))
    weights = np.array([[times[group] for group in data.groups] for times in drawn]) * estimator.weights
    trains = [np.flatnonzero(w) for w in weights]
    out = estimator.solve(trains, data.y[:, None], weights=weights, only=setting)[:, 0, :, 0]
    return out[np.isfinite(out).all(axis=1)]


def resampled(subsets: Sequence[str], streams: Iterable[np.random.Generator]) -> Iterator[dict[str, int]]:
    """How often each subset is drawn, with replacement and as often as there are subsets; one resample per stream."""
    for stream in streams:
        picks = stream.integers(0, len(subsets), len(subsets))
        yield dict(zip(subsets, np.bincount(picks, minlength=len(subsets)).tolist(), strict=True))


def intervals(candidate: Candidate, drawn: np.ndarray, subsets: int) -> dict[str, Any]:
    """Per regressor, and of an offset, {low, high, sign_stability}: 95 % interval, share of resamples with the sign.

    The resamples' quantiles, moved away from the estimate for what a fit of few subsets takes up: by the t quantile
    over the normal one and √(subsets / residual degrees of freedom), as for the errors of least squares.
    """
    from scipy.stats import norm
    from scipy.stats import t as student

    if len(drawn) < FEWEST:
        return {}
    df = round(subsets - candidate.degrees, 9)
    wider = float(student.ppf(0.975, df) / norm.ppf(0.975) * np.sqrt(subsets / df)) if df >= 1 else 1.0
    centre = candidate.coefficients
    low, high = centre + wider * (np.quantile(drawn, [0.025, 0.975], axis=0) - centre)
    same = (np.sign(drawn) == np.sign(candidate.coefficients)).mean(axis=0)
    return {
        name: {"low": float(low[j]), "high": float(high[j]), "sign_stability": float(same[j])}
        for j, name in enumerate([*candidate.names, "offset"][: len(candidate.coefficients) - 1], start=1)
    }


def residual_variance(data: FitData, candidate: Candidate) -> tuple[float, float]:
    """(residual variance of a run, residual degrees of freedom: different subsets − effective number of parameters)."""
    subsets = len(set(data.groups))
    df = round(subsets - candidate.degrees, 9)  # the parameters are a trace, whole but for rounding
    mean_square = float(data.once @ (data.y - candidate.fitted) ** 2) / len(data.y)
    return (mean_square * subsets / df if df > 0 else float("nan")), df


def calibration_slope(data: FitData, scheme: Scheme, candidate: Candidate) -> float | None:
    """How large a predicted difference of log loss turns out: the slope of the runs' log loss on its held-out
    prediction, each from the mean of the runs trained on. Below 1 predictions go too far; None if not estimable."""
    if not scheme.grouped or not np.isfinite(candidate.predictions).all():
        return None
    test = np.concatenate([split.test for split in scheme.grouped])
    mean = np.concatenate(mean_predictions(scheme.grouped, data.y, data.weights))
    predicted, w = candidate.predictions[test] - mean, data.weights[test]
    square = float(w @ predicted**2)
    return float(w @ (predicted * (data.y[test] - mean))) / square if square > 0 else None


def sources_out(data: FitData, scheme: Scheme, candidate: Candidate) -> dict[str, Any]:
    """The candidate's numbers per source held out, with `law_r2`: R² as far as so few runs can tell.

    A fit on the runs without a source misses those with it for two reasons: its law does not hold there, or its
    coefficients are badly known. Where the law holds, errors e have the covariance σ²(I + H): the runs' own noise, and
    the scatter of the predictions, found by fits made again on the candidate's own values and new noise. Therefore
    e'(I + H)⁻¹e stands in for the sum of squares (generalised least squares); directions that so few runs say nothing
    about hardly count. A low value speaks against the law, and a high one only says that these runs do not.
    """
    variance, degrees = residual_variance(data, candidate)
    out: dict[str, Any] = {}
    for source, one in candidate.row["source_out"].items():
        law = None
        if one["r2"] is not None and degrees > 0 and variance > 1e-12 * data.y.var():
            split, rng = scheme.sources[source], np.random.default_rng(0)
            noise = rng.standard_normal((int(scheme.codes.max()) + 1, DRAWS))[scheme.codes] * np.sqrt(variance)
            predictor = Predictor(candidate.estimator, [split], scheme.folds)
            again = predictor.predict(candidate.fitted[:, None] + noise)[0][0]
            (mean,), root = mean_predictions([split], data.y, data.weights), np.sqrt(data.weights[split.test])
            missed = root * (data.y[split.test] - predictor.predict(data.y[:, None])[0][0][:, 0])
            scatter, axes = np.linalg.eigh(np.cov(root[:, None] * again) / variance)
            square = float(((axes.T @ missed) ** 2 / (1 + scatter.clip(0))).sum())
            law = 1 - square / float(root**2 @ (data.y[split.test] - mean) ** 2)
        out[source] = {**one, "law_r2": law}
    return out


def cooks_distances(data: FitData, candidate: Candidate) -> np.ndarray:
    """Cook's distance of every run: how far all fitted values move without it, per parameter and residual variance.

    By refits without the run, the penalty as chosen: Σ(ŷ − ŷ₋ᵢ)² / (parameters · residual variance). For least squares
    this is the textbook's. NaN where the rest does not determine the fit.
    """
    estimator, setting = candidate.fixed, candidate.setting
    n = len(data.y)
    without = [np.delete(np.arange(n), i) for i in range(n)]
    refits = estimator.solve(without, data.y[:, None], final=True, only=setting)[:, 0, :, 0]
    moved = candidate.fitted - predictions(refits[..., None], estimator.x)[..., 0]
    variance, _ = residual_variance(data, candidate)
    return np.asarray((moved**2) @ data.weights / (candidate.degrees * variance))


def coefficient_covariance(data: FitData, candidate: Candidate) -> np.ndarray | None:
    """Covariance of the estimates, float64 [p + 1, p + 1]; None for coordinate descent, and where no error is left.

    A smoother's estimates at its penalty are linear in y; the runs of a subset count as one, whose residual variance is
    that of the subsets' mean residuals. Under a penalty this measures their spread, not their bias.
    """
    estimator, setting = candidate.fixed, candidate.setting
    df = residual_variance(data, candidate)[1]
    if not isinstance(estimator, Smoother) or df <= 0:
        return None
    maps = estimator.maps(np.arange(len(data.y)), [setting])
    slopes = maps.slopes[0]
    rows = np.vstack([maps.weight - maps.centre @ slopes, slopes])
    subsets = [np.flatnonzero(data.codes == code) for code in range(len(set(data.groups)))]
    pull = np.column_stack([rows[:, at].sum(axis=1) for at in subsets])
    weight = np.array([data.weights[at].mean() for at in subsets])
    left = data.y - candidate.fitted
    missed = np.array([np.average(left[at], weights=data.weights[at]) for at in subsets])
    return np.asarray(float(weight @ missed**2) / df * (pull / weight) @ pull.T)


def held_out_rows(data: FitData, scheme: Scheme, candidate: Candidate) -> list[dict[str, Any]]:
    """Measured and predicted log loss of every run, predicted without its fold, with a 95 % prediction interval.

    For least squares the interval is the t interval of the fit without the fold. For the others it is the prediction
    ± t · the held-out root mean squared error of the other folds.

    Returns:
        [{run_id, y, prediction, low, high}] by run; NaN where not estimable.
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
            "prediction": float(candidate.predictions[i]),
            "low": float(candidate.predictions[i] - half[i]),
            "high": float(candidate.predictions[i] + half[i]),
        }
        for i, record in enumerate(data.records)
    ]


def _t_half_widths(data: FitData, split: Split, candidate: Candidate) -> np.ndarray | None:
    """Half widths of least squares' 95 % prediction intervals, [k]; None under sign constraints or too few runs."""
    from scipy.stats import t as student

    estimator, codes = candidate.estimator, data.codes[split.train]
    inside = np.unique(codes, return_inverse=True)[1].reshape(-1)
    df = int(inside.max()) + 1 - len(candidate.coefficients)
    if not isinstance(estimator, Smoother) or df < 1:
        return None
    maps = estimator.maps(split.train, [0])
    y, w = data.y[split.train], data.once[split.train]
    missed = y - maps.prediction_matrices(estimator.x[split.train])[0] @ y
    variance = float(w @ missed**2) / w.sum() * (inside.max() + 1) / df
    hats = np.array([np.bincount(inside, row) for row in maps.prediction_matrices(estimator.x[split.test])[0]])
    weight = np.bincount(inside, data.weights[split.train]) / np.bincount(inside)
    spread = variance * (1 / data.weights[split.test] + (hats**2 / weight).sum(axis=1))
    return np.asarray(student.ppf(0.975, df) * np.sqrt(spread))
