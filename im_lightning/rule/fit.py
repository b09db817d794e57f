"""`fit_rule`: log evaluation loss as a linear function of the mean regressors of finetune runs.

The method is InstructMining's (arXiv 2307.06290); what is added is all that tells whether to believe the result:
held-out scores, baselines, a permutation test of the whole selection, collinearity, influence, the noise ceiling, and
refusals where the runs cannot answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from im_lightning._utils.files import plain
from im_lightning._utils.force import Force
from im_lightning.errors import RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import MERGED, RunRecord, now
from im_lightning.ledger.regime import more_runs, run_names
from im_lightning.ledger.run_table import FitData, gather
from im_lightning.rule.estimators.best_subset import MOST as MOST_FOR_SUBSETS
from im_lightning.rule.kinds import mix_kinds
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.validation import diagnostics, uncertainty
from im_lightning.rule.validation.agreement import early_note, seen_at
from im_lightning.rule.validation.baselines import baselines
from im_lightning.rule.validation.cross_validation import MOST
from im_lightning.rule.validation.model_selection import (
    CHOICE,
    FEWEST,
    LEVEL,
    METHODS,
    POOLING,
    SHARED,
    Candidate,
    Scheme,
    against_mean,
    estimators_of,
    evaluate,
    evaluate_mean,
    recommend,
    regressor_transforms,
    verdict,
)
from im_lightning.rule.validation.targets import guarded_targets, target_correlations
from im_lightning.rule.validation.univariate import correlation_matrix, univariate

_OF_THE_CANDIDATE = (
    *("setting", "r2", "aic", "bic", "leave_one_out_r2", "leave_subset_out_r2"),
    *("grouped_r2", "grouped_rmse", "grouped_spearman"),
)
COOK = 1.0
"""Cook's distance from which a run is named: it alone moves the fit by as much as its own uncertainty."""


def notes_of(data: FitData, chosen: Candidate, metrics: RuleMetrics, vif: dict[str, float | None]) -> list[str]:
    """The notes of a rule; `vif` is regressor → variance inflation."""
    notes = [*data.notes, *_held_out_notes(metrics)]
    subsets, p = metrics.n_subsets, len(data.names) + (len(data.contrasts) - 1 if chosen.method in SHARED else 0)
    if subsets <= p + 2:
        notes.append(f"Repeats aside there are only {subsets} different subsets for {p} regressors: make more of them.")
    flagged = [f"{name} (VIF {v:.3g})" for name, v in vif.items() if v is not None and v > diagnostics.COLLINEAR_VIF]
    if flagged or (metrics.condition_number or 0.0) > diagnostics.COLLINEAR_CONDITION:
        notes.append(
            f"Collinear regressors: {', '.join(flagged) or 'see the condition number'}. Their single coefficients and "
            "signs mean little; predictions inside the fitted region are less affected."
        )
    if chosen.method in SHARED:
        notes.append(
            f"Shares of sources are regressors: their slopes are contrasts with {list(data.contrasts)[-1]}. Rows of "
            "sources that no run had get no prediction."
        )
    if chosen.method == "best-subset":
        notes.append(
            "The paper's procedure: its R², p-values and intervals take no account of the choice among all subsets. It "
            "is here for comparison."
        )
    high = [r for r in data.records if r.run_id in set(metrics.high_leverage_runs)]
    if high:
        notes.append(f"High leverage (a run that alone decides part of the fit): {run_names(high)}.")
    strong = [r for r in data.records if (metrics.cook.get(r.run_id) or 0.0) > COOK]
    if strong:
        notes.append(f"Influential (without it the whole fit moves; Cook's distance above 1): {run_names(strong)}.")
    return notes + _provenance_notes(data)


def _held_out_notes(metrics: RuleMetrics) -> list[str]:
    if metrics.beats_mean is not None:
        return []  # the verdict says it
    r2 = metrics.leave_subset_out_r2
    if r2 is None:
        return [
            "The held-out R² cannot be estimated: without one subset the rest do not determine the fit. Make more runs."
        ]
    if r2 <= 0:
        return [
            "THIS RULE DOES NOT BEAT THE MEAN: on runs it has not seen it predicts the loss no better than the mean "
            f"of the others does (held-out R² {r2:.2f}). Do not weight data by it."
        ]
    if metrics.f_p is not None and metrics.f_p > 0.05:
        return [f"These runs do not tell the rule from the mean (F test p {metrics.f_p:.2f}): treat it as a guess."]
    return []


