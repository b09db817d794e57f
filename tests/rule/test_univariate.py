"""If these failed, an indicator would look related to the loss by chance, by repeats, or by how many were tried."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from simulated_ledger import make_record, simulate
from statsmodels.stats.multitest import multipletests

from im_lightning.ledger.run_table import gather
from im_lightning.rule.validation.univariate import (
    correlation_matrix,
    subset_means,
    univariate,
    univariate_table,
)


def arrays(records):
    data = gather(records)
    return data, data.x, data.y


def test_correlations_intervals_and_p_are_those_of_scipy():
    data, x, y = arrays(simulate(31, noise=0.05))
    rows = univariate(data)
    assert [row["indicator"] for row in rows] == data.names
    for j, row in enumerate(rows):
        expected = stats.pearsonr(x[:, j], y)
        interval = expected.confidence_interval(0.95)
        left = [np.arctanh(np.corrcoef(np.delete(x[:, j], i), np.delete(y, i))[0, 1]) for i in range(31)]
        jackknife = 30 / 31 * ((np.array(left) - np.mean(left)) ** 2).sum()
        if jackknife > 1 / 28:  # heavier tails than Fisher's variance is for
            z, half = np.arctanh(expected.statistic), stats.norm.ppf(0.975) * np.sqrt(jackknife)
            interval = np.tanh(z - half), np.tanh(z + half)
        assert row["pearson"] == pytest.approx(expected.statistic, abs=1e-12)
        assert (row["pearson_low"], row["pearson_high"]) == pytest.approx(tuple(interval), abs=1e-12)
        assert row["p"] == pytest.approx(expected.pvalue, rel=1e-8)
        rank = stats.spearmanr(x[:, j], y)
        assert row["spearman"] == pytest.approx(rank.statistic, abs=1e-12)
        assert row["spearman_p"] == pytest.approx(rank.pvalue, rel=1e-8)
        assert row["spearman_low"] < row["spearman"] < row["spearman_high"]
        fit = sm.OLS(y, sm.add_constant(x[:, j])).fit()
        assert row["slope"] == pytest.approx(fit.params[1], rel=1e-9)
        assert row["p"] == pytest.approx(fit.pvalues[1], rel=1e-8), "the paper's univariate regression"
        assert row["slope_sd"] == pytest.approx(fit.params[1] * x[:, j].std(ddof=1), rel=1e-9)


def test_ks_compares_the_halves_of_lower_and_higher_loss():
    data, x, y = arrays(simulate(25))
    order = np.argsort(y)
    for j, row in enumerate(univariate(data)):
        expected = stats.ks_2samp(x[order[:12], j], x[order[13:], j])
        assert (row["ks"], row["ks_p"]) == pytest.approx((expected.statistic, expected.pvalue))
        low, high = np.sort(x[order[:12], j]), np.sort(x[order[13:], j])
        gap = max(abs(np.mean(low <= v) - np.mean(high <= v)) for v in x[:, j])
        assert row["ks"] == pytest.approx(gap)


def test_p_values_are_corrected_over_the_indicators():
    rows = univariate(simulate(20, noise=0.1))
    for name in ("p", "ks_p"):
        expected = multipletests([row[name] for row in rows], method="holm")[1]
        assert [row[f"{name}_holm"] for row in rows] == pytest.approx(expected.tolist())


def test_repeats_of_a_subset_are_not_more_evidence():
    runs = simulate(18, noise=0.05)
    more = [*runs, *simulate(18, noise=0.05)[:6]]
    for k, record in enumerate(more[18:]):  # the same subsets and losses again
        record.run_id = f"again-{k}"
    rows, again = univariate(runs), univariate(more)
    assert [row["subsets"] for row in again] == [18] * 3
    for one, other in zip(rows, again, strict=True):
        assert other["p"] == pytest.approx(one["p"]) and other["pearson_low"] == pytest.approx(one["pearson_low"])
    x, y = subset_means(np.array([[1.0], [2.0], [1.0]]), np.array([3.0, 5.0, 4.0]), ["b", "a", "b"])
    assert x.tolist() == [[1.0], [2.0]] and y.tolist() == [3.5, 5.0]


def test_intervals_hold_what_they_promise():
    """95 % intervals of both correlations contain the truth in about 95 % of samples; pure noise is seldom flagged."""
    rng, truth, n = np.random.default_rng(0), 0.6, 24
    rank_truth = 6 / math.pi * math.asin(truth / 2)
    held = np.zeros(2)
    from im_lightning.rule.validation.univariate import fisher_interval, pearson

    for _ in range(1500):
        x, e = rng.standard_normal((2, n))
        y = truth * x + math.sqrt(1 - truth**2) * e
        r, rank = pearson(x, y), pearson(stats.rankdata(x), stats.rankdata(y))
        low, high = fisher_interval(r, 1 / (n - 3))
        rank_low, rank_high = fisher_interval(rank, (1 + rank**2 / 2) / (n - 3))
        held += [low <= truth <= high, rank_low <= rank_truth <= rank_high]
    assert 0.935 < held[0] / 1500 < 0.965 and 0.93 < held[1] / 1500 < 0.97


def test_the_correlation_matrix_is_that_of_the_subsets():
    data, x, _ = arrays(simulate(22))
    found = correlation_matrix(data)
    np.testing.assert_allclose(found["pearson"], np.corrcoef(x.T), atol=1e-12)
    np.testing.assert_allclose(found["spearman"], stats.spearmanr(x).statistic, atol=1e-12)
    assert found["labels"] == ["log1p(length_output)", "log(ppl)", "knn_6"]


def test_what_cannot_be_estimated_is_none_and_says_so_in_the_table():
    runs = [
        make_record(k, {"ppl": 2.0, "length_output": 4.0 + k % 3, "knn_6": 0.1 * k}, 2.0 + 0.1 * k) for k in range(9)
    ]
    rows = univariate(runs)
    constant = next(row for row in rows if row["indicator"] == "ppl")
    for name in ("pearson", "pearson_low", "spearman", "p", "p_holm", "ks", "slope"):
        assert constant[name] is None
    others = [row["p"] for row in rows if row["indicator"] != "ppl"]
    holm = [row["p_holm"] for row in rows if row["indicator"] != "ppl"]
    assert holm == pytest.approx(multipletests(others, method="holm")[1].tolist()), "what is unknown does not count"
    assert correlation_matrix(runs)["pearson"][1][0] is None
    assert json.loads(json.dumps(rows)) == rows
    (line,) = [line for line in univariate_table(rows, 100).splitlines() if line.startswith("log(ppl)")]
    assert "–" in line
    few = univariate(runs[:3])
    assert few[0]["pearson"] is not None and few[0]["pearson_low"] is None and few[0]["ks"] is None


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_the_table_fits_any_width(width):
    table = univariate_table(univariate(simulate(20)), width)
    assert max(map(len, table.splitlines())) <= width and "log(ppl)" in table


def test_ties_share_a_rank():
    records = simulate(20)
    for record in records:
        record.phi_means["ppl"] = round(record.phi_means["ppl"], 1)
    values, losses = [r.phi_means["ppl"] for r in records], [r.loss("held-out") for r in records]
    assert len(set(values)) < 15
    (row,) = univariate(records, indicators=["ppl"])
    assert row["spearman"] == pytest.approx(stats.spearmanr(values, losses).statistic, rel=1e-12)
