"""Turns a row of a known format into an `Example`: alpaca, sharegpt, OpenAI messages, prompt and response.

Formats are told apart by the fields of each row, so a file may mix them. Where a row could be read in two ways, the
order is: a list of turns, then an instruction with a response, then any prompt with any response. A field that is
null, NaN or an empty list counts as absent, since columnar files fill the fields of other formats with those.

Beside its instruction or prompt a row may hold more of it (a context, a passage, a hint): such companions join the
prompt, a line each. Text in any other field is not used, and `convert` says in which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from im_lightning.data.example import Example, Message
from im_lightning.data.structured_fields import BadRow, calls_of, canonical, has_text, kind_of, names_of, tools_of

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt-response")

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_COMPANIONS = ("input", "context", "passage", "hint")
_INPUT = (*_COMPANIONS, "question", "query")  # beside an instruction
_SEVERAL = ("answers", "responses", "completions", "outputs")
_ALPACA_RESPONSE = ("output", "response", "completion", "answer", "target", *_SEVERAL)
_PROMPT = ("prompt", "question", "query", "problem", "input", "inputs", "user", "human")
RESPONSES = (
    "response",
    "completion",
    "answer",
    "output",
    "solution",
    "target",
    "targets",
    "assistant",
    "gpt",
    "bot",
    *_SEVERAL,
)
_SYSTEM = ("system", "system_prompt")
_ABOUT = frozenset(("id", "row_id", "uid", "uuid", "hash", "source"))
"""Fields about a row rather than of it."""
COLUMNS = ("prompt", "response", "context", "system", "messages", "instruction", "input", "history", "tools", "source")
"""What `columns` may name a field for."""
ANSWERS = ("error", "first", "chosen", "all")
"""What to do where a row holds several responses."""
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
_STRUCTURED = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Fields of a turn that go to the chat template as they are; a tool's turn has `_OF_A_TOOL` too."""
_OF_A_TOOL = ("name", "tool_call_id")


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format of a row by its fields, or None if it has those of no format.

    >>> detect_format({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    'sharegpt'
    """
    field = first(row, TURNS)
    if field is not None and not isinstance(row[field], str):
        turns = row[field]
        openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]
        return "messages" if openai or (field == "messages" and not _has_from(turns)) else "sharegpt"
    if first(row, ("instruction",)) and first(row, (*_ALPACA_RESPONSE, "chosen")):
        return "alpaca"
    if (first(row, _PROMPT) and first(row, (*RESPONSES, "chosen"))) or _are_turns(row.get("chosen")):
        return "prompt-response"
    if "instruction" in row:  # close enough to say what is missing
        return "alpaca"
    if field is not None and row[field].lstrip()[:1] in ("[", "{"):  # JSON text; likewise
        return "messages"
    return None


def convert(
    row: Any,
    format: str = "auto",
    source: str = "",
    columns: Mapping[str, str] | None = None,
    answer: str = "error",
    unused: Counter[str] | None = None,
) -> Example:
    """The example that a row holds.

    Args:
        row: A parsed JSON value; only an object can be a row.
        format: One of `FORMATS`.
        source: Where the row comes from, unless it says so itself in a field `source`.
        columns: Name of `COLUMNS` → the field that holds it; beside a source's, others are left aside.
        answer: One of `ANSWERS`: what to do where the row holds several responses.
        unused: Counts the fields that hold text of which nothing was used.

    Raises:
        BadRow: not an object, no response, or a field of the wrong type.

    >>> convert({"question": "How many?", "context": "A table of pumps.", "answer": "Four."}).prompt
    'How many?\\nA table of pumps.'
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is not an object but {kind_of(row)}")
    origin = (columns or {}).get("source", "source")
    own = row.get(origin)
    if columns and "source" in columns and isinstance(own, int | float) and not absent(own):  # clusters have numbers
        own = str(int(own) if isinstance(own, float) and own.is_integer() else own)
    source = own if isinstance(own, str) and own else source
    columns = {name: field for name, field in (columns or {}).items() if name != "source"}
    fields = _Fields({name: row.get(field) for name, field in columns.items()} if columns else row, answer)
    name = detect_format(fields.row) if format == "auto" else format
    convert_as = _CONVERTERS.get(name or "")
    if convert_as is None:
        empty = any(row.get(field) == [] for field in TURNS)
        if columns and (lacking := [field for field in columns.values() if field not in row]):
            raise BadRow(f"no response: it lacks {', '.join(lacking)}, which --columns names ({names_of(row)})")
        why = fields.no_response("the conversation is empty" if empty else "its fields are those of no known format")
        named = "" if columns or empty or len(row) < 2 else "; --columns prompt=…,response=… (columns=) names others"
        raise BadRow(why + named)
    example = convert_as(fields, source)
    if unused is not None:
        used = {columns[name] for name in fields.used} if columns else fields.used
        for field in row.keys() - used - _ABOUT - {origin}:
            if has_text(row[field]):
                unused[field] += 1
    return example


def answered_in(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> str | None:
    """The field whose answer `convert` takes; None for a row of turns, or one without an answer."""
    if not isinstance(row, Mapping):
        return None
    named = {name: field for name, field in (columns or {}).items() if name != "source"}
    seen: Mapping[str, Any] = {name: row.get(field) for name, field in named.items()} if named else row
    of = (detect_format(seen) or "") if format == "auto" else format
    found = first(seen, {"alpaca": _ALPACA_RESPONSE, "prompt-response": RESPONSES}.get(of, ()))
    return named[found] if named and found else found


class _Fields:
    """The fields of a row; remembers which were used.

    Args:
        row: The row.
        answer: What to do with several responses.
    """

    def __init__(self, row: Mapping[str, Any], answer: str = "error") -> None:
        self.row, self.answer = row, answer
        self.used: set[str] = set()

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these fields that the row has."""
        return first(self.row, names)

    def text(self, name: str, lacking: str = "no response") -> str:
        """A field's text."""
        value = self.row.get(name)
        self.used.add(name)
        if isinstance(value, str):
            return value
        if absent(value):
            raise BadRow(f"{lacking}: its field {name!r} is {'null' if name in self.row else 'absent'} ({self})")
        raise BadRow(f"its field {name!r} is not a string but {kind_of(value)}")

    def response(self, names: Iterable[str]) -> str | None:
        """The first field that has a response; "chosen" too where that was asked for."""
        return self.first(("chosen", *names) if self.answer == "chosen" else names)

    def response_text(self, name: str) -> str:
        """The text of a response, or the first of several where that was asked for."""
        value = self.row[name]
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # SQuAD: texts beside their places
            value = value["text"]
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            self.used.add(name)
            if self.answer != "first":
                many = "one text" if len(value) == 1 else f"{len(value)} texts"
                raise BadRow(
                    f"its field {name!r} is a list of {many} where one is wanted; --answer first takes the first"
                )
            return value[0]
        return self.text(name)

    def companions(self, names: Iterable[str], beside: str) -> str:
        """The texts that belong to the prompt, a line each, every text once."""
        here = [name for name in names if name in self.row and name != beside]
        texts = [self.text(name) for name in here if not absent(self.row[name])]
        return "\n".join(dict.fromkeys(text for text in texts if text))

    def system(self) -> list[Message]:
        """The system turn, if the row has one."""
        name = self.first(_SYSTEM)
        text = "" if name is None else self.text(name)
        return [Message("system", text)] if text else []

    def tools(self) -> str:
        """The tools that the row offers, as a JSON array, or ""."""
        if absent(self.row.get("tools")):
            return ""
        self.used.add("tools")
        return tools_of(self.row["tools"])

    def no_response(self, why: str) -> str:
        """Why a row without a response cannot be used; a pair of preferences says so."""
        pair = [name for name in ("chosen", "rejected") if not absent(self.row.get(name))]
        if pair and self.answer != "chosen":
            return f"several responses ({', '.join(pair)}) where one is wanted; --answer chosen takes the one preferred"
        return f"no response: {why} ({self})"

    def __str__(self) -> str:
        return names_of(self.row)


def _alpaca(fields: _Fields, source: str) -> Example:
    instruction = fields.text("instruction", "no instruction")
    field = fields.response(_ALPACA_RESPONSE)
    if field is None:
        raise BadRow(fields.no_response(f"none of the fields {', '.join(_ALPACA_RESPONSE)} has one"))
    response = fields.response_text(field)
    text = fields.companions(_INPUT, field)
    turns = [*fields.system(), *_past(fields), _user(instruction, text), Message("assistant", response)]
    return Example(tuple(turns), instruction, text, source, fields.tools())


def _user(instruction: str, text: str) -> Message:
    """The user's turn; an instruction or an input that is empty has no line."""
    return Message("user", "\n".join(part for part in (instruction, text) if part))


def _past(fields: _Fields) -> Iterable[Message]:
    """Earlier turns of an Alpaca row: `history`, a list of [instruction, response]."""
    past = fields.row.get("history")
    if not past or absent(past):
        return
    fields.used.add("history")
    if not isinstance(past, list):
        raise BadRow(f"its field 'history' is not a list but {kind_of(past)}")
    for pair in past:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("its field 'history' is not a list of [instruction, response] pairs of texts")
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])


def _conversation(fields: _Fields, source: str) -> Example:
    field = fields.first(TURNS)
    if field is None:
        raise BadRow(fields.no_response(f"none of the fields {', '.join(TURNS)} has a conversation"))
    return _of_turns(_turns_in(fields.row[field], field), fields, field, source)


def _of_turns(turns: list[Message], fields: _Fields, field: str, source: str) -> Example:
    fields.used.add(field)
    if turns and turns[0].role != "system":
        turns = [*fields.system(), *turns]
    return _ending_with_response(turns, source, fields.tools())


def _prompt_response(fields: _Fields, source: str) -> Example:
    answered = fields.response(RESPONSES)
    asked = fields.first(_PROMPT)
    if answered is not None and _are_turns(fields.row[answered]):  # TRL writes turns; those chosen may be all of them
        last = _turns_in(fields.row[answered], answered)
        if asked is None or any(turn.role == "user" for turn in last):
            before = _turns_in(fields.row[asked], asked) if asked and _are_turns(fields.row[asked]) else []
            k = max(k for k in range(len(before) + 1) if before[len(before) - k :] == last[:k])  # turns that both have
            if asked and (k or any(str(fields.row[asked]).strip() in turn.content for turn in last)):
                fields.used.add(asked)
            return _of_turns([*before[: len(before) - k], *last] if k else last, fields, answered, source)
    if asked is None or answered is None:
        wanted = f"{', '.join(_PROMPT)} with one of {', '.join(RESPONSES)}"
        raise BadRow(fields.no_response(f"it has none of the fields {wanted}"))
    prompt = fields.row[asked]
    if not _are_turns(prompt) and not _are_turns(fields.row[answered]):
        question, text = fields.text(asked), fields.companions(_COMPANIONS, asked)
        turns = [*fields.system(), _user(question, text), Message("assistant", fields.response_text(answered))]
        return Example(tuple(turns), question if text else None, text or None, source, fields.tools())
    turns = _turns_in(prompt, asked) if _are_turns(prompt) else [Message("user", fields.text(asked))]
    fields.used.add(asked)
    if _are_turns(fields.row[answered]):
        turns += _turns_in(fields.row[answered], answered)
    else:
        turns.append(Message("assistant", fields.response_text(answered)))
    return _of_turns(turns, fields, answered, source)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value)


