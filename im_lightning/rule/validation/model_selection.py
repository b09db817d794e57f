"""The rules a refit considers, each with its numbers in sample and held out.

Which rule is recommended, and in which words the fit says whether it is better than the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from im_lightning.indicators.transforms import OF_SOURCE, Transform, hat_transforms, share_transforms
from im_lightning.ledger.run_table import FitData
from im_lightning.rule.estimators.base import Estimator
from im_lightning.rule.estimators.best_subset import MOST, BestSubset
from im_lightning.rule.estimators.elastic_net import constrained, elastic_net, sign_vector
from im_lightning.rule.estimators.linear import PENALTIES, additive, least_squares, partial_pooling, ridge, with_shares
from im_lightning.rule.estimators.offset import METHODS as OFFSET_METHODS
from im_lightning.rule.estimators.offset import Offset
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.validation.cross_validation import (
    FEWEST_TESTS,
    Predictor,
    Split,
    choose_setting,
    clustered_se,
    fewest_training,
    fixed_predictions,
    fold_splits,
    grouped_folds,
    mean_predictions,
    permutation_test,
    predictions,
    rank_correlation,
    score,
    shuffles,
    source_split,
)

POOLING = "partial-pooling"
SHARED = ("ridge+shares", "additive+shares", POOLING)
"""Shares of sources beside the indicators, in the last with slopes per source."""
CHOICE = ("ols", "ridge", "elastic-net", "ridge+shares", "additive", "additive+shares", POOLING, *OFFSET_METHODS)
"""The rules among which the recommended one is chosen, the simplest first."""
METHODS = (*CHOICE, "best-subset", "auto")


@dataclass
class Scheme:
    """How the runs are held out."""

    codes: np.ndarray  # int64 [n], subset of each run
    folds: np.ndarray  # int64 [n], fold of each run
    grouped: list[Split]  # the folds as splits: what every comparison is made on
    alone: list[Split]  # each run alone
    subsets: list[Split]  # each subset alone
    sources: dict[str, Split]  # source → split; not estimable where `estimable` says so
    fewest: int  # runs without a source for a fit that is tested on it

    @classmethod
    def of(cls, data: FitData) -> Scheme:
        """The scheme of the runs of a fit."""
        codes, folds = data.codes, grouped_folds(data.groups)
        sources = {name: source_split(shares) for name, shares in data.shares.items()} if len(data.shares) > 1 else {}
        alone = fold_splits(np.arange(len(codes)))
        subsets = alone if len(set(data.groups)) == len(codes) else fold_splits(codes)
        return cls(codes, folds, fold_splits(folds), alone, subsets, sources, fewest_training(len(data.names)))

    def estimable(self, split: Split) -> bool:
        """Whether there are runs enough to train without a source and to test on it."""
        return len(split.train) >= self.fewest and len(split.test) >= FEWEST_TESTS


@dataclass
class Candidate:
    """One rule under consideration."""

    method: str
    names: list[str]  # [p] regressors
    coefficients: np.ndarray  # float64 [p + 1], the intercept first; of a law with an offset [p + 2], the offset last
    fitted: np.ndarray  # float64 [n], in sample
    degrees: float  # effective number of parameters, the intercept among them
    estimator: Estimator
    fixed: Estimator  # for refits under the setting, or on the regressors of the subset, as chosen
    setting: int = 0  # of the estimator
    row: dict[str, Any] = field(default_factory=dict)  # its line of `metrics_.candidates`
    # float64 [n], held out by grouped folds; NaN where not estimable
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0))
    fold_settings: list[int] = field(default_factory=list)  # of the estimator, per grouped fold

    @property
    def offset(self) -> float:
        """Of the law, in nats per token; 0 without one."""
        return float(self.coefficients[len(self.names) + 1]) if len(self.coefficients) > len(self.names) + 1 else 0.0


class HeldOut(NamedTuple):
    """Held-out predictions of a candidate, one array per split of the scheme; of a source with its split."""

    grouped: list[np.ndarray]
    alone: list[np.ndarray]
    subsets: list[np.ndarray]
    sources: dict[str, tuple[Split, np.ndarray]]


def estimators_of(data: FitData, methods: Sequence[str], signs: Mapping[str, int] | None) -> list[Estimator]:
    """The estimators of these methods; additive and with shares where the runs allow it, these, the offset and
    the best subset (of at most 12) only without signs. Least squares counts every subset once: repeats of one share its
    noise, and counted as so many runs would make errors too small."""
    wanted = sign_vector(data.names, signs)
    bound = bool(wanted.any())
    out: list[Estimator] = []
    for method in methods:
        if method == "ols":
            free = least_squares(data.x, data.once)
            out.append(constrained("ols", data.x, data.once, wanted, free.penalties) if bound else free)
        elif method == "ridge":
            shrunk = ridge(data.x, data.weights)
            out.append(constrained("ridge", data.x, data.weights, wanted, PENALTIES) if bound else shrunk)
        elif method == "elastic-net":
            out.append(elastic_net(data.x, data.weights, wanted))
        elif method == "additive" and data.hats and not bound:
            out.append(additive(data.hats, data.weights))
        elif method == POOLING:
            if not data.no_pooling and not bound:
                parts = [data.by_source[source] for source in data.contrasts]
                out.append(partial_pooling(parts, np.column_stack(list(data.contrasts.values())), data.weights))
        elif method in SHARED and data.contrasts and not bound and (method == "ridge+shares" or data.hats):
            base = ridge(data.x, data.weights) if method == "ridge+shares" else additive(data.hats, data.weights)
            out.append(with_shares(base, np.column_stack(list(data.contrasts.values()))))
        elif method in OFFSET_METHODS and not bound:
            out.append(Offset(method, data.x, data.weights))
        elif method == "best-subset" and not bound and len(data.names) <= MOST:
            out.append(BestSubset(data.x, data.once))
    return out


def regressor_names(data: FitData, estimator: Estimator) -> list[str]:
    """Names of an estimator's regressors: the indicators, or their hat functions; and shares of sources."""
    return list(regressor_transforms(data, estimator.method))


