"""The additive rule end to end: from runs with basis means to a rule file, weights, a subset and predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pool_ledger import TRANSFORMS, pool_ledger, valley
from simulated_ledger import make_table, simulate

from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.transforms import (
    Transform,
    basis_means,
    bend_directions,
    hat_transforms,
    hat_values,
    knots_of,
    pool_knots,
)
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.sampling.selection.select import select_subset
from im_lightning.sampling.weights.quality_weights import quality_weights


@pytest.fixture(scope="module")
def made():
    return pool_ledger(40, effect=valley)


@pytest.fixture(scope="module")
def fitted(made) -> LinearRule:
    return fit_rule(made[0], "additive", permutations=50, bootstrap=60)


def test_hats_sum_to_one_and_hold_the_indicator():
    """Else the additive rule could say less than the linear one."""
    table = make_table(400)
    for name, knots in pool_knots(table, TRANSFORMS).items():
        phi = TRANSFORMS[name].apply(table.values[name])
        hats = hat_values(phi, knots)
        np.testing.assert_allclose(hats.sum(axis=1), 1.0)
        np.testing.assert_allclose(hats @ knots, phi)
        columns = [t.apply(table.values[name]) for t in hat_transforms(name, TRANSFORMS[name], knots).values()]
        np.testing.assert_allclose(np.column_stack(columns), hats[:, 1:], atol=1e-12)
        line, bends = bend_directions(knots)
        np.testing.assert_allclose(bends.T @ np.column_stack([np.ones(len(knots)), line, bends])[:, :2], 0, atol=1e-9)
        np.testing.assert_allclose(bends.T @ bends, np.eye(len(knots) - 2), atol=1e-12)


def test_knots_are_pool_quantiles_and_never_crowd():
    table = make_table(1000)
    knots = pool_knots(table, TRANSFORMS)["ppl"]
    phi = TRANSFORMS["ppl"].apply(table.values["ppl"])
    assert len(knots) == 7 and (knots[0], knots[-1]) == (0.5, 5.0)
    np.testing.assert_allclose(knots[1:-1], np.quantile(phi, np.arange(1, 6) / 6))
    table.values["knn_6"][:] = np.where(np.arange(1000) < 900, 0.5, 1.0)
    assert pool_knots(table, TRANSFORMS)["knn_6"] == [0.1, 0.5, 1.5]
    flat = {"knn_6": Transform("identity", 0.5, 0.5), "ppl": Transform("log")}
    assert pool_knots(table, flat) == {}


def test_basis_means_are_weighted_by_exposure_and_leave_out_what_is_missing():
    table = make_table(50)
    table.values["ppl"][3] = np.nan
    exposures = np.arange(50) % 3
    knots = pool_knots(table, TRANSFORMS)
    got = basis_means(table, TRANSFORMS, knots, exposures)["ppl"]
    hats = hat_values(TRANSFORMS["ppl"].apply(table.values["ppl"]), knots["ppl"])
    keep = np.arange(50) != 3
    np.testing.assert_allclose(got["means"], exposures[keep] @ hats[keep] / exposures[keep].sum())
    assert sum(got["means"]) == pytest.approx(1.0)


def test_it_sees_the_valley(fitted):
    """Predicted loss is high at both ends of the first indicator and low between, as the truth is."""
    table = make_table(3)
    table.values["length_output"][:], table.values["knn_6"][:] = 50.0, 0.7
    table.values["ppl"][:] = np.exp([0.6, 2.0, 4.5])
    low, middle, high = fitted.predict(table)
    assert middle < low - 0.1 and middle < high - 0.1
    assert fitted.metrics_.grouped_r2 > 0.5
    assert "effect at the knots" in fitted.summary(200)


def test_its_prediction_of_a_mean_is_the_mean_of_its_predictions(fitted):
    table = make_table(60)
    assert fitted.predict_mean(fitted.phi(table).mean(axis=0))[0] == pytest.approx(fitted.predict(table).mean())


def test_its_regressors_name_their_indicators(fitted):
    assert fitted.indicators == ["length_output", "ppl", "knn_6"]
    assert fitted.feature_names_in_[0] == "length_output[0]"
    assert fitted.columns[0] == "length_output"
    assert fitted.indicator_transforms["ppl"] == TRANSFORMS["ppl"]
    assert fitted.knots["ppl"] == knots_of([fitted.transforms_[n] for n in fitted.feature_names_in_ if "ppl" in n])
    assert "--indicators length_output,ppl,knn_6" in fitted.score_command()
    with pytest.raises(RequestError, match="it needs length_output, knn_6, and the table has no such column"):
        fitted.check(make_table(5, names=("ppl",)))


def test_the_rule_file_brings_it_back(fitted, made, tmp_path):
    fitted.save(tmp_path / "rule.json")
    read = LinearRule.load(tmp_path / "rule.json")
    assert read.feature_names_in_ == fitted.feature_names_in_ and read.transforms_ == fitted.transforms_
    assert read.identities == fitted.identities and set(read.identities) == {"length_output", "ppl", "knn_6"}
    assert read.metrics_ == fitted.metrics_ and read.coefficients_ == fitted.coefficients_
    np.testing.assert_array_equal(read.predict(made[1]), fitted.predict(made[1]))
    np.testing.assert_array_equal(read.edge(), fitted.edge())
    assert read.check(made[1]) == []


def test_its_region_is_in_the_means_of_the_indicators(fitted, made):
    """Over fifty hats of forty runs every dataset lies far out; over three indicators the runs' own pool does not."""
    records, table = made
    x = np.array([[r.phi_means[n] for n in fitted.indicators] for r in records])
    z = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    hats = np.array([[m for n in fitted.indicators for m in r.basis_means[n]["means"][1:]] for r in records])
    np.testing.assert_allclose(fitted.mahalanobis(hats), np.linalg.norm(z, axis=1), rtol=1e-6)
    assert fitted.mahalanobis(fitted.phi(table).mean(axis=0)) < fitted.radius_


