"""SIGKILL at random points, then again from where it stood: nothing is lost, torn, or counted twice.

If these failed, a machine that goes down in the night would cost more than the batch in hand: a table with holes, a
ledger with half a run, a fit that has seen rows twice.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fitting import make_world, trainer
from killing import killed_after, killed_at, operations, run, spread
from pools import make_pool
from simulated_ledger import make_record

from im_lightning.cli import main
from im_lightning.data.loading import write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.ledger.ledger import RunLedger
from im_lightning.scoring import columns as scoring_work
from im_lightning.training.callback import InstructMiningCallback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCORING_KILLS = (30, 12)  # at file operations, by the clock
LEDGER_KILLS = (24, 8)
FIT_KILLS = (16, 12)
TWO_RANK_KILLS = 6


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def leftovers(folder: Path) -> set[str]:
    """What is no file of its own right: temporary files may stay after a kill, files set aside would be torn ones."""
    return {path.name for path in folder.rglob("*.rejected")}


def times(number: int, work: Callable[[], Any], report: Path, seed: int) -> list[float]:
    """Random moments within the time that undisturbed work takes."""
    start = time.monotonic()
    run(work, report)
    took = time.monotonic() - start
    rng = random.Random(seed)
    return [rng.uniform(0.05, 0.95) * took for _ in range(number)]


def test_scoring(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed again and again on one store, the scoring ends with the table of the undisturbed one."""
    monkeypatch.setattr(scoring_work, "FLUSH_SECONDS", 0.0)  # a part after every batch: many places to die at
    pool = tmp_path / "pool.jsonl"
    rows = [{"instruction": e.instruction, "input": e.input, "output": e.response} for e in make_pool(40)]
    write_rows(pool, [*rows, {"instruction": "Say nothing.", "output": ""}, rows[3]])
    names = "length_output,mtld,ppl,ifd,knn_2"

    def scoring(folder: Path) -> Callable[[], None]:
        out, cache = str(folder / "scores.parquet"), str(folder / "cache")
        words = f"--model {small_base} --indicators {names} --batch-tokens 256 --cache-dir {cache} --device cpu"

        def work() -> None:
            assert main(["score", str(pool), "--out", out, *words.split()]) == 0

        return work

    report, whole, torn = tmp_path / "report", tmp_path / "whole", tmp_path / "torn"
    total = operations(whole, scoring(whole), report)
    deaths = [partial(killed_at, place, torn) for place in spread(total, SCORING_KILLS[0], seed=1)]
    deaths += [partial(killed_after, t) for t in times(SCORING_KILLS[1], scoring(tmp_path / "timed"), report, seed=2)]
    kills = 0
    for i, death in enumerate(deaths, start=1):
        killed = death(scoring(torn), report)
        kills += killed
        if killed and i % 3:
            continue  # killed again on the same store; but soon that lacks nothing, and then it begins anew
        if killed:
            run(scoring(torn), report)
        compare_tables(whole, torn)
        shutil.rmtree(torn)
    print(f"scoring: {kills} kills, {total} file operations")
    assert kills >= 20


def compare_tables(whole: Path, torn: Path) -> None:
    expected, found = (ScoreTable.read(folder / "scores.parquet") for folder in (whole, torn))
    assert found.id == expected.id and found.reasons == expected.reasons and found.keys == expected.keys
    for name in expected.indicators:  # other batches round otherwise, in the last digits
        np.testing.assert_allclose(found.values[name], expected.values[name], rtol=1e-4, err_msg=name)
    np.testing.assert_array_equal(found.values["mtld"], expected.values["mtld"])
    assert not leftovers(torn)


def test_ledger_writes(tmp_path: Path) -> None:
    """After any kill the ledger holds whole runs only, and the runs made again complete it."""
    records = {f"run-{i:03d}": make_record(i) for i in range(5)}

    def writing(folder: Path) -> Callable[[], None]:
        def write() -> None:
            ledger = RunLedger(folder)
            there = {record.run_id for record in ledger.records(status=None)}
            for name, record in records.items():
                if name not in there:
                    for k, evaluation in enumerate(("held-out", "other")):
                        ledger.add_losses(name, evaluation, ["a", "b"], [1.0 * k, 2.0], [3, 4])
                    ledger.add(record)

        return write

    report, torn = tmp_path / "report", tmp_path / "torn"
    total = operations(tmp_path / "whole", writing(tmp_path / "whole"), report)
    expected, kills = RunLedger(tmp_path / "whole").records(), 0
    moments: list[float] = times(LEDGER_KILLS[1], writing(tmp_path / "timed"), report, seed=3)
    places: list[float] = [*spread(total, LEDGER_KILLS[0], seed=4), *moments]
    for i, place in enumerate(places):
        if i < len(places) - len(moments):
            kills += killed_at(int(place), torn, writing(torn), report)
        else:
            kills += killed_after(place, writing(torn), report)
        ledger = RunLedger(torn)
        whole = ledger.records()
        assert ledger.rejected == [] and all(r == records[r.run_id] for r in whole)
        assert all(set(ledger.losses(r.run_id)) == {"held-out", "other"} for r in whole)
        run(writing(torn), report)
        assert RunLedger(torn).records() == expected
        assert RunLedger.digest(RunLedger(torn).records()) == RunLedger.digest(expected)
        shutil.rmtree(torn)
    print(f"ledger: {kills} kills, {total} file operations")
    assert kills >= 20