def _provenance_notes(data: FitData) -> list[str]:
    notes = []
    for name in data.names:
        numerics = {str(plain((r.keys.get(name) or {}).get("numerics"))) for r in data.records}
        if len(numerics) > 1:
            notes.append(f"{name} was computed with {len(numerics)} kinds of numerics (precision or library versions).")
    precisions = Counter(str(r.numerics.get("precision", "not recorded")) for r in data.records)
    if len(precisions) > 1:
        told = ", ".join(f"{n} {name}" for name, n in precisions.most_common())
        notes.append(f"The runs were trained and evaluated in different precision: {told}.")
    pools = Counter(r.pool_digest for r in data.records)
    if len(pools) > 1:
        notes.append(
            f"The runs drew on {len(pools)} pools; indicators that depend on the pool (knn) differ in meaning."
        )
    return notes


def assemble(
    data: FitData,
    scheme: Scheme,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    permutation: dict[str, Any] | None,
    drawn: np.ndarray | None,
    name: str,
    diagnose: bool = True,
) -> LinearRule:
    """The rule that the `chosen` candidate becomes; of all `candidates` the mean is first.

    `permutation` is None where the test was not made, `drawn` (bootstrapped coefficients, float64 [draws, p + 1 or 2])
    where there are none.
    """
    x, transforms = _regressors(data, chosen)
    mean, cov = x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))
    covariance = uncertainty.coefficient_covariance(data, chosen)
    f = uncertainty.f_test(data, chosen, covariance)
    if covariance is None and drawn is not None and len(drawn) > len(chosen.coefficients):
        covariance = np.cov(drawn, rowvar=False)
    stability = {} if drawn is None else uncertainty.intervals(chosen, drawn, len(set(data.groups)))
    rows = uncertainty.coefficient_table(data, chosen, covariance, stability)
    metrics = _metrics(data, scheme, chosen, candidates, permutation, f)
    if diagnose:
        metrics = _diagnosed(metrics, data, scheme, chosen)
    metrics = replace(metrics, bootstrap=stability, verdict=verdict(metrics, chosen.method))
    notes = notes_of(data, chosen, metrics, {row["term"]: row.get("vif") for row in rows[1:]})
    keys = {n: next((r.keys[n] for r in data.records if n in r.keys), {}) for n in data.names}
    pools = {r.pool_digest for r in data.records}
    rule = LinearRule(
        name=name,
        intercept_=float(chosen.coefficients[0]),
        coef_=np.asarray(chosen.coefficients[1 : len(chosen.names) + 1], dtype=np.float64).copy(),
        offset_=chosen.offset,
        feature_names_in_=list(chosen.names),
        transforms_=transforms,
        method=chosen.method,
        evaluation=data.evaluation,
        mean_=mean,
        cov_=cov,
        radius_=0.0,
        reach_=0.0,
        lowest_=float(chosen.fitted.min()),
        coef_cov_=covariance,
        coefficients_=plain(rows),
        regime=data.regime,
        n_runs_=len(data.y),
        sources_=list(data.contrasts) if chosen.method in SHARED else [],
        ledger_digest_=RunLedger.digest(data.records),
        pool_digest_=pools.pop() if len(pools) == 1 else "",
        created=now(),
    )
    rule.radius_, largest = diagnostics.fitted_radius(rule.of_indicators(x), data.groups)
    rule.reach_ = min(rule.radius_, diagnostics.MAX_REACH)
    guarded = guarded_targets(data, x @ rule.coef_, rule.reach_) if diagnose and "=" in data.evaluation else []
    rule.metrics_ = replace(metrics, notes=notes, largest_distance=largest, targets=guarded).whole()
    rule.identities = {n: plain(keys[n]["identity"]) for n in rule.indicators if keys[n].get("identity")}
    rule.numerics = {n: plain(keys[n]["numerics"]) for n in rule.indicators if keys[n].get("numerics")}
    return rule


def _regressors(data: FitData, chosen: Candidate) -> tuple[np.ndarray, dict[str, Any]]:
    """(means of the rule's regressors over runs [n, p], regressor → φ)."""
    if chosen.method == "best-subset":
        return chosen.fixed.x, {n: data.transforms[n] for n in chosen.names}
    return chosen.estimator.x, regressor_transforms(data, chosen.method)


