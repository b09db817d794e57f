"""How the playground's models are trained and kept: a plain loop on the CPU, and a checkpoint folder made whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from im_lightning._utils.progress import progress


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
    from transformers.utils import logging

    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if bars:
            logging.enable_progress_bar()
