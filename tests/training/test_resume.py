"""A resumed fit goes on with the next row: its stream of examples is the undisturbed fit's."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import World, trainer, write_pool, write_rule, write_scores
from pytorch_lightning.tuner import Tuner

from im_lightning.errors import RequestError
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.module import rate

EPOCHS = 2


class Tape(pl.Callback):
    """Writes the rows of every batch to a file per rank, and checkpoints at given places of the fit."""

    def __init__(self, folder: Path, save: dict[str, tuple[int, int | None]] | None = None) -> None:
        self.folder, self.save = folder, save or {}
        folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        with (self.folder / f"rank{trainer.global_rank}").open("a") as stream:
            print(trainer.current_epoch, batch_idx, *batch["row"].tolist(), file=stream)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, None)

    def _save(self, trainer: Any, batch_idx: int | None) -> None:
        for name, place in self.save.items():
            if place == (trainer.current_epoch, batch_idx):
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def read(self) -> list[list[tuple[int, ...]]]:
        """Per rank: (epoch, batch, rows…)."""
        files = sorted(self.folder.glob("rank*"))
        return [[tuple(map(int, line.split())) for line in f.read_text().splitlines()] for f in files]


PLACES: dict[str, tuple[int, int | None]] = {"mid0": (0, 1), "end0": (0, None), "mid1": (1, 2)}
OPTIONS = {"budget": 17, "batch_size": 2, "resample_each_epoch": True}


def fit(world: World, tape: Tape, workers: int, ranks: int, ckpt: Path | None = None, **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    tuner = world.tuner()
    data = world.data(rule=world.rule, num_workers=workers, **{**OPTIONS, **options})
    kwargs = {"strategy": "ddp_fork", "devices": 2} if ranks == 2 else {}
    fitting = trainer(world.root, callbacks=[tape], max_epochs=EPOCHS, **kwargs)
    fitting.fit(tuner, datamodule=data, ckpt_path=ckpt)
    return tuner


@pytest.mark.parametrize(("ranks", "workers", "places"), [(1, 0, PLACES), (1, 2, PLACES), (2, 0, ["mid0", "mid1"])])
def test_stream_after_resume_is_that_of_the_undisturbed_fit(
    world: World, ranks: int, workers: int, places: Any
) -> None:
    """A fit that replays or skips rows after a resume trains on other data than its record says. `configure_optimizers`
    asks for estimated_stepping_batches, which makes Lightning drop loader state."""
    whole = Tape(world.root / "whole", {name: PLACES[name] for name in places})
    tuner = fit(world, whole, workers, ranks)
    full = whole.read()
    assert len(full) == ranks and all(len(rank) == EPOCHS * (9 if ranks == 1 else 4) for rank in full)
    for name in places:
        tape = Tape(world.root / name)
        resumed = fit(world, tape, workers, ranks, ckpt=world.root / "whole" / f"{name}.ckpt")
        e, b = PLACES[name]
        rest = [[line for line in rank if line[:2] > (e, 99 if b is None else b)] for rank in full]
        assert tape.read() == rest, f"resumed at {name}"
        if ranks == 1:
            for key, value in tuner.named_parameters():
                torch.testing.assert_close(dict(resumed.named_parameters())[key], value)


def test_a_second_resume_after_the_end_of_an_epoch(world: World) -> None:
    """A checkpoint at an epoch's last batch, gone on from, makes Lightning take the next, in the middle of an epoch,
    for one at its end, and train on the whole epoch again; the sampler gives what is left of it."""
    whole, second = (Tape(world.root / name, save) for name, save in (("1", {"at": (0, 8)}), ("2", {"at": (1, 3)})))
    third = Tape(world.root / "3")
    tuner = fit(world, whole, 0, 1)
    fit(world, second, 0, 1, ckpt=world.root / "1" / "at.ckpt")
    resumed = fit(world, third, 0, 1, ckpt=world.root / "2" / "at.ckpt")
    all_, after_first, after_second = ([line[2:] for line in tape.read()[0]] for tape in (whole, second, third))
    assert after_first == all_[9:] and after_second == all_[13:]
    for name, value in tuner.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], value)


def test_fixed_subset_resumes_too(world: World) -> None:
    whole = Tape(world.root / "whole", {"mid1": (1, 0)})
    fit(world, whole, 0, 1, resample_each_epoch=False)
    tape = Tape(world.root / "again")
    fit(world, tape, 0, 1, resample_each_epoch=False, ckpt=world.root / "whole" / "mid1.ckpt")
    assert tape.read()[0] == [line for line in whole.read()[0] if line[:2] > (1, 0)]
    seen = Counter(row for line in whole.read()[0] for row in line[2:])
    assert len(seen) == 17 and set(seen.values()) == {2}


def test_a_changed_input_on_resume_is_named(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Going on silently with another pool or rule would mix two experiments in one record."""
    tape = Tape(world.root / "whole", {"mid": (0, 1)})
    fit(world, tape, 0, 1)
    ckpt = world.root / "whole" / "mid.ckpt"
    with pytest.raises(RequestError, match=r"resume: .*weighting.strength: 1.0 → 0.5.*pass run_dir=.*on_mismatch=warn"):
        fit(world, Tape(world.root / "a"), 0, 1, ckpt=ckpt, strength=0.5)
    with pytest.raises(RequestError, match=r"resume: .*rows: 17 → 16"):
        fit(world, Tape(world.root / "b"), 0, 1, ckpt=ckpt, budget=16)
    with pytest.raises(RequestError, match=r"resume: .*batch_size: 2 → 4"):  # it would skip rows of the epoch
        fit(world, Tape(world.root / "e"), 0, 1, ckpt=ckpt, batch_size=4)
    fit(world, Tape(world.root / "c"), 0, 1, ckpt=ckpt, strength=0.5, on_mismatch="warn")
    assert "strength: 1.0 → 0.5; going on" in capfd.readouterr().err
    write_scores(Path(world.scores), write_pool(Path(world.pool), n=41))
    with pytest.raises(RequestError, match=r"resume: .*pool.digest: .* → .*pool.rows: 40 → 41"):
        fit(world, Tape(world.root / "d"), 0, 1, ckpt=ckpt)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 20])
