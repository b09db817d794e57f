"""Finds what `data` names: files, folders, Hugging Face data sets, rows in memory; each becomes a `Source`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.progress import log
from im_lightning.data.files import SUFFIXES, data_suffix, records, stem
from im_lightning.data.formats import detect_format
from im_lightning.data.streams import Record
from im_lightning.errors import RequestError, message

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<split>[\w.\-\[\]:%+]+))?")
_OTHER_FILES = (
    ".txt", ".csv", ".tsv", ".gz", ".zst", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xz",
    ".bz2", ".zip", ".tar", ".yaml", ".yml", ".md", ".html", ".xml", ".pkl", ".pt", ".npy", ".db", ".py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Something that yields records: its name for messages, its stem for `Example.source`."""

    name: str
    stem: str
    records: Callable[[], Iterator[Record]]


def find_sources(data: Any) -> list[Source]:
    """The sources that `data` names, in order; nothing is read yet, but every file is known to exist.

    Raises:
        RequestError: a name that is no file, folder or possible hub id; a folder without data; a wrong type.
    """
    if isinstance(data, str | os.PathLike):
        return _named(data)
    if isinstance(data, Mapping) and type(data).__module__.startswith("datasets."):
        cause, name = f"is a DatasetDict of {', '.join(map(str, data))}", next(iter(data), "train")
        raise RequestError(message("data", cause, f"pass one of its splits, such as data[{name!r}]"))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        what = "a single row" if isinstance(data, Mapping) else f"of type {type(data).__name__}"
        raise RequestError(
            message("data", f"is {what}", "pass a path, a Hugging Face id, or a list of paths or of rows")
        )
    items = data if hasattr(data, "__len__") else list(data)
    if not isinstance(next(iter(items), None), str | os.PathLike):
        return [Source("rows", "rows", lambda: _in_memory(items))]
    for item in items:
        if not isinstance(item, str | os.PathLike):
            cause = f"mixes paths with a {type(item).__name__}"
            raise RequestError(message("data", cause, "pass either paths or rows"))
    return [source for item in items for source in _named(item)]


def _in_memory(rows: Iterable[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield number, dict(row) if isinstance(row, Mapping) else row, None


def _named(name: str | os.PathLike[str]) -> list[Source]:
    path = Path(name).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a text in place of a name: longer than a name may be
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise RequestError(message(shown, f"cannot be looked up: {error.strerror}", "pass a path or rows")) from error
    if is_folder:
        return _folder(path)
    if exists:
        if data_suffix(path) is None:
            remedy = f"rename it, or convert it to one of {', '.join(SUFFIXES)}"
            raise RequestError(message(str(path), "its kind cannot be told from its name", remedy))
        return [_file(path)]
    match = _HUB_ID.fullmatch(name) if isinstance(name, str) else None
    if match is None or _looks_like_a_path(match["id"]):
        remedy = "check the name; a Hugging Face data set is written org/name or org/name:split"
        raise RequestError(message(str(path), "there is no such file or folder", remedy))
    hub_id, split = match["id"], match["split"]
    return [Source(str(name), hub_id.split("/")[1], lambda: _hub(hub_id, split))]


def _looks_like_a_path(name: str) -> bool:
    return name.lower().endswith(_OTHER_FILES) or Path(name).parts[0] in (".", "..") or Path(name).parent.is_dir()


def _file(path: Path) -> Source:
    return Source(str(path), stem(path), lambda: records(path))


def _folder(folder: Path) -> list[Source]:
    """All data files beneath a folder, sorted by path; hidden ones and rejected rows of earlier calls are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or data_suffix(path) is None or path.name.endswith(".rejected.jsonl") or not path.is_file():
            continue
        if _describes_others(path):
            log(f"{path}: left out, it holds one object that is no row (name the file itself to insist)")
            continue
        found.append(_file(path))
    if not found:
        remedy = f"put files there that end in one of {', '.join(SUFFIXES)}, or name another folder"
        raise RequestError(message(str(folder), "the folder has no data files", remedy))
    return found


def _describes_others(path: Path) -> bool:
    """Whether a `.json` file is about the data (a manifest, `dataset_info.json`) and not data: one object, no row."""
    if path.suffix.lower() != ".json":
        return False
    reader = records(path)
    first, second = next(reader, None), next(reader, None)
    return (
        first is not None
        and second is None
        and first[2] is None
        and isinstance(first[1], Mapping)
        and detect_format(first[1]) is None
    )


def _hub(name: str, split: str | None) -> Iterator[Record]:
    rows = _load_hub(name, split)
    for number, row in enumerate(rows, start=1):
        yield number, row, None


def _load_hub(name: str, split: str | None) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds: offline, unknown name or split, gated, bad files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        whole = f"{name}:{split}" if split else name
        cause = (
            f"there is no such file, and the Hugging Face data set cannot be loaded ({type(error).__name__}: {reason})"
        )
        remedy = "check the name, the split and the network, or download the files and name them"
        raise RequestError(message(whole, cause, remedy)) from error
    if split is not None or not isinstance(found, Mapping):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    if "train" in found:
        return found["train"]
    splits = ", ".join(map(str, found))
    raise RequestError(
        message(name, f"it has several splits ({splits}) and none is called train", f"name one: {name}:SPLIT")
    )
