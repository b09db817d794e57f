"""Verdicts in numbers: by hand, against statsmodels, and by how often intervals hold the truth."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from im_lightning.experiments.answers.win_rate import Pair, WinRate, length_controlled, share, with_loss

# A's score where A is shown first and where it is shown second
BY_HAND = [
    Pair("p1", 1.0, 1.0, (10, 5)),  # better in both orders
    Pair("p1", 1.0, 0.0, (4, 8)),  # the first each time
    Pair("p2", 0.0, 0.0, (3, 9)),  # worse in both
    Pair("p3", 0.5, 0.5, (7, 7)),  # tie in both
    Pair("p4", 1.0, 0.5, (20, 2)),  # better, then a tie
    Pair("p5", math.nan, 1.0, (1, 1)),  # one verdict is missing
]


def test_by_hand() -> None:
    found = WinRate.of(BY_HAND)
    assert (found.pairs, found.instructions, found.missing) == (5, 4, 1)
    # instruction means of the scores 1, .5 | 0 | .5 | .75
    assert found.rate.value == pytest.approx((0.75 + 0 + 0.5 + 0.75) / 4)
    assert found.better.value == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert found.tie.value == pytest.approx((0.5 + 0 + 1 + 0) / 4)
    assert found.worse.value == pytest.approx((0 + 1 + 0 + 0) / 4)
    assert found.agreement.value == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    # the first place won: 1 of 2 and 2 of 2 | 1 of 2 | 1 of 2 | 1.5 of 2
    assert found.first.value == pytest.approx((0.75 + 0.5 + 0.5 + 0.75) / 4)
    # the longer answer: 1, .5 | 1 | equal | .75
    assert found.longer.value == pytest.approx((0.75 + 1 + 0.75) / 3)
    assert found.words == pytest.approx(((10 + 4 + 3 + 7 + 20) / 5, (5 + 8 + 9 + 7 + 2) / 5))
    assert math.isnan(found.controlled.value) and found.controlled.reason == "4 instructions, 10 are the least"


def test_of_no_verdict_no_share_is_printed() -> None:
    """`compare --judge` said that both orders agree in nan% of pairs, where no pair had a verdict."""
    found = WinRate.of(BY_HAND[-1:])
    assert found.biases() == ["1 pair has no verdict in both orders, and is left out."]
    assert WinRate.of([]).biases() == []


def test_an_interval_by_hand() -> None:
    """Wilson's formula with the variance of 1, 0, 0.5, 0.75 and t's quantile at 3 degrees of freedom."""
    found = share([1, 0, 0.5, 1, 0.5], ["a", "b", "c", "d", "d"])
    p, variance, q = 0.5625, np.var([1, 0, 0.5, 0.75], ddof=1) / 4, stats.t.ppf(0.975, 3)
    n = p * (1 - p) / variance
    root = q * math.sqrt(p * (1 - p) / n + q**2 / (4 * n**2))
    assert found.low == pytest.approx((p + q**2 / (2 * n) - root) / (1 + q**2 / n))
    assert found.high == pytest.approx((p + q**2 / (2 * n) + root) / (1 + q**2 / n))


@pytest.mark.parametrize("wins", [0, 30, 170, 400])
def test_of_independent_wins_and_losses_it_is_wilsons_interval(wins: int) -> None:
    """As statsmodels has it, but for t's quantile and n − 1, which at 400 is little."""
    found = share([1.0] * wins + [0.0] * (400 - wins), [str(k) for k in range(400)])
    low, high = proportion_confint(wins, 400, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=4e-4)


def test_likeness_within_an_instruction_widens_it() -> None:
    """Five pairs of one instruction with one verdict are one instruction's evidence."""
    alone = share([1, 0] * 40, [str(k) for k in range(80)])
    copied = share([1, 0] * 40 * 5, [str(k) for k in range(80)] * 5)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def test_without_verdicts_there_is_no_number() -> None:
    assert math.isnan(share([], []).value) and share([math.nan], ["a"]).text == "not known (no verdict)"
    assert WinRate.of([BY_HAND[-1]]).sentences("A", "B") == [
        "No pair has a verdict in both orders: nothing can be said."
    ]