def test_another_batch_size_leaves_no_row_of_the_epoch_out(world: World, size: int) -> None:
    """Lightning counts batches: two batches of two were two of seven, and thirteen rows were left untrained."""
    whole = Tape(world.root / "whole", {"mid": (0, 1)})
    fit(world, whole, 0, 1)
    tape = Tape(world.root / "again")
    fit(world, tape, 0, 1, ckpt=world.root / "whole" / "mid.ckpt", batch_size=size, on_mismatch="warn")
    for epoch in range(EPOCHS):
        rows = [row for line in tape.read()[0] if line[0] == epoch for row in line[2:]]
        assert rows == [row for line in whole.read()[0] if line[0] == epoch for row in line[2:]][0 if epoch else 4 :]


def test_a_rule_refitted_in_between_does_not_disturb_a_resume_with_run_dir(world: World) -> None:
    """The callback itself rewrites runs/rule.json: a resumed run must be able to go on with the rule it had."""
    tape = Tape(world.root / "whole", {"mid": (0, 1)})
    fit(world, tape, 0, 1)
    ckpt = world.root / "whole" / "mid.ckpt"
    folder = torch.load(ckpt, weights_only=True)["InstructMiningDataModule"]["run_dir"]
    write_rule(Path(world.rule), world.scores, coef=(0.3, -0.2, 0.1))
    with pytest.raises(RequestError, match=r"resume: .*rule: .* → .*" + folder):
        fit(world, Tape(world.root / "a"), 0, 1, ckpt=ckpt)
    again = Tape(world.root / "b")
    fit(world, again, 0, 1, ckpt=ckpt, run_dir=folder)
    assert again.read()[0] == [line for line in tape.read()[0] if line[:2] > (0, 1)]


