"""Reads the records of one file: JSON Lines, a JSON array, CSV, Parquet, plain or compressed, always as a stream; and
opens one for rows that are written.

Bytes are decompressed on the way; a stream that ends early says so instead of just ending.

A record is (line, value, cause): the parsed value and None, or the raw text and why it could not be parsed. Only a
file of which nothing at all can be read raises.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from im_lightning.data.json_array import JsonArray, Record, broken, legible, not_json
from im_lightning.errors import DataError, RequestError, message

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{kind}{packed}" for packed in (".gz", ".zst") for kind in _TEXT), ".parquet")
_LONGEST_FIELD = 2**31 - 1  # bytes; the csv module's own limit of 128 KiB is less than a long response
_CHUNK = 1 << 18
_SAVE_AS_UTF8 = "save the file as UTF-8 (Excel: CSV UTF-8) if it is in another encoding, such as Windows-1252"


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


def check_rows_path(path: str | os.PathLike[str]) -> str:
    """Returns the suffix of a file of rows that is to be written; commands ask before the work that makes the rows.

    Raises:
        RequestError: it is not one of `.jsonl` and `.json`, plain or with `.gz` or `.zst`.
    """
    suffix = data_suffix(Path(path)) or ""
    if not suffix.startswith(".json"):
        remedy = "end the name in .jsonl, .json, .jsonl.gz or .jsonl.zst"
        raise RequestError(message(str(path), "rows are written as JSON", remedy))
    return suffix


def rows_with(*keys: Collection[str]) -> Callable[[Path], bool]:
    """Recognises a file of rows, plain or compressed, by the keys of its first row; one without rows holds nothing."""

    def ours(path: Path) -> bool:
        return all(cause is None and set(row) in map(set, keys) for _, row, cause in islice(records(path), 1))

    return ours


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
    if suffix.startswith((".csv", ".tsv")):
        return _separated(path, "," if suffix.startswith(".csv") else "\t")
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


def _separated(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows of a table of texts by its header; every value stays the text that it is ("007" too)."""
    stream = ByteStream(path)
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        if broken("".join(header)):
            cause = f"its header is not UTF-8 ({legible(delimiter.join(header))})"
            raise DataError(message(f"{path}:1", cause, _SAVE_AS_UTF8))
        if len(set(header)) < len(header):
            cause = f"its header names a column twice ({', '.join(header)})"
            raise DataError(message(f"{path}:1", cause, "give each column a name of its own"))
        begins = reader.line_num + 1
        for fields in reader:
            text = delimiter.join(fields)
            if broken(text):
                yield begins, legible(text), f"broken UTF-8 in this row; {_SAVE_AS_UTF8}"
            elif len(fields) == len(header):
                yield begins, dict(zip(header, fields, strict=True)), None
            elif fields:
                yield begins, text, f"it has {len(fields)} fields where the header has {len(header)}"
            begins = reader.line_num + 1
    except csv.Error as error:
        kind = "CSV" if delimiter == "," else "TSV"
        if not stream.torn:
            yield begins, "", f"not a row of a {kind} file ({error}); rows after it are lost"
    if stream.torn:
        yield begins, "", stream.torn


def _lines(stream: ByteStream) -> Iterator[str]:
    """Lines as they stand, with their ends: a quoted field may hold some. What a torn stream began is no line."""
    decoder, held = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape"), ""
    for chunk in stream:
        *whole, held = (held + decoder.decode(chunk)).split("\n")  # not splitlines: U+2028 ends no row
        yield from (f"{line}\n" for line in whole)
    held += decoder.decode(b"", final=True)
    if held and not stream.torn:
        yield held


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            coded = decoders(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for value, cause in _rows(batch):
                    number += 1
                    yield number, *(_decoded(value, coded) if coded and cause is None else (value, cause))
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


def decoders(schema: Any, json_texts: bool = True) -> dict[str, Callable[[Any], Any]]:
    """For the columns of an Arrow schema that need it, what makes of a value the one that was written.

    Arrow gives every object of a column the fields of all of them, null where it has none: these are left out, at
    whatever depth. And `datasets` writes values of mixed kinds (a content that is a text here and a list of parts
    there) as texts of the extension type "arrow.json"; to Arrow they stay texts, with quotation marks around every
    string. They are decoded, unless `json_texts` is False: for rows of which `datasets` has done so.
    """
    return {one.name: decode for one in schema if (decode := _decoder(one.type, json_texts)) is not None}


def decode_row(row: Mapping[str, Any], by: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The row as it was written, by the `decoders` of its columns."""
    return {name: by[name](value) if name in by else value for name, value in row.items()}


def _decoder(kind: Any, json_texts: bool) -> Callable[[Any], Any] | None:
    """For an Arrow type; None where its values are as they were written."""
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return (lambda value: None if value is None else json.loads(value)) if json_texts else None
    if pa.types.is_struct(kind):
        inner = decoders(kind, json_texts)
        return lambda value: decode_row(_without_nulls(value), inner) if isinstance(value, dict) else value
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        each = _decoder(kind.value_type, json_texts)
        return None if each is None else (lambda value: [each(v) for v in value] if isinstance(value, list) else value)
    return None


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in value.items() if one is not None}


def _decoded(row: dict[str, Any], by: Mapping[str, Callable[[Any], Any]]) -> tuple[Any, str | None]:
    try:
        return decode_row(row, by), None
    except (ValueError, RecursionError) as error:
        return row, f"a column of JSON texts holds one that is none ({not_json(error)})"


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


@contextmanager
def compressed(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """A file to write bytes into, which are compressed as the suffix says."""
    with path.open("wb") as file:
        if suffix.endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:  # equal rows, equal bytes
                yield cast(IO[bytes], stream)
        elif suffix.endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield file
