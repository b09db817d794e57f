"""Small synthetic pools for scoring tests."""

from __future__ import annotations

import numpy as np

from im_lightning.data.example import Example, Message

TEXT = "give tips for healthy colors red blue atom nucleus air many ways number listed exercise"
WORDS = np.array(TEXT.split())


def alpaca(instruction: str, output: str, input: str = "", source: str = "s") -> Example:
    text = instruction + (f"\n{input}" if input else "")
    return Example((Message("user", text), Message("assistant", output)), instruction, input, source)


def make_pool(n: int = 24, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [alpaca(text(12), text(40), text(5) if i % 3 == 0 else "") for i in range(n)]
