"""Diagnostics against definitions computed the long way: they decide whether a rule is believed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.outliers_influence import OLSInfluence, variance_inflation_factor

from im_lightning.rule.estimators.linear import least_squares
from im_lightning.rule.validation import diagnostics
from im_lightning.rule.validation.cross_validation import Predictor, fold_splits, group_codes, score


def data(n=20, p=4, seed=0, collinear=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * [1.0, 100.0, 0.01, 1.0][:p] + [5.0, -300.0, 0.0, 2.0][:p]
    if collinear:
        x[:, 3] = x[:, 0] + collinear * rng.normal(size=n)
    return x, x[:, 0] * 0.3 + 0.01 * x[:, 1] + 0.2 * rng.normal(size=n)


class HeldOut(NamedTuple):
    r2: float | None
    predictions: np.ndarray
    folds: int


def leave_out(x, y, groups=None):
    """What a least-squares candidate reports when each run, or each group of runs, is left out."""
    n, weights = len(y), np.ones(len(y))
    codes = np.arange(n) if groups is None else group_codes(groups)
    splits = fold_splits(codes)
    parts = Predictor(least_squares(x, weights), splits, codes).predict(y[:, None])[0]
    predictions = np.full(n, np.nan)
    for split, part in zip(splits, parts, strict=True):
        predictions[split.test] = part[:, 0]
    return HeldOut(score(splits, [p[:, 0] for p in parts], y, weights, codes).r2, predictions, len(splits))


def refit(x, y, inside):
    """Prediction of the rows `inside` by least squares on the others."""
    outside = np.setdiff1d(np.arange(len(y)), inside)
    full = np.column_stack([np.ones(len(y)), x])
    return full[inside] @ np.linalg.lstsq(full[outside], y[outside], rcond=None)[0]


def test_leave_one_out_equals_explicit_refits_and_the_definition():
    x, y = data()
    got = leave_out(x, y)
    predictions = np.array([refit(x, y, [i])[0] for i in range(20)])
    np.testing.assert_allclose(got.predictions, predictions, rtol=1e-9)
    means = np.array([np.delete(y, i).mean() for i in range(20)])
    assert got.r2 == pytest.approx(1 - ((y - predictions) ** 2).sum() / ((y - means) ** 2).sum(), rel=1e-10)
    assert got.folds == 20


def test_groups_are_left_out_together():
    """A repeated subset in both halves leaks: the held-out R² would flatter the rule."""
    x, y = data(24)
    groups = [f"s{i // 2 if i < 12 else i}" for i in range(24)]
    got = leave_out(x, y, groups)
    predictions, means = np.empty(24), np.empty(24)
    for name in set(groups):
        inside = [i for i in range(24) if groups[i] == name]
        predictions[inside] = refit(x, y, inside)
        means[inside] = np.delete(y, inside).mean()
    np.testing.assert_allclose(got.predictions, predictions, rtol=1e-9)
    assert got.r2 == pytest.approx(1 - ((y - predictions) ** 2).sum() / ((y - means) ** 2).sum(), rel=1e-10)
    assert got.folds == 18


def test_repeats_flatter_the_plain_held_out_fit():
    rng = np.random.default_rng(3)
    x = np.repeat(rng.normal(size=(8, 4)), 3, axis=0)
    y = np.repeat(rng.normal(size=8), 3) + 0.01 * rng.normal(size=24)
    groups = [str(i // 3) for i in range(24)]
    assert leave_out(x, y).r2 > 0.2
    assert leave_out(x, y, groups).r2 < 0


def test_a_fold_that_the_rest_does_not_determine_has_no_estimate():
    x = np.zeros((6, 1))
    x[0] = 1.0  # only one run moves: without it the slope is unknown
    assert leave_out(x, np.arange(6.0)).r2 is None
    assert leave_out(*data(6, 2), groups=["a"] * 6).r2 is None


def test_vif_leverage_and_condition_number_equal_their_definitions():
    x, y = data(collinear=0.3)
    full = sm.add_constant(x)
    np.testing.assert_allclose(
        diagnostics.variance_inflation(x), [variance_inflation_factor(full, j + 1) for j in range(4)], rtol=1e-8
    )
    explicit = []
    for j in range(4):
        others = sm.OLS(x[:, j], sm.add_constant(np.delete(x, j, axis=1))).fit()
        explicit.append(1 / (1 - others.rsquared))
    np.testing.assert_allclose(diagnostics.variance_inflation(x), explicit, rtol=1e-8)
    influence = OLSInfluence(sm.OLS(y, full).fit())
    np.testing.assert_allclose(diagnostics.leverages(x), influence.hat_matrix_diag, rtol=1e-8)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    assert diagnostics.condition_number(x) == pytest.approx(np.linalg.cond(z), rel=1e-8)


def test_orthogonal_designs_are_as_good_as_designs_get():
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    np.testing.assert_allclose(diagnostics.variance_inflation(x), 1.0)
    assert diagnostics.condition_number(x) == pytest.approx(1.0)
    assert diagnostics.collinear_columns(x) == []


def test_collinear_and_constant_columns_are_found_by_name():
    x, _ = data()
    x = np.column_stack([x, x[:, 0] - 2 * x[:, 2], np.full(20, 3.7)])
    assert diagnostics.constant_columns(x) == [5]
    assert diagnostics.collinear_columns(x[:, :5]) == [0, 2, 4]


def test_the_vif_of_a_sum_of_others_is_infinite_and_the_rest_keep_theirs():
    """With as many regressors as runs every one is such a sum; an inverse of the singular matrix gave −3e15."""
    x, _ = data()
    added = np.column_stack([x, x[:, 0] - 2 * x[:, 2]])
    found = diagnostics.variance_inflation(added)
    assert np.isinf(found[[0, 2, 4]]).all()
    without = [variance_inflation_factor(sm.add_constant(x), j) for j in (2, 4)]  # the fifth adds nothing to the span
    np.testing.assert_allclose(found[[1, 3]], without, rtol=1e-8)
    np.testing.assert_array_equal(
        diagnostics.variance_inflation(np.column_stack([added, np.ones(20)])), [*found, np.inf]
    )
    more_than_runs = np.random.default_rng(0).normal(size=(6, 9))
    assert np.isinf(diagnostics.variance_inflation(more_than_runs)).all()


def test_pure_error_is_the_pooled_within_subset_variance():
    y = np.array([1.0, 1.2, 2.0, 2.1, 2.3, 5.0])
    groups = ["a", "a", "b", "b", "b", "c"]
    got = diagnostics.pure_error(y, groups)
    expected = (2 * np.var([1.0, 1.2]) + 3 * np.var([2.0, 2.1, 2.3])) / 3
    assert got.df == 3
    assert got.sd == pytest.approx(np.sqrt(expected))
    assert got.share == pytest.approx(expected / y.var(ddof=1))
    assert diagnostics.pure_error(y, list("abcdef")) is None
