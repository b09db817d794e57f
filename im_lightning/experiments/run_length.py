"""How long a finetune is, before it is made: its optimiser steps and epochs, as Lightning will end it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from im_lightning.errors import RequestError, message

EPOCHS = 3
"""Of `im-lightning fit` where nothing else is asked for."""
_ENDLESS = 1000  # epochs of a Lightning Trainer that is given neither these nor steps


def run_length(rows: int, batch: int, trainer: Mapping[str, Any]) -> tuple[int, float]:
    """Optimiser steps of a run, and how often it sees its rows.

    Args:
        rows: Of an epoch.
        batch: Rows of a batch, over all devices.
        trainer: Arguments of a Trainer: `max_epochs`, `max_steps`, `accumulate_grad_batches`.

    Raises:
        RequestError: nothing ends the run.

    >>> run_length(24, 8, {"max_epochs": 2}), run_length(24, 8, {"max_epochs": -1, "max_steps": 4})
    ((6, 2.0), (4, 1.3333333333333333))
    """
    each = math.ceil(math.ceil(rows / batch) / (trainer.get("accumulate_grad_batches") or 1))
    most, epochs = int(trainer.get("max_steps") or -1), trainer.get("max_epochs", EPOCHS)
    if epochs is None:
        epochs = -1 if most > 0 else _ENDLESS
    ends = [end for end in (int(epochs) * each, most) if end > 0]
    if not ends:
        cause = "neither max_epochs nor max_steps ends it, so that what it takes is not known"
        raise RequestError(message("the run", cause, "give the Trainer one of them"))
    return min(ends), min(ends) / each


def run_length_of(recipe: Mapping[str, Any], rows: int) -> tuple[int, float]:
    """`run_length` of a run on so many rows by a recipe of `im-lightning fit`.

    Raises:
        RequestError: as `run_length`.
    """
    data, trainer = recipe.get("data") or {}, recipe.get("trainer") or {}
    devices = device_count(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
    return run_length(rows, int(data.get("batch_size") or 8) * devices, trainer)


def device_count(asked: Any) -> int:
    """Devices that a recipe names; 1 where it leaves them to Lightning.

    >>> [device_count(asked) for asked in (None, "auto", -1, 2, "2", [0, 3], "0,3")]
    [1, 1, 1, 2, 2, 2, 2]
    """
    if isinstance(asked, str) and "," in asked:
        asked = asked.split(",")
    if isinstance(asked, list | tuple):
        return max(1, len(asked))
    return max(1, int(asked)) if str(asked).isdigit() else 1


def epochs_text(epochs: float) -> str:
    """For a sentence.

    >>> epochs_text(1), epochs_text(3.0), epochs_text(4 / 3)
    ('1 epoch', '3 epochs', '1.33 epochs')
    """
    return f"{round(epochs, 2):,g} epoch{'s' if epochs != 1 else ''}"
