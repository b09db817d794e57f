"""Rows that are nearly those of an evaluation set: Jaccard similarity of their shingles, and none is missed.

MinHash with bands finds pairs well above its threshold and loses those near it (five bands of 25: two thirds of the
pairs at 0.9). An evaluation set is small enough for an exact search. A row of similarity t or more has all of an
evaluation row's n shingles but (1 − t)·n, so of any p of them all but (1 − t)·n: the p rarest are looked for
(prefix filter: Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search"), and only rows that have as many
are compared, each in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.overlap.keys import Turns, conversation
from im_lightning.errors import RequestError, message

SHINGLE = 5
"""Characters of normalised text in a shingle."""

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_BITS = 40  # of a shingle's hash; the rest of 64 are the row's
_SLOTS = np.uint64((1 << 24) - 1)  # of the table that tells most foreign shingles at once
_FACTORS = np.array(  # of multiply-shift hashing, one per character: random odd numbers (SplitMix64 of 0)
    [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F5, 0x06C45D188009454F, 0xF88BB8A8724C81ED, 0x1B39896A51A8749B],
    dtype=np.uint64,
)
_SLACK = 1e-9
_PAIRS = 1 << 14  # compared at a time
_BLOCK = 1 << 15  # characters hashed at a time: what the processor's cache holds
_SAMPLE = 1 << 11  # rows of the pool that say which shingles are rare


class Near(NamedTuple):
    """For n rows of a pool: the most similar evaluation row, int64 [n], −1 where none is near; and how similar."""

    row: Ints
    similarity: NDArray[np.float64]


class _Texts:
    """The normalised texts of conversations, end to end; empty ones are left out, and no text is shorter than a
    shingle. Of all turns but the system's."""

    def __init__(self, rows: Sequence[Turns]) -> None:
        texts = ["\n".join(conversation(turns)) for turns in rows]
        padded = [text.ljust(SHINGLE, "\0") for text in texts if text]
        self.row = np.flatnonzero([bool(text) for text in texts])
        self.end = np.cumsum([len(text) for text in padded], dtype=np.int64)  # of each text, in `codes`
        self.codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)

    def blocks(self) -> Iterator[tuple[int, Hashes]]:
        """Place of the first shingle and hashes of the next ones; some reach from one text into the next."""
        last = len(self.codes) - SHINGLE + 1
        for start in range(0, max(last, 0), _BLOCK):
            wide = self.codes[start : start + _BLOCK + SHINGLE - 1].astype(np.uint64)
            size = len(wide) - SHINGLE + 1
            hashes = wide[:size] * _FACTORS[0]
            for offset in range(1, SHINGLE):
                hashes += wide[offset : offset + size] * _FACTORS[offset]
            hashes >>= np.uint64(64 - _BITS)
            yield start, hashes

    def different(self, places: Ints, hashes: Hashes) -> tuple[Ints, Hashes]:
        """Rows [m], ascending, and hashes of the different shingles at these places."""
        text = np.searchsorted(self.end, places, side="right")
        inside = places + SHINGLE <= self.end[text]
        keys = self.row[text[inside]].astype(np.uint64) << np.uint64(_BITS) | hashes[inside]
        keys.sort()
        keys = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
        return (keys >> np.uint64(_BITS)).astype(np.int64), keys & np.uint64((1 << _BITS) - 1)