def _metrics(
    data: FitData,
    scheme: Scheme,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    permutation: dict[str, Any] | None,
    f: tuple[float | None, float | None],
) -> RuleMetrics:
    x, y, n = data.x, data.y, len(data.y)
    row, high = chosen.row, min(3 * (x.shape[1] + 1) / n, 0.9)
    leverage, noise = diagnostics.leverages(x), diagnostics.pure_error(y, data.groups)
    ceiling = (noise and noise.ceiling) or (None, None, None)
    variance, df = uncertainty.residual_variance(data, chosen)
    beats = None  # p is of the best candidate, and of any information at all: it may be had with a held-out R² below 0
    if permutation is not None:
        beats = bool(permutation["p"] < LEVEL and (row["grouped_r2"] or 0.0) > 0)
    recommended = "mean" if beats is False else chosen.method
    rows = [{**c.row, "recommended": c.method == recommended} for c in candidates]
    return RuleMetrics(
        method=chosen.method,
        **{name: row[name] for name in _OF_THE_CANDIDATE},
        n_subsets=len(set(data.groups)),
        folds=len(scheme.grouped),
        runs_by_purpose=dict(Counter(r.purpose for r in data.records)),
        kinds=data.kinds,
        df_residual=round(df, 2),
        adjusted_r2=1.0 - (1.0 - row["r2"]) * (len(set(data.groups)) - 1) / df if df > 0 else None,
        condition_number=diagnostics.condition_number(x),
        residual_sd=float(np.sqrt(variance)),
        f=f[0],
        f_p=f[1],
        mean_log_loss=float(y.mean()),
        sd_log_loss=float(y.std(ddof=1)),
        max_leverage=float(leverage.max()),
        high_leverage_runs=[r.run_id for r, h in zip(data.records, leverage, strict=True) if h > high],
        repeat_sd=noise.sd if noise else None,
        repeat_df=noise.df if noise else 0,
        noise_ceiling_r2=ceiling[0],
        noise_ceiling_low=ceiling[1],
        noise_ceiling_high=ceiling[2],
        calibration=uncertainty.calibration_slope(data, scheme, chosen),
        source_out=uncertainty.sources_out(data, scheme, chosen),
        candidates=rows,
        recommended=recommended,
        permutation=permutation,
        beats_mean=beats,
    )


def _diagnosed(metrics: RuleMetrics, data: FitData, scheme: Scheme, chosen: Candidate) -> RuleMetrics:
    cook = uncertainty.cooks_distances(data, chosen)
    return replace(
        metrics,
        cook={r.run_id: float(d) for r, d in zip(data.records, cook, strict=True)},
        rivals=baselines(data, scheme, chosen),
        held_out=uncertainty.held_out_rows(data, scheme, chosen),
        univariate=univariate(data),
        correlations=correlation_matrix(data),
        target_correlations=target_correlations(data.targets, data.groups) if len(data.targets) > 1 else [],
    )


