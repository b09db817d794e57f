"""The law with an offset, L = c + exp(a + b·x), against scipy and a world whose law is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares
from simulated_ledger import make_table, simulate

from im_lightning.errors import RequestError
from im_lightning.rule.estimators.offset import METHODS, Offset
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.rule.validation.cross_validation import predictions


def law(n=60):
    """(x [n, 4], log losses [n]) of a law with an offset of 2 nats."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)) * np.array([1.0, 50.0, 0.02, 3.0]) + np.array([4.0, -200.0, 0.0, 1.0])
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    index = -0.5 + z @ np.array([0.6, -0.3, 0.2, 0.0])
    return x, np.log(2.0 + np.exp(index)) + 0.003 * rng.normal(size=n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("final", [False, True], ids=["as in a search", "to the end"])
def test_least_squares_is_scipys(method, final):
    """From scipy's best of several starts; a search stops early, and predicts the same within what it needs."""
    x, y = law()
    y[7] += 0.0 if method == "offset" else 0.4  # one run went wrong
    found = Offset(method, x, np.ones(len(y))).solve([np.arange(len(y))], y[:, None], final=final)[0, 0, :, 0]
    z = np.column_stack([np.ones(len(y)), (x - x.mean(axis=0)) / x.std(axis=0)])

    def missed(t):
        return np.log(t[-1] + np.exp(z @ t[:-1])) - y

    fits = [
        least_squares(missed, [*np.linalg.lstsq(z, np.log(np.exp(y) - c), rcond=None)[0], c], x_scale="jac",
                      bounds=([-np.inf] * 5 + [0], np.inf), xtol=1e-14, ftol=1e-14,
                      **({} if method == "offset" else {"loss": "huber", "f_scale": 1.345 * 0.003}))
        for c in np.exp(y).min() * np.array([0.1, 0.5, 0.9])
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.cost)
    expected = np.log(best.x[-1] + np.exp(z @ best.x[:-1]))
    got = np.log(found[-1] + np.exp(found[0] + x @ found[1:-1]))
    close = 1e-6 if method == "offset" and final else 2e-4 if method == "offset" else 1e-3  # Huber's width is estimated
    np.testing.assert_allclose(got, expected, atol=close)
    assert found[-1] == pytest.approx(best.x[-1], rel=1e-4 if method == "offset" and final else 0.05)


def test_many_responses_and_training_sets_are_fitted_as_one_by_one():
    """A permutation test fits a thousand at once."""
    x, y = law(n=40)
    estimator = Offset("offset", x, np.linspace(0.5, 1.5, 40))
    many = np.column_stack([y, y[::-1], np.roll(y, 5)])
    trains = [np.arange(30), np.arange(5, 40)]
    together = estimator.solve(trains, many, final=True)
    assert together.shape == (2, 1, 6, 3)
    for f, train in enumerate(trains):
        for b in range(3):
            one = estimator.solve([train], many[:, [b]], final=True)[0, 0, :, 0]
            got, expected = (predictions(c[:, None], x) for c in (together[f, 0, :, b], one))
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_too_few_runs_give_no_fit():
    """NaN, so that a rule is not held out where it cannot be."""
    x, y = law(n=12)
    assert np.isnan(Offset("offset", x, np.ones(12)).solve([np.arange(6)], y[:, None])).all()


def with_law(offset):
    """Records whose loss follows L = offset + exp(index) in two regressors."""
    records = simulate(60, seed=3)
    rng = np.random.default_rng(5)
    names = sorted(records[0].phi_means)[:2]
    x = np.array([[r.phi_means[n] for n in names] for r in records])
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    losses = offset + np.exp(-0.5 + z @ [1.0, -0.5] + 0.01 * rng.normal(size=len(z)))
    runs = []
    for record, loss in zip(records, losses, strict=True):
        sets = {name: {**value, "loss": float(loss)} for name, value in record.evaluation.items()}
        runs.append(replace(record, evaluation=sets, basis_means={}))
    return runs, names


def test_auto_takes_the_law_where_it_holds_out_better_and_only_there():
    """On runs that follow log L = a + b·x an offset buys nothing, and the simpler rule stays."""
    runs, names = with_law(2.0)
    rule = fit_rule(runs, "auto", names, permutations=0, bootstrap=60)
    assert rule.method == "offset" and rule.offset_ == pytest.approx(2.0, abs=0.05)
    low, high = (rule.metrics_.bootstrap["offset"][side] for side in ("low", "high"))
    assert low < 2.0 < high and high - low < 0.2
    assert "offset c (nats)" in rule.summary(120)
    rows = {row["method"]: row["grouped_r2"] for row in rule.metrics_.candidates}
    assert rows["offset"] > rows["ols"] + 0.02

    runs, names = with_law(0.0)
    assert fit_rule(runs, "auto", names, permutations=0, bootstrap=0).method == "ols"


def test_the_whole_selection_is_permuted_with_the_law_in_it():
    """Otherwise noise could pass for a law: the more forms are tried, the more one fits by chance."""
    runs, names = with_law(2.0)
    tested = fit_rule(runs, "auto", names, permutations=40, bootstrap=0).metrics_.permutation
    assert tested["permutations"] == 40 and tested["p"] < 0.05
    rng = np.random.default_rng(0)
    shuffled = rng.permutation([r.evaluation for r in runs])
    noise = [replace(r, evaluation=e) for r, e in zip(runs, shuffled, strict=True)]
    assert fit_rule(noise, "auto", names, permutations=40, bootstrap=0).beats_mean is False


def test_a_rule_with_an_offset_predicts_and_is_read_back(tmp_path):
    """The loss passes through the law everywhere; weights and region go by the index alone."""
    runs, names = with_law(2.0)
    rule = fit_rule(runs, "offset", names, bootstrap=60)
    assert rule.metrics_.grouped_r2 > 0.9
    x = np.array([[r.phi_means[n] for n in names] for r in runs])
    y = np.log([next(iter(r.evaluation.values()))["loss"] for r in runs])
    index = rule.intercept_ + x @ rule.coef_
    np.testing.assert_allclose(rule.log_loss(x), np.log(rule.offset_ + np.exp(index)))
    np.testing.assert_allclose(rule.log_loss(x), y, atol=0.05)
    estimate, se = rule.predict_mean(x[0])
    assert estimate == pytest.approx(rule.log_loss(x[0])) and 0 < se < 0.02, "the slopes of the law carry the error"

    rule.save(tmp_path / "rule.json")
    written = json.loads((tmp_path / "rule.json").read_text())
    assert written["schema_version"] == 4 and written["offset"] == rule.offset_
    again = LinearRule.load(tmp_path / "rule.json")
    np.testing.assert_array_equal(again.log_loss(x), rule.log_loss(x))
    assert again.predict_mean(x[0]) == rule.predict_mean(x[0])


def test_the_predictions_of_rows_pass_through_the_law():
    """What select ranks by, and what score --rule writes."""
    table = make_table(30)
    phi, names = Regressors.of(table, None), ["ppl", "knn_6"]
    coef = np.array([0.1, -0.2])
    rule = LinearRule("law", -0.5, coef, names, {n: phi.transforms[n] for n in names}, method="offset", offset_=1.5)
    expected = np.log(1.5 + np.exp(rule.intercept_ + rule.phi(table) @ coef))
    np.testing.assert_allclose(rule.predict(table), expected)
    np.testing.assert_array_equal(Regressors.of(table, rule).predicted, rule.predict(table))


def test_signs_cannot_be_constrained():
    runs, names = with_law(2.0)
    with pytest.raises(RequestError, match=r"method offset: it does not take sign constraints\. Fix: leave out signs"):
        fit_rule(runs, "offset", names, signs={names[0]: 1})


@pytest.mark.filterwarnings("error")
def test_a_fit_that_is_not_determined_predicts_nothing_without_a_warning() -> None:
    assert np.isnan(predictions(np.full((4, 1), np.nan), np.ones((3, 2)))).all()
