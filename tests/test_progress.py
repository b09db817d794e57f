"""What is said of work under way: the speed of slow work too, whose runs per second are all zero."""

from __future__ import annotations

import pytest

from im_lightning._utils import progress as _progress
from im_lightning._utils.progress import Progress


@pytest.mark.parametrize(
    ("seconds", "amount", "said"),
    [(40.0, 1.0, "1 of 50 runs, 40 s each, 1,960 s left"), (20.0, 50.0, "50 of 50 runs, 2/s, 0 s left")],
)
def test_slow_work_has_a_speed(monkeypatch, capsys, seconds: float, amount: float, said: str) -> None:
    """A comparison's finetunes take minutes each: "0/s" says nothing about when to come back."""
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    work = Progress("finetunes", 50, "runs")
    clock[0] = seconds
    work.advance(amount)
    assert said in capsys.readouterr().err