def shingles(rows: Sequence[Turns]) -> tuple[Ints, Hashes]:
    """The different shingles of each conversation: rows int64 [m], ascending, and hashes uint64 [m] of 40 bits.

    Of all turns but the system's. A text shorter than a shingle is one; an empty one has none.
    """
    texts = _Texts(rows)
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(found for _, found in texts.blocks())])
    return texts.different(np.arange(len(hashes)), hashes)


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
        self._sizes = np.bincount(self._row, minlength=len(rows))
        self._prefix: _Prefix | None = None

    def search(self, rows: Sequence[Turns]) -> Near:
        """The nearest evaluation row of each of n rows (a part of a pool; at most 2^24)."""
        out = Near(np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows)))
        if not len(self._known):
            return out
        if self._prefix is None:  # whatever is held to be rare: the search is exact
            _, some = shingles(rows[:_SAMPLE])
            rarity = np.bincount(self._columns(some)[1], minlength=len(self._known)) + np.bincount(self._column)
            self._prefix = _Prefix(self, np.argsort(np.argsort(rarity, kind="stable")))
        first, second = self._prefix.pairs(_Texts(rows), len(rows))
        which, first = np.unique(first, return_inverse=True)
        row, hashes = shingles([rows[at] for at in which])
        sizes = np.bincount(row, minlength=len(which))
        alike = np.minimum(sizes[first], self._sizes[second]) >= (
            self.threshold * np.maximum(sizes[first], self._sizes[second]) - _SLACK
        )
        first, second = first[alike], second[alike]
        found, columns = self._columns(hashes)
        mine = _matrix(row[found], columns, (len(which), len(self._known)))
        for start in range(0, len(first), _PAIRS):
            at, other = first[start : start + _PAIRS], second[start : start + _PAIRS]
            common = mine[at].multiply(self.matrix[other]).sum(axis=1)
            similarity = common / (sizes[at] + self._sizes[other] - common)
            for k in np.flatnonzero(similarity >= self.threshold - _SLACK):
                place = which[at[k]]
                if similarity[k] > out.similarity[place]:
                    out.row[place], out.similarity[place] = other[k], similarity[k]
        return out

    @cached_property
    def matrix(self) -> Any:
        """Evaluation rows × known shingles."""
        return _matrix(self._row, self._column, (len(self._sizes), len(self._known)))

    def _columns(self, hashes: Hashes) -> tuple[Ints, Ints]:
        """Which of the hashes are known, and their columns."""
        column = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        found = np.flatnonzero(self._known[column] == hashes)
        return found, column[found]


class _Prefix:
    """Each evaluation row's rarest shingles, and of how many of them it takes for a row to be near.

    Args:
        near: The rows.
        rank: Of each known shingle, 0 for the rarest.
    """

    def __init__(self, near: NearRows, rank: Ints) -> None:
        sizes = near._sizes
        most = sizes - np.ceil(near.threshold * sizes - _SLACK).astype(np.int64)  # that a near row may lack
        count = np.minimum(sizes, 2 * most + 1)
        self.least = count - most
        order = np.lexsort((rank[near._column], near._row))
        place = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[near._row[order]]
        kept = order[place < count[near._row[order]]]
        self.hashes, column = np.unique(near._known[near._column[kept]], return_inverse=True)
        self.matrix = _matrix(column, near._row[kept], (len(self.hashes), len(sizes)))
        self.maybe = np.zeros(int(_SLOTS) + 1, dtype=np.bool_)
        self.maybe[self.hashes & _SLOTS] = True

    def pairs(self, texts: _Texts, n: int) -> tuple[Ints, Ints]:
        """Rows of the n, ascending, and evaluation rows that may be near each other."""
        places, hits = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
        for start, hashes in texts.blocks():
            at = np.flatnonzero(self.maybe[hashes & _SLOTS])
            places.append(at + start)
            hits.append(hashes[at])
        row, hashes = texts.different(np.concatenate(places), np.concatenate(hits))
        column = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found = self.hashes[column] == hashes
        shared = (_matrix(row[found], column[found], (n, len(self.hashes))) @ self.matrix).tocoo()
        enough = shared.data >= self.least[shared.col]
        first, second = shared.row[enough], shared.col[enough]
        order = np.lexsort((second, first))
        return first[order], second[order]


def _matrix(row: Ints, column: Ints, shape: tuple[int, int]) -> Any:
    """1 at each of these places."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(row), dtype=np.int32), (row, column)), shape=shape)
