"""What a person should know about a fit, one sentence each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from im_lightning.ledger.record import plain
from im_lightning.ledger.regime import run_names
from im_lightning.ledger.run_table import FitData
from im_lightning.rule import diagnostics
from im_lightning.rule.candidates import Candidate

COOK = 1.0
"""Cook's distance from which a run is named: it alone moves the fit by as much as its own uncertainty."""


def notes_of(data: FitData, chosen: Candidate, metrics: dict[str, Any], vif: dict[str, float | None]) -> list[str]:
    """The notes of a rule.

    Args:
        data: The runs.
        chosen: The rule's candidate.
        metrics: Its metrics.
        vif: regressor → variance inflation.
    """
    notes = [*data.notes, *_held_out_notes(metrics)]
    subsets, p = metrics["n_subsets"], len(data.names)
    if subsets <= p + 2:
        notes.append(f"Repeats aside there are only {subsets} different subsets for {p} regressors: make more of them.")
    flagged = [f"{name} (VIF {v:.3g})" for name, v in vif.items() if v is not None and v > diagnostics.COLLINEAR_VIF]
    if flagged or metrics["condition_number"] > diagnostics.COLLINEAR_CONDITION:
        notes.append(
            f"Collinear regressors: {', '.join(flagged) or 'see the condition number'}. Their single coefficients and "
            "signs mean little; predictions inside the fitted region are less affected."
        )
    if chosen.method == "best-subset":
        notes.append(
            "The paper's procedure: its R², p-values and intervals take no account of the choice among all subsets. It "
            "is here for comparison."
        )
    high = [r for r in data.records if r.run_id in set(metrics["high_leverage_runs"])]
    if high:
        notes.append(f"High leverage (a run that alone decides part of the fit): {run_names(high)}.")
    strong = [r for r in data.records if (metrics["cook"].get(r.run_id) or 0.0) > COOK]
    if strong:
        notes.append(f"Influential (without it the whole fit moves; Cook's distance above 1): {run_names(strong)}.")
    return notes + _provenance_notes(data)


def _held_out_notes(metrics: dict[str, Any]) -> list[str]:
    if metrics["beats_mean"] is not None:
        return []  # the verdict says it
    r2 = metrics["leave_subset_out_r2"]
    if r2 is None:
        return [
            "The held-out R² cannot be estimated: without one subset the rest do not determine the fit. Make more runs."
        ]
    if r2 <= 0:
        return [
            "THIS RULE DOES NOT BEAT THE MEAN: on runs it has not seen it predicts the loss no better than the mean "
            f"of the others does (held-out R² {r2:.2f}). Do not weight data by it."
        ]
    if metrics["f_p"] is not None and metrics["f_p"] > 0.05:
        return [f"These runs do not tell the rule from the mean (F test p {metrics['f_p']:.2f}): treat it as a guess."]
    return []


def _provenance_notes(data: FitData) -> list[str]:
    notes = []
    for name in data.names:
        numerics = {str(plain((r.keys.get(name) or {}).get("numerics"))) for r in data.records}
        if len(numerics) > 1:
            notes.append(f"{name} was computed with {len(numerics)} kinds of numerics (precision or library versions).")
    pools = Counter(r.pool_digest for r in data.records)
    if len(pools) > 1:
        notes.append(
            f"The runs drew on {len(pools)} pools; indicators that depend on the pool (knn) differ in meaning."
        )
    return notes
