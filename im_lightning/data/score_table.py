"""`ScoreTable`: one row per example, one float column per indicator, NaN with a reason where a value is missing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.display import Displayed, panels
from im_lightning._utils.files import atomic_path, looks_like, parse_json
from im_lightning._utils.hashing import digest_strings
from im_lightning.data.example import Example
from im_lightning.errors import DataError, RequestError, message

PREDICTED = "predicted_log_loss"
_FIXED = ("row", "id", "source")
_REASON = "_reason"
_META = b"im_lightning"
_VERSION = 1
_NO_REASON = "no reason was recorded"


def check_table_path(path: str | os.PathLike[str]) -> None:
    """Raises a RequestError for a name that no score table may have; commands ask before the work."""
    if Path(path).suffix.lower() != ".parquet":
        raise RequestError(message(str(path), "a score table is a Parquet file", "end its name in .parquet"))


def check_column(name: str) -> None:
    """Raises a RequestError for a name that no column of scores may have."""
    if not name or name in _FIXED or name.endswith(_REASON):
        cause = "a column of scores cannot have this name"
        raise RequestError(message(f"column {name!r}", cause, "rename the indicator"))


class ScoreTable(Displayed):
    """Scores of a pool of N examples, in input order.

    Args:
        row: int64 [N], position of each example among the accepted rows of its pool.
        id: N content ids (`Example.id`); duplicates of an example share one.
        source: N source names.
        values: Per indicator float64 [N], NaN where the value is missing. The name "predicted_log_loss" is a
            rule's prediction (nats, log of the evaluation loss) and no indicator.
        reasons: Per indicator N texts, None where there is a value.
        keys: Per indicator {"identity": {...}, "numerics": {...}}, JSON-like; see the score store.
        meta: Anything JSON-like worth keeping.

    Raises:
        RequestError: columns of unequal length or with a reserved name.

    >>> table = ScoreTable([0, 1], ["a", "b"], ["", ""], {"mtld": [np.nan, 50.0]}, {"mtld": ["empty response", None]})
    >>> table.matrix(["mtld"]).shape, table.reasons["mtld"][0]
    ((2, 1), 'empty response')
    """

    def __init__(
        self,
        row: ArrayLike,
        id: Sequence[str],
        source: Sequence[str],
        values: Mapping[str, ArrayLike],
        reasons: Mapping[str, Sequence[str | None]] | None = None,
        keys: Mapping[str, dict[str, Any]] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.row: NDArray[np.int64] = np.asarray(row, dtype=np.int64)
        self.id, self.source = list(id), list(source)
        self.values: dict[str, NDArray[np.float64]] = {}
        self.reasons: dict[str, list[str | None]] = {}
        self.keys = dict(keys or {})
        self.meta = dict(meta or {})
        self._same_length("id", len(self.id))
        self._same_length("source", len(self.source))
        for name, column in values.items():
            check_column(name)
            array = np.asarray(column, dtype=np.float64)
            self._same_length(name, len(array))
            given = (reasons or {}).get(name) or [None] * len(array)
            self._same_length(f"reasons of {name}", len(given))
            self.values[name] = array
            kept: list[str | None] = [None] * len(array)
            for position in np.flatnonzero(np.isnan(array)).tolist():
                kept[position] = given[position] or _NO_REASON
            self.reasons[name] = kept

    def _same_length(self, name: str, length: int) -> None:
        if self.row.ndim != 1 or length != len(self.row):
            cause = f"it has {length} entries for {self.row.size} rows"
            raise RequestError(message(f"column {name!r}", cause, "give one entry per row"))

    def __len__(self) -> int:
        return len(self.row)

    def __repr__(self) -> str:
        return f"ScoreTable({len(self)} rows; {', '.join(self.values) or 'no scores'})"

    @property
    def indicators(self) -> list[str]:
        """Names of the indicator columns, in order."""
        return [name for name in self.values if name != PREDICTED]

    @property
    def predicted_log_loss(self) -> NDArray[np.float64] | None:
        """float64 [N], NaN where an indicator was missing; None before a rule was applied."""
        return self.values.get(PREDICTED)

    @cached_property
    def pool_digest(self) -> str:
        """Digest of the ids in order."""
        return digest_strings(self.id)

    def note_refused(self, rejected: Iterable[Any]) -> None:
        """Keeps which examples the template refused (`Rejected` with an id), and why; they are no rows of the table."""
        if refused := {one.id: one.cause for one in rejected if one.id}:
            self.meta["refused"] = refused

    def refusal(self, example: Example) -> str | None:
        """Why the template refused this example when the table was scored, or None; see `load_examples(refuses=)`."""
        return self.meta.get("refused", {}).get(example.id)

    def matrix(self, names: Sequence[str]) -> NDArray[np.float64]:
        """The named columns as float64 [N, p].

        Raises:
            RequestError: a column is not there; names it and the command that makes it.
        """
        absent = [name for name in names if name not in self.values]
        if absent:
            cause = f"has no {', '.join(absent)} (it has {', '.join(self.indicators) or 'no indicators'})"
            command = f"im-lightning score DATA --model MODEL --indicators {','.join(names)} --out scores.parquet"
            raise RequestError(message("the score table", cause, f"score the data for them: {command}"))
        if not names:
            return np.empty((len(self), 0))
        return np.column_stack([self.values[name] for name in names])

    def coverage(self) -> list[dict[str, Any]]:
        """Per indicator: {"indicator", "rows", "scored", "missing": {reason: rows}}, most frequent reason first."""
        report = []
        for name in self.indicators:
            missing = Counter(reason for reason in self.reasons[name] if reason is not None)
            scored = len(self) - sum(missing.values())
            entry = {"indicator": name, "rows": len(self), "scored": scored, "missing": dict(missing.most_common())}
            report.append(entry)
        return report

    def take(self, positions: ArrayLike) -> ScoreTable:
        """The rows at `positions` (int, or bool [N]), in that order; `row` keeps its values."""
        at = np.asarray(positions)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        return ScoreTable(
            self.row[at],
            [self.id[i] for i in at],
            [self.source[i] for i in at],
            {name: column[at] for name, column in self.values.items()},
            {name: [column[i] for i in at] for name, column in self.reasons.items()},
            self.keys,
            self.meta,
        )

    def with_values(
        self,
        name: str,
        values: ArrayLike,
        reasons: Sequence[str | None] | None = None,
        key: dict[str, Any] | None = None,
    ) -> ScoreTable:
        """A table with one column added or replaced; this one stays as it is."""
        all_reasons = {k: v for k, v in self.reasons.items() if k != name}
        keys = {k: v for k, v in self.keys.items() if k != name}
        if reasons is not None:
            all_reasons[name] = list(reasons)
        if key is not None:
            keys[name] = key
        return ScoreTable(self.row, self.id, self.source, {**self.values, name: values}, all_reasons, keys, self.meta)

    def to_arrow(self) -> Any:
        """The table as `pyarrow.Table`, as `write` writes it, with keys and meta in its metadata."""
        import pyarrow as pa

        columns: dict[str, Any] = {"row": self.row, "id": _texts(self.id), "source": _texts(self.source)}
        order = [*self.indicators, *([PREDICTED] if PREDICTED in self.values else [])]
        columns.update((name, self.values[name]) for name in order)
        for name in order:
            if self.reasons[name].count(None) < len(self):
                columns[name + _REASON] = _texts(self.reasons[name])
        described = {"version": _VERSION, "scores": order, "keys": self.keys, "meta": self.meta}
        return pa.table(columns).replace_schema_metadata({_META: json.dumps(described).encode("ascii")})

    def to_pandas(self) -> Any:
        """The table as a `pandas.DataFrame`, with the columns of `to_arrow`."""
        return self.to_arrow().to_pandas()

    def plot(self, axes: Any = None) -> list[Any]:
        """Draws a histogram per indicator, of the values that are known.

        Args:
            axes: Axes of matplotlib, one per indicator; by default those of a new figure.

        Returns:
            The axes.
        """
        drawn = panels(len(self.indicators), axes)
        for ax, name in zip(drawn, self.indicators, strict=True):
            known = self.values[name][np.isfinite(self.values[name])]
            ax.hist(known, bins="auto" if len(known) > 1 else 1)
            missing = len(self) - len(known)
            ax.set(xlabel=name, ylabel="rows", title=f"{missing:,} missing" if missing else "")
        return drawn

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes Parquet atomically: row, id, source, the scores, `<indicator>_reason` where a value is missing.

        Raises:
            RequestError: `path` does not end in `.parquet`.
            InstructMiningError: it cannot be written.
        """
        import pyarrow.parquet as pq

        check_table_path(path)
        table = self.to_arrow()
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    @staticmethod
    def wrote(path: Path) -> bool:
        """Whether a Parquet file says that it is a score table."""
        import pyarrow.parquet as pq

        return _META in (pq.read_schema(path).metadata or {})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Reads what `write` wrote.

        Raises:
            RequestError: there is no such file.
            DataError: the file is torn, or no score table, or of a later version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        again = "score the data again: im-lightning score DATA --model MODEL --out scores.parquet"
        if not Path(path).is_file():
            raise RequestError(message(str(path), "there is no such score table", again))
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            cause = f"is torn or not Parquet ({(str(error).splitlines() or ['?'])[0]})"
            if (other := looks_like(path)) and "Parquet" not in other:
                cause = f"is no score table{other}; score tables and data stand in another order"
            raise DataError(message(str(path), cause, again)) from error
        try:
            described = parse_json((table.schema.metadata or {})[_META])
            if described["version"] > _VERSION:
                remedy = "use that version of im_lightning, or score the data again"
                raise DataError(message(str(path), f"was written by a later version ({described['version']})", remedy))
            names = described["scores"]
            column = {name: table.column(name) for name in (*_FIXED, *names)}
            reasons = {n: table.column(n + _REASON).to_pylist() for n in names if n + _REASON in table.column_names}
            values = {name: column[name].to_numpy().astype(np.float64) for name in names}
            row, ids, sources = column["row"].to_numpy(), column["id"].to_pylist(), column["source"].to_pylist()
            if row.dtype.kind not in "iu" or not all(isinstance(text, str) for text in (*ids, *sources)):
                raise ValueError("row, id or source holds something else")
            return cls(row, ids, sources, values, reasons, described["keys"], described["meta"])
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(message(str(path), "is Parquet but no score table of im_lightning", again)) from error


def _texts(column: Sequence[str | None]) -> Any:
    """An Arrow string column; lone surrogates, which UTF-8 cannot hold, become "?"."""
    import pyarrow as pa

    try:
        return pa.array(column, type=pa.string())
    except UnicodeEncodeError:
        kept = [None if text is None else text.encode("utf-8", "replace").decode("utf-8") for text in column]
        return pa.array(kept, type=pa.string())
