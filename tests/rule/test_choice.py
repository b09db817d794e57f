"""Which rule is recommended, whether it beats the mean, and that a rule which does not is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from pool_ledger import pool_ledger, valley
from scipy.stats import t as student
from simulated_ledger import TRUE_COEF, make_record, make_table, simulate

from im_lightning.errors import RequestError
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.validation.cross_validation import (
    Predictor,
    Split,
    best_r2,
    fold_splits,
    grouped_folds,
    permutation_test,
    rank_correlation,
    source_split,
)
from im_lightning.rule.validation.model_selection import Scheme, estimators_of, evaluate, recommend
from im_lightning.rule.validation.uncertainty import bootstrap_coefficients

NOTHING = dict.fromkeys(TRUE_COEF, 0.0)


def test_folds_keep_subsets_together_and_do_not_depend_on_the_order():
    groups = [f"s{k % 17}" for k in range(30)]
    folds = grouped_folds(groups)
    assert len(set(folds)) == 10
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
    order = np.random.default_rng(0).permutation(30)
    np.testing.assert_array_equal(grouped_folds([groups[i] for i in order]), folds[order])
    assert max(np.bincount(folds)) - min(np.bincount(folds)) <= 2
    assert fold_splits(grouped_folds(["a"] * 5)) == []


def test_a_source_is_held_out_as_defined():
    """Train on runs without it, test where it is at least half (method.md)."""
    split = source_split(np.array([0.0, 0.5, 0.49, 0.0, 1.0]))
    assert split.train.tolist() == [0, 3] and split.test.tolist() == [1, 4]
    scheme = Scheme.of(gather(pool_ledger(40, sources=True)[0]))
    some = np.arange(9)
    assert scheme.fewest == 6 and scheme.estimable(Split(some[:6], some[:5]))
    assert not scheme.estimable(Split(some[:5], some[:5])) and not scheme.estimable(Split(some[:6], some[:4]))


def test_leave_one_source_out_equals_an_explicit_refit():
    records, _ = pool_ledger(60, sources=True, noise=0.02)
    rule = fit_rule(records)
    x = np.array([[r.phi_means[n] for n in rule.feature_names_in_] for r in records])
    y = np.log([r.loss("held-out") for r in records])
    for source in ("s0", "s1"):
        share = np.array([r.subset["source_shares"].get(source, 0.0) for r in records])
        train, test = share == 0, share >= 0.5
        full = np.column_stack([np.ones(60), x])
        b = np.linalg.lstsq(full[train], y[train], rcond=None)[0]
        error, rival = ((y - full @ b)[test] ** 2).sum(), ((y[test] - y[train].mean()) ** 2).sum()
        got = rule.metrics_.source_out[source]
        assert got["r2"] == pytest.approx(1 - error / rival, rel=1e-7)
        assert (got["trained_on"], got["runs"]) == (train.sum(), test.sum())
        assert got["spearman"] == pytest.approx(rank_correlation((full @ b)[test], y[test]))
        miss, hat = (y - full @ b)[test], full[test] @ np.linalg.inv(full[train].T @ full[train]) @ full[test].T
        assert got["law_r2"] == pytest.approx(
            1 - miss @ np.linalg.inv(np.eye(len(miss)) + hat) @ miss / rival, abs=0.03
        )
    text = " ".join(rule.summary(300).split())
    assert "without a source, tested on runs where it is at least half: s0 R²" in text
    assert re.search(r"s0 R² \d\.\d\d as far as so few runs can tell, -?\d\.\d\d plainly, Spearman", text)
    assert f"({train.sum()} runs without it, {test.sum()} to test on)" in text


def test_a_source_with_few_runs_without_it_is_not_estimable():
    """On a handful of runs even a rule that is right everywhere has an R² near nothing."""
    records, _ = pool_ledger(24, sources=True)
    found = fit_rule(records)
    for one in found.metrics_.source_out.values():
        assert one["r2"] is None and one["trained_on"] < 6
    assert "s0 not estimable (3 runs without it, " in " ".join(found.summary(300).split())


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 30).astype(float)
    b = a + rng.normal(size=30)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, rel=1e-12)
    assert rank_correlation(a, np.zeros(30)) is None and rank_correlation(a[:2], b[:2]) is None


def test_the_simplest_rule_within_one_standard_error_is_recommended():
    """On a linear truth nothing is gained by bends; on a valley the linear rules are blind."""
    records, _ = pool_ledger(40, seed=1)
    assert fit_rule(records, "auto", permutations=0, bootstrap=0).method == "ols"
    records, _ = pool_ledger(40, seed=1, effect=valley)
    rule = fit_rule(records, "auto", permutations=0, bootstrap=0)
    assert rule.method == "additive"
    rows = {row["method"]: row for row in rule.metrics_.candidates}
    assert list(rows) == ["mean", "ols", "ridge", "elastic-net", "additive", "offset", "offset-robust", "best-subset"]
    assert [m for m, row in rows.items() if row["recommended"]] == ["additive"]
    assert rows["additive"]["grouped_r2"] > rows["ols"]["grouped_r2"] + 0.1
    assert rows["mean"]["grouped_r2"] == 0.0


def test_the_choice_follows_the_definition():
    fit = gather(simulate(24, noise=0.05, repeats=4))
    scheme = Scheme.of(fit)
    rules = [evaluate(fit, scheme, e) for e in estimators_of(fit, ["ols", "ridge", "elastic-net"], None)]
    errors = {c.method: (fit.y - c.predictions) ** 2 for c in rules}
    best = min(errors, key=lambda m: errors[m].mean())
    within = []
    for c in rules:
        gap = errors[c.method] - errors[best]
        sums = np.array([(gap - gap.mean())[scheme.codes == k].sum() for k in range(20)]) / 24
        if gap.mean() <= np.sqrt(20 / 19 * (sums**2).sum()) + 1e-15:
            within.append(c.method)
    assert recommend(rules, fit, scheme.codes).method == within[0]


def test_signal_beats_the_mean_and_noise_does_not():
    good = fit_rule(simulate(24), "auto")
    assert good.beats_mean is True and good.metrics_.permutation["p"] == pytest.approx(0.001)
    assert good.metrics_.recommended == good.method
    assert "Verdict: better than the mean" in good.summary(120)
    noise = fit_rule(simulate(24, seed=3, coef=NOTHING), "auto")
    assert noise.beats_mean is False and noise.metrics_.recommended == "mean"
    assert "Verdict: NO BETTER THAN THE MEAN" in noise.summary(120)
    assert noise.metrics_.permutation["permutations"] < 999
    first = good.summary(200).splitlines()[:3]
    assert first[1].startswith("Verdict: better than the mean") and "over the mean +" in first[2], (
        "the verdict comes first"
    )
    assert noise.summary(200).splitlines()[1].startswith("Verdict: NO BETTER THAN THE MEAN")
    assert not any(re.search(r"(?<![\d.])-0(\.0+)?(?![\d.])", rule.summary(200)) for rule in (good, noise)), "-0 is 0"
    untested = fit_rule(simulate(24))
    assert untested.beats_mean is None and "NOT TESTED" in untested.metrics_.verdict


def test_a_rule_that_predicts_worse_than_the_mean_is_not_called_better():
    """Shuffled losses may do even worse: then p is small, and yet the mean predicts the next run better."""
    rng, records = np.random.default_rng(45), []
    for number in range(40):
        z = rng.standard_normal(9)
        loss = float(np.exp(0.9 + 0.1 * z[0] + 0.1 * z[1] + 0.3 * rng.standard_normal()))
        records.append(make_record(number, {f"i{k}": v for k, v in enumerate(z)}, loss))
    rule = fit_rule(records, "ols", [f"i{k}" for k in range(9)], permutations=999)
    assert rule.metrics_.permutation["p"] < 0.05 and rule.metrics_.grouped_r2 < 0
    assert rule.beats_mean is False and rule.metrics_.recommended == "mean"
    assert "NO BETTER THAN THE MEAN: held-out R² -0." in rule.metrics_.verdict
    assert "misses runs it has not seen by no less than their mean does" in rule.metrics_.verdict
    with pytest.raises(RequestError, match=r"no better than the mean \(permutation p 0\.0\d+, held-out R² -0\."):
        rule.check(make_table(5, **{f"i{k}": np.ones(5) for k in range(9)}))


def test_a_rule_no_better_than_the_mean_is_refused_unless_forced():
    rule = fit_rule(simulate(24, seed=3, coef=NOTHING), "auto")
    with pytest.raises(RequestError) as error:
        rule.check(make_table(5))
    assert str(error.value).startswith("rule refit: its own runs find it no better than the mean (permutation p ")
    remedy = "make more designed runs and refit, or pass --force (a fit: --data.force=true; Python: force=True)."
    assert f"Fix: {remedy}" in str(error.value)
    with pytest.warns(UserWarning, match="forced: its own runs find it no better than the mean"):
        rule.check(make_table(5), force=True)


def test_too_few_permutations_to_tell_anything_are_refused():
    """With 19 trials p is 1 / 20 at the least: even a perfect rule would be called no better than the mean."""
    with pytest.raises(RequestError, match=r"19 permutations: p cannot fall below 0\.05.*make 20 or more, or 0"):
        fit_rule(simulate(24), permutations=19)
    with pytest.raises(RequestError, match=r"-1 permutations: .*make 20 or more, or 0"):
        fit_rule(simulate(24), permutations=-1)
    with pytest.raises(RequestError, match=r"-1 resamples: it is negative"):
        fit_rule(simulate(24), bootstrap=-1)
    assert fit_rule(simulate(24), permutations=20).beats_mean is True


def test_subsets_that_cannot_be_shuffled_are_no_test():
    """Of six orders of the losses one is the measured one: p is 1/6 at the least, for a perfect rule, too."""
    rule = fit_rule(simulate(5, names=("ppl",), noise=0.0001, repeats=1), "ols", ["ppl"], permutations=999)
    assert rule.metrics_.grouped_r2 > 0.9 and rule.metrics_.permutation is None
    assert rule.beats_mean is None and "NOT TESTED" in rule.metrics_.verdict
    assert any("can be shuffled in 6 ways only (repeats of a subset stay" in note for note in rule.metrics_.notes)
    enough = fit_rule(simulate(8, repeats=2), "ridge", ["ppl"], permutations=20)
    assert enough.metrics_.permutation["permutations"] > 0, "4! · 2! are enough"


def test_the_permutation_test_repeats_the_whole_selection():
    """Its trials equal refits of shuffled ledgers, repeats kept together; its p ends as Besag and Clifford's does."""
    fit = gather(simulate(20, noise=0.2, repeats=4, seed=5))
    scheme = Scheme.of(fit)
    estimators = estimators_of(fit, ["ols", "ridge", "elastic-net"], None)
    predictors = [Predictor(e, scheme.grouped, scheme.folds) for e in estimators]
    seen = []
    rng = np.random.default_rng(0)
    for _ in range(3):
        y = fit.y.copy()
        for size in (1, 2):
            codes = [c for c in np.unique(scheme.codes) if (scheme.codes == c).sum() == size]
            for to, origin in zip(codes, rng.permutation(codes), strict=True):
                y[scheme.codes == to] = fit.y[scheme.codes == origin]
        seen.append(y)
    together = best_r2(predictors, scheme.grouped, np.column_stack(seen), fit.weights)
    for y, got in zip(seen, together, strict=True):
        fit.y = y
        again = [evaluate(fit, scheme, e).row["grouped_r2"] for e in estimators]
        assert got == pytest.approx(max(again), abs=1e-4)


