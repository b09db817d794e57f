"""The matrix of resumes: whatever the optimiser asks, however many ranks and workers, wherever it was stopped.

Each case stops a fit of three epochs at one of four places and goes on in a fresh data module, module and Trainer; the
rows of every batch on every rank, and the weights at the end, must be those of the fit that was never stopped. If one
failed, a resumed run would train on other rows than its record says.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import World, make_world, trainer
from test_resume import Tape

from im_lightning.training.module import InstructTuningModule

EPOCHS = 3
ROWS = 17  # of 40, anew each epoch; 17 rows are 9 batches on one rank, and 4 on each of two, the last row left out
PLACES: dict[str, tuple[int, int | None]] = {"mid0": (0, 1), "mid1": (1, 2), "end0": (0, None), "end1": (1, None)}
FINAL = {"final": (EPOCHS - 1, None)}
DATA = {"budget": ROWS, "batch_size": 2, "resample_each_epoch": True}

Case = tuple[str, int, int, str, str]
MATRIX: list[Case] = list(itertools.product(("plain", "estimated"), (1, 2), (0, 2), PLACES, ("before", "after")))
# Together these take every value of every factor; tests/training/test_resume.py takes the most usual combinations.
FAST: list[Case] = [
    ("plain", 1, 2, "end1", "before"),
    ("plain", 2, 0, "end0", "after"),
    ("estimated", 1, 0, "mid1", "after"),
    ("estimated", 2, 2, "mid0", "before"),
]


class Plain(InstructTuningModule):
    """Asks the Trainer for nothing before the fit: its loaders are made late."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


MODULES: dict[str, type[InstructTuningModule]] = {"plain": Plain, "estimated": InstructTuningModule}


class Accumulating(Tape):
    """Also notes after which batches an optimiser step was made."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        with (self.folder / "steps").open("a") as stream:
            print(trainer.current_epoch, batch_idx, trainer.global_step, file=stream)


def run(
    world: World, tape: Tape, optimiser: str = "estimated", ranks: int = 1, workers: int = 0, **options: Any
) -> None:
    """One fit in the world's folder; `options` are the Trainer's, but for ckpt and data."""
    ckpt, data = options.pop("ckpt", None), options.pop("data", {})
    pl.seed_everything(1, verbose=False)
    tuner = MODULES[optimiser](world.base, lora_rank=2, learning_rate=5e-3, token_budget=25)
    module = world.data(**{"rule": world.rule, "num_workers": workers, **DATA, **data})
    several = {"strategy": "ddp_fork", "devices": ranks} if ranks > 1 else {}
    settings = {"callbacks": [tape], "max_epochs": EPOCHS, "num_sanity_val_steps": 0, **several, **options}
    trainer(world.root, **settings).fit(tuner, datamodule=module, ckpt_path=ckpt)


def after(lines: list[list[tuple[int, ...]]], place: tuple[int, int | None]) -> list[list[tuple[int, ...]]]:
    """What comes after a place, per rank."""
    epoch, batch = place
    return [[line for line in rank if line[:2] > (epoch, 99 if batch is None else batch)] for rank in lines]


def rows(lines: list[list[tuple[int, ...]]], epoch: int | None = None) -> list[int]:
    """The rows of all ranks, sorted."""
    return sorted(row for rank in lines for line in rank for row in line[2:] if epoch in (None, line[0]))


def same_weights(first: Path, second: Path) -> None:
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


Undisturbed = Callable[[str, int, int], tuple[World, list[list[tuple[int, ...]]]]]


@pytest.fixture(scope="module")
def undisturbed(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Makes the fit that is never stopped, once for each optimiser and number of ranks and workers."""
    made: dict[tuple[str, int, int], tuple[World, list[list[tuple[int, ...]]]]] = {}

    def make(optimiser: str, ranks: int, workers: int) -> tuple[World, list[list[tuple[int, ...]]]]:
        key = (optimiser, ranks, workers)
        if key not in made:
            world = make_world(small_base, tmp_path_factory.mktemp("undisturbed"))
            tape = Tape(world.root / "whole", {**PLACES, **FINAL})
            run(world, tape, optimiser, ranks, workers)
            made[key] = world, tape.read()
        return made[key]

    return make


