"""If these failed, "diverse" rows would be some rows: no greedy cover, with near-duplicates, or blind to the rule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import checked_weights
from im_lightning.sampling.selection import diverse
from im_lightning.sampling.selection.diverse import draw_candidates, facility_location, similarity_graph
from im_lightning.sampling.selection.select import choose_rows, select_subset
from im_lightning.sampling.weights.quality_weights import Weighting


def unit(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def similarities(vectors: np.ndarray) -> np.ndarray:
    """s_ij of the definition, for all pairs."""
    wide = vectors.astype(np.float64)
    baseline = (wide @ wide.T).mean()
    return np.clip((wide @ wide.T - baseline) / (1 - baseline), 0, None)


def value(s: np.ndarray, worth: np.ndarray, chosen: list[int]) -> float:
    return float(worth @ s[:, chosen].max(axis=1)) if chosen else 0.0


def plain_greedy(s: np.ndarray, worth: np.ndarray, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        rest = [j for j in range(len(s)) if j not in chosen]
        chosen.append(max(rest, key=lambda j: value(s, worth, [*chosen, j])))
    return chosen


def lazy(vectors: np.ndarray, worth: np.ndarray, k: int, neighbours: int = 64) -> tuple[list[int], float]:
    graph, taken = similarity_graph(vectors, neighbours), []

    def accept(j: int) -> bool:
        taken.append(j)
        return True

    found = facility_location(graph, worth, lambda: len(taken) >= k, accept)
    return found.chosen, found.coverage


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_is_greedy(seed: int) -> None:
    vectors = unit(50, seed=seed)
    worth = np.random.default_rng(seed).gamma(1.0, size=50)
    worth /= worth.sum()
    s = similarities(vectors)
    chosen, coverage = lazy(vectors, worth, 12)
    assert chosen == plain_greedy(s, worth, 12)
    assert coverage == pytest.approx(value(s, worth, chosen), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_it_reaches_the_share_of_the_optimum_that_theory_promises(seed: int) -> None:
    vectors, worth = unit(14, 3, seed), np.full(14, 1 / 14)
    s = similarities(vectors)
    best = max(value(s, worth, list(some)) for some in itertools.combinations(range(14), 4))
    assert best >= lazy(vectors, worth, 4)[1] - 1e-6 >= (1 - 1 / np.e) * best


def test_few_neighbours_lose_little() -> None:
    """What a million rows need: the choice on the sparse graph, valued on all pairs, is nearly that of all pairs."""
    vectors, worth = unit(600, 8), np.full(600, 1 / 600)
    s = similarities(vectors)
    full = value(s, worth, plain_greedy(s, worth, 30))
    random = np.mean([value(s, worth, np.random.default_rng(i).permutation(600)[:30].tolist()) for i in range(10)])
    sparse = value(s, worth, lazy(vectors, worth, 30, neighbours=64)[0])
    assert sparse > 0.97 * full and sparse - random > 0.7 * (full - random)


def test_candidates_estimate_the_weighted_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ w over any part of the pool is estimated without bias, also where some rows are certain candidates."""
    monkeypatch.setattr(diverse, "FEW", 100)
    weights = np.random.default_rng(0).gamma(0.3, size=2000)
    weights[:5] *= 40
    weights = checked_weights(weights / weights.sum())
    part = np.arange(2000) % 3 == 0
    sums, sizes = [], set()
    for seed in range(300):
        rows, worth = draw_candidates(weights, 20, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == len(rows) and worth.sum() == pytest.approx(1)
        sums.append(worth[part[rows]].sum())
        sizes.add(len(rows))
    assert sizes == {40}  # the heavy rows leave room for twice the budget only
    assert np.mean(sums) == pytest.approx(weights[part].sum(), abs=4 * np.std(sums) / np.sqrt(300))
    assert len(draw_candidates(checked_weights(np.full(2000, 1.0)), 20, np.random.default_rng(0))[0]) == 200
    assert len(draw_candidates(checked_weights(np.full(100, 1.0)), 20, np.random.default_rng(0))[0]) == 100


# through select_subset

N = 300
VECTORS = unit(N, 8, seed=3)
TABLE = ScoreTable(
    np.arange(N), [f"{i:032x}" for i in range(N)], ["a"] * N,
    {"reward": np.linspace(0, 1, N), "length_output": np.random.default_rng(0).integers(1, 40, N).astype(float)},
)  # fmt: skip
RULE = LinearRule("test", 0.0, np.array([-1.0]), ["reward"], {"reward": Transform("identity")})


def test_its_decisions_promise_no_draw() -> None:
    """What a draw by the same weights would take a row with is not the chance that it is chosen here."""
    asked = Weighting("softmax")
    d = choose_rows(TABLE, RULE, 30, "diverse", weighting=asked, embeddings=VECTORS).decisions
    assert np.isnan(d.probability).all() and set(d.reason) == {None, "others were taken before it"}
    drawn = choose_rows(TABLE, RULE, 30, "weighted", weighting=asked).decisions
    assert drawn.probability.sum() == pytest.approx(30) and "the draw did not take it" in drawn.reason


def test_every_cluster_gets_a_row() -> None:
    """Random rows miss clusters and repeat the large ones."""
    draw = np.random.default_rng(1)
    sizes = [150, 60, 40, 20, 10, 8, 5, 3, 2, 2]
    cluster = np.repeat(np.arange(10), sizes)
    noise = 0.05 * draw.standard_normal((N, 8))
    vectors = (unit(10, 8, seed=5)[cluster] + noise).astype(np.float32)
    chosen = [set(cluster[select_subset(TABLE, None, 10, "diverse", s, embeddings=vectors)]) for s in range(5)]
    assert min(map(len, chosen)) == 10
    random = [set(cluster[select_subset(TABLE, None, 10, "random", s)]) for s in range(5)]
    assert max(map(len, random)) < 8


def test_a_rule_moves_the_choice() -> None:
    plain = select_subset(TABLE, None, 30, "diverse", embeddings=VECTORS)
    ruled = select_subset(TABLE, RULE, 30, "diverse", weighting="softmax", temperature=0.3, embeddings=VECTORS)
    assert TABLE.values["reward"][ruled].mean() > TABLE.values["reward"][plain].mean() + 0.15


def test_the_seed_decides_and_the_prefix_is_the_smaller_choice() -> None:
    """With all rows as candidates, the first rows are the choice of a smaller budget: so tokens can cut the order."""
    big = choose_rows(TABLE, None, 60, "diverse", seed=1, embeddings=VECTORS)
    again = choose_rows(TABLE, None, 60, "diverse", seed=1, embeddings=VECTORS)
    assert big.rows.tolist() == again.rows.tolist() and len(set(big.rows.tolist())) == 60
    assert big.report["diverse"]["candidates"] == N
    small = choose_rows(TABLE, None, 35, "diverse", seed=2, embeddings=VECTORS)
    assert big.rows[:35].tolist() == small.rows.tolist()


@pytest.mark.parametrize("method", ["diverse", "random", "longest", "weighted", "top"])
def test_near_duplicates_are_passed_over(method: str) -> None:
    vectors = np.repeat(unit(N // 3, 8), 3, axis=0)
    vectors += (1e-3 * np.random.default_rng(0).standard_normal(vectors.shape)).astype(np.float32)
    asked = Weighting("softmax")
    chosen = choose_rows(TABLE, RULE, 40, method, weighting=asked, embeddings=vectors, max_similarity=0.95)
    near = vectors[chosen.rows] / np.linalg.norm(vectors[chosen.rows], axis=1, keepdims=True)
    similarity = near @ near.T - np.eye(40)
    assert len(chosen.rows) == 40 and similarity.max() < 0.95
    assert (chosen.report["near_duplicates"]["passed_over"] > 0) == (method != "diverse")  # it avoids them by itself
    if method == "longest":  # in order: passed over are only rows too similar to a longer one
        order = choose_rows(TABLE, RULE, N, method).rows
        expected: list[int] = []
        unit_all = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        for row in order:
            if not expected or (unit_all[expected] @ unit_all[row]).max() < 0.95:
                expected.append(int(row))
        assert chosen.rows.tolist() == expected[:40]


def test_weights_go_on_until_the_rows_that_are_left_just_fill_the_budget() -> None:
    """Of ten rows three are alike, so that eight can be had: a draw that lost two stopped with five."""
    table = ScoreTable(range(10), [str(k) for k in range(10)], [""] * 10, {"reward": np.linspace(0, 1, 10)})
    vectors = unit(10, 32)
    vectors[:3] = vectors[0]
    for seed in range(20):
        rows = select_subset(
            table, RULE, 8, "weighted", seed, weighting="softmax", embeddings=vectors, max_similarity=0.9
        )
        assert len(set(rows.tolist())) == 8 and len({0, 1, 2} & set(rows.tolist())) == 1


def test_more_than_there_are_different_rows_is_refused() -> None:
    vectors = np.repeat(unit(10, 8), 30, axis=0)
    for method in ("diverse", "random"):
        with pytest.raises(RequestError, match=r"only 10 rows to take \(\d+ rows are near-duplicates.*raise max"):
            select_subset(TABLE, None, 20, method, embeddings=vectors, max_similarity=0.99)


def test_rows_without_a_vector_are_not_chosen() -> None:
    vectors = VECTORS.copy()
    vectors[7], vectors[9] = np.nan, 0.0
    chosen = choose_rows(TABLE, None, N - 2, "diverse", embeddings=vectors)
    assert chosen.eligible == N - 2 and not {7, 9} & set(chosen.rows.tolist())


def test_wrong_vectors_are_refused() -> None:
    with pytest.raises(DataError, match=r"embeddings: it holds \(10, 8\) float32.*shape \[300, d\]"):
        select_subset(TABLE, None, 5, "diverse", embeddings=VECTORS[:10])
    with pytest.raises(RequestError, match=r"the score table: has no knn_<i>.*--indicators knn_6.*--embeddings"):
        select_subset(TABLE, None, 5, "diverse")
    with pytest.raises(RequestError, match=r"max_similarity=1.5: the cosine.*such as 0.9"):
        select_subset(TABLE, None, 5, "random", max_similarity=1.5)


def test_a_pool_beyond_every_pair_is_searched_approximately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above some 200,000 candidates; the choice is worth nearly as much."""
    from im_lightning.indicators import knn

    vectors, worth = unit(2000, 8), np.full(2000, 1 / 2000)
    exact = lazy(vectors, worth, 40)[1]
    monkeypatch.setitem(knn.EXACT_ROWS, "cpu", 1000)
    assert lazy(vectors, worth, 40)[1] > 0.98 * exact