def test_checkpoints_hold_plain_values(world: World) -> None:
    """Lightning reads checkpoints with weights_only=True: one numpy scalar would make the run unresumable."""
    callback = InstructMiningCallback(ledger=str(world.root / "runs"), log_every_n_steps=2)
    fitting = trainer(world.root, callbacks=[callback])
    fitting.fit(world.tuner(), datamodule=world.data(rule=world.rule, **OPTIONS))
    fitting.save_checkpoint(world.root / "end.ckpt")
    state = torch.load(world.root / "end.ckpt", weights_only=True)
    assert {"inputs", "draw", "run_dir", "rule", "sampler", "ranks"} == state["InstructMiningDataModule"].keys()
    assert state["callbacks"]["InstructMiningCallback"]["run_id"] == callback.run_id


def test_a_checkpoint_does_not_need_the_frozen_folder(world: World) -> None:
    """Somebody tidies up a scratch disk while the fit of days runs: its checkpoints must go on."""

    class Tidies(Tape):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            shutil.rmtree(world.root / "im-lightning")

    fit(world, Tidies(world.root / "whole", {"mid": (0, 1)}), 0, 1)
    state = torch.load(world.root / "whole" / "mid.ckpt", weights_only=True)["InstructMiningDataModule"]
    assert json.loads(state["rule"]) == json.loads(Path(world.rule).read_text())
    tape = Tape(world.root / "again")
    fit(world, tape, 0, 1, ckpt=world.root / "whole" / "mid.ckpt")
    assert tape.read()[0][0][:2] == (0, 2)


class Rates(pl.Callback):
    """The learning rate that each optimiser step was made with; an endless fit is stopped after the first."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])
        trainer.should_stop = trainer.max_epochs == -1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_more_epochs_go_on_at_the_new_schedules_rate(world: World, accumulate: int) -> None:
    """Else the first step after the resume is made at the old schedule's end: rate 0, a batch that teaches nothing."""

    def rates(epochs: int, ckpt: Path | None = None, save: Path | None = None, peak: float = 5e-3) -> list[float]:
        seen, data = Rates(), world.data(rule=world.rule, **OPTIONS)
        options = {"max_epochs": epochs, "accumulate_grad_batches": accumulate, "callbacks": [seen]}
        fitting = trainer(world.root, **options)
        fitting.fit(world.tuner(learning_rate=peak), datamodule=data, ckpt_path=ckpt)
        if save is not None:
            fitting.save_checkpoint(save)
        return seen.used

    ckpt = world.root / "end.ckpt"
    done = len(rates(2, save=ckpt))
    expected = [pytest.approx(5e-3 * rate(step, 2 if accumulate == 1 else 1, 2 * done)) for step in range(2 * done)]
    assert rates(4) == expected  # the schedule of four epochs, undisturbed
    assert rates(4, ckpt) == expected[done:] and rates(4, ckpt)[0] > 1e-3
    assert rates(4, ckpt, peak=1e-2) == [pytest.approx(2 * r.expected) for r in expected[done:]]
    assert rates(-1, ckpt) == [5e-3]  # an endless fit has no end to fall to


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_tuner_finds_a_batch_size_and_the_fit_takes_it(world: World, mode: str) -> None:
    """Lightning restores its own checkpoint under the size it found: no row has been drawn, so none can be skipped."""
    tuner, data = world.tuner(), world.data(rule=world.rule, budget=17, batch_size=2)
    counted = InstructMiningCallback(ledger=str(world.root / "runs"), refit=False)
    fitting = trainer(world.root, max_epochs=EPOCHS, callbacks=[counted])
    found = Tuner(fitting).scale_batch_size(tuner, datamodule=data, mode=mode, max_trials=2)
    assert found == data.hparams["batch_size"] == {"power": 4, "binsearch": 3}[mode]
    fitting.fit(tuner, datamodule=data)
    assert counted.record is not None and counted.record.status == "complete"
    assert counted.record.subset["exposures"] == EPOCHS * 17  # what the trials trained on is not counted
    assert counted.record.steps == EPOCHS * math.ceil(17 / found)
    assert counted.record.regime["rows_per_step"] == found
