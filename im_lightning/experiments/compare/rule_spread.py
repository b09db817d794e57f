"""How far the rule's arms would have come out elsewhere with another ledger of the same design.

All seeds train on rows of one rule, so their spread says nothing about the rule, and dividing it by more seeds does not
help. The rule is fitted again on its subsets drawn with replacement, each such rule chooses from the same candidates,
and the rule itself says which log loss their mean indicators would give (a plug-in bootstrap). No finetune is made for
it; it is as good as the rule's law is right inside the region.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.rng import RULE_BOOTSTRAP, generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.refits import bootstrapped_rules
from im_lightning.sampling.draws.systematic import group_sums, inclusion_probabilities
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.weights.mixture import mixed
from im_lightning.sampling.weights.quality_weights import Weighting, weights_of

DRAWS = 40
_FEWEST = 10


def decided_by_rule(arms: Iterable[str]) -> list[str]:
    """The arms whose rows another fit of the rule would change."""
    methods = {arm: METHODS[arm] for arm in arms if arm in METHODS}
    return [a for a, m in methods.items() if m.ruled and not m.by_source and (m.needs_rule or not m.mixture)]


def rule_spread(
    rule: LinearRule,
    runs: Sequence[RunRecord],
    table: ScoreTable,
    arms: Iterable[str],
    candidates: Sequence[int] | None,
    tokens: int,
    how: Weighting,
    draws: int = DRAWS,
    seed: int = 0,
    prompts: NDArray[np.int64] | None = None,
    mixture: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Arm → sd of log loss over rules from other ledgers; arms that no rule decides are left out.

    Args:
        rule: The rule.
        runs: Those it was fitted on.
        table: Scores of the pool.
        arms: Names of methods of selection, among others.
        candidates: Rows of the pool that one seed chooses from; None for all.
        tokens: Of an arm.
        how: The weighting of arms that draw by weights.
        draws: Refits.
        seed: Of the resamples.
        prompts: The prompt of each row, where one row of each is taken at most.
        mixture: Shares of the sources, of the arm mix+rule.
    """
    ruled = decided_by_rule(arms)
    lengths = table.values.get("length_output")
    if not ruled or lengths is None:
        return {}
    phi, counts = rule.phi(table), lengths + 1.0
    usable = np.isfinite(table.matrix(table.indicators)).all(axis=1) & np.isfinite(phi).all(axis=1)
    if candidates is not None:
        usable &= np.isin(np.arange(len(table)), candidates)
    most = int(usable.sum()) - 1 if prompts is None else len(np.unique(prompts[usable]))
    budget = max(1, min(round(tokens / float(counts[usable].mean())), most))

    def mean_of(by: LinearRule, arm: str) -> np.ndarray:
        if METHODS[arm].weighted:  # "diverse" too: its candidates are drawn by the weights
            made = weights_of(by.phi(table), by, how, budget, usable)
            w = (mixed(made, table.source, mixture) if mixture and METHODS[arm].mixture else made).weights
            enough = budget <= np.count_nonzero(group_sums(w, prompts))
            chances = inclusion_probabilities(w, budget, prompts) if enough else w
            return np.asarray(chances[usable] @ phi[usable] / chances[usable].sum())
        rows = choose_rows(table, by, budget, arm, seed, how, usable, prompts=prompts).rows
        return np.asarray(phi[rows].mean(axis=0))

    found: dict[str, list[float]] = {arm: [] for arm in ruled}
    indicators = [row["indicator"] for row in rule.metrics_.univariate] or rule.indicators
    streams = (generator(seed + k, purpose=RULE_BOOTSTRAP) for k in range(draws))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forty rules' warnings help nobody
        for each in bootstrapped_rules(rule, runs, streams, indicators):
            if not isinstance(each, InstructMiningError):
                for arm in ruled:
                    found[arm].append(float(rule.log_loss(mean_of(each, arm))))
    return {arm: float(np.std(values, ddof=1)) for arm, values in found.items() if len(values) >= _FEWEST}
