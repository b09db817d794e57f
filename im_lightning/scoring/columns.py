"""The pool as distinct examples, and what is known and missing of each indicator for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from im_lightning._utils.files import scratch_array
from im_lightning._utils.hashing import digest_bytes
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.indicators.base import EMPTY_RESPONSE, Indicator, Scores, no_number
from im_lightning.scoring.store import Join, Numerics, Store, StoredColumn, StoredVectors

VECTORS_PER_PART = 65536
FLUSH_SECONDS = 30.0  # at most this much work is lost by a kill; an interrupt loses only the batch in hand
FIRST_FLUSH = 1.0  # and no more than half of what was done, or this
_PERPLEXITIES = ("ppl", "ppl_unconditional", "ppl_tuned")  # earlier versions took a call alone for an empty response


class DistinctPool:
    """N rows as their U distinct examples: duplicates are scored once."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows
        encoded = pa.array([example.id for example in rows], type=pa.string()).dictionary_encode()
        self.ids: pa.Array = encoded.dictionary  # strings [U], in order of first appearance
        self.join = Join(self.ids)
        # position of each row's example among the distinct ones, int64 [N]
        self.codes: NDArray[np.int64] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        first = np.full(len(self.ids), len(rows), dtype=np.int64)
        np.minimum.at(first, self.codes, np.arange(len(rows)))
        self.examples = list(rows) if len(first) == len(rows) else [rows[int(i)] for i in first]
        # whether a last answer holds calls or reasoning, and ids of those that hold no text beside
        self.structured = any(one.messages[-1].fields for one in self.examples)
        self.wordless = [one.id for one in self.examples if one.messages[-1].fields and not one.messages[-1].content]

    def __len__(self) -> int:
        return len(self.ids)

    def ids_at(self, positions: NDArray[np.int64]) -> list[str]:
        return self.ids.take(pa.array(positions)).to_pylist()

    def counts(self) -> NDArray[np.int64]:
        """int64 [U]: rows that each distinct example stands for."""
        return np.bincount(self.codes, minlength=len(self))

    def digest(self) -> str:
        """Of the rows' ids regardless of their order, duplicates included: what a pool-dependent value depends on."""
        width = 32  # hexadecimal digits of an id
        letters = np.frombuffer("".join(self.ids.to_pylist()).encode("ascii"), dtype=f"S{width}")
        lines = np.full((len(self.codes), width + 1), ord("\n"), dtype=np.uint8)
        lines[:, :width] = np.sort(letters[self.codes]).view(np.uint8).reshape(-1, width)
        return digest_bytes(lines.tobytes()[:-1])


class Target:
    """What a store knows of the distinct examples, and where new values go."""

    def __init__(self, name: str, pool: DistinctPool, store: Store, known: StoredColumn | StoredVectors) -> None:
        self.name, self.pool, self.store = name, pool, store
        self.present, self._known = known.present, known.numerics
        self._found = int(known.present.sum())
        self._new: list[NDArray[np.int64]] = []
        warn_of_other_numerics(name, known.numerics, store.numerics)

    @property
    def missing(self) -> NDArray[np.bool_]:
        """bool [U]: neither in the store nor computed by now."""
        return ~self.present

    @property
    def computed(self) -> int:
        return int(self.present.sum()) - self._found

    def computed_as(self, numerics: dict[str, Any]) -> None:
        """What is put from here on was computed in this way, not in that of the store's own `numerics`."""
        if numerics != self.store.numerics:
            self.flush()
            if self.computed:
                self._known.append((self.store.numerics, self.computed))
            self.store.numerics = dict(sorted(numerics.items()))

    def numerics(self) -> dict[str, Any]:
        """How the values were computed."""
        return combined_numerics(self._known, self.store.numerics if self.computed else None)

    def flush(self) -> None:
        """Writes what was put since the last time."""
        new, self._new = self._new, []
        if any(map(len, new)):
            self.write(np.concatenate(new))

    def write(self, at: NDArray[np.int64]) -> None:
        """Writes what was put for the examples `at`."""
        raise NotImplementedError


