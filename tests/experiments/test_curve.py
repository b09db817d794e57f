"""What an arm is worth in random tokens: known curves, other libraries, coverage, and nothing beyond the ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import interp1d
from sklearn.isotonic import IsotonicRegression

from im_lightning.experiments.compare.curve import SCALES, Multiplier, Reading, TokenCurve
from im_lightning.experiments.compare.result import evidence_of
from im_lightning.experiments.compare.statistics import ExampleSums, compare
from im_lightning.experiments.compare.worth import ArmWorth, with_blocks
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import COMPUTE, RunRecord, now
from im_lightning.models.cost import UNKNOWN, Cost

POINTS = [f"random {scale:g}" for scale in SCALES]


def simulated(
    worth: Mapping[str, float],
    seed: int,
    slope: float = 0.3,
    seeds: int = 5,
    of_seeds: float = 0.02,
    noise: float = 0.1,
) -> ExampleSums:
    """Losses by seed and example, 3 − slope · log(times the tokens), with examples and candidate rows in common."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 30, 60)
    common = rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.03, (seeds, 1))

    def arm(times: float) -> np.ndarray:
        own = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, noise, (seeds, 60))
        return (3 - slope * math.log(times) + common + own) * tokens

    points = {name: arm(scale) for name, scale in zip(POINTS, SCALES, strict=True)}
    return ExampleSums({**points, **{name: arm(times) for name, times in worth.items()}}, tokens)


def means(sums: ExampleSums) -> dict[str, float]:
    return {name: float((found.sum(axis=1) / sums.tokens.sum()).mean()) for name, found in sums.sums.items()}


def read(sums: ExampleSums, spread: Mapping[str, tuple[float, float]] | None = None) -> Reading:
    found = means(sums)
    return Reading(TokenCurve(SCALES, [found[name] for name in POINTS]), POINTS, sums, spread)


