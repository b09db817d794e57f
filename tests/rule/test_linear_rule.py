"""The rule itself: predictions, the edge of its evidence, and when it refuses to be applied."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
from simulated_ledger import make_record, make_table, simulate

from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule


@pytest.fixture(scope="module")
def fitted() -> LinearRule:
    return fit_rule(simulate(30))


def plain_rule(**changes) -> LinearRule:
    fields = {
        "name": "r",
        "intercept_": 0.5,
        "coef_": np.array([1.0, -2.0]),
        "feature_names_in_": ["ppl", "knn_6"],
        "transforms_": {"ppl": Transform("log", 1.0, 3.0), "knn_6": Transform("identity")},
    }
    return LinearRule(**{**fields, **changes})


def test_predict_is_the_formula_row_by_row_and_missing_stays_missing():
    table = make_table(50)
    table.values["knn_6"][4] = np.nan
    got = plain_rule().predict(table)
    for i in range(50):
        if i == 4:
            assert math.isnan(got[i])
            continue
        phi = min(max(math.log(table.values["ppl"][i]), 1.0), 3.0)
        assert got[i] == pytest.approx(0.5 + phi - 2 * table.values["knn_6"][i], rel=1e-14)


def test_a_missing_value_is_missing_even_under_a_zero_coefficient():
    table = make_table(3)
    table.values["knn_6"][1] = np.nan
    assert np.isnan(plain_rule(coef_=np.array([1.0, 0.0])).predict(table)).tolist() == [False, True, False]


def test_prediction_of_a_mean_is_the_mean_of_predictions(fitted):
    """The rule speaks about dataset means; the two ways to apply it must be one."""
    table = make_table(60)
    estimate, se = fitted.predict_mean(fitted.phi(table).mean(axis=0))
    assert estimate == pytest.approx(fitted.predict(table).mean(), rel=1e-12)
    assert se > 0


def test_standard_error_of_a_predicted_mean_equals_statsmodels(fitted):
    import statsmodels.api as sm

    records = simulate(30)
    x = np.array([[r.phi_means[n] for n in fitted.feature_names_in_] for r in records])
    result = sm.OLS(np.log([r.loss("held-out") for r in records]), sm.add_constant(x)).fit()
    at = x.mean(axis=0) + 0.1
    expected = result.get_prediction(np.r_[1.0, at][None])
    estimate, se = fitted.predict_mean(at)
    np.testing.assert_allclose([estimate, se], [expected.predicted_mean[0], expected.se_mean[0]], rtol=1e-8)


def test_the_interval_of_one_more_run_equals_statsmodels(fitted):
    """A new run scatters around the mean prediction: the interval of the mean alone would be too narrow."""
    import statsmodels.api as sm

    records = simulate(30)
    x = np.array([[r.phi_means[n] for n in fitted.feature_names_in_] for r in records])
    result = sm.OLS(np.log([r.loss("held-out") for r in records]), sm.add_constant(x)).fit()
    at = x.mean(axis=0) + 0.1
    limits = result.get_prediction(np.r_[1.0, at][None]).conf_int(obs=True, alpha=0.1)[0]
    np.testing.assert_allclose(fitted.predict_interval(at, 0.9)[1:], limits, rtol=1e-8)
    ridge = fit_rule(records, "ridge")
    estimate, low, high = ridge.predict_interval(at)
    assert low < estimate < high and high - estimate > 2 * ridge.metrics_.grouped_rmse
    assert plain_rule().predict_interval([1.0, 2.0])[1:] == (None, None)


def test_edge_lies_on_the_ellipsoid_and_no_point_of_it_is_predicted_lower(fitted):
    """A target outside the ellipsoid would leave the region that the runs speak about."""
    edge = fitted.edge()
    assert fitted.mahalanobis(edge) == pytest.approx(fitted.reach_, rel=1e-9) and fitted.reach_ <= fitted.radius_
    rng = np.random.default_rng(1)
    root = np.linalg.cholesky(fitted.cov_)
    u = rng.standard_normal((2000, 3))
    others = fitted.mean_ + fitted.reach_ * (u / np.linalg.norm(u, axis=1, keepdims=True)) @ root.T
    assert fitted.predict_mean(edge)[0] <= (fitted.intercept_ + others @ fitted.coef_).min() + 1e-12


def test_edge_without_a_direction_is_the_mean(fitted):
    flat = copy.copy(fitted)
    flat.coef_ = np.zeros(3)
    np.testing.assert_array_equal(flat.edge(), fitted.mean_)


def test_mahalanobis_equals_the_inverse_where_there_is_one(fitted):
    points = fitted.mean_ + np.random.default_rng(2).normal(size=(7, 3))
    gap = points - fitted.mean_
    expected = np.sqrt(np.einsum("ij,jk,ik->i", gap, np.linalg.inv(fitted.cov_), gap))
    np.testing.assert_allclose(fitted.mahalanobis(points), expected, rtol=1e-9)
    assert isinstance(fitted.mahalanobis(points[0]), float)


def test_mahalanobis_leaves_out_directions_without_evidence():
    """Two regressors that always move together: a step against both is not infinitely far, it is unknown."""
    rule = plain_rule(mean_=np.zeros(2), cov_=np.array([[4.0, 2.0], [2.0, 1.0]]), radius_=2.0)
    assert rule.region_rank == 1
    assert rule.mahalanobis([2.0, 1.0]) == pytest.approx(1.0)
    assert rule.mahalanobis([2.0, -1.0]) == pytest.approx(0.0, abs=1e-7)


def test_mahalanobis_does_not_depend_on_units(fitted):
    scale = np.array([1e6, 1.0, 1e-6])
    scaled = copy.copy(fitted)
    scaled.mean_, scaled.cov_ = fitted.mean_ * scale, fitted.cov_ * np.outer(scale, scale)
    assert scaled.region_rank == 3
    assert scaled.mahalanobis((fitted.mean_ + 0.1) * scale) == pytest.approx(fitted.mahalanobis(fitted.mean_ + 0.1))


@pytest.mark.parametrize("repeats", [0, 6])
def test_the_radius_holds_the_runs_as_it_would_hold_coming_ones(repeats):
    """19 of 20 runs lie within it, each measured from the mean and covariance of the other subsets' runs alone."""
    records = simulate(60, repeats=repeats)
    rule = fit_rule(records)
    x = np.array([[r.phi_means[k] for k in rule.feature_names_in_] for r in records])
    keys = np.array([r.subset_key for r in records])
    alone = []
    for point, key in zip(x, keys, strict=True):
        rest = x[keys != key]
        gap = point - rest.mean(axis=0)
        alone.append(np.sqrt(gap @ np.linalg.solve(np.cov(rest, rowvar=False), gap)))
    assert rule.radius_ == pytest.approx(sorted(alone)[56], rel=1e-9)
    assert rule.reach_ == min(rule.radius_, 3.0)
    assert rule.metrics_.largest_distance == pytest.approx(rule.mahalanobis(x).max())
    fitted = rule.intercept_ + x @ rule.coef_
    assert rule.lowest_ == pytest.approx(fitted.min())
    assert (x.mean(axis=0) - rule.edge()) @ rule.coef_ == pytest.approx(rule.reach_ * fitted.std(ddof=1))


