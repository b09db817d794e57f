"""A fitted rule and its runs: which they are, and the rule fitted again on their subsets drawn with replacement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.curve import STOPPED
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import METHODS, fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.validation.agreement import seen_at
from im_lightning.rule.validation.uncertainty import resampled


def runs_of(rule: LinearRule, records: Iterable[RunRecord] | RunLedger) -> list[RunRecord]:
    """The runs that the rule was fitted on, at their early point under a rule fitted there: those it names, or under an
    older rule file those of its digest.

    Raises:
        RequestError: the rule was not fitted here, or some of its runs are not there.
    """
    every = records.records(status=None) if isinstance(records, RunLedger) else list(records)
    named = [row["run_id"] for row in rule.metrics_.held_out]
    if rule.method not in METHODS or not named:
        if rule.method in METHODS and (found := _of_digest(rule, every)):
            return found
        cause = "it does not name the runs that it was fitted on"
        raise RequestError(message(f"rule {rule.title}", cause, "refit it (im-lightning refit LEDGER --out rule.json)"))
    by_id = {record.run_id: record for record in every}
    absent = [name for name in named if name not in by_id]
    if absent:
        shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        cause = f"{len(absent)} of the {len(named)} runs behind it are not in the ledger ({shown})"
        raise RequestError(message(f"rule {rule.title}", cause, "name the ledger it was fitted on"))
    found = [by_id[name] for name in named]
    early = rule.regime.get(STOPPED)
    return found if early is None else seen_at(found, early["step"])


def _of_digest(rule: LinearRule, records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of the regime whose digest is the rule's; [] where there is none."""
    tried: set[str | None] = set()
    designed = (r.run_id for r in records if r.purpose == "designed" and r.status == "complete")
    for regime in [None, *designed]:
        if regime in tried:  # a run of a regime that was looked at: thousands of runs are of a few regimes
            continue
        try:
            found = gather(records, rule.indicators, rule.evaluation or None, regime, False).records
        except InstructMiningError:
            continue
        if RunLedger.digest(found) == rule.ledger_digest_:
            return found
        tried.update(r.run_id for r in found)
    return []


def bootstrapped_rules(
    rule: LinearRule,
    runs: Sequence[RunRecord],
    streams: Iterable[np.random.Generator],
    indicators: Sequence[str],
) -> Iterator[LinearRule | InstructMiningError]:
    """The rule fitted again on its subsets drawn with replacement (all runs of a subset together).

    The method stays; penalties are chosen again, and the regressors of a best subset among `indicators`. Sign
    constraints are not kept. With penalties as chosen: `bootstrap_coefficients`. Each of the `streams` draws one
    resample of the rule's `runs`, whose subsets are numbered in their order. The runs of a subset drawn twice weigh
    twice as much; penalties are chosen and regions measured on each run once.

    Yields:
        Per resample the rule, or why there is none: too few different subsets, a singular design.
    """
    refit = partial(fit_rule, force="other-regime", name=rule.name, permutations=0, bootstrap=0, diagnose=False)
    for times in resampled(list(dict.fromkeys(run.subset_key for run in runs)), streams):
        drawn = [run for run in runs if times[run.subset_key]]
        weights = {run.run_id: float(times[run.subset_key]) for run in drawn}
        try:
            evaluation, kinds = rule.evaluation or None, rule.metrics_.kinds or None
            yield refit(drawn, rule.method, indicators, evaluation, weights=weights, kinds=kinds)
        except InstructMiningError as error:
            yield error
