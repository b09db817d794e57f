"""If these failed, a fit would train on rows weighted otherwise than its record says."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from im_lightning._utils.rng import generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import checked_weights, systematic_sample
from im_lightning.sampling.weights.quality_weights import effective_sample_size, move_text, quality_weights

N = 2000


def make_table(rows: int = N, seed: int = 0) -> ScoreTable:
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal(rows)
    values = {
        "ppl": np.exp(2.0 + 0.5 * rng.standard_normal(rows) - 0.5 * quality),
        "reward": quality + rng.standard_normal(rows),
    }
    ids = [f"{i:032x}" for i in range(rows)]
    return ScoreTable(np.arange(rows), ids, ["a", "b"] * (rows // 2), values)


def make_rule(region: bool = True, shift: float = 0.0, reach: float | None = 2.5) -> LinearRule:
    cov = np.array([[0.02, -0.01], [-0.01, 0.05]])
    return LinearRule(
        name="test",
        intercept_=0.1,
        coef_=np.array([0.4, -0.2]),
        feature_names_in_=["ppl", "reward"],
        transforms_={"ppl": Transform("log", 0.0, 4.5), "reward": Transform("identity", -4.0, 4.0)},
        mean_=np.array([2.0 + shift, 0.0]) if region else None,
        cov_=cov if region else None,
        radius_=2.5 if region else None,
        reach_=reach if region else None,
        lowest_=-5.0,
    )


TABLE, RULE = make_table(), make_rule()


def test_tilted_weights_have_the_edge_of_the_region_as_their_mean() -> None:
    result = quality_weights(TABLE, RULE)
    assert result.method == "tilt" and result.report["strength"] == 1.0 and not result.report["notes"]
    mean = result.weights @ RULE.phi(TABLE)
    assert mean == pytest.approx(RULE.edge(), abs=1e-7)
    assert RULE.mahalanobis(mean) == pytest.approx(2.5, abs=1e-6)
    assert result.weights.sum() == pytest.approx(1) and result.weights.min() > 0
    half = quality_weights(TABLE, RULE, strength=0.5).weights @ RULE.phi(TABLE)
    assert half == pytest.approx((RULE.phi(TABLE).mean(axis=0) + RULE.edge()) / 2, abs=1e-7)
    assert quality_weights(TABLE, RULE, strength=0.0).weights == pytest.approx(np.full(N, 1 / N))


def test_the_drawn_subsets_mean_is_the_target_on_average() -> None:
    result = quality_weights(TABLE, RULE, budget=300)
    assert result.report["strength"] == 1.0
    weights, phi = checked_weights(result.weights), RULE.phi(TABLE)
    means = np.array([phi[systematic_sample(weights, 300, generator(0, e))].mean(axis=0) for e in range(400)])
    error = means.std(axis=0) / np.sqrt(len(means))
    assert np.all(np.abs(means.mean(axis=0) - RULE.edge()) <= 4 * error)
    assert [result.report["expected_mean"][k] for k in ("ppl", "reward")] == pytest.approx(RULE.edge(), abs=1e-6)


def test_a_large_budget_lowers_the_strength_until_no_row_is_wanted_twice() -> None:
    result = quality_weights(TABLE, RULE, budget=1400)
    reached = result.report["strength"]
    assert 0 < reached < 1 and "rows would have to be drawn more than once" in result.report["notes"][0]
    assert 1400 * result.weights.max() <= 1 + 1e-6
    assert 1400 * result.weights.max() > 0.98  # no lower than needed
    target = RULE.phi(TABLE).mean(axis=0) * (1 - reached) + RULE.edge() * reached
    assert result.weights @ RULE.phi(TABLE) == pytest.approx(target, abs=1e-7)
    everything = quality_weights(TABLE, RULE, budget=N)
    assert everything.report["strength"] == 0 and everything.weights == pytest.approx(np.full(N, 1 / N))


def test_an_edge_outside_the_pool_lowers_the_strength() -> None:
    with pytest.warns(UserWarning, match="outside its region"):
        result = quality_weights(TABLE, make_rule(shift=-8.0))
    assert 0 < result.report["strength"] < 1 and "no weights of these rows reach the target" in " ".join(
        result.report["notes"]
    )


def test_a_pool_outside_the_region_is_said_with_its_distance() -> None:
    rule = make_rule(shift=-1.0)
    distance = rule.mahalanobis(rule.phi(TABLE).mean(axis=0))
    with pytest.warns(UserWarning, match=f"lie {distance:.2f} from the mean of the runs.*radius 2.50.*extrapolates"):
        report = quality_weights(TABLE, rule, strength=0.2).report
    assert report["mahalanobis"]["pool"] == pytest.approx(distance) and "extrapolates" in report["notes"][-1]


def test_an_old_region_weighs_as_before_and_asks_for_a_refit() -> None:
    old = make_rule(reach=None)
    made = quality_weights(TABLE, old)
    assert made.weights == pytest.approx(quality_weights(TABLE, RULE).weights, abs=1e-12)  # its reach was its radius
    assert made.report["notes"] == ["rule test has an old region: refit (im-lightning refit LEDGER --out rule.json)"]
    assert "old region: refit" in replace(old, n_runs_=9).summary(200)


def test_a_target_predicted_below_every_run_is_said() -> None:
    target = float(RULE.log_loss(RULE.edge()))
    (note,) = quality_weights(TABLE, replace(RULE, lowest_=target + 0.1)).report["notes"]
    assert note == "the target is beyond every run: predicted 0.1 below the best of them (log loss)"
    assert quality_weights(TABLE, replace(RULE, lowest_=target)).report["notes"] == []


def test_a_rule_without_a_region_falls_back_to_softmax_and_says_so() -> None:
    rule = make_rule(region=False)
    with pytest.warns(UserWarning, match="no fitted region: weighting by softmax at temperature 1"):
        result = quality_weights(TABLE, rule, temperature=0.1)
    assert result.method == "softmax"
    predicted = rule.predict(TABLE)
    spread = 1.4826 * np.median(np.abs(predicted - np.median(predicted)))
    expected = np.exp(-predicted / spread)
    assert result.weights == pytest.approx(expected / expected.sum(), rel=1e-9)


@pytest.mark.parametrize("method", ["tilt", "softmax", "rank", "top"])
def test_better_rows_weigh_more_under_every_method(method: str) -> None:
    weights = quality_weights(TABLE, RULE, method, budget=200).weights
    correlation = spearmanr(weights, RULE.predict(TABLE)).statistic
    assert correlation < (-0.4 if method == "top" else -0.9 if method == "tilt" else -0.999)


def test_softmax_survives_predictions_that_hardly_differ() -> None:
    table = TABLE.with_values("ppl", np.full(N, 7.0)).with_values("reward", np.r_[np.zeros(N - 1), 1.0])
    result = quality_weights(table, RULE, "softmax")  # median absolute deviation 0: the sd takes over
    assert np.isfinite(result.weights).all() and result.weights[-1] == result.weights.max() > 1 / N
    equal = quality_weights(table.with_values("reward", np.zeros(N)), RULE, "softmax")
    assert equal.weights == pytest.approx(np.full(N, 1 / N)) and "all predictions are equal" in equal.report["notes"][0]


def test_rank_weights_are_linear_in_the_rank_at_temperature_one() -> None:
    table = make_table(4).with_values("ppl", np.full(4, 7.0)).with_values("reward", [3.0, 1.0, 1.0, 2.0])
    assert quality_weights(table, RULE, "rank").weights == pytest.approx(np.array([4, 1.5, 1.5, 3]) / 10)
    sharper = quality_weights(table, RULE, "rank", temperature=0.5).weights
    assert sharper == pytest.approx(np.array([16, 2.25, 2.25, 9]) / 29.5)


def test_top_takes_the_budget_and_shares_it_among_ties() -> None:
    table = make_table(4).with_values("ppl", np.full(4, 7.0)).with_values("reward", [3.0, 1.0, 1.0, 0.0])
    assert quality_weights(table, RULE, "top", budget=2).weights == pytest.approx([0.5, 0.25, 0.25, 0.0])
    assert quality_weights(table, RULE, "top", budget=3).weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_a_floor_mixes_in_uniform_weights() -> None:
    plain, mixed = quality_weights(TABLE, RULE).weights, quality_weights(TABLE, RULE, floor=0.3).weights
    assert mixed == pytest.approx(0.7 * plain + 0.3 / N)
    assert quality_weights(TABLE, RULE, "top", budget=100, floor=0.1).weights.min() == pytest.approx(0.1 / N)


def test_rows_without_a_prediction_or_not_eligible_weigh_nothing_and_are_counted() -> None:
    reward = TABLE.values["reward"].copy()
    reward[:5] = np.nan
    table = TABLE.with_values("reward", reward, reasons=["empty response"] * 5 + [None] * (N - 5))
    eligible = np.ones(N, dtype=bool)
    eligible[3:13] = False
    for method in ("tilt", "softmax", "rank", "top", "uniform"):
        result = quality_weights(table, RULE, method, budget=100, eligible=eligible, floor=0.2)
        assert not result.weights[:13].any() and result.weights.sum() == pytest.approx(1)
        assert result.report["ineligible"] == {"excluded": 10, "no_prediction": 3}
        assert result.report["eligible"] == N - 13


def test_the_report_is_plain_and_complete() -> None:
    report = quality_weights(TABLE, RULE, budget=500, eligible=np.arange(N) > 4).report
    assert json.loads(json.dumps(report)) == report
    weights = quality_weights(TABLE, RULE, budget=500, eligible=np.arange(N) > 4).weights
    assert report["ess"] == pytest.approx(1 / np.sum(weights**2)) and report["max_weight"] == weights.max()
    assert report["predicted"]["expected"] < report["predicted"]["pool"]
    assert report["mahalanobis"]["expected"] == pytest.approx(2.5, abs=1e-6) and report["radius"] == 2.5
    assert report["target"] == pytest.approx(report["expected_mean"], abs=1e-6)


def test_a_tilt_that_has_to_be_weakened_is_said() -> None:
    """Otherwise nearly uniform weights would pass for those that were asked for."""
    with pytest.warns(UserWarning, match=r"strength 1 was lowered to 0\.\d+ \(0 is uniform\): beyond it rows would"):
        result = quality_weights(TABLE, RULE, "tilt", budget=N - 100)
    assert result.report["strength"] < 1 and "was lowered" in result.report["notes"][0]


def test_the_expected_mean_counts_certain_rows_once() -> None:
    report = quality_weights(TABLE, RULE, "softmax", temperature=0.05, budget=1000).report
    assert "rows weigh so much that every draw of 1000 holds them" in report["notes"][0]
    weights = quality_weights(TABLE, RULE, "softmax", temperature=0.05, budget=1000).weights
    assert report["expected_mean"]["reward"] < (weights @ RULE.phi(TABLE))[1]


def test_uniform_needs_no_rule() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quality_weights(TABLE, None, "uniform")
    assert result.weights == pytest.approx(np.full(N, 1 / N)) and result.report["ess"] == pytest.approx(N)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "best"}, "weighting 'best': it is out of range.*one of auto, tilt"),
        ({"strength": -0.1}, "strength=-0.1.*0 \\(uniform\\)"),
        ({"temperature": 0.0}, "temperature=0.0.*a positive number"),
        ({"floor": 1.5}, "floor=1.5.*a share from 0 to 1"),
        ({"budget": N + 1}, f"budget={N + 1}: {N} of {N} rows can be drawn"),
        ({"eligible": np.zeros(N, dtype=bool)}, f"pool: 0 of {N} rows can be drawn \\(0 eligible"),
        ({"eligible": np.ones(3, dtype=bool)}, r"shape \(3,\) for 2000 rows"),
        ({"eligible": np.ones(N)}, "one bool per row"),
        ({"method": "top"}, "weighting top: how many rows are the top is not known.*budget="),
        ({"rule": None}, "weighting auto: it needs a rule"),
        ({"rule": make_rule(region=False), "method": "tilt"}, "no fitted region.*use softmax"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError, match=text):
        quality_weights(TABLE, **({"rule": RULE} | options))


def test_effective_sample_size_is_kishs() -> None:
    weights = np.random.default_rng(3).random(50)
    share = weights / weights.sum()
    assert effective_sample_size(weights) == pytest.approx(1 / (share**2).sum())
    assert effective_sample_size(np.ones(7)) == 7 and math.isnan(effective_sample_size(np.zeros(3)))


def test_a_rule_that_predicts_no_gain_leaves_the_weights_uniform() -> None:
    """With all coefficients 0 the tilt went to the centre of the runs, and 56 of 400 rows were lost for nothing; where
    the pool is predicted better than the region's edge, the tilt would raise the loss."""
    nothing = make_rule(shift=0.3)
    nothing.coef_ = np.zeros(2)
    beyond = make_rule()
    beyond.mean_ = np.array([6.0, -9.0])  # runs far worse than the pool
    for rule in (nothing, beyond):
        with pytest.warns(UserWarning, match="predicts no lower loss"):
            result = quality_weights(TABLE, rule, budget=100)
        assert result.method == "uniform" and result.report["ess"] == pytest.approx(N)
        assert result.weights == pytest.approx(np.full(N, 1 / N)) and "move" not in result.report
        assert "uniform weights" in result.report["notes"][-1]


