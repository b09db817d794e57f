"""One rank of two is killed: the other says so in time, and starting again ends as if nothing had happened."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from fitting import make_world, trainer
from killing import child, run, wait
from pools import make_pool

from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import InstructMiningError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.scoring import columns as scoring_work
from im_lightning.scoring.passes import language_model
from im_lightning.scoring.settings import Numerics, Setup
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.distributed import ranks as waiting
from im_lightning.training.distributed.ranks import Ranks
from im_lightning.training.run.encoded_pool import Pool
from im_lightning.training.run.scoring import Scorer, score_together

NAMES = ("length_output", "ppl", "knn_2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def scorer_of(base: str, cache: Path) -> Scorer:
    setup = Setup(Encoding(base, max_length=512, cache_dir=str(cache)), numerics=Numerics(256, "fp32", "cpu"))
    return Scorer(NAMES, setup)


def scoring(base: str, folder: Path, rank: int, batches: int | None = None) -> Callable[[], None]:
    """One rank's part of scoring a pool together; after so many batches it waits to be killed.

    SIGUSR1 tells it that a rank is dead: from then on it waits for a second alone.
    """

    def score() -> None:
        signal.signal(signal.SIGUSR1, lambda *_: setattr(waiting, "DEAD_SECONDS", 1.0))
        real, done = language_model.LanguageModelPass.forward, itertools.count()

        def forward(self: Any, *arguments: Any) -> Any:
            if next(done) == batches:
                signal.pause()
            return real(self, *arguments)

        language_model.LanguageModelPass.forward = forward  # type: ignore[method-assign]
        scoring_work.FLUSH_SECONDS = 0.0
        scorer = scorer_of(base, folder / "cache")
        ranks = Ranks(folder / "meet", rank, 2)
        try:
            with ranks.alive():
                table = score_together(scorer, Pool(make_pool(40)), ranks)
                if table is not None:
                    table.write(folder / "scores.parquet")
        except InstructMiningError as error:
            (folder / f"error-{rank}").write_text(str(error))
            raise

    return score


def killed_while_scoring(base: str, folder: Path, hint: bool) -> str:
    """Kills rank 1 in the middle of its share, waits until rank 0 has ended, and returns what it said. A `hint` is
    SIGUSR1, to rank 0."""
    report = folder / "report"
    first, second = child(scoring(base, folder, 0), report), child(scoring(base, folder, 1, 3), folder / "report-1")
    while len(stored(folder / "cache", "ppl")) <= 20:  # some of rank 1's, whatever the other has
        assert os.waitpid(first, os.WNOHANG) == os.waitpid(second, os.WNOHANG) == (0, 0), report.read_text()
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    assert wait(second) == -signal.SIGKILL
    if hint:
        os.kill(first, signal.SIGUSR1)
    assert wait(first, 90) != 0
    return (folder / "error-0").read_text()


def stored(cache: Path, name: str) -> list[str]:
    parts = sorted(part for folder in cache.glob(f"{name}-*") for part in folder.glob("part-*.parquet"))
    return [id for part in parts for id in pq.read_table(part, columns=["id"]).column("id").to_pylist()]


def test_a_rank_killed_while_scoring_is_named(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the others wait until somebody looks in the morning; what both had scored must be kept."""
    monkeypatch.setattr(waiting, "DEAD_SECONDS", math.inf)  # a rank that lives is never taken for dead, however slow
    said = killed_while_scoring(small_base, tmp_path, hint=True)
    assert "rank 0 waits for their share of the scores, but rank 1 has given no sign for 1 s" in said
    kept = stored(tmp_path / "cache", "ppl")
    assert 20 < len(kept) < 40, "rank 0's share and the beginning of rank 1's"

    again = [child(scoring(small_base, tmp_path, rank), tmp_path / f"again-{rank}") for rank in (0, 1)]
    assert [wait(pid) for pid in again] == [0, 0], (tmp_path / "again-0").read_text()
    whole = scorer_of(small_base, tmp_path / "whole")(make_pool(40))
    found = ScoreTable.read(tmp_path / "scores.parquet")
    assert found.id == whole.id and found.reasons == whole.reasons
    for name in NAMES:
        np.testing.assert_allclose(found.values[name], whole.values[name], rtol=1e-4)
    assert sorted(stored(tmp_path / "cache", "ppl")) == sorted(whole.id), "each row was scored once in both attempts"


