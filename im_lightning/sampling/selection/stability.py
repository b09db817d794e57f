"""Selection stability: how much of what a rule chooses would be chosen again, had other subsets been finetuned on.

The rule is fitted again on its own subsets drawn with replacement (all runs of a subset together), and each such rule
weighs and chooses from the same pool. A rule may predict held-out losses well and still choose unsteadily, where many
directions of the pool are predicted nearly alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from im_lightning._utils.files import plain
from im_lightning._utils.rng import RULE_BOOTSTRAP, generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.refits import bootstrapped_rules, runs_of
from im_lightning.sampling.draws.systematic import Floats, Rows, checked_groups, inclusion_probabilities
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.weights.quality_weights import Weighting, effective_sample_size, weights_of

STEADY = ("weighted", "top", "worst")
FEWEST = 10
"""Resampled rules needed for a range over them."""
SLACK = 1.1
"""A drawn subset's mean scatters around that of its weights, so only what lies clearly beyond the runs is outside."""


@dataclass(frozen=True)
class _Choice:
    """What one rule chooses: weights [N], sum 1; inclusion probabilities [N]; rows [budget]."""

    weights: Floats
    included: Floats
    rows: Rows


def selection_stability(
    table: ScoreTable,
    rule: LinearRule,
    records: Iterable[RunRecord] | RunLedger,
    budget: int,
    replicates: int = 50,
    method: str = "weighted",
    seed: int = 0,
    weighting: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    eligible: ArrayLike | None = None,
    prompts: ArrayLike | None = None,
) -> dict[str, Any]:
    """How steady the choice of rows is over bootstrapped rules, JSON-like.

    Args:
        table: Scores of the pool, N rows.
        rule: The rule; its method and indicators are those of the refits.
        records: The runs it was fitted on, or a ledger that has them.
        budget: Rows to choose.
        replicates: Bootstrapped rules.
        method: "weighted", "top" or "worst", as `select_subset`.
        seed: Of the resamples and the draws.
        weighting, strength, temperature, floor, eligible, prompts: As `select_subset`.

    Returns:
        `replicates` that gave a rule and `failed` ones. Each of these is {rule, mean, low, high}: the value of the
        rule itself where it has one, mean and 2.5 to 97.5 % range over the bootstrapped rules:
        `jaccard`: overlap with what the rule chooses, Σ min(π, π′) / Σ max(π, π′) over rows, π the probability that a
        row is drawn (for top and worst the share of rows in common of those in either);
        `weight_correlation`: Pearson correlation of the weights with the rule's (of 0 and 1 for top and worst), 0 for
        uniform weights; None where the rule's own are uniform;
        `effective_rows`: Kish's effective sample size of the weights, in rows;
        `distance`: Mahalanobis distance of the chosen subset's mean from the mean of the *rule's* runs; `leverage`: its
        leverage in their least-squares fit, 1/n + distance² / (n − 1); both None for a rule without a region.
        `jaccard_random`: the same overlap with uniform weights (for top and worst: with a random subset), which is what
        a rule that knows nothing would have. `jaccard_redrawn`: realised overlap of draws by the rule's own weights
        with other seeds, None for top and worst. `largest_run_distance`, `largest_run_leverage`: of
        the rule's runs.

    Raises:
        RequestError: the records are not the rule's; another method; fewer than 10 resamples give a rule.
    """
    if method not in STEADY:
        cause = "what it takes is not decided by a rule alone"
        raise RequestError(message(f"method {method}", cause, f"use one of {', '.join(STEADY)}, or no stability"))
    used = runs_of(rule, records)
    allowed = np.isfinite(
        rule.predict(table)
    )  # a best subset of a resample may need fewer columns: the same rows for all
    if eligible is not None:
        allowed = allowed & np.asarray(eligible, dtype=bool)
    asked = Weighting(weighting, strength, temperature, floor)
    groups = None if prompts is None else checked_groups(np.asarray(prompts), len(table))

    def choose(by: LinearRule, draw: int) -> _Choice:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fifty rules' warnings help nobody
            rows = choose_rows(table, by, budget, method, draw, asked, allowed, prompts=prompts).rows
            if method != "weighted":
                mask = np.bincount(rows, minlength=len(table)).astype(np.float64)
                return _Choice(mask / mask.sum(), mask, rows)
            w = weights_of(by.phi(table), by, asked, budget, allowed).weights
        return _Choice(w, inclusion_probabilities(w, budget, groups), rows)

    own = choose(rule, seed)
    overlaps, correlations, sizes, rows = list[float](), list[float](), list[float](), [own.rows]
    indicators = [row["indicator"] for row in rule.metrics_.univariate] or rule.indicators
    streams = repeat(generator(seed, purpose=RULE_BOOTSTRAP), replicates)
    for each in bootstrapped_rules(rule, used, streams, indicators):
        if isinstance(each, InstructMiningError):
            continue
        one = choose(each, seed)  # one at a time: the weights are as long as the pool
        overlaps.append(_overlap(own.included, one.included))
        correlations.append(_correlation(own.weights, one.weights))
        sizes.append(effective_sample_size(one.weights))
        rows.append(one.rows)
    if len(overlaps) < FEWEST:
        subsets = len({r.subset_key for r in used})
        cause = f"{len(overlaps)} of {replicates} resamples of its {subsets} subsets give a rule"
        remedy = "make more designed runs, or resample more"
        raise RequestError(message(f"stability of rule {rule.title}", cause, remedy))
    redrawn, random = None, budget / (2 * int(allowed.sum()) - budget)
    if method == "weighted":
        redrawn = float(np.mean([_jaccard(own.rows, choose(rule, seed + k).rows) for k in range(1, 6)]))
        random = _overlap(own.included, inclusion_probabilities(allowed.astype(np.float64), budget, groups))
    return plain(
        {
            "budget": budget,
            "method": method,
            "replicates": len(overlaps),
            "failed": replicates - len(overlaps),
            "jaccard": _range(overlaps),
            "jaccard_random": random,
            "jaccard_redrawn": redrawn,
            "weight_correlation": _range(correlations),
            "effective_rows": _range(sizes, effective_sample_size(own.weights)),
            **_extrapolation(table, rule, rows),
        }
    )