def test_one_instruction_has_no_interval_and_says_so() -> None:
    found = WinRate.of([Pair("p1", 1.0, 1.0, (10, 5)), Pair("p1", 1.0, 1.0, (4, 8))])
    said = " ".join(found.sentences("A", "B"))
    assert found.rate.text == "1.000 (no interval: one instruction)" and "nan" not in said
    assert "No difference between A and B is shown: win rate 1.000 (no interval: one instruction), over 1 inst" in said
    assert "win rate at equal length not known (one instruction, 10 are the least)." in said


def test_equal_rates_or_losses_correlate_with_nothing() -> None:
    losses = {"a": 1.0, "b": 1.5, "c": 2.0, "d": 2.5}
    same = dict.fromkeys(losses, 0.5)
    said = "Win rate and loss over 4 arms: all {} are equal, so there is nothing to correlate."
    assert with_loss(same, losses) == said.format("win rates") and with_loss(losses, same) == said.format("losses")
    rates = {"a": 0.9, "b": 0.7, "c": 0.6, "d": 0.5}
    assert "Spearman -1.00 (arms of lower loss are preferred)" in with_loss(rates, losses)
    assert with_loss(rates, {**losses, "a": math.nan}) == ""


def test_equal_length_is_the_constant_of_a_logistic_fit() -> None:
    """Against statsmodels' Logit with clustered errors, on wins and losses."""
    rng = np.random.default_rng(4)
    prompts = np.repeat(np.arange(60), 3)
    a, b = rng.integers(5, 80, 180), rng.integers(5, 80, 180)
    odds = -0.3 + 1.5 * np.tanh((a - b) / 30) + rng.normal(0, 0.7, 60)[prompts]
    wins = (rng.random(180) < 1 / (1 + np.exp(-odds))).astype(float)
    pairs = [Pair(str(p), w, w, (int(x), int(y))) for p, w, x, y in zip(prompts, wins, a, b, strict=True)]
    found = length_controlled(pairs)
    d = (a - b).astype(float)
    x = sm.add_constant(np.tanh(d / np.sqrt(np.mean(d**2))))
    fit = sm.Logit(wins, x).fit(disp=0, cov_type="cluster", cov_kwds={"groups": prompts})
    theta, se, q = fit.params[0], fit.bse[0], stats.t.ppf(0.975, 58)
    wanted = [1 / (1 + math.exp(-v)) for v in (theta, theta - q * se, theta + q * se)]
    assert [found.value, found.low, found.high] == pytest.approx(wanted, rel=1e-4)


