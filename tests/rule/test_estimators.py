"""Estimators against scikit-learn, statsmodels and scipy: a refit's numbers must be the textbook's."""

from __future__ import annotations

import warnings
from itertools import combinations

import numpy as np
import pytest
import statsmodels.api as sm
from pool_ledger import pool_ledger, valley
from simulated_ledger import simulate
from sklearn.linear_model import ElasticNet, Ridge

from im_lightning.errors import RequestError
from im_lightning.ledger.run_table import gather
from im_lightning.rule.estimators.best_subset import best_subset
from im_lightning.rule.estimators.elastic_net import constrained, elastic_net
from im_lightning.rule.estimators.linear import PENALTIES, additive, ridge
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.validation import cross_validation as held_out
from im_lightning.rule.validation.cross_validation import Predictor, grouped_folds
from im_lightning.rule.validation.model_selection import Scheme, estimators_of, evaluate

ONES = np.ones(30)


def data(n=30, p=5, seed=0, collinear=0.3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * [1.0, 100.0, 0.01, 1.0, 5.0][:p] + [5.0, -300.0, 0.0, 2.0, 1.0][:p]
    x[:, 3] = x[:, 0] + collinear * rng.normal(size=n)
    y = 0.3 * x[:, 0] + 0.01 * x[:, 1] - 0.1 * x[:, 4] + 0.3 * rng.normal(size=n)
    return x, y


def standardised(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


@pytest.mark.parametrize("setting", [0, 5, 10])
def test_ridge_is_scikit_learns(setting):
    x, y = data()
    got = ridge(x, ONES).maps(np.arange(30), [setting]).coefficients(y, 0)
    expected = Ridge(alpha=30 * PENALTIES[setting]).fit(standardised(x), y)
    np.testing.assert_allclose(got[1:] * x.std(axis=0), expected.coef_, rtol=1e-8)
    np.testing.assert_allclose(got[0] + x @ got[1:], expected.predict(standardised(x)), rtol=1e-8)


def test_weighted_ridge_is_scikit_learns():
    """Weights of the runs change the mean and the cross products alike."""
    x, y = data()
    w = np.random.default_rng(1).uniform(0.5, 2.0, 30)
    got = ridge(x, w / w.mean()).maps(np.arange(30), [4]).coefficients(y, 0)
    expected = Ridge(alpha=w.sum() * PENALTIES[4]).fit(standardised(x), y, sample_weight=w)
    np.testing.assert_allclose(got[0] + x @ got[1:], expected.predict(standardised(x)), rtol=1e-8)


@pytest.mark.parametrize("setting", [2, 5, 8, 11])
def test_the_elastic_net_is_scikit_learns(setting):
    x, y = data()
    net = elastic_net(x, ONES)
    got = net.solve([np.arange(30)], y[:, None], final=True, only=setting)[0, 0, :, 0]
    share, mixture = net.settings[setting]
    z, target = standardised(x), (y - y.mean()) / y.std()
    alpha = share * np.abs(z.T @ target / 30).max() / mixture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ElasticNet(alpha=alpha, l1_ratio=mixture, tol=1e-14, max_iter=1_000_000).fit(z, target)
    np.testing.assert_allclose(got[1:] * x.std(axis=0) / y.std(), expected.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(got[0] + x @ got[1:], expected.predict(z) * y.std() + y.mean(), rtol=1e-8)


def test_at_the_largest_alpha_nothing_is_left():
    x, y = data()
    fits = elastic_net(x, ONES).solve([np.arange(30)], y[:, None], final=True)
    assert not fits[0, 0, 1:].any() and fits[0, -1, 1:].any()


def test_sign_constraints_are_scipys():
    from scipy.optimize import lsq_linear

    x, y = data()
    signs = np.array([-1, 1, 0, 1, 0])
    got = constrained("ols", x, ONES, signs, (0.0,)).solve([np.arange(30)], y[:, None], final=True)[0, 0, :, 0]
    full = np.column_stack([np.ones(30), standardised(x)])
    low = [-np.inf, -np.inf, 0, -np.inf, 0, -np.inf]
    high = [np.inf, 0, np.inf, np.inf, np.inf, np.inf]
    expected = lsq_linear(full, y, (low, high), tol=1e-14).x
    np.testing.assert_allclose(got[1:] * x.std(axis=0), expected[1:], rtol=1e-6, atol=1e-8)
    assert got[1] == 0.0 and got[4] > 0  # the first regressor's true sign is not allowed


def test_a_rule_keeps_the_signs_it_was_given():
    records = simulate(20)
    free = fit_rule(records)
    assert free.coef_[1] > 0
    for method in ("ols", "ridge", "elastic-net", "auto"):
        rule = fit_rule(records, method, signs={"ppl": -1}, permutations=0, bootstrap=0)
        assert rule.coef_[1] <= 0, method
    agreed = fit_rule(records, signs={"ppl": 1})
    np.testing.assert_allclose(agreed.coef_, free.coef_, rtol=1e-6)
    with pytest.raises(RequestError, match="signs: mtld is not among the regressors"):
        fit_rule(records, signs={"mtld": 1})
    with pytest.raises(RequestError, match="method best-subset: it does not take sign constraints"):
        fit_rule(records, "best-subset", signs={"ppl": 1})


def test_weights_of_runs_are_statsmodels_wls():
    records = simulate(20)
    w = {r.run_id: 0.5 + k % 3 for k, r in enumerate(records)}
    rule = fit_rule(records, weights=w)
    x = np.array([[r.phi_means[n] for n in rule.feature_names_in_] for r in records])
    y = np.log([r.loss("held-out") for r in records])
    values = np.array([w[r.run_id] for r in records])
    expected = sm.WLS(y, sm.add_constant(x), weights=values).fit()
    np.testing.assert_allclose([rule.intercept_, *rule.coef_], expected.params, rtol=1e-8)
    np.testing.assert_allclose([r["se"] for r in rule.coefficients_], expected.bse, rtol=1e-8)
    np.testing.assert_allclose(rule.coef_cov_, expected.cov_params(), rtol=1e-7)
    assert rule.metrics_.r2 == pytest.approx(expected.rsquared, rel=1e-8)
    scaled = sm.WLS(y, sm.add_constant(x), weights=values / values.mean()).fit()
    assert rule.metrics_.aic == pytest.approx(scaled.aic, rel=1e-8)
    with pytest.raises(RequestError, match="weights: no run of the fit has the id nobody"):
        fit_rule(records, weights={"nobody": 1.0})
    with pytest.raises(RequestError, match="weights: one is not a positive number"):
        fit_rule(records, weights={"run-001": 0.0})


def test_aic_bic_and_cooks_distance_are_statsmodels():
    from statsmodels.stats.outliers_influence import OLSInfluence

    records = simulate(25, noise=0.03)
    metrics = fit_rule(records).metrics_
    x = np.array([[r.phi_means[n] for n in ("length_output", "ppl", "knn_6")] for r in records])
    result = sm.OLS(np.log([r.loss("held-out") for r in records]), sm.add_constant(x)).fit()
    assert metrics.aic == pytest.approx(result.aic, rel=1e-9)
    assert metrics.bic == pytest.approx(result.bic, rel=1e-9)
    expected = OLSInfluence(result).cooks_distance[0]
    np.testing.assert_allclose([metrics.cook[r.run_id] for r in records], expected, rtol=1e-7)


def test_prediction_intervals_are_statsmodels_on_the_other_folds():
    records = simulate(24, noise=0.03)
    rows = fit_rule(records).metrics_.held_out
    x = sm.add_constant(np.array([[r.phi_means[n] for n in ("length_output", "ppl", "knn_6")] for r in records]))
    y = np.log([r.loss("held-out") for r in records])
    folds = grouped_folds([r.subset_key for r in records])
    for fold in np.unique(folds):
        inside = folds == fold
        frame = sm.OLS(y[~inside], x[~inside]).fit().get_prediction(x[inside])
        limits = frame.conf_int(obs=True, alpha=0.05)
        got = [[row["prediction"], row["low"], row["high"]] for row, i in zip(rows, inside, strict=True) if i]
        np.testing.assert_allclose(got, np.column_stack([frame.predicted_mean, limits]), rtol=1e-8)
    assert [row["run_id"] for row in rows] == [r.run_id for r in records]
    np.testing.assert_allclose([row["y"] for row in rows], y)


def test_ridges_standard_errors_are_those_of_its_linear_map():
    records = simulate(25, noise=0.03)
    rule = fit_rule(records, "ridge")
    x = np.array([[r.phi_means[n] for n in rule.feature_names_in_] for r in records])
    y = np.log([r.loss("held-out") for r in records])
    penalty = rule.metrics_.setting["penalty"]
    z = standardised(x)
    hat = np.linalg.solve(z.T @ z / 25 + penalty * np.eye(3), z.T / 25) / x.std(axis=0)[:, None]
    rows = np.vstack([np.full(25, 1 / 25) - x.mean(axis=0) @ hat, hat])
    np.testing.assert_allclose(rows @ y, [rule.intercept_, *rule.coef_], rtol=1e-8)
    full = np.column_stack([np.ones(25), x]) @ rows
    variance = ((y - full @ y) ** 2).sum() / (25 - np.trace(full))
    np.testing.assert_allclose(rule.coef_cov_, variance * rows @ rows.T, rtol=1e-6)
    assert rule.coefficients_[1]["p"] is None and rule.coefficients_[1]["vif"] > 1


def test_the_best_subset_is_what_trying_all_of_them_finds():
    x, y = data(collinear=0.05)
    found = {}
    for size in range(1, 6):
        fits = {s: sm.OLS(y, sm.add_constant(x[:, list(s)])).fit() for s in combinations(range(5), size)}
        best = max(fits, key=lambda s: fits[s].rsquared)
        if size == 1 or (fits[best].pvalues[1:] <= 0.05).all():
            found = best
    assert best_subset(x, y, ONES) == found
    assert len(found) < 5


def test_the_papers_procedure_says_what_it_is():
    rule = fit_rule(simulate(25, noise=0.03), "best-subset")
    assert rule.method == "best-subset"
    assert rule.metrics_.setting["kept"] == rule.feature_names_in_
    assert any(note.startswith("The paper's procedure") for note in rule.metrics_.notes)


def test_the_additive_rule_holds_the_linear_one():
    """Without bends it is ridge on the indicators, penalty by penalty."""
    records, _ = pool_ledger(30)
    fit = gather(records)
    linear, bent = ridge(fit.x, fit.weights), additive(fit.hats, fit.weights)
    straight = tuple(s[:, :3] for s in bent.spaces)
    only = type(bent)("additive", bent.x, bent.weights, straight[:1], bent.penalties)
    everyone = np.arange(30)
    for setting in range(len(PENALTIES)):
        a = linear.maps(everyone, [setting]).prediction_matrices(linear.x)[0] @ fit.y
        b = only.maps(everyone, [setting]).prediction_matrices(only.x)[0] @ fit.y
        np.testing.assert_allclose(b, a, rtol=1e-9)


def test_the_additive_rule_is_scikit_learns_ridge_in_its_own_coordinates():
    records, _ = pool_ledger(30, effect=valley)
    fit = gather(records)
    bent = additive(fit.hats, fit.weights)
    setting = 9
    space, penalty = bent.settings[setting]
    z = bent.x @ bent.spaces[space]
    expected = Ridge(alpha=30 * penalty).fit(z, fit.y).predict(z)
    maps = bent.maps(np.arange(30), [setting])
    np.testing.assert_allclose(maps.prediction_matrices(bent.x)[0] @ fit.y, expected, rtol=1e-9)
    b = maps.coefficients(fit.y, 0)
    np.testing.assert_allclose(b[0] + bent.x @ b[1:], expected, rtol=1e-8)


def test_nested_predictions_equal_explicit_refits():
    """The penalty of a held-out prediction may not know the runs it predicts."""
    records = simulate(24, noise=0.05, repeats=4)
    fit = gather(records)
    scheme = Scheme.of(fit)
    (estimator,) = estimators_of(fit, ["ridge"], None)
    parts, chosen = Predictor(estimator, scheme.grouped, scheme.folds).predict(fit.y[:, None])
    scale = fit.x.std(axis=0)
    z = (fit.x - fit.x.mean(axis=0)) / scale
    for split, part, setting in zip(scheme.grouped, parts, chosen, strict=True):
        errors = np.zeros(len(PENALTIES))
        for fold in np.unique(scheme.folds[split.train]):
            inside = split.train[scheme.folds[split.train] == fold]
            rest = np.setdiff1d(split.train, inside)
            for k, penalty in enumerate(PENALTIES):
                model = Ridge(alpha=len(rest) * penalty).fit(z[rest], fit.y[rest])
                errors[k] += ((model.predict(z[inside]) - fit.y[inside]) ** 2).sum()
        assert setting[0] == np.argmin(errors)
        model = Ridge(alpha=len(split.train) * PENALTIES[setting[0]]).fit(z[split.train], fit.y[split.train])
        np.testing.assert_allclose(part[:, 0], model.predict(z[split.test]), rtol=1e-8)
    row = evaluate(fit, scheme, estimator).row
    predicted = np.empty(24)
    means = np.empty(24)
    for split, part in zip(scheme.grouped, parts, strict=True):
        predicted[split.test], means[split.test] = part[:, 0], fit.y[split.train].mean()
    expected = 1 - ((fit.y - predicted) ** 2).sum() / ((fit.y - means) ** 2).sum()
    assert row["grouped_r2"] == pytest.approx(expected, rel=1e-9)
    assert row["grouped_rmse"] == pytest.approx(np.sqrt(((fit.y - predicted) ** 2).mean()), rel=1e-9)


def test_thousands_of_runs_are_held_out_without_their_hat_matrices(monkeypatch):
    """These grow with the square of the runs: 5,000 would want tens of gigabytes. The predictions are the same."""
    fit = gather(simulate(80, noise=0.05))
    scheme = Scheme.of(fit)
    y = np.column_stack([fit.y, fit.y[::-1]])
    for estimator in estimators_of(fit, ["ols", "ridge"], None):
        expected, settings = Predictor(estimator, scheme.grouped, scheme.folds).predict(y)
        with monkeypatch.context() as patch:
            patch.setattr(held_out, "_LARGE", 0)
            predictor = Predictor(estimator, scheme.grouped, scheme.folds)
            assert not predictor._matrices
            parts, chosen = predictor.predict(y)
        np.testing.assert_allclose(np.concatenate(parts), np.concatenate(expected), rtol=1e-10)
        np.testing.assert_array_equal(chosen, settings)


def test_many_responses_at_once_are_each_alone():
    """The permutation test predicts hundreds of responses together."""
    fit = gather(simulate(20, noise=0.05))
    scheme = Scheme.of(fit)
    rng = np.random.default_rng(0)
    y = np.column_stack([fit.y, *(rng.permutation(fit.y) for _ in range(3))])
    for estimator in estimators_of(fit, ["ols", "ridge", "elastic-net"], None):
        predictor = Predictor(estimator, scheme.grouped, scheme.folds)
        together = np.concatenate(predictor.predict(y)[0])
        for b in range(4):
            alone = np.concatenate(predictor.predict(y[:, b : b + 1])[0])[:, 0]
            np.testing.assert_allclose(together[:, b], alone, atol=2e-4 * fit.y.std())
