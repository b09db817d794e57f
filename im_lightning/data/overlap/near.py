"""Rows that are nearly those of an evaluation set: Jaccard similarity of their shingles, and none is missed.

MinHash with bands finds pairs well above its threshold and loses those near it (five bands of 25: two thirds of the
pairs at 0.9). An evaluation set is small enough for an exact search: two sets of similarity t or more share one of the
rarest (1 − t)·n + 1 members of each (prefix filter: Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity
search"), so only rows that share a rare shingle are compared, each in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.overlap.keys import Turns, conversation
from im_lightning.errors import RequestError, message

SHINGLE = 5
"""Characters of normalised text in a shingle."""

Ints = NDArray[np.int64]

_BITS = 40  # of a shingle's hash; the rest of 64 are the row's
_SLOTS = np.uint64((1 << 24) - 1)  # of the table that tells most foreign shingles at once
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SLACK = 1e-9
_PAIRS = 1 << 14  # compared at a time


class Near(NamedTuple):
    """For n rows of a pool: the most similar evaluation row, int64 [n], −1 where none is near; and how similar."""

    row: Ints
    similarity: NDArray[np.float64]


def shingles(rows: Sequence[Turns]) -> tuple[Ints, NDArray[np.uint64]]:
    """The different shingles of each conversation: rows int64 [m], ascending, and hashes uint64 [m] of 40 bits.

    Of all turns but the system's. A text shorter than a shingle is one; an empty one has none.
    """
    texts = ["\n".join(conversation(turns)) for turns in rows]
    padded = [text.ljust(SHINGLE, "\0") for text in texts if text]
    if not padded:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    hashes = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = (hashes ^ codes[offset : offset + len(hashes)]) * _FACTOR
        hashes ^= hashes >> np.uint64(31)
    whole = np.ones(len(codes), dtype=np.bool_)
    for offset in range(1, SHINGLE):  # none reaches into the next text
        whole[np.cumsum(lengths) - offset] = False
    row = np.repeat(np.flatnonzero([bool(text) for text in texts]).astype(np.uint64), lengths)
    keys = (row[: len(hashes)] << np.uint64(_BITS) | hashes >> np.uint64(64 - _BITS))[whole[: len(hashes)]]
    keys.sort()
    keys = keys[np.append(True, keys[1:] != keys[:-1])]
    return (keys >> np.uint64(_BITS)).astype(np.int64), keys & np.uint64((1 << _BITS) - 1)


class NearRows:
    """Evaluation rows to which near ones are looked for.

    Args:
        rows: Their turns (`turns_of`).
        threshold: Least Jaccard similarity of the shingles, above 0 and at most 1.

    Raises:
        RequestError: the threshold lies elsewhere.
    """

    def __init__(self, rows: Sequence[Turns], threshold: float) -> None:
        if not 0 < threshold <= 1:
            cause = "a Jaccard similarity lies above 0, and at 1 at most"
            raise RequestError(message(f"near={threshold}", cause, "give such as 0.8"))
        self.threshold = threshold
        self._row, hashes = shingles(rows)
        self._known, self._column = np.unique(hashes, return_inverse=True)
        self._maybe = np.zeros(int(_SLOTS) + 1, dtype=np.bool_)
        self._maybe[self._known & _SLOTS] = True
        self._sizes = np.bincount(self._row, minlength=len(rows))

    def search(self, rows: Sequence[Turns]) -> Near:
        """The nearest evaluation row of each of n rows (a part of a pool; at most 2^24)."""
        row, hashes = shingles(rows)
        n = len(rows)
        sizes = np.bincount(row, minlength=n)
        out = Near(np.full(n, -1, dtype=np.int64), np.zeros(n))
        for known in (lambda h: self._maybe[h & _SLOTS], self._is_known):  # the second is slow, and exact
            there = known(hashes)
            enough = np.bincount(row[there], minlength=n) >= self.threshold * sizes - _SLACK
            kept = there & enough[row]
            row, hashes = row[kept], hashes[kept]
        if not len(row):
            return out
        column = np.searchsorted(self._known, hashes)
        count = np.bincount(column, minlength=len(self._known)) + np.bincount(self._column)
        rank = np.argsort(np.argsort(count, kind="stable"))  # 0: the rarest in both
        mine, rare = self._matrices(row, rank[column], sizes)
        theirs, their_rare = self._matrices(self._row, rank[self._column], self._sizes)
        pairs = (rare @ their_rare.T).tocoo()
        smaller = np.minimum(sizes[pairs.row], self._sizes[pairs.col])
        alike = smaller >= self.threshold * np.maximum(sizes[pairs.row], self._sizes[pairs.col]) - _SLACK
        first, second = pairs.row[alike], pairs.col[alike]
        for start in range(0, len(first), _PAIRS):
            at, other = first[start : start + _PAIRS], second[start : start + _PAIRS]
            common = mine[at].multiply(theirs[other]).sum(axis=1)
            similarity = common / (sizes[at] + self._sizes[other] - common)
            for k in np.flatnonzero(similarity >= self.threshold - _SLACK):
                if similarity[k] > out.similarity[at[k]]:
                    out.row[at[k]], out.similarity[at[k]] = other[k], similarity[k]
        return out

    def _is_known(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        if not len(self._known):
            return np.zeros(len(hashes), dtype=np.bool_)
        return self._known[np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)] == hashes

    def _matrices(self, row: Ints, rank: Ints, sizes: Ints) -> tuple[Any, Any]:
        """Rows × known shingles: all, and each row's rarest. What of its `sizes` shingles is not given is rarer still:
        no evaluation row has it."""
        from scipy.sparse import csr_array

        order = np.lexsort((rank, row))
        row, rank = row[order], rank[order]
        given = np.bincount(row, minlength=len(sizes))
        place = np.arange(len(row)) - (np.cumsum(given) - given)[row] + (sizes - given)[row]
        rarest = place <= (sizes - np.ceil(self.threshold * sizes - _SLACK))[row]
        shape = (len(sizes), len(self._known))
        return tuple(
            csr_array((np.ones(int(kept.sum()), dtype=np.int32), (row[kept], rank[kept])), shape=shape)
            for kept in (place >= 0, rarest)
        )
