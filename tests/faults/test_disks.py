"""Disks that are full, read-only or gone, many processes at once: a clear error, nothing half-written, nothing lost.

A full disk is a file system of a few hundred kB where one may be mounted, and a limit on the size of files (the same
error from the same calls) everywhere.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fitting import make_world, trainer
from killing import BROKEN, child, run, wait
from pools import make_pool
from simulated_ledger import make_record

from im_lightning.data.loading import write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError
from im_lightning.indicators.base import Indicator, register_indicator
from im_lightning.ledger.ledger import RunLedger
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.store import Join, Store
from im_lightning.training.callback import InstructMiningCallback

NUMERICS = {"precision": "fp32"}


@contextmanager
def small_disk(folder: Path, size: str = "300k") -> Iterator[Callable[[str], None]]:
    """A file system of its own at `folder`; yields a function that mounts it anew with other options."""
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def unfinished(folder: Path) -> list[Path]:
    """Temporary files, and Parquet files that cannot be read."""
    found = list(folder.rglob("*.tmp"))
    for path in folder.rglob("*.parquet"):
        try:
            pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError):
            found.append(path)
    return found


def write_everything(folder: Path, size: int) -> list[str]:
    """Writes each kind of our files, with `size` numbers in it; returns what each that failed said."""
    ids, values = [f"{i:032x}" for i in range(size)], np.random.default_rng(0).normal(size=size)
    store = Store(folder / "cache", "ppl", {"indicator": "ppl"}, NUMERICS)
    table = ScoreTable(range(size), ids, ["s"] * size, {"ppl": values})
    works: list[Callable[[], Any]] = [
        lambda: store.append(ids, values, [None] * size),
        lambda: table.write(folder / "scores.parquet"),
        lambda: write_rows(folder / "rows.jsonl", [{"id": i} for i in ids]),
        lambda: RunLedger(folder / "runs").add(make_record(size, note="x" * 20 * size)),
        lambda: RunLedger(folder / "runs").add_losses("run-000", "e", ids, values.tolist(), [1] * size),
    ]
    said = []
    for work in works:
        try:
            work()
        except InstructMiningError as error:
            said.append(str(error))
    return said


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk) as remount:
        assert write_everything(disk, 50) == []
        before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        said = write_everything(disk, 60_000)
        assert len(said) == 5
        assert all("cannot be written: No space left" in s and "free some space" in s for s in said), said
        assert {path: path.read_bytes() for path in before} == before and not unfinished(disk)
        remount("size=60m")
        assert write_everything(disk, 60_000) == []


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The same where no file system can be mounted: the writing itself fails in the middle of the file."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        said = write_everything(tmp_path / "disk", 60_000)
        assert len(said) == 5 and all("cannot be written: File too large" in s for s in said), said

    run(limited, tmp_path / "report")
    assert not unfinished(tmp_path / "disk")


def test_a_read_only_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there can be read, damaged parts are passed over, and writing is refused before the work."""
    disk = tmp_path / "disk"
    pool = make_pool(6)
    with small_disk(disk) as remount:
        whole = score_examples(pool, ["mtld"], cache_dir=disk)
        (folder,) = disk.glob("mtld-*")
        (folder / "part-torn.parquet").write_bytes(b"PAR1")
        remount("ro")
        again = score_examples(pool, ["mtld"], cache_dir=disk)
        np.testing.assert_array_equal(again.values["mtld"], whole.values["mtld"])
        assert "part-torn.parquet: not a sound part" in capsys.readouterr().err
        with pytest.raises(InstructMiningError, match=r"cannot be written: Read-only file system.*writable folder"):
            score_examples(make_pool(6, seed=5), ["mtld"], cache_dir=disk)
        assert len(write_everything(disk, 10)) == 5


def test_a_fit_without_a_place_to_write(small_base: str, tmp_path: Path) -> None:
    """Nowhere to keep what the run uses: said before training."""
    disk = tmp_path / "disk"
    world = make_world(small_base, tmp_path)
    with small_disk(disk) as remount:
        remount("ro")
        with pytest.raises(InstructMiningError, match=r"cannot be written: Read-only.*default_root_dir.*run_dir"):
            trainer(disk).fit(world.tuner(), datamodule=world.data(rule=world.rule, budget=9))