def test_the_parts_of_a_tilt_add_up() -> None:
    """Who reads "predicted −0.1" must see how much of it is only that the runs lie elsewhere than the pool."""
    rule = make_rule(shift=-0.05)
    report = quality_weights(TABLE, rule, strength=0.8).report
    pool, centre = rule.phi(TABLE).mean(axis=0), np.asarray(rule.mean_)
    parts, cov = report["move"], np.linalg.inv(np.asarray(rule.cov_))
    step = 0.8 * (centre - pool)
    assert parts["to_centre"]["distance"] == pytest.approx(math.sqrt(step @ cov @ step))
    assert parts["to_centre"]["predicted"] == pytest.approx(rule.coef_ @ step)
    assert parts["to_lower_loss"]["distance"] == pytest.approx(0.8 * 2.5)
    assert parts["to_lower_loss"]["predicted"] == pytest.approx(
        -0.8 * 2.5 * math.sqrt(rule.coef_ @ rule.cov_ @ rule.coef_)
    )
    change = report["predicted"]["expected"] - report["predicted"]["pool"]
    assert change == pytest.approx(sum(part["predicted"] for part in parts.values()), abs=1e-7)
    said = move_text(report)
    assert said.startswith("the weights change the predicted log loss in two steps: by ")
    for name, words in (
        ("to_centre", "nearer by {:.2f} standard deviations"),
        ("to_lower_loss", "they go {:.2f} standard"),
    ):
        assert f"by {parts[name]['predicted'] + 0.0:+.4f} since" in said
        assert words.format(parts[name]["distance"]) in said
    assert said.endswith("Only the second step is the rule's choice")
    assert move_text(quality_weights(TABLE, rule, "rank").report) == ""
