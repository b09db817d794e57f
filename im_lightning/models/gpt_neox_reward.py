"""OpenAssistant's GPT-NeoX reward models, whose class is not part of transformers.

GPT-NeoX and `out_proj`, a linear layer with bias from the hidden state of the last token to one number
(Open-Assistant, `model_training/models/reward_model.py`). The names of the weights are those of its checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel

MODEL_TYPE = "gpt_neox_reward_model"
POOLINGS = ("last", "mean")


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


def register() -> None:
    """Makes the class known to transformers' Auto classes, in this process; may be called again."""
    AutoConfig.register(MODEL_TYPE, GPTNeoXRewardModelConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel, exist_ok=True)
