"""`Example`: one instruction-tuning conversation, keyed by its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quoted

from im_lightning._utils.hashing import digest_bytes, digest_json


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: Its text, possibly empty.
        trained: False for an assistant's turn that is context alone: loss and likelihood indicators leave it out.
        fields: What a chat template is handed beside the text (tool calls, reasoning), as one JSON object, or "".

    >>> Message("user", "Add 2 and 2.").content
    'Add 2 and 2.'
    """

    role: str
    content: str
    trained: bool = True
    fields: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with an assistant turn.

    Args:
        messages: The turns in order; the last one is the assistant's and may be empty.
        instruction: The instruction text where the format separates it from its input (Alpaca), else None.
        input: The input text where the format has one ("" if the row left it empty), else None.
        source: Where the row came from: its own field, else the stem of its file. Not part of the identity.
        tools: The tools that a chat template is handed, as a JSON array, or "".

    >>> example = Example((Message("user", "Add 2 and 2."), Message("assistant", "4")))
    >>> example.prompt, example.response
    ('Add 2 and 2.', '4')
    """

    messages: tuple[Message, ...]
    instruction: str | None = None
    input: str | None = None
    source: str = ""
    tools: str = ""
    _id: str = field(default="", init=False, repr=False, compare=False)

    @property
    def id(self) -> str:
        """BLAKE2b-128 in hex of everything but `source`: equal content has an equal id."""
        if not self._id:
            try:  # the canonical form written out: `digest_json` takes three times as long, seconds per million rows
                turns = ",".join([f"[{_quoted(m.role)},{_quoted(m.content)}]" for m in self.messages])
                instruction = "null" if self.instruction is None else _quoted(self.instruction)
                given = "null" if self.input is None else _quoted(self.input)
                more = "".join(f',"{name}":{value}' for name, value in self._more().items())
                text = f'{{"input":{given},"instruction":{instruction},"messages":[{turns}]{more}}}'
                value = digest_bytes(text.encode("ascii"))
            except TypeError:  # a text that is none
                pairs = [[m.role, m.content] for m in self.messages]
                value = digest_json({"messages": pairs, "instruction": self.instruction, "input": self.input})
            object.__setattr__(self, "_id", value)
        return self._id

    @property
    def prompt_id(self) -> str:
        """Digest of what precedes the last response: examples that share it are references of one instruction."""
        turns = [[turn.role, turn.content] for turn in self.history]
        more = [turn.fields for turn in self.history] if any(turn.fields for turn in self.history) else []
        return digest_json([turns, more, self.tools] if more or self.tools else turns)

    def _more(self) -> dict[str, str]:
        """What only some examples have, as JSON; the others keep the id that they had before there was such."""
        out = {}
        if any(m.fields for m in self.messages):
            out["fields"] = f"[{','.join(_quoted(m.fields) for m in self.messages)}]"
        if self.tools:
            out["tools"] = _quoted(self.tools)
        if not all(m.trained for m in self.messages):
            out["trained"] = f"[{','.join('01'[m.trained] for m in self.messages)}]"
        return out

    @property
    def response(self) -> str:
        """The text of the last assistant turn, the one whose quality is scored."""
        return self.messages[-1].content

    @property
    def history(self) -> tuple[Message, ...]:
        """All turns before the last response."""
        return self.messages[:-1]

    @property
    def prompt(self) -> str:
        """The last user turn as one text (instruction, then input on a line of its own where there is one)."""
        return _prompt(self.messages)


def last_exchanges(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """`prompt` and `response` of each example."""
    return [(_prompt(example.messages), example.messages[-1].content) for example in examples]


def _prompt(messages: tuple[Message, ...]) -> str:
    for turn in reversed(messages[:-1]):
        if turn.role == "user":
            return turn.content
    return ""
