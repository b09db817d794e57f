"""The two-way interval holds what it says on simulated seeds and examples; without that a verdict means nothing."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from im_lightning.errors import RequestError
from im_lightning.experiments.compare.statistics import (
    ExampleSums,
    TwoWay,
    compare,
    t_interval,
    two_way_bootstrap,
    with_rule,
)


@pytest.mark.parametrize(
    ("seeds", "examples", "of_seeds", "of_examples", "noise"),
    [(5, 100, 0.02, 0.0, 0.05), (5, 60, 0.0, 0.3, 0.3), (3, 80, 0.02, 0.15, 0.1)],
)
def test_intervals_cover_the_truth(
    seeds: int, examples: int, of_seeds: float, of_examples: float, noise: float
) -> None:
    """95 % intervals that held the truth in 85 % of cases would call chance a win three times too often."""
    rng, held, n = np.random.default_rng(1), 0, 250
    for k in range(n):
        tokens = rng.integers(3, 30, examples)
        loss = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_examples, (1, examples))
        loss = loss + rng.normal(0, noise, (seeds, examples)) + 0.1
        found = two_way_bootstrap(loss * tokens, tokens, draws=300, seed=k)
        held += abs(found.difference - 0.1) <= found.half_width
    assert held / n >= 0.92  # 95 % less two and a half standard errors


def test_seeds_alone_are_the_t_interval() -> None:
    """Where examples do not differ the answer is the textbook's, small-sample quantile included."""
    rng = np.random.default_rng(0)
    tokens = np.full(50, 10)
    per_seed = rng.normal(0.05, 0.02, 6)
    found = two_way_bootstrap(np.outer(per_seed, tokens), tokens, draws=60_000)
    mean, half = t_interval(per_seed)
    assert found.difference == pytest.approx(mean) and found.df == pytest.approx(5.0, rel=0.05)
    assert found.half_width == pytest.approx(half, rel=0.02)


def test_examples_alone_are_the_ratio_estimators_standard_error() -> None:
    """Where seeds do not differ it is the delta method's standard error of summed nats per token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 400)
    nats = rng.normal(0.1, 0.4, 400) * tokens
    found = two_way_bootstrap(np.tile(nats, (5, 1)), tokens, draws=20_000)
    ratio = nats.sum() / tokens.sum()
    delta = math.sqrt(((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert found.se == pytest.approx(delta, rel=0.03) and found.df == pytest.approx(399, rel=0.01)


def test_degenerate_inputs() -> None:
    """Equal arms are no difference and one seed is no test; a shape that does not fit is refused, not broadcast."""
    tokens = np.array([3, 4])
    same = two_way_bootstrap(np.zeros((4, 2)), tokens)
    assert (same.difference, same.half_width, same.p) == (0.0, 0.0, 1.0)
    one = two_way_bootstrap([[1.0, 2.0]], tokens)
    assert one.difference == pytest.approx(3 / 7) and math.isnan(one.half_width) and math.isnan(one.p)
    with pytest.raises(RequestError, match=r"shape \(2, 3\) with 2 token counts.*one count per example"):
        two_way_bootstrap(np.zeros((2, 3)), tokens)


def test_references_of_one_instruction_are_one_example() -> None:
    """Five copies of an instruction's reference are no five examples; with one each, nothing is touched."""
    rng = np.random.default_rng(2)
    loss, tokens = rng.normal(0.1, 0.3, (4, 60)), rng.integers(3, 30, 60)
    alone = ExampleSums({"arm": loss * tokens}, tokens)
    assert alone.by_instruction([str(k) for k in range(60)]) is alone
    copied = ExampleSums({"arm": np.repeat(loss * tokens, 5, axis=1)}, np.repeat(tokens, 5))
    together = copied.by_instruction([f"{k // 5:03}" for k in range(300)])
    assert together.tokens.tolist() == (5 * tokens).tolist()
    found, wanted = (two_way_bootstrap(one.sums["arm"], one.tokens) for one in (together, alone))
    assert (found.difference, found.half_width) == pytest.approx((wanted.difference, wanted.half_width))
    naive = two_way_bootstrap(copied.sums["arm"], copied.tokens)
    assert naive.se < 0.8 * wanted.se


def test_two_references_of_one_instruction_take_no_square_of_the_rows() -> None:
    """A set of 50,000 rows of which two shared a prompt took 20 GB."""
    tokens, prompts = np.full(4000, 7), ["0", *map(str, range(3999))]
    sums = ExampleSums({"arm": np.ones((2, 4000))}, tokens)
    tracemalloc.start()
    try:
        together = sums.by_instruction(prompts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert together.sums["arm"][0].tolist() == [2.0] + [1.0] * 3998 and together.tokens[0] == 14
    assert peak < 10_000_000, "bytes; 128 million with a matrix"


def test_intervals_by_instruction_cover_the_truth() -> None:
    """Five references each of 50 instructions that differ: 95 % intervals hold the truth."""
    rng, held, n = np.random.default_rng(3), 0, 250
    for k in range(n):
        tokens = rng.integers(3, 30, 250)
        loss = 0.1 + np.repeat(rng.normal(0, 0.3, 50), 5) + rng.normal(0, 0.1, (5, 250))
        one = ExampleSums({"arm": loss * tokens}, tokens).by_instruction([str(j // 5) for j in range(250)])
        found = two_way_bootstrap(one.sums["arm"], one.tokens, draws=300, seed=k)
        held += abs(found.difference - 0.1) <= found.half_width
    assert held / n >= 0.92


def test_what_another_rule_would_change_is_not_divided_by_the_seeds() -> None:
    """Ten seeds of one rule know no more of other rules than five do."""
    from scipy.stats import t as student

    found = with_rule(TwoWay(-0.1, 0.03, 9.0, 0.07, 0.01), 0.04, 39.0)
    assert found.se == pytest.approx(0.05) and found.difference == -0.1
    assert found.df == pytest.approx(0.05**4 / (0.03**4 / 9 + 0.04**4 / 39))
    assert found.half_width == pytest.approx(student.ppf(0.975, found.df) * 0.05)
    assert found.p == pytest.approx(2 * student.sf(2.0, found.df))
    rng = np.random.default_rng(0)
    losses = {
        "random": rng.normal(2.0, 0.01, 6),
        "weighted": rng.normal(1.9, 0.01, 6),
        "longest": rng.normal(2.1, 0.01, 6),
    }
    plain, wide = (
        {r.arm: r for r in compare(losses, spread=given, spread_df=39)} for given in (None, {"weighted": 0.1})
    )
    assert wide["weighted"].difference_half_width > 0.35 > 0.05 > plain["weighted"].difference_half_width
    assert (
        wide["longest"] == plain["longest"]
        or wide["longest"].difference_half_width == plain["longest"].difference_half_width
    )
    assert wide["weighted"].verdict == "no difference shown" and plain["weighted"].verdict == "better"