class Work(Target):
    """One stored indicator over the distinct examples."""

    def __init__(self, pool: DistinctPool, indicator: Indicator, store: Store) -> None:
        stale = pool.wordless if indicator.name in _PERPLEXITIES else []
        without = (EMPTY_RESPONSE, stale) if stale else None
        self.indicator, self.column = indicator, store.lookup(pool.join, without)
        super().__init__(indicator.name, pool, store, self.column)
        self._take_back()

    def _take_back(self) -> None:
        """Stored values that are no number, or that the indicator has come to refuse."""
        for position in np.flatnonzero(np.isinf(self.column.values)):
            self.column.values[position], self.column.reasons[position] = np.nan, no_number(self.name)
        if type(self.indicator).refuse is Indicator.refuse:
            return
        for position in np.flatnonzero(self.present & ~np.isnan(self.column.values)):
            if reason := self.indicator.refuse(self.pool.examples[position]):
                self.column.values[position], self.column.reasons[position] = np.nan, reason

    def put(self, positions: NDArray[np.int64], scores: Scores) -> None:
        """Takes the values of the distinct examples at `positions`."""
        scores = finite(self.name, scores)
        self.present[positions] = True
        self.column.values[positions] = scores.values
        for at, position in enumerate(positions):
            self.column.reasons[position] = scores.reasons[at]
            if scores.notes:
                self.column.notes[position] = scores.notes[at]
        self._new.append(positions)

    def pass_over(self, positions: NDArray[np.int64], reason: str) -> None:
        """Marks examples as missing in this run only (out of memory, say); none is stored or counts as computed."""
        self._found += int(self.missing[positions].sum())
        self.present[positions] = True
        for position in positions:
            self.column.reasons[position] = reason

    def write(self, at: NDArray[np.int64]) -> None:
        reasons, notes = [self.column.reasons[i] for i in at], [self.column.notes[i] for i in at]
        self.store.append(self.pool.ids_at(at), self.column.values[at], reasons, notes)

    def scores(self) -> Scores:
        """All values, by distinct example."""
        return Scores(self.column.values, self.column.reasons, self.column.notes)


class VectorWork(Target):
    """One vector per distinct example: those of the store, and those that a pass adds.

    Those of a large pool lie in a file without a name (`scratch_array`), a part of which is in memory at a time. `name`
    is "embeddings" (unit vectors) or "gradients".
    """

    def __init__(self, pool: DistinctPool, store: Store, name: str = "embeddings") -> None:
        known = store.lookup_vectors(pool.join)
        self.vectors = known.vectors
        self.incomplete = False  # whether some were passed over
        super().__init__(name, pool, store, known)

    def put(self, positions: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Takes vectors [n, d] (NaN where there is none) of the distinct examples at `positions`."""
        if not self.vectors.shape[1]:
            self.vectors = scratch_array((len(self.pool), vectors.shape[1]), self.store.root)
            self.vectors[:] = np.nan
        self.vectors[positions] = vectors
        self.present[positions] = True
        self._new.append(positions)

    def pass_over(self, positions: NDArray[np.int64]) -> None:
        """As `Work.pass_over`."""
        self._found += int(self.missing[positions].sum())
        self.present[positions] = True
        self.incomplete |= len(positions) > 0

    def look_again(self) -> None:
        """Takes what the store has got since: a pass over another pool may have made vectors of these examples."""
        known = self.store.lookup_vectors(self.pool.join)
        self.vectors, self.present, self._known = known.vectors, known.present, known.numerics
        self._found = int(known.present.sum())

    def of_width(self, width: int) -> NDArray[np.float32]:
        """float32 [U, width]: the vectors, or NaN where no example at all has one, whose width then is not known."""
        if self.vectors.shape[1]:
            return self.vectors
        return np.broadcast_to(np.float32(np.nan), (len(self.pool), width))

    def write(self, at: NDArray[np.int64]) -> None:
        for start in range(0, len(at), VECTORS_PER_PART):
            part = at[start : start + VECTORS_PER_PART]
            self.store.append_vectors(self.pool.ids_at(part), self.vectors[part])


def finite(name: str, scores: Scores) -> Scores:
    """The scores of an indicator; those that are infinite are missing, with the reason."""
    values = np.asarray(scores.values, dtype=np.float64)
    odd = np.flatnonzero(np.isinf(values))
    if not len(odd):
        return scores
    values, reasons = values.copy(), list(scores.reasons)
    for position in odd:
        values[position], reasons[position] = np.nan, no_number(name)
    return Scores(values, reasons, scores.notes)


class Clock:
    """Says when what was computed should be written."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < min(FLUSH_SECONDS, max(FIRST_FLUSH, self._last - self._begun)):
            return False
        self._last = now
        return True


def combined_numerics(known: Numerics, now: dict[str, Any] | None) -> dict[str, Any]:
    """One numerics for all values; {"several": [...]} where they were not all computed in the same way."""
    kinds = [kind for kind, _ in known]
    if now is not None and now not in kinds:
        kinds.append(now)
    return {"several": kinds} if len(kinds) > 1 else (kinds or [{}])[0]


def warn_of_other_numerics(name: str, known: Numerics, now: dict[str, Any]) -> None:
    """Says that stored values were computed in another precision or with other versions; they are used all the same."""
    total = sum(count for _, count in known)
    for kind, count in known:
        if kind != now:
            changed = [
                f"{k} {kind.get(k)}, now {now.get(k)}" for k in sorted({*kind, *now}) if kind.get(k) != now.get(k)
            ]
            log(
                f"warning: {name}: {count:,} of {total:,} stored values were computed with other numerics "
                f"({'; '.join(changed)}) and are used as they are; for fresh ones choose another --cache-dir"
            )
