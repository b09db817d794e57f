"""`Basket`: rows taken in an order until a budget of rows or tokens is reached, and what is passed over on the way."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from im_lightning.sampling.draws.systematic import Rows
from im_lightning.sampling.selection.ranking import Quotas

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
        quotas: How many rows each group may give; a row of a group that has given them is passed over.
        prompts: int64 [N], the prompt of each row, of which one row at most is taken; None for any number.
    """

    def __init__(
        self,
        rows: int | None,
        target: int | None = None,
        tokens: NDArray[np.int64] | None = None,
        vectors: NDArray[np.float32] | NDArray[np.float16] | None = None,
        max_similarity: float | None = None,
        tolerance: float = TOLERANCE,
        quotas: Quotas | None = None,
        prompts: Rows | None = None,
    ) -> None:
        self.prompts = prompts
        self.rows, self.target, self.tokens = rows, target, tokens
        self.vectors, self.max_similarity, self.quotas = vectors, max_similarity, quotas
        self.taken: list[int] = []  # the rows, in the order taken
        self.total = 0  # their tokens, 0 where none are counted
        self.duplicates: dict[int, int] = {}  # near-duplicates met, and the taken row that each is most like
        self.over_quota: set[int] = set()  # rows met whose group had given its rows
        self.target_of: dict[int, int] = {}  # for which target each row was taken
        self.answered: NDArray[np.int64] | None = None  # int64 [prompts], the row taken of each; −1 for none
        if prompts is not None:
            self.answered = np.full(int(prompts.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._low = 0 if target is None else math.ceil(target * (1 - tolerance))
        self._high = 0 if target is None else math.floor(target * (1 + tolerance))
        self._kept = np.empty((0, 0), dtype=np.float32)

    @property
    def full(self) -> bool:
        return self.total >= self._low if self.rows is None else len(self.taken) >= self.rows

    def open(self, rows: Rows) -> NDArray[np.bool_]:
        """bool [n]: those of the rows of whose prompt none was taken."""
        if self.answered is None or self.prompts is None:
            return np.ones(len(rows), dtype=np.bool_)
        return np.asarray(self.answered[self.prompts[rows]] < 0)

    def most(self, left: NDArray[np.bool_]) -> int:
        """How many of the rows `left` (bool [N]) it can take at most."""
        return int(left.sum()) if self.prompts is None else len(np.unique(self.prompts[left]))

    def close(self, left: NDArray[np.bool_], drawn: Rows) -> None:
        """Takes the rows that were drawn out of those `left`, and all that it can take no more."""
        left[drawn] = False
        if self.prompts is not None:
            left &= self.open(np.arange(len(left)))

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
        plain = self.max_similarity is None and self.quotas is None and self.prompts is None
        if self.rows is not None and plain:
            self.taken += order[: self.rows - len(self.taken)].tolist()
            return
        for start in range(0, len(order), _BLOCK):
            if self.full:
                return
            block, since = order[start : start + _BLOCK], len(self.taken)
            block = block[self.open(block)]
            if self.quotas is not None:
                open_groups = self.quotas.left[self.quotas.group[block]] > 0
                self.over_quota.update(block[~open_groups].tolist())
                block = block[open_groups]
            for row in block[self._unlike(block)].tolist():
                self.offer(row, since)

    def offer(self, row: int, since: int = 0) -> bool:
        """Takes a row unless it is full, the row has too many tokens, or its prompt or one too similar was taken
        (those before the first `since` were compared already)."""
        if self.full or not self.open(np.array([row]))[0]:
            return False
        count = 0 if self.tokens is None else int(self.tokens[row])
        if self.rows is None and self.total + count > self._high:
            return False
        if self.quotas is not None and not self.quotas.allows(row):
            self.over_quota.add(row)
            return False
        if self.max_similarity is not None:
            vector = self.unit(np.array([row]))[0]
            if len(self.taken) > since:
                similarity = self._kept[since : len(self.taken)] @ vector
                if similarity.max() >= self.max_similarity:
                    self.duplicates[row] = self.taken[since + int(similarity.argmax())]
                    return False
            self._keep(vector)
        if self.quotas is not None:
            self.quotas.take(row)
        if self.answered is not None and self.prompts is not None:
            self.answered[self.prompts[row]] = row
        self.taken.append(row)
        self.total += count
        return True

    def _unlike(self, block: Rows) -> NDArray[np.bool_]:
        """bool [n]: the rows that are no near-duplicate of one taken so far."""
        if self.max_similarity is None or not self.taken:
            return np.ones(len(block), dtype=bool)
        similarity = self.unit(block) @ self._kept[: len(self.taken)].T
        unlike = similarity.max(axis=1) < self.max_similarity
        for at in np.flatnonzero(~unlike).tolist():
            self.duplicates[int(block[at])] = self.taken[int(similarity[at].argmax())]
        return unlike

    def _keep(self, vector: NDArray[np.float32]) -> None:
        n = len(self.taken)
        if n == len(self._kept):
            grown = np.empty((max(64, 2 * n), len(vector)), dtype=np.float32)
            grown[:n] = self._kept[:n] if n else grown[:0]
            self._kept = grown
        self._kept[n] = vector

    def unit(self, rows: Rows) -> NDArray[np.float32]:
        """The vectors of those rows, scaled to length 1, float32 [n, d]."""
        if self.vectors is None:
            raise RuntimeError("a similarity needs vectors")
        return unit_vectors(self.vectors, rows)


def take_tokens(
    order: Rows, tokens: NDArray[np.int64], target: int, tolerance: float = TOLERANCE
) -> NDArray[np.int64] | None:
    """Rows in `order` (int64 [n], of `tokens` each) until `target` tokens, give or take the share `tolerance`.

    A row that would overshoot is passed over; so only the last few rows can be out of order. None if there are not
    enough tokens.
    """
    basket = Basket(None, target, tokens, tolerance=tolerance)
    basket.fill(np.arange(len(order)))
    return order[basket.taken] if basket.full else None


def unit_vectors(vectors: NDArray[np.float32] | NDArray[np.float16], rows: Rows) -> NDArray[np.float32]:
    """The vectors of those rows, scaled to length 1, float32 [n, d]."""
    part = np.asarray(vectors[rows], dtype=np.float32)
    part /= np.sqrt(np.einsum("rd,rd->r", part, part))[:, None]
    return part
