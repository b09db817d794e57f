"""What the training tests share: encoded rows, batches, and a Trainer without side effects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning.models.batching import collate


def encoded_rows(n: int, seed: int = 0, empty: tuple[int, ...] = ()) -> list[Any]:
    """n rows of random tokens with responses of very different lengths; those in `empty` have no response token."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt, response = int(rng.integers(2, 6)), int(rng.integers(1, 14))
        ids = rng.integers(5, 200, size=prompt + response).astype(np.int32)
        mask = np.arange(prompt + response) >= prompt
        if i in empty:
            mask = np.zeros_like(mask)
        rows.append(SimpleNamespace(input_ids=ids, response_mask=mask, loss_mask=mask))
    return rows


def batch_of(rows: list[Any], positions: list[int]) -> dict[str, Tensor]:
    return {**collate([rows[i] for i in positions], 0, "loss_mask"), "row": torch.tensor(positions)}


def trainer(root: str | Path, **options: Any) -> Any:
    """A Trainer on the CPU that writes only what `options` ask for."""
    import pytorch_lightning as pl

    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(root),
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **options})
