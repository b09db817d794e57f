"""Several targets: how they correlate over the runs, and whether weights that lower one make another worse.

The weights of a rule move the mean regressors of what is trained on by δ = −r·Cov(x, ŷ)/sd(ŷ) from the runs' mean, with
ŷ the rule's index over the runs and r its reach. What that does to another target is δᵀβ, with β its own least-squares
fit on the same indicators, and on ŷ itself where the rule is not linear in them: an estimate with a t interval, whose
ratio does not depend on how far the weights go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from im_lightning._utils.files import plain
from im_lightning.ledger.run_table import FitData
from im_lightning.ledger.targets import terms_of
from im_lightning.rule.validation.univariate import FEWEST, correlation, subset_means

_KEPT = ("spearman", "spearman_low", "spearman_high", "pearson", "pearson_low", "pearson_high")


def target_correlations(targets: Mapping[str, np.ndarray], groups: Sequence[str]) -> list[dict[str, Any]]:
    """How each two targets correlate over the different subsets, JSON-like.

    Args:
        targets: Target → logarithm of its loss or error rate in n runs, float64 [n]; NaN where a run lacks it.
        groups: [n] subset of each run; repeats are averaged first.

    Returns:
        Rows of `targets` (two), `subsets`, `spearman` and `pearson`, each with its 95 % interval, as in `univariate`;
        positive where both improve together. Pairs that fewer than 4 subsets have are left out.
    """
    rows = []
    for one, other in combinations(targets, 2):
        both = np.isfinite(targets[one]) & np.isfinite(targets[other])
        inside = [group for group, known in zip(groups, both, strict=True) if known]
        if len(set(inside)) < FEWEST:
            continue
        x, y = subset_means(targets[one][both][:, None], targets[other][both], inside)
        found = correlation(x[:, 0], y)
        rows.append(plain({"targets": [one, other], "subsets": len(x), **{name: found[name] for name in _KEPT}}))
    return rows


def guarded_targets(data: FitData, index: np.ndarray, reach: float) -> list[dict[str, Any]]:
    """What weights by a rule do to each loss and score that its target names; [] where it names one alone.

    Args:
        data: What the fit saw.
        index: float64 [n], the rule's prediction for each run on the scale on which it is linear.
        reach: How far the weights go, in sd of the index.

    Returns:
        Rows of `target`; `weight` in the sum; `subsets` behind the numbers; `change` of its log loss or log error rate
        with its 95 % interval `low`, `high`; `worse`, whether the interval lies above 0; or None and a `reason`.
    """
    terms = terms_of(data.evaluation)
    if len(terms) < 2:
        return []
    spread = float(index.std(ddof=1))
    still = not spread > 1e-12 * max(float(np.abs(index).max()), 1e-300)
    away = index - index.mean()
    x = np.column_stack([np.ones(len(index)), data.x])
    left = away - x @ np.linalg.lstsq(x, away, rcond=None)[0]
    x = data.x if still or np.abs(left).max() < 1e-6 * spread else np.column_stack([data.x, index])
    move = np.zeros(x.shape[1]) if still else -reach * away @ x / ((len(index) - 1) * spread)
    return [plain({"target": name, "weight": weight, **_moved(data, name, x, move)}) for name, weight in terms.items()]


def _moved(data: FitData, name: str, regressors: np.ndarray, move: np.ndarray) -> dict[str, Any]:
    from scipy.stats import t as student

    y = data.targets[name]
    known = np.isfinite(y)
    inside = [group for group, here in zip(data.groups, known, strict=True) if here]
    out: dict[str, Any] = {"subsets": len(set(inside)), **dict.fromkeys(("change", "low", "high", "worse"))}
    if not move.any():
        return out | {"reason": "the rule has no direction"}
    if len(set(inside)) < len(move) + 2:
        return out | {"reason": f"{len(set(inside))} subsets are too few for {len(move)} regressors"}
    w = data.weights[known]
    x, means = subset_means(regressors[known], y[known], inside, w)
    weights = subset_means(w[:, None], w, inside)[1]
    root = np.sqrt(weights)
    design, move = root[:, None] * np.column_stack([np.ones(len(x)), x]), np.r_[0.0, move]
    inverse, df = np.linalg.pinv(design), len(x) - int(np.linalg.matrix_rank(design))
    found = inverse @ (root * means)
    change, error = float(move @ found), float(np.linalg.norm(move @ inverse))
    if not df:
        return out | {"reason": "its runs do not determine a fit"}
    half = float(student.ppf(0.975, df)) * error * float(np.linalg.norm(root * means - design @ found)) / np.sqrt(df)
    low, high = change - half, change + half
    return out | {"change": change, "low": low, "high": high, "worse": low > 0}
