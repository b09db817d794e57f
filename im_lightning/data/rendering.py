"""What a template is, and the Alpaca template: conversations as turns of (prompt, response, end) text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from im_lightning._utils.hashing import digest_json
from im_lightning.data.example import Example

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
    """One assistant turn: all text since the last one, its own text, and what the template closes it with."""

    prompt: str
    response: str
    end: str


class Template(ABC):
    """Renders examples as text.

    Attributes:
        name: "alpaca" or "chat".
        identity: Digest of what determines the rendering, and of nothing else.
        end_ids: Token ids that close each assistant turn in place of `Turn.end`, or None.
        continuous: Whether the turns are pieces of one running text, rather than texts set side by side. It matters to
            tokenizers that put a space before each text.
    """

    name: str
    identity: str
    end_ids: tuple[int, ...] | None = None
    continuous: bool = False

    @abstractmethod
    def render(self, example: Example, where: str = "the example") -> list[Turn]:
        """The example's assistant turns in order; `where` names it in errors.

        Raises:
            RequestError: the template cannot render this conversation.
        """


class AlpacaTemplate(Template):
    """The template of Stanford Alpaca (`train.py`, PROMPT_DICT); the tokenizer's EOS closes each response.

    Later turns repeat the instruction and response headings. A system turn takes the place of the opening paragraph.
    """

    name = "alpaca"

    def __init__(self, tokenizer: Any) -> None:
        eos = tokenizer.eos_token_id
        self.end_ids = () if eos is None else (int(eos),)
        parts = (ALPACA_PREAMBLE, ALPACA_PREAMBLE_WITH_INPUT, _INSTRUCTION, _INPUT, _RESPONSE, _GAP)
        self.identity = digest_json({"template": "alpaca", "version": 1, "parts": parts})

    def render(self, example: Example, where: str = "the example") -> list[Turn]:
        turns: list[Turn] = []
        with_input = bool(example.input) and example.instruction is not None
        bordered = _last_user(example) if with_input else -1
        pending = "" if example.messages[0].role == "system" else self._preamble(with_input) + _GAP
        for i, turn in enumerate(example.messages):
            if turn.role == "assistant":
                turns.append(Turn(pending + _RESPONSE, turn.content, ""))
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


def _last_user(example: Example) -> int:
    roles: Iterable[int] = (i for i, turn in enumerate(example.messages) if turn.role == "user")
    return max(roles, default=-1)
