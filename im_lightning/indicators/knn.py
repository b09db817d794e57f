"""`knn_<i>`: Euclidean distance of an example's unit vector to its i-th nearest *other* example of the pool.

Exact and without an N x N matrix: similarities are made a block at a time and only the best candidates of each row
are kept. Distances of the candidates are then taken from the vectors themselves, since 2 - 2 cos loses half of the
digits: duplicates come out at exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import Indicator, Scores

if TYPE_CHECKING:
    from torch import Tensor

NO_VECTOR = "no embedding of this example"
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 16384  # 64 MiB of fp32 similarities at once
_SPARE = 8  # candidates beyond the i asked for, so that rounding of similarities cannot push the i-th out


class KNNIndicator(Indicator):
    """Distance to the i-th nearest other example (the paper's KNN-i; its v1 rule has i = 6)."""

    needs = ("embedding",)
    pool_dependent = True

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"knn_{rank}"

    @classmethod
    def compute_pool(
        cls, group: Sequence[KNNIndicator], vectors: NDArray[np.float32], device: str = "cpu"
    ) -> list[Scores]:
        there: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        distances = neighbour_distances(vectors[there], [indicator.rank for indicator in group], device)
        found = []
        for column, indicator in enumerate(group):
            values = np.full(len(vectors), np.nan)
            values[there] = distances[:, column]
            too_few = f"the pool has fewer than {indicator.rank} other examples"
            reasons: list[str | None] = [None] * len(vectors)
            for position in np.flatnonzero(np.isnan(values)):
                reasons[position] = too_few if there[position] else NO_VECTOR
            found.append(Scores(values, reasons))
        return found


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1; a row of zeros or with a NaN becomes NaN."""
    wide = vectors.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))).astype(np.float32)


def neighbour_distances(vectors: NDArray[np.float32], ranks: Sequence[int], device: str = "cpu") -> NDArray[np.float64]:
    """Distances of every row to its i-th nearest other row, for several i.

    Args:
        vectors: Finite unit vectors, float32 [N, d].
        ranks: The i wanted, each at least 1.
        device: Where to calculate.

    Returns:
        float64 [N, len(ranks)]; NaN where the pool has no i-th other row.
    """
    import torch

    if not ranks or min(ranks) < 1:
        raise RequestError(message(f"neighbours {list(ranks)}", "start at 1", "ask for knn_1 or higher"))
    n = len(vectors)
    keep = min(max(ranks) + _SPARE, n - 1)
    result = np.full((n, len(ranks)), np.nan)
    wanted = [(column, rank) for column, rank in enumerate(ranks) if rank <= n - 1]
    if not wanted:
        return result
    pool = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)
    with torch.no_grad():
        for start in range(0, n, _BLOCK_ROWS):
            rows = torch.arange(start, min(n, start + _BLOCK_ROWS), device=pool.device)
            near = _exact_distances(pool, rows, _candidates(pool, rows, keep))
            for column, rank in wanted:
                result[start : start + len(rows), column] = near[:, rank - 1].cpu().numpy()
    return result


def _candidates(pool: Tensor, rows: Tensor, keep: int) -> Tensor:
    """Indices [R, keep] of the rows most similar to `rows`, themselves left out."""
    import torch

    best_value = torch.empty((len(rows), 0), device=pool.device)
    best_index = torch.empty((len(rows), 0), dtype=torch.int64, device=pool.device)
    for start in range(0, len(pool), _BLOCK_COLUMNS):
        similarity = pool[rows] @ pool[start : start + _BLOCK_COLUMNS].T
        own = (rows >= start) & (rows < start + similarity.shape[1])
        similarity[own.nonzero(as_tuple=True)[0], rows[own] - start] = -torch.inf
        value, index = similarity.topk(min(keep, similarity.shape[1]), dim=1)
        best_value = torch.cat([best_value, value], dim=1)
        best_index = torch.cat([best_index, index + start], dim=1)
        if best_value.shape[1] > keep:
            best_value, position = best_value.topk(keep, dim=1)
            best_index = best_index.gather(1, position)
    return best_index


def _exact_distances(pool: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """Ascending Euclidean distances [R, keep] in float64, from the differences of the vectors."""
    import torch

    parts = []
    for part, index in zip(rows.split(128), candidates.split(128), strict=True):
        difference = pool[index].double() - pool[part].double()[:, None]
        parts.append(difference.square().sum(dim=2).sqrt().sort(dim=1).values)
    return torch.cat(parts)