def test_the_sequential_p_stops_at_ten():
    fit = gather(simulate(20, coef=NOTHING, seed=3))
    scheme = Scheme.of(fit)
    (estimator,) = estimators_of(fit, ["ols"], None)
    predictors = [Predictor(estimator, scheme.grouped, scheme.folds)]
    found = permutation_test(predictors, scheme.grouped, fit.y, fit.weights, scheme.codes)
    assert found["exceedances"] == 10 and found["p"] == 10 / found["permutations"]
    full = permutation_test(predictors, scheme.grouped, fit.y, fit.weights, scheme.codes, 300, enough=10**9)
    assert full["permutations"] == 300 and full["p"] == (full["exceedances"] + 1) / 301
    assert abs(full["p"] - found["p"]) < 0.3
    few = permutation_test(predictors, scheme.grouped, fit.y, fit.weights, scheme.codes, most=7)
    assert few["permutations"] <= 7


def test_a_rule_that_only_knows_the_source_gains_nothing_over_it():
    """Random mixtures of sources: what the indicators explain, source shares explain as well (method.md)."""
    records, _ = pool_ledger(40, sources=True, noise=0.02, effect=lambda z: 0.0 * z[:, 0])
    for record in records:
        share = record.subset["source_shares"].get("s1", 0.0)
        record.phi_means["knn_6"] = 0.7 + 0.1 * share
        record.evaluation["held-out"]["loss"] *= float(np.exp(0.3 * share))
    rivals = fit_rule(records, indicators=["knn_6"]).metrics_.rivals
    assert rivals["mean"]["gain"] > 0.5 and rivals["mean"]["gain_low"] > 0
    assert abs(rivals["sources"]["gain"]) < 0.1
    assert rivals["sources"]["gain_low"] <= rivals["sources"]["gain"] <= rivals["sources"]["gain_high"]
    assert rivals["length"]["gain"] > 0.3


