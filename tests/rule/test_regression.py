"""`fit_rule`: numbers as statsmodels gives them, the truth recovered, and refusals where runs cannot answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import chi2
from simulated_ledger import TRUE_COEF, TRUE_INTERCEPT, make_record, refused, simulate
from statsmodels.stats.outliers_influence import variance_inflation_factor

from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.regime import runs_missing
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.validation.cross_validation import grouped_folds

NAMES = ["length_output", "ppl", "knn_6"]  # the paper's order


def design(records, names=NAMES):
    x = np.array([[r.phi_means[n] for n in names] for r in records])
    return x, np.log([r.evaluation["held-out"]["loss"] for r in records])


def test_every_number_equals_statsmodels():
    records = simulate(25)
    x, y = design(records)
    expected = sm.OLS(y, sm.add_constant(x)).fit()
    rule = fit_rule(records[::-1])  # the order of the runs decides nothing
    assert rule.feature_names_in_ == NAMES
    np.testing.assert_allclose([rule.intercept_, *rule.coef_], expected.params, rtol=1e-8)
    rows = rule.coefficients_
    for key, values in {
        "estimate": expected.params, "se": expected.bse, "t": expected.tvalues, "p": expected.pvalues,
        "low": expected.conf_int()[:, 0], "high": expected.conf_int()[:, 1],
    }.items():  # fmt: skip
        np.testing.assert_allclose([row[key] for row in rows], values, rtol=1e-8)
    np.testing.assert_allclose(rule.coef_cov_, expected.cov_params(), rtol=1e-8)
    full = sm.add_constant(x)
    np.testing.assert_allclose(
        [row["vif"] for row in rows[1:]], [variance_inflation_factor(full, j) for j in (1, 2, 3)], rtol=1e-8
    )
    metrics = rule.metrics_
    assert metrics.r2 == pytest.approx(expected.rsquared, rel=1e-10)
    assert metrics.adjusted_r2 == pytest.approx(expected.rsquared_adj, rel=1e-10)
    assert metrics.residual_sd == pytest.approx(math.sqrt(expected.scale), rel=1e-8)
    assert (metrics.f, metrics.f_p) == pytest.approx((expected.fvalue, expected.f_pvalue), rel=1e-6)
    np.testing.assert_allclose(rule.mean_, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(rule.cov_, np.cov(x.T), rtol=1e-12)


def test_leave_one_out_r2_equals_explicit_refits():
    records = simulate(14, noise=0.03)
    x, y = design(records)
    error = rival = 0.0
    for i in range(14):
        rest = np.delete(np.arange(14), i)
        params = sm.OLS(y[rest], sm.add_constant(x[rest])).fit().params
        error += (y[i] - params[0] - x[i] @ params[1:]) ** 2
        rival += (y[i] - y[rest].mean()) ** 2
    metrics = fit_rule(records).metrics_
    assert metrics.leave_one_out_r2 == pytest.approx(1 - error / rival, rel=1e-8)
    assert metrics.leave_subset_out_r2 == pytest.approx(1 - error / rival, rel=1e-8)


def test_a_known_rule_is_recovered_within_its_intervals():
    """95 % intervals that cover the truth more rarely make noise look like a finding (limits: about 4 sd of chance)."""
    covered = []
    for seed in range(100):
        rule = fit_rule(simulate(16, seed=seed))
        truth = [TRUE_INTERCEPT, *(TRUE_COEF[n] for n in NAMES)]
        covered += [row["low"] <= b <= row["high"] for row, b in zip(rule.coefficients_, truth, strict=True)]
    assert 0.91 <= np.mean(covered) <= 0.985


@pytest.mark.parametrize("weighted", [False, True])
def test_repeats_are_no_further_runs_to_least_squares(weighted):
    """Runs on one subset share what is particular to it: the fit and its errors are those of the subsets' means."""
    records = simulate(30, noise=0.02, repeats=8)
    weights = {r.run_id: 0.5 + 0.1 * (k % 7) for k, r in enumerate(records)} if weighted else {}
    x, y = design(records)
    w = np.array([weights.get(r.run_id, 1.0) for r in records])
    w /= w.mean()
    keys = np.array([r.subset_key for r in records])
    rows = [(np.average(np.c_[x, y][keys == k], axis=0, weights=w[keys == k]), w[keys == k].mean()) for k in set(keys)]
    means, of = np.array([m for m, _ in rows]), np.array([v for _, v in rows])
    expected = sm.WLS(means[:, -1], sm.add_constant(means[:, :-1]), weights=of).fit()
    rule = fit_rule(records, weights=weights)
    np.testing.assert_allclose([rule.intercept_, *rule.coef_], expected.params, rtol=1e-8)
    np.testing.assert_allclose([row["se"] for row in rule.coefficients_], expected.bse, rtol=1e-8)
    np.testing.assert_allclose(rule.coef_cov_, expected.cov_params(), rtol=1e-8)
    assert (rule.metrics_.f, rule.metrics_.f_p) == pytest.approx((expected.fvalue, expected.f_pvalue), rel=1e-6)
    assert rule.metrics_.df_residual == 22 - 4


