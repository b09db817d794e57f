"""Which runs a held-out number trains on and which it tests on: folds of subsets, single runs, sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FOLDS = 10
HELD_OUT_SHARE = 0.5  # a source is held out in runs where it is at least half (method.md)


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


def source_split(shares: np.ndarray) -> Split | None:
    """Train on runs without a source, test on runs where it is at least half; None where either is empty.

    Args:
        shares: float64 [n], the source's share of each run.
    """
    train, test = np.flatnonzero(shares <= 0), np.flatnonzero(shares >= HELD_OUT_SHARE)
    return Split(train, test) if len(train) and len(test) else None
