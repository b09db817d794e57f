"""Bytes of a data file as a stream, decompressed on the way; one that ends early says so instead of just ending."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from im_lightning.errors import DataError, RequestError, message

Record = tuple[int, Any, str | None]  # line, parsed value (or raw text), why it could not be parsed (or None)

_CHUNK = 1 << 18


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
