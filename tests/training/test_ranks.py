"""Scoring on several ranks: shares, waiting by files, and what is said when a rank dies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from fitting import World, trainer

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError
from im_lightning.training.distributed import ranks as waiting
from im_lightning.training.distributed.ranks import Ranks, share


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_cost_alike(world_size: int) -> None:
    costs = np.random.default_rng(0).integers(1, 500, 200).tolist()
    shares = [share(costs, rank, world_size) for rank in range(world_size)]
    assert sorted(row for rows in shares for row in rows) == list(range(200))
    totals = [sum(costs[row] for row in rows) for rows in shares]
    assert max(totals) - min(totals) <= 500


class Spy(pl.Callback):
    """Notes what each rank's score store received, and the table that each rank ended up with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        data.table.write(self.folder / f"table-{trainer.global_rank}.parquet")
        (self.folder / f"rows-{trainer.global_rank}").write_text(" ".join(map(str, sorted(data.rows.tolist()))))


def test_two_ranks_score_together_and_agree(world: World, own_cache: Path) -> None:
    """Ranks with different tables would draw different rows: data would be trained on twice, or not at all."""
    fit = trainer(world.root, strategy="ddp_fork", devices=2, callbacks=[Spy(world.root)])
    fit.fit(world.tuner(), datamodule=world.data(scores=None, subset_size=12, subset_seed=3))
    assert (world.root / "rows-0").read_text() == (world.root / "rows-1").read_text()
    both = [ScoreTable.read(world.root / f"table-{rank}.parquet") for rank in (0, 1)]
    alone = world.data(scores=None, subset_size=12, subset_seed=3, cache_dir=str(world.root / "other cache"))
    alone.trainer = trainer(world.root / "alone")
    alone.setup("fit")
    for name in alone.table.indicators:
        np.testing.assert_array_equal(both[0].values[name], both[1].values[name])
        np.testing.assert_allclose(both[0].values[name], alone.table.values[name], rtol=1e-4)
    import pyarrow.parquet as pq

    pool = ScoreTable.read(world.root / "table-0.parquet")
    written = [
        pq.read_table(path, columns=["id"]).column("id").to_pylist() for path in own_cache.rglob("*/part-*.parquet")
    ]
    shares = [ids for ids in written if 0 < len(set(ids)) < len(set(pool.id))]
    assert {len(set(ids)) for ids in shares} == {20}, "each rank scores half of the pool, and nobody scores it all"


def test_a_rank_that_gives_no_sign_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for ever for a rank that was killed wastes a night."""
    monkeypatch.setattr(waiting, "DEAD_SECONDS", 0.3)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.02)
    here = Ranks(tmp_path / "meet", 0, 2)
    with (
        here.alive(),
        pytest.raises(InstructMiningError, match=r"rank 0 waits for .*rank 1 has given no sign.*rank 1's own"),
    ):
        here.wait_for_all()


class Polls:
    """A clock that moves by the polls alone, however busy the machine is; `act` is called at each with the seconds."""

    def __init__(self, act: Callable[[float], Any]) -> None:
        self.now, self.act = 0.0, act

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.now)


def wait_while_another(folder: Path, monkeypatch: pytest.MonkeyPatch, beats: Callable[[float], float | None]) -> float:
    """Rank 0 waits while rank 1's heartbeat has the time that `beats` says, None: it is done. The seconds it took."""
    other = Ranks(folder / "meet", 1, 2)

    def act(now: float) -> None:
        beat = beats(now)
        if beat is None:
            other.finish()
        else:
            other._beat(1).touch()
            os.utime(other._beat(1), (beat, beat))

    clock = Polls(act)
    monkeypatch.setattr(waiting, "time", clock)
    here = Ranks(folder / "meet", 0, 2)
    with here.alive():
        here.wait_for_all()
    return clock.now


def test_a_slow_rank_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it gives a sign now and then."""
    hour = 3600.0
    took = wait_while_another(tmp_path, monkeypatch, lambda now: None if now > hour else 40.0 * (now // 40))
    assert took == pytest.approx(hour, abs=1)
    with pytest.raises(InstructMiningError, match="rank 1 has given no sign for 50 s"):
        wait_while_another(tmp_path / "rarer", monkeypatch, lambda now: 60.0 * (now // 60))


def test_a_rank_that_fails_is_named_at_once_with_its_error(tmp_path: Path) -> None:
    """The error of rank 1 may be lost in another machine's log; and a minute of all GPUs is not free."""
    here, other = Ranks(tmp_path / "meet", 0, 2), Ranks(tmp_path / "meet", 1, 2)
    with pytest.raises(ValueError, match="bad"), other.alive():
        raise ValueError("bad \udcff row")
    with here.alive(), pytest.raises(InstructMiningError, match=r"rank 0 waits for .*but rank 1 failed: bad . row"):
        here.wait_for_all()  # not "has given no sign", which would be a minute later

    # started again: what the earlier attempt left does not count
    again = Ranks(tmp_path / "meet", 0, 2)
    with again.alive():
        assert again._told(1) is None


def test_clocks_need_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server whose clock is an hour behind must not make every rank look dead."""
    long_ago = time.time() - 3600
    took = wait_while_another(tmp_path, monkeypatch, lambda now: None if now > 300 else long_ago + now // 5)
    assert took == pytest.approx(300, abs=1)


def test_an_earlier_attempts_files_do_not_count(tmp_path: Path) -> None:
    """A rank restarted after a crash must not be taken for finished because it once was."""
    old = Ranks(tmp_path / "meet", 1, 2)
    with old.alive():
        old.finish()
    again = Ranks(tmp_path / "meet", 1, 2)
    with again.alive():
        assert not (tmp_path / "meet" / "rank-1.done").exists()


def test_one_rank_leaves_no_files(tmp_path: Path) -> None:
    only = Ranks(tmp_path / "meet", 0, 1)
    with only.alive():
        only.finish()
        only.wait_for_all()
    assert not (tmp_path / "meet").exists()