def test_a_table_that_matches_passes_in_silence(fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitted.check(make_table(5)) == []


def test_absent_indicators_are_refused_with_the_command(fitted):
    for ask in (fitted.check, fitted.predict, fitted.phi):
        with pytest.raises(RequestError) as error:
            ask(make_table(5, names=("ppl",)))
        text = str(error.value)
        assert "it needs length_output, knn_6, and the table has no such column (it has ppl)" in text
        assert "--embedding-model MODEL --indicators length_output,ppl,knn_6 --out scores.parquet" in text


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            ("model", "weights"),
            "c" * 32,
            "model weights (model.weights): aaaaaaaa… in the rule, cccccccc… in the table",
        ),
        (("model", "tokenizer"), "c" * 32, "tokenizer (model.tokenizer): bbbbbbbb… in the rule, cccccccc…"),
        (("template",), "chat", "template: none in the rule, chat in the table"),
        (("max_length",), 512, "maximum length (max_length): none in the rule, 512 in the table"),
        (("version",), 2, "version of the indicator (version): 1 in the rule, 2 in the table"),
    ],
)
def test_another_identity_is_refused_unless_forced(fitted, field, value, says):
    """A perplexity under another model or template is another number under the same name."""
    table = make_table(5)
    table.keys = copy.deepcopy(table.keys)
    inner = table.keys["ppl"]["identity"]
    for part in field[:-1]:
        inner = inner[part]
    inner[field[-1]] = value
    with pytest.raises(RequestError) as error:
        fitted.check(table)
    text = str(error.value)
    assert says in text
    assert "ppl was computed in another way" in text
    assert "or pass --force other-base (a fit: --data.force=other-base; Python: force='other-base')" in text
    with pytest.raises(RequestError, match="pass --force weak-rule,other-base"):
        fitted.check(table, force=True)
    with pytest.warns(UserWarning, match="forced: ppl was computed in another way"):
        assert len(fitted.check(table, force="other-base")) == 1


