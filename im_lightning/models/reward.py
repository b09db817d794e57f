"""Reward models: a conversation in, one raw logit out.

Three ways to read a conversation:

- OpenAssistant's GPT-NeoX models: `<|prompter|>{Q}<|endoftext|><|assistant|>{A}<|endoftext|>`, no newlines;
- decoders whose tokenizer has a chat template: the conversation as the template writes it;
- all others: the pair (earlier turns joined by newlines, last response), as `tokenizer(question, answer)` makes it.

Prompt and response stay the text that people wrote: what reads like a special token in it (`<|endoftext|>`) becomes
that token, as in the reference implementations, and is noted.

The class of OpenAssistant's models is not part of transformers, hence it is here: GPT-NeoX and `out_proj`, a linear
layer with bias from the hidden state of the last token to one number (Open-Assistant,
`model_training/models/reward_model.py`). The names of the weights are those of its checkpoints.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel

from im_lightning.data.example import Example
from im_lightning.data.prompt_templates import special_pattern
from im_lightning.data.tokenization import resolve_template, without_surrogates
from im_lightning.errors import RequestError, message
from im_lightning.models.checkpoint import load_config, load_tokenizer, load_weights
from im_lightning.models.scorer import KEPT, PROMPT, REPLY, ScorerInput, ScorerModel, cut, note_of

MAX_LENGTH = 2048
TOO_LONG = "too long for a tokenizer that does not say where its tokens are"
REFUSED = "the reward model's chat template cannot render it"
NO_TOOLS = "the reward model's format has no place for a tool's turn"
MODEL_TYPE = "gpt_neox_reward_model"
POOLINGS = ("last", "mean")
_PROMPTER, _ASSISTANT, _SYSTEM, _END = "<|prompter|>", "<|assistant|>", "<|system|>", "<|endoftext|>"
_MARKS = {"user": _PROMPTER, "assistant": _ASSISTANT, "system": _SYSTEM}
_FIRST_POSITION_AFTER_PAD = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet")


class RewardModel(ScorerModel):
    """A one-label sequence classifier; see `load_reward_model`."""

    def __init__(self, name: str, config: Any, tokenizer: Any, model: Any) -> None:
        self.name, self.body = name, model.base_model
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.format, self.limit = _format(config, tokenizer), _limit(config, tokenizer)
        self.causal = not _is_encoder(config)
        self._special = special_pattern(tokenizer)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        if self.format == "OpenAssistant":
            lacking = [t for t in (_PROMPTER, _ASSISTANT, _END) if t not in tokenizer.get_vocab()]
            if lacking:
                cause = f"its tokenizer lacks the tokens {', '.join(lacking)} of the OpenAssistant format"
                remedy = "save the tokenizer that belongs to the reward model beside it"
                raise RequestError(message(name, cause, remedy))
            self._has_system = _SYSTEM in tokenizer.get_vocab()
        elif self.format == "chat":
            self._template: Any = resolve_template("chat", tokenizer)

    def encode(self, items: Sequence[Example]) -> list[ScorerInput]:
        """Tokens of conversations: the whole of each, cut to `limit`."""
        if self.format == "OpenAssistant":
            return self._encode_oasst(items)
        return self._encode_chat(items) if self.format == "chat" else self._encode_pairs(items)

    def logits(self, inputs: Sequence[ScorerInput]) -> NDArray[np.float64]:
        """Raw logits [B], no sigmoid."""
        with torch.inference_mode():
            pad_id, model = self._padding(inputs)
            return model(**self.batch(inputs, pad_id, model)).logits[:, 0].double().cpu().numpy()

    def _padding(self, inputs: Sequence[ScorerInput]) -> tuple[int, Any]:
        """The model's own padding token, else one that none of these rows has, and a model that knows it.

        Decoders of transformers take the last token that is not the padding token, and refuse batches without one:
        the model is told of ours, so that the last token of each row counts, as it does in a row by itself. Told is a
        copy that shares the weights: other lanes may be at work on batches that take another token.
        """
        config = self.config.get_text_config()
        own = config.pad_token_id
        if isinstance(own, int) and 0 <= own < config.vocab_size:
            return own, self.model
        taken = set(np.concatenate([one.ids for one in inputs]).tolist())
        spare = next((token for token in range(config.vocab_size) if token not in taken), 0)
        model = copy.copy(self.model)
        model.config = copy.deepcopy(self.model.config)
        for settings in (model.config, model.config.get_text_config()):
            settings.pad_token_id = spare
        return spare, model

    def _note(self, example: Example, of_prompt: int = 0, of_reply: int = 0) -> str | None:
        special = self._special is not None and any(self._special.search(turn.content) for turn in example.messages)
        return note_of(of_prompt, of_reply, special)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        clean = [without_surrogates(text) for text in texts]
        return self.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"]

    def _cut(
        self, example: Example, ids: Sequence[int], part: NDArray[np.int8], types: Sequence[int] | None = None
    ) -> ScorerInput:
        keep, of_prompt, of_reply = cut(part, self.limit)
        kinds = None if types is None else np.asarray(types)[keep]
        return ScorerInput(np.asarray(ids)[keep], kinds, self._note(example, of_prompt, of_reply))

    def _encode_oasst(self, examples: Sequence[Example]) -> list[ScorerInput]:
        readable = [all(turn.role in _MARKS for turn in example.history) for example in examples]
        rows = [example for example, known in zip(examples, readable, strict=True) if known]
        prompts = iter(self._ids(["".join(self._oasst_turns(example)) for example in rows]))
        replies = iter(self._ids([f"{_ASSISTANT}{example.response}{_END}" for example in rows]))
        found = []
        for example, known in zip(examples, readable, strict=True):
            if not known:
                found.append(ScorerInput(reason=NO_TOOLS))
                continue
            prompt, reply = next(prompts), next(replies)
            part = np.repeat(np.array([PROMPT, REPLY], dtype=np.int8), [len(prompt), len(reply)])
            found.append(self._cut(example, [*prompt, *reply], part))
        return found

    def _oasst_turns(self, example: Example) -> list[str]:
        """All turns before the last response; system text stands before the next turn where it has no token."""
        turns, pending = [], ""
        for turn in example.history:
            if turn.role == "system" and not self._has_system:
                pending += f"{turn.content}\n"
                continue
            turns.append(f"{_MARKS[turn.role]}{pending}{turn.content}{_END}")
            pending = ""
        return [*turns, f"{_PROMPTER}{pending[:-1]}{_END}"] if pending else turns

    def _encode_chat(self, examples: Sequence[Example]) -> list[ScorerInput]:
        texts: list[str | None] = []
        for example in examples:
            try:
                texts.append(without_surrogates(self._template.conversation(example)))
            except RequestError:
                texts.append(None)
        ids = iter(self._ids([text for text in texts if text is not None]))
        found = []
        for example, text in zip(examples, texts, strict=True):
            if text is None:
                found.append(ScorerInput(reason=REFUSED))
                continue
            one = next(ids)
            if len(one) <= self.limit:
                found.append(ScorerInput(one, None, self._note(example)))
            elif not self.tokenizer.is_fast:
                found.append(ScorerInput(reason=TOO_LONG))
            else:
                found.append(self._cut(example, one, self._parts_of_chat(example, text)))
        return found

    def _parts_of_chat(self, example: Example, text: str) -> NDArray[np.int8]:
        """The template's BOS and what it puts after the response stay: decoders answer at the last token."""
        answer = without_surrogates(example.response.strip())
        start = max(0, text.rfind(answer))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoded["offset_mapping"])
        part = np.full(len(offsets), REPLY, dtype=np.int8)
        part[offsets[:, 1] <= start] = PROMPT
        part[offsets[:, 0] >= start + len(answer)] = KEPT
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            part[0] = KEPT
        return part

    def _encode_pairs(self, examples: Sequence[Example]) -> list[ScorerInput]:
        questions = [without_surrogates("\n".join(turn.content for turn in one.history)) for one in examples]
        answers = [without_surrogates(one.response) for one in examples]
        pairs = self.tokenizer(questions, answers, verbose=False)
        types = pairs.get("token_type_ids") if self._takes_types else None
        found = []
        for row, (example, ids) in enumerate(zip(examples, pairs["input_ids"], strict=True)):
            kinds = None if types is None else types[row]
            if len(ids) <= self.limit:
                found.append(ScorerInput(ids, kinds, self._note(example)))
            elif not self.tokenizer.is_fast:
                found.append(ScorerInput(reason=TOO_LONG))
            else:
                codes = {None: KEPT, 0: PROMPT, 1: REPLY}
                part = np.array([codes[which] for which in pairs.sequence_ids(row)], dtype=np.int8)
                found.append(self._cut(example, ids, part, kinds))
        return found


