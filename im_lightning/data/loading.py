"""`load_examples`: rows from files, folders, Hugging Face data sets or lists of dicts, as validated `Example`s.

What `data` names becomes a list of `Source`s first. A bad row stops the reading, or is set aside, with file and cause.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from im_lightning._utils.files import atomic_path
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.file_io import SUFFIXES, Source, check_rows_path, compressed, file_source, records
from im_lightning.data.formats import ANSWERS, COLUMNS, FORMATS, BadRow, answered_in, convert, detect_format
from im_lightning.data.hf import load_hub, written_rows
from im_lightning.data.json_array import Record
from im_lightning.data.structured_fields import each_answer
from im_lightning.errors import DataError, RequestError, message

_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<config>[\w.+-]+)(?=:))?(?::(?P<split>[\w.\-\[\]:%+]+))?"
)
_OTHER_FILE = re.compile(
    r".*\.(txt|csv|tsv|gz|zst|json|jsonl|ndjson|parquet|arrow|feather|xz|bz2|zip|tar|yaml|yml|md|html|xml|pkl|pt|npy|db|py)",
    re.IGNORECASE,
)


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
    if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
        return [Source("rows", "rows", lambda: _in_memory(data.to_dict("records")))]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        what = "a single row" if isinstance(data, Mapping) else f"of type {type(data).__name__}"
        raise RequestError(
            message("data", f"is {what}", "pass a path, a Hugging Face id, or a list of paths or of rows")
        )
    items = data if hasattr(data, "__len__") else list(written_rows(data))
    if isinstance(next(iter(items), None), Source):
        return list(items)
    if not isinstance(next(iter(items), None), str | os.PathLike):
        return [Source("rows", "rows", lambda: _in_memory(items))]
    for item in items:
        if not isinstance(item, str | os.PathLike):
            cause = f"mixes paths with a {type(item).__name__}"
            raise RequestError(message("data", cause, "pass either paths or rows"))
    return [source for item in items for source in _named(item)]


def _in_memory(rows: Iterable[Any]) -> Iterator[Record]:
    for number, row in enumerate(written_rows(rows), start=1):
        try:
            yield number, _plain(row), None
        except RecursionError:
            yield number, str(type(row).__name__), "it is nested too deeply"


def _plain(value: Any) -> Any:
    """A value as JSON would have it: pandas hands out arrays for lists, and its own kinds of missing values."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):  # a numpy array or scalar
        return _plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _named(name: str | os.PathLike[str]) -> list[Source]:
    path = Path(name).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a text in place of a name: longer than a name may be
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise RequestError(message(shown, f"cannot be looked up: {error.strerror}", "pass a path or rows")) from error
    if not exists and isinstance(name, str):
        from im_lightning.data.sources import published

        if (of := published(name)) is not None:
            return of.sources(_named(of.where))
    if is_folder:
        return _folder(path)
    if exists:
        source = file_source(path)
        if source is None:
            remedy = f"rename it, or convert it to one of {', '.join(SUFFIXES)}"
            raise RequestError(message(str(path), "its kind cannot be told from its name", remedy))
        return [source]
    match = _HUB_ID.fullmatch(name) if isinstance(name, str) else None
    if match is None or _looks_like_a_path(match["id"]) or _looks_like_a_path(str(name).partition(":")[0]):
        remedy = "check the name; a Hugging Face data set is written org/name, org/name:split or org/name/config:split"
        raise RequestError(message(str(path), "there is no such file or folder", remedy))
    hub_id, config, split = match.groups()
    return [Source(str(name), hub_id.split("/")[1], lambda: _in_memory(load_hub(hub_id, config, split)))]


def _looks_like_a_path(name: str) -> bool:
    return _OTHER_FILE.fullmatch(name) is not None or Path(name).parts[0] in (".", "..") or Path(name).parent.is_dir()


def _folder(folder: Path) -> list[Source]:
    """All data files beneath a folder, sorted by path; hidden ones and rejected rows of earlier calls are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        source = None if hidden or path.name.endswith(".rejected.jsonl") else file_source(path)
        if not hidden and path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise RequestError(message(str(path), "the folder cannot be read", "check its permissions"))
        if not hidden and path.is_symlink() and path.is_dir():
            log(f"{path}: left out, it is a link to a folder (name it beside the folder, too)")
        elif source is not None and path.is_file() and not _describes_others(path):
            found.append(source)
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
    if first is None or second is not None or first[2] is not None:
        return False
    if not isinstance(first[1], Mapping) or detect_format(first[1]) is not None:
        return False
    log(f"{path}: left out, it holds one object that is no row (name the file itself to insist)")
    return True


ON_BAD_ROW = ("error", "quarantine")
_NAMED = 10
_BATCH = 1000  # rows that are read and converted before it is asked which are refused
_REMEDY = "mend the row, or set bad rows aside with --on-bad-row quarantine (a fit or recipe: data.on_bad_row)"

Refuses = Callable[[Example], str | None]
"""Why an example cannot be used, or None: `Template.refusal`, `ScoreTable.refusal`."""

Data = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Mapping[str, Any]] | Iterable[Source]


class LoadedRow(NamedTuple):
    """An accepted row: as it was read, as an example, and where it was ("file:line")."""

    raw: dict[str, Any]
    example: Example
    place: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row set aside. `raw` is the parsed row, or its text where it could not be parsed; `line` counts from 1.

    `id` is the example's where there was one, and something (the template) refused it; it is not written.
    """

    file: str
    line: int
    cause: str
    raw: Any
    id: str = ""
    fields: ClassVar = ("file", "line", "cause", "raw")

    @property
    def text(self) -> str:
        """Where and why: `pool.jsonl:3: no response`."""
        return f"{self.file}:{self.line}: {self.cause}"

    def as_row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.fields}


