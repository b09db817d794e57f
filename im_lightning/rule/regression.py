"""`fit_rule`: ordinary least squares of log evaluation loss on the mean regressors of finetune runs.

The method is InstructMining's (arXiv 2307.06290); what is added is all that tells whether to believe the result:
held-out R², collinearity, leverage, the noise ceiling, and refusals where the runs cannot answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from im_lightning.errors import RequestError, message
from im_lightning.rule import diagnostics
from im_lightning.rule.fit_data import FitData, gather
from im_lightning.rule.ledger import RunLedger
from im_lightning.rule.linear import LinearRule
from im_lightning.rule.record import RunRecord, now, plain
from im_lightning.rule.regime import run_names
from im_lightning.rule.region import fitted_radius
from im_lightning.rule.runs_needed import more_runs
from im_lightning.rule.runs_needed import runs_missing as runs_missing

METHODS = ("ols",)


def fit_rule(
    records: Iterable[RunRecord] | RunLedger,
    method: str = "ols",
    indicators: Sequence[str] | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
    force: bool = False,
    name: str = "refit",
) -> LinearRule:
    """Fits a rule on the complete designed runs of one regime.

    y is the log of the evaluation loss (nats per token), x the exposure-weighted means of the regressors φ.
    `weighted` runs join only where the designed ones are too few, which the rule's notes then say; `search` and
    `compare` runs never do.

    Args:
        records: Runs, or their ledger.
        method: "ols".
        indicators: Regressors; by default the paper's nine where the runs have them.
        evaluation: Evaluation set; needed only where the runs have several.
        regime: Id of a run: only runs of its regime are fitted. Needed only where there are several regimes.
        force: Mix regimes (never different φ); the rule's notes then say so.
        name: What the rule is called in messages.

    Returns:
        The rule, with its region, covariances, diagnostics (`metrics_`) and provenance.

    Raises:
        RequestError: the runs cannot answer: none, too few (n ≤ p + 2), several regimes or evaluation sets, missing
            means, regressors that are constant or collinear. The message has the numbers and the remedy.
    """
    if method not in METHODS:
        cause = "this version does not have it"
        raise RequestError(message(f"method {method!r}", cause, f"use one of {', '.join(METHODS)}"))
    every = records.records(status=None) if isinstance(records, RunLedger) else list(records)
    data = gather(every, indicators, evaluation, regime, force)
    _refuse_too_few(data, every)
    _refuse_singular(data)
    return _ordinary_least_squares(data, name)


def _refuse_too_few(data: FitData, every: Sequence[RunRecord]) -> None:
    n, p = data.x.shape
    if n > p + 2:
        return
    names = ", ".join(data.names)
    cause = f"{n} runs are too few for {p} regressor{'s' if p != 1 else ''} ({names}): it takes at least {p + 3}"
    remedy = more_runs(every, p + 3 - n)
    if p > 1:
        remedy += ", or fit fewer regressors (--indicators a,b)"
    raise RequestError(message("refit", cause, remedy))


def _refuse_singular(data: FitData) -> None:
    if data.y.std() <= 1e-12:
        cause = f"the loss is the same in all {len(data.y)} runs, so nothing can explain it"
        raise RequestError(message("refit", cause, "check that the runs trained on different rows"))
    constant = [data.names[j] for j in diagnostics.constant_columns(data.x)]
    collinear = [] if constant else [data.names[j] for j in diagnostics.collinear_columns(data.x)]
    if not constant and not collinear:
        return
    rest = [n for n in data.names if n not in (constant or collinear[-1:])]
    subsets = len(set(data.groups))
    if constant:
        cause = f"the mean of {', '.join(constant)} is the same in all {len(data.y)} runs, so its effect is not seen"
    else:
        cause = f"{', '.join(collinear)} are collinear over the {len(data.y)} runs ({subsets} different subsets)"
    remedy = f"leave one out (--indicators {','.join(rest)}), " if rest else ""
    remedy += "or make runs that vary more (--data.subset_tilt, --data.subset_mixture)"
    raise RequestError(message("refit", f"the design is singular: {cause}", remedy))


def _ordinary_least_squares(data: FitData, name: str) -> LinearRule:
    import statsmodels.api as sm

    x, y = data.x, data.y
    result = sm.OLS(y, sm.add_constant(x, has_constant="add")).fit()
    intervals = np.asarray(result.conf_int(alpha=0.05))
    vif = diagnostics.variance_inflation(x)
    mean, cov = x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))
    radius, largest = fitted_radius(x, mean, cov)
    metrics, notes = _judge(data, result, vif)
    rows = [
        {
            "term": term,
            "estimate": float(result.params[j]),
            "se": float(result.bse[j]),
            "t": float(result.tvalues[j]),
            "p": float(result.pvalues[j]),
            "low": float(intervals[j, 0]),
            "high": float(intervals[j, 1]),
            "vif": float(vif[j - 1]) if j else None,
        }
        for j, term in enumerate(["intercept", *data.names])
    ]
    keys = {n: next((r.keys[n] for r in data.records if n in r.keys), {}) for n in data.names}
    pools = {r.pool_digest for r in data.records}
    return LinearRule(
        name=name,
        intercept_=float(result.params[0]),
        coef_=np.asarray(result.params[1:], dtype=np.float64).copy(),
        feature_names_in_=data.names,
        transforms_=data.transforms,
        method="ols",
        evaluation=data.evaluation,
        mean_=mean,
        cov_=cov,
        radius_=radius,
        coef_cov_=np.asarray(result.cov_params(), dtype=np.float64).copy(),
        coefficients_=plain(rows),
        identities={n: plain(k["identity"]) for n, k in keys.items() if k.get("identity")},
        numerics={n: plain(k["numerics"]) for n, k in keys.items() if k.get("numerics")},
        regime=data.regime,
        n_runs_=len(y),
        metrics_=plain({**metrics, "largest_distance": largest, "notes": notes}),
        ledger_digest_=RunLedger.digest(data.records),
        pool_digest_=pools.pop() if len(pools) == 1 else "",
        created=now(),
    )


def _judge(data: FitData, result: Any, vif: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """Diagnostics (JSON-like, None where not estimable) and what to think of them, one sentence each."""
    x, y = data.x, data.y
    n, p = x.shape
    alone, grouped = diagnostics.leave_out(x, y), diagnostics.leave_out(x, y, data.groups)
    condition = diagnostics.condition_number(x)
    leverage = diagnostics.leverages(x)
    noise = diagnostics.pure_error(y, data.groups)
    subsets = len(set(data.groups))
    high = [r for r, h in zip(data.records, leverage, strict=True) if h > min(3 * (p + 1) / n, 0.9)]
    metrics = {
        "n_subsets": subsets,
        "runs_by_purpose": dict(Counter(r.purpose for r in data.records)),
        "df_residual": int(result.df_resid),
        "r2": float(result.rsquared),
        "adjusted_r2": float(result.rsquared_adj),
        "leave_one_out_r2": alone.r2,
        "leave_subset_out_r2": grouped.r2,
        "condition_number": condition,
        "residual_sd": float(math.sqrt(result.mse_resid)),
        "f": float(result.fvalue),
        "f_p": float(result.f_pvalue),
        "mean_log_loss": float(y.mean()),
        "sd_log_loss": float(y.std(ddof=1)),
        "max_leverage": float(leverage.max()),
        "high_leverage_runs": [r.run_id for r in high],
        "repeat_sd": noise.sd if noise else None,
        "repeat_df": noise.df if noise else 0,
        "noise_ceiling_r2": 1.0 - noise.share if noise else None,
    }
    notes = list(data.notes)
    if grouped.r2 is None:
        notes.append(
            "The held-out R² cannot be estimated: without one subset the rest do not determine the fit. Make more runs."
        )
    elif grouped.r2 <= 0:
        notes.append(
            "THIS RULE DOES NOT BEAT THE MEAN: on runs it has not seen it predicts the loss no better than the mean "
            f"of the others does (held-out R² {grouped.r2:.2f}). Do not weight data by it."
        )
    elif result.f_pvalue > 0.05:
        notes.append(
            f"These runs do not tell the rule from the mean (F test p {result.f_pvalue:.2f}): treat it as a guess."
        )
    if subsets <= p + 2:
        notes.append(f"Repeats aside there are only {subsets} different subsets for {p} regressors: make more of them.")
    flagged = [
        f"{name} (VIF {v:.3g})" for name, v in zip(data.names, vif, strict=True) if v > diagnostics.COLLINEAR_VIF
    ]
    if flagged or condition > diagnostics.COLLINEAR_CONDITION:
        notes.append(
            f"Collinear regressors: {', '.join(flagged) or 'see the condition number'}. Their single coefficients and "
            "signs mean little; predictions inside the fitted region are less affected."
        )
    if high:
        notes.append(f"High leverage (a run that alone decides part of the fit): {run_names(high)}.")
    notes += _provenance_notes(data)
    return metrics, notes


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