class Stream(pl.Callback):
    """Appends the rows of every batch to a file per rank; a line is written at once or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        with (self.folder / f"rank{trainer.global_rank}").open("a") as stream:
            stream.write(f"{trainer.current_epoch} {trainer.global_step} {batch['row'].tolist()}\n")


def fitting(base: str, root: Path, ranks: int = 1) -> Callable[[], None]:
    """A fit that goes on from its last checkpoint if there is one, as a job that a cluster starts again does."""

    def fit() -> None:
        root.mkdir(exist_ok=True)
        world = make_world(base, root)
        pl.seed_everything(1, verbose=False)
        data = world.data(rule=world.rule, budget=17, batch_size=2, resample_each_epoch=True)
        kept = pl.callbacks.ModelCheckpoint(root / "kept", save_last=True, every_n_train_steps=2)
        callback = InstructMiningCallback(ledger=str(root / "runs"), log_every_n_steps=3)
        several = {"strategy": "ddp_fork", "devices": ranks} if ranks > 1 else {}
        run = trainer(
            root, max_epochs=2, enable_checkpointing=True, callbacks=[Stream(root), callback, kept], **several
        )
        run.fit(world.tuner(), datamodule=data, ckpt_path="last")

    return fit


def streams(folder: Path, world: int) -> list[dict[str, str]]:
    """Per rank the rows of each step. A step made again after a kill must have the same rows. Steps and not batches:
    after the end of an epoch was gone on from, Lightning numbers the batches of a second resume from 0."""
    found: list[dict[str, str]] = []
    for rank in range(world):
        seen: dict[str, str] = {}
        for line in (folder / f"rank{rank}").read_text().splitlines():
            epoch, step, rows = line.split(" ", 2)
            assert seen.setdefault(f"{epoch}/{step}", rows) == rows, f"another draw after a kill: {line}"
        found.append(seen)
    return found


def compare_fits(whole: Path, torn: Path, world: int = 1) -> None:
    assert streams(torn, world) == streams(whole, world)
    (expected,), (found,) = (RunLedger(folder / "runs").records(status=None) for folder in (whole, torn))
    for name in ("phi_means", "tokens", "steps", "subset", "weights", "regime", "status", "purpose", "seeds"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.evaluation["eval"] == pytest.approx(expected.evaluation["eval"], rel=1e-5)
    told = [RunLedger(folder / "runs").statistics(run.run_id) for folder, run in ((whole, expected), (torn, found))]
    for name in ("pearson", "slope", "examples", "left_out", "pool_seen", "ess"):
        assert told[1][name] == pytest.approx(told[0][name], rel=1e-3, abs=1e-6), name
    assert np.array(told[1]["deciles"]) == pytest.approx(np.array(told[0]["deciles"]), rel=1e-4)
    first, second = (torch.load(folder / "kept" / "last.ckpt", weights_only=True) for folder in (whole, torn))
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, rtol=1e-5, atol=1e-7)
    assert not leftovers(torn)


def test_fitting(small_base: str, tmp_path: Path) -> None:
    """Killed anywhere and started again with `ckpt_path="last"`: the stream, the record and the weights of one fit."""
    report, whole, kills = tmp_path / "report", tmp_path / "whole", 0
    total = operations(whole, fitting(small_base, whole), report)
    moments: list[float] = times(FIT_KILLS[1], fitting(small_base, tmp_path / "timed"), report, seed=6)
    compare_fits(whole, tmp_path / "timed")
    places = [*spread(total, FIT_KILLS[0], seed=5)]
    for i, place in enumerate([*places, *moments]):
        torn = tmp_path / f"torn{i // 2}"  # two kills each
        fit = fitting(small_base, torn)
        kills += killed_at(int(place), torn, fit, report) if i < len(places) else killed_after(place, fit, report)
        if i % 2:
            run(fit, report)
            compare_fits(whole, torn)
            shutil.rmtree(torn)
    print(f"fitting: {kills} kills, {total} file operations")
    assert kills >= 20


def test_fitting_on_two_ranks(small_base: str, tmp_path: Path) -> None:
    """All ranks of a job die together, as when its machine goes down."""
    report, whole, kills = tmp_path / "report", tmp_path / "whole", 0
    moments = times(TWO_RANK_KILLS, fitting(small_base, whole, 2), report, seed=7)
    for i, moment in enumerate(moments):
        torn = tmp_path / f"torn{i // 2}"
        kills += killed_after(moment, fitting(small_base, torn, 2), report)
        if i % 2:
            run(fitting(small_base, torn, 2), report)
            compare_fits(whole, torn, 2)
    print(f"two ranks: {kills} kills")
    assert kills >= TWO_RANK_KILLS // 2
