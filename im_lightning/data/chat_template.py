"""A tokenizer's chat template, rendered prefix by prefix, since stock ones give empty assistant masks.

With turns m1..mk, the text of m1..m(k-1) with the generation prompt begins the text of m1..mk; what follows is the
response and its end. Templates that write the last answer otherwise than earlier ones (Qwen3, Phi-3, gpt-oss) do not
nest so; where they mark the answers (`{% generation %}`) all are trained, else the last answer is found in the whole
text and trained alone, since the earlier ones do not stand there as they were generated; or, where that is asked for,
each in its own history.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from im_lightning._utils.hashing import digest_json
from im_lightning.data.example import Example, Message
from im_lightning.data.prompt_templates import Refused, Template, Turn
from im_lightning.errors import RequestError, message

# Templates that print today's date (Llama 3.1 and later) would score otherwise tomorrow: they get Llama's own default.
# `strftime_now` is shadowed by a macro, since transformers replaces functions among the arguments of a template.
_DAY = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"}
_NOW = "".join(f" | replace('{k}', '{v}')" for k, v in {**_DAY, "%H": "00", "%M": "00", "%S": "00"}.items())
_DATE = f"{_DAY['%d']} {_DAY['%b']} {_DAY['%Y']}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
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

    def __init__(self, tokenizer: Any, each: bool = False) -> None:
        self.tokenizer = self._tokenizer = tokenizer
        text = tokenizer.get_chat_template()
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if name in text}
        self._template = _CLOCK + text if "strftime_now" in text else text
        self._usual = ("", "")  # what last stood between generation prompt and response, and after the response
        self._in_parts = False
        self._close, self._close_is_in_text = "", False
        self._in_parts = not self._shows_text() and self._shows_text(in_parts=True)
        with contextlib.suppress(Refused):  # a template that renders nothing is refused at the first row
            self._find_close()
        parts = {"template": "chat", "version": 1, "text": text, "special": special, "day": _DAY}
        if _GENERATION.search(text):
            with contextlib.suppress(Refused):
                parts["marks"] = len(self._spans([*_ASKED, _MARKED], None)[1])  # 2 where EOS is marked apart (Phi-3)
        self.identity = digest_json({**parts, "close": self._close} if self._close else parts)
        self.each = each
        if each:
            self.identity = digest_json([self.identity, "each answer in its own history"])

    def _shows_text(self, in_parts: bool = False) -> bool:
        """Whether contents show in the text, handed over as texts or, as multimodal models want them, in parts."""
        self._in_parts = in_parts
        try:
            return _MARK in self._text(_ASKED)
        except Refused:
            return False

    def _find_close(self) -> None:
        """What teaches the model to stop, where the template writes nothing after an answer.

        That is the special token that opens the next turn, if there is one (GLM), else EOS.
        """
        answered = [*_ASKED, _MARKED]
        tail = self._text(answered).rpartition(_MARK)[2].strip()
        if tail:
            tokens = {*self._tokenizer.get_added_vocab(), self._tokenizer.eos_token or ""} - {""}
            if not any(one in tail for one in tokens):
                self.notice = f"the chat template closes answers with the text {tail!r}, which is no special token: "
                self.notice += "what generates must be told to stop there"
            return
        with contextlib.suppress(Refused):
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
        except Refused as refusal:
            raise RequestError(message("chat template, the example", str(refusal), self.remedy)) from refusal

    def _turns(self, example: Example) -> list[Turn]:
        messages, shown = example.messages, _shown(example.messages)
        text: Render = partial(self._text, tools=_tools(example))
        if example.tools and text(shown) == self._text(shown):
            raise Refused("it leaves out the tools")
        for k, turn in enumerate(shown):
            if "tool_calls" in turn:
                _check_used("tool_calls", turn, partial(_in_place, text, shown, k))
        try:
            turns = self._nested(messages, shown, text)
        except Refused:
            turns = self._marked(messages, shown, _tools(example)) or []
            if not turns:
                last = self._last(shown, text)
                if last is None:
                    raise
                turns = [last]
        _check_shown("".join(part for turn in turns for part in turn[:3]), shown, text)
        self.last_only += not self.each and len(turns) < sum(turn.role == "assistant" for turn in messages)
        return turns

    def _marked(self, messages: tuple[Message, ...], shown: list[dict[str, Any]], tools: Any) -> list[Turn] | None:
        """All answers, where the template marks each with what closes it (`{% generation %}`), unchanged."""
        answers = [turn for turn in messages if turn.role == "assistant"]
        if not _GENERATION.search(self._template) or any(turn.fields for turn in answers):
            return None
        whole, spans = self._spans(shown, tools)
        turns, done = [], 0
        if len(spans) == len(answers) + 1 and self._closer(whole[slice(*spans[-1])].strip()):
            spans[-2:] = [(spans[-2][0], spans[-1][1])]  # Phi-3 writes EOS, marked apart, after the last answer
        if len(spans) != len(answers):
            return None
        for turn, (start, stop) in zip(answers, spans, strict=True):
            body, form = whole[:stop].rstrip(), ""
            while not form:
                closer = self._closer(body)
                if not closer or len(body) <= start:
                    return None
                body = body[: len(body) - len(closer)]
                form = next((one for one in _forms(turn.content) if one and body[start:].endswith(one)), "")
                border, body = len(body), body if form else body.rstrip()
            end = whole[border:stop].rstrip()
            turns.append(Turn(whole[done : border - len(form)], form, end, turn.trained))
            done = border + len(end)
        return turns

    def _spans(self, shown: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the stretches that the template marks in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        self._text(shown, tools=tools)  # a template that refuses the whole says why
        known = {**self._tokenizer.special_tokens_map, "chat_template": self._template, "date_string": _DATE}
        render: Any = render_jinja_template  # annotated as str; with marks it gives texts and their spans
        texts, marks = render([self._handed(shown)], tools, return_assistant_tokens_mask=True, **known)
        return texts[0], list(marks[0])

    def _closer(self, text: str) -> str:
        """The longest of the tokenizer's added tokens that a text ends with, or ""."""
        return max((one for one in self._tokenizer.get_added_vocab() if text.endswith(one)), key=len, default="")

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
            raise Refused("its text without a turn does not begin its text with it (its prefixes do not nest)")
        tail = text([*past, _MARKED]).rpartition(_MARK)[2]
        if not tail or not after.endswith(tail):  # a call may be closed otherwise than an answer
            ended = after.rstrip()
            closer = self._closer(ended)
            tail = closer + after[len(ended) :] if closer else ""
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
                raise Refused("its text for earlier turns changes when turns are added (its prefixes do not nest)")
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
        raise Refused("its text without a turn does not begin its text with it (its prefixes do not nest)")

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
                raise Refused("it leaves out the response, or its text before the response depends on the response")
            self._usual = (marked[len(before) : at], marked[at + len(_MARK) :])
        raise Refused("it rewrites the text of the response")

    def _handed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Turns with their contents as the template wants them."""
        if not self._in_parts:
            return messages
        return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]

    def _text(self, messages: list[dict[str, Any]], generate: bool = False, tools: Any = None) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                self._handed(messages),
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generate,
                date_string=_DATE,
            )
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeErrors on odd roles
            raise Refused(f"it cannot render the conversation ({type(error).__name__}: {error})") from error


def chat_opening(tokenizer: Any) -> str:
    """What a tokenizer's chat template writes before an answer, after the turn before it; "" where it has no such."""
    try:
        template = ChatTemplate(tokenizer)
        asked, opened = template._text(_ASKED), template._text(_ASKED, True)
    except (ValueError, Refused):
        return ""
    return opened[len(asked) :] if opened.startswith(asked) else ""


def _check_used(name: str, turn: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Refuses a turn whose field makes no difference to the text."""
    with_it = render(turn)
    try:
        without = render({field: value for field, value in turn.items() if field != name})
    except Refused:  # a template that cannot do without it uses it
        return
    if without == with_it:
        raise Refused(f"it leaves out the field {name!r} of an answer")


def _check_shown(whole: str, shown: list[dict[str, Any]], text: Render) -> None:
    """Refuses a conversation of which the template leaves out a turn: Phi-3's first did so with the system's, gpt-oss's
    does with one that comes later, both without a word."""
    for k, turn in enumerate(shown):
        said = turn["content"].strip()
        if turn["role"] == "assistant" or not said or said in whole:
            continue
        try:
            marked = _in_place(text, shown, k, {**turn, "content": _MARK})
        except Refused:  # it goes by what the turn says
            continue
        if _MARK not in marked:  # else it is written otherwise, as JSON for instance
            raise Refused(f"it leaves out what a turn of the role {turn['role']!r} says")


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
