"""UniEval's evaluator: a T5-type model asked a yes-or-no question, answered by the logits of one decoder step.

Zhong et al. 2022, `maszhongming/UniEval`. The score is p(Yes) / (p(Yes) + p(No)) over the first pieces of both words,
which is the sigmoid of the difference of their logits: a form that cannot become 0/0 in half precision.

A response or history that contains `</s>` as text is read with that token in it, as the reference reads it, and noted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.prompt_templates import special_pattern
from im_lightning.data.tokenization import without_surrogates
from im_lightning.errors import RequestError, message
from im_lightning.models.checkpoint import load_config, load_tokenizer, load_weights
from im_lightning.models.scorer import ScorerInput, ScorerModel, note_of

if TYPE_CHECKING:
    import torch

MAX_LENGTH = 1024
NO_HISTORY_LEFT = "history cut away entirely"
HISTORY_CUT = "history cut"
_HISTORY = " </s> dialogue history:"
_NAME_A_T5 = "name a T5-type model trained as UniEval, such as MingZhong/unieval-dialog"


@dataclass(frozen=True)
class Question:
    """A question about a response: `opening` ends before the response's text; `history` is None where none is shown."""

    opening: str
    response: str
    history: str | None = None

    @property
    def text(self) -> str:
        """The input string; `</s>` in it is literal text with one space on each side."""
        asked = self.opening + self.response
        return asked if self.history is None else f"{asked}{_HISTORY} {self.history}"


class UniEvalModel(ScorerModel):
    """A sequence-to-sequence model as evaluator; see `load_unieval`."""

    format = "UniEval"
    causal = False

    def __init__(self, name: str, config: Any, tokenizer: Any, model: Any) -> None:
        self.name, self.tokenizer, self.model, self.body = name, tokenizer, model, model.get_encoder()
        tokenizer.truncation_side = "right"
        positions = getattr(config, "max_position_embeddings", None)  # T5's are relative: it has none
        self.limit = min(MAX_LENGTH, positions) if isinstance(positions, int) and positions > 0 else MAX_LENGTH
        self._special = special_pattern(tokenizer)
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Yes", "No")]
        if not all(words) or words[0][0] == words[1][0]:
            cause = "its tokenizer cannot tell Yes from No by their first pieces"
            raise RequestError(message(name, cause, _NAME_A_T5))
        self.yes, self.no = words[0][0], words[1][0]
        settings = (config, getattr(model, "generation_config", None))
        starts = [getattr(one, "decoder_start_token_id", None) for one in settings]
        start = next((start for start in starts if start is not None), None)
        if start is None:
            raise RequestError(message(name, "its config names no decoder_start_token_id", _NAME_A_T5))
        self._start = int(start)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(self, items: Sequence[Question]) -> list[ScorerInput]:
        """Tokens of questions, cut on the right to `limit`: first the history goes, then the response."""
        ids = self.tokenizer([without_surrogates(question.text) for question in items], verbose=False)["input_ids"]
        return [self._input(question, one) for question, one in zip(items, ids, strict=True)]

    def logits(self, inputs: Sequence[ScorerInput]) -> NDArray[np.float64]:
        """logit(Yes) - logit(No), [B], at the first decoder position."""
        import torch

        with torch.inference_mode():
            batch = self.batch(inputs, self._pad, self.model)
            start = torch.full((len(inputs), 1), self._start, dtype=torch.int64, device=self.model.device)
            answer = self.model(**batch, decoder_input_ids=start, use_cache=False).logits[:, 0].double()
            return (answer[:, self.yes] - answer[:, self.no]).cpu().numpy()

    def _input(self, question: Question, ids: list[int]) -> ScorerInput:
        special = self._special is not None and bool(
            self._special.search(question.response) or self._special.search(question.history or "")
        )
        if len(ids) <= self.limit:
            return ScorerInput(ids, None, note_of(special=special))
        cut = self.tokenizer(without_surrogates(question.text), truncation=True, max_length=self.limit)["input_ids"]
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        asked = question.opening + question.response
        response = self._length(asked) > room
        note = note_of(response=int(response), special=special)
        if question.history is not None:
            gone = response or self._length(asked + _HISTORY) >= room
            note = ", ".join([NO_HISTORY_LEFT if gone else HISTORY_CUT, *([note] if note else [])])
        return ScorerInput(cut, None, note)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(without_surrogates(text), add_special_tokens=False, verbose=False)["input_ids"])


def unieval_config(model: str | os.PathLike[str]) -> Any:
    """The configuration of an evaluator.

    Raises:
        RequestError: it is no sequence-to-sequence model, or there is no such model.
    """
    config = load_config(model)
    if not getattr(config, "is_encoder_decoder", False):
        raise RequestError(message(str(model), f"is no sequence-to-sequence model ({config.model_type})", _NAME_A_T5))
    return config


def load_unieval(
    model: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> UniEvalModel:
    """A UniEval evaluator (T5-type) from a folder or the hub; code that comes with it is never run.

    Raises:
        RequestError: it is no sequence-to-sequence model, or its tokenizer does not tell Yes from No.
    """
    from transformers import AutoModelForSeq2SeqLM

    config = unieval_config(model)
    tokenizer, kind = load_tokenizer(model), "sequence-to-sequence model (UniEval)"
    loaded = load_weights(AutoModelForSeq2SeqLM, model, None, config, dtype, device, kind)
    return UniEvalModel(str(model), config, tokenizer, loaded)
