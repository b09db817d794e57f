"""Templates: a conversation as turns of (prompt, response, end) text, the response known to the character.

The Alpaca template is written out here. A tokenizer's chat template is rendered prefix by prefix, since stock ones give
empty assistant masks (`return_assistant_tokens_mask`): with turns m1..mk, the text of m1..m(k-1) with the generation
prompt begins the text of m1..mk; what follows is the response and its end. Templates that write the last answer
otherwise than earlier ones (Qwen3, Phi-3, gpt-oss) do not nest so; of their conversations the last answer is found in
the whole text and trained alone, since the earlier ones do not stand there as they were generated.
"""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from im_lightning._utils.hashing import digest_json
from im_lightning.data.example import Example, Message
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


class Turn(NamedTuple):
    """One assistant turn: all text since the last one, its own text, what the template closes it with; its mark."""

    prompt: str
    response: str
    end: str
    trained: bool = True


class Template(ABC):
    """Renders examples as text.

    Attributes:
        name: "alpaca" or "chat".
        identity: Digest of what determines the rendering, and of nothing else.
        end_ids: Token ids that close each assistant turn in place of `Turn.end`, or None.
        continuous: Whether the turns are pieces of one running text, rather than texts set side by side. It matters to
            tokenizers that put a space before each text.
        last_only: Conversations so far of which only the last answer could be rendered as it was generated.
        notice: What a person should know before training with it, or "".
        remedy: What helps where it refuses a conversation.
    """

    name: str
    identity: str
    end_ids: tuple[int, ...] | None = None
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
            except (_Refused, RecursionError) as refusal:  # tools may be nested as deep as they like
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
            self._turns(example)
        except (_Refused, RecursionError) as refusal:
            return f"the {self.name} template refuses it: {refusal}"
        if shape is not None:
            self._rendered.add(shape)
        return None

    @cached_property
    def _rendered(self) -> set[tuple[str, ...]]:
        """Shapes of conversations that the template rendered."""
        return set()

    @abstractmethod
    def _turns(self, example: Example) -> list[Turn]:
        """The assistant turns of one example; raises `_Refused`."""


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
            raise _Refused("it has no place for tools, tool calls or reasoning")
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


def _named(example: Example) -> str:
    """An example for a message."""
    return f"the example {example.id} ({example.messages[0].content[:40]!r} …)"


def _last_user(example: Example) -> int:
    roles: Iterable[int] = (i for i, turn in enumerate(example.messages) if turn.role == "user")
    return max(roles, default=-1)


