"""What a comparison's seed varies besides the training: the candidate rows, and the rule by a bootstrap of its runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from im_lightning._utils.hashing import digest_json
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.refits import bootstrapped_rules, runs_of

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
    with contextlib.suppress(RequestError):
        found = runs_of(rule, ledger)
        if RunLedger.digest(found) == rule.ledger_digest_:
            return found
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
    path = folder / f"{digest_json([rule.ledger_digest_, rule.method, rule.indicators, seed])}.json"
    if path.exists():
        return path
    runs = sorted(runs, key=lambda run: run.subset_key)
    streams = (np.random.default_rng([seed, 5, attempt]) for attempt in range(_TRIES))
    cause: InstructMiningError | None = None
    for fitted in bootstrapped_rules(rule, runs, streams, rule.indicators, repeated=True):
        if isinstance(fitted, InstructMiningError):
            cause = fitted
            continue
        fitted.metrics_ = replace(rule.metrics_, bootstrap={"of": rule.ledger_digest_, "seed": seed})
        folder.mkdir(parents=True, exist_ok=True)
        fitted.save(path)
        return path
    subsets = len({run.subset_key for run in runs})
    remedy = "make more designed runs, or leave out --ledger (the rule is then the same for all seeds)"
    raise RequestError(message("--ledger", f"no bootstrap of its {subsets} subsets determines a fit ({cause})", remedy))
