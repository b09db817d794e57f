"""Turns a row of a known format into an `Example`: alpaca, sharegpt, OpenAI messages, prompt and response.

Formats are told apart by the fields of each row, so a file may mix them. Where a row could be read in two ways, the
order is: a list of turns, then an instruction with a response, then any prompt with any response. A field that is
null counts as absent, since columnar files fill the fields of other formats with nulls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from im_lightning.data.example import Example, Message
from im_lightning.errors import RequestError, message

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt-response")

_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_INPUT = ("input", "context", "question", "query")
_ALPACA_RESPONSE = ("output", "response", "completion", "answer", "target")
_PROMPT = ("prompt", "question", "query", "problem", "input", "inputs", "user", "human")
_RESPONSE = ("response", "completion", "answer", "output", "solution", "target", "targets", "assistant", "gpt", "bot")
_SYSTEM = ("system", "system_prompt")
_ROLE = ("role", "from", "speaker")
_CONTENT = ("content", "value", "text")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bot", "model", "ai", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
}


class BadRow(ValueError):
    """Why a row cannot become an example; readers add the file, the line and the remedy."""


def check_format(name: str) -> str:
    """Returns `name` if it is a format.

    Raises:
        RequestError: it is not; names those that are.
    """
    if name not in FORMATS:
        raise RequestError(message(f"format {name!r}", "there is no such format", f"use one of {', '.join(FORMATS)}"))
    return name


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format of a row by its fields, or None if it has those of no format.

    >>> detect_format({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    'sharegpt'
    """
    field = _first(row, _TURNS)
    if field is not None and not isinstance(row[field], str):
        turns = row[field]
        openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]
        return "messages" if openai or (field == "messages" and not _has_from(turns)) else "sharegpt"
    if row.get("instruction") is not None and _first(row, _ALPACA_RESPONSE) is not None:
        return "alpaca"
    if _pair(row) is not None:
        return "prompt-response"
    if "instruction" in row:  # close enough to say what is missing
        return "alpaca"
    return None


def convert(row: Any, format: str = "auto", source: str = "") -> Example:
    """The example that a row holds.

    Args:
        row: A parsed JSON value; only an object can be a row.
        format: One of `FORMATS`.
        source: Where the row comes from, unless it says so itself in a field `source`.

    Raises:
        BadRow: not an object, no response, or a field of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is not an object but {_kind(row)}")
    own = row.get("source")
    if isinstance(own, str) and own:
        source = own
    name = detect_format(row) if format == "auto" else format
    if name == "alpaca":
        return _alpaca(row, source)
    if name in ("sharegpt", "messages"):
        return _conversation(row, source)
    if name == "prompt-response":
        return _prompt_response(row, source)
    raise BadRow(f"no response: its fields are those of no known format ({_fields(row)})")


def _alpaca(row: Mapping[str, Any], source: str) -> Example:
    instruction = _text(row, "instruction", "no instruction")
    field = _first(row, _ALPACA_RESPONSE)
    if field is None:
        raise BadRow(f"no response: none of the fields {', '.join(_ALPACA_RESPONSE)} has one ({_fields(row)})")
    response = _text(row, field)
    extra = _first(row, _INPUT)
    text = "" if extra is None else _text(row, extra)
    user = f"{instruction}\n{text}" if text else instruction
    turns = [*_system(row), *_past(row), Message("user", user), Message("assistant", response)]
    return Example(tuple(turns), instruction, text, source)


def _past(row: Mapping[str, Any]) -> Iterable[Message]:
    """Earlier turns of an Alpaca row: `history`, a list of [instruction, response]."""
    past = row.get("history")
    if not past:
        return
    if not isinstance(past, list):
        raise BadRow(f"its field 'history' is not a list but {_kind(past)}")
    for pair in past:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("its field 'history' is not a list of [instruction, response] pairs of texts")
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])


def _conversation(row: Mapping[str, Any], source: str) -> Example:
    field = _first(row, _TURNS)
    if field is None:
        raise BadRow(f"no response: none of the fields {', '.join(_TURNS)} has a conversation ({_fields(row)})")
    turns = _turns(row[field], field)
    if turns and turns[0].role != "system":
        turns = [*_system(row), *turns]
    return _ending_with_response(turns, source)


def _prompt_response(row: Mapping[str, Any], source: str) -> Example:
    pair = _pair(row)
    if pair is None:
        wanted = f"{', '.join(_PROMPT)} with one of {', '.join(_RESPONSE)}"
        raise BadRow(f"no response: it has none of the fields {wanted} ({_fields(row)})")
    prompt, response = pair
    turns: list[Message] = []
    for field, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(row[field], list):  # TRL writes both as lists of messages
            turns += _turns(row[field], field)
        else:
            turns.append(Message(role, _text(row, field)))
    if turns and turns[0].role != "system":
        turns = [*_system(row), *turns]
    return _ending_with_response(turns, source)


def _ending_with_response(turns: list[Message], source: str) -> Example:
    if not turns:
        raise BadRow("no response: the conversation is empty")
    if turns[-1].role != "assistant":
        ending = (
            "has no assistant turn"
            if all(t.role != "assistant" for t in turns)
            else f"ends with a {turns[-1].role} turn"
        )
        raise BadRow(f"no response: the conversation {ending}")
    return Example(tuple(turns), None, None, source)


def _turns(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow(f"its field {field!r} is not a list of turns but {_kind(value)}")
    if value and all(isinstance(turn, str) for turn in value):  # LIMA: texts in turn, the user's first
        return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(value)]
    return [_turn(turn, i, field) for i, turn in enumerate(value, start=1)]


def _turn(turn: Any, number: int, field: str) -> Message:
    where = f"turn {number} of its field {field!r}"
    if not isinstance(turn, Mapping):
        raise BadRow(f"{where} is not an object but {_kind(turn)}")
    said = _first(turn, _ROLE)
    role = _ROLES.get(str(turn[said]).strip().lower()) if said is not None else None
    if role is None:
        shown = "no role" if said is None else f"the role {turn[said]!r}"
        raise BadRow(f"{where} has {shown}; known are {', '.join(_ROLES)}")
    held = _first(turn, _CONTENT)
    if held is None:
        raise BadRow(f"{where} has no text ({_fields(turn)})")
    content = turn[held]
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"the text of {where} is not a string but {_kind(content)}")
    return Message(role, content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"{where} has a part that is not text")


def _system(row: Mapping[str, Any]) -> list[Message]:
    field = _first(row, _SYSTEM)
    text = "" if field is None else _text(row, field)
    return [Message("system", text)] if text else []


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    prompt, response = _first(row, _PROMPT), _first(row, _RESPONSE)
    return None if prompt is None or response is None else (prompt, response)


def _first(row: Mapping[str, Any], fields: Iterable[str]) -> str | None:
    for field in fields:
        if row.get(field) is not None:
            return field
    return None


def _text(row: Mapping[str, Any], field: str, absent: str = "no response") -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow(f"{absent}: its field {field!r} is {'null' if field in row else 'absent'} ({_fields(row)})")
    raise BadRow(f"its field {field!r} is not a string but {_kind(value)}")


def _has_from(turns: Any) -> bool:
    return isinstance(turns, list) and any(isinstance(turn, Mapping) and "from" in turn for turn in turns)


def _fields(row: Mapping[str, Any]) -> str:
    names = [str(name) for name in row]
    return f"it has {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "it is empty"


def _kind(value: Any) -> str:
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
