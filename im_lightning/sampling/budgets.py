"""Rows taken in an order until a budget of rows or tokens is reached; near-duplicates of taken rows are passed over."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from im_lightning.sampling.systematic import Rows

TOLERANCE = 0.01
"""Share by which the tokens of a subset may miss the number asked for."""

_BLOCK = 1024  # rows compared with the taken ones at a time


class Basket:
    """What was taken so far.

    Args:
        rows: Rows to take, or None for a budget of tokens.
        target: Tokens to take (± `TOLERANCE`), or None for a budget of rows.
        tokens: int64 [N], tokens per row of the pool; needed with `target`.
        vectors: [N, d], one per row of the pool, perhaps a memory map; needed with `max_similarity`.
        max_similarity: A row whose cosine with a taken row is this or more is passed over (Liu et al. 2024, DEITA).
        tolerance: Share of the target that may be missing or too much.

    Attributes:
        taken: The rows, in the order taken.
        total: Their tokens, 0 where none are counted.
        passed_over: Near-duplicates met.
    """

    def __init__(
        self,
        rows: int | None,
        target: int | None = None,
        tokens: NDArray[np.int64] | None = None,
        vectors: NDArray[np.float32] | NDArray[np.float16] | None = None,
        max_similarity: float | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.rows, self.target, self.tokens = rows, target, tokens
        self.vectors, self.max_similarity = vectors, max_similarity
        self.taken: list[int] = []
        self.total = 0
        self.passed_over = 0
        self._low = 0 if target is None else math.ceil(target * (1 - tolerance))
        self._high = 0 if target is None else math.floor(target * (1 + tolerance))
        self._kept = np.empty((0, 0), dtype=np.float32)

    @property
    def full(self) -> bool:
        return self.total >= self._low if self.rows is None else len(self.taken) >= self.rows

    def wanted(self, left: NDArray[np.bool_]) -> int:
        """How many of the rows `left` (bool [N]) are likely to fill it; with a margin where tokens are counted."""
        if self.rows is not None:
            return self.rows - len(self.taken)
        if self.tokens is None or self.target is None or not left.any():
            return 1
        mean = max(float(self.tokens[left].mean()), 1e-9)
        return max(1, math.ceil(1.05 * (self.target - self.total) / mean))

    def fill(self, order: Rows) -> None:
        """Takes rows in that order until it is full."""
        if self.rows is not None and self.max_similarity is None:
            self.taken += order[: self.rows - len(self.taken)].tolist()
            return
        for start in range(0, len(order), _BLOCK):
            if self.full:
                return
            block, since = order[start : start + _BLOCK], len(self.taken)
            for row in block[self._unlike(block)].tolist():
                self.offer(row, since)

    def offer(self, row: int, since: int = 0) -> bool:
        """Takes a row unless it is full, the row has too many tokens, or is too similar to one taken (those before
        the first `since` were compared already)."""
        if self.full:
            return False
        count = 0 if self.tokens is None else int(self.tokens[row])
        if self.rows is None and self.total + count > self._high:
            return False
        if self.max_similarity is not None:
            vector = self._unit(np.array([row]))[0]
            if len(self.taken) > since and (self._kept[since : len(self.taken)] @ vector).max() >= self.max_similarity:
                self.passed_over += 1
                return False
            self._keep(vector)
        self.taken.append(row)
        self.total += count
        return True

    def _unlike(self, block: Rows) -> NDArray[np.bool_]:
        """bool [n]: the rows that are no near-duplicate of one taken so far."""
        if self.max_similarity is None or not self.taken:
            return np.ones(len(block), dtype=bool)
        similarity = (self._unit(block) @ self._kept[: len(self.taken)].T).max(axis=1)
        self.passed_over += int((similarity >= self.max_similarity).sum())
        return similarity < self.max_similarity

    def _keep(self, vector: NDArray[np.float32]) -> None:
        n = len(self.taken)
        if n == len(self._kept):
            grown = np.empty((max(64, 2 * n), len(vector)), dtype=np.float32)
            grown[:n] = self._kept[:n] if n else grown[:0]
            self._kept = grown
        self._kept[n] = vector

    def _unit(self, rows: Rows) -> NDArray[np.float32]:
        if self.vectors is None:
            raise RuntimeError("a similarity needs vectors")
        return unit_vectors(self.vectors, rows)


def take_tokens(
    order: Rows, tokens: NDArray[np.int64], target: int, tolerance: float = TOLERANCE
) -> NDArray[np.int64] | None:
    """Rows in order until `target` tokens, give or take `tolerance`.

    A row that would overshoot is passed over; so only the last few rows can be out of order.

    Args:
        order: int64 [n], rows.
        tokens: int64 [n], tokens of each of them.
        target: Tokens to reach.
        tolerance: Share of the target.

    Returns:
        int64 [k], a part of `order`; None if it does not hold enough tokens.
    """
    basket = Basket(None, target, tokens, tolerance=tolerance)
    basket.fill(np.arange(len(order)))
    return order[basket.taken] if basket.full else None


def unit_vectors(vectors: NDArray[np.float32] | NDArray[np.float16], rows: Rows) -> NDArray[np.float32]:
    """The vectors of those rows, scaled to length 1, float32 [n, d]."""
    part = np.asarray(vectors[rows], dtype=np.float32)
    part /= np.sqrt(np.einsum("rd,rd->r", part, part))[:, None]
    return part
