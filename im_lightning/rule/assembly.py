"""Makes the `LinearRule` of a chosen candidate: coefficients with their errors, region, diagnostics, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning.indicators.hat_basis import hat_transforms
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import now, plain
from im_lightning.ledger.run_table import FitData
from im_lightning.rule import diagnostics
from im_lightning.rule.bootstrap import intervals
from im_lightning.rule.candidates import Candidate, Scheme
from im_lightning.rule.choice import LEVEL, verdict
from im_lightning.rule.influence import coefficient_covariance, cooks_distances, held_out_rows, residual_variance
from im_lightning.rule.linear import LinearRule
from im_lightning.rule.notes import notes_of
from im_lightning.rule.region import fitted_radius
from im_lightning.rule.rivals import rivals
from im_lightning.rule.smoothers import Smoother
from im_lightning.rule.univariate import correlation_matrix, univariate


def assemble(
    data: FitData,
    scheme: Scheme,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    permutation: dict[str, Any] | None,
    drawn: np.ndarray | None,
    name: str,
) -> LinearRule:
    """The rule.

    Args:
        data: The runs.
        scheme: How they were held out.
        chosen: The candidate that becomes the rule.
        candidates: All, the mean first, for the record.
        permutation: Result of the test; None where it was not made.
        drawn: float64 [draws, p + 1], bootstrapped coefficients; None where there are none.
        name: What the rule is called.
    """
    x, transforms = _regressors(data, chosen)
    mean, cov = x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))
    radius, largest = fitted_radius(x, mean, cov)
    covariance = coefficient_covariance(data, chosen)
    if covariance is None and drawn is not None and len(drawn) > len(chosen.coefficients):
        covariance = np.cov(drawn, rowvar=False)
    stability = {} if drawn is None else intervals(chosen, drawn)
    least_squares = _least_squares(data, chosen)
    rows = _table(data, chosen, covariance, stability, least_squares)
    metrics = _metrics(data, scheme, chosen, candidates, permutation, least_squares)
    metrics |= {"bootstrap": stability, "largest_distance": largest}
    metrics["verdict"] = verdict(metrics, chosen.method)
    metrics["notes"] = notes_of(data, chosen, metrics, {row["term"]: row.get("vif") for row in rows[1:]})
    keys = {n: next((r.keys[n] for r in data.records if n in r.keys), {}) for n in data.names}
    pools = {r.pool_digest for r in data.records}
    rule = LinearRule(
        name=name,
        intercept_=float(chosen.coefficients[0]),
        coef_=np.asarray(chosen.coefficients[1:], dtype=np.float64).copy(),
        feature_names_in_=list(chosen.names),
        transforms_=transforms,
        method=chosen.method,
        evaluation=data.evaluation,
        mean_=mean,
        cov_=cov,
        radius_=radius,
        coef_cov_=covariance,
        coefficients_=plain(rows),
        regime=data.regime,
        n_runs_=len(data.y),
        metrics_=plain(metrics),
        ledger_digest_=RunLedger.digest(data.records),
        pool_digest_=pools.pop() if len(pools) == 1 else "",
        created=now(),
    )
    rule.identities = {n: plain(keys[n]["identity"]) for n in rule.indicators if keys[n].get("identity")}
    rule.numerics = {n: plain(keys[n]["numerics"]) for n in rule.indicators if keys[n].get("numerics")}
    return rule


def _regressors(data: FitData, chosen: Candidate) -> tuple[np.ndarray, dict[str, Any]]:
    """(means of the rule's regressors over runs [n, p], regressor → φ)."""
    if chosen.method == "additive":
        transforms: dict[str, Any] = {}
        for indicator, (knots, _) in data.hats.items():
            transforms |= hat_transforms(indicator, data.transforms[indicator], knots)
        return np.column_stack([means[:, 1:] for _, means in data.hats.values()]), transforms
    kept = [data.names.index(n) for n in chosen.names]
    return data.x[:, kept], {n: data.transforms[n] for n in chosen.names}


def _least_squares(data: FitData, chosen: Candidate) -> Any:
    """statsmodels' result where the rule is a plain least-squares fit; else None."""
    if chosen.method not in ("ols", "best-subset") or not isinstance(chosen.estimator, Smoother | None):
        return None
    import statsmodels.api as sm

    kept = [data.names.index(n) for n in chosen.names]
    full = sm.add_constant(data.x[:, kept], has_constant="add")
    if (data.weights == 1.0).all():
        return sm.OLS(data.y, full).fit()
    return sm.WLS(data.y, full, weights=data.weights).fit()


def _table(
    data: FitData, chosen: Candidate, covariance: np.ndarray | None, stability: dict[str, Any], result: Any
) -> list[dict[str, Any]]:
    """One row per term. t, p and their interval belong to least squares alone; else low and high are bootstrapped."""
    linear = chosen.method != "additive"
    kept = [data.names.index(n) for n in chosen.names] if linear else []
    vif = diagnostics.variance_inflation(data.x[:, kept]) if kept else np.empty(0)
    limits = None if result is None else np.asarray(result.conf_int(alpha=0.05))
    rows = []
    for j, term in enumerate(["intercept", *chosen.names]):
        row: dict[str, Any] = {"term": term, "estimate": float(chosen.coefficients[j])}
        if result is not None and limits is not None:
            row |= {"se": float(result.bse[j]), "t": float(result.tvalues[j])}
            row |= {"p": float(result.pvalues[j]), "low": float(limits[j, 0]), "high": float(limits[j, 1])}
        else:
            bounds = stability.get(term, {})
            se = None if covariance is None else float(np.sqrt(max(covariance[j, j], 0.0)))
            row |= {"se": se, "t": None, "p": None, "low": bounds.get("low"), "high": bounds.get("high")}
        row["vif"] = float(vif[j - 1]) if j and len(vif) else None
        rows.append(row)
    return rows


def _metrics(
    data: FitData,
    scheme: Scheme,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    permutation: dict[str, Any] | None,
    result: Any,
) -> dict[str, Any]:
    x, y, n = data.x, data.y, len(data.y)
    row = chosen.row
    leverage, noise = diagnostics.leverages(x), diagnostics.pure_error(y, data.groups)
    variance, df = residual_variance(data, chosen)
    p = None if permutation is None else permutation["p"]
    held_out = row["grouped_r2"]  # p is of the best candidate, and of any information at all: it may be had below 0
    beats = None if p is None else bool(p < LEVEL and held_out is not None and held_out > 0)
    recommended = "mean" if beats is False else chosen.method
    rows = [{**c.row, "recommended": c.method == recommended} for c in candidates]
    high = min(3 * (x.shape[1] + 1) / n, 0.9)
    cook = cooks_distances(data, chosen)
    return {
        "method": chosen.method,
        "setting": row["setting"],
        "n_subsets": len(set(data.groups)),
        "folds": len(scheme.grouped),
        "runs_by_purpose": dict(Counter(r.purpose for r in data.records)),
        "df_residual": round(df, 2),
        "r2": row["r2"],
        "adjusted_r2": 1.0 - (1.0 - row["r2"]) * (n - 1) / df if df > 0 else None,
        "aic": row["aic"],
        "bic": row["bic"],
        "leave_one_out_r2": row["leave_one_out_r2"],
        "leave_subset_out_r2": row["leave_subset_out_r2"],
        "grouped_r2": row["grouped_r2"],
        "grouped_rmse": row["grouped_rmse"],
        "grouped_spearman": row["grouped_spearman"],
        "source_out": row["source_out"],
        "condition_number": diagnostics.condition_number(x),
        "residual_sd": float(np.sqrt(variance)),
        "f": None if result is None else float(result.fvalue),
        "f_p": None if result is None else float(result.f_pvalue),
        "mean_log_loss": float(y.mean()),
        "sd_log_loss": float(y.std(ddof=1)),
        "max_leverage": float(leverage.max()),
        "high_leverage_runs": [r.run_id for r, h in zip(data.records, leverage, strict=True) if h > high],
        "cook": {r.run_id: float(d) for r, d in zip(data.records, cook, strict=True)},
        "repeat_sd": noise.sd if noise else None,
        "repeat_df": noise.df if noise else 0,
        "noise_ceiling_r2": 1.0 - noise.share if noise else None,
        "candidates": rows,
        "recommended": recommended,
        "rivals": rivals(data, scheme, chosen),
        "permutation": permutation,
        "beats_mean": beats,
        "held_out": held_out_rows(data, scheme, chosen),
        "univariate": univariate(data),
        "correlations": correlation_matrix(data),
    }