@pytest.mark.slow
def test_a_dead_rank_is_named_within_a_minute(small_base: str, tmp_path: Path) -> None:
    """With the times of every day."""
    assert "rank 1 has given no sign for 50 s" in killed_while_scoring(small_base, tmp_path, hint=False)


class Stream(pl.Callback):
    """Appends the rows of every batch to a file per rank, and its process to another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        (self.folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))
        with (self.folder / f"rank{trainer.global_rank}").open("a") as stream:
            stream.write(f"{trainer.current_epoch} {trainer.global_step} {batch['row'].tolist()}\n")
        time.sleep(0.05)


def fitting(base: str, root: Path) -> Callable[[], None]:
    def fit() -> None:
        root.mkdir(exist_ok=True)
        world = make_world(base, root)
        pl.seed_everything(1, verbose=False)
        data = world.data(rule=world.rule, budget=17, batch_size=2, resample_each_epoch=True)
        kept = pl.callbacks.ModelCheckpoint(root / "kept", save_last=True, every_n_train_steps=2)
        callback = InstructMiningCallback(ledger=str(root / "runs"), log_every_n_steps=3)
        fit = trainer(
            root, max_epochs=2, enable_checkpointing=True, callbacks=[Stream(root), callback, kept],
            strategy="ddp_fork", devices=2,
        )  # fmt: skip
        fit.fit(world.tuner(), datamodule=data, ckpt_path="last")

    return fit


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def killed_in_a_fit(base: str, root: Path, rank: int, after: int, report: Path) -> int:
    """Kills one rank's process, and only it, after so many batches; the fit's exit status."""
    fit = child(fitting(base, root), report)
    while len(lines(root / f"rank{rank}")) < after:
        assert os.waitpid(fit, os.WNOHANG) == (0, 0), report.read_text()[-3000:]
        time.sleep(0.01)
    os.kill(int((root / f"pid{rank}").read_text()), signal.SIGKILL)
    return wait(fit, 90)


def check_resumed(base: str, whole: Path, torn: Path, report: Path) -> None:
    """Nothing torn is left; going on gives the rows, the record and the weights of the undisturbed fit."""
    ledger = RunLedger(torn / "runs")
    assert ledger.records() == [] and ledger.rejected == [], "no run that counts, and none torn"
    run(fitting(base, torn), report)
    (expected,), (found,) = (RunLedger(folder / "runs").records(status=None) for folder in (whole, torn))
    for name in ("phi_means", "tokens", "steps", "subset", "weights", "regime", "status", "purpose", "seeds"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.evaluation["eval"] == pytest.approx(expected.evaluation["eval"], rel=1e-5)
    for rank in (0, 1):
        seen: dict[str, str] = {}
        for line in lines(torn / f"rank{rank}"):
            place, _, rows = line.partition(" [")
            assert seen.setdefault(place, rows) == rows, f"another draw after the kill: {line}"
        assert seen == {place: rows for place, _, rows in (x.partition(" [") for x in lines(whole / f"rank{rank}"))}
    first, second = (torch.load(folder / "kept" / "last.ckpt", weights_only=True) for folder in (whole, torn))
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, rtol=1e-5, atol=1e-7)
    assert not list(torn.rglob("*.rejected"))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "after"), [(1, 1), (0, 3), (1, 6), (0, 8)])
def test_one_rank_killed_in_a_fit(small_base: str, tmp_path: Path, rank: int, after: int) -> None:
    """The job ends instead of waiting for half an hour in a collective, and goes on from its last checkpoint."""
    whole, torn, report = tmp_path / "whole", tmp_path / "torn", tmp_path / "report"
    run(fitting(small_base, whole), report)
    assert killed_in_a_fit(small_base, torn, rank, after, report) != 0
    check_resumed(small_base, whole, torn, report)
