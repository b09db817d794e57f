"""The evaluation curve and runs that are stopped early: same numbers as a run made to end there, and never mixed up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
from fitting import World
from simulated_ledger import simulate
from test_callback import Memory, callback, fit
from test_resume import Tape

from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.curve import at_point, read_points, step_of, stopped, stopped_text
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.training.run.refit import _run_of


class Rates(pl.Callback):
    """The learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(world: World, name: str, *callbacks: Any, ckpt: Any = None, **options: Any) -> RunRecord:
    """A designed run of 6 steps, 12 rows twice, in a ledger of its own."""
    mining = {key: options.pop(key) for key in ("eval_at", "stop_at") if key in options}
    watch = callback(world, ledger=str(world.root / name), **mining)
    data = world.data(subset_size=12, subset_seed=0, batch_size=4)
    fit(world, watch, *callbacks, data=data, ckpt=ckpt, **options)
    assert watch.record is not None
    return watch.record


def same(one: RunRecord, other: RunRecord) -> None:
    """All but what two runs of the same thing differ in: their names and times."""
    own = {"run_id": "", "created": "", "seconds": 0.0, "note": "", "curve": {}}
    assert replace(one, **own) == replace(other, **own)


def test_a_point_of_the_curve_is_what_a_stopped_run_records(world: World) -> None:
    """This is what lets the two stand in one fit: losses, means, tokens, shares, to the last bit."""
    whole = run(world, "whole", eval_at=[0.34, 4])
    for at, step in ((0.34, 2), (4, 4)):
        short = run(world, f"short-{step}", stop_at=at)
        assert short.status == "complete" and short.steps == step and short.subset["exposures"] == 4 * step
        assert stopped_text(short) == f"stopped at step {step} of 6" and not stopped_text(whole)
        seen = at_point(RunRecord.from_json(whole.to_json(), "x"), at)
        assert seen is not None and seen.loss("eval") != whole.loss("eval")
        same(seen, RunRecord.from_json(short.to_json(), "y"))
        assert at_point(short, at) is not None and at_point(short, 5) is None and at_point(whole, 5) is None


