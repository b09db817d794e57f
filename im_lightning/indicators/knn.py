"""`knn_<i>`: Euclidean distance of an example's unit vector to its i-th nearest *other* example of the pool.

Exact up to `EXACT_ROWS` distinct examples, approximate above (`_knn_approximate`, its recall measured and said).
Similarities only propose candidates: 2 - 2 cos loses half of the digits, so the candidates' distances are taken from
the differences of the vectors. A row whose candidates could hide a nearer neighbour within the rounding of the
similarities (clusters of near-duplicates) is searched again in double precision.

A duplicate (another row of the same example) is at distance 0. So are vectors closer than `SAME`: equal texts under
different ids get vectors that differ by rounding where they were made in different batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.optional import require
from im_lightning.errors import RequestError, message
from im_lightning.indicators._knn_exact import Candidates, Vectors, nearest_among, nearest_within
from im_lightning.indicators.base import Indicator, Reference, Scores

NO_VECTOR = "no embedding of this example"
SAME = 2.0**-18  # 3.8e-6: rounding of fp32 models moves a vector by some 1e-7 to 1e-6
EXACT_ROWS = {"cpu": 200_000, "cuda": 2_000_000}  # minutes on two cores, on one GPU; the work grows with the square
_SPARE = 4  # candidates beyond the i asked for, so that rounding of similarities rarely decides
_CHUNK = 512


class KNNIndicator(Indicator):
    """Distance to the i-th nearest other example (the paper's KNN-i; its v1 rule has i = 6)."""

    needs = ("embedding",)
    pool_dependent = True

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"knn_{rank}"

    @classmethod
    def pool_numerics(cls, rows: int, device: str = "cpu") -> dict[str, str]:
        return {"neighbours": "exact" if is_exact(rows, device) else "approximate"}

    @classmethod
    def check_pool(cls, rows: int, device: str = "cpu") -> None:
        if not is_exact(rows, device):
            require("faiss", "ann", f"neighbours among {rows:,} examples")

    @classmethod
    def compute_pool(
        cls,
        group: Sequence[KNNIndicator],
        vectors: Vectors,
        device: str = "cpu",
        counts: NDArray[np.int64] | None = None,
        reference: Reference | None = None,
    ) -> list[Scores]:
        there = finite_rows(vectors)
        distances = neighbour_distances(vectors, [each.rank for each in group], device, counts, there, reference)
        what = "pool" if reference is None else "reference"
        found = []
        for column, indicator in enumerate(group):
            values = np.ascontiguousarray(distances[:, column])
            too_few = f"the {what} has fewer than {indicator.rank} other examples"
            reasons: list[str | None] = [None] * len(vectors)
            for position in np.flatnonzero(np.isnan(values)):
                reasons[position] = too_few if there[position] else NO_VECTOR
            found.append(Scores(values, reasons))
        return found


def is_exact(rows: int, device: str = "cpu") -> bool:
    """Whether neighbours among so many distinct examples are searched exactly."""
    return rows <= EXACT_ROWS.get(device.split(":")[0], EXACT_ROWS["cpu"])


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1; a row of zeros or with a NaN becomes NaN."""
    wide = vectors.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))).astype(np.float32)


def finite_rows(vectors: Vectors) -> NDArray[np.bool_]:
    """bool [N]: rows without NaN or inf; a part at a time, since the vectors may be a memory map."""
    there = np.zeros(len(vectors), dtype=np.bool_)
    for start in range(0, len(vectors), 1 << 14):
        there[start : start + (1 << 14)] = np.isfinite(vectors[start : start + (1 << 14)]).all(axis=1)
    return there


@dataclass
class Search:
    """Unit vectors `queries` [n, d], whose neighbours are searched among `vectors` [N, d] of distinct examples.

    `counts` (int64 [N]) is how many examples each stands for, 0 for what is no neighbour at all; `own` (int64 [n])
    where each query stands itself among `vectors`, -1 where it does not.
    """

    queries: Vectors
    vectors: Vectors
    counts: NDArray[np.int64]
    own: NDArray[np.int64]


def neighbour_distances(
    vectors: Vectors,
    ranks: Sequence[int],
    device: str = "cpu",
    counts: NDArray[np.int64] | None = None,
    alive: NDArray[np.bool_] | None = None,
    reference: Reference | None = None,
) -> NDArray[np.float64]:
    """Distances of every row to its i-th nearest other row, for several i in one pass.

    Args:
        vectors: Unit vectors, float32 or float16 [N, d], perhaps a memory map; memory beyond them is bounded.
        ranks: The i wanted, each at least 1.
        device: Where to calculate.
        counts: How many rows each vector stands for; by default 1.
        alive: bool [N]; the others are no vectors. By default those that are finite.
        reference: Search there instead of among `vectors`.

    Returns:
        float64 [N, len(ranks)]; NaN where there is no i-th other row, and for rows that are not alive.
    """
    if not ranks or min(ranks) < 1:
        raise RequestError(message(f"neighbours {list(ranks)}", "start at 1", "ask for knn_1 or higher"))
    n = len(vectors)
    result = np.full((n, len(ranks)), np.nan)
    there = finite_rows(vectors) if alive is None else alive
    each = np.ones(n, dtype=np.int64) if counts is None else counts
    if reference is None:
        search = Search(vectors, vectors, np.where(there, each, 0), np.arange(n))
    else:
        usable = finite_rows(reference.vectors)
        own = np.where(reference.own >= 0, np.where(usable[reference.own], reference.own, -1), -1)
        search = Search(vectors, reference.vectors, np.where(usable, reference.counts, 0), own)
    usable = search.counts > 0
    keep = min(max(ranks) + _SPARE, int(usable.sum()))
    exact = is_exact(len(search.vectors), device)
    if not keep or not there.any():
        return result
    mask = None if usable.all() else usable
    if not exact:
        from im_lightning.indicators._knn_approximate import approximately_nearest

        found = approximately_nearest(search.queries, search.vectors, search.own, keep, max(ranks), mask)
    elif reference is None:
        found = nearest_within(search.vectors, keep, device, mask)
    else:
        found = nearest_among(search.queries, search.vectors, search.own, keep, device, mask)
    doubtful = _fill(result, search, found, ranks, np.flatnonzero(there), check=exact)
    for start in range(0, len(doubtful), _CHUNK):
        at = doubtful[start : start + _CHUNK]
        _fill(result, search, _nearest_in_double(search, at, keep), ranks, at, check=False, first=start)
    return result


def _fill(
    result: NDArray[np.float64],
    search: Search,
    found: Candidates,
    ranks: Sequence[int],
    rows: NDArray[np.int64],
    check: bool,
    first: int | None = None,
) -> NDArray[np.int64]:
    """Distances of the queries `rows` from their candidates into `result`; those where rounding may have decided.

    `found` holds all queries, or those of `rows` alone (then `first` is given).
    """
    width = search.vectors.shape[1]
    rounding = width * 2.0**-24 + 2.0**-22  # of a similarity in fp32, of length 1 to rounding
    enough = int((search.counts > 0).sum())
    doubtful = []
    for start in range(0, len(rows), _CHUNK):
        at = rows[start : start + _CHUNK]
        part = at if first is None else np.arange(start, start + len(at))
        index = found.index[part]
        near = np.asarray(search.vectors[index.reshape(-1)], dtype=np.float32).reshape(*index.shape, width)
        near -= np.asarray(search.queries[at], dtype=np.float32)[:, None]
        distance = np.sqrt(np.einsum("rkd,rkd->rk", near, near).astype(np.float64))
        distance[distance < SAME] = 0.0
        distance[index < 0] = np.nan
        order = np.argsort(distance, axis=1)  # NaN last
        distance = np.take_along_axis(distance, order, axis=1)
        weight = np.where(index < 0, 0, search.counts[index])
        upto = np.take_along_axis(weight, order, axis=1).cumsum(axis=1)
        own = search.own[at]
        copies = np.where(own >= 0, search.counts[own] - 1, 0)
        for column, rank in enumerate(ranks):
            place = (upto + copies[:, None] < rank).sum(axis=1)
            known = place < index.shape[1]
            value = np.where(known, distance[np.arange(len(at)), np.minimum(place, index.shape[1] - 1)], np.nan)
            result[at, column] = np.where(copies >= rank, 0.0, value)
        if check:
            unseen = 2.0 - 2.0 * found.floor[part].astype(np.float64) - 2.0 * rounding  # squared, at least
            largest = np.nanmax(np.where(np.isnan(result[at]), 0.0, result[at]), axis=1)
            complete = (index >= 0).sum(axis=1) >= enough - (own >= 0)
            doubtful.append(at[(largest > 0) & (largest**2 > unseen) & ~complete])
    return np.concatenate(doubtful) if doubtful else np.empty(0, dtype=np.int64)


def _nearest_in_double(search: Search, at: NDArray[np.int64], keep: int) -> Candidates:
    """Candidates of the queries `at` by squared distances in double precision."""
    found = Candidates(len(at), keep)
    rows = np.asarray(search.queries[at], dtype=np.float64)
    best = np.full((len(at), keep), np.inf)
    step = 4096
    for start in range(0, len(search.vectors), step):
        columns = np.asarray(search.vectors[start : start + step], dtype=np.float64)
        square = (columns * columns).sum(axis=1) - 2.0 * (rows @ columns.T)
        square[:, search.counts[start : start + step] == 0] = np.inf
        own = search.own[at]
        here = np.flatnonzero((own >= start) & (own < start + step))
        square[here, own[here] - start] = np.inf
        index = np.broadcast_to(np.arange(start, start + len(columns), dtype=np.int32), square.shape)
        both = np.concatenate([best, square], axis=1)
        chosen = np.argpartition(both, keep - 1, axis=1)[:, :keep]
        found.index = np.take_along_axis(np.concatenate([found.index, index], axis=1), chosen, axis=1)
        best = np.take_along_axis(both, chosen, axis=1)
    found.index[np.isinf(best)] = -1
    return found
