"""The comparison's statistics agree with scipy and statsmodels; without them the demo's verdicts mean nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from im_lightning._utils.numbers import holm
from im_lightning.errors import RequestError
from im_lightning.experiments.compare.statistics import ExampleSums, compare, t_interval, t_test


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_holm_agrees_with_statsmodels(n: int) -> None:
    """A wrong correction would call chance a win, or hide a win."""
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(n)
    for _ in range(4):
        p = rng.random(n) ** rng.integers(1, 5)
        p[rng.integers(n)] = p[0]  # ties
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)


def test_holm_leaves_out_what_is_not_known() -> None:
    """An arm that could not be tested must not cost the others power, nor get a p value of its own."""
    corrected = holm([0.01, math.nan, 0.04])
    assert math.isnan(corrected[1])
    np.testing.assert_allclose(corrected[[0, 2]], [0.02, 0.04])


def test_intervals_and_tests_agree_with_scipy() -> None:
    """The ± of the table is the t interval that the text says it is."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        x = rng.normal(0.1, 1.0, n)
        mean, half = t_interval(x)
        low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=stats.sem(x))
        np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-10)
        assert t_test(x) == pytest.approx(stats.ttest_1samp(x, 0.0).pvalue, rel=1e-10)


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ more than arms do: an unpaired test would see nothing."""
    rng = np.random.default_rng(1)
    random = rng.normal(2.5, 0.5, 8)
    better, same = random - 0.1 + rng.normal(0, 0.02, 8), random + rng.normal(0, 0.02, 8)
    losses = {"random": random, "rule": better, "longest": same, "oracle": better}
    results = {r.arm: r for r in compare(losses, untested=["oracle"])}
    assert results["rule"].p == pytest.approx(stats.ttest_rel(better, random).pvalue)
    assert results["rule"].p_holm == pytest.approx(2 * results["rule"].p)  # two arms are tested, the smaller p first
    assert (results["rule"].verdict, results["longest"].verdict) == ("better", "no difference shown")
    assert results["rule"].difference == pytest.approx(float(np.mean(better - random)))
    assert results["oracle"].verdict == "" and math.isnan(results["oracle"].p_holm)
    assert results["random"].verdict == "" and math.isnan(results["random"].difference)


def test_degenerate_comparisons() -> None:
    """Equal arms are no difference, one seed is no test; neither may crash or claim anything."""
    equal = {r.arm: r for r in compare({"random": [1.0, 2.0], "top": [1.0, 2.0]})}
    assert equal["top"].p == 1.0 and equal["top"].verdict == "no difference shown"
    single = {r.arm: r for r in compare({"random": [1.0], "top": [2.0]})}
    assert single["top"].verdict == "no difference shown" and math.isnan(single["top"].half_width)
    assert single["top"].to_json()["p"] is None


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(RequestError, match=r"there is no arm 'random'.*name one of top"):
        compare({"top": [1.0]})
    with pytest.raises(RequestError, match=r"different seeds \(random 2, top 1\).*run every arm"):
        compare({"random": [1.0, 2.0], "top": [1.0]})


def test_differences_cover_seeds_and_examples_where_examples_are_known() -> None:
    """A gain on a few lucky evaluation examples, repeated by every seed, is no gain; over seeds alone it looks like
    one."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 30, 40)
    random = rng.normal(2.5, 0.3, (5, 40)) * tokens
    lucky = random.copy()
    lucky[:, 7] -= 40.0
    even = random - (0.1 + rng.normal(0, 0.01, (5, 40))) * tokens
    examples = ExampleSums({"random": random, "lucky": lucky, "even": even}, tokens)
    losses = {arm: (sums.sum(axis=1) / tokens.sum()).tolist() for arm, sums in examples.sums.items()}
    by_seed = {r.arm: r for r in compare(losses)}
    both = {r.arm: r for r in compare(losses, examples=examples)}
    assert by_seed["lucky"].verdict == "better" and both["lucky"].verdict == "no difference shown"
    assert both["even"].verdict == "better"
    for arm in ("lucky", "even"):
        assert both[arm].difference == pytest.approx(by_seed[arm].difference)
        excludes = abs(both[arm].difference) > both[arm].difference_half_width
        assert excludes == (both[arm].p < 0.05)
