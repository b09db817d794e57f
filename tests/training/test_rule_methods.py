"""Rules of other methods in the hands of the data module and the commands: additive weights, refused rules, records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fitting import World, make_world, trainer

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import basis_means, default_transforms, mean_phi, pool_knots
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.weights.quality_weights import quality_weights
from im_lightning.training.callback import InstructMiningCallback


@pytest.fixture
def world(tiny_llama: str, tmp_path: Path) -> World:
    return make_world(tiny_llama, tmp_path)


def runs_of(table: ScoreTable, n: int = 24, slope: float = 0.1) -> list[RunRecord]:
    """Designed runs on rows of the table whose log loss falls with the length of the response."""
    rng = np.random.default_rng(0)
    names = ["length_output", "ppl", "mtld"]
    transforms = default_transforms(table, names)
    knots = pool_knots(table, transforms)
    records = []
    for k in range(n):
        exposures = np.bincount(rng.choice(len(table), 12, replace=False), minlength=len(table))
        phi = mean_phi(table, transforms, exposures)
        y = 1.0 - slope * phi["length_output"] + 0.01 * rng.standard_normal()
        records.append(
            RunRecord(
                f"run-{k}", "complete", "designed", "2026-01-01T00:00:00Z", subset={"digest": str(k)}, phi_means=phi,
                transforms={n: t.to_json() for n, t in transforms.items()}, keys=table.keys,
                basis_means=basis_means(table, transforms, knots, exposures),
                evaluation={"eval": {"loss": float(np.exp(y))}},
            )
        )  # fmt: skip
    return records


def test_the_data_module_draws_by_an_additive_rule(world: World) -> None:
    """Its indicators are asked for, not its hats; the weights are the tilt's; the frozen folder keeps the rule."""
    table = ScoreTable.read(world.scores)
    rule = fit_rule(runs_of(table), "additive")
    rule.save(world.root / "additive.json")
    data = world.data(rule=str(world.root / "additive.json"), budget=12)
    data.setup("fit")
    expected = quality_weights(table, rule, budget=12)
    np.testing.assert_allclose(data.weights, expected.weights, rtol=1e-9)
    assert data.report["method"] == "tilt" and data.rule.knots == rule.knots
    again = world.data(rule=str(world.root / "additive.json"), budget=12)
    again.setup("fit")
    np.testing.assert_array_equal(again.weights, data.weights)


def test_a_run_records_the_means_of_its_hats(world: World) -> None:
    """Without them an additive rule could not be fitted on runs made today."""
    data = world.data(subset_size=12, subset_seed=1)
    ledger = RunLedger(world.root / "runs")
    callback = InstructMiningCallback(ledger=str(ledger.path), refit=False)
    trainer(world.root, callbacks=[callback], max_epochs=2).fit(world.tuner(), datamodule=data)
    (record,) = ledger.records()
    table = ScoreTable.read(world.scores)
    transforms = default_transforms(table)
    exposures = np.bincount(data.rows, minlength=len(table)) * 2
    expected = basis_means(table, transforms, pool_knots(table, transforms), exposures)
    assert record.basis_means.keys() == expected.keys() == {"length_output", "ppl", "mtld"}
    for name, one in expected.items():
        np.testing.assert_allclose(record.basis_means[name]["means"], one["means"])
        np.testing.assert_allclose(record.basis_means[name]["knots"], one["knots"])
        assert np.dot(one["knots"], one["means"]) == pytest.approx(record.phi_means[name])


def test_a_rule_no_better_than_the_mean_is_refused_everywhere(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """By the data module and by select, until it is forced: weighting data by noise wastes a training."""
    table = ScoreTable.read(world.scores)
    path = str(world.root / "noise.json")
    rule = fit_rule(runs_of(table, slope=0.0), "auto", bootstrap=0)
    assert rule.beats_mean is False
    rule.save(path)
    with pytest.raises(RequestError, match="its own runs find it no better than the mean"):
        world.data(rule=path, budget=12).setup("fit")
    with pytest.warns(UserWarning, match="forced: its own runs find it no better than the mean"):
        world.data(rule=path, budget=12, force=True).setup("fit")
    out = str(world.root / "subset.jsonl")
    arguments = ["select", world.scores, world.pool, "--rule", path, "--budget", "5", "--out", out]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "no better than the mean" in said and "--force" in said and not Path(out).exists()
    assert main([*arguments, "--force"]) == 0
    assert "forced: its own runs find it no better than the mean" in capsys.readouterr().err
    assert len(Path(out).read_text().splitlines()) == 5
    scored = ["score", world.pool, "--rule", path, "--model", world.base, "--out", str(world.root / "s.parquet")]
    assert main(scored) == 2
    assert "its own runs find it no better than the mean" in capsys.readouterr().err


def test_select_takes_an_additive_rule(world: World) -> None:
    table = ScoreTable.read(world.scores)
    path, out = str(world.root / "additive.json"), str(world.root / "subset.jsonl")
    fit_rule(runs_of(table), "additive").save(path)
    assert main(["select", world.scores, world.pool, "--rule", path, "--budget", "9", "--out", out]) == 0
    lengths = np.array([len(json.loads(line)["output"]) for line in Path(out).read_text().splitlines()])
    assert len(lengths) == 9
    assert LinearRule.load(path).indicators == ["length_output", "ppl", "mtld"]