_CONVERTERS: dict[str, Callable[[_Fields, str], Example]] = {
    "alpaca": _alpaca,
    "sharegpt": _conversation,
    "messages": _conversation,
    "prompt-response": _prompt_response,
}


def _ending_with_response(turns: list[Message], source: str, tools: str = "") -> Example:
    """The example of a conversation, up to the last answer that is trained."""
    if not turns:
        raise BadRow("no response: the conversation is empty")
    if turns[-1].role != "assistant":
        none = all(turn.role != "assistant" for turn in turns)
        ending = "has no assistant turn" if none else f"ends with a {turns[-1].role} turn"
        raise BadRow(f"no response: the conversation {ending}")
    trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not trained:
        raise BadRow(f"no response: every answer is marked as not to be trained ({', '.join(_MARKS)})")
    return Example(tuple(turns[: trained[-1] + 1]), None, None, source, tools)


def _turns_in(value: Any, field: str) -> list[Message]:
    """The turns that a field holds: objects with a role and a text, or texts in turn."""
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
    names = (*_STRUCTURED, *_OF_A_TOOL) if role == "tool" else _STRUCTURED
    more = {name: turn[name] for name in names if not absent(turn.get(name)) and turn[name] != ""}
    if not absent(turn.get("function_call")):  # what OpenAI wrote before there could be several
        more["tool_calls"] = [{"type": "function", "function": turn["function_call"]}]
    if held is None and "tool_calls" not in more:
        raise BadRow(f"{where} has no text ({names_of(turn)})")
    content = "" if held is None else turn[held]
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"the text of {where} is not a string but {kind_of(content)}")
    if "tool_calls" in more:
        more["tool_calls"] = calls_of(more["tool_calls"], where)
    return Message(role, content, _trained(turn, role, where), canonical(more) if more else "")


def _trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """What the marks of a turn say; an assistant's turn without one is trained."""
    trained = True
    for name in _MARKS:
        value = turn.get(name)
        if absent(value):
            continue
        if value not in (0, 1):  # False and True too
            raise BadRow(f"{where} has the {name} {value!r}; a turn is trained (1, true) or not (0, false)")
        if value and name != "weight" and role != "assistant":
            raise BadRow(f"{where} is marked to be trained ({name}) and is not the assistant's")
        trained = trained and (bool(value) or role != "assistant")
    return trained


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"{where} has a part that is not text")


def first(row: Mapping[str, Any], fields: Iterable[str]) -> str | None:
    """The first of these fields that the row has."""
    for field in fields:
        if field in row and not absent(row[field]):
            return field
    return None


def absent(value: Any) -> bool:
    """Whether a field counts as absent: null, NaN, an empty list."""
    if isinstance(value, str):
        return False
    return value is None or value != value or value == []


def _has_from(turns: Any) -> bool:
    return isinstance(turns, list) and any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
