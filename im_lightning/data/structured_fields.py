"""Fields of a row that are more than a text (several answers, tool calls, HTML), and why a row cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from im_lightning._utils.optional import require
from im_lightning.data.file_io import Source
from im_lightning.data.json_array import Record


class BadRow(ValueError):
    """Why a row cannot become an example; readers add the file, the line and the remedy."""


def each_answer(source: Source, field_of: Callable[[Any], str | None]) -> Source:
    """The source with a row whose response is a list of texts (of SQuAD, texts beside their places) once per text.

    Args:
        source: The source.
        field_of: The field that the response of a row is taken from, or None.
    """

    def records() -> Iterator[Record]:
        for line, row, cause in source.records():
            field = field_of(row) if cause is None else None
            if field is not None and (texts := _texts(row[field])):
                yield from ((line, {**row, field: text}, cause) for text in texts)
            else:
                yield line, row, cause

    return Source(source.name, source.stem, records)


def has_text(value: Any) -> bool:
    """Whether there is text in a value, however deep."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str) and one.strip():
            return True
        left += one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
    return False


def names_of(row: Mapping[str, Any]) -> str:
    """The fields of a row or turn, for a message."""
    names = [str(name) for name in row]
    return f"it has {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "it is empty"


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
        call = _with_arguments(call, where)  # without a function in between, as templates take it, too
        if isinstance(call.get("function"), Mapping):
            call = {**call, "function": _with_arguments(call["function"], where)}
        out.append(call)
    return out


def _with_arguments(of: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if not isinstance(of.get("arguments"), str):
        return of
    try:
        return {**of, "arguments": json.loads(of["arguments"])}
    except (ValueError, RecursionError) as error:
        raise BadRow(f"the arguments of a tool call in {where} are not JSON ({error})") from error


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


def markdown(html: str) -> str:
    """HTML as Markdown: lists and code keep their form, links and pictures only their text.

    Raises:
        RequestError: markdownify, which reads it, is not installed.
    """
    convert = require("markdownify", "sources", "the set stackexchange, whose texts are HTML,").markdownify
    options = {"escape_asterisks": False, "escape_underscores": False, "escape_misc": False, "bullets": "-"}
    return convert(html, strip=["a", "img"], heading_style="ATX", **options).strip()
