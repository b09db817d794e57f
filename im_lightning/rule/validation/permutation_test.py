"""Is the rule better than the mean? A permutation test over the whole selection, ended as soon as it is clear.

Losses are shuffled over the subsets (repeats of a subset stay together, so only subsets with equally many runs change
places), every candidate is fitted and held out again with its penalties chosen anew, and the statistic is the best
held-out R² among them. Trials end at the tenth that is as good as the real one, or at 999 (Besag & Clifford 1991):
p = 10 / trials, or (exceedances + 1) / 1,000.

Corrected p values where several questions are asked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning._utils.progress import progress
from im_lightning.rule.validation.cross_validation import Predictor, Split, mean_predictions

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
    seed: int = 0,
) -> dict[str, Any]:
    """The sequential permutation p of the best held-out R² of the candidates, whose `predictors` are all over `splits`.

    y and weights are float64 [n], `codes` int64 [n] the subset of each run. The test ends after `most` trials, or when
    `enough` were as good as the real one; `seed` decides the shuffles.

    Returns:
        {"p", "permutations", "exceedances", "statistic"}; p and statistic None where nothing is estimable.
    """
    observed = float(best_r2(predictors, splits, y[:, None], weights)[0])
    if not np.isfinite(observed):
        return {"p": None, "permutations": 0, "exceedances": 0, "statistic": None}
    rng, blocks = np.random.default_rng(seed), _blocks(codes)
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
