"""The score store: every value ever computed, by what it depends on and by the example's content.

`<cache>/<name>-<digest of the key>/part-*.parquet` holds id -> value, reason, note (or id -> vector). A part is written
under a temporary name and renamed, so many writers need no lock; a torn or foreign file is named and set aside as
`*.rejected`. `key.json` beside the parts says what the folder's values depend on.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from im_lightning._utils.files import atomic_path, parse_json, remove_leftovers, scratch_array, write_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log

_META = b"im_lightning"
_VALUES = {"id": pa.string(), "value": pa.float64(), "reason": pa.string(), "note": pa.string()}
Texts = Sequence[str | None]
Numerics = list[tuple[dict[str, Any], int]]  # how values were computed, and how many of them


@dataclass
class StoredVectors:
    """Vectors of n examples: `present` bool [n], `vectors` float32 [n, d] (NaN elsewhere; d is 0 if none is known)."""

    present: NDArray[np.bool_]
    vectors: NDArray[np.float32]
    numerics: Numerics


@dataclass
class StoredColumn:
    """Values of n examples found in a store."""

    present: NDArray[np.bool_]  # bool [n], whether the store knows the example; NaN with a reason counts as known
    values: NDArray[np.float64]  # float64 [n], NaN where missing or not present
    reasons: list[str | None]  # n texts or None
    notes: list[str | None]  # n texts or None
    numerics: Numerics  # how the present values were computed, the most frequent way first

    @classmethod
    def empty(cls, n: int) -> StoredColumn:
        return cls(np.zeros(n, dtype=np.bool_), np.full(n, np.nan), [None] * n, [None] * n, [])


class Join:
    """The examples asked for, `ids` [n], and where a store has them.

    The stores of one pool usually hold the same ids in the same order: the last answer is kept, since finding a
    million ids anew for each indicator would take most of the time of a scoring that has nothing to compute.
    """

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids
        self._last: tuple[pa.ChunkedArray, pa.Array] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, stored: pa.ChunkedArray) -> pa.Array:
        """For each id asked for its first position among `stored`, or null."""
        if self._last is None or not self._last[0].equals(stored):
            if stored.equals(pa.chunked_array([self.ids])):  # the pool was scored as a whole
                at = pa.array(np.arange(len(self.ids), dtype=np.int32))
            else:
                at = pc.index_in(self.ids, value_set=stored.combine_chunks())
            self._last = stored, at
        return self._last[1]


class Store:
    """One folder of parts in the cache folder `root`, all of the same key.

    `key` is JSON-like: what the values depend on; its digest ends the folder's name, which begins with `name`.
    `numerics` says how values are computed now; it is recorded in each part and may differ between parts. With `exact`
    parts of another precision than that of `numerics` are left aside.
    """

    def __init__(
        self, root: Path, name: str, key: dict[str, Any], numerics: dict[str, Any], exact: bool = False
    ) -> None:
        self.name, self.key, self.numerics = name, key, dict(sorted(numerics.items()))
        self.digest = digest_json(key)
        self.root, self.folder = root, root / f"{name}-{self.digest}"
        self._swept, self._exact = False, exact

    def lookup(self, ids: Join, without: tuple[str, Sequence[str]] | None = None) -> StoredColumn:
        """What the store knows about the examples asked for.

        Args:
            ids: The examples.
            without: A reason that no longer holds for some examples, and their ids: those are looked for again.
        """
        parts = [(table, numerics) for _, table, numerics in self._sound_parts(list(_VALUES))]
        if without is not None:
            parts = [(_without(table, *without), numerics) for table, numerics in parts]
        parts = [(table, numerics) for table, numerics in parts if len(table)]
        column = StoredColumn.empty(len(ids))
        if not parts:
            return column
        table = pa.concat_tables([t for t, _ in parts])
        found = ids.find(table.column("id"))
        column.present = found.is_valid().to_numpy(zero_copy_only=False)
        at = np.flatnonzero(column.present)
        source = found.drop_null()
        column.values[at] = table.column("value").take(source).to_numpy()
        for name, target in (("reason", column.reasons), ("note", column.notes)):
            texts = table.column(name).take(source).combine_chunks()
            for position in np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False)):
                target[at[position]] = texts[position].as_py()
        column.numerics = _counted(parts, source.to_numpy())
        return column

    def lookup_vectors(self, ids: Join) -> StoredVectors:
        """What the store knows about the vectors of the examples asked for; one part is in memory at a time."""
        present = np.zeros(len(ids), dtype=np.bool_)
        vectors: NDArray[np.float32] = np.empty((len(ids), 0), dtype=np.float32)
        parts = [(path, table) for path, table, _ in self._sound_parts(["id"]) if len(table)]
        if not parts:
            return StoredVectors(present, vectors, [])
        found = ids.find(pa.concat_tables([table for _, table in parts]).column("id"))
        asked = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        source = found.drop_null().to_numpy()
        width, counted, end = None, [], 0
        for path, known in parts:
            start, end = end, end + len(known)
            here = np.flatnonzero((source >= start) & (source < end))
            for table, numerics in self._try(path, ["id", "vector"]) if len(here) else []:
                kind = table.schema.field("vector").type
                if width is None:
                    width, vectors = kind, scratch_array((len(ids), kind.list_size), self.root)
                    vectors[:] = np.nan
                if kind == width and len(table) == len(known):
                    flat = np.concatenate([_flat(chunk) for chunk in table.column("vector").chunks])
                    vectors[asked[here]] = flat.reshape(-1, kind.list_size)[source[here] - start]
                    present[asked[here]] = True
                    counted.append((numerics, len(here)))
        return StoredVectors(present, vectors, _summed(counted))

    def append(self, ids: Sequence[str], values: NDArray[np.float64], reasons: Texts, notes: Texts = ()) -> None:
        """Adds a part with the values of n examples; an InstructMiningError where the cache cannot be written."""
        columns = (list(ids), values, list(reasons), list(notes) or [None] * len(ids))
        arrays = [pa.array(c, type=t) for c, t in zip(columns, _VALUES.values(), strict=True)]
        self._write(pa.table(arrays, names=list(_VALUES)))

    def append_vectors(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Adds a part with the vectors [n, d] of n examples."""
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        self._write(pa.table([pa.array(list(ids), type=pa.string()), column], names=["id", "vector"]))

    def _write(self, table: pa.Table) -> None:
        if not self._swept:
            self._swept = True
            remove_leftovers(self.folder)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", {"name": self.name, "key": self.key})
        described = json.dumps({"digest": self.digest, "numerics": self.numerics}, sort_keys=True)
        table = table.replace_schema_metadata({_META: described.encode("ascii")})
        with atomic_path(self.folder / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet") as temporary:
            pq.write_table(table, temporary, write_page_checksum=True, compression="zstd")

    def _sound_parts(self, columns: list[str]) -> list[tuple[Path, pa.Table, dict[str, Any]]]:
        """The sound parts with their numerics, those computed as now first, so that they win over others."""
        paths = sorted(self.folder.glob("part-*.parquet"))
        sound = [(path, table, numerics) for path in paths for table, numerics in self._try(path, columns)]
        if self._exact:
            here = _precisions(self.numerics)
            same = [part for part in sound if _precisions(part[2]) <= here]
            if len(same) < len(sound):
                log(f"{self.name}: stored values of another precision than {', '.join(here)} are left aside")
            sound = same
        return sorted(sound, key=lambda part: part[2] != self.numerics)

    def _try(self, path: Path, columns: list[str]) -> list[tuple[pa.Table, dict[str, Any]]]:
        """What a part holds, or nothing if it is not sound; then it is named and set aside."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []  # set aside by another reader meanwhile
        except OSError as error:  # the disk's fault or the network's, not the part's: another time it may be read
            log(f"{path}: cannot be read now ({error.strerror or error}); passed over, left where it is")
            return []
        try:
            return [self._read(content, columns)]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0][:160]
            log(f"{path}: not a sound part of the score store ({cause}); set aside as {path.name}.rejected")
            with contextlib.suppress(OSError):  # a read-only cache: it is passed over all the same
                path.rename(path.with_name(f"{path.name}.rejected"))
            return []

    def _read(self, content: bytes, columns: list[str]) -> tuple[pa.Table, dict[str, Any]]:
        table = pq.read_table(pa.BufferReader(content), columns=columns, page_checksum_verification=True)
        described = parse_json((table.schema.metadata or {})[_META])
        if not isinstance(described["numerics"], dict):
            raise ValueError("it does not say how its values were computed")
        if described["digest"] != self.digest:
            raise ValueError("it belongs to another key")
        for name in columns:
            kind = table.schema.field(name).type
            wanted = _VALUES.get(name)
            if kind != wanted and not (wanted is None and pa.types.is_fixed_size_list(kind)):
                raise ValueError(f"its column {name} holds {kind}")
        return table.select(columns).replace_schema_metadata(None), described["numerics"]


def _without(table: pa.Table, reason: str, ids: Sequence[str]) -> pa.Table:
    """The rows of a part but those of the ids that have the reason."""
    theirs = pc.is_in(table.column("id"), value_set=pa.array(ids, pa.string()))
    stale = pc.and_(theirs, pc.fill_null(pc.equal(table.column("reason"), reason), False))
    return table.filter(pc.invert(stale))


def _precisions(numerics: dict[str, Any]) -> set[str]:
    """Number formats that values were computed in; those of the text alone have none."""
    return {kind["precision"] for kind in numerics.get("several", [numerics]) if "precision" in kind}


def _flat(chunk: Any) -> NDArray[np.float32]:
    return chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _counted(parts: list[tuple[pa.Table, dict[str, Any]]], source: NDArray[np.int64]) -> Numerics:
    """How many of the values at `source`, positions in the joined parts, come from which numerics."""
    origin = np.repeat(np.arange(len(parts)), [len(t) for t, _ in parts])[source]
    counts = np.bincount(origin, minlength=len(parts)).tolist()
    return _summed([(numerics, count) for (_, numerics), count in zip(parts, counts, strict=True)])


def _summed(counted: Numerics) -> Numerics:
    """Equal numerics together, the most frequent first."""
    counts: dict[str, int] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for numerics, count in counted:
        if count:
            name = digest_json(numerics)
            kinds[name] = numerics
            counts[name] = counts.get(name, 0) + count
    return [(kinds[name], counts[name]) for name in sorted(counts, key=lambda name: -counts[name])]


def check_writable(root: Path) -> None:
    """Raises an InstructMiningError now, rather than after hours of work, where the folder cannot be written."""
    probe = root / f"writable-{uuid.uuid4().hex}"
    with atomic_path(probe) as temporary:
        temporary.write_bytes(b"x")
    with contextlib.suppress(OSError):
        probe.unlink()
