"""Content digests: one hash function and one canonical form for everything that is keyed by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest_bytes(*parts: bytes) -> str:
    """BLAKE2b-128 of the parts, each prefixed by its length, in hex (32 characters)."""
    if len(parts) == 1:  # the id of every example: one call instead of three
        return hashlib.blake2b(len(parts[0]).to_bytes(8, "little") + parts[0], digest_size=16).hexdigest()
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Digest of a file's content, read in parts."""
    with Path(path).open("rb") as stream:
        parts = iter(lambda: stream.read(1 << 24), b"")
        return digest_bytes(*(digest_bytes(part).encode() for part in parts))


def digest_json(value: Any) -> str:
    """Digest of a JSON-like value in canonical form (sorted keys, no spaces; lone surrogates survive)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
    return digest_bytes(text.encode("ascii"))


def digest_strings(strings: Iterable[str]) -> str:
    """Digest of an ordered sequence of strings without building the joined text."""
    h = hashlib.blake2b(digest_size=16)
    for s in strings:
        data = s.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()
