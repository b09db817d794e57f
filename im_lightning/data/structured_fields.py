"""Fields of a row that are more than a text: several answers, tool calls, tools; and why a row cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from im_lightning.data.file_io import Source
from im_lightning.data.json_array import Record


class BadRow(ValueError):
    """Why a row cannot become an example; readers add the file, the line and the remedy."""


def each_answer(source: Source, names: Iterable[str]) -> Source:
    """The source with a row whose response is a list of texts (of SQuAD, texts beside their places) once per text."""
    names = tuple(names)

    def records() -> Iterator[Record]:
        for line, row, cause in source.records():
            fields = [name for name in names if isinstance(row, Mapping) and _texts(row.get(name))]
            if fields:
                yield from ((line, {**row, fields[0]: text}, cause) for text in _texts(row[fields[0]]))
            else:
                yield line, row, cause

    return Source(source.name, source.stem, records)


def _texts(value: Any) -> list[str]:
    """The different texts of a list of such, else none."""
    texts = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    return list(dict.fromkeys(texts))


def calls_of(calls: Any, where: str) -> Any:
    """Tool calls with their arguments as objects: OpenAI writes them as JSON text, templates write JSON of them."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"the tool calls of {where} are not a list of objects but {kind_of(calls)}")
    out = []
    for call in calls:
        of = call.get("function")
        if isinstance(of, Mapping) and isinstance(of.get("arguments"), str):
            try:
                call = {**call, "function": {**of, "arguments": json.loads(of["arguments"])}}
            except (ValueError, RecursionError) as error:
                raise BadRow(f"the arguments of a tool call in {where} are not JSON ({error})") from error
        out.append(call)
    return out


def tools_of(value: Any) -> str:
    """Tools as a JSON array, or ""; some sets keep them as JSON text already."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else []
        except (ValueError, RecursionError) as error:
            raise BadRow(f"its field 'tools' is not JSON ({error})") from error
    if not isinstance(value, list):
        raise BadRow(f"its field 'tools' is not a list but {kind_of(value)}")
    return canonical(value) if value else ""


def canonical(value: Any) -> str:
    """A value as JSON text, equal for equal values."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"its tools or tool calls cannot be written as JSON ({error})") from error


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
