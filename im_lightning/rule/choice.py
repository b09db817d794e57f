"""Which rule is recommended, and in which words the fit says whether it is better than the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning.ledger.run_table import FitData
from im_lightning.rule.candidates import CHOICE, Candidate
from im_lightning.rule.held_out import clustered_se

LEVEL = 0.05
"""A rule is better than the mean where the permutation p of the whole selection is below this, and its own held-out R²
above 0."""
FEWEST = 20
"""Trials of the test from which its p, at least 1 / (trials + 1), can be below the level."""


def recommend(candidates: Sequence[Candidate], data: FitData, codes: np.ndarray) -> Candidate:
    """The simplest rule whose held-out error is within one standard error of the least.

    The standard error is that of the *difference* of squared held-out errors to the best candidate, over subsets:
    all candidates predict the same runs, so what the runs have in common cancels.

    Args:
        candidates: Rules to choose from; others than `CHOICE` are passed over.
        data: The runs.
        codes: int64 [n], subset of each run.
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


def verdict(metrics: dict[str, Any], method: str) -> str:
    """One sentence: better than the mean, not better, or not known."""
    tested = metrics.get("permutation") or {}
    p, count = tested.get("p"), tested.get("permutations", 0)
    r2 = metrics.get("grouped_r2")
    held = "not estimable" if r2 is None else f"{r2:.2f}"
    if metrics.get("beats_mean") is None:
        return (
            f"whether this rule ({method}) is better than the mean was NOT TESTED (held-out R² {held}); im-lightning "
            "refit tests it by permutations"
        )
    trials = (
        f"held-out R² {held}; with the losses shuffled over the subsets, {tested['exceedances']} of {count} trials of "
        "the whole selection did as well"
    )
    if metrics["beats_mean"]:
        return f"better than the mean: {trials} (p {p:.3g})"
    if p is not None and p < LEVEL:
        return (
            f"NO BETTER THAN THE MEAN: {trials} (p {p:.3g}), so the losses do go with the indicators, but this rule "
            f"({method}) misses runs it has not seen by no less than their mean does"
        )
    return f"NO BETTER THAN THE MEAN: {trials} (p {p:.2g}; below {LEVEL} is wanted)"
