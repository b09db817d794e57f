"""Scores that another tool computed, as columns of a score table: any other scorer can be an indicator.

The file is JSON Lines, JSON or Parquet, one record per example, with an `id` (that of the table) or a `row` (from 0);
every other numeric column is a score. A column's identity is the digest of the file, or the name the user gives its
scorer: then files of one scorer for several pools count as one indicator, as a rule needs that is applied elsewhere.

The other way round `scored_rows` finds the rows of the data that a table scores.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.hashing import digest_bytes
from im_lightning._utils.progress import log
from im_lightning.data.file_io import SUFFIXES, data_suffix, records
from im_lightning.data.loading import LoadedRow, Rejected, iter_rows
from im_lightning.data.score_table import PREDICTED, ScoreTable
from im_lightning.data.settings import Reading
from im_lightning.errors import DataError, RequestError, message

_NAME = re.compile(r"[A-Za-z_][\w.-]*\Z")
_NO_SCORES = ("id", "row", "source", PREDICTED)
_INDEX = "__index_level_"  # how pandas names the index that it writes into Parquet as a column
_ONE_PER_EXAMPLE = "give one record per example, with an id (the score table's) or a row (from 0), and numbers"
_RENAME = "rename it in the file, or name the columns to take (--external-columns, columns=)"

_KINDS = tuple(suffix for suffix in SUFFIXES if ".csv" not in suffix and ".tsv" not in suffix)  # those hold texts


@dataclass
class External:
    """What a file holds: per column n numbers (`values`), NaN where there is none.

    `origin` is what they depend on: {"scorer": name} or {"digest": of the file}. `keys` has the n ids or rows (`by`
    says which), and the position of each; `others` the columns that hold something else: where, and what.
    """

    path: Path
    origin: dict[str, str]
    by: str = ""
    keys: dict[Any, int] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def refuse_names(self, taken: Iterable[str]) -> None:
        """Refuses columns that the table has or will have; the RequestError names the first."""
        for name in taken:
            if name in self.values:
                raise RequestError(message(str(self.path), f"the score table has a column {name!r} already", _RENAME))

    def join(self, table: ScoreTable) -> ScoreTable:
        """The table with the file's columns; rows that the file does not have get NaN, with the reason.

        Raises:
            RequestError: the table has a column of that name. DataError: no record is of a row of the table.
        """
        self.refuse_names(table.values)
        place = table.id if self.by == "id" else table.row.tolist()
        at = np.array([self.keys.get(key, -1) for key in place], dtype=np.int64)
        if not (at >= 0).any():
            cause = f"none of its {len(self.keys):,} {self.by}s is one of the table's {len(table):,} rows"
            remedy = "take the ids from the table's column id, or number the rows of the data from 0 in a column row"
            raise DataError(message(str(self.path), cause, remedy))
        for name, column in self.values.items():
            given = np.array([*column, math.nan])[at]  # -1: the NaN at the end
            reasons = [_reason(v, i >= 0, self.path.name) for v, i in zip(given.tolist(), at.tolist(), strict=True)]
            identity = {"indicator": name, "version": 1, "external": {"column": name, **self.origin}}
            values = np.where(np.isfinite(given), given, np.nan)
            table = table.with_values(name, values, reasons, {"identity": identity, "numerics": {}})
        unused = len(self.keys) - len(set(at[at >= 0].tolist()))
        joined = f"{', '.join(self.names)} joined to {int((at >= 0).sum()):,} of {len(table):,} rows by {self.by}"
        parts = [f"{self.path}: {joined}"]
        parts += [f"{unused:,} of its records are of no row"] if unused else []
        parts += [f"not numeric and left out: {', '.join(self.others)}"] if self.others else []
        log("; ".join(parts))
        return table


def join_external(
    table: ScoreTable, path: str | os.PathLike[str], columns: Sequence[str] | None = None, scorer: str | None = None
) -> ScoreTable:
    """The table with the columns of a file that another tool wrote.

    Args:
        table: The table, N rows.
        path: The file: `.jsonl`, `.json` (either `.gz`, `.zst`) or `.parquet`.
        columns: Those to take; by default all numeric ones.
        scorer: Name and version of what computed them, such as "armorm-8b-v0.1"; by default the file's digest stands
            for it.

    Returns:
        A new table; rows that the file does not have get NaN, with the reason.

    Raises:
        RequestError: there is no such file or column, or the table has a column of that name.
        DataError: a record without id or row, twice the same one, a value that is no number, no example of the table.

    >>> from tempfile import TemporaryDirectory
    >>> table = ScoreTable([0, 1], ["a", "b"], ["", ""], {})
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "judged.jsonl")
    ...     _ = path.write_text('{"row": 1, "helpfulness": 3.5}')
    ...     join_external(table, path, scorer="judge-v1").values["helpfulness"].tolist()
    [nan, 3.5]
    """
    return read_external(path, columns, scorer).join(table)


def read_external(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, scorer: str | None = None
) -> External:
    """Reads and checks the file; see `join_external`."""
    file = Path(path).expanduser()
    suffix = data_suffix(file)
    if not file.is_file() or suffix not in _KINDS:
        cause = "there is no such file" if not file.is_file() else "its kind cannot be told from its name"
        raise RequestError(message(str(path), cause, f"name a file that ends in one of {', '.join(_KINDS)}"))
    origin = {"scorer": scorer} if scorer is not None else {"digest": digest_bytes(file.read_bytes())}
    found = External(file, origin)
    _read(found, None if columns is None else list(columns))
    absent = [name for name in columns or () if name not in found.values]
    if absent or not found.values:
        has = f"it has {', '.join(found.values)}" if found.values else "it has no column of numbers"
        cause = f"there is no {', '.join(absent)} ({has})" if absent else has
        raise RequestError(message(str(path), cause, _ONE_PER_EXAMPLE))
    for name in found.values:
        if _NAME.match(name) is None:
            raise RequestError(message(str(path), f"column {name!r} cannot be an indicator's name", _RENAME))
    return found


def _read(found: External, columns: list[str] | None) -> None:
    path = found.path
    for line, record, cause in records(path):
        place = f"{path}:{line}"
        if cause is None and not isinstance(record, dict):
            cause = f"is a {type(record).__name__} and no record"
        if cause is not None:
            raise DataError(message(place, cause, _ONE_PER_EXAMPLE))
        found.by = found.by or ("id" if "id" in record else "row")
        key = _key(record, found.by, place)
        numbers = _numbers(record, columns, found, place)
        first = found.keys.setdefault(key, len(found.lines))
        if first < len(found.lines):
            known = {name: column[first] for name, column in found.values.items() if len(column) > first}
            if found.by == "id" and all(
                _same(numbers.get(n, math.nan), known.get(n, math.nan)) for n in numbers | known
            ):
                continue  # the same example twice, with the same values
            cause = f"{found.by} {key!r} was there before, in line {found.lines[first]}, with other values"
            if found.by == "row":
                cause = f"row {key} was there before, in line {found.lines[first]}"
            raise DataError(message(place, cause, "keep one record per example"))
        for name, value in numbers.items():
            column = found.values.setdefault(name, [])
            column += [math.nan] * (len(found.lines) - len(column))
            column.append(value)
        found.lines.append(line)
    if not found.lines:
        raise DataError(message(str(path), "it holds no records", _ONE_PER_EXAMPLE))
    for column in found.values.values():
        column += [math.nan] * (len(found.lines) - len(column))


def _key(record: dict[str, Any], by: str, place: str) -> Any:
    key = record.get(by)
    if by == "id" and isinstance(key, str) and key:
        return key
    if by == "row" and isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if by not in record:
        cause = f"it has no {by}" if by == "id" else "it has neither id nor row"
    else:
        cause = f"its {by} is {key!r}, not {'a text' if by == 'id' else 'a whole number from 0'}"
    raise DataError(message(place, cause, _ONE_PER_EXAMPLE))


def _numbers(record: dict[str, Any], columns: list[str] | None, found: External, place: str) -> dict[str, float]:
    """The scores of a record by column; a column that is not numeric is noted, one that is and is not is refused."""
    numbers = {}
    for name in record if columns is None else [name for name in columns if name in record]:
        value = record[name]
        if name in _NO_SCORES or name.endswith("_reason") or name.startswith(_INDEX) or value is None:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                numbers[name] = float(value)
            except OverflowError:  # an integer that no float can hold
                numbers[name] = math.inf
        else:
            found.others.setdefault(name, f"{place} holds {_shown(value)}")
        if name in found.others and (name in numbers or name in found.values or columns is not None):
            cause = f"column {name!r} is to hold numbers, but {found.others[name]}"
            raise DataError(message(str(found.path), cause, "write numbers, or null where there is none"))
    return numbers


def _reason(value: float, there: bool, name: str) -> str | None:
    if math.isfinite(value):
        return None
    if not there:
        return f"not in {name}"
    return f"no value in {name}" if math.isnan(value) else f"not finite in {name}"


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def scored_rows(
    table: ScoreTable, data: Sequence[str], reading: Reading, rejected: list[Rejected], what: str
) -> Iterator[tuple[int, LoadedRow]]:
    """The rows that a table scores, in input order, each with its position in the table.

    Args:
        table: The table.
        data: The data it was scored from.
        reading: How their rows were read.
        rejected: Receives the rows set aside.
        what: Names table and data in a message.

    Raises:
        RequestError: the data are not those that were scored; names the first row that differs.
        DataError: a bad row.
    """
    remedy = (
        "pass the data that were scored, in the same order and with the same --format and --on-bad-row, or score them "
        "again: im-lightning score DATA --out scores.parquet"
    )
    position, count = {int(row): at for at, row in enumerate(table.row)}, 0
    for row, loaded in enumerate(iter_rows(data, rejected=rejected, refuses=table.refusal, **asdict(reading))):
        at, count = position.get(row), row + 1
        expected = "no such row" if at is None else table.id[at]
        if at is None or loaded.example.id != expected:
            cause = f"row {row} ({loaded.place}) has id {loaded.example.id}, the table has {expected}"
            raise RequestError(message(f"{what} do not belong together", cause, remedy))
        yield at, loaded
    if count != len(table):
        cause = f"the table has {len(table)} rows, the data {count}"
        raise RequestError(message(f"{what} do not belong together", cause, remedy))
