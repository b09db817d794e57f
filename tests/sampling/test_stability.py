"""If these failed, a choice of rows that other runs would not have made would look like knowledge."""

from __future__ import annotations

import json
import re
from itertools import repeat

import numpy as np
import pytest
import statsmodels.api as sm
from simulated_ledger import make_table, simulate

from im_lightning._utils.rng import RULE_BOOTSTRAP, generator
from im_lightning.errors import RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule
from im_lightning.rule.refits import bootstrapped_rules, runs_of
from im_lightning.sampling.draws.systematic import inclusion_probabilities
from im_lightning.sampling.selection.select import select_subset
from im_lightning.sampling.selection.stability import selection_stability, stability_lines
from im_lightning.sampling.weights.quality_weights import quality_weights

RECORDS = simulate(40, noise=0.03, repeats=4)
RULE = fit_rule(RECORDS)
TABLE = make_table(500)


def refitted(records, rule, resamples, seed=0) -> list[LinearRule]:
    """The rules that `selection_stability` compares."""
    indicators = [row["indicator"] for row in rule.metrics_.univariate]
    streams = repeat(generator(seed, purpose=RULE_BOOTSTRAP), resamples)
    return [r for r in bootstrapped_rules(rule, records, streams, indicators) if isinstance(r, LinearRule)]


def test_a_bootstrapped_rule_is_the_fit_of_the_resampled_runs() -> None:
    """Against least squares on the resample written out run by run; repeats of a subset come and go together."""
    found = list(refitted(RECORDS, RULE, 12, seed=3))
    data = gather(RECORDS)
    keys = list(dict.fromkeys(data.groups))
    rng = generator(3, purpose=RULE_BOOTSTRAP)
    for rule in found:
        picks = rng.integers(0, len(keys), len(keys))
        inside = [[i for i, group in enumerate(data.groups) if group == keys[pick]] for pick in picks]
        x, y = (np.array([v[runs].mean(axis=0) for runs in inside]) for v in (data.x, data.y))
        expected = sm.OLS(y, sm.add_constant(x)).fit().params
        np.testing.assert_allclose([rule.intercept_, *rule.coef_], expected, rtol=1e-7)
    assert len({tuple(rule.coef_) for rule in found}) == 12


def test_top_rows_in_common_are_counted() -> None:
    told = selection_stability(TABLE, RULE, RECORDS, 50, 12, "top", seed=1)
    own = set(select_subset(TABLE, RULE, 50, "top", 1).tolist())
    overlaps, correlations = [], []
    for rule in refitted(RECORDS, RULE, 12, seed=1):
        other = set(select_subset(TABLE, rule, 50, "top", 1).tolist())
        overlaps.append(len(own & other) / len(own | other))
        masks = np.array([[i in rows for i in range(500)] for rows in (own, other)], dtype=float)
        correlations.append(np.corrcoef(masks)[0, 1])
    assert told["jaccard"]["mean"] == pytest.approx(np.mean(overlaps))
    assert told["jaccard"]["low"] == pytest.approx(np.quantile(overlaps, 0.025))
    assert told["weight_correlation"]["mean"] == pytest.approx(np.mean(correlations))
    assert told["jaccard_redrawn"] is None and told["jaccard_random"] == pytest.approx(50 / 950)
    assert set(np.round(list(told["effective_rows"].values()), 9)) == {50.0}
    assert json.loads(json.dumps(told)) == told


def test_weights_overlap_by_the_chance_of_each_row() -> None:
    told = selection_stability(TABLE, RULE, RECORDS, 100, 12, seed=2)
    weights = quality_weights(TABLE, RULE, budget=100).weights
    chance = inclusion_probabilities(weights, 100)
    overlaps, correlations, sizes = [], [], []
    for rule in refitted(RECORDS, RULE, 12, seed=2):
        other = quality_weights(TABLE, rule, budget=100).weights
        included = inclusion_probabilities(other, 100)
        overlaps.append(np.minimum(chance, included).sum() / np.maximum(chance, included).sum())
        correlations.append(np.corrcoef(weights, other)[0, 1])
        sizes.append(1 / (other**2).sum())
    assert told["jaccard"]["mean"] == pytest.approx(np.mean(overlaps))
    assert told["weight_correlation"]["high"] == pytest.approx(np.quantile(correlations, 0.975))
    assert told["effective_rows"]["rule"] == pytest.approx(1 / (weights**2).sum())
    assert told["effective_rows"]["mean"] == pytest.approx(np.mean(sizes))
    uniform = np.full(500, 0.2)
    expected = np.minimum(chance, uniform).sum() / np.maximum(chance, uniform).sum()
    assert told["jaccard_random"] == pytest.approx(expected) and told["jaccard"]["mean"] > expected
    redrawn = [set(select_subset(TABLE, RULE, 100, seed=k).tolist()) for k in range(2, 8)]
    shared = [len(redrawn[0] & r) / len(redrawn[0] | r) for r in redrawn[1:]]
    assert told["jaccard_redrawn"] == pytest.approx(np.mean(shared))


def test_leverage_is_that_of_a_further_run_with_the_subsets_means() -> None:
    told = selection_stability(TABLE, RULE, RECORDS, 50, 12, "top")
    means = RULE.phi(TABLE)[select_subset(TABLE, RULE, 50, "top")].mean(axis=0)
    x = sm.add_constant(gather(RECORDS).x)
    row = np.concatenate([[1.0], means])
    assert told["leverage"]["rule"] == pytest.approx(row @ np.linalg.inv(x.T @ x) @ row, rel=1e-6)
    hat = np.einsum("ij,jk,ik->i", x, np.linalg.inv(x.T @ x), x)
    assert told["largest_run_leverage"] == pytest.approx(hat.max(), rel=1e-6)
    assert told["distance"]["rule"] == pytest.approx(RULE.mahalanobis(means))
    text = "\n".join(stability_lines(told))
    assert "THE SUBSET LIES OUTSIDE the runs" in text, "the top rows of a rule always do"
    inside = selection_stability(TABLE, RULE, RECORDS, 100, 12)
    assert "OUTSIDE" not in "\n".join(stability_lines(inside))


