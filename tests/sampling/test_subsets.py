"""If these failed, the arms of a comparison would not be what their names say."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.designs.subsets import designed_subset
from im_lightning.sampling.rows import source_phi_means
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.select import select_subset
from im_lightning.sampling.weights.mixture import mixed
from im_lightning.sampling.weights.quality_weights import quality_weights

N = 400
RNG = np.random.default_rng(0)
LENGTH, PPL = RNG.integers(1, 30, N).astype(float), np.exp(RNG.standard_normal(N))
PPL[[3, 5]] = np.nan
TABLE = ScoreTable(
    np.arange(N), [f"{i:032x}" for i in range(N)], ["a"] * N, {"length_output": LENGTH, "ppl": PPL, "reward": -PPL}
)
RULE = LinearRule("test", 0.0, np.array([-1.0]), ["reward"], {"reward": Transform("identity")})  # predicts ppl


def test_ranking_methods_take_the_extremes_best_first() -> None:
    by_ppl = [int(i) for i in np.argsort(PPL) if np.isfinite(PPL[i])]
    assert select_subset(TABLE, RULE, 20, "top").tolist() == by_ppl[:20]
    assert select_subset(TABLE, RULE, 20, "worst").tolist() == by_ppl[::-1][:20]
    assert select_subset(TABLE, None, 20, "lowest-ppl").tolist() == by_ppl[:20]
    longest = LENGTH[select_subset(TABLE, None, 50, "longest")]
    assert longest.tolist() == sorted(LENGTH)[::-1][:50]


def test_equal_rows_are_chosen_by_the_seed_and_not_by_their_place_in_the_file() -> None:
    table = TABLE.with_values("length_output", np.full(N, 7.0))
    firsts = np.concatenate([select_subset(table, None, 20, "longest", seed=s) for s in range(100)])
    assert np.mean(firsts) == pytest.approx((N - 1) / 2, abs=4 * N / np.sqrt(12 * len(firsts)))
    one, same = (select_subset(table, None, 20, "longest", seed=3) for _ in range(2))
    assert one.tolist() == same.tolist() != select_subset(table, None, 20, "longest", seed=4).tolist()


def test_with_a_rule_rows_without_a_prediction_are_in_no_arm() -> None:
    for method in ("weighted", "top", "worst", "random", "longest", "lowest-ppl"):
        budget = N - 3 if method == "weighted" else N - 2
        rows = select_subset(TABLE, RULE, budget, method, weighting="uniform")
        assert len(np.unique(rows)) == budget and not {3, 5} & set(rows.tolist())
    assert {3, 5} <= set(select_subset(TABLE, None, N, "random").tolist())
    assert {3, 5} <= set(select_subset(TABLE, None, N, "longest").tolist())


def test_weighted_draws_follow_the_weights_and_the_seed() -> None:
    weights = quality_weights(TABLE, RULE, "softmax", budget=50).weights
    hits = np.zeros(N)
    for seed in range(600):
        rows = select_subset(TABLE, RULE, 50, seed=seed, weighting="softmax")
        assert len(np.unique(rows)) == 50
        hits[rows] += 1
    chance = np.minimum(1, 50 * weights)  # no row is certain here
    assert 50 * weights.max() < 1
    assert np.all(np.abs(hits - 600 * chance) <= 4.5 * np.sqrt(600 * chance * (1 - chance)) + 1e-9)
    assert select_subset(TABLE, RULE, 50, seed=1, weighting="rank").tolist() == (
        select_subset(TABLE, RULE, 50, seed=1, weighting="rank").tolist()
    )


def test_random_rows_are_in_random_order_and_respect_eligibility() -> None:
    eligible = np.arange(N) >= 300
    rows = select_subset(TABLE, None, 100, "random", seed=2, eligible=eligible)
    assert sorted(rows) == list(range(300, 400)) and rows.tolist() != sorted(rows)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "best"}, "method 'best': it is not known.*weighted, by-source, top"),
        ({"rule": None}, "method weighted: it needs a rule.*--rule"),
        ({"budget": 0}, "budget=0: 398 of 400 rows can be chosen by weighted"),
        ({"budget": 399, "method": "top"}, "choose a budget from 1 to 398"),
        ({"budget": 398}, "takes each once, whatever its weight.*lower the budget, or train on the whole pool"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError, match=text):
        select_subset(TABLE, **({"rule": RULE, "budget": 10} | options))


def test_a_missing_column_is_named_with_the_command_that_makes_it() -> None:
    table = ScoreTable([0], ["x"], ["a"], {"ppl": [1.0]})
    with pytest.raises(RequestError, match="length_output"):
        select_subset(table, None, 1, "longest")


LONG = ["web", "b" * 20_000] * 1000
NAMED = ScoreTable(np.arange(2000), [f"{k:032x}" for k in range(2000)], LONG, {"length_output": np.ones(2000)})


@pytest.mark.parametrize(
    "use",
    [
        lambda: select_subset(NAMED, None, 50, "random-balanced"),
        lambda: select_subset(NAMED, None, 50, "random", ranking=Ranking(quota="*=40")),
        lambda: mixed(quality_weights(NAMED, None, "uniform"), LONG, {"web": 1.0}),
        lambda: designed_subset(RNG.standard_normal((2000, 2)), LONG, 50, 0),
        lambda: source_phi_means(NAMED, {"length_output": Transform("identity")}, np.ones(2000)),
    ],
    ids=["balanced", "quota", "mixture", "design", "means"],
)
def test_a_long_name_of_a_source_takes_no_memory_in_every_row(use: Callable[[], Any]) -> None:
    """As wide as the longest name in each row: a name of 250 characters took 5 GB of 5 million rows, twice."""
    use()  # imports are made once
    tracemalloc.start()
    try:
        use()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000, "bytes; with the names in an array 160 million"
