"""Reads the records of one file: JSON Lines, a JSON array, Parquet, plain or compressed, always as a stream.

A record is (line, value, cause): the parsed value and None, or the raw text and why it could not be parsed. Only a
file of which nothing at all can be read raises.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from im_lightning.errors import DataError, RequestError, message

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
Record = tuple[int, Any, str | None]

_CHUNK = 1 << 18
_SEPARATOR = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


def data_suffix(path: Path) -> str | None:
    """The suffix of `path` if it is one that can be read (".jsonl.gz" counts as one), else None."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s) and len(name) > len(s)), None)


def stem(path: Path) -> str:
    """The name of `path` without its data suffix."""
    suffix = data_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


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
        cause = _not_json(error)
    yield number, line.decode("utf-8", "backslashreplace"), cause


def _not_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not readable JSON (nested too deeply)"
    if isinstance(error, json.JSONDecodeError):
        cut = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        kind = "truncated JSON" if cut else "not valid JSON"
        return f"{kind} ({error.msg} at character {error.colno})"
    return f"not readable JSON ({error})"


def _json_document(path: Path) -> Iterator[Record]:
    """A `.json` file: an array of rows; or, as many are, one object per line; or a single object."""
    for chunk in ByteStream(path):
        start = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
        if start[:1] == b"[":
            yield from _Array(path).records()
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


class _Array:
    """Takes a JSON array apart element by element, with a window of text that grows only as one element needs."""

    def __init__(self, path: Path) -> None:
        self.stream = ByteStream(path)
        self.chunks = iter(self.stream)
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def records(self) -> Iterator[Record]:
        self._fill()
        self._skip(re.compile("\ufeff?"))
        self._skip(_SPACE)
        self.at += 1  # the opening bracket
        decode = json.JSONDecoder().raw_decode
        while True:
            between = self._skip(_SEPARATOR)
            if self.at == len(self.text):
                yield self.line, "", self.stream.torn or "truncated JSON: the file ends before the array does"
                return
            if self.text[self.at] == "]":
                self.at += 1
                self._skip(_SPACE)
                if self.at < len(self.text):
                    yield self.line, self.text[self.at :], "text after the end of the array"
                return
            start, line = self.at, self.line
            value, cause = self._element(decode)
            if cause is None:
                raw = self.text[start : self.at]
                if not raw.isascii() and _ESCAPED_BYTE.search(raw):
                    cause, value = "broken UTF-8 in this row", _shown(raw)
            else:
                value = _shown(self._give_up(between))
                if self.ended and self.at == len(self.text):
                    cause = self.stream.torn or f"{cause}; the rest of the array, from here on, is lost"
            yield line, value, cause

    def _element(self, decode: Any) -> tuple[Any, str | None]:
        while True:
            try:
                value, end = decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if not self.ended and _may_go_on(error, len(self.text)):
                    self._fill()
                    continue
                return None, _not_json(error)
            if end == len(self.text) and not self.ended:  # a number may go on
                self._fill()
                continue
            self._move(end)
            return value, None

    def _give_up(self, between: str) -> str:
        """Goes to the next element that starts a line the way this one did (a valid string holds no newline)."""
        newline, indent = between.rfind("\n"), ""
        if newline >= 0:
            indent = between[newline + 1 :]
        pattern, start = "\n" + indent + "{", self.at + 1
        while newline >= 0:
            found = self.text.find(pattern, start)
            if found >= 0:
                raw = self.text[self.at : found]
                self._move(found)
                return raw
            if self.ended:
                break
            start = max(0, len(self.text) - self.at - len(pattern))  # _fill drops what lies before `at`
            self._fill()
        while not self.ended:
            self._fill()
        raw = self.text[self.at :]
        self._move(len(self.text))
        return raw

    def _skip(self, pattern: re.Pattern[str]) -> str:
        while True:
            match = pattern.match(self.text, self.at)
            end = match.end() if match else self.at
            if end < len(self.text) or self.ended:
                break
            self._fill()
        between = self.text[self.at : end]
        self._move(end)
        return between

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _fill(self) -> None:
        """Drops what was read and at least doubles the rest, so that long elements cost no more than linear time."""
        parts = [self.text[self.at :]]
        wanted = max(len(parts[0]), 1)
        while wanted > 0 and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            parts.append(self.decoder.decode(chunk or b"", final=self.ended))
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0


def _may_go_on(error: Exception, length: int) -> bool:
    """Whether an error of the decoder may be due to the window's end (no literal or escape is longer than 16)."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated") or error.pos >= length - 16
    )


def _shown(raw: str) -> str:
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").rstrip().rstrip(",")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
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
    except (pa.ArrowException, OSError) as error:
        if number:
            yield (
                number + 1,
                "",
                f"the Parquet file breaks off here ({str(error).splitlines()[0]}); rows after it are lost",
            )
            return
        cause = f"is not a readable Parquet file ({str(error).splitlines()[0]})"
        raise DataError(message(str(path), cause, "make the file anew, or give it the suffix of what it is")) from error


def _rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    try:
        yield from ((row, None) for row in batch.to_pylist())
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0], None
        except UnicodeDecodeError:
            yield "", "broken UTF-8 in this row"