def regressor_transforms(data: FitData, method: str) -> dict[str, Transform]:
    """Regressor → φ of a method that takes all of them."""
    out = dict(data.transforms)
    if method.startswith("additive"):
        out = {}
        for indicator, (knots, _means) in data.hats.items():
            out |= hat_transforms(indicator, data.transforms[indicator], knots)
    if method == POOLING:
        out = {
            f"{indicator}{OF_SOURCE}{source}": replace(transform, source=source)
            for source in data.contrasts
            for indicator, transform in data.transforms.items()
        }
    return out | share_transforms(list(data.contrasts)[:-1]) if method in SHARED else out


def evaluate(data: FitData, scheme: Scheme, estimator: Estimator) -> Candidate:
    """Fits one estimator on all runs and in every held-out scheme."""
    y, everyone, fixed = data.y, np.arange(len(data.y)), estimator
    setting = choose_setting(estimator, y, scheme.folds)
    coefficients = estimator.solve([everyone], y[:, None], final=True, only=setting)[0, 0, :, 0]
    fitted = predictions(coefficients[:, None], estimator.x)[:, 0]
    degrees = estimator.degrees(setting, coefficients, y)
    names, described, least = regressor_names(data, estimator), dict[str, Any](estimator.describe(setting)), 0
    if isinstance(estimator, BestSubset):
        kept = np.flatnonzero(coefficients[1:])
        names, coefficients = [names[j] for j in kept], coefficients[[0, *(kept + 1)]]
        fixed, described, least = least_squares(data.x[:, kept], data.once), {"kept": names}, len(kept) + 2
    parts, chosen = Predictor(estimator, scheme.grouped, scheme.folds).predict(y[:, None])
    of_fold = {int(scheme.folds[s.test[0]]): int(c[0]) for s, c in zip(scheme.grouped, chosen, strict=True)}

    def held_out(splits: list[Split]) -> list[np.ndarray]:
        settings = [of_fold.get(int(scheme.folds[s.test[0]]), setting) for s in splits]
        return fixed_predictions(estimator, splits, y, settings)

    alone = held_out(scheme.alone)
    subsets = alone if scheme.subsets is scheme.alone else held_out(scheme.subsets)
    sources = {
        source: (split, Predictor(estimator, [split], scheme.folds).predict(y[:, None])[0][0][:, 0])
        for source, split in scheme.sources.items()
        if scheme.estimable(split) and len(split.train) > least
    }
    fit = Candidate(estimator.method, names, coefficients, fitted, degrees, estimator, fixed, setting)
    fit.fold_settings = [int(one[0]) for one in chosen]
    return _scored(data, scheme, fit, HeldOut([part[:, 0] for part in parts], alone, subsets, sources), described)