def stability_lines(found: dict[str, Any]) -> list[str]:
    """What a person should know, one sentence each."""
    overlap, weights = found["jaccard"], found["weight_correlation"]
    beside = f"a rule that knows nothing has {found['jaccard_random']:.2f}"
    failed = f" ({found['failed']} more resamples could not be fitted)" if found["failed"] else ""
    lines = [
        f"stability over {found['replicates']} bootstrapped rules{failed}: overlap of the chosen rows (Jaccard) "
        f"{_text(overlap)}, {beside}; correlation of the weights {_text(weights)}"
    ]
    ess = found["effective_rows"]
    lines.append(f"effective sample size {ess['rule']:,.0f} rows, {ess['low']:,.0f} to {ess['high']:,.0f} over them")
    if found["leverage"] is not None:
        lever, distance = found["leverage"], found["distance"]
        lines.append(
            f"the subset's mean lies {distance['rule']:.2f} from the runs' mean ({distance['low']:.2f} to "
            f"{distance['high']:.2f}; Mahalanobis), leverage {lever['rule']:.2f} where the runs reach "
            f"{found['largest_run_leverage']:.2f}"
        )
        if distance["rule"] > SLACK * found["largest_run_distance"]:
            lines.append("THE SUBSET LIES OUTSIDE the runs that the rule was fitted on: its predicted loss is a guess")
    return lines


def _extrapolation(table: ScoreTable, rule: LinearRule, chosen: list[Rows]) -> dict[str, Any]:
    """Distance and leverage of the chosen subsets' means, the rule's own first."""
    n = rule.n_runs_
    if not rule.has_region or n < 2:
        return {"distance": None, "leverage": None, "largest_run_distance": None, "largest_run_leverage": None}
    phi = rule.phi(table)
    means = np.array([phi[rows].mean(axis=0) for rows in chosen])
    distances = np.asarray(rule.mahalanobis(means))
    levers = 1.0 / n + distances**2 / (n - 1)
    largest = float(rule.metrics_.largest_distance or rule.radius_ or 0.0)
    return {
        "distance": _range(distances[1:], distances[0]),
        "leverage": _range(levers[1:], levers[0]),
        "largest_run_distance": largest,
        "largest_run_leverage": 1.0 / n + largest**2 / (n - 1),
    }


def _overlap(one: Floats, other: Floats) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _jaccard(one: Rows, other: Rows) -> float:
    common = len(np.intersect1d(one, other))
    return common / (len(one) + len(other) - common)


def _correlation(own: Floats, other: Floats) -> float:
    """Pearson's; 0 where the other weights are uniform, NaN where the rule's own are."""
    if not own.max() - own.min() > 1e-12 * own.max():
        return float("nan")
    if not other.max() - other.min() > 1e-12 * other.max():
        return 0.0
    a, b = own - own.mean(), other - other.mean()
    return float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))


def _range(values: ArrayLike, rule: float | None = None) -> dict[str, float | None]:
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [0.025, 0.975])
    return {"rule": rule, "mean": float(np.mean(np.asarray(values))), "low": float(low), "high": float(high)}


def _text(told: dict[str, Any]) -> str:
    if told["mean"] is None:
        return "not defined (the rule's own are uniform)"
    return f"{told['mean']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