def note_rejected(data: Data, rejected: Sequence[Rejected], into: str = "") -> None:
    """Logs how many rows of the data were set aside (`into` a file), and where and why the first was."""
    if rejected:
        where = f" in {into}" if into else ""
        what = "1 bad row" if len(rejected) == 1 else f"{len(rejected):,} bad rows"
        log(f"{_name(data)}: {what} set aside{where}, the first {rejected[0].text}")


def no_rows(data: Data, rejected: Sequence[Rejected]) -> DataError:
    """The error of data that hold no row, or none that can be used, with the first cause."""
    cause = "it holds no rows"
    if rejected:
        cause = f"none of its {len(rejected):,} rows can be used; the first: {rejected[0].text}"
    return DataError(message(_name(data), cause, "choose data with instructions and responses"))


def check_format(name: str) -> str:
    """Returns `name` if it is a format.

    Raises:
        RequestError: it is not; names those that are.
    """
    if name not in FORMATS:
        raise RequestError(message(f"format {name!r}", "there is no such format", f"use one of {', '.join(FORMATS)}"))
    return name


def check_answer(name: str) -> str:
    """Returns `name` if it says what to do with several responses.

    Raises:
        RequestError: it does not; names what does.
    """
    if name not in ANSWERS:
        raise RequestError(message(f"answer {name!r}", "is not known", f"use one of {', '.join(ANSWERS)}"))
    return name


def check_columns(columns: Mapping[str, str] | str | None) -> dict[str, str]:
    """What each field is named: {"prompt": "question"}, or the same as text, "prompt=question,response=answer".

    Raises:
        RequestError: not of that form, or a name that is none of `COLUMNS`.
    """
    if isinstance(columns, str):
        parts = [part.partition("=") for part in columns.split(",")]
        if not all(name.strip() and equals and field.strip() for name, equals, field in parts):
            remedy = "write NAME=FIELD,…, such as prompt=question,context=passage,response=answer"
            raise RequestError(message(f"columns {columns!r}", "is not a list of names and fields", remedy))
        columns = {name.strip(): field.strip() for name, _, field in parts}
    unknown = [name for name in columns or () if name not in COLUMNS]
    if unknown:
        cause, remedy = f"there is no column {', '.join(unknown)}", f"name some of {', '.join(COLUMNS)}"
        raise RequestError(message("columns", cause, remedy))
    return dict(columns or {})


def load_examples(
    data: Data,
    format: str = "auto",
    on_bad_row: str = "error",
    rejected: list[Rejected] | None = None,
    columns: Mapping[str, str] | str | None = None,
    answer: str = "error",
    refuses: Refuses | None = None,
) -> list[Example]:
    """Reads all examples; the position in the list is what tables and samplers call `row`.

    Args:
        data: A file (`.json`, `.jsonl`, `.csv`, `.tsv`, also `.gz` or `.zst`; `.parquet`), a folder of such (by name,
            subfolders too), a Hugging Face id "org/name", "org/name:split" or "org/name/config:split", a
            published set ("dolly@FILE"), several of these, rows as dicts, a `datasets.Dataset` or `pandas.DataFrame`.
        format: "auto" (by each row's fields), "alpaca", "sharegpt", "messages" or "prompt-response".
        on_bad_row: "error" names the first bad row and the places of the others; "quarantine" sets them aside.
        rejected: Receives the rows set aside; where it is not given, their number and the first of them are logged.
        columns: Which field holds what, such as {"prompt": "question", "context": "passage", "response": "answer"};
            the other fields are then left aside. By default known names are looked for.
        answer: Of several responses: "error" refuses the row, "first" takes the first of a list, "all" makes each an
            example, "chosen" takes the one preferred of a pair.
        refuses: Why an example cannot be used, or None; such a row is a bad row. A template's `refusal` finds the rows
            that the template cannot render before anything is done with them.

    Fields that hold text of which nothing is used are named once per source, with their share of the rows.

    Raises:
        RequestError: `data` names nothing that can be read, or an argument is unknown.
        DataError: bad rows, an unreadable file, or no rows at all.

    >>> load_examples([{"instruction": "Add 2 and 2.", "output": "4"}])[0].response
    '4'
    """
    aside = [] if rejected is None else rejected
    before = len(aside)
    examples = [row.example for row in iter_rows(data, format, on_bad_row, aside, columns, answer, refuses)]
    if not examples:
        raise no_rows(data, aside[before:])
    if aside and rejected is None:
        note_rejected(data, aside)
    return examples


