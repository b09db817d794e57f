"""Refits inside a fit: what is drawn afterwards, and that a resumed fit goes on with the rule and the rows it had."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fitting import World, trainer, write_pool, write_scores
from test_callback import Memory, designed
from test_resume import Tape

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.sampler import QualityWeightedSampler
from im_lightning.sampling.weights.quality_weights import quality_weights
from im_lightning.training.callback import InstructMiningCallback

EPOCHS, ROWS = 4, 12
DATA: dict[str, Any] = {"budget": ROWS, "batch_size": 2, "resample_each_epoch": True}
EVALUATION = "eval"


@pytest.fixture
def template(world: World) -> RunRecord:
    """A real designed run, from which others are made up."""
    designed(world, 0, 0, refit=False, ledger=str(world.root / "template"))
    (record,) = RunLedger(world.root / "template").records()
    return record


def add_runs(ledger: RunLedger, template: RunRecord, n: int, seed: int, like: int | None = None) -> None:
    """n designed runs whose loss correlates with the indicators as `seed` has it, or as another seed, `like`."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=3)
    direction = direction if like is None else np.random.default_rng(like).normal(size=3)
    for i in range(n):
        means = {name: v + 0.3 * rng.normal() for name, v in template.phi_means.items()}
        x = np.array([means[name] - template.phi_means[name] for name in means])
        loss = float(np.exp(1.0 + 0.2 * x @ direction + 0.01 * rng.normal()))
        evaluation = {EVALUATION: {**template.evaluation[EVALUATION], "loss": loss, "log_loss": float(np.log(loss))}}
        subset = {**template.subset, "digest": f"{seed}-{i}", "seed": i}
        ledger.add(
            replace(template, run_id=f"run-{seed}-{i:02}", phi_means=means, evaluation=evaluation, subset=subset)
        )