def test_measuring_on_the_way_changes_nothing_of_the_run(world: World) -> None:
    """Dropout, the order of rows and the schedule go on as if nobody had looked."""
    plain, looked = run(world, "plain"), run(world, "looked", eval_at="1,2,3,4,5")
    assert looked.compute["tokens_evaluated"] == 6 * plain.compute["tokens_evaluated"], "which is counted as its cost"
    same(replace(plain, compute={}), replace(looked, compute={}))
    assert plain.curve == {} and [p["steps"] for p in looked.curve["points"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stopped_run_has_the_learning_rates_of_the_full_one(world: World, accumulate: int) -> None:
    """A schedule that ended with the run would be another regime, and other losses."""
    whole, short = Rates(), Rates()
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 8}
    run(world, "whole", whole, **options)
    record = run(world, "short", short, stop_at=0.5, **options)
    assert record.steps == 12 // accumulate
    assert short.seen == whole.seen[: len(whole.seen) // 2] and len(set(short.seen)) > 1


def test_the_curve_is_logged_under_the_name_of_the_loss(world: World) -> None:
    memory = Memory()
    record = run(world, "runs", eval_at=[2, 4], logger=memory)
    losses = [p["evaluation"]["eval"]["loss"] for p in record.curve["points"]] + [record.loss("eval")]
    assert memory.values("im/eval_loss/eval") == losses and len(set(losses)) == 3


def test_a_resumed_run_keeps_its_curve(world: World) -> None:
    """Also from a checkpoint that was written at the very step of a point."""
    whole = run(world, "whole", eval_at=[2, 3, 5])
    tape = Tape(world.root / "tape", {"mid": (1, 0)})
    run(world, "runs", tape, eval_at=[2, 3, 5])
    again = run(world, "runs", ckpt=world.root / "tape" / "mid.ckpt", eval_at=[2, 3, 5])
    (record,) = RunLedger(world.root / "runs").records()
    assert record.curve == again.to_json()["curve"] and [p["steps"] for p in record.curve["points"]] == [2, 3, 5]
    for one, other in zip(record.curve["points"], whole.curve["points"], strict=True):
        assert one["evaluation"]["eval"]["loss"] == pytest.approx(other["evaluation"]["eval"]["loss"], rel=1e-6)
        assert one["phi_means"] == other["phi_means"] and one["subset"] == other["subset"]


def test_a_resume_that_asks_for_no_points_keeps_those_it_had(world: World) -> None:
    whole = run(world, "whole", eval_at=[2, 3])
    run(world, "runs", Tape(world.root / "tape", {"mid": (1, 0)}), eval_at=[2, 3])
    again = run(world, "runs", ckpt=world.root / "tape" / "mid.ckpt")
    for point in (2, 0.5):
        one, other = at_point(again, point), at_point(whole, point)
        assert one is not None and other is not None
        assert one.loss("eval") == pytest.approx(other.loss("eval"), rel=1e-6) and one.regime == other.regime


def test_a_resume_past_a_point_says_what_the_curve_lacks(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    run(world, "runs", Tape(world.root / "tape", {"mid": (1, 0)}))
    mid = world.root / "tape" / "mid.ckpt"
    again = run(world, "runs", ckpt=mid, eval_at=[2, 5])
    assert [p["steps"] for p in again.curve["points"]] == [5]
    assert "the checkpoint is of step 4: the curve lacks 2" in capfd.readouterr().err
    with pytest.raises(RequestError, match="checkpoint is of step 4, and the run would end after step 3"):
        run(world, "runs", ckpt=mid, stop_at=3)


def test_two_ranks_have_the_curve_of_one(world: World) -> None:
    one = run(world, "one", eval_at=[3])
    watch = callback(world, ledger=str(world.root / "two"), eval_at=[3])
    data = world.data(subset_size=12, subset_seed=0, batch_size=2)
    fit(world, watch, data=data, strategy="ddp_fork", devices=2)
    (two,) = RunLedger(world.root / "two").records()
    a, b = one.curve["points"][0], two.curve["points"][0]
    assert a["subset"] == b["subset"] and a["phi_means"] == pytest.approx(b["phi_means"])
    assert a["evaluation"]["eval"]["loss"] == pytest.approx(b["evaluation"]["eval"]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("mining", "options", "text"),
    [
        ({"eval_at": "0.5,x"}, {}, "eval_at: ' ?x' is neither a share of the steps between 0 and 1"),
        ({"stop_at": 1.5}, {}, "stop_at: 1.5 is neither"),
        ({"eval_at": [-1]}, {}, "eval_at: -1 is neither"),
        ({"eval_at": 6}, {}, "the run has 6 optimiser steps, and is measured at their end anyway"),
        ({"stop_at": 0.99}, {}, "name an earlier point"),
        ({"stop_at": 2}, {"min_epochs": 1}, "min_epochs or min_steps, and would go on"),
        ({"eval_at": 0.5}, {"max_epochs": -1}, "the Trainer has no end"),
    ],
)
def test_points_that_a_run_cannot_have(world: World, mining: Any, options: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        run(world, "runs", **mining, **options)


def test_trial_runs_do_not_ask_for_points(world: World) -> None:
    watch = callback(world, eval_at=[4])
    fit(world, watch, data=world.data(subset_size=12, subset_seed=0), fast_dev_run=True)
    assert watch.record is None


def test_a_refit_inside_a_fit_keeps_to_full_runs_under_a_rule_of_full_runs() -> None:
    """The run that names the rule's regime must not be a stopped one, or early losses would take the place of ends."""
    rule = fit_rule(simulate(12))
    short = [stopped(replace(record, run_id=f"a-{record.run_id}"), 8, 40) for record in simulate(12, seed=1)]
    assert _run_of(short, rule, "held-out") is None and _run_of([*short, *simulate(12)], rule, "held-out") == "run-000"
    assert _run_of([*simulate(12), *short], fit_rule(short), "held-out") == "a-run-000"


class Ends(pl.Callback):
    """Ends the run as EarlyStopping and max_time do."""

    def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2


@pytest.mark.parametrize("eval_at", [None, [1, 4]])
def test_a_run_that_something_else_ended_is_recorded_as_a_stopped_one(
    world: World, capfd: pytest.CaptureFixture[str], eval_at: Any
) -> None:
    """An early loss among those of finished runs would bend the rule, and nobody would see it."""
    short = run(world, "short", Ends(), eval_at=eval_at)
    err = capfd.readouterr().err
    assert "ended at step 2 of 6, before its limits" in err and "no fit takes it for a full run" in err
    assert "designed runs are needed" not in err and "before its limits" in short.note
    assert short.status == "complete" and stopped_text(short) == "stopped at step 2 of 6"
    asked = run(world, "asked", stop_at=2, **({} if eval_at is None else {"eval_at": [1]}))
    same(short, asked)
    assert at_point(short, 2) is not None and len(short.curve["points"]) == len(asked.curve["points"])


def test_what_ends_a_run_at_its_last_step_leaves_a_full_one(world: World) -> None:
    class Last(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            trainer.should_stop = trainer.global_step >= 6

    whole = run(world, "whole", Last())
    assert whole.steps == 6 and not stopped_text(whole) and whole.curve == {} and not whole.note


def test_points_and_their_steps() -> None:
    assert read_points("eval_at", None) == [] and read_points("eval_at", "0.2") == [0.2]
    assert [step_of(0.2, n) for n in (1, 5, 48, 256)] == [1, 1, 10, 51]


def test_a_curve_that_is_none_is_refused_by_name(world: World) -> None:
    value = run(world, "runs", eval_at=[2]).to_json()
    value["curve"]["points"][0]["phi_means"] = None
    with pytest.raises(DataError, match=r"the field curve is .* it must be the steps of the full run"):
        RunRecord.from_json(value, "file.json")
    assert math.isnan(at_means(value))


def at_means(value: Any) -> float:
    """A mean that is missing at a point is missing, not zero."""
    value["curve"]["points"][0]["phi_means"] = {"ppl": None}
    seen = at_point(RunRecord.from_json(value, "file.json"), 2)
    assert seen is not None
    return seen.phi_means["ppl"]
