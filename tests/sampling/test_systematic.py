"""If these failed, rows would be drawn with other probabilities than the weights say, and every run would be biased."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from im_lightning._utils.rng import DESIGN_DRAW, generator
from im_lightning.errors import RequestError
from im_lightning.sampling.draws.systematic import (
    checked_weights,
    expected_counts,
    inclusion_probabilities,
    multinomial_sample,
    plan_draw,
    repeated_sample,
    systematic_sample,
)

CHEAP = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def water_level(weights: np.ndarray, n: int) -> np.ndarray:
    """min(1, c·w) by plain bisection on log c: shares no code with the package."""
    w = np.asarray(weights, dtype=np.longdouble)
    low, high = np.longdouble(-800), np.longdouble(800)
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, np.exp(middle) * w).sum() < n else (low, middle)
    return np.minimum(1, np.exp(low) * w).astype(float)


class FixedStart:
    """A generator whose uniform number is given; everything else is a real generator's."""

    def __init__(self, u: float, seed: int) -> None:
        self.u, self.rng = u, np.random.default_rng(seed)

    def random(self) -> float:
        return self.u

    def shuffle(self, rows: np.ndarray) -> None:
        self.rng.shuffle(rows)


@pytest.mark.parametrize("n", [1, 3, 10, 17, 29])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_inclusion_probabilities_are_exact_in_the_average_over_the_start(n: int, spread: float) -> None:
    weights = np.exp(spread * np.random.default_rng(n).standard_normal(30))
    weights[[4, 20]] = 0.0
    if n > 28:
        weights[20] = 1.0
    weights = checked_weights(weights)
    expected = water_level(weights, n)
    assert inclusion_probabilities(weights, n) == pytest.approx(expected, abs=1e-12)
    # For one order of rows, row i is drawn for starts u in a set of length π_i that is at most two intervals, so a
    # grid of G midpoints finds π_i up to 2/G. No statistics needed.
    grid = 500
    hits = np.zeros(30)
    for step in range(grid):
        rows = systematic_sample(weights, n, FixedStart((step + 0.5) / grid, seed=5))  # type: ignore[arg-type]
        hits[rows] += 1
    assert np.abs(hits / grid - expected).max() <= 2 / grid


def test_real_draws_hold_rows_as_often_as_promised() -> None:
    weights = checked_weights(np.r_[0.0, 50.0, np.linspace(0.1, 3.0, 38)])
    draws, n = 4000, 12
    expected = inclusion_probabilities(weights, n)
    hits = np.zeros(40)
    for epoch in range(draws):
        rows = systematic_sample(weights, n, generator(3, epoch))
        assert len(np.unique(rows)) == n
        hits[rows] += 1
    assert hits[0] == 0 and hits[1] == draws and expected[1] == 1
    sd = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(hits - draws * expected) <= 4 * sd + 1e-9)


def test_every_row_is_equally_likely_at_every_place_of_the_visiting_order() -> None:
    # One certain row among many light ones: a systematic draw left in its own order visits it second of three in half
    # of the epochs (1/4, 1/2, 1/4), so the heavy rows of a pool would gather in the middle of every epoch.
    weights = checked_weights(np.r_[1.0, np.full(400, 0.005)])
    epochs = 3000
    places = np.array([np.flatnonzero(systematic_sample(weights, 3, generator(0, e)) == 0)[0] for e in range(epochs)])
    counts = np.bincount(places, minlength=3)
    assert np.all(np.abs(counts - epochs / 3) <= 4 * np.sqrt(epochs * 2 / 9))


def test_heavy_rows_do_not_follow_each_other_more_often_than_chance() -> None:
    weights = checked_weights(np.r_[np.full(20, 1.0), np.full(2000, 0.01)])  # 20 heavy rows, half of a draw of 40
    neighbours, epochs = 0, 400
    for epoch in range(epochs):
        heavy = systematic_sample(weights, 40, generator(1, epoch)) < 20
        neighbours += int(np.sum(heavy[1:] & heavy[:-1]))
    expected = epochs * 39 * (20 / 40) * (19 / 39)
    assert abs(neighbours - expected) <= 4 * np.sqrt(epochs * 39 * 0.25)


@CHEAP
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(5e-324, 1e308)), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
)
def test_any_weights_give_n_different_rows_of_positive_weight(weights: list[float], n: int, seed: int) -> None:
    w = checked_weights(weights)
    positive = int(np.count_nonzero(w))
    if n > positive:
        with pytest.raises(RequestError, match=f"only {positive} of {len(w)} rows have a positive weight"):
            plan_draw(w, n)
        return
    rows = systematic_sample(w, n, generator(seed))
    assert rows.dtype == np.int64 and len(rows) == n == len(np.unique(rows))
    assert np.all(w[rows] > 0)


@CHEAP
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40), st.data())
def test_probabilities_sum_to_the_number_of_draws_and_keep_the_order_of_weights(weights: list[float], data) -> None:  # type: ignore[no-untyped-def]
    w = checked_weights(weights)
    n = data.draw(st.integers(1, len(w)))
    chances = inclusion_probabilities(w, n)
    assert chances.sum() == pytest.approx(n, rel=1e-9) and chances.max() <= 1
    assert np.all(np.diff(chances[np.argsort(w, kind="stable")]) >= -1e-12)
    assert chances == pytest.approx(water_level(w, n), abs=1e-9)


