"""Takes a JSON array apart element by element, as a stream, with line numbers, and goes on after a broken element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

Record = tuple[int, Any, str | None]  # line, parsed value (or raw text), why it could not be parsed (or None)

_SEPARATOR = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
_MARK = re.compile("\ufeff?")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


class Chunks(Protocol):
    """A text's bytes in chunks; `torn` says why they ended early, or is None."""

    torn: str | None

    def __iter__(self) -> Iterator[bytes]: ...


class JsonArray:
    """The elements of an array, read through a window of text that grows only as one element needs."""

    def __init__(self, stream: Chunks) -> None:
        self.stream, self.chunks = stream, iter(stream)
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def records(self) -> Iterator[Record]:
        self._fill()
        self._skip(_MARK)
        self._skip(_SPACE)
        self.at += 1  # the opening bracket
        decode = json.JSONDecoder().raw_decode
        commas: int | None = 0
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
            known, commas = commas, 1
            if cause is None:
                raw = self.text[start : self.at]
                if broken(raw):
                    cause, value = "broken UTF-8 in this row", _shown(raw)
                elif known is not None and between.count(",") != known:  # damaged around it, perhaps a row between
                    cause = f"not valid JSON ({between.count(',')} commas before this row instead of {known})"
                    value = _shown(raw)
            else:
                value, commas = _shown(self._give_up(between)), None
                if self.ended and self.at == len(self.text):
                    yield line, value, self.stream.torn or f"{cause}; the rest of the array, from here on, is lost"
                    return
            yield line, value, cause

    def _element(self, decode: Any) -> tuple[Any, str | None]:
        while True:
            try:
                value, end = decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if not self.ended and _may_go_on(error, len(self.text)):
                    self._fill()
                    continue
                return None, not_json(error)
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
    return legible(raw).rstrip().rstrip(",")


def broken(raw: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` has bytes that are not UTF-8."""
    return not raw.isascii() and _ESCAPED_BYTE.search(raw) is not None


def legible(raw: str) -> str:
    r"""Such a text with those bytes written out, as in Caf\xe9."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def not_json(error: Exception) -> str:
    """Why the decoder gave up."""
    if isinstance(error, RecursionError):
        return "not readable JSON (nested too deeply)"
    if isinstance(error, json.JSONDecodeError):
        cut = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        kind = "truncated JSON" if cut else "not valid JSON"
        return f"{kind} ({error.msg} at character {error.colno})"
    return f"not readable JSON ({error})"
