"""Answers of a causal language model, in batches: most likely token by most likely token, or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from im_lightning.models.likelihood import base_model, evaluating


@dataclass(frozen=True)
class Made:
    """One answer: its tokens without what ends it, and whether it was cut at the limit instead of ending."""

    tokens: list[int]
    cut: bool


def generate(
    network: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    pad: int,
    most: int,
    temperature: float = 0.0,
) -> list[Made]:
    """The answers to a batch of prompts.

    Args:
        network: A causal LM of transformers, perhaps with an adapter.
        prompts: Token ids of each prompt, with what opens the answer.
        ends: What ends an answer, each as token ids: the template's end of turn, EOS.
        pad: Token that fills shorter prompts, on their left (`padding_id`).
        most: Most tokens of an answer.
        temperature: 0 takes the most likely token each time; else tokens are drawn from torch's generator.
    """
    from transformers import StoppingCriteriaList

    device = next(network.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    single = sorted({end[0] for end in ends if len(end) == 1})
    several = [list(end) for end in ends if len(end) > 1]
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    with evaluating(network), _nothing_of_its_own(base_model(network)), torch.no_grad():
        made = network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=single or None,
            stopping_criteria=StoppingCriteriaList([_ended(several, width)] if several else []),
            **drawn,
        )[:, width:]
    return [_cut(tokens, ends, most) for tokens in made.tolist()]


@contextmanager
def _nothing_of_its_own(base: Any) -> Iterator[None]:
    """Without the settings that a checkpoint brings along: under Qwen2.5's penalty on repeated words, the token
    taken is not the most likely one, and `generate` fills them in wherever its own arguments name nothing else."""
    from transformers import GenerationConfig

    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _ended(ends: list[list[int]], width: int) -> Any:
    """Stops a row whose answer ends in one of these."""

    def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = ids[:, width:].tolist()
        return torch.tensor([any(row[-len(end) :] == end for end in ends) for row in new], device=ids.device)

    return criterion


def _cut(tokens: list[int], ends: Sequence[Sequence[int]], most: int) -> Made:
    for at in range(len(tokens)):
        if any(tokens[at : at + len(end)] == list(end) for end in ends):
            return Made(tokens[:at], False)
    return Made(tokens[:most], True)