def fit_rule(
    records: Iterable[RunRecord] | RunLedger,
    method: str = "ols",
    indicators: Sequence[str] | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
    force: Force = False,
    name: str = "refit",
    signs: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    permutations: int | None = None,
    bootstrap: int | None = None,
    diagnose: bool = True,
    at: float | None = None,
    kind: str = "all",
    kinds: Mapping[str, Any] | None = None,
) -> LinearRule:
    """Fits a rule on the complete designed runs of one regime.

    y is the log of the evaluation loss (nats per token), or of another target; x the exposure-weighted means of φ.
    `weighted`, `search` and `compare` runs never join: their rows were drawn by a rule. Merged runs count as far as
    their twins show that they agree (`rule.kinds` has the rule; `metrics_.kinds` what it made of them).

    Args:
        records: Runs, or their ledger.
        method: "ols"; "ridge", "elastic-net" (penalties by nested cross-validation, folds of subsets); "additive"
            (piecewise-linear in every indicator); "ridge+shares", "additive+shares" (with shares of sources);
            "partial-pooling" (slopes per source, drawn to a common one); "offset", "offset-robust" (L = c +
            exp(a + b·x) by least squares or Huber's loss); "best-subset" (the paper's procedure, for comparison);
            "auto": the simplest of these but for the last whose grouped held-out error is within one standard error of
            the least.
        indicators: Indicators; by default the paper's nine where the runs have them.
        evaluation: Evaluation set; needed only where the runs have several. Or another target (docs/targets.md), such
            as "em:gsm8k", the error rate of a task, or "a=0.7,b=0.3".
        regime: Id of a run: only runs of its regime are fitted. Needed only where there are several regimes.
        force: With "other-regime", mix regimes (never different φ); the rule's notes then say so.
        name: What the rule is called in messages.
        signs: indicator → 1 or −1, the only sign its coefficient may have; with "ols", "ridge" and "elastic-net".
        weights: run id → weight of the run, 1 where none is given.
        permutations: Trials at most of the permutation test against the mean, 20 or more; 0 for none. By default 999
            with "auto" and none with the others.
        bootstrap: Resamples of the subsets for intervals and the stability of signs; 0 for none. By default 500 with
            "auto" and none with the others.
        diagnose: Whether baselines, influence and the indicators alone are looked at; refits on resamples need none.
        at: An early point, a share of the optimiser steps or a number of them. Runs that were stopped there are fitted,
            and full runs as their curves have them there; the rule's notes say how the losses there agree with the
            ends. Without it stopped runs and full ones are of different regimes.
        kind: "all", or "trained": merged runs are left out.
        kinds: `metrics_.kinds` of a rule that was fitted on these runs and more: how it mixed them holds here too.

    Returns:
        The rule, with its region, covariances, diagnostics (`metrics_`) and provenance. `LinearRule.check` refuses its
        use where `beats_mean` is False: by the permutation test, or untested with a held-out R² of 0 or less.

    Raises:
        RequestError: the runs cannot answer: none, too few (n ≤ p + 2), several regimes or evaluation sets, missing
            means, regressors that are constant or collinear; "additive" over runs without basis means; fewer
            permutations than can tell anything. The message has the numbers and the remedy.
    """
    if method not in METHODS:
        cause = "this version does not have it"
        raise RequestError(message(f"method {method!r}", cause, f"use one of {', '.join(METHODS)}"))
    if permutations and permutations < FEWEST:
        cause = f"p cannot fall below {LEVEL} in so few trials, so that every rule would be no better than the mean"
        raise RequestError(message(f"{permutations} permutations", cause, f"make {FEWEST} or more, or 0 for no test"))
    every = records.records(status=None) if isinstance(records, RunLedger) else list(records)
    data = gather(every if at is None else seen_at(every, at), indicators, evaluation, regime, force, weights)
    if at is not None:
        data.notes.insert(0, early_note(at, every, data.records, data.evaluation))
    if kind != "all" or any(r.kind == MERGED for r in data.records):
        data = mix_kinds(data, kind, kinds)
    _refuse_too_few(data, every)
    _refuse_singular(data)
    _refuse_method(data, method, signs)
    full = method == "auto"
    scheme = Scheme.of(data)
    estimators = estimators_of(data, (*CHOICE, "best-subset") if full else (method,), signs)
    candidates = [evaluate(data, scheme, estimator) for estimator in estimators]
    rules = [c for c in candidates if c.method in CHOICE or not full]  # of all, the best subset is for comparison
    if full and not any(rule.method == "additive" for rule in rules):
        data.notes.append(f"the additive rule was not considered: {data.no_hats or 'signs are constrained'}")
    chosen = recommend(rules, data, scheme.codes) if full else rules[0]
    most = (MOST if full else 0) if permutations is None else permutations
    test = against_mean(rules, data, scheme, most) if most > 0 else None
    draws = (uncertainty.DRAWS if full else 0) if bootstrap is None else bootstrap
    drawn = uncertainty.bootstrap_coefficients(data, chosen, draws) if draws else None
    if drawn is not None and len(drawn) < uncertainty.FEWEST:
        told = f"{len(drawn)} of {draws} resamples of the subsets determine the fit"
        data.notes.append(f"no bootstrap intervals: {told}, and {uncertainty.FEWEST} are needed")
    return assemble(data, scheme, chosen, [evaluate_mean(data, scheme), *candidates], test, drawn, name, diagnose)


def _refuse_method(data: FitData, method: str, signs: Mapping[str, int] | None) -> None:
    unknown = [name for name in signs or {} if name not in data.names]
    if unknown:
        cause = f"{', '.join(unknown)} is not among the regressors ({', '.join(data.names)})"
        raise RequestError(message("signs", cause, "constrain some of these"))
    if signs and method not in ("auto", "ols", "ridge", "elastic-net"):
        cause = "it does not take sign constraints"
        raise RequestError(message(f"method {method}", cause, "leave out signs, or use ols, ridge or elastic-net"))
    if method in SHARED and (reason := data.no_pooling if method == POOLING else data.no_contrasts):
        remedy = "make designed runs of a pool of several sources with this version, or use --method auto or ridge"
        raise RequestError(message(f"method {method}", reason, remedy))
    if method.startswith("additive") and data.no_hats:
        remedy = "make the runs again with this version, which records them, or use --method auto or ridge"
        raise RequestError(message(f"method {method}", data.no_hats, remedy))
    if method == "best-subset" and len(data.names) > MOST_FOR_SUBSETS:
        cause = f"it tries all subsets of {len(data.names)} regressors; {MOST_FOR_SUBSETS} are the most"
        raise RequestError(message("method best-subset", cause, "name fewer with --indicators"))


def _refuse_too_few(data: FitData, every: Sequence[RunRecord]) -> None:
    n, p = data.x.shape
    if n > p + 2:
        return
    names = ", ".join(data.names)
    cause = f"{n} runs are too few for {p} regressor{'s' if p != 1 else ''} ({names}): it takes at least {p + 3}"
    if data.kinds and not data.kinds["used"]:
        cause += f"; {data.kinds['runs']} merged runs are left out, {data.kinds['reason']}"
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