def evaluate_mean(data: FitData, scheme: Scheme) -> Candidate:
    """The mean of the runs: what every rule has to beat."""
    y, w = data.y, data.weights
    mean = float(w @ y / w.sum())
    parts, alone, subsets = (mean_predictions(s, y, w) for s in (scheme.grouped, scheme.alone, scheme.subsets))
    nothing = least_squares(data.x[:, :0], w)
    fit = Candidate("mean", [], np.array([mean]), np.full(len(y), mean), 1.0, nothing, nothing)
    scored = _scored(data, scheme, fit, HeldOut(parts, alone, subsets, {}), {})
    for name in ("spearman", "leave_one_out_spearman", "grouped_spearman"):
        scored.row[name] = None  # the order of held-out means says nothing
    return scored


def _scored(data: FitData, scheme: Scheme, fit: Candidate, held: HeldOut, setting: Mapping[str, Any]) -> Candidate:
    """The candidate with its row and its predictions; `setting` is told in the row."""
    y, w, codes = data.y, data.weights, scheme.codes
    rss, total = float(w @ (y - fit.fitted) ** 2), float(w @ (y - w @ y / w.sum()) ** 2)
    n = len(y)
    likelihood = -0.5 * n * (np.log(2 * np.pi * max(rss, 1e-300) / n) + 1) + 0.5 * float(np.log(w).sum())
    grouped = score(scheme.grouped, held.grouped, y, w, codes)
    one, subset = score(scheme.alone, held.alone, y, w, codes), score(scheme.subsets, held.subsets, y, w, codes)
    source_out: dict[str, Any] = {}
    for source, split in scheme.sources.items():
        found = held.sources.get(source)
        tested = None if found is None else score([found[0]], [found[1]], y, w, codes)
        numbers = (None, None) if tested is None else (tested.r2, tested.spearman)
        counts = {"runs": len(split.test), "trained_on": len(split.train)}
        source_out[source] = {"r2": numbers[0], "spearman": numbers[1], **counts}
    row = {
        "method": fit.method,
        "regressors": int(np.count_nonzero(fit.coefficients[1 : len(fit.names) + 1])),
        "degrees": fit.degrees,
        "r2": 1.0 - rss / total,
        "spearman": rank_correlation(fit.fitted, y),
        "aic": -2 * likelihood + 2 * fit.degrees,
        "bic": -2 * likelihood + np.log(n) * fit.degrees,
        "leave_one_out_r2": one.r2,
        "leave_one_out_spearman": one.spearman,
        "leave_subset_out_r2": subset.r2,
        "grouped_r2": grouped.r2,
        "grouped_rmse": grouped.rmse,
        "grouped_rmse_se": grouped.rmse_se,
        "grouped_spearman": grouped.spearman,
        "source_out": source_out,
        "recommended": False,
        "setting": dict(setting),
    }
    return replace(fit, row=row, predictions=_by_run(scheme.grouped, held.grouped, n))