def test_a_verdict_and_an_interval_that_disagree_are_explained():
    """The test is of these runs, the interval of other ledgers of the same design: with few runs it may hold 0."""
    rule = fit_rule(pool_ledger(40, noise=0.02)[0], indicators=["knn_6"])
    rule.metrics_ = replace(rule.metrics_, beats_mean=True, verdict="better than the mean")
    advice = "The verdict is of these runs; as few others may show no gain over the mean: make more runs."
    for low, told, advised in ((0.1, "(0.10 to", False), (-0.33, "(-0.33 to", True)):
        rule.metrics_.rivals["mean"]["gain_low"] = low
        said = " ".join(rule.summary().split())
        assert told in said and (advice in said) == advised, said


def test_a_share_that_is_not_known_is_no_share_of_nothing():
    """A null in one run's file: the baseline is left out with its reason, and no source counts as held out."""
    records, _ = pool_ledger(24, sources=True)
    records[0].subset["source_shares"]["s0"] = None
    metrics = fit_rule(records).metrics_
    assert metrics.rivals["sources"]["reason"] == "some run does not record its source shares"
    assert metrics.source_out == {}


def test_rivals_equal_their_definition():
    records, _ = pool_ledger(30, noise=0.05)
    rule = fit_rule(records)
    rows = rule.metrics_.held_out
    y = np.array([row["y"] for row in rows])
    folds = grouped_folds([r.subset_key for r in records])
    length = np.array([r.phi_means["length_output"] for r in records])
    predicted, means = np.empty(30), np.empty(30)
    for fold in np.unique(folds):
        inside = folds == fold
        b = np.polyfit(length[~inside], y[~inside], 1)
        predicted[inside], means[inside] = np.polyval(b, length[inside]), y[~inside].mean()
    total = ((y - means) ** 2).sum()
    mine = ((y - np.array([row["prediction"] for row in rows])) ** 2).sum()
    found = rule.metrics_.rivals
    assert found["length"]["grouped_r2"] == pytest.approx(1 - ((y - predicted) ** 2).sum() / total, rel=1e-7)
    assert found["length"]["grouped_r2"] < 0  # worse than the mean, which is then what has to be beaten
    assert found["length"]["gain"] == found["mean"]["gain"]
    assert found["mean"]["gain"] == pytest.approx(1 - mine / total, rel=1e-7)
    assert found["sources"]["reason"] == "the runs do not differ in their sources"
    assert "source shares only: not fitted, the runs do not differ in their sources" in rule.summary(120)