def test_a_disk_that_fills_up_while_scoring_loses_nothing(
    small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished by then is used after space has been made."""
    from im_lightning.scoring import columns as work

    monkeypatch.setattr(work, "FLUSH_SECONDS", 0.0)
    pool, disk = make_pool(60), tmp_path / "disk"
    how = {"model": small_base, "batch_tokens": 128, "device": "cpu"}
    names = ["ppl", "length_output"]
    expected = score_examples(pool, names, cache_dir=tmp_path / "free", **how)
    with small_disk(disk, "100k") as remount:
        with pytest.raises(InstructMiningError, match="cannot be written: No space left"):
            score_examples(pool, names, cache_dir=disk, **how)
        assert not unfinished(disk) and list(disk.glob("ppl-*/part-*"))
        remount("size=20m")
        found = score_examples(pool, names, cache_dir=disk, **how)
    for name in names:
        np.testing.assert_allclose(found.values[name], expected.values[name], rtol=1e-4)


@register_indicator("cache_remover")
class CacheRemover(Indicator):
    """Removes the score store while it is being filled, as a job that tidies up does."""

    version = 1
    needs = ("text",)
    folder: Path | None = None

    def score(self, example: Any) -> float:
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)
        return float(len(example.response))


def test_a_cache_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is whole all the same, and so is the store that is made anew."""
    pool, cache = make_pool(12), tmp_path / "cache"
    monkeypatch.setattr(CacheRemover, "folder", cache)
    table = score_examples(pool, ["mtld", "cache_remover"], cache_dir=cache)
    assert table.values["cache_remover"].tolist() == [float(len(e.response)) for e in pool]
    monkeypatch.setattr(CacheRemover, "folder", None)
    again = score_examples(pool, ["mtld", "cache_remover"], cache_dir=cache)
    np.testing.assert_array_equal(again.matrix(["mtld", "cache_remover"]), table.matrix(["mtld", "cache_remover"]))
    assert not unfinished(cache)


def test_a_ledger_that_vanishes_while_a_fit_runs(small_base: str, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    world = make_world(small_base, tmp_path)

    class Remover(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    RunLedger(tmp_path / "runs").add(make_record(0))
    callback = InstructMiningCallback(ledger=str(tmp_path / "runs"))
    trainer(tmp_path, callbacks=[Remover(), callback]).fit(
        world.tuner(), datamodule=world.data(rule=world.rule, budget=9)
    )
    (record,) = RunLedger(tmp_path / "runs").records()
    assert record.run_id == callback.run_id and RunLedger(tmp_path / "runs").losses(record.run_id)["eval"].ids


WRITERS, EACH = 16, 4


def test_sixteen_processes_write_one_ledger_and_one_store(tmp_path: Path) -> None:
    """Runs and scores of a whole cluster end up in one folder, without a lock."""

    def write(worker: int) -> None:
        ledger, store = RunLedger(tmp_path / "runs"), Store(tmp_path / "cache", "ppl", {"i": "ppl"}, NUMERICS)
        for i in range(EACH):
            record = make_record(i, run_id=f"w{worker}-{i}", note="n" * 2000)
            ledger.add_losses(record.run_id, "e", [f"x{i}"], [float(worker)], [1])
            ledger.add(record)
            # Every second row is also written by the next worker: equal values, whoever is last.
            rows = [(worker * EACH + i) % (WRITERS * EACH), (worker * EACH + i + EACH) % (WRITERS * EACH)]
            store.append([f"{row:032x}" for row in rows], np.array(rows, dtype=float), [None] * 2)
            seen = RunLedger(tmp_path / "runs")
            seen.records(status=None)
            assert seen.rejected == []
            assert store.lookup(Join(pa.array([f"{row:032x}" for row in rows]))).values.tolist() == rows

    workers = [child(lambda w=w: write(w), tmp_path / f"report{w}") for w in range(WRITERS)]  # type: ignore[misc]
    statuses = [wait(pid) for pid in workers]
    assert BROKEN not in statuses and set(statuses) == {0}, (tmp_path / "report0").read_text()[-2000:]
    ledger = RunLedger(tmp_path / "runs")
    assert {r.run_id for r in ledger.records()} == {f"w{w}-{i}" for w in range(WRITERS) for i in range(EACH)}
    assert all(ledger.losses(f"w{w}-{i}")["e"].sums.tolist() == [w] for w in range(WRITERS) for i in range(EACH))
    store = Store(tmp_path / "cache", "ppl", {"i": "ppl"}, NUMERICS)
    column = store.lookup(Join(pa.array([f"{i:032x}" for i in range(WRITERS * EACH)])))
    assert column.values.tolist() == list(range(WRITERS * EACH))
    assert not unfinished(tmp_path) and not list(tmp_path.rglob("*.rejected"))