def _by_run(splits: Sequence[Split], predictions: Sequence[np.ndarray], n: int) -> np.ndarray:
    out = np.full(n, np.nan)
    for split, predicted in zip(splits, predictions, strict=True):
        out[split.test] = predicted
    return out


LEVEL = 0.05
"""A rule is better than the mean where the permutation p of the whole selection is below this, and its own held-out R²
above 0."""
FEWEST = 20
"""Trials of the test from which its p, at least 1 / (trials + 1), can be below the level; and orders of the losses, of
which the trials meet the measured one in 1 of so many."""


def recommend(candidates: Sequence[Candidate], data: FitData, codes: np.ndarray) -> Candidate:
    """The simplest rule whose held-out error is within one standard error of the least.

    The standard error is that of the *difference* of squared held-out errors to the best candidate, over subsets:
    all candidates predict the same runs, so what the runs have in common cancels. Candidates that are not of `CHOICE`
    are passed over; `codes` int64 [n] is the subset of each run.
    """
    found = {c.method: c for c in candidates}
    rules = [found[method] for method in CHOICE if method in found]
    w = data.weights / data.weights.sum()
    errors = {c.method: (data.y - c.predictions) ** 2 for c in rules if np.isfinite(c.predictions).all()}
    if not errors:
        return rules[0]
    best = min(errors, key=lambda method: float(w @ errors[method]))
    for candidate in rules:
        if candidate.method not in errors:
            continue
        gap = errors[candidate.method] - errors[best]
        if float(w @ gap) <= (clustered_se(gap, w, codes) or 0.0) + 1e-15:
            return candidate
    return found[best]


def against_mean(candidates: Sequence[Candidate], data: FitData, scheme: Scheme, most: int) -> dict[str, Any] | None:
    """`permutation_test` of the selection among the candidates, in `most` trials; None where the runs allow none.

    The reason is then added to the notes of `data`.
    """
    ways = shuffles(scheme.codes)
    if ways < FEWEST:
        reason = f"the losses can be shuffled in {ways} way{'s' if ways != 1 else ''} only (repeats of a subset stay "
        reason += f"together), and it takes {FEWEST}"
    else:
        predictors = [Predictor(one.estimator, scheme.grouped, scheme.folds) for one in candidates]
        found = permutation_test(predictors, scheme.grouped, data.y, data.weights, scheme.codes, most)
        if found["p"] is not None:
            return found
        reason = "the held-out R² cannot be estimated, since the other folds do not determine the fit"
    data.notes.append(f"Not tested against the mean: {reason}. Make more designed runs, of other subsets.")
    return None


def verdict(metrics: RuleMetrics, method: str) -> str:
    """One sentence: better than the mean, not better, or not known."""
    tested = metrics.permutation or {}
    p, count = tested.get("p"), tested.get("permutations", 0)
    r2 = metrics.grouped_r2
    held = "not estimable" if r2 is None else f"{r2:.2f}"
    if metrics.beats_mean is None:
        return (
            f"whether this rule ({method}) is better than the mean was NOT TESTED (held-out R² {held}); im-lightning "
            "refit tests it by permutations, where the runs are enough"
        )
    trials = (
        f"held-out R² {held}; with the losses shuffled over the subsets, {tested['exceedances']} of {count} trials of "
        "the whole selection did as well"
    )
    if metrics.beats_mean:
        return f"better than the mean: {trials} (p {p:.3g})"
    if p is not None and p < LEVEL:
        return (
            f"NO BETTER THAN THE MEAN: {trials} (p {p:.3g}), so the losses do correlate with the indicators, but this "
            f"rule ({method}) misses runs it has not seen by no less than their mean does"
        )
    return f"NO BETTER THAN THE MEAN: {trials} (p {p:.2g}; below {LEVEL} is wanted)"
