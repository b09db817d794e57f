"""Nested cross-validation: an estimator's held-out predictions, its penalties chosen anew inside every training set.

A held-out number is over folds of subsets, single runs, or sources: which runs it trains on and which it tests on.
`Predictor` prepares all that does not depend on y, so that a permutation test pays for matrix products only.

The test asks of the whole selection whether the rule is better than the mean, and ends as soon as it is clear. Losses
are shuffled over the subsets (repeats of a subset stay together, so only subsets with equally many runs change places),
every candidate is fitted and held out again with its penalties chosen anew, and the statistic is the best held-out R²
among them. Trials end at the tenth that is as good as the real one, or at 999 (Besag & Clifford 1991): p = 10 / trials,
or (exceedances + 1) / 1,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from im_lightning._utils.progress import progress
from im_lightning.rule.estimators.base import Estimator
from im_lightning.rule.estimators.linear import Maps, Smoother

FOLDS = 10
HELD_OUT_SHARE = 0.5  # a source is held out in runs where it is at least half (method.md)
FEWEST_TESTS = 5
"""Runs of which a source is at least half, from which a test on it says something."""
_LARGE = 1 << 20
"""Numbers in a split's prediction matrices from which none is made: of thousands of runs they would fill the memory."""


class Split(NamedTuple):
    """Positions of the runs trained on and tested on, int64."""

    train: np.ndarray
    test: np.ndarray


def group_codes(groups: Sequence[str]) -> np.ndarray:
    """Group of each run as int64 [n], numbered by name."""
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].reshape(-1)


def grouped_folds(groups: Sequence[str], folds: int = FOLDS) -> np.ndarray:
    """Fold of each run, int64 [n]; runs on one subset are in one fold, since repeats leak.

    Always the same for the same groups, whatever the order of the runs: the groups are shuffled by a fixed seed, then
    dealt to the fold with the fewest runs, large groups first.
    """
    codes = group_codes(groups)
    sizes = np.bincount(codes)
    order = np.random.default_rng(0).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    counts = np.zeros(min(folds, len(sizes)), dtype=np.int64)
    fold_of = np.empty(len(sizes), dtype=np.int64)
    for group in order:
        fold_of[group] = int(np.argmin(counts))
        counts[fold_of[group]] += sizes[group]
    return fold_of[codes]


def fold_splits(folds: np.ndarray) -> list[Split]:
    """One split per fold; none where there is only one fold."""
    everyone = np.arange(len(folds))
    names = np.unique(folds)
    return [Split(everyone[folds != f], everyone[folds == f]) for f in names] if len(names) > 1 else []


def fewest_training(regressors: int) -> int:
    """Runs without a source from which a rule of so many regressors can be fitted to be tested on it."""
    return regressors + 3


def source_split(shares: np.ndarray) -> Split:
    """Train on runs without a source, test on runs where its share [n] is at least half."""
    return Split(np.flatnonzero(shares <= 0), np.flatnonzero(shares >= HELD_OUT_SHARE))