def test_a_length_that_is_the_same_but_for_rounding_is_no_baseline():
    """A line through rounding is worse than the mean, and a gain over it is a test that was not made."""
    records, _ = pool_ledger(24)
    for k, record in enumerate(records):
        record.phi_means["length_output"] = 0.6931471805599453 + (k % 3) * 1.2e-16
    found = fit_rule(records, indicators=["ppl", "knn_6"]).metrics_.rivals["length"]
    assert found["reason"] == "the runs record no length, or all the same" and found["gain"] is None


def test_a_baseline_that_cannot_be_held_out_says_so():
    records, _ = pool_ledger(24)
    for record in records:
        record.phi_means["length_input"] = 2 * record.phi_means["length_output"]
    rule = fit_rule(records, indicators=["ppl", "knn_6"])
    assert rule.metrics_.rivals["length"]["reason"] == "not estimable"
    assert "length only: not fitted, not estimable" in " ".join(rule.summary(120).split())


def test_a_loss_that_bends_with_length_is_no_gain_over_length():
    """A straight line would leave the bend to the rule, which then seems to know more than how long answers are."""
    records, _ = pool_ledger(40, noise=0.01, effect=lambda z: 0.25 * np.abs(z[:, 1]))
    found = fit_rule(records, "additive").metrics_.rivals
    assert found["length"]["method"] == "additive" and found["length"]["regressors"] == ["length_output"]
    assert found["length"]["grouped_r2"] > 0.8 and found["mean"]["gain_low"] > 0.5
    assert found["length"]["gain_low"] < 0.02
    straight, _ = pool_ledger(40, noise=0.01, effect=lambda z: 0.25 * z[:, 1])
    assert fit_rule(straight).metrics_.rivals["length"]["method"] == "ols"


