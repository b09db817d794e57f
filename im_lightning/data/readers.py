"""`load_examples`: rows from files, folders, Hugging Face data sets or lists of dicts, as checked `Example`s.

A bad row stops the reading with its file, line and cause, or (`on_bad_row="quarantine"`) is set aside with them.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from im_lightning._utils.files import atomic_path
from im_lightning.data.example import Example
from im_lightning.data.formats import BadRow, check_format, convert
from im_lightning.data.sources import Source, find_sources
from im_lightning.errors import DataError, RequestError, message

ON_BAD_ROW = ("error", "quarantine")
_REMEDY = "mend the row, or set bad rows aside with --on-bad-row quarantine (a fit or recipe: data.on_bad_row)"

Data = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Mapping[str, Any]]


class LoadedRow(NamedTuple):
    """An accepted row: as it was read, as an example, and where it was ("file:line")."""

    raw: dict[str, Any]
    example: Example
    place: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row set aside. `raw` is the parsed row, or its text where it could not be parsed; `line` counts from 1."""

    file: str
    line: int
    cause: str
    raw: Any

    def as_row(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "cause": self.cause, "raw": self.raw}


def load_examples(
    data: Data, format: str = "auto", on_bad_row: str = "error", rejected: list[Rejected] | None = None
) -> list[Example]:
    """Reads all examples; the position in the list is what tables and samplers call `row`.

    Args:
        data: A file (`.json`, `.jsonl`, either `.gz` or `.zst`, `.parquet`), a folder of such files (read in order of
            their names, subfolders too), a Hugging Face id "org/name" or "org/name:split", several of these, rows as
            dicts, or a `datasets.Dataset`.
        format: "auto" (told by each row's fields), "alpaca", "sharegpt", "messages" or "prompt-response".
        on_bad_row: "error" stops at the first bad row; "quarantine" sets bad rows aside.
        rejected: Receives the rows set aside.

    Raises:
        RequestError: `data` names nothing that can be read, or an argument is unknown.
        DataError: a bad row, an unreadable file, or no rows at all.

    >>> load_examples([{"instruction": "Add 2 and 2.", "output": "4"}])[0].response
    '4'
    """
    aside = [] if rejected is None else rejected
    before = len(aside)
    examples = [row.example for row in iter_rows(data, format, on_bad_row, aside)]
    if not examples:
        bad = aside[before:]
        cause = "it holds no rows"
        if bad:
            cause = f"none of its {len(bad)} rows can be used; the first: {bad[0].file}:{bad[0].line}: {bad[0].cause}"
        raise DataError(message(_name(data), cause, "choose data with instructions and responses"))
    return examples


def iter_rows(
    data: Data, format: str = "auto", on_bad_row: str = "error", rejected: list[Rejected] | None = None
) -> Iterator[LoadedRow]:
    """Like `load_examples`, one row at a time and with each row's raw content and place; may yield nothing."""
    check_format(format)
    if on_bad_row not in ON_BAD_ROW:
        raise RequestError(message(f"on_bad_row {on_bad_row!r}", "is not known", f"use one of {', '.join(ON_BAD_ROW)}"))
    return _rows(find_sources(data), format, on_bad_row == "quarantine", [] if rejected is None else rejected)


def _rows(sources: list[Source], format: str, quarantine: bool, rejected: list[Rejected]) -> Iterator[LoadedRow]:
    for source in sources:
        stem = sys.intern(source.stem)
        for line, value, cause in source.records():
            if cause is None:
                try:
                    example = convert(value, format, stem)
                except BadRow as error:
                    cause = str(error)
                else:
                    yield LoadedRow(value, example, f"{source.name}:{line}")
                    continue
            if not quarantine:
                raise DataError(message(f"{source.name}:{line}", cause, _REMEDY))
            rejected.append(Rejected(source.name, line, cause, value))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any] | Rejected]) -> int:
    """Writes rows atomically as JSON Lines, or as an array if `path` ends in `.json`; compressed if in `.gz`, `.zst`.

    Returns:
        The number of rows.

    Raises:
        RequestError: `path` has none of these suffixes.
        InstructMiningError: it cannot be written.
    """
    name = Path(path).name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if not plain.endswith((".jsonl", ".json")):
        raise RequestError(
            message(str(path), "rows are written as JSON", "end the name in .jsonl, .json, .jsonl.gz or .jsonl.zst")
        )
    array, count = plain.endswith(".json"), 0
    with atomic_path(path) as temporary, _compressed(temporary, name) as stream:
        stream.write(b"[\n" if array else b"")
        for row in rows:
            text = _dump(row.as_row() if isinstance(row, Rejected) else row)
            stream.write((b",\n" if array and count else b"") + text + (b"" if array else b"\n"))
            count += 1
        stream.write(b"\n]\n" if array else b"")
    return count


@contextmanager
def _compressed(path: Path, name: str) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if name.endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:  # equal rows, equal bytes
                yield cast(IO[bytes], stream)
        elif name.endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield file


def _dump(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate survives only as an escape
        return json.dumps(row, ensure_ascii=True, default=str).encode("ascii")


def _name(data: Data) -> str:
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    names = [os.fspath(item) if isinstance(item, str | os.PathLike) else "rows" for item in data]
    return ", ".join(dict.fromkeys(names)) or "rows"