def test_noisier_runs_make_a_less_stable_choice() -> None:
    steady = simulate(40, noise=0.003)
    shaky = simulate(40, noise=0.2)
    found = [selection_stability(TABLE, fit_rule(r), r, 100, 12, "top")["jaccard"]["mean"] for r in (steady, shaky)]
    assert found[0] > 0.9 and found[1] < 0.75


@pytest.mark.parametrize("method", ["ridge", "elastic-net", "best-subset"])
def test_rules_are_refitted_by_their_own_method(method: str) -> None:
    rule = fit_rule(RECORDS, method)
    found = list(refitted(RECORDS, rule, 3))
    assert [r.method for r in found] == [method] * 3
    assert selection_stability(TABLE, rule, RECORDS, 50, 10, "top")["replicates"] == 10


def test_an_additive_rule_is_refitted_on_its_hats() -> None:
    """Its regressors are hats and its indicators three; leverage then is in the space of the hats."""
    from im_lightning.indicators.transforms import basis_means, default_transforms, mean_phi, pool_knots

    rng, records = np.random.default_rng(0), simulate(30)
    transforms = default_transforms(TABLE)
    knots = pool_knots(TABLE, transforms)
    for record in records:
        exposures = np.bincount(rng.choice(500, 20, replace=False), minlength=500)
        record.phi_means = mean_phi(TABLE, transforms, exposures)
        record.transforms = {n: t.to_json() for n, t in transforms.items()}
        record.basis_means = basis_means(TABLE, transforms, knots, exposures)
        loss = 1.0 + 0.3 * record.phi_means["ppl"] + 0.003 * rng.standard_normal()
        record.evaluation["held-out"]["loss"] = float(np.exp(loss))
    rule = fit_rule(records, "additive")
    told = selection_stability(TABLE, rule, records, 50, 10, "top")
    assert told["replicates"] == 10 and told["jaccard"]["mean"] > 3 * told["jaccard_random"]
    found = list(refitted(records, rule, 2))
    assert all(r.method == "additive" and r.feature_names_in_ == rule.feature_names_in_ for r in found)
    assert told["leverage"]["rule"] is not None and told["leverage"]["rule"] > 1 / 30


def test_what_cannot_be_judged_is_refused(tmp_path) -> None:
    for method in ("random", "by-source", "mix+rule"):
        match = re.escape(f"method {method}: what it takes is not decided by a rule alone")
        with pytest.raises(RequestError, match=f"{match}.*use one of weighted, top, worst"):
            selection_stability(TABLE, RULE, RECORDS, 50, method=method)
    with pytest.raises(RequestError, match="does not name the runs"):
        runs_of(load_rule("instructmining-v3"), RECORDS)
    book = RunLedger(tmp_path)
    for record in RECORDS[:37]:
        book.add(record)
    with pytest.raises(RequestError, match=r"3 of the 40 runs behind it are not in the ledger \(run-037"):
        runs_of(RULE, book)
    few = simulate(6)
    with pytest.raises(RequestError, match=r"of 20 resamples of its 6 subsets give a rule"):
        selection_stability(TABLE, fit_rule(few), few, 50, 20)


def test_uniform_weights_have_no_correlation_to_speak_of() -> None:
    """A strength of 0 is asked for to see what uniform weights look like; the words must not fail over it."""
    told = selection_stability(TABLE, RULE, RECORDS, 50, 12, strength=0.0)
    assert told["weight_correlation"]["mean"] is None and told["jaccard"]["mean"] == pytest.approx(1.0)
    assert "correlation of the weights not defined (the rule's own are uniform)" in stability_lines(told)[0]
    nothing = simulate(24, seed=3, coef=dict.fromkeys(("ppl", "length_output", "knn_6"), 0.0), noise=0.03)
    rule = fit_rule(nothing, "elastic-net")
    for other in refitted(nothing, rule, 12, seed=0):
        if not other.coef_.any():
            break
    else:
        raise AssertionError("no resample left all coefficients at 0")
    rule.coef_ = np.array([0.1, -0.1, 0.1])
    told = selection_stability(TABLE, rule, nothing, 50, 12, weighting="softmax")
    assert -1 <= told["weight_correlation"]["low"] <= 0.0 <= told["weight_correlation"]["high"] <= 1
    assert "correlation of the weights " in stability_lines(told)[0]


def test_resampled_best_subsets_choose_from_the_rows_that_the_rule_can_judge() -> None:
    """One may keep other indicators; rows that lack the rule's own have no place in its region."""
    records = simulate(24, seed=1, noise=0.15)
    rule = fit_rule(records, "best-subset")
    kept = {frozenset(r.feature_names_in_) for r in refitted(records, rule, 12)}
    assert any(not set(rule.feature_names_in_) <= names for names in kept)
    table = make_table(500)
    for name in rule.feature_names_in_:
        table.values[name][::7] = np.nan
    told = selection_stability(table, rule, records, 50, 12, "top")
    assert told["distance"]["mean"] > 0 and "lies" in " ".join(stability_lines(told))


def test_runs_of_a_rule_are_found_among_others(tmp_path) -> None:
    book = RunLedger(tmp_path)
    for record in [*RECORDS, *simulate(5, seed=9, first=80, purpose="weighted")]:
        book.add(record)
    assert [r.run_id for r in runs_of(RULE, book)] == [r.run_id for r in RECORDS]
