"""A fit's own refit never takes the place of a rule that somebody made or tested, and a weighted fit makes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from fitting import World, trainer, write_pool

from im_lightning.cli import main
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.training.callback import InstructMiningCallback


def fit(world: World, evaluation: str | None = None, **data: Any) -> None:
    """One fit into runs/, with its refit."""
    pl.seed_everything(0, verbose=False)
    mining = InstructMiningCallback("runs", evaluation=evaluation, evaluate_base=False)
    trainer(world.root, callbacks=[mining]).fit(world.tuner(), datamodule=world.data(**data))


@pytest.fixture
def fitted(world: World) -> Path:
    """The rule file that the sixth of six designed runs on two evaluation sets has left: untested, of the first."""
    write_pool(world.root / "other.jsonl", n=5, seed=3, tag="o")
    for seed in range(6):
        fit(world, **designed(world, seed))
    return Path("runs/rule.json")


def designed(world: World, seed: int) -> dict[str, Any]:
    sets = {"eval": world.eval, "other": str(world.root / "other.jsonl")}
    return {"subset_size": 12, "subset_seed": seed, "eval_data": sets}


def test_only_an_untested_refit_of_a_fit_is_replaced(world: World, fitted: Path, capfd: Any) -> None:
    """A weaker rule, on another evaluation set, took the place of the one that `refit` had tested and refused."""
    first = fitted.read_bytes()
    assert json.loads(first)["automatic"] is True and LinearRule.load(fitted).evaluation == "eval"
    fit(world, rule=world.rule, budget=12)
    fit(world, purpose="compare")
    assert fitted.read_bytes() == first, "runs drawn by a rule add nothing to the fit"

    capfd.readouterr()
    fit(world, evaluation="other", **designed(world, 6))
    assert "im-lightning refit runs --out runs/rule.json --evaluation other compares rules" in capfd.readouterr().err
    assert LinearRule.load(fitted).n_runs_ == 7 and LinearRule.load(fitted).evaluation == "other"
    fit(world, **designed(world, 7))
    assert LinearRule.load(fitted).n_runs_ == 8 and LinearRule.load(fitted).evaluation == "other", "as asked before"
    value = json.loads(fitted.read_text())
    del value["automatic"]  # as earlier versions wrote it
    fitted.write_text(json.dumps(value))
    fit(world, **designed(world, 8))
    assert LinearRule.load(fitted).n_runs_ == 9

    for options in (["--permutations", "0", "--bootstrap", "0", "--method", "ols"], ["--permutations", "20"]):
        assert main(["refit", "runs", "--out", str(fitted), "--evaluation", "eval", *options]) == 0
        kept = fitted.read_bytes()
        capfd.readouterr()
        fit(world, **designed(world, 9 + len(options)))
        assert fitted.read_bytes() == kept
        said = capfd.readouterr().err
        assert "runs/rule.json stays, a command made or tested it; to fit it on this run, too: im-lightning" in said

    value = json.loads(fitted.read_text())
    del value["automatic"]
    fitted.write_text(json.dumps(value))
    fit(world, **designed(world, 20))
    assert json.loads(fitted.read_text()) == value, "an earlier version's, tested"
    fitted.write_text("my notes")
    fit(world, **designed(world, 21))
    assert (
        fitted.read_text() == "my notes" and "no refit: runs/rule.json: it is not whole JSON" in capfd.readouterr().err
    )


def test_a_weighted_fit_makes_no_rule(world: World, capfd: Any) -> None:
    for seed in range(6):
        fit(world, rule=world.rule, budget=12, seed=seed)
    assert not Path("runs/rule.json").exists() and "refit" not in capfd.readouterr().err


def test_an_untested_rule_that_predicts_no_better_than_the_mean_is_refused(
    world: World, fitted: Path, capfd: Any
) -> None:
    """Untested is no excuse: its held-out R² is known."""
    rule = LinearRule.load(fitted)
    assert rule.held_out_r2 is not None
    worse = {"grouped_r2": -10.0}
    value = json.loads(fitted.read_text())
    fitted.write_text(json.dumps({**value, "metrics": {**value["metrics"], **worse}}))
    words = ["select", world.scores, world.pool, "--rule", str(fitted), "--budget", "9", "--out", "subset.jsonl"]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "its own runs find it no better than the mean (held-out R² -10; it was not tested)" in said
    assert not Path("subset.jsonl").exists()
    assert main([*words, "--force"]) == 0
    fitted.write_text(json.dumps({**value, "metrics": {**value["metrics"], "grouped_r2": 0.3}}))
    assert main(words) == 0, "one whose held-out R² is above 0 may be used untested"
