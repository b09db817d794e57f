"""What a rule has to beat besides chance: the mean, source shares alone, length alone; and by how much it does."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.base import Estimator
from im_lightning.rule.estimators.linear import least_squares, ridge
from im_lightning.rule.validation.cross_validation import Predictor, group_codes, mean_predictions, score
from im_lightning.rule.validation.model_selection import Candidate, Scheme

DRAWS = 2000


def baselines(data: FitData, scheme: Scheme, chosen: Candidate, draws: int = DRAWS) -> dict[str, Any]:
    """Held-out scores of the baselines on the rule's own folds, and the rule's gain in R² over each.

    The gain is R²(rule) − R²(baseline), held out; its 95 % interval resamples the subsets (2,000 draws) with their
    held-out errors, which are paired. It does not refit, so it leaves out what another set of runs would have changed
    in the rule itself.

    Returns:
        "mean", "length", "sources" → {grouped_r2, grouped_rmse, grouped_spearman, gain, gain_low, gain_high,
        regressors}; {"reason"} beside Nones where a baseline cannot be fitted.
    """
    y, w = data.y, data.weights
    base = [np.asarray(p) for p in mean_predictions(scheme.grouped, y, w)]
    out: dict[str, Any] = {"mean": _against(data, scheme, chosen, base, base, draws) | {"regressors": []}}
    for name, (estimator, regressors, reason) in _estimators(data).items():
        if estimator is None:
            numbers = ("grouped_r2", "grouped_rmse", "grouped_spearman", "gain", "gain_low", "gain_high")
            out[name] = dict.fromkeys(numbers) | {"regressors": [], "reason": reason}
            continue
        parts = Predictor(estimator, scheme.grouped, scheme.folds).predict(y[:, None])[0]
        predicted = [part[:, 0] for part in parts]
        out[name] = _against(data, scheme, chosen, predicted, base, draws) | {"regressors": regressors}
    return out


def _estimators(data: FitData) -> dict[str, tuple[Estimator | None, list[str], str]]:
    """The baselines' estimators; source shares by ridge, since sources may be as many as runs."""
    out: dict[str, tuple[Estimator | None, list[str], str]] = {}
    if data.length is None:
        out["length"] = None, [], "the runs record no length, or all the same"
    else:
        name, values = data.length
        out["length"] = least_squares(values[:, None], data.weights), [name], ""
    varying = {name: shares for name, shares in data.shares.items() if shares.std() > 1e-12}
    if not data.shares:
        out["sources"] = None, [], "some run does not record its source shares"
    elif not varying:
        out["sources"] = None, [], "the runs do not differ in their sources"
    else:
        out["sources"] = ridge(np.column_stack(list(varying.values())), data.weights), list(varying), ""
    return out


def _against(
    data: FitData, scheme: Scheme, chosen: Candidate, predicted: list[np.ndarray], base: list[np.ndarray], draws: int
) -> dict[str, Any]:
    found = score(scheme.grouped, predicted, data.y, data.weights, scheme.codes)
    out: dict[str, Any] = {"grouped_r2": found.r2, "grouped_rmse": found.rmse, "grouped_spearman": found.spearman}
    if predicted is base:
        out["grouped_spearman"] = None
    if found.r2 is None or not scheme.grouped or not np.isfinite(chosen.predictions).all():
        return out | {"gain": None, "gain_low": None, "gain_high": None}
    test = np.concatenate([s.test for s in scheme.grouped])
    y, w = data.y[test], data.weights[test]
    mine = w * (y - chosen.predictions[test]) ** 2
    other = w * (y - np.concatenate(predicted)) ** 2
    total = w * (y - np.concatenate(base)) ** 2
    codes = group_codes([str(c) for c in scheme.codes[test]])
    sums = np.column_stack([np.bincount(codes, v) for v in (mine, other, total)])
    gain = float((other.sum() - mine.sum()) / total.sum())
    picks = np.random.default_rng(1).integers(0, len(sums), (draws, len(sums)))
    drawn = sums[picks].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        gains = (drawn[:, 1] - drawn[:, 0]) / drawn[:, 2]
    low, high = np.nanquantile(gains, [0.025, 0.975])
    return out | {"gain": gain, "gain_low": float(low), "gain_high": float(high)}
