"""Keeping the global random state apart from work that only sometimes happens.

Scoring is skipped when the store has the values. Were its draws to move the global generators, the same seed would
give one adapter start with a cold store and another with a warm one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keep_rng() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, numpy and torch (CPU, CUDA) go on as if it had not been."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is the subject
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
