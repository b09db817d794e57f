"""What a comparison's seed varies besides the training: the candidate rows, and the rule by a bootstrap of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from im_lightning._utils.hashing import digest_json
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule

POOL_DRAWS = ("auto", "folds", "bootstrap", "same")
FOLD_TOKENS = 4
"""Times the tokens of an arm that a fold must hold before "auto" splits the pool."""

_TRIES = 50


def settle_pool_draw(how: str, pool_tokens: float, tokens: int, seeds: int) -> str:
    """The draw that "auto" means: folds where each holds four times an arm's tokens, else a bootstrap.

    Raises:
        RequestError: an unknown draw.
    """
    if how not in POOL_DRAWS:
        raise RequestError(message("pool_draw", f"there is no {how!r}", f"use one of {', '.join(POOL_DRAWS)}"))
    if how != "auto":
        return how
    return "folds" if pool_tokens >= FOLD_TOKENS * tokens * seeds else "bootstrap"


def candidate_rows(how: str, rows: int, index: int, seeds: int, seed: int) -> list[int] | None:
    """Candidate rows of one seed of a comparison.

    Args:
        how: "folds": the index-th of `seeds` disjoint random parts; "bootstrap": the different rows among as many drawn
            with replacement as there are (about 63 %); "same": all.
        rows: Rows of the pool.
        index: Which of the seeds, from 0.
        seeds: How many there are.
        seed: Decides the draw.

    Returns:
        Row numbers, ascending; None for all.
    """
    if how == "same":
        return None
    if how == "folds":
        order = np.random.default_rng([seed, 3]).permutation(rows)
        return np.sort(np.array_split(order, seeds)[index]).tolist()
    return np.unique(np.random.default_rng([seed + index, 4]).integers(0, rows, rows)).tolist()


def runs_behind(rule: LinearRule, ledger: RunLedger) -> list[RunRecord]:
    """The runs of the ledger that the rule was fitted on.

    Raises:
        RequestError: there is no such set of runs in the ledger.
    """
    records = ledger.records()
    names = _indicators(rule)
    tried: set[str | None] = set()
    for regime in [None, *(r.run_id for r in records if r.purpose == "designed")]:
        if regime in tried:  # a run of a regime that was looked at: thousands of runs are of a few regimes
            continue
        try:
            found = gather(records, names, rule.evaluation or None, regime, False).records
        except InstructMiningError:
            continue
        if RunLedger.digest(found) == rule.ledger_digest_:
            return found
        tried.update(r.run_id for r in found)
    cause = f"its runs are not those that {rule.title} was fitted on"
    remedy = f"fit the rule on them (im-lightning refit {ledger.path} --out rule.json), or leave out --ledger"
    raise RequestError(message(f"--ledger {ledger.path}", cause, remedy))


def bootstrap_rule(rule: LinearRule, runs: Sequence[RunRecord], seed: int, folder: Path) -> Path:
    """Refits the rule on its subsets drawn with replacement (all runs of a subset together), and writes it.

    The refit is a draw, no rule to be judged by itself: what the original was found to be worth stays in its metrics.

    Args:
        rule: The rule.
        runs: Those it was fitted on.
        seed: Of the draw.
        folder: Where the file goes, named by what decides it.

    Raises:
        RequestError: no draw determines the fit.
    """
    path = folder / f"{digest_json([rule.ledger_digest_, rule.method, _indicators(rule), seed])}.json"
    if path.exists():
        return path
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.subset_key, []).append(run)
    keys = sorted(groups)
    cause: InstructMiningError | None = None
    for attempt in range(_TRIES):
        drawn = np.random.default_rng([seed, 5, attempt]).choice(keys, len(keys))
        sample = [run for key in drawn for run in groups[str(key)]]
        try:
            fitted = fit_rule(sample, rule.method, _indicators(rule), rule.evaluation or None, None, name=rule.name)
        except InstructMiningError as error:
            cause = error
            continue
        fitted.metrics_ = replace(rule.metrics_, bootstrap={"of": rule.ledger_digest_, "seed": seed})
        folder.mkdir(parents=True, exist_ok=True)
        fitted.save(path)
        return path
    remedy = "make more designed runs, or leave out --ledger (the rule is then the same for all seeds)"
    raise RequestError(
        message("--ledger", f"no bootstrap of its {len(keys)} subsets determines a fit ({cause})", remedy)
    )


def _indicators(rule: LinearRule) -> list[str]:
    return list(getattr(rule, "indicators", rule.feature_names_in_))