def test_a_rule_file_of_the_first_schema_still_reads(tmp_path):
    fit_rule(simulate(20)).save(tmp_path / "rule.json")
    value = json.loads((tmp_path / "rule.json").read_text())
    value["schema_version"] = 1
    for one in value["regressors"]:
        del one["regressor"]
    (tmp_path / "rule.json").write_text(json.dumps(value))
    assert LinearRule.load(tmp_path / "rule.json").feature_names_in_ == ["length_output", "ppl", "knn_6"]


def test_tilted_weights_reach_its_edge_and_prefer_the_valley(fitted, made):
    """What the rule is for: rows between the bad extremes weigh more, and the drawn mean is predicted better."""
    table = made[1]
    result = quality_weights(table, fitted, budget=100)
    assert result.method == "tilt"
    phi = fitted.phi(table)
    report = result.report
    assert 0 < report["strength"] <= 1  # these runs lean so far that three sd of their means no rows would have
    target = np.array([report["target"][n] for n in fitted.feature_names_in_])
    np.testing.assert_allclose(result.weights @ phi, target, atol=1e-6)
    assert fitted.predict_mean(target)[0] < fitted.predict_mean(phi.mean(axis=0))[0]
    z = TRANSFORMS["ppl"].apply(table.values["ppl"])
    away = np.abs(z - z.mean())
    assert result.weights @ away < 0.97 * away.mean()
    rows = select_subset(table, fitted, 100)
    assert len(set(rows.tolist())) == 100 and away[rows].mean() < away.mean()


def test_runs_without_basis_means_are_refused_with_the_remedy(made):
    records = [RunRecord.from_json(r.to_json(), "r") for r in made[0]]
    records[2].basis_means = {}
    with pytest.raises(RequestError) as error:
        fit_rule(records, "additive")
    text = str(error.value)
    assert "method additive: 1 run (run-002) recorded no basis means of length_output, ppl, knn_6" in text
    assert "make the runs again with this version, which records them, or use --method auto or ridge" in text
    rule = fit_rule(records, "auto", permutations=0, bootstrap=0)
    assert rule.method != "additive"
    assert any(n.startswith("the additive rule was not considered: 1 run") for n in rule.metrics_.notes)
    records[2].basis_means = {**made[0][2].basis_means}
    records[2].basis_means["ppl"] = {"knots": [0.5, 2.0, 5.0], "means": [0.2, 0.5, 0.3]}
    with pytest.raises(RequestError, match="the knots of ppl differ between run-000 and run-002"):
        fit_rule(records, "additive")


def test_records_keep_basis_means_and_old_ones_have_none(made, tmp_path):
    ledger = RunLedger(tmp_path)
    ledger.add(made[0][0])
    assert ledger.records()[0].basis_means == made[0][0].basis_means
    old = simulate(1)[0]
    assert "basis_means" not in old.to_json()  # so that the digest of earlier ledgers stays what it was
    assert RunRecord.from_json(old.to_json(), "old").basis_means == {}
    value = made[0][0].to_json()
    value["basis_means"]["ppl"]["means"].pop()
    with pytest.raises(DataError, match=r"the field basis_means\.ppl is"):
        RunRecord.from_json(value, "x.json")


def test_a_weighted_run_records_the_rules_own_hats():
    """Else a later refit could not put runs weighted by it beside the designed ones."""
    records, table = pool_ledger(30, effect=valley)
    rule = fit_rule(records, "additive")
    scored = Regressors.of(table, rule)
    assert scored.names == rule.feature_names_in_ and scored.phi.shape == (len(table), len(scored.names))
    assert scored.transforms["ppl"] == TRANSFORMS["ppl"]
    assert scored.knots["ppl"] == rule.knots["ppl"]
    np.testing.assert_array_equal(scored.predicted, rule.predict(table))


def test_an_indicator_of_two_values_has_one_hat_and_no_bends():
    """A yes-or-no indicator (a reward of 0 or 1) beside ordinary ones must not stop the fit."""
    records, _ = pool_ledger(20)
    rng = np.random.default_rng(0)
    for record in records:
        share = float(rng.uniform(0.2, 0.8))
        record.phi_means["reward"] = share
        record.transforms["reward"] = {"kind": "identity", "low": 0.0, "high": 1.0}
        record.basis_means["reward"] = {"knots": [0.0, 1.0], "means": [1 - share, share]}
    rule = fit_rule(records, "additive")
    assert [n for n in rule.feature_names_in_ if n.startswith("reward")] == ["reward[0]"]
    assert rule.knots["reward"] == [0.0, 1.0] and np.isfinite(rule.coef_).all()
    only = fit_rule(records, "additive", indicators=["reward"])
    ridge = fit_rule(records, "ridge", indicators=["reward"])
    assert only.coef_[0] == pytest.approx(ridge.coef_[0], rel=1e-8)  # of one slope nothing is left but ridge