def check(undisturbed: Undisturbed, case: Case, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    optimiser, ranks, workers, place, restore = case
    world, full = undisturbed(optimiser, ranks, workers)
    per_epoch = 9 if ranks == 1 else 4
    assert [len(rank) for rank in full] == [EPOCHS * per_epoch] * ranks
    for epoch in range(EPOCHS):
        assert len(set(rows(full, epoch))) == (ROWS if ranks == 1 else 16), "ranks share no row, and none is repeated"
    strategy = pl.strategies.DDPStrategy if ranks == 2 else pl.strategies.SingleDeviceStrategy
    monkeypatch.setattr(
        strategy, "restore_checkpoint_after_setup", property(lambda self: restore == "after"), raising=True
    )
    tape = Tape(folder / "again", FINAL)
    run(world, tape, optimiser, ranks, workers, ckpt=world.root / "whole" / f"{place}.ckpt")
    assert tape.read() == after(full, PLACES[place])
    same_weights(world.root / "whole" / "final.ckpt", folder / "again" / "final.ckpt")


@pytest.mark.parametrize("case", FAST, ids=lambda case: "-".join(map(str, case)))
def test_some_of_the_matrix(
    undisturbed: Undisturbed, case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(undisturbed, case, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: "-".join(map(str, case)))
def test_the_matrix(undisturbed: Undisturbed, case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(undisturbed, case, monkeypatch, tmp_path)


ACCUMULATED = {"inside": (0, 3), "step": (1, 2), "end": (0, None)}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_under_gradient_accumulation(world: World, ranks: int) -> None:
    """Stopped after an optimiser step, the weights go on as well; between two steps the rows do, and the gradients of
    the unfinished step, which no checkpoint holds, are those of its remaining micro-batches."""
    options = {"ranks": ranks, "accumulate_grad_batches": 3}
    whole = Accumulating(world.root / "whole", {**ACCUMULATED, **FINAL})
    run(world, whole, **options)
    full = whole.read()
    for name, place in ACCUMULATED.items():
        tape = Accumulating(world.root / name, FINAL)
        run(world, tape, ckpt=world.root / "whole" / f"{name}.ckpt", **options)
        assert tape.read() == after(full, place), name
        steps = [set((world.root / f / "steps").read_text().splitlines()) for f in ("whole", name)]
        assert steps[1] <= steps[0], "optimiser steps fall after the same batches"
        if name != "inside":
            same_weights(world.root / "whole" / "final.ckpt", world.root / name / "final.ckpt")


@pytest.mark.parametrize("place", ["mid0", pytest.param("end0", marks=pytest.mark.slow)])
def test_two_ranks_go_on_as_one(undisturbed: Undisturbed, place: str, tmp_path: Path) -> None:
    """Rank 0's state is all that a checkpoint keeps: it must say what both ranks have seen."""
    world, two = undisturbed("estimated", 2, 0)
    _, one = undisturbed("estimated", 1, 0)
    tape = Tape(tmp_path / "one")
    run(world, tape, ckpt=world.root / "whole" / f"{place}.ckpt")
    left = rows(after(two, PLACES[place]), 0)
    before = [row for row in rows(two, 0) if row not in left]
    last = [] if place == "mid0" else [one[0][8][2]]  # the 17th row, which two ranks leave out of an epoch
    assert sorted(before + rows(tape.read(), 0) + last) == rows(one, 0)
    assert [rows(tape.read(), epoch) for epoch in (1, 2)] == [rows(one, epoch) for epoch in (1, 2)]


def test_one_rank_goes_on_as_two(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Batches are numbered by rank: batch 6 of 9 on one rank must not be taken for the end of an epoch of 4."""
    world, _ = undisturbed("estimated", 1, 0)
    tape = Tape(tmp_path / "whole", {"late": (0, 5)})
    run(world, tape, max_epochs=1)
    again = Tape(tmp_path / "two")
    run(world, again, ranks=2, max_epochs=1, ckpt=tmp_path / "whole" / "late.ckpt")
    full = tape.read()
    rest = rows(after(full, (0, 5)))
    assert len(rest) == 5
    assert set(rows(again.read())) <= set(rest) and len(rows(again.read())) == 4  # one row is left out on two ranks


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (0, 3)], ids=["first batch", "mid", "late"])
def test_no_row_is_lost_on_another_number_of_ranks(
    undisturbed: Undisturbed, tmp_path: Path, before: int, now: int, place: tuple[int, int]
) -> None:
    """Lightning counts batches per rank: taken over as it stands, the count would end this epoch or the next early."""
    world, _ = undisturbed("estimated", before, 0)
    tape = Tape(tmp_path / "whole", {"here": place})
    run(world, tape, ranks=before, max_epochs=2)
    again = Tape(tmp_path / "again")
    run(world, again, ranks=now, max_epochs=2, ckpt=tmp_path / "whole" / "here.ckpt")
    whole, resumed = tape.read(), again.read()
    rest = rows(after(whole, place), 0)
    ended = before == 2 and place == (0, 3)  # the last batch of two ranks: the epoch is over, but for the odd row
    assert len(set(rows(resumed, 0)) & set(rest)) >= len(rest) - (now == 2) and (not ended or not rows(resumed, 0))
    assert len(rows(resumed, 1)) == ROWS - (now == 2), "the next epoch is whole"


@pytest.mark.parametrize("named", [False, True], ids=["default_root_dir moved", "run_dir named"])
def test_on_another_folder_with_the_cache_gone(world: World, own_cache: Path, tmp_path: Path, named: bool) -> None:
    """What a run used is frozen beside it: moved to another machine, without the score store, it goes on unscored."""
    scored = {"scores": None, "rule": None, "subset_size": 12, "subset_seed": 1, "budget": None}
    tape = Tape(world.root / "whole", {"mid": (0, 1)})
    run(world, tape, data=scored)
    assert own_cache.is_dir()
    away = tmp_path / "away"
    away.mkdir()
    for name in ("pool.jsonl", "eval.jsonl", "whole/mid.ckpt", "im-lightning"):
        shutil.move(world.root / name, away / Path(name).name)
    shutil.rmtree(own_cache)
    moved = world._replace(pool=str(away / "pool.jsonl"), eval=str(away / "eval.jsonl"), root=away)
    if named:
        (frozen,) = (path for path in (away / "im-lightning").iterdir() if not path.name.startswith("."))
        frozen.rename(away / "frozen")
        scored["run_dir"] = str(away / "frozen")
    again = Tape(away / "again")
    run(moved, again, data=scored, ckpt=away / "mid.ckpt")
    assert again.read() == after(tape.read(), (0, 1))
    assert not list(own_cache.rglob("part-*.parquet")), "nothing was scored again"


def test_the_frozen_folder_gone_too_is_scored_again(world: World, own_cache: Path) -> None:
    """Without store and frozen folder the scores are made anew; the same inputs give the same rows."""
    scored = {"scores": None, "rule": None, "subset_size": 12, "subset_seed": 1, "budget": None}
    tape = Tape(world.root / "whole", {"mid": (0, 1)})
    run(world, tape, data=scored)
    shutil.rmtree(own_cache)
    shutil.rmtree(world.root / "im-lightning")
    again = Tape(world.root / "again")
    run(world, again, data=scored, ckpt=world.root / "whole" / "mid.ckpt")
    assert again.read() == after(tape.read(), (0, 1))


NAMESPACE = """
import sys
sys.path[:0] = {paths!r}
import lightning.pytorch as pl
from pathlib import Path
from im_lightning._lightning import PACKAGE as data_package
from im_lightning.ledger.ledger import RunLedger
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule

world = Path({root!r})
def run(name, ckpt=None):
    rows = []
    class Tape(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rows.append(batch["row"].tolist())
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (0, 1) and ckpt is None:
                trainer.save_checkpoint(world / "mid.ckpt")
    pl.seed_everything(1, verbose=False)
    data = InstructMiningDataModule(
        str(world / "pool.jsonl"), eval_data=str(world / "eval.jsonl"), model={base!r}, rule=str(world / "rule.json"),
        scores=str(world / "scores.parquet"), budget=17, batch_size=2, resample_each_epoch=True,
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2, default_root_dir=world,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Tape(), InstructMiningCallback(ledger=str(world / name))],
    )
    trainer.fit(InstructTuningModule({base!r}, lora_rank=2), datamodule=data, ckpt_path=ckpt)
    assert isinstance(data, pl.LightningDataModule) and len(RunLedger(world / name).records()) == 1
    return rows

whole = run("runs")
assert len(whole) == 18 and run("again", world / "mid.ckpt") == whole[2:]
assert "pytorch_lightning" not in sys.modules and data_package == "lightning.pytorch"
print("the same stream")
"""


@pytest.mark.slow
def test_under_the_other_lightning_namespace(world: World) -> None:
    """`lightning.pytorch` is `pytorch_lightning` under another name; where it is not installed it is made from that."""
    package = world.root / "lightning"
    for name, short in (("pytorch_lightning", "pytorch"), ("lightning_fabric", "fabric")):
        source = Path(sys.modules[name].__file__ or "").parent
        shutil.copytree(source, package / short, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = text.replace("pytorch_lightning", "lightning.pytorch").replace("lightning_fabric", "lightning.fabric")
        path.write_text(text, encoding="utf-8")
    (package / "__init__.py").write_text("")
    script = NAMESPACE.format(paths=[str(world.root)], root=str(world.root), base=world.base)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and "the same stream" in done.stdout, done.stderr[-3000:]
