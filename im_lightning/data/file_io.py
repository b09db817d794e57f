"""Reads the records of one file: JSON Lines, a JSON array, Parquet, plain or compressed, always as a stream.

Bytes are decompressed on the way; a stream that ends early says so instead of just ending.

A record is (line, value, cause): the parsed value and None, or the raw text and why it could not be parsed. Only a
file of which nothing at all can be read raises.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning.data.json_array import JsonArray, Record, not_json
from im_lightning.errors import DataError, RequestError, message

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Source:
    """Something that yields records: its name for messages, its stem for `Example.source`."""

    name: str
    stem: str
    records: Callable[[], Iterator[Record]]


def file_source(path: Path) -> Source | None:
    """The records of a file, or None if its name does not end in one of `SUFFIXES`."""
    suffix = data_suffix(path)
    return None if suffix is None else Source(str(path), path.name[: -len(suffix)], lambda: records(path))


def data_suffix(path: Path) -> str | None:
    """The suffix of `path` if it is one that can be read (".jsonl.gz" counts as one), else None."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s) and len(name) > len(s)), None)


def records(path: Path) -> Iterator[Record]:
    """The records of a file, in order; line numbers (for Parquet: row numbers) count from 1.

    Raises:
        RequestError: the file is missing, unreadable for this user, or of an unknown kind.
        DataError: nothing in it can be read (not gzip, not Zstandard, not Parquet).
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise RequestError(message(str(path), "its kind is not known", f"use one of {', '.join(SUFFIXES)}"))
    if suffix == ".parquet":
        return _parquet(path)
    return _json_lines(path) if suffix.startswith(".jsonl") else _json_document(path)


def _json_lines(path: Path) -> Iterator[Record]:
    stream = ByteStream(path)
    number, pieces = 0, []
    for chunk in stream:
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield from _line(number := number + 1, b"".join(pieces))
            for line in rest[:-1]:
                yield from _line(number := number + 1, line)
            pieces = [rest[-1]]
    last = b"".join(pieces)
    if stream.torn:
        yield number + 1, last.decode("utf-8", "backslashreplace"), stream.torn
    else:
        yield from _line(number + 1, last)


def _line(number: int, line: bytes) -> Iterator[Record]:
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not line or line.isspace():
        return
    try:
        yield number, json.loads(line.decode("utf-8")), None
        return
    except UnicodeDecodeError as error:
        cause = f"broken UTF-8 at byte {error.start + 1} of the line"
    except (ValueError, RecursionError) as error:
        cause = not_json(error)
    yield number, line.decode("utf-8", "backslashreplace"), cause


def _json_document(path: Path) -> Iterator[Record]:
    """A `.json` file: an array of rows; or, as many are, one object per line; or a single object."""
    for chunk in ByteStream(path):
        start = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
        if start[:1] == b"[":
            yield from JsonArray(ByteStream(path)).records()
            return
        if start:
            break
    first = next(_json_lines(path), None)
    if first is not None and first[2] is not None:
        stream = ByteStream(path)
        text = b"".join(stream)
        try:
            yield first[0], json.loads(text.decode("utf-8-sig")), None
            return
        except (ValueError, RecursionError):
            pass  # neither an array nor one object: reported line by line
    yield from _json_lines(path)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value, cause in _rows(batch):
                    number += 1
                    yield number, value, cause
    except FileNotFoundError as error:
        raise RequestError(message(str(path), "there is no such file", "check the name")) from error
    except Exception as error:  # Arrow's kinds, and UnicodeDecodeError for a broken schema
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if number:
            yield number + 1, "", f"the Parquet file breaks off here ({said}); rows after it are lost"
            return
        cause, remedy = (
            f"is not a readable Parquet file ({said})",
            "make the file anew, or give it the suffix of what it is",
        )
        raise DataError(message(str(path), cause, remedy)) from error


def _rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        pass
    else:
        yield from ((row, None) for row in rows)
        return
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0], None
        except UnicodeDecodeError:
            yield "", "broken UTF-8 in this row"


class ByteStream:
    """The decompressed bytes of a file in chunks; `torn` says why they ended early, or is None."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn: str | None = None

    def __iter__(self) -> Iterator[bytes]:
        suffix = self.path.suffix.lower()
        some = False
        try:
            with self.path.open("rb") as file:
                blocks = iter(lambda: file.read(_CHUNK), b"")
                for chunk in _decompress(blocks, suffix) if suffix in (".gz", ".zst") else blocks:
                    some = True
                    yield chunk
        except OSError as error:
            raise RequestError(
                message(
                    str(self.path), f"cannot be read: {error.strerror or error}", "check the name and its permissions"
                )
            ) from error
        except _Torn as error:
            kind = "gzip" if suffix == ".gz" else "Zstandard"
            if not some:
                cause = f"is not a readable {kind} file ({error})"
                remedy = "make the file anew, or give it the suffix of what it is"
                raise DataError(message(str(self.path), cause, remedy)) from error
            self.torn = f"the {kind} stream breaks off here ({error}); rows after it are lost"


class _Torn(Exception):
    """A compressed stream that ends early or is no such stream."""


def _decompress(blocks: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    """Decompresses members or frames, one after another; unlike stream readers it notices a cut-off end."""
    import zstandard

    def fresh() -> Any:
        if suffix == ".gz":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    current, begun = fresh(), False
    try:
        for block in blocks:
            while block:
                if current.eof:
                    block = block.lstrip(b"\0")  # padding after a gzip member
                    if not block:
                        break
                    current = fresh()
                begun = True
                chunk = current.decompress(block)
                block = current.unused_data if current.eof else b""
                if chunk:
                    yield chunk
    except (zlib.error, zstandard.ZstdError) as error:
        raise _Torn(str(error)) from error
    if not current.eof:
        raise _Torn("it ends early" if begun else "it is empty")