# Templates that print today's date (Llama 3.1 and later) would score otherwise tomorrow: they get Llama's own default.
# `strftime_now` is shadowed by a macro, since transformers replaces functions among the arguments of a template.
_DAY = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"}
_NOW = "".join(f" | replace('{k}', '{v}')" for k, v in {**_DAY, "%H": "00", "%M": "00", "%S": "00"}.items())
_CLOCK = "{% macro strftime_now(format) -%}{{ format" + _NOW + " }}{%- endmacro %}\n"
_MARK = "im0lightning0response0mark"
_ASKED = [{"role": "user", "content": _MARK}]
_MARKED = {"role": "assistant", "content": _MARK}
_WRITTEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Fields of an answer that the model itself writes."""
Render = Callable[..., str]


class ChatTemplate(Template):
    """The chat template of a tokenizer."""

    name = "chat"
    remedy = "use --template alpaca, or leave such rows out"
    continuous = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        text = tokenizer.get_chat_template()
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if name in text}
        self._template = _CLOCK + text if "strftime_now" in text else text
        self._usual = ("", "")  # what last stood between generation prompt and response, and after the response
        self._in_parts = False
        self._close, self._close_is_in_text = "", False
        self._in_parts = not self._shows_text() and self._shows_text(in_parts=True)
        with contextlib.suppress(_Refused):  # a template that renders nothing is refused at the first row
            self._find_close()
        parts = {"template": "chat", "version": 1, "text": text, "special": special, "day": _DAY}
        self.identity = digest_json({**parts, "close": self._close} if self._close else parts)

    def _shows_text(self, in_parts: bool = False) -> bool:
        """Whether contents show in the text, handed over as texts or, as multimodal models want them, in parts."""
        self._in_parts = in_parts
        try:
            return _MARK in self._text(_ASKED)
        except _Refused:
            return False

    def _find_close(self) -> None:
        """What teaches the model to stop, where the template writes nothing after an answer.

        That is the special token that opens the next turn, if there is one (GLM), else EOS.
        """
        answered = [*_ASKED, _MARKED]
        if self._text(answered).rpartition(_MARK)[2].strip():
            return
        with contextlib.suppress(_Refused):
            follows = self._text([*answered, _ASKED[0]]).split(_MARK)[-2].lstrip()
            openers = [one for one in self._tokenizer.get_added_vocab() if follows.startswith(one)]
            if openers:
                self._close, self._close_is_in_text = max(openers, key=len), True
                return
        self._close = self._tokenizer.eos_token or ""
        if not self._close:
            self.notice = (
                "the chat template closes no answer and the tokenizer has no EOS: nothing teaches the model to stop"
            )

    def conversation(self, example: Example) -> str:
        """All turns as one text, as `apply_chat_template` writes them, with what follows the last response.

        Raises:
            RequestError: the template cannot render this conversation.
        """
        try:
            return self._text(_shown(example.messages), tools=_tools(example))
        except _Refused as refusal:
            raise RequestError(message("chat template, the example", str(refusal), self.remedy)) from refusal

    def _turns(self, example: Example) -> list[Turn]:
        messages, shown = example.messages, _shown(example.messages)
        text: Render = partial(self._text, tools=_tools(example))
        if example.tools and text(shown) == self._text(shown):
            raise _Refused("it leaves out the tools")
        for k, turn in enumerate(shown):
            if "tool_calls" in turn:
                _check_used("tool_calls", turn, partial(_in_place, text, shown, k))
        try:
            return self._nested(messages, shown, text)
        except _Refused:
            last = self._last(shown, text)
            if last is None:
                raise
        self.last_only += sum(turn.role == "assistant" for turn in messages) > 1
        return [last]

    def _last(self, shown: list[dict[str, Any]], text: Render) -> Turn | None:
        """The last answer, where the text of the whole conversation holds it unchanged before the template's tail."""
        if len(shown[-1]) > 2:
            before, response, tail = self._structured(shown[:-1], shown[-1], text)
            return Turn(before, response, self._end(tail))
        whole = text(shown)
        _, found, tail = text([*shown[:-1], _MARKED]).rpartition(_MARK)
        if not found or not whole.endswith(tail):
            return None
        body = whole[: len(whole) - len(tail)]
        for form in _forms(shown[-1]["content"]):
            if body.endswith(form):
                return Turn(body[: len(body) - len(form)], form, self._end(tail))
        return None

    def _structured(self, past: list[dict[str, Any]], turn: dict[str, Any], text: Render) -> tuple[str, str, str]:
        """What stands before an answer with tool calls or reasoning, all that the model would write of it, the tail.

        Every such field must show in the text: an answer without its call or its reasoning is another answer.
        """
        for name in _WRITTEN:
            if name in turn:
                _check_used(name, turn, lambda one: text([*past, one]))
        after, asked = text([*past, turn]), text(past, True)
        before = asked
        if not after.startswith(asked):  # the prompt opens or closes a thought that the answer writes otherwise
            shared = (i for i, (one, other) in enumerate(zip(after, asked, strict=False)) if one != other)
            before = asked[: asked.rfind("\n", 0, next(shared, len(after))) + 1]
        if len(before) < len(text(past)):
            raise _Refused("its text without a turn does not begin its text with it (its prefixes do not nest)")
        tail = text([*past, _MARKED]).rpartition(_MARK)[2]
        if not tail or not after.endswith(tail):  # a call may be closed otherwise than an answer
            ended = after.rstrip()
            closers = [one for one in self._tokenizer.get_added_vocab() if ended.endswith(one)]
            tail = max(closers, key=len) + after[len(ended) :] if closers else ""
        return before, after[len(before) : len(after) - len(tail)], tail

    def _end(self, tail: str) -> str:
        """What closes a turn; a newline after the end-of-turn token opens the next turn."""
        return tail.rstrip() or (tail * self._close_is_in_text + self._close) or tail

    def _nested(self, messages: tuple[Message, ...], shown: list[dict[str, Any]], text: Render) -> list[Turn]:
        turns: list[Turn] = []
        done = ""
        for k, turn in enumerate(messages):
            if turn.role != "assistant":
                continue
            lead = ""
            if turn.fields:
                before, response, tail = self._structured(shown[:k], shown[k], text)
                after = before + response + tail
            else:
                before, after = self._around(shown[:k], shown[k], text)
                lead, response, tail = self._parts(shown[:k], turn.content, before, after, text)
            if lead and not lead.strip(" "):  # a space that the model itself would write, part of the first word
                lead, response = "", lead + response
            if not before.startswith(done):
                raise _Refused("its text for earlier turns changes when turns are added (its prefixes do not nest)")
            turns.append(Turn(before[len(done) :] + lead, response, self._end(tail), turn.trained))
            done = after[: len(after) - len(tail)]
            if tail.strip():
                done += turns[-1].end
            elif self._close_is_in_text and k < len(messages) - 1:
                done = after + self._close
        return turns

    def _around(self, past: list[dict[str, Any]], turn: dict[str, Any], text: Render) -> tuple[str, str]:
        """The text up to the response and the text with it; without the generation prompt where that does not fit."""
        after = text([*past, turn])
        if not past:
            return "", after
        for generate in (True, False):
            before = text(past, generate)
            if after.startswith(before):
                return before, after
        raise _Refused("its text without a turn does not begin its text with it (its prefixes do not nest)")

    def _parts(
        self, past: list[dict[str, Any]], content: str, before: str, after: str, text: Render
    ) -> tuple[str, str, str]:
        """Splits what follows `before` into the template's lead, the response and the template's tail."""
        rest = after[len(before) :]
        forms = _forms(content)
        for attempt in range(2):
            lead, tail = self._usual
            for form in forms:
                if rest == lead + form + tail and (attempt or lead or tail):
                    return lead, form, tail
            if attempt:
                break
            marked = text([*past, _MARKED])
            at = marked.find(_MARK, len(before))
            if at < 0 or not marked.startswith(before):
                raise _Refused("it leaves out the response, or its text before the response depends on the response")
            self._usual = (marked[len(before) : at], marked[at + len(_MARK) :])
        raise _Refused("it rewrites the text of the response")

    def _text(self, messages: list[dict[str, Any]], generate: bool = False, tools: Any = None) -> str:
        if self._in_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generate,
                date_string=f"{_DAY['%d']} {_DAY['%b']} {_DAY['%Y']}",
            )
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeErrors on odd roles
            raise _Refused(f"it cannot render the conversation ({type(error).__name__}: {error})") from error


