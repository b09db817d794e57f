"""If these failed, `im-lightning design` would spend finetune runs that tell less than others would have."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.outliers_influence import variance_inflation_factor
from test_designs import PHI, SOURCES

from im_lightning.errors import RequestError
from im_lightning.sampling.designs.d_optimal import (
    d_optimal_runs,
    design_quality,
    log_det_information,
    random_log_det,
    relative_efficiency,
    repeats_of,
)
from im_lightning.sampling.designs.subsets import DesignPool


def candidates(count: int, p: int, seed: int = 0) -> np.ndarray:
    """Correlated mean regressors of very different scale, away from zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, p)) @ (np.eye(p) + 0.6 * rng.standard_normal((p, p)))
    return x * np.logspace(-3, 2, p) + np.logspace(-2, 3, p)


def by_force(x: np.ndarray, runs: int, marked: np.ndarray, required: int) -> float:
    """The best log determinant over every choice of runs, by an independent formula."""
    z = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    best = -math.inf
    for chosen in itertools.combinations(range(len(x)), runs):
        if marked[list(chosen)].sum() >= required:
            best = max(best, 2 * math.log(np.prod(np.linalg.svd(z[list(chosen)], compute_uv=False))))
    return best


@pytest.mark.parametrize(("p", "runs", "required"), [(1, 4, 0), (2, 5, 2), (3, 6, 0), (3, 6, 3)])
def test_the_best_of_all_designs_is_found(p: int, runs: int, required: int) -> None:
    for seed in range(6):
        x = candidates(13, p, seed)
        marked = np.arange(13) % 3 == 0
        found = d_optimal_runs(x, runs, 0, marked[:, None], [required])
        assert len(set(found.subsets.tolist())) == runs and marked[found.subsets].sum() >= required
        assert found.log_det == pytest.approx(by_force(x, runs, marked, required), abs=1e-8)


