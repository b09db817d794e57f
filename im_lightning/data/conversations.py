"""A conversation in a row: its turns, their roles, what marks and structured fields they carry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from im_lightning.data.example import Example, Message

_ROLE = ("role", "from", "speaker")
_CONTENT = ("content", "value", "text")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bot", "model", "ai", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
}
_MARKS = ("weight", "train", "loss")
"""Fields of a turn that say whether it is trained: true or 1, false or 0; null is the default."""
_STRUCTURED = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
"""Fields of a turn that go to the chat template as they are."""


class BadRow(ValueError):
    """Why a row cannot become an example; readers add the file, the line and the remedy."""


def ending_with_response(turns: list[Message], source: str, tools: str = "") -> Example:
    if not turns:
        raise BadRow("no response: the conversation is empty")
    if turns[-1].role != "assistant":
        ending = (
            "has no assistant turn"
            if all(t.role != "assistant" for t in turns)
            else f"ends with a {turns[-1].role} turn"
        )
        raise BadRow(f"no response: the conversation {ending}")
    trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not trained:
        raise BadRow(f"no response: every answer is marked as not to be trained ({', '.join(_MARKS)})")
    return Example(tuple(turns[: trained[-1] + 1]), None, None, source, tools)


def turns_of(value: Any, field: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        raise BadRow(
            f"its field {field!r} is JSON text, not a list of turns; parse it (json.loads) where it is written"
        )
    if not isinstance(value, list):
        raise BadRow(f"its field {field!r} is not a list of turns but {kind_of(value)}")
    if value and all(isinstance(turn, str) for turn in value):  # LIMA: texts in turn, the user's first
        return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(value)]
    return [_turn(turn, i, field) for i, turn in enumerate(value, start=1)]


def _turn(turn: Any, number: int, field: str) -> Message:
    where = f"turn {number} of its field {field!r}"
    if not isinstance(turn, Mapping):
        raise BadRow(f"{where} is not an object but {kind_of(turn)}")
    said = first(turn, _ROLE)
    role = _ROLES.get(str(turn[said]).strip().lower()) if said is not None else None
    if role is None:
        shown = "no role" if said is None else f"the role {turn[said]!r}"
        raise BadRow(f"{where} has {shown}; known are {', '.join(_ROLES)}")
    held = first(turn, _CONTENT)
    more = {name: turn[name] for name in _STRUCTURED if not absent(turn.get(name)) and turn[name] != ""}
    if held is None and "tool_calls" not in more:
        raise BadRow(f"{where} has no text ({names_of(turn)})")
    content = "" if held is None else turn[held]
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"the text of {where} is not a string but {kind_of(content)}")
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], where)
    return Message(role, content, _trained(turn, role, where), canonical(more) if more else "")


def _trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """What the marks of a turn say; an assistant's turn without one is trained."""
    for name in _MARKS:
        value = turn.get(name)
        if absent(value):
            continue
        if value not in (0, 1):  # False and True too
            raise BadRow(f"{where} has the {name} {value!r}; a turn is trained (1, true) or not (0, false)")
        if role == "assistant":
            return bool(value)
        if value and name != "weight":
            raise BadRow(f"{where} is marked to be trained ({name}) and is not the assistant's")
    return True


def _calls(calls: Any, where: str) -> Any:
    """Tool calls with their arguments as objects: OpenAI writes them as JSON text, templates write JSON of them."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"the tool calls of {where} are not a list of objects but {kind_of(calls)}")
    out = []
    for call in calls:
        of = call.get("function")
        if isinstance(of, Mapping) and isinstance(of.get("arguments"), str):
            try:
                call = {**call, "function": {**of, "arguments": json.loads(of["arguments"])}}
            except ValueError as error:
                raise BadRow(f"the arguments of a tool call in {where} are not JSON ({error})") from error
        out.append(call)
    return out


def canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"{where} has a part that is not text")


def first(row: Mapping[str, Any], fields: Iterable[str]) -> str | None:
    for field in fields:
        if field in row and not absent(row[field]):
            return field
    return None


def absent(value: Any) -> bool:
    """Whether a field counts as absent: null, NaN, an empty list."""
    if isinstance(value, str):
        return False
    return value is None or value != value or value == []


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


def names_of(row: Mapping[str, Any]) -> str:
    """The fields of a row or turn, for a message."""
    names = [str(name) for name in row]
    return f"it has {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "it is empty"
