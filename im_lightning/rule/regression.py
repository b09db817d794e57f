"""`fit_rule`: log evaluation loss as a linear function of the mean regressors of finetune runs.

The method is InstructMining's (arXiv 2307.06290); what is added is all that tells whether to believe the result:
held-out scores, rivals, a permutation test of the whole selection, collinearity, influence, the noise ceiling, and
refusals where the runs cannot answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from im_lightning.errors import RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import FitData, gather
from im_lightning.ledger.runs_needed import more_runs
from im_lightning.ledger.runs_needed import runs_missing as runs_missing
from im_lightning.rule import bootstrap as resampling
from im_lightning.rule import diagnostics
from im_lightning.rule.assembly import assemble
from im_lightning.rule.best_subset import MOST as MOST_FOR_SUBSETS
from im_lightning.rule.best_subset import SubsetPredictor
from im_lightning.rule.candidates import (
    CHOICE,
    METHODS,
    Candidate,
    Scheme,
    estimators_of,
    judge,
    judge_best_subset,
    judge_mean,
)
from im_lightning.rule.choice import FEWEST, LEVEL, recommend
from im_lightning.rule.held_out import Predictor
from im_lightning.rule.linear import LinearRule
from im_lightning.rule.permutation import MOST, permutation_test


def fit_rule(
    records: Iterable[RunRecord] | RunLedger,
    method: str = "ols",
    indicators: Sequence[str] | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
    force: bool = False,
    name: str = "refit",
    signs: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    permutations: int | None = None,
    bootstrap: int | None = None,
) -> LinearRule:
    """Fits a rule on the complete designed runs of one regime.

    y is the log of the evaluation loss (nats per token), x the exposure-weighted means of the regressors φ.
    `weighted` runs join only where the designed ones are too few, which the rule's notes then say; `search` and
    `compare` runs never do.

    Args:
        records: Runs, or their ledger.
        method: "ols"; "ridge", "elastic-net" (penalties by nested cross-validation, folds of subsets); "additive"
            (piecewise-linear in every indicator); "best-subset" (the paper's procedure, for comparison); "auto": the
            simplest of the first four whose grouped held-out error is within one standard error of the least.
        indicators: Indicators; by default the paper's nine where the runs have them.
        evaluation: Evaluation set; needed only where the runs have several.
        regime: Id of a run: only runs of its regime are fitted. Needed only where there are several regimes.
        force: Mix regimes (never different φ); the rule's notes then say so.
        name: What the rule is called in messages.
        signs: indicator → 1 or −1, the only sign its coefficient may have; not with "additive" and "best-subset".
        weights: run id → weight of the run, 1 where none is given.
        permutations: Trials at most of the permutation test against the mean, 20 or more; 0 for none. By default 999
            with "auto" and none with the others.
        bootstrap: Resamples of the subsets for intervals and the stability of signs; 0 for none. By default 500 with
            "auto" and none with the others.

    Returns:
        The rule, with its region, covariances, diagnostics (`metrics_`) and provenance. `metrics_["beats_mean"]` is
        None where the permutation test was not made; where it is False, `LinearRule.check` refuses the rule's use.

    Raises:
        RequestError: the runs cannot answer: none, too few (n ≤ p + 2), several regimes or evaluation sets, missing
            means, regressors that are constant or collinear; "additive" over runs without basis means; fewer
            permutations than can tell anything. The message has the numbers and the remedy.
    """
    if method not in METHODS:
        cause = "this version does not have it"
        raise RequestError(message(f"method {method!r}", cause, f"use one of {', '.join(METHODS)}"))
    if permutations is not None and 0 < permutations < FEWEST:
        cause = f"p cannot fall below {LEVEL} in so few trials, so that every rule would be no better than the mean"
        raise RequestError(message(f"{permutations} permutations", cause, f"make {FEWEST} or more, or 0 for no test"))
    every = records.records(status=None) if isinstance(records, RunLedger) else list(records)
    data = gather(every, indicators, evaluation, regime, force, weights)
    _refuse_too_few(data, every)
    _refuse_singular(data)
    _refuse_method(data, method, signs)
    full = method == "auto"
    scheme = Scheme.of(data)
    rules, compared = _candidates(data, scheme, method, signs)
    chosen = recommend(rules, data, scheme.codes) if full else rules[0]
    test = _permutation(data, scheme, rules, (MOST if full else 0) if permutations is None else permutations)
    draws = (resampling.DRAWS if full else 0) if bootstrap is None else bootstrap
    drawn = resampling.bootstrap_coefficients(data, chosen, draws) if draws else None
    if drawn is not None and len(drawn) < resampling.FEWEST:
        told = f"{len(drawn)} of {draws} resamples of the subsets determine the fit, and {resampling.FEWEST} are needed"
        data.notes.append(f"no bootstrap intervals: {told}")
    return assemble(data, scheme, chosen, [judge_mean(data, scheme), *rules, *compared], test, drawn, name)


def _candidates(
    data: FitData, scheme: Scheme, method: str, signs: Mapping[str, int] | None
) -> tuple[list[Candidate], list[Candidate]]:
    """(the rules of the choice, those beside it for comparison)."""
    paper: list[Candidate] = []
    if method in ("auto", "best-subset") and not signs:
        found = judge_best_subset(data, scheme)
        paper = [] if found is None else [found]
    if method == "best-subset":
        return paper, []
    wanted = CHOICE if method == "auto" else (method,)
    rules = [judge(data, scheme, estimator) for estimator in estimators_of(data, wanted, signs)]
    if method == "auto" and not any(r.method == "additive" for r in rules):
        why = data.no_hats or "signs are constrained"
        data.notes.append(f"the additive rule was not considered: {why}")
    return rules, paper


def _permutation(data: FitData, scheme: Scheme, rules: Sequence[Candidate], most: int) -> dict[str, object] | None:
    """The permutation test over all rules of the choice; None where it is not wanted."""
    if most < 1:
        return None
    predictors = [
        SubsetPredictor(data.x, data.weights, scheme.grouped)
        if rule.estimator is None
        else Predictor(rule.estimator, scheme.grouped, scheme.folds)
        for rule in rules
    ]
    return permutation_test(predictors, scheme.grouped, data.y, data.weights, scheme.codes, most)


def _refuse_method(data: FitData, method: str, signs: Mapping[str, int] | None) -> None:
    unknown = [name for name in signs or {} if name not in data.names]
    if unknown:
        cause = f"{', '.join(unknown)} is not among the regressors ({', '.join(data.names)})"
        raise RequestError(message("signs", cause, "constrain some of these"))
    if signs and method in ("additive", "best-subset"):
        cause = "it does not take sign constraints"
        raise RequestError(message(f"method {method}", cause, "leave out signs, or use ols, ridge or elastic-net"))
    if method == "additive" and data.no_hats:
        remedy = "make the runs again with this version, which records them, or use --method auto or ridge"
        raise RequestError(message("method additive", data.no_hats, remedy))
    if method == "best-subset" and len(data.names) > MOST_FOR_SUBSETS:
        cause = f"it tries all subsets of {len(data.names)} regressors; {MOST_FOR_SUBSETS} are the most"
        raise RequestError(message("method best-subset", cause, "name fewer with --indicators"))


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