def test_a_penalised_fit_knows_its_error_from_the_subsets_too():
    """With a penalty of next to nothing on equal repeats, ridge's errors are least squares'."""
    from dataclasses import replace

    records = [replace(r, run_id=f"{r.run_id}-{k}") for r in simulate(20, noise=0.02) for k in range(2)]
    for k, r in enumerate(records):
        r.evaluation = {"held-out": {**r.evaluation["held-out"], "loss": r.loss("held-out") * (1 + 0.002 * (k % 3))}}
    ols, ridge = fit_rule(records), fit_rule(records, "ridge")
    assert ridge.metrics_.setting["penalty"] < 0.01
    np.testing.assert_allclose([r["se"] for r in ridge.coefficients_], [r["se"] for r in ols.coefficients_], rtol=0.03)


def test_provenance_is_kept():
    records = simulate(10)
    rule = fit_rule(records)
    assert rule.n_runs_ == 10
    assert rule.ledger_digest_ == RunLedger.digest(records)
    assert rule.pool_digest_ == "p" * 32
    assert rule.evaluation == "held-out"
    assert rule.identities["ppl"]["model"]["weights"] == "a" * 32
    assert rule.numerics["ppl"] == {"precision": "fp32"}
    assert rule.regime["template"] == "alpaca"
    assert rule.transforms_["ppl"].to_json() == {"kind": "log", "low": 0.5, "high": 5.0}
    assert rule.verified and rule.has_region


def test_a_ledger_may_be_given_itself(tmp_path):
    ledger = RunLedger(tmp_path)
    for record in simulate(10):
        ledger.add(record)
    assert fit_rule(ledger).ledger_digest_ == fit_rule(simulate(10)).ledger_digest_


def test_repeats_give_the_noise_ceiling_and_are_left_out_together():
    rule = fit_rule(simulate(30, noise=0.02, repeats=8))
    metrics = rule.metrics_
    assert metrics.n_subsets == 22
    assert metrics.repeat_df == 8
    assert metrics.repeat_sd == pytest.approx(0.02, rel=0.6)
    share = metrics.repeat_sd**2 / metrics.sd_log_loss**2
    assert metrics.noise_ceiling_r2 == pytest.approx(1 - share)
    expected = [max(0.0, 1 - 8 * share / chi2.ppf(q, 8)) for q in (0.025, 0.975)]
    assert [metrics.noise_ceiling_low, metrics.noise_ceiling_high] == pytest.approx(expected)
    assert metrics.leave_subset_out_r2 != metrics.leave_one_out_r2
    assert "with repeats of a subset left out together" in rule.summary(120)
    assert "noise ceiling: equal subsets" in rule.summary(300)


def test_a_ceiling_from_few_repeats_is_not_given():
    """From two degrees of freedom it may print anything between 0 and 1."""
    rule = fit_rule(simulate(30, noise=0.02, repeats=4))
    assert rule.metrics_.repeat_sd > 0 and rule.metrics_.noise_ceiling_r2 is None
    text = " ".join(rule.summary(200).split())
    assert "noise ceiling: not given, equal subsets with other seeds differ by sd" in text
    assert "(4 degrees of freedom), and fewer than 5 say little" in text


def test_the_calibration_slope_is_that_of_a_regression_through_the_training_means():
    records = simulate(30, noise=0.05)
    metrics = fit_rule(records).metrics_
    rows, folds = metrics.held_out, grouped_folds([r.subset_key for r in records])
    y = np.array([row["y"] for row in rows])
    mean = np.array([y[folds != fold].mean() for fold in folds])
    a, b = np.array([row["prediction"] for row in rows]) - mean, y - mean
    assert metrics.calibration == pytest.approx(sm.OLS(b, a).fit().params[0])
    said = f"a predicted difference of log loss of 0.1 comes out as {metrics.calibration / 10:.3g}"
    assert said in " ".join(fit_rule(records).summary(300).split())


def test_without_repeats_the_ceiling_is_unknown():
    assert "noise ceiling: unknown" in fit_rule(simulate(10)).summary(120)


def test_a_rule_that_does_not_beat_the_mean_says_so():
    records = simulate(12, seed=4, coef=dict.fromkeys(TRUE_COEF, 0.0))
    rule = fit_rule(records)
    assert rule.metrics_.leave_one_out_r2 <= 0
    assert any(note.startswith("THIS RULE DOES NOT BEAT THE MEAN") for note in rule.metrics_.notes)
    assert "Do not weight data by it" in rule.summary(200)