@pytest.mark.parametrize("sources", [2, 3, 7])
def test_every_wish_is_fulfilled(sources: int) -> None:
    """Without runs that lack it, a source cannot be held out; and the best of such designs is found."""
    for seed in range(4):
        x = candidates(90, 4, seed)
        labels = np.where(np.arange(90) % 2, np.arange(90) // 2 % sources, -1)
        without = (labels[:, None] == np.arange(sources)) | (np.arange(90)[:, None] % 11 == np.arange(sources))
        found = d_optimal_runs(x, 24, 2, without, [8 // sources] * sources)
        assert without[found.subsets].sum(axis=0).min() >= 8 // sources
        free = d_optimal_runs(x, 24, 2)
        assert relative_efficiency(found.log_det, free.log_det, 4) > 0.9
    x = candidates(12, 2)
    labels = np.array([0, 1, -1] * 4)
    found = d_optimal_runs(x, 6, 0, labels[:, None] == [0, 1], [2, 2])
    best = -math.inf
    for chosen in itertools.combinations(range(12), 6):
        if np.bincount(labels[list(chosen)] + 1, minlength=3)[1:].min() >= 2:
            z = np.column_stack([np.ones(12), (x - x.mean(0)) / x.std(0)])[list(chosen)]
            best = max(best, float(np.linalg.slogdet(z.T @ z)[1]))
    assert found.log_det == pytest.approx(best, abs=1e-8)


def test_units_of_the_regressors_change_nothing() -> None:
    x = candidates(60, 4)
    one, other = d_optimal_runs(x, 12, 2), d_optimal_runs(x * [1e4, 1, 1e-5, 3] - 7, 12, 2)
    assert one.runs.tolist() == other.runs.tolist()
    assert one.log_det == pytest.approx(other.log_det, abs=1e-6)


def test_a_chosen_design_tells_more_than_runs_taken_as_they_come() -> None:
    x = candidates(300, 9)
    chosen = d_optimal_runs(x, 40, 4)
    reference = random_log_det(x, 40, 4)
    gain = relative_efficiency(chosen.log_det, reference, 9)
    assert gain > 1.5
    random_errors = np.median(
        [design_quality(x[np.random.default_rng(s).permutation(300)[:40]]).errors for s in range(20)], axis=0
    )
    assert np.all(design_quality(x[chosen.runs]).errors < random_errors)
    # what the gain means: that many times the random runs have the same determinant
    assert random_log_det(x, round(40 * gain)) == pytest.approx(chosen.log_det, abs=0.15 * 10)


def test_repeats_are_different_subsets_of_the_design() -> None:
    assert [repeats_of(n, 9) for n in (9, 13, 16, 24, 40, 60, 200)] == [1, 2, 4, 6, 10, 10, 20]
    found = d_optimal_runs(candidates(80, 3), 25, 3)
    assert len(set(found.repeats.tolist())) == 3
    assert set(found.repeats.tolist()) <= set(found.subsets.tolist())
    assert len(found.runs) == 25 and len(set(found.subsets.tolist())) == 22
    best = max(
        log_det_information(scaled[np.append(found.subsets, at)])
        for scaled in [candidates(80, 3) / candidates(80, 3).std(0)]
        for at in found.subsets
    )
    once = d_optimal_runs(candidates(80, 3), 23, 1)
    assert once.subsets.tolist() == found.subsets.tolist()
    assert once.log_det == pytest.approx(best, abs=1e-6)


def test_expected_errors_and_vif_are_those_of_a_regression() -> None:
    """Against statsmodels on the same design: the printed errors are what a fit would report, per unit residual sd."""
    x = candidates(30, 4, seed=3)
    quality = design_quality(x)
    design = sm.add_constant(x)
    fit = sm.OLS(np.random.default_rng(0).standard_normal(30), design).fit()
    np.testing.assert_allclose(quality.errors, (fit.bse / math.sqrt(fit.mse_resid))[1:], rtol=1e-8)
    np.testing.assert_allclose(quality.vif, [variance_inflation_factor(design, j) for j in range(1, 5)], rtol=1e-8)
    np.testing.assert_allclose(quality.spread, x.std(axis=0, ddof=1))
    inverse = np.linalg.inv(np.cov(x, rowvar=False))
    distances = [math.sqrt((row - x.mean(0)) @ inverse @ (row - x.mean(0))) for row in x]
    assert quality.largest_distance == pytest.approx(max(distances))
    assert quality.tilt == 3.0  # one run in twenty of such a design lies further from the others
    np.testing.assert_allclose(quality.reach, 3.0 * quality.spread)


def test_what_cannot_be_told_apart_is_infinite_and_the_rest_is_not() -> None:
    x = candidates(40, 3)
    worse = np.column_stack([x, x[:, 0] - 2.0 * x[:, 1] / x[:, 1].std() * x[:, 0].std(), np.full(40, 7.0)])
    quality = design_quality(worse)
    assert np.isinf(quality.vif[[0, 1, 3, 4]]).all() and np.isinf(quality.errors[[0, 1, 3, 4]]).all()
    assert np.isfinite(quality.vif[2]) and np.isfinite(quality.errors[2])
    assert math.isinf(quality.condition_number) and quality.log_det == -math.inf
    assert quality.errors[2] == pytest.approx(design_quality(x).errors[2], rel=1e-6)
    assert len(d_optimal_runs(worse, 10, 1).runs) == 10  # still a design, for the others


def test_impossible_designs_are_refused() -> None:
    x = candidates(20, 2)
    with pytest.raises(RequestError, match="21 different subsets are wanted"):
        d_optimal_runs(x, 21)
    with pytest.raises(RequestError, match="wanted, 3 of them of a kind that 2 are; there are 20 candidates"):
        d_optimal_runs(x, 10, 0, np.arange(20)[:, None] < 2, [3])
    with pytest.raises(RequestError, match="5 of 10 runs would repeat a subset"):
        d_optimal_runs(x, 10, 5)
    with pytest.raises(RequestError, match="not finite"):
        d_optimal_runs(np.array([[np.nan], [1.0]]), 1)


def test_chosen_runs_of_a_pool_tell_more_than_designed_and_random_ones() -> None:
    """The numbers of docs/design.md: correlated heavy-tailed indicators, four sources, subsets of 300 rows."""
    pool = DesignPool(PHI, SOURCES)
    designs = [pool.draw(300, seed).design for seed in range(600)]
    means = np.array([d["mean_shift"] for d in designs])
    left_out = np.array([d["dropped"] is not None for d in designs])
    shares = {str(name): float(np.mean(np.array(SOURCES) == name)) for name in pool.names}
    plain = np.array([pool.draw(300, seed, shares, 0.0).design["mean_shift"] for seed in range(60)])
    for runs, expected in ((24, 1.87), (40, 1.68), (60, 1.59)):
        repeats = -(-runs // 10)
        chosen = d_optimal_runs(means, runs, repeats, left_out[:, None], [-(-runs // 4)])
        assert left_out[chosen.subsets].sum() >= runs / 4
        gain = relative_efficiency(chosen.log_det, random_log_det(means, runs, repeats), 6)
        assert gain == pytest.approx(expected, abs=0.06)
        errors = design_quality(means[chosen.runs]).errors
        as_they_come = [
            design_quality(means[[*range(s, s + runs - repeats), *range(s, s + repeats)]]).errors
            for s in range(0, 500, 20)
        ]
        ratio = np.median(as_they_come, axis=0) / errors
        assert ratio.min() > 1.15 and 1.3 < ratio.max() < 1.75
        ratio = design_quality(plain[:runs]).errors / errors
        assert ratio.min() > 8.5 and ratio.max() < 20
