"""If these failed, `select --by` would take other rows than the columns say, or more of a group than was asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from im_lightning import ScoreTable, select_subset
from im_lightning.errors import RequestError
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.select import choose_rows

N = 200


@pytest.fixture
def table() -> ScoreTable:
    rng = np.random.default_rng(0)
    values = {
        "reward": rng.normal(size=N), "ppl": rng.uniform(1, 9, size=N), "rating": rng.integers(1, 6, size=N) * 1.0,
        "topic": rng.integers(0, 4, size=N) * 1.0, "length_output": rng.integers(1, 50, size=N) * 1.0,
    }  # fmt: skip
    values["reward"][:3] = np.nan
    return ScoreTable(np.arange(N), [f"{k:032x}" for k in range(N)], [f"s{k % 3}" for k in range(N)], values)


def rows(table: ScoreTable, budget: int | None = None, by: str | None = None, **given: Any) -> list[int]:
    names = ("keep", "quota", "group")
    ranking = Ranking(by, **{name: given.pop(name) for name in names if name in given})
    return select_subset(table, None, budget, ranking=ranking, **given).tolist()


def test_the_best_by_a_column(table: ScoreTable) -> None:
    reward = table.values["reward"]
    order = [k for k in np.argsort(-reward, kind="stable").tolist() if np.isfinite(reward[k])]
    assert rows(table, 20, "reward") == order[:20]
    assert rows(table, 20, "reward:low") == order[::-1][:20]
    assert rows(table, None, "reward", keep=0.5) == order[: round(0.5 * (N - 3))]
    assert rows(table, 7, "reward", keep=0.5) == order[:7]


def test_several_columns_in_order(table: ScoreTable) -> None:
    """Equal ratings are told apart by the perplexity; a share narrows before the next column ranks."""
    rating, ppl, reward = (table.values[name] for name in ("rating", "ppl", "reward"))
    assert rows(table, 50, "rating,ppl:low") == sorted(range(N), key=lambda k: (-rating[k], ppl[k]))[:50]
    top = sorted((k for k in range(N) if np.isfinite(reward[k])), key=lambda k: -reward[k])[: round(0.3 * (N - 3))]
    assert rows(table, 10, "reward:0.3,ppl:low") == sorted(top, key=lambda k: ppl[k])[:10]
    kept = rows(table, None, "reward:0.3,ppl:low:0.5")
    assert kept == sorted(top, key=lambda k: ppl[k])[: round(0.5 * len(top))]


def test_equal_rows_are_taken_by_the_seed(table: ScoreTable) -> None:
    best = np.flatnonzero(table.values["rating"] == 5)
    draws = {tuple(rows(table, 5, "rating", seed=seed)) for seed in range(5)}
    assert len(draws) == 5 and all(set(draw) <= set(best.tolist()) for draw in draws)


def test_quotas_are_kept_exactly(table: ScoreTable) -> None:
    reward = table.values["reward"]
    taken = rows(table, 60, "reward", quota="s0=10,s1=0.25")
    counts = Counter(k % 3 for k in taken)
    assert counts[0] == 10 and counts[1] == 15 and counts[2] == 35
    for group, count in counts.items():
        mine = [k for k in np.argsort(-reward, kind="stable").tolist() if k % 3 == group and np.isfinite(reward[k])]
        assert [k for k in taken if k % 3 == group] == mine[:count], "the best of each"
    assert Counter(k % 3 for k in rows(table, 20, method="random", quota="*=5,s2=10")) == {0: 5, 1: 5, 2: 10}
    by_topic = Counter(table.values["topic"][rows(table, None, "reward", quota="*=7", group="topic")])
    assert set(by_topic.values()) == {7} and len(by_topic) == 4
    assert not any(k % 3 == 0 for k in rows(table, 30, "ppl", quota="s0=0"))


def test_groups_of_large_numbers_keep_their_own_quota(table: ScoreTable) -> None:
    """Written with six digits, 1000001 and 1000002 were both 1e+06, and neither could be named."""
    topics = 1_000_001.0 + table.values["topic"]
    named = {"quota": "1000001=3,1000002=0.2,*=9", "group": "topic"}
    counts = Counter(topics[rows(table.with_values("topic", topics), 20, method="random", **named)].tolist())
    assert counts[1_000_001.0] <= 3 and counts[1_000_002.0] <= 4 and max(counts.values()) <= 9


def test_near_duplicates_go_before_the_quota_is_counted(table: ScoreTable) -> None:
    """The measured default of autocurate: the better half by reward, then one row of each kind."""
    rng = np.random.default_rng(1)
    kinds = rng.normal(size=(20, 8))
    kind = rng.integers(0, 20, size=N)
    vectors = (kinds[kind] + 1e-3 * rng.normal(size=(N, 8))).astype(np.float32)
    taken = rows(table, None, "reward", keep=0.5, embeddings=vectors, max_similarity=0.99)
    reward, best = table.values["reward"], {}
    half = rows(table, None, "reward", keep=0.5)
    for k in half:
        best.setdefault(int(kind[k]), k)
    assert taken == list(best.values()) and all(np.isfinite(reward[taken]))
    limited = rows(table, None, "reward", embeddings=vectors, max_similarity=0.99, quota="s0=2")
    assert sum(k % 3 == 0 for k in limited) == 2


def test_the_share_narrows_another_method(table: ScoreTable) -> None:
    half = set(rows(table, None, "reward", keep=0.5))
    drawn = rows(table, 30, "reward", keep=0.5, method="random")
    assert len(drawn) == 30 and set(drawn) <= half and drawn != rows(table, 30, "reward", keep=0.5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"by": "reward", "budget": None}, "the budget: there is none"),
        ({"by": "reward:up", "budget": 5}, "'up' is neither high, low nor a share"),
        ({"by": "reward:1.5", "budget": 5}, "a share of rows lies above 0, and at 1 at most"),
        ({"by": "reward:0.5", "keep": 0.5}, "the last column of by=reward:0.5 has a share of its own"),
        ({"keep": 0.5, "budget": 5}, "it is not said by which column"),
        ({"by": "gone", "budget": 5}, "has no gone"),
        ({"by": "reward", "budget": 5, "method": "longest"}, "it would have no effect"),
        ({"by": "reward", "budget": 5, "quota": "web=3"}, "there is no source web. Fix: name some of s0, s1, s2"),
        ({"by": "reward", "budget": 5, "quota": "s0"}, "it does not say a number of rows"),
        ({"by": "reward", "quota": "s0=0.5"}, "it is a share, and there is no budget in rows"),
        ({"by": "reward", "budget": 5, "quota": "s0=2.5"}, "it does not say a number of rows"),
        ({"by": "reward", "budget": 90, "quota": "*=20"}, "the quota is full"),
        ({"by": "reward", "budget": 5, "quota": "s0=inf"}, "it does not say a number of rows"),
        ({"by": "", "budget": 5}, "by='': it names no column. Fix: give one"),
        ({"by": ",", "keep": 0.5}, "by=',': it names no column"),
        ({"by": "reward", "max_similarity": 90}, "max_similarity=90: the cosine"),
        ({"method": "random-tokens", "quota": "s0=5"}, "it is matched on tokens, and none are given"),
        ({"by": "reward", "budget": 198}, "197 of 200 rows can be chosen by by"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: ScoreTable, given: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as error:
        rows(table, **given)
    assert text in str(error.value)


def test_a_group_of_a_column_with_too_many_values_is_refused() -> None:
    n = 10_001
    table = ScoreTable(np.arange(n), [str(k) for k in range(n)], [""] * n, {"reward": np.arange(n) * 1.0})
    with pytest.raises(RequestError, match="it has 10,001 different values"):
        rows(table, None, "reward", quota="*=1", group="reward")


def test_every_row_has_a_decision(table: ScoreTable) -> None:
    """Taken, or with a reason: no value, ranked after the cut, a duplicate, a full quota, not reached."""
    vectors = np.eye(N, dtype=np.float32)
    order = rows(table, None, "reward", keep=0.5)
    vectors[order[1]] = vectors[order[0]]
    ranking = Ranking("reward", keep=0.5, quota="s0=3")
    chosen = choose_rows(table, None, 20, ranking=ranking, embeddings=vectors, max_similarity=0.9)
    d = chosen.decisions
    assert np.flatnonzero(d.taken).tolist() == sorted(chosen.rows.tolist())
    assert all((reason is None) == taken for reason, taken in zip(d.reason, d.taken.tolist(), strict=True))
    counts = Counter(d.reason)
    assert counts["it has no reward"] == 3 and counts["others rank before it by reward"] == N - 3 - len(order)
    assert d.reason[order[1]] == "a row much like it was taken" and d.duplicate_of[order[1]] == order[0]
    assert (d.duplicate_of >= 0).sum() == 1
    last = order.index(chosen.rows[-1])
    full = [k for k in order[:last] if k % 3 == 0 and not d.taken[k] and d.duplicate_of[k] < 0]
    assert counts["the quota of its source was full"] >= len(full) > 0 and counts["others were taken before it"] > 0
