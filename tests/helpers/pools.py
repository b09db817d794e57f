"""Small synthetic pools, rows as files, and tables that are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning.data.example import Example, Message
from im_lightning.data.score_table import ScoreTable

TEXT = "give tips for healthy colors red blue atom nucleus air many ways number listed exercise"
WORDS = np.array(TEXT.split())


def alpaca(instruction: str, output: str, input: str = "") -> Example:
    text = instruction + (f"\n{input}" if input else "")
    return Example((Message("user", text), Message("assistant", output)), instruction, input, "s")


def make_pool(n: int = 24, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [alpaca(text(12), text(40), text(5) if i % 3 == 0 else "") for i in range(n)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """The rows as JSON Lines; returns the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def same_table(a: ScoreTable, b: ScoreTable) -> None:
    assert a.id == b.id and a.reasons == b.reasons and a.keys == b.keys
    for name in a.indicators:
        np.testing.assert_array_equal(a.values[name], b.values[name], err_msg=name)