def test_a_rule_that_may_be_chance_says_so():
    """Held-out R² is above 0 for about one ledger of pure noise in eight; the F test then still has a word."""
    for seed in range(40):
        rule = fit_rule(simulate(12, seed=seed, coef=dict.fromkeys(TRUE_COEF, 0.0)))
        notes = " ".join(rule.metrics_.notes)
        assert ("DOES NOT BEAT THE MEAN" in notes) == (rule.metrics_.leave_subset_out_r2 <= 0)
        guess = rule.metrics_.leave_subset_out_r2 > 0 and rule.metrics_.f_p > 0.05
        assert ("treat it as a guess" in notes) == guess


def test_a_good_rule_has_no_notes():
    assert fit_rule(simulate(30)).metrics_.notes == []


def test_indicators_may_be_chosen_and_are_not_taken_twice():
    rule = fit_rule(simulate(10), indicators=["knn_6", "ppl", "ppl"])
    assert rule.feature_names_in_ == ["knn_6", "ppl"]
    text = refused(simulate(10), indicators=["mtld", "ppl"])
    assert text == (
        "--indicators: no run has the indicators mtld; the runs have ppl, length_output, knn_6. "
        "Fix: name some of these."
    )
    assert "no indicator is named" in refused(simulate(10), indicators=[])


def test_only_the_defaults_are_fitted_unasked():
    records = simulate(12)
    for i, record in enumerate(records):
        record.phi_means.update(ifd=0.1 * i, my_own=i * i)
        record.transforms.update(ifd={"kind": "log", "low": 0, "high": 1}, my_own={"kind": "identity"})
    assert fit_rule(records).feature_names_in_ == NAMES
    assert fit_rule(records, indicators=["my_own"]).feature_names_in_ == ["my_own"]
    for record in records:
        record.phi_means = {"my_own": 1.0}
    assert "none of the default regressors; they have my_own" in refused(records)


def test_too_few_runs_are_refused_with_the_command():
    text = refused(simulate(5))
    assert "5 runs are too few for 3 regressors (length_output, ppl, knn_6): it takes at least 6" in text
    assert "make another designed run: `im-lightning fit … --data.subset_size=300 --data.subset_seed=5`" in text
    assert "fewer regressors (--indicators a,b)" in text
    assert "(subset seeds 3 to 5)" in refused(simulate(3))
    assert fit_rule(simulate(6)).n_runs_ == 6


def test_no_designed_runs_are_refused():
    records = [make_record(0, purpose="weighted"), make_record(1, purpose="search"), make_record(2, status="failed")]
    text = refused(records)
    assert "no complete designed runs to fit on (there are 1 weighted, 1 search, 1 failed designed)" in text
    assert "`im-lightning fit … --data.subset_size=300 --data.subset_seed=3`" in text  # seed 2 was tried and failed
    text = refused([])
    assert "(there are none)" in text and "`im-lightning fit … --data.subset_size=N --data.subset_seed=0`" in text


def test_incomplete_search_and_compare_runs_never_count():
    records = simulate(10)
    extra = [make_record(90, loss=99.0, purpose=p) for p in ("search", "compare")]
    extra += [make_record(95, loss=99.0, status=s) for s in ("incomplete", "failed")]
    assert fit_rule(records + extra).ledger_digest_ == fit_rule(records).ledger_digest_
    assert "4 runs are too few" in refused(simulate(4) + extra)


def test_weighted_runs_never_join():
    """Their rows were drawn by a rule: they lie where it sent them, and would confirm it."""
    weighted = simulate(6, seed=9, first=50, purpose="weighted")
    assert fit_rule(simulate(6) + weighted).metrics_.runs_by_purpose == {"designed": 6}
    assert "4 runs are too few" in refused(simulate(4) + weighted)


def test_several_evaluation_sets_need_a_name():
    records = simulate(8)
    for record in records:
        record.evaluation["other"] = {"loss": 3.0 + 0.01 * record.phi_means["ppl"] ** 2}
    text = refused(records)
    assert "the runs have 2 sets: held-out (8 runs), other (8 runs)" in text
    assert "--evaluation" in text
    assert fit_rule(records, evaluation="other").evaluation == "other"
    text = refused(records, evaluation="test")
    assert "evaluation set 'test': no complete designed run was evaluated on it" in text


