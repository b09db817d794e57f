"""How the playground's models read, are trained and kept: a token per word, a plain loop, a folder made whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from im_lightning._utils.progress import progress, without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train(
    model: Any, loss_of: Callable[[int], Any], steps: int, learning_rate: float, warmup: int, title: str
) -> list[float]:
    """Minimises `loss_of(step)`: AdamW, gradients clipped to 1, linear warm-up, cosine down to a twentieth.

    Args:
        model: Trained in place; in evaluation mode afterwards.
        loss_of: Gives the loss of one batch, a scalar tensor.
        steps: Optimiser steps.
        learning_rate: Its largest value.
        warmup: Steps until then.
        title: For the progress line.

    Returns:
        The loss of each step.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    with progress(title, steps, "steps") as bar:
        for step in range(steps):
            share = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * share
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.advance()
    model.eval()
    return losses


def save_checkpoint(path: str | os.PathLike[str], model: Any, tokenizer: Any) -> None:
    """Writes a checkpoint folder, which appears whole or not at all; an older one is replaced."""
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with without_bars():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def made(model: Any, losses: list[float]) -> dict[str, Any]:
    """Summary of a trained model: parameters (weights), loss (mean of the last tenth of the steps)."""
    last = losses[-max(1, len(losses) // 10) :]
    return {"parameters": sum(p.numel() for p in model.parameters()), "loss": float(np.mean(last))}


def word_tokenizer(words: Sequence[str], text: str, mark: str, **special: Any) -> PreTrainedTokenizerFast:
    """One token per word, split at white space.

    Args:
        words: The vocabulary, in order of the ids.
        text: How a text is written: "<s> $A".
        mark: The special token in it.
        special: Of `PreTrainedTokenizerFast`: pad_token, unk_token, ….
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    entries = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(WordLevel(entries, unk_token=special["unk_token"]))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single=text, special_tokens=[(mark, entries[mark])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=1024, **special)
