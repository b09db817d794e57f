"""Diverse rows by quality-weighted facility location: every row of weight has a chosen row near it.

    f(S) = Σ_i w_i · max_{j ∈ S} s_ij,     s_ij = max(0, cos(i, j) − c) / (1 − c)

w are the rule's weights (uniform without a rule), c the mean cosine of two rows, so that a row no nearer than any other
counts nothing: mean hidden states all have high cosines. f is monotone and submodular; greedy choice reaches at least
1 − 1/e of the best (Nemhauser, Wolsey and Fisher 1978), and lazy evaluation (Minoux 1978) gives the same choice sooner.

No N × N matrix: m candidates are drawn by the weights (`draw_candidates`), and f is estimated on them as surveys do,
each candidate counting w_i / π_i (Horvitz and Thompson), π_i its chance to be drawn. Among candidates a row is covered
by its K nearest only, or by whom it is one of the nearest of; K is four times what each chosen row has to cover, at
least `NEIGHBOURS`. Time O(N) for the draw, O(m² d) for the neighbours (all pairs up to 200,000 candidates, an inverted
file above), about O(m K) for the choice; memory O(m (d + K)) beside the vectors, which may be a memory map.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.indicators._knn_exact import nearest_within
from im_lightning.indicators.knn import is_exact
from im_lightning.sampling.draws.systematic import Floats, Rows, inclusion_probabilities, systematic_sample

NEIGHBOURS = 64
MOST_NEIGHBOURS = 1024
MOST_PER_ROW, LEAST_PER_ROW = 10, 2  # candidates per row to choose
FEW = 10_000  # as many candidates cost seconds: small budgets have at least these


def draw_candidates(weights: Floats, budget: int, rng: np.random.Generator) -> tuple[Rows, Floats]:
    """Rows to choose from, drawn by weight: int64 [m] in random order, and what each stands for (w / π), summing to 1.

    Ten per row of the budget and at least 10,000; fewer where some row's weight is so large that it would be certain
    (then a larger draw would follow the weights less), but at least two per row of the budget.
    """
    positive = int(np.count_nonzero(weights))
    proportional = int(weights.sum() / weights.max())
    wanted = max(LEAST_PER_ROW * budget, min(max(MOST_PER_ROW * budget, FEW), proportional))
    if wanted >= positive:
        rows = np.flatnonzero(weights > 0)
        rng.shuffle(rows)
        worth = weights[rows]
    else:
        rows = systematic_sample(weights, wanted, rng)
        worth = weights[rows] / inclusion_probabilities(weights, wanted)[rows]
    return rows, worth / worth.sum()


@dataclass(frozen=True)
class Graph:
    """Sparse symmetric similarities of m candidates; those of candidate j lie at `start[j]:start[j + 1]`."""

    start: NDArray[np.int64]  # int64 [m + 1]
    index: NDArray[np.int32]  # int32 [e], the candidates that j covers, itself included
    similarity: NDArray[np.float32]  # float32 [e], how well, in (0, 1]
    baseline: float  # the mean cosine c that counts as 0
    neighbours: int  # K


def neighbours_for(candidates: int, budget: int) -> int:
    """By how many others a candidate may be covered: K."""
    return min(candidates - 1, max(NEIGHBOURS, min(MOST_NEIGHBOURS, 4 * candidates // budget)))


def similarity_graph(vectors: NDArray[np.float32], neighbours: int = NEIGHBOURS) -> Graph:
    """Who covers whom among m unit vectors, float32 [m, d]; complete where m ≤ `neighbours` + 1."""
    from scipy.sparse import csr_array, eye_array

    m = len(vectors)
    baseline = float(np.clip(np.square(vectors.mean(axis=0, dtype=np.float64)).sum(), 0.0, 1.0 - 1e-6))
    keep = min(neighbours, m - 1)
    if keep < 1:
        return Graph(np.array([0, 1]), np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.float32), baseline, 0)
    if is_exact(m):
        found = nearest_within(vectors, keep)
    else:
        from im_lightning.indicators._knn_approximate import approximately_nearest

        found = approximately_nearest(vectors, vectors, np.arange(m), keep, keep)
    similarity = np.clip((found.similarity - baseline) / (1.0 - baseline), 0.0, 1.0).astype(np.float32)
    at = (found.index >= 0) & (similarity > 0)
    row, column = np.nonzero(at)[0].astype(np.int32), found.index[at]
    half = csr_array((similarity[at], (row, column)), shape=(m, m))
    whole = half.maximum(half.T).maximum(eye_array(m, dtype=np.float32, format="csr")).tocsr()
    return Graph(whole.indptr.astype(np.int64), whole.indices.astype(np.int32), whole.data, baseline, keep)


@dataclass(frozen=True)
class Covering:
    """Chosen candidates, best first, and the part of the worth they cover: f(S), from 0 to 1."""

    chosen: list[int]
    coverage: float


def facility_location(
    graph: Graph, worth: Floats, full: Callable[[], bool], accept: Callable[[int], bool] = lambda _: True
) -> Covering:
    """Lazy greedy maximisation of f over m candidates, `worth` float64 [m] summing to 1; of equal gains the first's.

    `full` is asked before each choice whether enough is chosen, `accept` whether the best candidate may be chosen; one
    refused is not asked about again.
    """
    start, index, similarity = graph.start, graph.index, graph.similarity
    covered = np.zeros(len(worth))
    gains = np.add.reduceat(worth[index] * similarity, start[:-1])  # every candidate covers itself: no empty part
    heap = [(-gain, j) for j, gain in enumerate(gains.tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    known = [0] * len(worth)  # how many had been chosen when the gain was calculated
    while heap and not full():
        j = heap[0][1]
        part = slice(start[j], start[j + 1])
        at = index[part]
        if known[j] < len(chosen):
            known[j] = len(chosen)
            gain = float(worth[at] @ np.maximum(similarity[part] - covered[at], 0.0))
            heapq.heapreplace(heap, (-gain, j))
            continue
        heapq.heappop(heap)
        if accept(j):
            chosen.append(j)
            covered[at] = np.maximum(covered[at], similarity[part])
    return Covering(chosen, float(worth @ covered))


def describe(candidates: int, graph: Graph, covering: Covering) -> dict[str, Any]:
    """What a report says of a choice."""
    return {
        "objective": "facility location",
        "candidates": candidates,
        "neighbours": graph.neighbours,
        "baseline_cosine": graph.baseline,
        "coverage": covering.coverage,
    }