def predictions(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Log loss of rows x [k, p], float64 […, k, B], by coefficients […, p + 1, B], the intercept first ([…, p + 2, B]
    with an offset, which is last)."""
    p = x.shape[1]
    index = coefficients[..., :1, :] + x @ coefficients[..., 1 : p + 1, :]
    if coefficients.shape[-2] == p + 1:
        return index
    with np.errstate(invalid="ignore"):  # a fit that is not determined predicts NaN
        return np.asarray(np.logaddexp(index, np.log(coefficients[..., p + 1 :, :])))


class Score(NamedTuple):
    """How well held-out predictions did."""

    r2: float | None  # 1 − Σ(y − ŷ)² / Σ(y − ȳ)², ȳ the mean of the training runs; None where a prediction is missing
    rmse: float | None  # root mean squared error, in log nats per token; None likewise
    rmse_se: float | None  # its standard error over subsets
    spearman: float | None  # rank correlation of predictions and y; None under three runs or where either is constant


class Predictor:
    """Nested held-out predictions of one estimator over fixed splits.

    `folds`, int [n], are those of the runs for the choice of the penalty inside each training set.
    """

    def __init__(self, estimator: Estimator, splits: Sequence[Split], folds: np.ndarray) -> None:
        self.estimator, self.splits, self.folds = estimator, list(splits), folds
        self.weights = estimator.weights
        count = len(estimator.settings)
        self._inner = [_inner_splits(s.train, folds) if count > 1 else [] for s in self.splits]
        self._trained: dict[bytes, list[Split]] = {}  # splits by what they train on
        for split, inner in zip(self.splits, self._inner, strict=True):
            for one in (split, *inner):
                self._trained.setdefault(one.train.tobytes(), []).append(one)
        self._matrices: dict[tuple[bytes, bytes], np.ndarray] = {}
        self._maps: dict[bytes, Maps] = {}
        if isinstance(estimator, Smoother):
            self._prepare(estimator)

    def _prepare(self, estimator: Smoother) -> None:
        for key, splits in self._trained.items():
            maps = estimator.maps(splits[0].train)
            for one in splits:
                numbers = len(estimator.settings) * len(one.test) * len(one.train)
                if numbers > _LARGE and len(one.test) > estimator.x.shape[1]:
                    self._maps[key] = maps
                else:
                    self._matrices[key, one.test.tobytes()] = maps.prediction_matrices(estimator.x[one.test])

    def predict(self, y: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of B responses y [n, B] per split the predictions, float64 [k, B], and the settings chosen, int64 [B]."""
        slopes = self._slopes(y)
        out, chosen = [], []
        for split, inner in zip(self.splits, self._inner, strict=True):
            best = self._choose(inner, y, slopes)
            every = self._predictions(split, y, slopes)
            out.append(np.take_along_axis(every, best[None, None, :], axis=0)[0])
            chosen.append(best)
        return out, chosen

    def _choose(self, inner: list[Split], y: np.ndarray, slopes: dict[bytes, np.ndarray]) -> np.ndarray:
        """The setting of least held-out error for every response, int64 [B]; of equal ones the simplest."""
        if not inner:
            return np.zeros(y.shape[1], dtype=np.int64)
        errors = 0.0
        for one in inner:
            missed = self._predictions(one, y, slopes) - y[one.test]
            errors = errors + np.einsum("lkb,k->lb", missed**2, self.weights[one.test])
        return np.asarray(np.argmin(errors, axis=0))

    def _predictions(self, split: Split, y: np.ndarray, slopes: dict[bytes, np.ndarray]) -> np.ndarray:
        """float64 [L, k, B]."""
        key = split.train.tobytes()
        if isinstance(self.estimator, Smoother):
            inside, matrices = y[split.train], self._matrices.get((key, split.test.tobytes()))
            if matrices is not None:
                return np.asarray(matrices @ inside)
            maps = self._maps[key]
            away = self.estimator.x[split.test] - maps.centre
            return np.asarray(maps.weight @ inside + away @ (maps.slopes @ inside))
        return predictions(slopes[key], self.estimator.x[split.test])

    def _slopes(self, y: np.ndarray) -> dict[bytes, np.ndarray]:
        if isinstance(self.estimator, Smoother) or not self._trained:
            return {}
        solved = self.estimator.solve([splits[0].train for splits in self._trained.values()], y)
        return dict(zip(self._trained, solved, strict=True))


def choose_setting(estimator: Estimator, y: np.ndarray, folds: np.ndarray) -> int:
    """The setting for a fit of all runs: least held-out error over the folds."""
    if len(estimator.settings) == 1:
        return 0
    everyone = np.arange(len(y))
    predictor = Predictor(estimator, [Split(everyone, everyone)], folds)
    return int(predictor.predict(y[:, None])[1][0][0])


def fixed_predictions(
    estimator: Estimator, splits: Sequence[Split], y: np.ndarray, settings: Sequence[int]
) -> list[np.ndarray]:
    """Held-out predictions per split [k] under a setting given for each."""
    out: list[np.ndarray] = [np.empty(0)] * len(splits)
    for setting in set(settings):
        places = [i for i, s in enumerate(settings) if s == setting]
        if isinstance(estimator, Smoother):
            for i in places:
                maps: Maps = estimator.maps(splits[i].train, [setting])
                out[i] = maps.prediction_matrices(estimator.x[splits[i].test])[0] @ y[splits[i].train]
        else:
            fits = estimator.solve([splits[i].train for i in places], y[:, None], only=setting)[:, 0]
            for i, b in zip(places, fits, strict=True):
                out[i] = predictions(b, estimator.x[splits[i].test])[:, 0]
    return out


def mean_predictions(splits: Sequence[Split], y: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """The baseline: the (weighted) mean of the training runs, per split [k] (or [k, B] for y [n, B])."""
    out = []
    for split in splits:
        mean = weights[split.train] @ y[split.train] / weights[split.train].sum()
        out.append(np.broadcast_to(mean, (len(split.test), *y.shape[1:])))
    return out


def score(
    splits: Sequence[Split], predictions: Sequence[np.ndarray], y: np.ndarray, weights: np.ndarray, codes: np.ndarray
) -> Score:
    """Score of held-out predictions, [k] per split; the standard error is over subsets (`codes`, int64 [n])."""
    if not splits:
        return Score(None, None, None, None)
    test = np.concatenate([s.test for s in splits])
    predicted = np.concatenate(list(predictions))
    rank = rank_correlation(predicted, y[test])
    if not np.isfinite(predicted).all():
        return Score(None, None, None, None)
    w = weights[test] / weights[test].sum()
    errors = (y[test] - predicted) ** 2
    baseline = (y[test] - np.concatenate(mean_predictions(splits, y, weights))) ** 2
    mse, total = float(w @ errors), float(w @ baseline)
    rmse = float(np.sqrt(mse))
    se = clustered_se(errors, w, codes[test])
    half = se / (2 * rmse) if se is not None and rmse > 0 else None
    return Score(1.0 - mse / total if total > 0 else None, rmse, half, rank)


def clustered_se(values: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> float | None:
    """Standard error of a weighted mean of values [n] (weights sum to 1) whose subsets (`codes`) are independent; None
    under two subsets."""
    off = weights * (values - weights @ values)
    sums = np.bincount(np.unique(codes, return_inverse=True)[1].reshape(-1), off)
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum())) if len(sums) > 1 else None


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation; None under three values or where either is constant or missing."""
    from scipy.stats import rankdata

    if len(a) < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    ranks = rankdata(a), rankdata(b)
    if min(r.std() for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _inner_splits(train: np.ndarray, folds: np.ndarray) -> list[Split]:
    return [Split(train[split.train], train[split.test]) for split in fold_splits(folds[train])]


MOST = 999
ENOUGH = 10
_FIRST, _BATCH = 20, 120


def permutation_test(
    predictors: Sequence[Predictor],
    splits: Sequence[Split],
    y: np.ndarray,
    weights: np.ndarray,
    codes: np.ndarray,
    most: int = MOST,
    enough: int = ENOUGH,
) -> dict[str, Any]:
    """The sequential permutation p of the best held-out R² of the candidates, whose `predictors` are all over `splits`.

    y and weights are float64 [n], `codes` int64 [n] the subset of each run. The test ends after `most` trials, or when
    `enough` were as good as the real one.

    Returns:
        {"p", "permutations", "exceedances", "statistic"}; p and statistic None where nothing is estimable.
    """
    observed = float(best_r2(predictors, splits, y[:, None], weights)[0])
    if not np.isfinite(observed):
        return {"p": None, "permutations": 0, "exceedances": 0, "statistic": None}
    rng, blocks = np.random.default_rng(0), _blocks(codes)
    done = exceedances = 0
    with progress("shuffled losses", most, "trials") as bar:
        while done < most:
            count = min(_FIRST if done == 0 else _BATCH, most - done)
            shuffled = np.column_stack([_shuffle(y, blocks, rng) for _ in range(count)])
            as_good = best_r2(predictors, splits, shuffled, weights) >= observed - 1e-12
            if exceedances + int(as_good.sum()) >= enough:
                done += int(np.flatnonzero(np.cumsum(as_good) == enough - exceedances)[0]) + 1
                return {"p": enough / done, "permutations": done, "exceedances": enough, "statistic": observed}
            exceedances += int(as_good.sum())
            done += count
            bar.advance(count)
    p = (exceedances + 1) / (done + 1)
    return {"p": p, "permutations": done, "exceedances": exceedances, "statistic": observed}


def best_r2(predictors: Sequence[Predictor], splits: Sequence[Split], y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Best held-out R² among the candidates for each response [n, B]: float64 [B]; −inf where none is estimable."""
    test = np.concatenate([s.test for s in splits]) if splits else np.empty(0, dtype=np.int64)
    best = np.full(y.shape[1], -np.inf)
    if not len(test):
        return best
    w = weights[test]
    baseline = w @ (y[test] - np.concatenate(mean_predictions(splits, y, weights))) ** 2
    for predictor in predictors:
        missed = w @ (y[test] - np.concatenate(predictor.predict(y)[0])) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = 1.0 - missed / baseline
        best = np.fmax(best, np.where(np.isfinite(r2), r2, -np.inf))
    return best


def shuffles(codes: np.ndarray) -> int:
    """In how many ways the test can put the losses of these subsets (int64 [n], one per run) in order."""
    return math.prod(math.factorial(len(block)) for block in _blocks(codes))


def _blocks(codes: np.ndarray) -> list[np.ndarray]:
    """Per number of runs on a subset, the positions of the subsets' runs: int64 [subsets, runs]."""
    groups: dict[int, list[np.ndarray]] = {}
    for code in np.unique(codes):
        inside = np.flatnonzero(codes == code)
        groups.setdefault(len(inside), []).append(inside)
    return [np.array(members) for members in groups.values()]


def _shuffle(y: np.ndarray, blocks: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    out = y.copy()
    for block in blocks:
        out[block] = y[block[rng.permutation(len(block))]]
    return out
