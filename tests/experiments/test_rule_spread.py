"""What the rule's arms would have come to with another ledger, against refits written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_ledger import make_table, simulate

from im_lightning._utils.rng import RULE_BOOTSTRAP, generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError
from im_lightning.experiments.compare.rule_spread import rule_spread
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.refits import bootstrapped_rules
from im_lightning.sampling.draws.systematic import inclusion_probabilities
from im_lightning.sampling.weights.mixture import mixed
from im_lightning.sampling.weights.quality_weights import Weighting, weights_of


def test_it_is_the_spread_of_the_resampled_rules_draws_as_the_rule_sees_them() -> None:
    records, table = simulate(24, noise=0.05), make_table(300)
    rule, how = fit_rule(records, bootstrap=0), Weighting()
    counts = table.values["length_output"] + 1
    found = rule_spread(rule, records, table, ["random", "weighted", "base"], None, round(30 * counts.mean()), how, 12)
    keys = list(dict.fromkeys(r.subset_key for r in records))
    phi, losses = rule.phi(table), []
    for k in range(12):
        times = np.bincount(generator(k, purpose=RULE_BOOTSTRAP).integers(0, 24, 24), minlength=24)
        drawn = [r for r in records if times[keys.index(r.subset_key)]]
        weights = {r.run_id: float(times[keys.index(r.subset_key)]) for r in drawn}
        other = fit_rule(drawn, weights=weights)
        w = weights_of(other.phi(table), other, how, 30, None).weights
        losses.append(float(rule.log_loss(w @ phi)))
    assert found == {"weighted": pytest.approx(np.std(losses, ddof=1), rel=1e-6)}
    assert rule_spread(rule, records, table, ["random", "longest"], None, 3000, how, 12) == {}
    assert rule_spread(rule, records, table, ["weighted"], None, 3000, how, 5) == {}, "five refits know no spread"


def test_a_mixture_holds_in_every_refits_draw() -> None:
    """Rows drawn within sources of given shares move otherwise than rows drawn from all."""
    records, plain = simulate(24, noise=0.05), make_table(300)
    sources = ["a" if k % 3 else "b" for k in range(300)]
    table = ScoreTable(plain.row, plain.id, sources, plain.values, keys=plain.keys)
    rule, how, mixture = fit_rule(records, bootstrap=0), Weighting(), {"a": 0.2, "b": 0.8}
    tokens = round(30 * (table.values["length_output"] + 1).mean())
    arms = ["weighted", "mix+rule", "mix"]
    found = rule_spread(rule, records, table, arms, None, tokens, how, 12, mixture=mixture)
    streams, losses = (generator(k, purpose=RULE_BOOTSTRAP) for k in range(12)), []
    for each in bootstrapped_rules(rule, records, streams, rule.indicators):
        assert not isinstance(each, InstructMiningError)
        w = mixed(weights_of(each.phi(table), each, how, 30, None), table.source, mixture).weights
        losses.append(float(rule.log_loss(inclusion_probabilities(w, 30) @ rule.phi(table) / 30)))
    assert found.keys() == {"weighted", "mix+rule"} and found["mix+rule"] != found["weighted"]
    assert found["mix+rule"] == pytest.approx(np.std(losses, ddof=1), rel=1e-6)