def chat_opening(tokenizer: Any) -> str:
    """What the tokenizer's chat template writes before an answer, after the turn before it; "" without such."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        template = ChatTemplate(tokenizer)
        asked, opened = template._text(_ASKED), template._text(_ASKED, True)
    except (ValueError, _Refused):
        return ""
    return opened[len(asked) :] if opened.startswith(asked) else ""


def _check_used(name: str, turn: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Refuses a turn whose field makes no difference to the text."""
    with_it = render(turn)
    try:
        without = render({field: value for field, value in turn.items() if field != name})
    except _Refused:  # a template that cannot do without it uses it
        return
    if without == with_it:
        raise _Refused(f"it leaves out the field {name!r} of an answer")


def _in_place(text: Render, shown: list[dict[str, Any]], k: int, turn: dict[str, Any]) -> str:
    """The conversation's text with another turn k."""
    return text([*shown[:k], turn, *shown[k + 1 :]])


def _shown(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Turns as chat templates take them."""
    return [{"role": m.role, "content": m.content, **(json.loads(m.fields) if m.fields else {})} for m in messages]


def _tools(example: Example) -> Any:
    return json.loads(example.tools) if example.tools else None


def _forms(content: str) -> dict[str, None]:
    """A text as templates write it: as it is, or without white space around it."""
    return dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip()))


class _Refused(Exception):
    """Why the template cannot be used on a conversation."""
