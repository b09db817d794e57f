"""Random generators as pure functions of (seed, epoch, purpose): no two share a stream, none touches global state."""

from __future__ import annotations

import numpy as np

from im_lightning.errors import RequestError, message

# One number per purpose. A number, once given, stays: changing it would change what old seeds draw.
EPOCH_DRAW = 0
SUBSET_DRAW = 1
DESIGN_SHARES = 2
DESIGN_DIRECTION = 3
DESIGN_DRAW = 4
DESIGN_CHOICE = 5
RULE_BOOTSTRAP = 6
DESIGN_MIXTURES = 7
LOW_RANK_START = 10
LOW_RANK_ORDER = 11
GRADIENT_SKETCH = 12


def generator(seed: int, epoch: int = 0, purpose: int = EPOCH_DRAW) -> np.random.Generator:
    """A generator keyed by the *pair* (seed, epoch).

    Philox takes both as its 128-bit key, so nothing is added or hashed and no two pairs collide; `purpose` (a constant
    of this module) is the high word of its counter.

    Raises:
        RequestError: seed or epoch is not an integer from 0 to 2^64 - 1.
    """
    key = np.array([checked_word("seed", seed), checked_word("epoch", epoch)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], dtype=np.uint64)))


def checked_word(name: str, value: int) -> int:
    """`value` as an int in [0, 2^64); a RequestError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= int(value) < 2**64:
        cause = "it is not an integer from 0 to 2^64 - 1"
        raise RequestError(message(f"{name}={value!r}", cause, f"pass such an integer as {name}"))
    return int(value)
