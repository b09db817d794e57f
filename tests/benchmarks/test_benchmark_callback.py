"""The benchmark of the callback: that it compares what it says it compares. Its figures are no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows_callback
from benchmarks.checkpoints import Size
from benchmarks.registry import Setting, subjects


def test_the_two_models_have_the_sizes_they_are_named_after() -> None:
    assert 2.8e6 < rows_callback.TINY.parameters < 3.3e6
    assert 0.95e8 < rows_callback.HUNDRED.parameters < 1.05e8


def test_every_second_block_has_the_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the flush charged to the block without it, the callback would look free."""
    pool = tmp_path / "rows.jsonl"
    with pool.open("w") as stream:
        for i in range(700):
            row = {"instruction": f"Say {i}.", "output": f"{i} and then {i + 1} words"}
            stream.write(json.dumps(row) + "\n")
    seen: list[int] = []

    class Counting(rows_callback.Alternating):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            before = len(self.inner.live._buffer)
            super().on_train_batch_end(trainer, *args)
            if len(self.inner.live._buffer) > before:
                seen.append(trainer.global_step - 1)

    monkeypatch.setattr(rows_callback, "TINY", Size("tiny", 32, 64, 1, 2, 400))
    monkeypatch.setattr(rows_callback, "Alternating", Counting)
    setting = Setting(tmp_path, data=pool, quick=True, repeats=1)
    hooks, paired = subjects("callback")["callback"](setting)
    assert seen == [s for s in range(81) if s % 20 < 10], "ten steps with it, ten without"
    seconds = hooks.details["seconds"]
    assert len(seconds["with"]) == len(seconds["without"]) == len(hooks.details["in_hooks"]) == 3
    assert all(0 < inside < block for inside, block in zip(hooks.details["in_hooks"], seconds["with"], strict=True))
    assert hooks.bar == paired.bar == 0.05 and not hooks.at_least