def test_an_indicator_of_unknown_identity_is_named(fitted):
    """A rule that is verified in part must not pass for one that is verified."""
    partly = copy.copy(fitted)
    partly.identities = {name: key for name, key in fitted.identities.items() if name != "ppl"}
    with pytest.warns(UserWarning, match="does not record the identity of ppl, which cannot be verified"):
        assert len(partly.check(make_table(5))) == 1


def test_a_table_without_keys_is_refused(fitted):
    table = make_table(5)
    table.keys = {}
    with pytest.raises(RequestError, match="ppl: the table does not say how it was computed"):
        fitted.check(table)


def test_another_pool_is_no_other_identity():
    """A rule is made to be applied to other pools than its own, kNN distances too."""
    records = simulate(10)
    for record in records:
        record.keys["knn_6"]["identity"]["pool_digest"] = "p1"
    table = make_table(5)
    table.keys = copy.deepcopy(table.keys)
    table.keys["knn_6"]["identity"]["pool_digest"] = "p2"
    assert fit_rule(records).check(table) == []


def test_other_numerics_only_warn(fitted):
    table = make_table(5)
    table.keys = copy.deepcopy(table.keys)
    table.keys["ppl"]["numerics"]["precision"] = "bf16"
    with pytest.warns(UserWarning, match=r"ppl was computed with other numerics \(precision: fp32 in the rule, bf16"):
        fitted.check(table)


def test_another_base_model_or_template_needs_force_and_other_differences_are_told(fitted):
    regime = make_record().regime
    assert fitted.check_regime(regime) == []
    with pytest.warns(UserWarning) as seen:
        notes = fitted.check_regime({**regime, "learning_rate": 1e-3, "subset_size": 2000, "epochs": 3})
    assert [str(w.message) for w in seen] == notes
    assert notes == [
        "rule refit: learning rate: 0.0002 in the rule's runs, 0.001 here",
        "rule refit: subset size: 300 in the rule's runs, 2000 here",
    ]
    with pytest.raises(RequestError, match="template: alpaca in the rule's runs, chat here"):
        fitted.check_regime({**regime, "template": "chat"})
    other = {**regime, "base_model": {"weights": "f" * 32, "tokenizer": "b" * 32}}
    with pytest.raises(RequestError, match="model weights"):
        fitted.check_regime(other)
    with pytest.warns(UserWarning, match="model weights"):
        assert len(fitted.check_regime(other, force=["other-base"])) == 1
    assert plain_rule().check_regime(regime) == []


def test_repr_shows_the_rule():
    assert repr(plain_rule()) == "LinearRule('r', intercept=0.5, ppl=1, knn_6=-2)"
