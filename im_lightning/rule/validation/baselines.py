"""Baseline models: the mean, source shares alone, lengths alone; and a rule's gain over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.base import Estimator
from im_lightning.rule.estimators.linear import additive, least_squares, ridge
from im_lightning.rule.validation.cross_validation import (
    Predictor,
    Split,
    choose_setting,
    fixed_predictions,
    grouped_folds,
    mean_predictions,
    score,
)
from im_lightning.rule.validation.diagnostics import MAX_REACH, fitted_radius
from im_lightning.rule.validation.model_selection import Candidate, Scheme

GROUPS = 40
"""Parts into which the subsets are dealt; each is left out once for the interval of a gain."""
_NUMBERS = ("grouped_r2", "grouped_rmse", "grouped_spearman", "gain", "gain_low", "gain_high")


def baselines(data: FitData, scheme: Scheme, chosen: Candidate) -> dict[str, Any]:
    """Held-out scores of the baselines on the rule's own folds, and the rule's gain in R² over each.

    The gain is R²(rule) − R²(baseline), held out; over the mean where the baseline is worse than that. Its 95 %
    interval is from a jackknife: every subset (of more than 40 a fortieth of them) is left out in turn, and rule and
    baseline are fitted and held out again without it, at the penalties of each fold.

    Returns:
        "mean", "length", "sources" → {grouped_r2, grouped_rmse, grouped_spearman, gain, gain_low, gain_high,
        regressors}, of lengths and sources with the `method` of the better fit; {"reason"} beside Nones where a
        baseline cannot be fitted. "sources" has its `fit`, for weights by source alone.
    """
    splits = _Jackknife(data, scheme)
    mean = [np.asarray(p) for p in mean_predictions(scheme.grouped, data.y, data.weights)]
    errors_of_mean = splits.errors_of_mean()
    rule = splits.errors(chosen.estimator, chosen.fold_settings)
    out = {"mean": _scored(data, scheme, mean, errors_of_mean, errors_of_mean, rule) | {"regressors": []}}
    out["mean"]["grouped_spearman"] = None  # the order of held-out means says nothing
    for name, (estimators, regressors, reason) in _estimators(data).items():
        found: dict[str, Any] = dict.fromkeys(_NUMBERS) | {"regressors": regressors, "reason": reason}
        for estimator in estimators:
            parts, settings = Predictor(estimator, scheme.grouped, scheme.folds).predict(data.y[:, None])
            if not all(np.isfinite(part).all() for part in parts):
                continue
            errors = splits.errors(estimator, [int(s[0]) for s in settings])
            one = _scored(data, scheme, [part[:, 0] for part in parts], errors, errors_of_mean, rule)
            if found["reason"] != "" or (one["grouped_r2"] is not None and one["grouped_r2"] > found["grouped_r2"]):
                found = one | {"regressors": regressors, "method": estimator.method, "reason": ""}
        if found["reason"] == "":
            del found["reason"]
            if name == "sources":
                found["fit"] = _fit_of_sources(data, scheme, estimators[0])
        out[name] = found
    return out


def _estimators(data: FitData) -> dict[str, tuple[list[Estimator], list[str], str]]:
    """The baselines' estimators, of which the better counts; source shares by ridge, since sources may be as many as
    runs, lengths by a line and by a curve in each."""
    out: dict[str, tuple[list[Estimator], list[str], str]] = {}
    names, lengths, hats = data.lengths
    if not names:
        out["length"] = [], [], "the runs record no length, or all the same"
    else:
        curves = [additive(hats, data.weights)] if hats else []
        out["length"] = [least_squares(lengths, data.once), *curves], names, "not estimable"
    varying = {name: shares for name, shares in data.shares.items() if shares.std() > 1e-12}
    if not data.shares:
        out["sources"] = [], [], "some run does not record its source shares"
    elif not varying:
        out["sources"] = [], [], "the runs do not differ in their sources"
    else:
        shares = ridge(np.column_stack(list(varying.values())), data.weights)
        out["sources"] = [shares], list(varying), "not estimable"
    return out


def _fit_of_sources(data: FitData, scheme: Scheme, estimator: Estimator) -> dict[str, Any]:
    """Coefficients on shares, the intercept first, and the region of the runs, for weights by source alone."""
    setting = choose_setting(estimator, data.y, scheme.folds)
    solved = estimator.solve([np.arange(len(data.y))], data.y[:, None], final=True, only=setting)[0, 0, :, 0]
    radius, _ = fitted_radius(estimator.x, data.groups)
    return {
        "coefficients": solved.tolist(),
        "mean": estimator.x.mean(axis=0).tolist(),
        "covariance": np.atleast_2d(np.cov(estimator.x, rowvar=False)).tolist(),
        "radius": radius,
        "reach": min(radius, MAX_REACH),
        "lowest": float((solved[0] + estimator.x @ solved[1:]).min()),
    }


class _Jackknife:
    """The folds of the scheme on all runs, and again without each of the groups of subsets."""

    def __init__(self, data: FitData, scheme: Scheme) -> None:
        self.data = data
        groups = grouped_folds(data.groups, GROUPS)
        self.without = [np.arange(0)] + [np.flatnonzero(groups == g) for g in np.unique(groups)]
        self.folds = len(scheme.grouped)
        self.splits = [
            Split(*(np.setdiff1d(part, left, assume_unique=True) for part in split))
            for left in self.without
            for split in scheme.grouped
        ]

    def errors_of_mean(self) -> np.ndarray:
        """Summed squared errors of the mean: float64 [1 + groups], all runs first."""
        return self._sum(mean_predictions(self.splits, self.data.y, self.data.weights))

    def errors(self, estimator: Estimator, settings: Sequence[int]) -> np.ndarray:
        """Of an estimator under the setting of each fold, likewise; NaN where it is not estimable."""
        usable = [split if len(split.train) else Split(split.test, split.test) for split in self.splits]
        return self._sum(fixed_predictions(estimator, usable, self.data.y, list(settings) * len(self.without)))

    def _sum(self, predicted: Sequence[np.ndarray]) -> np.ndarray:
        y, w = self.data.y, self.data.weights
        parts = [w[split.test] @ (y[split.test] - one) ** 2 for split, one in zip(self.splits, predicted, strict=True)]
        return np.asarray(parts).reshape(len(self.without), self.folds).sum(axis=1)


def _scored(
    data: FitData,
    scheme: Scheme,
    predicted: list[np.ndarray],
    errors: np.ndarray,
    of_mean: np.ndarray,
    of_rule: np.ndarray,
) -> dict[str, Any]:

    found = score(scheme.grouped, predicted, data.y, data.weights, scheme.codes)
    out: dict[str, Any] = {"grouped_r2": found.r2, "grouped_rmse": found.rmse, "grouped_spearman": found.spearman}
    if found.r2 is None or not scheme.grouped or not np.isfinite(of_rule[0]):
        return out | {"gain": None, "gain_low": None, "gain_high": None}
    shares = np.stack([of_rule, np.minimum(errors, of_mean)]) / of_mean  # 1 − R² of the rule and of what it has to beat
    low, high = _difference(shares)
    return out | {"gain": float(shares[1, 0] - shares[0, 0]), "gain_low": low, "gain_high": high}


def _difference(shares: np.ndarray) -> tuple[float | None, float | None]:
    """95 % limits of shares[1, 0] − shares[0, 0] of positive numbers [2, 1 + groups], the jackknife's behind the first.

    Each has the limits that the t interval of its logarithm gives, since 1 − R² is skewed; those of the difference are
    put together from both and their correlation (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    from scipy.stats import t as student

    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(shares)
    left = logs[:, 1:][:, np.isfinite(logs[:, 1:]).all(axis=0)]
    count = left.shape[1]
    if count < 3 or not np.isfinite(logs[:, 0]).all():
        return None, None
    left = left - left.mean(axis=1, keepdims=True)
    squares = (left**2).sum(axis=1)
    related = float(left[0] @ left[1] / np.sqrt(max(squares.prod(), 1e-300)))
    half = student.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * squares)
    (rule, other), up, down = shares[:, 0], shares[:, 0] * np.expm1(half), shares[:, 0] * -np.expm1(-half)

    def away(of_other: float, of_rule: float) -> float:
        return float(np.sqrt(max(of_other**2 + of_rule**2 - 2 * related * of_other * of_rule, 0.0)))

    return float(other - rule - away(down[1], up[0])), float(other - rule + away(up[1], down[0]))
