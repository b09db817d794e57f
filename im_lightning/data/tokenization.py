"""Examples as token ids: templates applied, prompt and response tokenised apart, joined, masked and truncated.

Texts are tokenised in batches, each text once; no text merges with its neighbour.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.data.chat_template import ChatTemplate, chat_opening
from im_lightning.data.example import Example, last_exchanges
from im_lightning.data.prompt_templates import AlpacaTemplate, PlainTemplate, Template, Turn, special_pattern
from im_lightning.errors import RequestError, message

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokens:
    """Token ids of texts, tokenised in batches and each text once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}
        plain, special = self._run(["a"])[0], list(tokenizer("a")["input_ids"])
        self._bos = tokenizer.bos_token_id
        if plain:
            at = next((k for k in range(len(special)) if special[k : k + len(plain)] == plain), 0)
        else:  # a small vocabulary that lacks the probe
            at = int(self._bos is not None and special[:1] == [self._bos])
        self.head: list[int] = special[:at]  # BOS, for most that add anything
        # A newline before a text takes the space that SentencePiece-like tokenizers would put before it.
        pieces = tokenizer.convert_ids_to_tokens(plain)
        self._anchor = self._run(["\n"])[0] if pieces and str(pieces[0]).startswith("▁") else []

    def __getitem__(self, text: str) -> list[int]:
        return self._ids[text]

    def inside(self, text: str) -> list[int]:
        """The ids of a text that continues another."""
        return self._inside[text] if self._anchor else self._ids[text]

    def load(self, texts: Iterable[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self._ids))
        self._ids.update(zip(new, self._run(new), strict=True))

    def load_inside(self, texts: Iterable[str]) -> None:
        new = list(dict.fromkeys(texts))
        if not self._anchor:
            self.load(new)
            return
        n = len(self._anchor)
        for text, ids in zip(new, self._run(["\n" + text for text in new]), strict=True):
            if ids[:n] != self._anchor:  # the newline merged with the text
                ids = self._anchor + self._run([text])[0]
            self._inside[text] = ids[n:] if text else []

    def clear(self) -> None:
        self._ids.clear()
        self._inside.clear()

    def split_head(self, turns: list[tuple[list[int], list[int], list[int]]]) -> tuple[list[int], list[Any]]:
        """Takes BOS off the first prompt if the template wrote it, so that it is there once and outlives truncation."""
        prompt, response, end = turns[0]
        head = self.head
        if head and prompt[: len(head)] == head:
            prompt = prompt[len(head) :]
        elif self._bos is not None and prompt[:1] == [self._bos]:
            head, prompt = [self._bos], prompt[1:]
        return head, [(prompt, response, end), *turns[1:]]

    def _run(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        clean = [without_surrogates(text) for text in texts]
        ids = self._tokenizer(
            clean, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return [one if text else [] for text, one in zip(clean, ids, strict=True)]


def without_surrogates(text: str) -> str:
    """The text with half characters, which JSON can carry and tokenizers refuse, replaced one by one."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)


TEMPLATES = ("auto", "alpaca", "chat", "none")
TURNS = ("last", "each")
MIN_LENGTH = 8

_BLOCK = 1024  # examples tokenised at a time: enough to pay, little enough to bound the memory
_said: set[str] = set()
_said_special: set[str] = set()


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as T token ids.

    Attributes:
        input_ids: int32 [T], prompt (BOS once, if the tokenizer adds one) and response (EOS or end of turn), all turns.
        response_mask: bool [T], True on assistant text, without EOS or end of turn: what scoring counts.
        loss_mask: bool [T], `response_mask` with EOS or end of turn: what training and evaluation count.
        length_input: Tokens of the last user turn (instruction, newline, input), before truncation, without template.
        length_output: Tokens of the last response, before truncation, without EOS; calls and reasoning count as the
            template writes them.
        truncated_prompt: Tokens cut away before the last response, earlier turns included.
        truncated_response: Tokens cut away from the last response.
        special: Whether a text of the row itself holds special tokens of the tokenizer; they are read as such.
        earlier: Earlier answers of the row, each in its own history, under a template with `each`: sequences of the
            same row, whose sums and counts are added to this one's.
    """

    input_ids: NDArray[np.int32]
    response_mask: NDArray[np.bool_]
    loss_mask: NDArray[np.bool_]
    length_input: int
    length_output: int
    truncated_prompt: int
    truncated_response: int
    special: bool = False
    earlier: tuple[Encoded, ...] = ()


def check_template(template: str) -> None:
    """Validates the name of a template, or its file."""
    template_text(template)


def template_text(template: str) -> str | None:
    """The chat template in a file NAME.jinja; None for a template known by name.

    Raises:
        RequestError: there is no such template, or its file cannot be read.
    """
    if template in TEMPLATES:
        return None
    if Path(template).suffix not in (".jinja", ".jinja2", ".j2"):
        remedy = f"use one of {', '.join(TEMPLATES)}, or name a file of a chat template, such as own.jinja"
        raise RequestError(message(f"template {template!r}", "there is no such template", remedy))
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise RequestError(message(f"template {template}", cause, "name a text file in Jinja's language")) from error


def check_length(max_length: int) -> None:
    """Validates the number of tokens per example."""
    if max_length < MIN_LENGTH:
        cause = "is too short to hold a prompt and a response"
        raise RequestError(message(f"max_length {max_length}", cause, f"use at least {MIN_LENGTH}"))


def template_key(template: str) -> str:
    """A template's name, or a digest of the text in its file: what results are kept under."""
    text = template_text(template)
    return template if text is None else digest_json({"template": text})


def resolve_template(template: str, tokenizer: Any, turns: str = "last") -> Template:
    """The template of that name: "alpaca", "chat" (the tokenizer's own), "auto" (chat if there is one), "none" (prompt
    and completion as they stand); or the chat template in a file NAME.jinja, in place of the tokenizer's own.

    `turns` says which answers count where a chat template writes earlier ones otherwise than they were generated: the
    "last" alone, or "each" in its own history.

    Raises:
        RequestError: an unknown name, a file that cannot be read, or "chat" for a tokenizer without a chat template.
    """
    if turns not in TURNS:
        raise RequestError(message(f"turns {turns!r}", "is not known", f"use one of {', '.join(TURNS)}"))
    if template == "none":
        return PlainTemplate(tokenizer)
    if (own := template_text(template)) is not None:
        tokenizer, template = copy.copy(tokenizer), "chat"
        tokenizer.chat_template = own
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "alpaca" or (template == "auto" and not has_chat):
        return AlpacaTemplate(tokenizer)
    if not has_chat:
        cause = f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template"
        remedy = "use --template alpaca, or an instruction-tuned model's tokenizer"
        raise RequestError(message("template 'chat'", cause, remedy))
    try:
        return ChatTemplate(tokenizer, turns == "each")
    except ValueError as error:  # several named templates and none called "default"
        raise RequestError(message("template 'chat'", str(error), "use --template alpaca")) from error


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, template: Template | str, max_length: int = 1024
) -> list[Encoded]:
    """Encodes examples, in order.

    Too long ones are cut: first the oldest whole turns, then the beginning of the prompt, which keeps BOS and at least
    a quarter of `max_length` tokens, then the end of the response (with its EOS).

    Args:
        examples: N examples; a response may be empty (then `response_mask` is all False).
        tokenizer: A transformers tokenizer, best a fast one.
        template: From `resolve_template`, or a name for it.
        max_length: Tokens, at least 8.

    Raises:
        RequestError: `max_length` is too small, or the template cannot render an example; names it by id and beginning.
    """
    check_length(max_length)
    if isinstance(template, str):
        template = resolve_template(template, tokenizer)
    tokens = Tokens(tokenizer)
    before, special = template.last_only, special_pattern(tokenizer)
    end_ids = None if template.end_ids is None else list(template.end_ids)
    encoded: list[Encoded] = []
    for start in range(0, len(examples), _BLOCK):
        block = examples[start : start + _BLOCK]
        rendered, exchanges = template.render(block), last_exchanges(block)
        tokens.load(text for texts in (*exchanges, *(_apart(turns, template) for turns in rendered)) for text in texts)
        tokens.load_inside(text for turns in rendered for text in _inside(turns, template))
        for example, turns, (asked, answered) in zip(block, rendered, exchanges, strict=True):
            ids = []
            for i, turn in enumerate(turns):
                prompt = tokens[turn.prompt] if i == 0 or not template.continuous else tokens.inside(turn.prompt)
                response = tokens.inside(turn.response) if template.continuous else tokens[turn.response]
                ids.append((prompt, response, tokens.inside(turn.end) if end_ids is None else end_ids))
            lengths = len(tokens[asked]), len(ids[-1][1] if example.messages[-1].fields else tokens[answered])
            trained = [turn.trained for turn in turns]
            encoded.append(_encoded(*tokens.split_head(ids), lengths, max_length, trained))
        for i, example in enumerate(block):
            if special is not None and any(special.search(turn.content) for turn in example.messages):
                encoded[start + i] = replace(encoded[start + i], special=True)
                _say_special(example, special, template)
        tokens.clear()
        past = [template.earlier(example, turns) for example, turns in zip(block, rendered, strict=True)]
        if any(past):
            made = iter(encode_examples([one for ones in past for one in ones], tokenizer, template, max_length))
            for i, ones in enumerate(past):
                encoded[start + i] = replace(encoded[start + i], earlier=tuple(next(made) for _ in ones))
    _say_once(template.notice)
    if template.last_only > before:
        cut = f"of {template.last_only - before:,} of {len(examples):,} conversations only the last answer counts"
        log(f"{cut}: the chat template writes earlier answers otherwise than they were generated")
    return encoded


def check_vocabulary(
    encoded: Sequence[Encoded], examples: Sequence[Example], tokenizer: Any, model: str, rows: int
) -> None:
    """Validates that the model has an embedding for every token: it has `rows`, its tokenizer may know more.

    Raises:
        RequestError: names the model, the first example with such a token, and the token.
    """
    if len(tokenizer) <= rows:
        return
    for example, one in zip(examples, encoded, strict=True):
        unknown = np.concatenate([e.input_ids[e.input_ids >= rows] for e in (one, *one.earlier)])
        if len(unknown):
            token = tokenizer.convert_ids_to_tokens(int(unknown[0]))
            cause = f"the tokenizer has {len(tokenizer):,} tokens and the model embeddings for {rows:,}: there is none "
            cause += f"for {token!r} in the example {example.id} ({example.messages[0].content[:40]!r} …)"
            remedy = "use the tokenizer that belongs to the model, saved after resize_token_embeddings(len(tokenizer))"
            raise RequestError(message(model, cause, remedy))


def _say_special(example: Example, special: re.Pattern[str], template: Template) -> None:
    """Said of each token once, and of rows that are meant to be formatted already not at all."""
    found = {token for turn in example.messages for token in special.findall(turn.content)}
    new = sorted(token for token in found if token not in _said_special)
    if new and template.name != "none":
        _said_special.update(new)
        log(
            f"the text of rows holds special tokens of the tokenizer, which are read as such: {', '.join(new)}, first "
            f"in the example {example.id} ({example.messages[0].content[:40]!r} …). Rows that are formatted already "
            "want --template none"
        )


def _say_once(text: str) -> None:
    if text and text not in _said:
        _said.add(text)
        log(text)


def encode_unconditional(
    examples: Sequence[Example], tokenizer: Any, max_length: int = 1024, template: Template | str = "auto"
) -> list[Encoded]:
    """Encodes the last response of each example without its prompt (`length_input` is 0), from `unconditional_start`.

    Raises:
        RequestError: `max_length` is too small.
    """
    check_length(max_length)
    if isinstance(template, str):
        template = resolve_template(template, tokenizer)
    head, what = unconditional_start(tokenizer, template)
    if what != "bos":
        _say_once(f"{_WHY[what].format(tokenizer.bos_token)}: unconditional likelihoods start from {_START[what]}")
    tokens = Tokens(tokenizer)
    encoded = []
    for begin in range(0, len(examples), _BLOCK):
        block = examples[begin : begin + _BLOCK]
        answers = [template.response(example) for example in block]
        tokens.load(answers)
        for answer in answers:
            response = tokens[answer]
            encoded.append(_encoded(head, [([], response, [])], (0, len(response)), max_length))
        tokens.clear()
    return encoded


_WHY = dict.fromkeys(("eos", "second-token"), "the tokenizer has no BOS token")
_WHY |= dict.fromkeys(("template", "chat-eos"), "the tokenizer's BOS {} opens turns of a chat")
_START = {"eos": "EOS", "chat-eos": "EOS", "second-token": "the second token", "template": "the answer's opening alone"}


def unconditional_start(tokenizer: Any, template: Template) -> tuple[list[int], str]:
    """The ids before a response without prompt, and their name.

    "bos", for most. Where BOS opens the turns of the tokenizer's chat template (`<|im_start|>` in ChatML), the model
    expects the name of a speaker after it: there "template", what the template writes before an answer, or "chat-eos"
    (EOS) under another template. Without BOS "eos"; without either "second-token" (no ids): counting starts there.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer = getattr(template, "tokenizer", tokenizer)  # with a chat template of the user's
    opening = chat_opening(tokenizer) if bos is not None and getattr(tokenizer, "chat_template", None) else ""
    if opening and tokenizer.bos_token in opening:
        if template.name == "chat":
            return list(Tokens(tokenizer)._run([opening])[0]), "template"
        if eos is not None:
            return [int(eos)], "chat-eos"
    if bos is not None:
        return [int(bos)], "bos"
    return ([], "second-token") if eos is None else ([int(eos)], "eos")


def _apart(turns: list[Turn], template: Template) -> Iterable[str]:
    yield turns[0].prompt
    if not template.continuous:
        for turn in turns:
            yield turn.prompt
            yield turn.response


def _inside(turns: list[Turn], template: Template) -> Iterable[str]:
    if template.continuous:
        for i, turn in enumerate(turns):
            if i:
                yield turn.prompt
            yield turn.response
            yield turn.end


def _encoded(
    head: list[int],
    turns: list[tuple[list[int], list[int], list[int]]],
    lengths: tuple[int, int],
    max_length: int,
    trained: Sequence[bool] = (True,),
) -> Encoded:
    sizes = [sum(map(len, turn)) for turn in turns]
    total, first, cut_prompt, cut_response = len(head) + sum(sizes), 0, 0, 0
    while total > max_length and first < len(turns) - 1:
        total, cut_prompt, first = total - sizes[first], cut_prompt + sizes[first], first + 1
    turns = turns[first:]
    if total > max_length:
        prompt, response, end = turns[0]
        room = max(max_length // 4, max_length - len(response) - len(end)) - len(head)
        over = max(0, len(prompt) - room)
        prompt, cut_prompt = prompt[over:], cut_prompt + over
        room = max_length - len(head) - len(prompt)
        if len(response) + len(end) > room:
            cut_response, response, end = max(0, len(response) - room), response[:room], []
        turns = [(prompt, response, end)]
    ids, kinds = list(head), [0] * len(head)
    for (prompt, response, end), counts in zip(turns, trained[first:], strict=True):
        ids += prompt + response + end
        kinds += [0] * len(prompt) + [2 * counts] * len(response) + [1 * counts] * len(end)
    kind = np.array(kinds or [0], dtype=np.int8)
    kind[0] = 0  # nothing comes before the first token that could predict it
    return Encoded(np.array(ids or [0], dtype=np.int32), kind == 2, kind > 0, *lengths, cut_prompt, cut_response)