def test_without_statsmodels_the_other_shares_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts that took a judge an hour are not lost for want of a package; the one command that brings it is said."""
    monkeypatch.setitem(sys.modules, "statsmodels.api", None)
    rng = np.random.default_rng(4)
    lengths, wins = rng.integers(5, 80, (80, 2)), rng.integers(0, 2, 80).astype(float)
    pairs = [Pair(str(k), w, w, (int(a), int(b))) for k, (w, (a, b)) in enumerate(zip(wins, lengths, strict=True))]
    found = WinRate.of(pairs)
    assert found.rate.value == pytest.approx(wins.mean())
    assert found.controlled.text == "not known (it needs statsmodels (pip install 'im-lightning[api]'))"


def test_a_longer_model_that_is_no_better_is_told_apart() -> None:
    """A wins often, by its length alone: at equal length the rate is one half."""
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(600):
        a, b = int(rng.integers(40, 90)), int(rng.integers(20, 70))
        score = float(rng.random() < 1 / (1 + np.exp(-2.0 * np.tanh((a - b) / 32))))
        pairs.append(Pair(str(k), score, score, (a, b)))
    found = WinRate.of(pairs)
    assert found.rate.low > 0.55 and not found.controlled.off() and abs(found.controlled.value - 0.5) < 0.06
    assert any("The longer answer tends to win (0." in line for line in found.sentences("A", "B"))


def judged(preference: Any, count: int = 80) -> WinRate:
    """Verdicts of a judge that prefers by (place or lengths): `preference(words shown first, shown second)`."""
    rng = np.random.default_rng(1)
    pairs = []
    for k in range(count):
        a, b = (int(n) for n in rng.choice(np.arange(5, 90), 2, replace=False))
        pairs.append(Pair(str(k), preference(a, b), 1 - preference(b, a), (a, b)))
    return WinRate.of(pairs)


def test_a_judge_that_always_prefers_the_first_is_named() -> None:
    found = judged(lambda first, second: 1.0)
    said = " ".join(found.sentences("A", "B"))
    assert (found.first.value, found.agreement.value, found.rate.value) == (1.0, 0.0, 0.5) and found.first.off()
    assert "THE JUDGE ALWAYS PREFERS THE ANSWER SHOWN FIRST: its verdicts say nothing." in said
    assert "No difference between A and B is shown" in said
    assert "SHOWN SECOND" in " ".join(judged(lambda first, second: 0.0).sentences("A", "B"))


def test_one_pair_accuses_no_judge_and_a_missing_one_is_one() -> None:
    said = " ".join(WinRate.of([Pair("p1", 1.0, 0.0, (5, 5)), BY_HAND[-1]]).biases())
    assert said == "Both orders agree in 0.0% of pairs. 1 pair has no verdict in both orders, and is left out."


def test_a_judge_that_always_prefers_the_longer_is_named() -> None:
    found = judged(lambda first, second: float(first > second))
    said = " ".join(found.sentences("A", "B"))
    assert "THE JUDGE ALWAYS PREFERS THE LONGER ANSWER" in said
    assert "win rate at equal length not known (the verdicts follow the length alone)." in said
    assert "SHORTER ANSWER" in " ".join(judged(lambda first, second: float(first < second)).sentences("A", "B"))


def test_a_leaning_towards_a_place_is_said_and_cancels() -> None:
    rng = np.random.default_rng(2)
    found = judged(lambda first, second: float(rng.random() < 0.7), 300)
    said = " ".join(found.sentences("A", "B"))
    assert "The judge prefers the answer shown first (0." in said and not found.rate.off()


def test_a_fair_judge_is_accused_of_nothing() -> None:
    """At 95 % each, over 200 fair judges: about ten false alarms of each kind."""
    rng = np.random.default_rng(3)
    alarms = [judged(lambda first, second: float(rng.random() < 0.5)) for _ in range(200)]
    assert sum(one.first.off() for one in alarms) <= 20 and sum(one.longer.off() for one in alarms) <= 20
    assert sum(one.rate.off() for one in alarms) <= 20


def simulated(rng: np.random.Generator, mean: float, spread: float, count: int) -> list[Pair]:
    """One to three pairs per instruction, whose own win rates differ; lengths say nothing."""
    own = rng.beta(mean / spread, (1 - mean) / spread, count)
    pairs = []
    for k, p in enumerate(own):
        for _ in range(int(rng.integers(1, 4))):
            first, second = (rng.random(2) < p).astype(float)
            pairs.append(Pair(str(k), first, second, (int(rng.integers(5, 90)), int(rng.integers(5, 90)))))
    return pairs


SLOW = [
    pytest.param(mean, spread, 1200, marks=pytest.mark.slow) for mean in (0.25, 0.425, 0.5) for spread in (0.1, 1.0)
]


@pytest.mark.parametrize(("mean", "spread", "trials"), [(0.425, 1.0, 500), *SLOW])
def test_intervals_hold_the_truth_as_often_as_they_say(mean: float, spread: float, trials: int) -> None:
    """Instructions differ: 93 to 97 % of 95 % intervals hold the mean rate, where single pairs' would hold it less."""
    rng = np.random.default_rng(5)
    held, naive = 0, 0
    for _ in range(trials):
        pairs = simulated(rng, mean, spread, 80)
        scores = [pair.score for pair in pairs]
        found = share(scores, [pair.prompt for pair in pairs])
        held += found.low <= mean <= found.high
        single = share(scores, [str(k) for k in range(len(pairs))])
        naive += single.low <= mean <= single.high
    assert 0.93 <= held / trials <= 0.97, held / trials
    assert spread < 1 or naive / trials < 0.93


def test_intervals_at_equal_length_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    held, trials = 0, 400
    for _ in range(trials):
        found = length_controlled(simulated(rng, 0.425, 0.3, 80))
        held += found.low <= 0.425 <= found.high
    assert 0.93 <= held / trials <= 0.97, held / trials