def test_diverged_runs_are_left_out_and_named():
    records = simulate(10)
    records[3].evaluation["held-out"]["loss"] = math.nan
    rule = fit_rule(records)
    assert rule.n_runs_ == 9
    assert rule.metrics_.notes[:1] == ["left out, without a finite loss on held-out: 1 run (run-003)"]
    for record in records:
        record.evaluation["held-out"]["loss"] = None
    assert "none of the 10 runs (run-000, run-001, run-002, …) has a finite loss" in refused(records)


def test_missing_means_name_runs_and_indicators():
    records = simulate(10)
    records[2].phi_means["knn_6"] = math.nan
    records[4].phi_means["knn_6"] = math.nan
    text = refused(records)
    assert "the mean of a regressor is missing: knn_6 in 2 runs (run-002, run-004)" in text
    assert "--indicators length_output,ppl" in text


def test_a_constant_regressor_is_named():
    records = simulate(10)
    for record in records:
        record.phi_means["length_output"] = 4.2
    text = refused(records)
    assert "the design is singular: the mean of length_output is the same in all 10 runs" in text
    assert "--indicators ppl,knn_6" in text and "--data.subset_tilt" in text


def test_collinear_regressors_are_named():
    records = simulate(10)
    for record in records:
        record.phi_means["length_output"] = 3 - 2 * record.phi_means["ppl"]
    text = refused(records)
    assert "length_output, ppl are collinear over the 10 runs (10 different subsets)" in text
    assert "knn_6 are" not in text


def test_too_few_different_subsets_are_singular():
    records = [make_record(i, simulate(3)[i % 3].phi_means, 2.0 + 0.1 * i, subset=i % 3) for i in range(12)]
    assert "over the 12 runs (3 different subsets)" in refused(records)


def test_equal_losses_are_refused():
    records = [make_record(i, r.phi_means, 2.5) for i, r in enumerate(simulate(10))]
    assert "the loss is the same in all 10 runs" in refused(records)


def test_nearly_collinear_regressors_are_flagged():
    rng = np.random.default_rng(0)
    records = simulate(20)
    for record in records:
        record.phi_means["length_output"] = record.phi_means["ppl"] + 0.01 * rng.standard_normal()
    notes = " ".join(fit_rule(records).metrics_.notes)
    assert "Collinear regressors: length_output (VIF " in notes
    assert "knn_6 (VIF" not in notes


def test_a_run_of_high_leverage_is_named():
    records = simulate(20)
    records[7].phi_means["ppl"] += 50.0
    rule = fit_rule(records)
    assert rule.metrics_.high_leverage_runs == ["run-007"]
    assert any("High leverage" in n and "run-007" in n for n in rule.metrics_.notes)


def test_an_unknown_method_is_refused():
    text = refused(simulate(10), method="lasso")
    assert "method 'lasso': this version does not have it. Fix: use one of ols, ridge, elastic-net" in text


def test_the_summary_fits_narrow_terminals():
    rule = fit_rule(simulate(11))
    for width in (24, 34, 50, 60, 80, 120):
        lines = rule.summary(width).splitlines()
        assert max(map(len, lines)) <= width, width
        text = "".join("".join(lines).split())
        for word in ("log(ppl)", "log1p(length_output)", "intercept", "knn_6", f"{rule.coef_[1]:.4g}"):
            assert word in text
    (head,) = [line for line in rule.summary(80).splitlines() if line.startswith("regressor")]
    assert "95 % interval" in head or "(hidden columns: 95 % interval)" in rule.summary(80)


def test_runs_missing_agrees_with_the_refusal():
    """The callback promises that after so many more runs there is a rule."""
    assert runs_missing([]) == 8, "five indicators need a base model alone"
    assert runs_missing([], p=3) == 6
    for n in range(1, 9):
        records = simulate(n)
        missing = runs_missing(records)
        assert missing == max(0, 6 - n)
        if missing:
            assert "too few" in refused(records)
            assert fit_rule(simulate(n + missing)).n_runs_ == n + missing
    for purpose in ("weighted", "search"):
        assert runs_missing([*simulate(4), make_record(50, purpose=purpose)]) == 2
    assert runs_missing(simulate(8), p=9) == 4
    two = simulate(4) + simulate(6, first=50, regime={"learning_rate": 1.0})
    assert runs_missing(two) == 0
    assert runs_missing(two, regime="run-001") == 2


def test_a_repeat_of_the_run_that_is_left_out_is_no_held_out_score():
    """Four subsets, each run twice, and three regressors: a run's repeat has given its loss away."""
    rule = fit_rule(simulate(8, repeats=4))
    metrics = rule.metrics_
    assert metrics.grouped_r2 is None and metrics.leave_subset_out_r2 is None
    assert metrics.leave_one_out_r2 is not None and rule.held_out_r2 is None
    assert metrics.df_residual == 0 and metrics.adjusted_r2 is None and metrics.f is None
    assert all(row["se"] is None for row in rule.coefficients_)
