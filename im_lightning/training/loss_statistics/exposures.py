"""How often a run has trained on each row of the pool, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning.data.score_table import ScoreTable
from im_lightning.indicators.transforms import weighted_mean


class Exposures:
    """Counts per row: `total` is known on all ranks, `recent` is this rank's since the last `reduce`.

    Within an epoch ranks see disjoint rows, so counting over ranks once per epoch tells first exposures from repeats
    exactly; under draws with replacement a repeat within one epoch on another rank is noticed at its end only.

    Args:
        rows: Rows of the pool.
    """

    def __init__(self, rows: int) -> None:
        self.total = np.zeros(rows, dtype=np.int32)
        self.recent = np.zeros(rows, dtype=np.int32)

    def see(self, rows: np.ndarray) -> np.ndarray:
        """Counts the rows (int64 [B], in order) and returns bool [B]: which had been seen before."""
        before = (self.total[rows] + self.recent[rows]) > 0
        if len(np.unique(rows)) < len(rows):  # a row twice in one batch: the second time is a repeat
            first = np.zeros(len(rows), dtype=bool)
            first[np.unique(rows, return_index=True)[1]] = True
            before |= ~first
        np.add.at(self.recent, rows, 1)
        return before

    def reduce(self, all_sum: Callable[[Tensor], Tensor] | None) -> None:
        """Moves the recent counts of all ranks into the total; a collective where `all_sum` is given."""
        recent = self.recent if all_sum is None else all_sum(torch.from_numpy(self.recent.copy())).cpu().numpy()
        self.total = self.total + recent
        self.recent = np.zeros_like(self.recent)

    def state(self) -> dict[str, Tensor]:
        """The total as rows and counts: plain tensors for a checkpoint."""
        rows = np.flatnonzero(self.total)
        return {"rows": torch.from_numpy(rows), "counts": torch.from_numpy(self.total[rows])}

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Starts from what `state` returned. Every rank adopts it: the total is not summed over ranks again."""
        self.total = np.zeros_like(self.total)
        self.total[state["rows"].numpy()] = state["counts"].numpy()
        self.recent = np.zeros_like(self.recent)


def indicator_means(table: ScoreTable, exposures: np.ndarray) -> dict[str, Any]:
    """Exposure-weighted mean of each raw indicator."""
    return {name: weighted_mean(table.values[name], exposures) for name in table.indicators}
