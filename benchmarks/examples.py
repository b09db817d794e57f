"""Synthetic instruction rows whose word counts follow those of real instruction data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.example import Example, Message

# Words at these quantiles of 20,172 rows of Alpaca, Alpaca-GPT4, Dolly, GSM8K, LIMA, self-instruct and role play.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
INSTRUCTION_WORDS = (3, 6, 9, 14, 25, 62, 157, 1930)
RESPONSE_WORDS = (1, 1, 10, 36, 74, 184, 416, 2860)
_SYLLABLES = ("ba", "co", "di", "fe", "gu", "la", "mi", "no", "pe", "ra", "si", "tu", "ve", "wo", "xi", "za")


def made_up_examples(n: int) -> list[Example]:
    """n distinct rows of random words, lengths drawn from the quantiles above."""
    rng = np.random.default_rng(0)
    words = np.array([a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in ("", "n", "r", "s")])
    share = 1.0 / np.arange(1, len(words) + 1)  # Zipf, as words are
    asked, answered = (_lengths(rng, n, counts) for counts in (INSTRUCTION_WORDS, RESPONSE_WORDS))
    drawn = words[rng.choice(len(words), int(asked.sum() + answered.sum()), p=share / share.sum())]
    examples, start = [], 0
    for i in range(n):
        middle, end = start + asked[i], start + asked[i] + answered[i]
        instruction = f"{' '.join(drawn[start:middle])} ({i})"
        turns = (Message("user", instruction), Message("assistant", " ".join(drawn[middle:end])))
        examples.append(Example(turns, instruction, "", "synthetic"))
        start = end
    return examples


def _lengths(rng: np.random.Generator, n: int, counts: tuple[int, ...]) -> NDArray[np.int64]:
    """Log-linear between the quantiles."""
    return np.exp(np.interp(rng.random(n), QUANTILES, np.log(counts))).round().astype(np.int64)
