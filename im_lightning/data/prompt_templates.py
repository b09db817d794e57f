"""Templates: a conversation as turns of (prompt, response, end) text, the response known to the character.

The Alpaca template and none are written out here; a tokenizer's own is in `chat_template`.

What reads like a special token in a row's text (`</s>`, `<|im_end|>`) becomes that token, in training, likelihoods,
rewards and UniEval alike, as in the reference implementations, and is noted (`special_pattern`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from im_lightning._utils.hashing import digest_json
from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:"
_GAP = "\n\n"


class Refused(Exception):
    """Why a template cannot be used on a conversation."""


class Turn(NamedTuple):
    """One assistant turn: all text since the last one, its own text, what the template closes it with; its mark."""

    prompt: str
    response: str
    end: str
    trained: bool = True


class Template(ABC):
    """Renders examples as text.

    Attributes:
        name: "alpaca", "chat" or "none".
        identity: Digest of what determines the rendering, and of nothing else.
        end_ids: Token ids that close each assistant turn in place of `Turn.end`, or None.
        each: Whether an earlier answer that later turns change in the text is rendered again, at the end of its own
            history (`earlier`).
        continuous: Whether the turns are pieces of one running text, rather than texts set side by side. It matters to
            tokenizers that put a space before each text.
        last_only: Conversations so far of which only the last answer could be rendered as it was generated.
        notice: What a person should know before training with it, or "".
        remedy: What helps where it refuses a conversation.
    """

    name: str
    identity: str
    end_ids: tuple[int, ...] | None = None
    each: bool = False
    continuous: bool = False
    last_only: int = 0
    notice: str = ""
    remedy: str = ""

    def render(self, examples: Sequence[Example]) -> list[list[Turn]]:
        """The assistant turns of each example, in order.

        Raises:
            RequestError: the template cannot render a conversation; names it by id and beginning.
        """
        rendered = []
        for example in examples:
            try:
                rendered.append(self._turns(example))
            except (Refused, RecursionError) as refusal:  # tools may be nested as deep as they like
                raise RequestError(
                    message(f"{self.name} template, {_named(example)}", str(refusal), self.remedy)
                ) from refusal
        return rendered

    def refusal(self, example: Example) -> str | None:
        """Why this conversation cannot be rendered, or None; readers take it as the cause of a bad row.

        Of conversations whose texts hold nothing that a template could take for more than text, one of each sequence of
        roles is rendered: a pool of millions is read, not rendered twice.
        """
        shape = _shape(example)
        if shape is not None and shape in self._rendered:
            return None
        try:
            for one in self.earlier(example, self._turns(example)):
                self._turns(one)
        except (Refused, RecursionError) as refusal:
            return f"the {self.name} template refuses it: {refusal}"
        if shape is not None:
            self._rendered.add(shape)
        return None

    def earlier(self, example: Example, turns: Sequence[Turn]) -> list[Example]:
        """Where `each` answer counts and `turns` are the last one alone: the conversations up to each earlier answer
        that is trained, in which it alone counts."""
        if not self.each:
            return []
        answers = [k for k, turn in enumerate(example.messages) if turn.role == "assistant"]
        if len(turns) == len(answers):
            return []
        past = [replace(turn, trained=False) for turn in example.messages]
        ends = [k for k in answers[:-1] if example.messages[k].trained]
        return [replace(example, messages=(*past[:k], example.messages[k])) for k in ends]

    @cached_property
    def _rendered(self) -> set[tuple[str, ...]]:
        """Shapes of conversations that the template rendered."""
        return set()

    def response(self, example: Example) -> str:
        """The text of the last response, without what closes it."""
        return example.response

    @abstractmethod
    def _turns(self, example: Example) -> list[Turn]:
        """The assistant turns of one example; raises `Refused`."""


_NO_TEXT = re.compile(r"[<>\[\]{}|]|^\s|\s$|^$")


def _shape(example: Example) -> tuple[str, ...] | None:
    """The roles of an example of plain texts; None where a text, a field or a tool might matter to a template."""
    if example.tools or any(turn.fields or _NO_TEXT.search(turn.content) for turn in example.messages):
        return None
    return tuple(turn.role for turn in example.messages)


class AlpacaTemplate(Template):
    """The template of Stanford Alpaca (`train.py`, PROMPT_DICT); the tokenizer's EOS closes each response.

    Later turns repeat the instruction and response headings. A system turn takes the place of the opening paragraph.
    """

    name = "alpaca"
    remedy = "use --template chat with a tokenizer whose chat template has, or leave such rows out"

    def __init__(self, tokenizer: Any) -> None:
        eos = tokenizer.eos_token_id
        self.end_ids = () if eos is None else (int(eos),)
        self.notice = "" if self.end_ids else "the tokenizer has no EOS: nothing teaches the model to stop"
        parts = (ALPACA_PREAMBLE, ALPACA_PREAMBLE_WITH_INPUT, _INSTRUCTION, _INPUT, _RESPONSE, _GAP)
        self.identity = digest_json({"template": "alpaca", "version": 1, "parts": parts})

    def _turns(self, example: Example) -> list[Turn]:
        if example.tools or any(turn.fields or turn.role == "tool" for turn in example.messages):
            raise Refused("it has no place for tools, tool calls or reasoning")
        turns: list[Turn] = []
        with_input = bool(example.input) and example.instruction is not None
        bordered = _last_user(example) if with_input else -1
        pending = "" if example.messages[0].role == "system" else self._preamble(with_input) + _GAP
        for i, turn in enumerate(example.messages):
            if turn.role == "assistant":
                turns.append(Turn(pending + _RESPONSE, turn.content, "", turn.trained))
                pending = _GAP
            elif turn.role == "system":
                pending += turn.content + _GAP
            elif i == bordered:
                pending += f"{_INSTRUCTION}{example.instruction}{_GAP}{_INPUT}{example.input}{_GAP}"
            else:
                pending += f"{_INSTRUCTION}{turn.content}{_GAP}"
        return turns

    @staticmethod
    def _preamble(with_input: bool) -> str:
        return ALPACA_PREAMBLE_WITH_INPUT if with_input else ALPACA_PREAMBLE


class PlainTemplate(Template):
    """None: the prompt as it stands, then the completion, for rows that are formatted already.

    Special tokens at the completion's end close it, as the row writes them; where there are none, EOS does.
    """

    name = "none"
    continuous = True
    remedy = "use --template chat or alpaca, or leave such rows out"

    def __init__(self, tokenizer: Any) -> None:
        special = special_pattern(tokenizer)
        self._closers = None if special is None else re.compile(rf"(?:(?:{special.pattern})\s*)+\Z")
        self._eos = tokenizer.eos_token or ""
        if not self._eos:
            self.notice = "the tokenizer has no EOS: only what a row itself closes its completion with teaches to stop"
        self.identity = digest_json({"template": "none", "version": 1})

    def response(self, example: Example) -> str:
        return example.response[: self._border(example.response)]

    def _border(self, text: str) -> int:
        found = None if self._closers is None else self._closers.search(text)
        return len(text) if found is None else found.start()

    def _turns(self, example: Example) -> list[Turn]:
        roles = [turn.role for turn in example.messages]
        if roles[:-1] not in ([], ["user"]) or example.tools or any(turn.fields for turn in example.messages):
            raise Refused(f"it has no words for turns, only for one prompt and one completion ({', '.join(roles)})")
        answer = example.messages[-1]
        border = self._border(answer.content)
        return [Turn(example.prompt, answer.content[:border], answer.content[border:] or self._eos, answer.trained)]


SPECIAL_TOKEN = "special token in the text"


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the texts of special tokens, such as `</s>`, in what people wrote: the tokenizer reads them as tokens."""
    if getattr(tokenizer, "split_special_tokens", False):
        return None  # one that was told not to
    found = {str(token) for token in tokenizer.all_special_tokens}
    found |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False)}
    found.discard("")
    return re.compile("|".join(re.escape(token) for token in sorted(found))) if found else None


def _named(example: Example) -> str:
    """An example for a message."""
    return f"the example {example.id} ({example.messages[0].content[:40]!r} …)"


def _last_user(example: Example) -> int:
    roles: Iterable[int] = (i for i, turn in enumerate(example.messages) if turn.role == "user")
    return max(roles, default=-1)