def test_the_interval_of_a_gain_is_a_jackknife_of_the_refits():
    records, _ = pool_ledger(24, noise=0.05)
    rule = fit_rule(records)
    x = np.array([[r.phi_means[n] for n in rule.feature_names_in_] for r in records])
    y = np.log([r.loss("held-out") for r in records])
    folds = grouped_folds([r.subset_key for r in records])

    def unexplained(kept):
        missed = total = 0.0
        for fold in np.unique(folds):
            train, test = kept & (folds != fold), kept & (folds == fold)
            b = np.linalg.lstsq(np.c_[np.ones(train.sum()), x[train]], y[train], rcond=None)[0]
            missed += ((y[test] - np.c_[np.ones(test.sum()), x[test]] @ b) ** 2).sum()
            total += ((y[test] - y[train].mean()) ** 2).sum()
        return np.log(missed / total)

    every = np.ones(24, dtype=bool)
    left = np.array([unexplained(every & (np.arange(24) != i)) for i in range(24)])
    half = student.ppf(0.975, 23) * np.sqrt(23 / 24 * ((left - left.mean()) ** 2).sum())
    found = rule.metrics_.rivals["mean"]
    limits = 1 - np.exp(unexplained(every) + half), 1 - np.exp(unexplained(every) - half)
    assert (found["gain_low"], found["gain_high"]) == pytest.approx(limits, rel=1e-6)


def test_bootstrap_intervals_and_the_stability_of_signs():
    records = simulate(30, noise=0.03, repeats=6)
    rule = fit_rule(records, bootstrap=400)
    found = rule.metrics_.bootstrap
    assert set(found) == set(rule.feature_names_in_)
    for j, name in enumerate(rule.feature_names_in_):
        assert found[name]["low"] < rule.coef_[j] < found[name]["high"]
        se = rule.coefficients_[j + 1]["se"]
        assert 0.5 < (found[name]["high"] - found[name]["low"]) / (4 * se) < 1.6  # about as wide as the t interval
    assert found["ppl"]["sign_stability"] > 0.95
    fit = gather(records)
    candidate = evaluate(fit, Scheme.of(fit), estimators_of(fit, ["ols"], None)[0])
    drawn = bootstrap_coefficients(fit, candidate, 3, seed=1)
    codes = np.unique(fit.groups, return_inverse=True)[1]
    picks = np.random.default_rng(1).integers(0, 24, (3, 24))
    x, y = (np.array([v[codes == c].mean(axis=0) for c in range(24)]) for v in (fit.x, fit.y))
    for row, pick in zip(drawn, picks, strict=True):  # a drawn subset counts once for each time it is drawn
        full = np.column_stack([np.ones(24), x[pick]])
        np.testing.assert_allclose(row, np.linalg.lstsq(full, y[pick], rcond=None)[0], rtol=1e-6)


def test_absent_bootstrap_intervals_have_a_reason():
    """Two columns that are not there look like a fault of the table."""
    rule = fit_rule(simulate(24), bootstrap=40)
    assert rule.metrics_.bootstrap == {}
    told = "no bootstrap intervals: 40 of 40 resamples of the subsets determine the fit, and 50 are needed"
    assert told in " ".join(rule.summary(120).split())
    assert "no bootstrap intervals" not in fit_rule(simulate(24), bootstrap=60).summary(200)


def test_every_summary_fits_narrow_terminals():
    records, _ = pool_ledger(24, seed=2, effect=valley, sources=True)
    for method in ("auto", "elastic-net", "additive"):
        rule = fit_rule(records, method, permutations=40, bootstrap=60)
        for width in (30, 60, 80, 120):
            lines = rule.summary(width).splitlines()
            assert max(map(len, lines)) <= width, (method, width)
            heads = [line for line in lines if "R² held out" in line and "±" in line and "(" not in line]
            assert all("error held out" in line for line in heads) and (heads or width < 120), "a ± without its number"
        text = " ".join(rule.summary(120).split())
        for word in (
            "R² held out",
            "baselines of the rule",
            "the mean",
            "source shares only",
            "Verdict:",
            "← recommended",
        ):
            assert word in text, (method, word)


def test_few_runs_are_no_reason_to_fail():
    """At the fewest runs a fit takes some folds do not determine least squares; the others still have a score."""
    for n in (6, 7, 9):
        rule = fit_rule(simulate(n, noise=0.05), "auto", permutations=50, bootstrap=60)
        rows = {row["method"]: row for row in rule.metrics_.candidates}
        assert rows["ridge"]["grouped_r2"] is not None
        assert rule.beats_mean in (True, False) and rule.summary(80)