def iter_rows(
    data: Data,
    format: str = "auto",
    on_bad_row: str = "error",
    rejected: list[Rejected] | None = None,
    columns: Mapping[str, str] | str | None = None,
    answer: str = "error",
    refuses: Refuses | None = None,
) -> Iterator[LoadedRow]:
    """Like `load_examples`, one row at a time and with each row's raw content and place; may yield nothing."""
    check_format(format)
    if on_bad_row not in ON_BAD_ROW:
        raise RequestError(message(f"on_bad_row {on_bad_row!r}", "is not known", f"use one of {', '.join(ON_BAD_ROW)}"))
    taken, answer = check_columns(columns), check_answer(answer)
    bad = [] if rejected is None or on_bad_row == "error" else rejected
    sources = find_sources(data)
    if answer == "all":
        sources = [each_answer(source, lambda row: answered_in(row, format, taken)) for source in sources]
    rows = (row for source in sources for row in _rows(source, format, taken, answer, refuses, bad))
    return rows if on_bad_row == "quarantine" else _all_good(rows, bad)


def _all_good(rows: Iterator[LoadedRow], bad: list[Rejected]) -> Iterator[LoadedRow]:
    """The rows; after the last one, the bad ones among them as one error."""
    yield from rows
    if bad:
        first, *others = bad
        cause = first.cause
        if others:
            places = [f"{one.file}:{one.line}" for one in others]
            what = "1 more bad row" if len(others) == 1 else f"{len(others):,} more bad rows"
            cause += f"; {what}: {', '.join(places[:_NAMED])}{', …' * (len(others) > _NAMED)}"
        remedy = f"use another --template, or {_REMEDY}" if first.id else _REMEDY
        raise DataError(message(f"{first.file}:{first.line}", cause, remedy))


def _rows(
    source: Source, format: str, columns: Mapping[str, str], answer: str, refuses: Refuses | None, bad: list[Rejected]
) -> Iterator[LoadedRow]:
    examples = _converted(source, format, columns, answer)
    while batch := list(islice(examples, _BATCH)):
        for line, value, found in batch:
            cause = found if isinstance(found, str) else refuses(found) if refuses is not None else None
            if cause is None and not isinstance(found, str):
                yield LoadedRow(value, found, f"{source.name}:{line}")
            else:
                bad.append(Rejected(source.name, line, cause or "", value, "" if isinstance(found, str) else found.id))


def _converted(
    source: Source, format: str, columns: Mapping[str, str], answer: str
) -> Iterator[tuple[int, Any, Example | str]]:
    """(line, row, its example or why there is none); says at the end which fields were not used."""
    stem, unused, count = sys.intern(source.stem), Counter[str](), 0
    for line, value, cause in source.records():
        if cause is not None:
            yield line, value, cause
            continue
        try:
            example = convert(value, format, stem, columns, answer, unused)
        except BadRow as error:
            yield line, value, str(error)
            continue
        count += 1
        yield line, value, example
    if unused:
        shares = ", ".join(f"{field} ({rows / count:.0%} of rows)" for field, rows in unused.most_common())
        log(f"{source.name}: not used: {shares}; --columns (columns=) names the fields that are")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any] | Rejected]) -> int:
    """Writes rows atomically as JSON Lines, or as an array if `path` ends in `.json`; compressed if in `.gz`, `.zst`.

    Returns:
        The number of rows.

    Raises:
        RequestError: `path` has none of these suffixes; `check_rows_path` says so before the work.
        InstructMiningError: it cannot be written.
    """
    suffix, count = check_rows_path(path), 0
    array = not suffix.startswith(".jsonl")
    with atomic_path(path) as temporary, compressed(temporary, suffix) as stream:
        stream.write(b"[\n" if array else b"")
        for row in rows:
            text = _dump(row.as_row() if isinstance(row, Rejected) else row)
            stream.write((b",\n" if array and count else b"") + text + (b"" if array else b"\n"))
            count += 1
        stream.write(b"\n]\n" if array else b"")
    return count


def _dump(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate survives only as an escape
        return json.dumps(row, ensure_ascii=True, default=str).encode("ascii")


def _name(data: Data) -> str:
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if hasattr(data, "columns") or not isinstance(next(iter(data), None), str | os.PathLike | Source):
        return "rows"
    names = [os.fspath(one) if isinstance(one, str | os.PathLike) else getattr(one, "name", "rows") for one in data]
    return ", ".join(dict.fromkeys(names))