def fit(world: World, *others: Any, every: int = 2, ranks: int = 1, ckpt: Any = None, **options: Any) -> Any:
    """One fit with refits from the world's ledger; `options` are data and callback options and first=callbacks."""
    pl.seed_everything(1, verbose=False)
    first, logger = options.pop("first", ()), options.pop("logger", False)
    ledger = options.pop("ledger", world.root / "runs")
    watch = InstructMiningCallback(ledger=str(ledger), refit=False, refit_every_n_epochs=every, log_every_n_steps=3)
    several = {"strategy": "ddp_fork", "devices": 2} if ranks == 2 else {}
    data = world.data(**{"rule": world.rule, **DATA, "batch_size": 2 // ranks, **options})
    settings = {"callbacks": [*first, watch, *others], "max_epochs": EPOCHS, "logger": logger, **several}
    trainer(world.root, **settings).fit(world.tuner(), datamodule=data, ckpt_path=ckpt)
    return data


def rows_of(tape: Tape, epoch: int) -> list[int]:
    """The epoch's rows in the order of the one global draw."""
    ranks = [[row for line in rank if line[0] == epoch for row in line[2:]] for rank in tape.read()]
    return [row for together in zip(*ranks, strict=True) for row in together]


def drawn(weights: np.ndarray, epoch: int) -> list[int]:
    sampler = QualityWeightedSampler(weights, ROWS)
    sampler.set_epoch(epoch)
    return sampler.draw().tolist()


def weights_by(world: World, rule: Any) -> np.ndarray:
    """Weights by a rule, or by one fitted on records."""
    rule = rule if isinstance(rule, LinearRule) else fit_rule(rule)
    return quality_weights(ScoreTable.read(world.scores), rule, budget=ROWS).weights


def test_the_next_epochs_are_drawn_by_the_refitted_rule(
    world: World, template: RunRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs that other processes add while the fit runs are what a refit is for."""
    ledger, memory = RunLedger(world.root / "runs"), Memory()
    add_runs(ledger, template, 8, 1)
    first = ledger.records()

    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                add_runs(ledger, template, 8, 2, like=1)

    tape = Tape(world.root / "tape")
    data = fit(world, tape, Adds(), every=1, logger=memory)
    both = [r for r in ledger.records() if r.run_id.startswith("run-")]
    start = data.weights
    assert [rows_of(tape, 0), rows_of(tape, 1)] == [drawn(start, 0), drawn(weights_by(world, first), 1)]
    assert rows_of(tape, 2) == drawn(weights_by(world, first), 2), "nothing new in the ledger: the same rule"
    assert rows_of(tape, 3) == drawn(weights_by(world, both), 3)
    assert rows_of(tape, 1) != drawn(start, 1) and rows_of(tape, 3) != drawn(weights_by(world, first), 3)
    err = capfd.readouterr().err
    assert "from epoch 1 on rows are drawn by a rule refitted on 8 runs" in err
    assert "epoch 2 is drawn by the same rule as before: the ledger has no new runs" in err
    assert "from epoch 3 on rows are drawn by a rule refitted on 16 runs" in err
    assert memory.values("im/rule_version") == [1.0, 2.0]
    (record,) = ledger.records("weighted")
    refits = record.weights["refits"]
    assert [r["epoch"] for r in refits] == [1, 3] and [r["runs"] for r in refits] == [8, 16]
    kept = {path.name for path in (data.run_folder / "refits").iterdir()}
    assert kept == {r["rule"] for r in refits}
    assert memory.values("im/ess")[-1] == pytest.approx(1 / (weights_by(world, both) ** 2).sum())


PLACES: dict[str, tuple[int, int | None]] = {"last1": (1, 5), "end1": (1, None), "mid2": (2, 1), "mid3": (3, 2)}


@pytest.mark.parametrize(("ranks", "places"), [(1, list(PLACES)), (2, ["end1", "mid2"])])
def test_a_resumed_fit_goes_on_with_the_rule_it_had(
    world: World, template: RunRecord, ranks: int, places: list[str]
) -> None:
    """The ledger changes all the time: a resume that read it again would train on other rows than the fit it goes on
    with, and rows of one epoch would be drawn twice or never."""
    ledger = RunLedger(world.root / "runs")
    add_runs(ledger, template, 8, 1)
    whole = Tape(world.root / "whole", {name: PLACES[name] for name in places})
    fit(world, whole, ranks=ranks)
    start = weights_by(world, LinearRule.load(world.rule))
    assert rows_of(whole, 2) != drawn(start, 2) and rows_of(whole, 1) == drawn(start, 1)
    assert rows_of(whole, 2) == drawn(weights_by(world, [r for r in ledger.records() if "run-" in r.run_id]), 2)
    (record,) = ledger.records("weighted")
    shutil.rmtree(ledger.path)
    for i, name in enumerate(places):
        changed = world.root / f"changed{i}"
        if i % 2 == 0:  # else it has vanished
            add_runs(RunLedger(changed), template, 9, 7)
        tape = Tape(world.root / f"again-{name}")
        fit(world, tape, ranks=ranks, ckpt=world.root / "whole" / f"{name}.ckpt", ledger=changed)
        e, b = PLACES[name]
        rest = [[line for line in rank if line[:2] > (e, 99 if b is None else b)] for rank in whole.read()]
        assert tape.read() == rest, name
        (again,) = RunLedger(changed).records("weighted")
        assert again.weights == record.weights and again.phi_means == record.phi_means, name


def test_without_the_frozen_folder_the_checkpoint_is_enough(world: World, template: RunRecord) -> None:
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    whole = Tape(world.root / "whole", {"mid2": (2, 1)})
    fit(world, whole)
    shutil.rmtree(world.root / "im-lightning")
    tape = Tape(world.root / "again")
    fit(world, tape, ckpt=world.root / "whole" / "mid2.ckpt", ledger=world.root / "gone")
    assert tape.read()[0] == [line for line in whole.read()[0] if line[:2] > (2, 1)]
    state = torch.load(world.root / "whole" / "mid2.ckpt", weights_only=True)["InstructMiningDataModule"]["refits"]
    assert state["version"] == 1 and state["attempted"] == 2 and isinstance(state["rules"][0]["rule"], str)


def test_a_changed_input_is_named_after_a_refit_too(world: World, template: RunRecord) -> None:
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    whole = Tape(world.root / "whole", {"mid2": (2, 1)})
    fit(world, whole)
    ckpt = world.root / "whole" / "mid2.ckpt"
    write_scores(Path(world.scores), write_pool(Path(world.pool), n=41))
    with pytest.raises(RequestError, match=r"resume: .*pool.rows: 40 → 41.*on_mismatch=warn"):
        fit(world, Tape(world.root / "a"), ckpt=ckpt)
    tape = Tape(world.root / "b")
    data = fit(world, tape, ckpt=ckpt, on_mismatch="warn")
    assert len(data.versions.made[0].weights.weights) == 41, "the checkpoint's rule, on the pool as it is now"
    assert rows_of(tape, 3) == drawn(data.versions.made[0].weights.weights, 3)


def test_a_checkpoint_of_before_the_refit_makes_it_up(world: World, template: RunRecord) -> None:
    """Another callback may write its checkpoint first: Lightning then begins the next epoch without an end of this."""
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    whole = Tape(world.root / "whole", {"last1": (1, 5)})
    fit(world, first=(whole,))
    state = torch.load(world.root / "whole" / "last1.ckpt", weights_only=True)["InstructMiningDataModule"]
    assert "refits" not in state
    tape = Tape(world.root / "again")
    fit(world, tape, ckpt=world.root / "whole" / "last1.ckpt")
    assert tape.read()[0] == [line for line in whole.read()[0] if line[0] > 1]


def test_another_strength_is_named_where_the_fit_began_without_a_rule(world: World, template: RunRecord) -> None:
    """The inputs of such a fit are uniform weights: epochs by one strength and by another would be of one record."""
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    whole = Tape(world.root / "whole", {"mid2": (2, 1)})
    fit(world, whole, rule=None)
    ckpt = world.root / "whole" / "mid2.ckpt"
    with pytest.raises(RequestError, match=r"resume: .*weighting.strength: 1.0 → 0.5"):
        fit(world, Tape(world.root / "a"), rule=None, strength=0.5, ckpt=ckpt)
    state = torch.load(ckpt, weights_only=True)
    del state["InstructMiningDataModule"]["refits"]["weighting"]  # as earlier versions wrote it
    torch.save(state, ckpt)
    tape = Tape(world.root / "again")
    fit(world, tape, rule=None, ckpt=ckpt)
    assert tape.read()[0] == [line for line in whole.read()[0] if line[:2] > (2, 1)]


def test_a_fit_may_begin_without_a_rule(world: World, template: RunRecord) -> None:
    """Uniform at first; the rule comes once the ledger has enough runs."""
    tape = Tape(world.root / "tape")
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    records = RunLedger(world.root / "runs").records()
    fit(world, tape, rule=None)
    assert rows_of(tape, 1) == drawn(np.full(40, 1 / 40), 1) and rows_of(tape, 2) == drawn(
        weights_by(world, records), 2
    )


def test_a_refit_that_fails_leaves_the_rule(
    world: World, template: RunRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    tape = Tape(world.root / "tape")
    add_runs(RunLedger(world.root / "runs"), template, 4, 1)
    data = fit(world, tape, every=1)
    assert [rows_of(tape, e) for e in range(EPOCHS)] == [drawn(data.weights, e) for e in range(EPOCHS)]
    err = capfd.readouterr().err
    assert all(f"epoch {e} is drawn by the same rule as before: " in err for e in (1, 2, 3)) and "epoch 4" not in err
    (record,) = RunLedger(world.root / "runs").records("weighted")
    assert "refits" not in record.weights


def test_a_rule_for_another_model_is_not_taken(
    world: World, template: RunRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ledger may hold runs of another base: their rule says nothing about this one."""
    other = replace(template, regime={**template.regime, "base_model": "another"})
    add_runs(RunLedger(world.root / "runs"), other, 8, 1)
    tape = Tape(world.root / "tape")
    data = fit(world, tape)
    assert rows_of(tape, 2) == drawn(data.weights, 2)
    assert "epoch 2 is drawn by the same rule as before" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resample_each_epoch": False}, r"drawn once.*pass budget= and resample_each_epoch=True, or leave"),
        ({"subset_size": 12}, r"refit_every_n_epochs=2: the rows of this fit are drawn once"),
        ({"weighting": "uniform"}, r"under weighting uniform a rule changes nothing.*choose another weighting"),
        ({"rule": None, "scores": None}, r"the pool has no scores for a rule to weigh.*pass rule=, scores= or ind"),
    ],
)
def test_refits_that_could_change_nothing_are_refused(world: World, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        fit(world, **options)


def test_less_than_one_epoch_is_refused() -> None:
    with pytest.raises(RequestError, match=r"refit_every_n_epochs: it is 0.*give at least one epoch"):
        InstructMiningCallback(refit_every_n_epochs=0)


def test_rows_that_the_new_rule_cannot_predict_are_left_out(world: World, template: RunRecord) -> None:
    scores = write_scores(Path(world.root / "holes.parquet"), world.pool, missing=(2, 7))
    add_runs(RunLedger(world.root / "runs"), template, 8, 1)
    tape = Tape(world.root / "tape")
    data = fit(world, tape, rule=None, scores=scores)
    assert data.eligible.all() and not data.versions.made[0].weights.eligible[[2, 7]].any()
    assert not {2, 7} & {*rows_of(tape, 2), *rows_of(tape, 3)}


def test_a_refit_that_predicts_no_better_than_the_mean_is_not_drawn_by(
    world: World, template: RunRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody tests a rule inside a fit; its held-out R² is known all the same."""
    ledger, tape = RunLedger(world.root / "runs"), Tape(world.root / "tape")
    add_runs(ledger, template, 8, 1)
    add_runs(ledger, template, 8, 2)  # of another direction: no one line fits both
    data = fit(world, tape)
    assert rows_of(tape, 2) == drawn(data.weights, 2)
    err = capfd.readouterr().err
    assert "epoch 2 is drawn by the same rule as before" in err and "no better than the mean (held-out R² -" in err
