"""What a command may replace: a file that it wrote itself, of the same kind, and another one only when asked.

Each kind of file is recognised by what it holds; whoever names an output passes the function that recognises it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json
from im_lightning._utils.json_diff import differences
from im_lightning.errors import RequestError, message

_START = 1 << 16  # bytes within which a text or a picture says who made it


@dataclass(frozen=True)
class Replacing:
    """What may be replaced."""

    overwrite: bool = False
    """Replace what lies at --out even if this command did not write it."""

    def check(self, path: str | Path, kind: str, ours: Callable[[Path], bool]) -> None:
        """Refuses an output that would destroy something; before the work.

        Args:
            path: The file to be written.
            kind: What it will hold, for the message: "rule".
            ours: Whether a file holds such a thing as this package writes it; what it cannot read is none.

        Raises:
            RequestError: a folder, or a file with something else in it, lies there, and `overwrite` is not set.
        """
        path = Path(path)
        what = f"--out {path}"
        if path.is_dir():
            raise RequestError(message(what, "it is a folder", "name a file in it"))
        if self.overwrite or not path.exists() or not path.stat().st_size:
            return
        if not _is(ours, path):
            cause = f"this file exists, and is no {kind} as im-lightning wrote it"
            raise RequestError(message(what, cause, "name another file, or pass --overwrite to replace it"))

    def remove(self, path: str | Path, ours: Callable[[Path], bool]) -> None:
        """Removes what an earlier call wrote here and this one does not write; what is none of `ours` stays."""
        path = Path(path)
        if path.is_file() and _is(ours, path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is(ours: Callable[[Path], bool], path: Path) -> bool:
    try:
        return ours(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # torn, or not even of this file format
        return False


def json_with(*formats: str, keys: Collection[str] | None = None) -> Callable[[Path], bool]:
    """Recognises a JSON object by its `format`; an older one, that has none, by the keys that all of its kind have."""

    def ours(path: Path) -> bool:
        value = parse_json(path.read_bytes())
        return value["format"] in formats if "format" in value else keys is not None and set(keys) <= value.keys()

    return ours


def parquet_with(*columns: str) -> Callable[[Path], bool]:
    """Recognises a Parquet file by some of its columns."""

    def ours(path: Path) -> bool:
        import pyarrow.parquet as pq

        return set(columns) <= set(pq.read_schema(path).names)

    return ours


def starting_with(*marks: str) -> Callable[[Path], bool]:
    """Recognises a file by a text in its first 65,536 bytes, such as the name of the program that made it."""

    def ours(path: Path) -> bool:
        with path.open("rb") as stream:
            start = stream.read(_START)
        return any(mark.encode() in start for mark in marks)

    return ours


def settings_there(
    file: Path, kind: str, asked: dict[str, Any], scraps: Collection[Path] = (), ignore: frozenset[str] = frozenset()
) -> dict[str, Any] | None:
    """What the settings file of a folder says, if it is of the settings asked for; None where the folder is new.

    Args:
        file: The file: its `settings`, or all of it, are compared.
        kind: Of the folder, for the message: "demo".
        asked: The settings, JSON-like.
        scraps: What may lie in a new folder.
        ignore: Settings that may differ.

    Raises:
        RequestError: the folder holds something else, or a `kind` with other settings; says which.
    """
    folder, remedy = file.parent, "name another folder with --out"
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(scraps)):
            raise RequestError(message(str(folder), f"it exists and is not a folder of this {kind}", remedy))
        return None
    try:
        found = dict(parse_json(file.read_text(encoding="utf-8")))
        changed = differences(found.get("settings", found), asked, ignore)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(message(str(file), f"it is not readable ({error})", remedy)) from error
    if changed:
        texts = "; ".join(one.text("there", "asked for") for one in changed)
        cause = f"it holds a {kind} with other settings ({texts})"
        raise RequestError(message(str(folder), cause, f"{remedy}, or delete this one"))
    return found
