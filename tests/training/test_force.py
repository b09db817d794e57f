"""`force` takes the names of risks: whoever accepts a weak rule has not accepted the scores of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fitting import World, trainer

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.selection.select import select_subset
from im_lightning.sampling.weights.quality_weights import quality_weights
from im_lightning.training.callback import InstructMiningCallback

BOTH = "weak-rule,other-base"


@pytest.fixture
def risky(world: World) -> str:
    """The file of a rule that is no better than the mean, and for whose fit ppl was computed in another way."""
    value = json.loads(Path(world.rule).read_text())
    (ppl,) = (one for one in value["regressors"] if one["indicator"] == "ppl")
    ppl["identity"] = {**ppl["identity"], "version": 2}
    value["metrics"]["beats_mean"] = False
    path = world.root / "risky.json"
    path.write_text(json.dumps(value))
    return str(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", [quality_weights, lambda t, r, **k: select_subset(t, r, 5, **k)])
def test_python_refuses_what_the_commands_refuse(world: World, risky: str, call: Any) -> None:
    """A notebook is where rules are tried first; it gave weights by a rule that every command refuses."""
    table, rule = ScoreTable.read(world.scores), LinearRule.load(risky)
    with pytest.raises(
        RequestError, match=r"no better than the mean.*ppl was computed in another way.*--force " + BOTH
    ):
        call(table, rule)
    with pytest.raises(RequestError, match=r"ppl was computed in another way.*force='weak-rule,other-base'"):
        call(table, rule, force=True)
    with pytest.raises(RequestError, match=r"no better than the mean.*--force weak-rule,other-base"):
        call(table, rule, force="other-base")
    assert call(table, rule, force=BOTH) is not None
    assert quality_weights(table, rule, force=["weak-rule", "other-base"]).report["forced"] == BOTH.split(",")
    assert "forced" not in quality_weights(table, LinearRule.load(world.rule)).report
    with pytest.raises(RequestError, match=r"force weak-rul: there is no such risk.*weak-rule, other-base"):
        call(table, rule, force="weak-rul")


def test_the_manifest_keeps_what_was_forced(world: World, risky: str, capsys: Any) -> None:
    said = [world.scores, world.pool, "--rule", risky, "--budget", "5", "--out", "o.jsonl"]
    assert main(["select", *said]) == main(["select", "--force", *said]) == 2, "the bare flag takes no file for a name"
    assert "pass --force weak-rule,other-base (a fit: " in capsys.readouterr().err
    assert main(["select", *said, "--force=typo"]) == 2 and "force typo: there is" in capsys.readouterr().err
    for words in (["--force", BOTH, *said], [*said, f"--force={BOTH}"]):
        assert main(["select", *words]) == 0
        assert json.loads(Path("o.jsonl.manifest.json").read_text())["forced"] == BOTH.split(",")
    assert main(["select", *said[:3], world.rule, *said[4:], "--force"]) == 0
    assert "forced" not in json.loads(Path("o.jsonl.manifest.json").read_text()), "asked for, and not needed"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fit_keeps_what_was_forced_in_its_record(world: World, risky: str, capfd: Any) -> None:
    with pytest.raises(RequestError, match=r"ppl was computed in another way.*--data.force=weak-rule,other-base"):
        world.data(rule=risky, budget=12, force=True).setup("fit")
    rule = LinearRule.load(risky)
    rule.regime = {"base_model": "another base"}
    rule.identities = {}
    rule.save(risky)
    with pytest.raises(
        RequestError, match=r"base model: another base in the rule's runs.*--force weak-rule,other-base"
    ):
        world.data(rule=risky, budget=12, force=True).setup("fit")
    mining = InstructMiningCallback("runs", evaluate_base=False)
    data = world.data(rule=risky, budget=12, force=["weak-rule", "other-base"])
    trainer(world.root, callbacks=[mining]).fit(world.tuner(), datamodule=data)
    (record,) = RunLedger("runs").records()
    assert record.weights["forced"] == BOTH.split(",")
    recipe = {"data": {"data": world.pool, "model": world.base, "rule": risky, "budget": 12, "scores": world.scores}}
    recipe["data"]["force"] = True
    Path("recipe.yaml").write_text(json.dumps(recipe))
    fit = ["fit", "--config=recipe.yaml", "--trainer.logger=false", "--trainer.max_epochs=1"]
    assert main(fit) == 2
    assert "--data.force=weak-rule,other-base" in capfd.readouterr().err
    assert main([*fit, f"--data.force={BOTH}"]) == 0, capfd.readouterr().err
