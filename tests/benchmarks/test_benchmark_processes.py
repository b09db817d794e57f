"""The benchmark's two scoring processes: they really share the pool out, and end with the table of one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rows_processes, timing
from benchmarks.checkpoints import Size
from benchmarks.registry import Setting
from im_lightning.data.score_table import ScoreTable


@pytest.mark.slow
def test_two_processes_score_the_pool_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of two different works would be no ratio."""
    monkeypatch.setattr(rows_processes, "SMALL", Size("tiny", 32, 64, 1, 1, 512))
    monkeypatch.setattr(rows_processes, "_QUICK_ROWS", 30)
    [found] = rows_processes.processes(Setting(tmp_path, quick=True, repeats=2))
    assert found.value > 0 and found.bar == 1.7 and "of a core" in found.note
    assert {len(seconds) for seconds in found.details["seconds"].values()} == {2}
    one, two = (ScoreTable.read(tmp_path / f"round0-{world}" / "scores.parquet") for world in (1, 2))
    assert one.id == two.id and len(one) == 30
    for name in one.indicators:
        np.testing.assert_allclose(one.values[name], two.values[name], rtol=1e-4)


def test_processor_time_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --busy the clock is this process's own work, which is none here: the ratio would be noise."""
    monkeypatch.setattr(timing, "_clock", time.process_time)
    assert list(rows_processes.processes(Setting(tmp_path, quick=True))) == []
