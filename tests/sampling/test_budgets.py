"""If these failed, arms "at equal tokens" would not be, and sources "balanced" would not be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.selection.decisions import Basket
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.select import choose_rows, select_subset
from im_lightning.sampling.selection.targeted import Targets
from im_lightning.sampling.weights.quality_weights import RowWeights, Weighting, weights_of

N = 500
RNG = np.random.default_rng(0)
SOURCE = ["a"] * 300 + ["b"] * 180 + ["c"] * 20
LENGTH = RNG.integers(1, 60, N).astype(float)
IFD = RNG.uniform(0.2, 1.2, N)
VECTORS = RNG.standard_normal((N, 8)).astype(np.float32)
TABLE = ScoreTable(
    np.arange(N), [f"{i:032x}" for i in range(N)], SOURCE,
    {"length_output": LENGTH, "ifd": IFD, "ppl": np.exp(RNG.standard_normal(N)), "reward": RNG.standard_normal(N)},
)  # fmt: skip
RULE = LinearRule("test", 0.0, np.array([-1.0]), ["reward"], {"reward": Transform("identity")})


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].by_source])
@pytest.mark.parametrize("target", [400, 5000])
def test_every_method_reaches_a_number_of_tokens(method: str, target: int) -> None:
    for seed in range(3):
        rows = select_subset(
            TABLE, RULE, None, method, seed, weighting="softmax", budget_tokens=target, embeddings=VECTORS,
            mixture={name: 1 / len(set(SOURCE)) for name in set(SOURCE)},
            targets=Targets(VECTORS[:3], np.zeros(N, dtype=bool), np.arange(3), "three"),
        )  # fmt: skip
        assert abs(LENGTH[rows].sum() - target) <= 0.01 * target
        assert len(set(rows.tolist())) == len(rows)


def test_tokens_may_be_counted_by_the_caller() -> None:
    """A comparison counts what its template supervises, not length_output."""
    tokens = LENGTH + 1
    rows = select_subset(TABLE, None, None, "random-tokens", budget_tokens=3000, tokens=tokens)
    assert abs(tokens[rows].sum() - 3000) <= 30


def test_weighted_draws_up_to_tokens_follow_the_weights_not_the_lengths() -> None:
    """Stopping at a sum must not favour short rows: the share of a good half is that of a draw by rows."""
    good = np.argsort(TABLE.values["reward"])[N // 2 :]
    by_tokens, by_rows = [], []
    for seed in range(60):
        rows = select_subset(TABLE, RULE, None, "weighted", seed, weighting="softmax", budget_tokens=1500)
        by_tokens.append(np.isin(rows, good).mean())
        by_rows.append(np.isin(select_subset(TABLE, RULE, 50, "weighted", seed, weighting="softmax"), good).mean())
    assert np.mean(by_tokens) == pytest.approx(np.mean(by_rows), abs=4 * np.std(by_rows) / np.sqrt(60))
    mean = [LENGTH[select_subset(TABLE, None, None, "random", s, budget_tokens=1500)].mean() for s in range(60)]
    assert np.mean(mean) == pytest.approx(LENGTH.mean(), abs=4 * np.std(mean) / np.sqrt(60))


def test_a_draw_up_to_tokens_is_of_as_many_rows_as_its_weights_need() -> None:
    """Counted by the mean row of the pool all long ones were drawn, and their share of 0.9 came out as 0.3."""
    lengths, names = np.r_[np.full(900, 10.0), np.full(100, 500.0)], ["short"] * 900 + ["long"] * 100
    table = ScoreTable(np.arange(1000), [f"{k:032x}" for k in range(1000)], names, {"length_output": lengths})
    shares = []
    for seed in range(10):
        chosen = choose_rows(table, None, None, "mix", seed, budget_tokens=20_000, mixture={"short": 0.1, "long": 0.9})
        assert chosen.decisions.probability.sum() == pytest.approx(47)  # 1.05 · 20,000 tokens / 451 of a mean row
        shares.append(np.mean(chosen.rows >= 900))
    assert np.mean(shares) == pytest.approx(0.9, abs=0.05)
    few = ScoreTable(range(20), [f"{k:032x}" for k in range(20)], ["a", "b"] * 10, {"length_output": [100.0, 1.0] * 10})
    rows = select_subset(few, None, None, "mix", budget_tokens=500, mixture={"a": 1.0})
    assert len(rows) == 5 and not (rows % 2).any(), "five rows of the one source, which has ten"


def test_sources_are_balanced_until_one_runs_out() -> None:
    rows = select_subset(TABLE, None, 30, "random-balanced", seed=1)
    assert Counter(SOURCE[row] for row in rows) == {"a": 10, "b": 10, "c": 10}
    counts = Counter(SOURCE[row] for row in select_subset(TABLE, None, 101, "random-balanced", seed=1))
    assert counts["c"] == 20 and sorted([counts["a"], counts["b"]]) == [40, 41]
    assert len(set(select_subset(TABLE, None, N, "random-balanced").tolist())) == N
    seen = np.concatenate([select_subset(TABLE, None, 30, "random-balanced", seed=s) for s in range(60)])
    assert len({row for row in seen if SOURCE[row] == "a"}) > 200  # within a source any row may come


def test_ifd_takes_the_highest_below_one() -> None:
    rows = select_subset(TABLE, None, 25, "ifd")
    assert IFD[rows].tolist() == sorted(IFD[IFD < 1])[::-1][:25]
    assert choose_rows(TABLE, None, 25, "ifd").eligible == int((IFD < 1).sum())


def test_a_row_that_would_overshoot_is_passed_over() -> None:
    basket = Basket(None, 100, np.array([60, 50, 39, 1]))
    basket.fill(np.arange(4))
    assert basket.taken == [0, 2] and basket.total == 99 and basket.full


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "the budget: there is none.*--budget-tokens"),
        ({"budget": 5, "budget_tokens": 5}, "given in rows and in tokens"),
        ({"budget_tokens": 0}, "budget_tokens=0: is less than one token"),
        ({"budget": 5, "method": "random-tokens"}, "method random-tokens: it is matched on tokens.*--match"),
        ({"budget_tokens": 10**6}, r"budget_tokens=1000000: of the 500 rows .* only \d+ tokens to take"),
        ({"budget_tokens": 10**6, "method": "weighted"}, "budget_tokens=1000000: drawing all 500 rows"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError, match=text):
        select_subset(TABLE, RULE, **({"budget": None, "method": "random", "weighting": "softmax"} | options))


def test_rows_too_long_for_a_small_budget_are_said() -> None:
    """To hear of only 60 tokens would send a user with thousands of tokens to look for data."""
    table = ScoreTable([0, 1], ["x", "y"], ["a", "a"], {"length_output": [60.0, 60.0]})
    with pytest.raises(RequestError, match=r"hold 60, and each of the others would overshoot.*larger budget"):
        select_subset(table, None, None, "random", budget_tokens=100)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"budget_tokens": 100}, "hold 60, and each of the others would overshoot"),
        ({"budget": 20, "ranking": Ranking(quota="*=10")}, "only 10 rows to take .*the quota is full"),
        ({"budget": 20, "max_similarity": 0.9}, "only 10 rows to take .* are near-duplicates"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_after_a_few_draws(
    given: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool was weighed again for each row too long, or for every ten too many: on a large one for hours."""
    rng, calls = np.random.default_rng(0), list[int]()
    values = {"length_output": np.full(1000, 60.0), "reward": rng.standard_normal(1000)}
    table = ScoreTable(np.arange(1000), [f"{k:032x}" for k in range(1000)], ["a"] * 1000, values)

    def counted(*words: Any) -> RowWeights:
        calls.append(1)
        return weights_of(*words)

    monkeypatch.setattr("im_lightning.sampling.selection.select.weights_of", counted)
    alike = np.repeat(np.eye(10, dtype=np.float32), 100, axis=0)
    with pytest.raises(RequestError, match=text):
        choose_rows(table, RULE, **{"budget": None, "weighting": Weighting("softmax"), "embeddings": alike, **given})
    assert len(calls) < 20


def test_tokens_need_lengths() -> None:
    table = ScoreTable([0], ["x"], ["a"], {"ppl": [1.0]})
    with pytest.raises(RequestError, match="length_output"):
        select_subset(table, None, None, "random", budget_tokens=3)