def test_a_start_at_either_end_of_its_range_draws_the_full_number() -> None:
    weights = checked_weights(np.r_[np.full(997, 0.1), 0.0, 0.0])
    for u in (0.0, 1.0 - 2**-53, 2**-1074):
        for n in (1, 500, 996):
            rows = systematic_sample(weights, n, FixedStart(u, seed=2))  # type: ignore[arg-type]
            assert len(np.unique(rows)) == n and rows.max() < 997


def test_equal_weights_and_all_rows_are_a_permutation() -> None:
    rows = systematic_sample(checked_weights(np.full(100, 0.1)), 100, generator(0))
    assert sorted(rows) == list(range(100)) and list(rows) != list(range(100))


def test_draws_with_replacement_follow_the_weights() -> None:
    weights = checked_weights([0.0, 1.0, 2.0, 5.0, 0.0])
    rows = multinomial_sample(weights, 80_000, generator(0))
    share = np.bincount(rows, minlength=5) / len(rows)
    assert share == pytest.approx(np.array([0, 1, 2, 5, 0]) / 8, abs=4 * np.sqrt(0.25 / len(rows)))
    assert share[0] == share[4] == 0
    # Independent draws: a value is followed by itself as often as chance has it.
    assert np.mean(rows[1:] == rows[:-1]) == pytest.approx(30 / 64, abs=0.01)


@CHEAP
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40).filter(any),
    st.sampled_from([1.0, 2.0, 2.5, 4.0]),
    st.data(),
)
def test_no_row_comes_more_often_than_it_may(weights: list[float], most: float, data) -> None:  # type: ignore[no-untyped-def]
    w = checked_weights(weights)
    n = data.draw(st.integers(1, max(1, int(most * np.count_nonzero(w)))))
    wanted = most * water_level(w, n / most)
    np.testing.assert_allclose(expected_counts(w, n, most), wanted, rtol=1e-6, atol=1e-9)
    counts = np.bincount(repeated_sample(w, n, most, generator(data.draw(st.integers(0, 99)))), minlength=len(w))
    assert counts.sum() == n and counts.max() <= np.ceil(most) and not counts[w == 0].any()
    assert (np.abs(counts - wanted) < 1 + 1e-6).all(), "the whole part is sure"


def test_repeated_rows_come_as_often_as_expected_on_average() -> None:
    w = checked_weights([5.0, 1.0, 1.0, 2.0, 0.5, 0.0])
    draws = [np.bincount(repeated_sample(w, 9, 3, generator(seed)), minlength=6) for seed in range(4000)]
    wanted = expected_counts(w, 9, 3)
    assert wanted[0] == 3 and wanted.sum() == pytest.approx(9)
    np.testing.assert_allclose(np.mean(draws, axis=0), wanted, atol=0.03)
    with pytest.raises(RequestError, match=r"5 rows have a positive weight, and each may come 3 times.*1 to 15 rows"):
        repeated_sample(w, 16, 3, generator(0))


def test_no_two_pairs_of_seed_and_epoch_share_a_stream() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), (2**64 - 1, 0), (5, 7), (7, 5)]
    streams = {tuple(generator(*pair).random(4)) for pair in pairs} | {tuple(generator(0, 0, DESIGN_DRAW).random(4))}
    assert len(streams) == len(pairs) + 1


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "3"])
def test_a_seed_that_is_no_such_integer_is_refused(seed: object) -> None:
    with pytest.raises(RequestError, match="not an integer from 0 to 2\\^64 - 1"):
        generator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e-300])
def test_a_bad_weight_is_refused_by_its_row(bad: float) -> None:
    with pytest.raises(RequestError, match=f"weights: row 2 has weight {bad}.*finite, non-negative"):
        checked_weights([1.0, 0.0, bad, bad])


def test_other_requests_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(RequestError, match=r"shape \(0,\)"):
        checked_weights([])
    with pytest.raises(RequestError, match=r"shape \(1, 2\)"):
        checked_weights([[1.0, 2.0]])
    with pytest.raises(RequestError, match="num_samples=0: it is not a positive integer"):
        plan_draw(checked_weights([1.0]), 0)
    with pytest.raises(RequestError, match=r"draw at most 1 rows.*replacement=True"):
        plan_draw(checked_weights([1.0, 0.0]), 2)
    with pytest.raises(RequestError, match="no row has a positive weight"):
        multinomial_sample(checked_weights([0.0]), 2, generator(0))
    with pytest.raises(RequestError, match="num_samples=-1"):
        multinomial_sample(checked_weights([1.0]), -1, generator(0))


def test_tensors_and_arrays_are_copied() -> None:
    array = np.array([1.0, 2.0])
    weights = checked_weights(array)
    array[0] = 9.0
    assert weights.tolist() == [1.0, 2.0]
    assert checked_weights(torch.tensor([1.0, 2.0], requires_grad=True)).tolist() == [1.0, 2.0]
