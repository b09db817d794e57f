"""Atomic files: a reader sees the old content or the new, never a part. And what JSON files hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning.errors import InstructMiningError, message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCRATCH_BYTES = 1 << 28
LEFT_SECONDS = 86_400.0  # no writer takes so long over a file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` if the block succeeds, else removes it.

    Raises:
        InstructMiningError: the folder cannot be written (read-only, full, gone); names the file.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
        os.close(handle)
        Path(name).chmod(0o666 & ~umask())
    except OSError as error:
        raise InstructMiningError(_cannot_write(final, error)) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:  # bytes reach the disk before the name does
            os.fsync(stream.fileno())
        temporary.replace(final)
    except OSError as error:
        raise InstructMiningError(_cannot_write(final, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed writers left in a folder: those of `atomic_path`, older than a day."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process removed it, or the folder cannot be written
            if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                path.unlink()


def scratch_array(shape: tuple[int, ...], folder: str | os.PathLike[str]) -> NDArray[np.float32]:
    """A float32 array of undefined content; above 256 MiB in a file in `folder` that vanishes with it.

    Raises:
        InstructMiningError: the folder cannot be written, or has no room.
    """
    import numpy as np

    size = 4 * math.prod(shape)
    if size <= SCRATCH_BYTES:
        return np.empty(shape, dtype=np.float32)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".scratch-", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is found out now, not by a crash while writing
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=np.float32, mode="r+" if hasattr(os, "posix_fallocate") else "w+", shape=shape)
    except OSError as error:
        raise InstructMiningError(_cannot_write(Path(folder) / "scratch", error)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically. Lone surrogates, which UTF-8 cannot hold, are refused by Python."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON-like value atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`; text nested too deeply is a ValueError like any other that is not JSON of ours, and an integer
    that no float can hold is infinite, so that whoever asks for a finite number refuses it."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 308 else float(digits))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def looks_like(path: str | os.PathLike[str]) -> str:
    """What a file seems to be where something else was wanted, ": it seems to be rows of data"; nothing if unknown."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(4096)
    except OSError:
        return ""
    form = re.search(rb'"format": "im_lightning[ .](\w+)"', head)
    if head.startswith(b"PAR1"):
        kind = "Parquet, such as a score table"
    elif form or b'"run_id"' in head:
        kind = f"a {form[1].decode()} of im-lightning" if form else "the record of a run"
    elif head.startswith(b"# Designed runs"):
        kind = "a sweep file"
    elif set(Path(path).suffixes) & {".json", ".jsonl", ".csv", ".tsv"}:
        kind = "rows of data"
    else:
        return ""
    return f": it seems to be {kind}"


def plain(value: Any) -> Any:
    """The value in plain JSON types: arrays as lists, NaN and ±inf as null, a path or dtype as its text.

    A run may have taken hours: an odd value in its description must not be what loses it.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def umask() -> int:
    """The process's file mode mask."""
    current = os.umask(0)
    os.umask(current)
    return current


def _cannot_write(path: Path, error: OSError) -> str:
    cause = os.strerror(error.errno) if error.errno else str(error)  # Arrow wraps the system's own words
    return message(str(path), f"cannot be written: {cause}", "free some space or choose a writable folder")
