"""What reward models and UniEval have in common: one number per text, from texts of tokens cut to a limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.prompt_templates import SPECIAL_TOKEN
from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch

PROMPT, REPLY, KEPT = 0, 1, 2


@dataclass(frozen=True)
class ScorerInput:
    """One text as its scorer model reads it.

    Args:
        ids: Token ids, kept as int32 [T].
        types: Token type ids, for models that take them, kept as int32 [T]; else None.
        note: What was cut, or is odd, or None.
        reason: Why the model cannot read it, and has no ids then; else None.
    """

    ids: Sequence[int] | NDArray[np.int32] = ()
    types: Sequence[int] | NDArray[np.int32] | None = None
    note: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.int32))
        if self.types is not None:
            object.__setattr__(self, "types", np.asarray(self.types, dtype=np.int32))


class ScorerModel(ABC):
    """A model that answers a text with one number.

    Attributes:
        limit: Most tokens of a text.
        format: How it reads a text, for the log.
        name: Its folder or hub id.
        body: The part that reads the text, for counting its work.
        causal: Whether its tokens see only what precedes them.
    """

    limit: int
    format: str
    name: str
    body: Any
    causal: bool

    def batch(self, inputs: Sequence[ScorerInput], pad_id: int, model: Any) -> dict[str, torch.Tensor]:
        """The inputs as the model takes them, on its device.

        Raises:
            RequestError: the tokenizer knows tokens that the model does not.
        """
        highest, known = max(int(np.max(one.ids)) for one in inputs), model.config.get_text_config().vocab_size
        if highest >= known:
            cause = f"its tokenizer makes token {highest}, and the model has {known}"
            raise RequestError(message(self.name, cause, "save the tokenizer that belongs to the model beside it"))
        return padded(inputs, pad_id, next(model.parameters()).device)

    @abstractmethod
    def encode(self, items: Sequence[Any]) -> list[ScorerInput]:
        """Tokens of n texts (each what the indicator's `judged` made), in order."""

    @abstractmethod
    def logits(self, inputs: Sequence[ScorerInput]) -> NDArray[np.float64]:
        """The answers, float64 [B]; NaN or infinite where the model's own are."""


def cut(part: NDArray[np.int8], limit: int) -> tuple[NDArray[np.bool_], int, int]:
    """What stays of T tokens where `limit` are allowed: the prompt loses its beginning, then the reply its end.

    An eighth of the limit remains to the prompt (OpenAssistant's 256 of 2048), if it has so much.

    Args:
        part: [T], whether each token is `PROMPT`, `REPLY` or `KEPT` in any case.
        limit: Tokens allowed.

    Returns:
        Which tokens stay, bool [T]; how many of the prompt and of the reply go.

    >>> keep, of_prompt, of_reply = cut(np.array([2, 0, 0, 0, 1, 1, 2], dtype=np.int8), 5)
    >>> keep.tolist(), of_prompt, of_reply
    ([True, False, False, True, True, True, True], 2, 0)
    """
    keep = np.ones(len(part), dtype=np.bool_)
    if len(part) <= limit:
        return keep, 0, 0
    prompt, reply = np.flatnonzero(part == PROMPT), np.flatnonzero(part == REPLY)
    room = max(0, limit - (len(part) - len(prompt) - len(reply)))
    of_prompt = min(len(prompt), max(limit // 8, room - len(reply)), room)
    of_reply = min(len(reply), room - of_prompt)
    keep[prompt[: len(prompt) - of_prompt]] = False
    keep[reply[of_reply:]] = False
    return keep, len(prompt) - of_prompt, len(reply) - of_reply


def note_of(prompt: int = 0, response: int = 0, special: bool = False) -> str | None:
    """Words for tokens cut away, and for a text in which the tokenizer finds a special token."""
    parts = [name for name, tokens in (("prompt", prompt), ("response", response)) if tokens]
    words = [f"{' and '.join(parts)} cut"] if parts else []
    return ", ".join([*words, *([SPECIAL_TOKEN] if special else [])]) or None


def padded(inputs: Sequence[ScorerInput], pad_id: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and, where there are any, `token_type_ids`: int64 [B, T], padded on the right."""
    import torch

    width = max(len(one.ids) for one in inputs)
    batch = {
        "input_ids": np.full((len(inputs), width), pad_id, dtype=np.int64),
        "attention_mask": np.zeros((len(inputs), width), dtype=np.int64),
    }
    if inputs[0].types is not None:
        batch["token_type_ids"] = np.zeros((len(inputs), width), dtype=np.int64)
    for row, one in enumerate(inputs):
        batch["input_ids"][row, : len(one.ids)] = one.ids
        batch["attention_mask"][row, : len(one.ids)] = 1
        if one.types is not None:
            batch["token_type_ids"][row, : len(one.ids)] = one.types
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