def test_the_fit_is_scikit_learns_and_the_reading_scipys() -> None:
    """Curves of any shape, level parts and rises of noise among them."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scales = np.cumprod(rng.uniform(1.2, 3.0, 6))
        losses = 3 - 0.2 * np.log(scales) + rng.normal(0, 0.2, 6)
        curve = TokenCurve(scales, losses)
        fitted = IsotonicRegression(increasing=False).fit_transform(np.log(scales), losses)
        np.testing.assert_allclose(curve.losses, fitted, rtol=1e-12)
        at = rng.uniform(scales[0], scales[-1])
        loss = float(interp1d(np.log(scales), fitted)(math.log(at)))
        assert curve.parts(at) @ losses == pytest.approx(loss)
        if not np.isclose(fitted, loss).any():  # on a level part its middle is meant
            assert curve.scale_of(loss) == pytest.approx(at)


def test_a_known_multiplier_is_found() -> None:
    sums = simulated({"better": 1.7, "same": 1.0, "worse": 0.6}, seed=0, of_seeds=0.0, noise=0.0)
    for arm, times in {"better": 1.7, "same": 1.0, "worse": 0.6}.items():
        found = read(sums).multiplier(arm)
        assert found.value == pytest.approx(times, rel=1e-6)
        assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("times", "of_seeds", "noise"), [(1.7, 0.03, 0.1), (1.0, 0.0, 0.3)])
def test_intervals_cover_the_truth(times: float, of_seeds: float, noise: float) -> None:
    """A multiplier without an honest interval sells evidence that does not pay."""
    n = 80
    found = [read(simulated({"arm": times}, k, of_seeds=of_seeds, noise=noise)).multiplier("arm") for k in range(n)]
    assert sum(one.low <= times <= one.high for one in found) / n >= 0.89  # 95 % less two and a half standard errors
    assert np.median([one.high / one.low for one in found]) < 3, "an interval of all that was measured would cover, too"


def test_at_the_same_tokens_it_says_what_the_table_says() -> None:
    """An arm whose difference from random is shown is not as good as 1×, and the other way round."""
    shown = 0
    for k in range(25):
        sums = simulated({"arm": 1.25}, k, of_seeds=0.03)
        random = POINTS[SCALES.index(1.0)]
        pair = {name: sums.sums[name] for name in (random, "arm")}
        losses = {name: (found.sum(axis=1) / sums.tokens.sum()).tolist() for name, found in pair.items()}
        result = compare(losses, random, examples=ExampleSums(pair, sums.tokens))[1]
        found = read(sums).multiplier("arm")
        if abs(abs(result.difference) / result.difference_half_width - 1) > 0.1:  # draws differ in the third digit
            assert (found.low <= 1 <= found.high) == (result.p >= 0.05)
            shown += result.p < 0.05
    assert 0 < shown < 25


def test_nothing_is_said_beyond_the_curve() -> None:
    """An arm worth 30 times the tokens is worth more than 4 times, and that is all that four points can say."""
    reading = read(simulated({"far": 30.0, "near": 3.9, "bad": 0.2}, seed=1))
    far, near, bad = (reading.multiplier(arm) for arm in ("far", "near", "bad"))
    assert (far.text, far.interval) == ("more than 4×", "more than 4× to more than 4×")
    assert far.value == far.high == 4.0
    assert near.interval.endswith("to more than 4×") and not near.interval.startswith("more")
    assert (bad.text, bad.interval) == ("less than 0.5×", "less than 0.5× to less than 0.5×")


def test_a_level_curve_tells_nothing_of_an_arm_on_it() -> None:
    reading = read(simulated({"same": 1.0}, seed=2, slope=0.0))
    assert reading.multiplier("same").interval == "less than 0.5× to more than 4×"
    level = TokenCurve([0.5, 1, 2], [2.0, 2.0, 2.0])
    assert level.scale_of(2.0) == pytest.approx(1.0)
    assert level.scale_of(2.1) == 0 and level.scale_of(1.9) == math.inf


def test_one_seed_has_no_interval_and_other_rules_widen_it() -> None:
    one = read(simulated({"arm": 1.7}, seed=0, seeds=1)).multiplier("arm")
    assert math.isnan(one.low) and one.interval == "" and one.value > 1
    sums = simulated({"arm": 1.7}, seed=0)
    narrow, wide = (read(sums, spread).multiplier("arm") for spread in ({}, {"arm": (0.03, 39.0)}))
    assert wide.value == narrow.value and wide.low < narrow.low and wide.high > narrow.high


def test_evidence_is_what_an_arm_needs() -> None:
    """Random rows need nothing, perplexity the scores, a rule its runs, and what was merged into them; unknown is not
    free."""
    scoring = Cost(1e9, 5.0)
    run = RunRecord("a", "complete", "designed", now(), seconds=7.0, compute=dict.fromkeys(COMPUTE, 1))
    wanted = {"random": Cost(), "lowest-ppl": scoring, "weighted": scoring + run.cost, "mix": run.cost}
    wanted["by-source"] = run.cost
    assert {arm: evidence_of(arm, scoring, [run]) for arm in wanted} == wanted
    assert evidence_of("diverse", scoring, [run]) == scoring + run.cost
    assert evidence_of("diverse", scoring, [], rule=False) == scoring
    assert math.isnan(evidence_of("weighted", scoring, []).seconds)
    assert math.isnan(evidence_of("lowest-ppl", None, [run]).flops)


def test_blocks_are_counted_with_what_was_merged_of_them(tmp_path: Path) -> None:
    ledger, losses = RunLedger(tmp_path), {"held-out": {"loss": 1.0}}
    block = RunRecord("block", "complete", "block", now(), evaluation=losses, seconds=9.0)
    made = {"kind": "merged", "blocks": {"b0": {"run_id": "block"}}}
    merged = RunRecord("merged", "complete", "designed", now(), evaluation=losses, seconds=1.0, made=made)
    for one in (block, merged):
        ledger.add(one)
    assert [r.run_id for r in with_blocks([merged], ledger)] == ["merged", "block"]
    assert with_blocks([block], ledger) == [block]


def test_net_is_what_random_rows_would_have_cost_over_what_was_spent() -> None:
    """Twice the random tokens for three times their cost has not paid; what is not known is not called free."""
    worth = ArmWorth(Multiplier(2.0, 1.5, 4.0, 0.5, 4.0), Cost(1e12, 10.0), Cost(2e12, 40.0), Cost(1e12, 10.0))
    assert worth.net_flops.value == pytest.approx(2 / 3) and worth.net_seconds.value == pytest.approx(0.4)
    assert worth.net_flops.interval == "0.5× to more than 1.3×"
    unknown = ArmWorth(worth.multiplier, worth.cost, UNKNOWN, worth.random)
    assert unknown.net_flops.text == "not known" and unknown.net_flops.interval == ""
    assert Multiplier.from_json(worth.multiplier.to_json()) == worth.multiplier
    assert worth.to_json()["net"]["seconds"]["value"] == pytest.approx(0.4)