def reward_config(model: str | os.PathLike[str]) -> Any:
    """The configuration of a reward model, which says whether it is one.

    Raises:
        RequestError: it gives several labels, or there is no such model.
    """
    AutoConfig.register(MODEL_TYPE, GPTNeoXRewardModelConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel, exist_ok=True)
    config = load_config(model)
    if config.model_type != MODEL_TYPE and config.num_labels != 1:
        cause = f"is no reward model: it gives {config.num_labels} labels, a reward is one"
        remedy = "name a sequence classifier with one label, such as OpenAssistant/reward-model-deberta-v3-large-v2"
        raise RequestError(message(str(model), cause, remedy))
    return config


def load_reward_model(
    model: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> RewardModel:
    """A reward model from a folder or the hub; code that comes with it is never run.

    It is a one-label sequence classifier of transformers, or a `gpt_neox_reward_model` of OpenAssistant.

    Raises:
        RequestError: it is no such model, it gives several labels, or it cannot be loaded.
    """
    config = reward_config(model)
    tokenizer, kind = load_tokenizer(model), "sequence classifier (reward model)"
    loaded = load_weights(AutoModelForSequenceClassification, model, None, config, dtype, device, kind)
    return RewardModel(str(model), config, tokenizer, loaded)


def _format(config: Any, tokenizer: Any) -> str:
    """A chat template beside an encoder is not what it reads."""
    if config.model_type == MODEL_TYPE:
        return "OpenAssistant"
    return "chat" if getattr(tokenizer, "chat_template", None) and not _is_encoder(config) else "pair"


def _is_encoder(config: Any) -> bool:
    """Families that have a masked language model are encoders."""
    return bool(config.is_encoder_decoder) or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _limit(config: Any, tokenizer: Any) -> int:
    limits = [MAX_LENGTH]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = (config.pad_token_id or 0) + 1 if config.model_type in _FIRST_POSITION_AFTER_PAD else 0
        limits.append(positions - offset)
    if isinstance(tokenizer.model_max_length, int) and tokenizer.model_max_length > 0:
        limits.append(tokenizer.model_max_length)
    return min(limits)


class GPTNeoXRewardModelConfig(GPTNeoXConfig):
    """GPT-NeoX's configuration and `pooling`: "last" (the last real token's state) or "mean" (of all real tokens)."""

    model_type = MODEL_TYPE
    pooling: str = "last"


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    """One raw logit per text."""

    config_class = GPTNeoXRewardModelConfig

    def __init__(self, config: GPTNeoXRewardModelConfig) -> None:
        super().__init__(config)
        if config.pooling not in POOLINGS:
            raise ValueError(f"pooling {config.pooling!r} is none of {', '.join(POOLINGS)}")
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.pooling = config.pooling
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits [B, 1] of token ids [B, T]; `attention_mask` [B, T] is 1 on real tokens, padded on the right."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.gpt_neox(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        else:
            last = attention_mask.cumsum(dim=1).argmax(dim=1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutput(logits=self.out_proj(pooled))
