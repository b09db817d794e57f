"""`transfer`: the same subsets on two bases, what their ranks say, and the rule that is accepted by it, or is not."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fitting import write_pool, write_scores
from scipy import stats
from simulated_ledger import make_record, simulate, with_targets

from im_lightning import cli
from im_lightning._utils.hashing import digest_json
from im_lightning.errors import DataError, RequestError
from im_lightning.experiments.transfer.result import Runs, TransferResult
from im_lightning.experiments.transfer.run import _as_ruled, _same_base, _small_runs
from im_lightning.experiments.transfer.settings import TransferSettings
from im_lightning.ledger.curve import at_point
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.rule_file import rule_digest
from im_lightning.rule.transfer import weigh_evidence

FIT = [
    "--data.data=pool.jsonl", "--data.eval_data=eval.jsonl", "--data.model=small", "--data.scores=scores.parquet",
    "--data.subset_size=12", "--data.batch_size=4", "--model.lora_rank=2", "--model.learning_rate=5e-3",
    "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases and five designed runs of the small one."""
    from tiny import make_tiny_llama

    root = tmp_path_factory.mktemp("two_bases")
    make_tiny_llama(root / "small", hidden=16, layers=1)
    make_tiny_llama(root / "large", hidden=24, layers=2, seed=3)
    write_pool(root / "pool.jsonl")
    write_pool(root / "eval.jsonl", n=7, seed=9, tag="e")
    write_scores(root / "scores.parquet", str(root / "pool.jsonl"))
    sweep = {
        "method": "grid",
        "command": ["im-lightning", "fit", *FIT, "${args}"],
        "parameters": {"data.subset_seed": {"values": [0, 1, 2, 3, 4]}},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["sweep", "sweep.yaml"]) == 0
        refit = ["refit", "runs", "--out=rule.json", "--method=ols", "--indicators=ppl", "--permutations=0"]
        assert cli.main([*refit, "--bootstrap=0"]) == 0
    return root


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


ASKED = ["transfer", "runs", "--model=large", "--runs=5", "--out=transfer", "--rule=rule.json"]


@pytest.mark.slow
def test_five_subsets_on_two_bases_end_to_end(study: Path, capfd: Any) -> None:
    """Same rows, other base; the numbers are scipy's on the ledgers' losses; the rule carries its evidence."""
    assert cli.main([*ASKED, "--proxy-rates=1e-4", "--learning-rates=5e-3,1e-3"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    small = {r.subset_key: r for r in RunLedger("runs").records()}
    there = RunLedger("transfer/runs").records()
    assert len(there) == 15 and {r.subset_key for r in there} == set(small)
    large = [r for r in there if r.regime["base_model"] != next(iter(small.values())).regime["base_model"]]
    assert sorted(r.regime["learning_rate"] for r in large) == [1e-3] * 5 + [5e-3] * 5
    assert all(r.phi_means == small[r.subset_key].phi_means and r.keys == small[r.subset_key].keys for r in there)
    result = json.loads(Path("transfer/transfer.json").read_text())
    found = {(a["small"], a["target"]): a for a in result["agreement"]}
    assert set(found) == {(s, t) for s in ("0.005", "0.0001") for t in ("0.005", "0.001")}
    ones = [r for r in large if r.regime["learning_rate"] == 1e-3]
    pair = [small[r.subset_key].loss("eval") for r in ones], [r.loss("eval") for r in ones]
    assert found["0.005", "0.001"]["spearman"] == pytest.approx(stats.spearmanr(*pair).statistic)
    assert found["0.005", "0.001"]["pairs"] == pytest.approx((stats.kendalltau(*pair).statistic + 1) / 2)
    assert "What subsets buy" in out and "10 (" in out and "The rule " in out
    rule = LinearRule.load("transfer/rule.json")
    assert [e["subsets"] for e in rule.transfers] == [5, 5] and rule_digest(rule) == rule_digest(
        LinearRule.load("rule.json")
    )
    before = {p: p.read_bytes() for p in Path("transfer/runs").iterdir()}
    assert cli.main([*ASKED, "--proxy-rates=1e-4", "--learning-rates=5e-3,1e-3"]) == 0
    assert {p: p.read_bytes() for p in Path("transfer/runs").iterdir()} == before, "there is nothing left to make"


def test_a_fit_takes_the_rule_for_the_other_base_by_its_evidence_alone(study: Path, capfd: Any) -> None:
    """Refused without evidence, with evidence that shows nothing, and with that of another rule; else accepted."""
    assert cli.main(ASKED) == 0
    rule = LinearRule.load("transfer/rule.json")
    perfect = {"spearman": 1.0, "low": 0.16, "high": 0.99, "pairs": 1.0}
    entry = {**rule.transfers[0], **perfect}
    fit = [w for w in FIT if not w.startswith(("--data.model", "--data.subset", "--data.scores"))]
    fit += ["--data.model=large", "--data.scores=scores.parquet", "--data.budget=10", "--mining.ledger=used"]
    fit += ["--data.force=weak-rule"]

    def use(**changes: Any) -> tuple[int, str]:
        replace(rule, **changes).save("used.json")
        capfd.readouterr()
        status = cli.main(["fit", *fit, "--data.rule=used.json"])
        return status, capfd.readouterr().err

    status, said = use(transfers=[])
    assert status == 2 and "show that rankings carry over (im-lightning transfer LEDGER --model BASE)" in said
    status, said = use(transfers=[{**entry, "low": -0.4}])
    assert status == 2 and "its transfer evidence does not show that rankings carry over: Spearman 1.00" in said
    status, said = use(transfers=[entry], intercept_=rule.intercept_ + 0.1)
    assert status == 2 and "its transfer evidence was measured for another rule" in said
    status, said = use(transfers=[{**entry, "template": "chat 1"}])
    assert status == 2 and "im-lightning transfer LEDGER" in said, "evidence is for a base with its template"
    status, said = use(transfers=[entry])
    assert status == 0 and "its runs rank subsets as runs of this base do: Spearman 1.00 (95 % interval 0.16" in said
    (record,) = RunLedger("used").records()
    assert "other-base" not in (record.weights.get("forced") or []), "what is shown need not be forced"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--runs=3"], "an interval takes 4 subsets"),
        (["--runs=6"], "the ledger's runs are on 5 different subsets"),
        (["--learning-rates=1e-3,0"], "one is no positive number"),
        (["--proxy-rates=fast"], "--proxy-rates fast: one is no positive number"),
        (["--evaluation=other"], "no complete designed run was evaluated on it"),
        (["--scores=moved.parquet"], "moved.parquet"),
        (["--seed=-1"], "--seed: it is -1. Fix: give one from 0 to 2,147,483,647"),
        (["--arguments=--data.model='x"], "no closing quotation. Fix: close every quote in it"),
        (["--arguments=--data.model=small"], "which stands in the result. Fix: name the base by --model alone"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_run(study: Path, capfd: Any, change: list[str], says: str) -> None:
    assert cli.main([*ASKED, *change]) != 0
    assert says in capfd.readouterr().err and not RunLedger("transfer/runs").records(status=None)


def test_other_rows_are_refused_before_they_are_trained_on(study: Path, capfd: Any) -> None:
    """A table of other scores tilts the subsets otherwise: the pairs would not be pairs."""
    write_scores(study / "others.parquet", str(study / "pool.jsonl"), seed=5)
    assert cli.main([*ASKED, "--scores=others.parquet"]) != 0
    assert "its rows are not those of the run that it repeats" in capfd.readouterr().err
    assert not RunLedger("transfer/runs").records(status=None)


@pytest.mark.parametrize("how", ["arguments", "disk"])
def test_another_evaluation_set_is_refused_before_anything_is_trained(study: Path, capfd: Any, how: str) -> None:
    """After the last run it would be after hours; and who passed nothing has nothing to leave out."""
    write_pool(study / "other.jsonl", n=7, seed=8, tag="o")
    more = ["--arguments=--data.eval_data=other.jsonl"] if how == "arguments" else []
    if how == "disk":
        shutil.copy("other.jsonl", "eval.jsonl")
    assert cli.main([*ASKED, *more]) != 0
    said = capfd.readouterr().err
    assert "evaluation set 'eval': its rows are not those that the run which it repeats was evaluated on" in said
    assert "restore its file as it was, or leave eval_data out of --arguments where they name another" in said
    assert not RunLedger("transfer/runs").records(status=None)


FOUR = [word if not word.startswith("--runs") else "--runs=4" for word in ASKED]


def rename_as_earlier(folder: Path) -> None:
    """Gives the runs of a transfer the ids that earlier versions gave: of the arguments alone, the base by its path."""
    arguments = [
        "--mining.run_id=null", "--data.run_dir=null", "--export=null", "--ckpt_path=null",
        "--data.model=large", "--data.revision=null",
    ]  # fmt: skip
    small = {r.subset_key: r.run_id for r in RunLedger("runs").records()}
    for record in RunLedger(folder).records():
        text = Path(f"runs/{small[record.subset_key]}.config.yaml").read_text()
        older = f"transfer-{digest_json([text, arguments])[:16]}"
        assert older != record.run_id
        for path in folder.glob(f"{record.run_id}.*"):
            path.rename(path.with_name(path.name.replace(record.run_id, older)))
        path = folder / f"{older}.json"
        path.write_text(path.read_text().replace(record.run_id, older))


def test_another_base_in_the_same_folder_is_another_base(study: Path, capfd: Any) -> None:
    """Old and new runs under one path made one Spearman. Folders of earlier versions stay, while the base does."""
    from tiny import make_tiny_llama

    runs = Path("transfer/runs")
    assert cli.main(FOUR) == 0
    rename_as_earlier(runs)
    before = {path: path.read_bytes() for path in runs.iterdir()}
    capfd.readouterr()
    assert cli.main(FOUR) == 0
    assert {path: path.read_bytes() for path in runs.iterdir()} == before, "there is nothing left to make"
    assert "left aside" not in capfd.readouterr().err
    first = {r.run_id for r in RunLedger(runs).records()}
    make_tiny_llama(study / "large", hidden=24, layers=2, seed=4)
    for expected in (4, 0):  # the second time its own runs are there
        capfd.readouterr()
        assert cli.main(FOUR) == 0
        assert capfd.readouterr().err.count(": left aside, it was made from weights ") == expected
    new = {r.subset_key: r for r in RunLedger(runs).records() if r.run_id not in first}
    assert len(new) == 4 and len({r.regime["base_model"] for r in RunLedger(runs).records()}) == 2
    (target,) = json.loads(Path("transfer/transfer.json").read_text())["target"]
    assert target["log_loss"] == {key: pytest.approx(math.log(r.loss("eval"))) for key, r in new.items()}


def test_the_result_of_another_base_is_not_replaced(study: Path, capfd: Any) -> None:
    """Nor its rule, whose evidence lets that base be weighted."""
    shutil.copytree("large", "other")
    assert cli.main(FOUR) == 0
    before = Path("transfer/rule.json").read_bytes()
    assert cli.main([word.replace("large", "other") for word in FOUR]) == 2
    assert "it holds the result of another base (large there, other asked for)" in capfd.readouterr().err
    assert Path("transfer/rule.json").read_bytes() == before


@pytest.mark.slow
def test_under_an_early_rule_the_other_base_is_seen_at_that_point_too(study: Path) -> None:
    """Runs that ended early beside runs that went on: who was stopped would decide the ranks."""
    shutil.rmtree("runs")
    for seeds, flag in (([0, 1], "--eval-at=0.5"), ([2, 3], "--stop-at=0.5")):
        sweep = yaml.safe_load(Path("sweep.yaml").read_text())
        sweep["parameters"] = {"data.subset_seed": {"values": seeds}}
        Path(f"{seeds[0]}.yaml").write_text(yaml.safe_dump(sweep))
        assert cli.main(["sweep", f"{seeds[0]}.yaml", flag, "--arguments=--data.batch_size=2"]) == 0
    refit = ["refit", "runs", "--out=rule.json", "--method=ols", "--indicators=ppl", "--permutations=0"]
    assert cli.main([*refit, "--bootstrap=0", "--at=0.5", "--overwrite"]) == 0
    assert cli.main(FOUR) == 0
    made = {r.subset_key: r for r in RunLedger("transfer/runs").records()}
    assert sorted(r.steps for r in made.values()) == [3, 3, 6, 6]
    (target,) = json.loads(Path("transfer/transfer.json").read_text())["target"]
    seen = {key: at_point(run, 3) for key, run in made.items()}
    assert target["log_loss"] == {key: pytest.approx(math.log(r.loss("eval"))) for key, r in seen.items() if r}
    assert None not in seen.values() and "stopped at step 3 of 6" in target["rate"]


def test_a_run_that_was_not_measured_at_the_rules_point_is_named(tmp_path: Path) -> None:
    rule, run = fit_rule(simulate(12)), make_record(0)
    early = replace(rule, regime={**rule.regime, "stopped_at": {"step": 3, "of": 6}})
    assert _as_ruled([run], rule, tmp_path) == [run]
    with pytest.raises(RequestError, match=r"it was not measured after 3 optimiser steps, where the rule was fitted"):
        _as_ruled([run], early, tmp_path)


def test_a_run_that_others_evaluate_is_not_gone_on_with(study: Path, capfd: Any) -> None:
    """As earlier versions left them, where the evaluation set changed on the way."""
    assert cli.main(FOUR) == 0
    path = Path("transfer/runs") / f"{RunLedger('transfer/runs').records()[2].run_id}.json"
    value = json.loads(path.read_text())
    value["regime"]["evaluation_sets"]["eval"] = "f" * 32
    path.write_text(json.dumps(value))
    assert cli.main(FOUR) == 2
    said = capfd.readouterr().err
    assert f"{path}: it was evaluated on other rows of eval than " in said and "Fix: delete it" in said
    path.unlink()
    assert cli.main(FOUR) == 0 and path.exists()


def test_further_runs_of_the_small_base_are_of_the_same_one(study: Path, capfd: Any) -> None:
    from tiny import make_tiny_llama

    make_tiny_llama(study / "small", hidden=16, layers=1, seed=5)
    assert cli.main([*FOUR, "--proxy-rates=1e-4"]) != 0
    said = capfd.readouterr().err
    assert "the small base: it is no longer the model that the run which it repeats was finetuned from" in said
    assert "restore its folder, or leave out --proxy-rates" in said


def test_a_base_that_changes_on_the_way_is_named(tmp_path: Path) -> None:
    one, other = (make_record(k, regime={"base_model": f"weights {k}"}) for k in (1, 2))
    _same_base([one, one], tmp_path)
    with pytest.raises(RequestError, match=r"made from weights 2, and the runs before it from weights 1.*delete it"):
        _same_base([one, other], tmp_path)


def test_runs_that_scored_for_themselves_or_kept_no_arguments_are_named(study: Path, capfd: Any) -> None:
    for config in Path("runs").glob("*.config.yaml"):
        config.write_text(config.read_text().replace("scores: scores.parquet", "scores: null"))
    assert cli.main(ASKED) == 2 and "it scored the pool by its own base" in capfd.readouterr().err
    for config in Path("runs").glob("*.config.yaml"):
        config.unlink()
    assert cli.main(ASKED) == 2 and "its arguments are not there" in capfd.readouterr().err


def test_a_file_of_another_kind_is_not_replaced(study: Path, capfd: Any) -> None:
    Path("transfer").mkdir()
    Path("transfer/transfer.json").write_text('{"mine": 1}')
    assert cli.main(ASKED) == 2 and "is no result of im-lightning transfer" in capfd.readouterr().err


def test_evidence_is_of_the_loss_that_the_rule_predicts(tmp_path: Path) -> None:
    """Else a rule would be accepted for another base by an agreement on what it does not predict."""
    records, book = with_targets(24), RunLedger(tmp_path / "runs")
    for record in records:
        book.add(record)
    rule = fit_rule(records, evaluation="held-out=0.7,b=0.3")
    for other in ("held-out", "held-out=0.6,b=0.4", "held-out=0.7,em:task=0,b=0.2"):
        with pytest.raises(RequestError, match=rf"--evaluation {other}: the rule predicts held-out=0\.7,b=0\.3, and"):
            _small_runs(book, TransferSettings("large", evaluation=other), rule)
    for same in (None, "held-out=0.7,b=0.3", "b=3, held-out=7", "held-out=0.7,b=0.3,em:task=0"):
        evaluation, small = _small_runs(book, TransferSettings("large", evaluation=same), rule)
        assert evaluation == rule.evaluation and len(small) == 24
    watched = fit_rule(records, evaluation="held-out=1,b=0")
    assert _small_runs(book, TransferSettings("large", evaluation="held-out"), watched)[0] == watched.evaluation


# the table and the evidence, on simulated runs


def bases(noise: float) -> tuple[list[Any], list[Any]]:
    """Twelve subsets on two bases: the second's losses follow the first's up to noise."""
    small = simulate(12, noise=0.002)
    other = {"base_model": {"weights": "f" * 32, "tokenizer": "b" * 32}}
    regime = {**small[0].regime, **other}
    shift = [noise * math.sin(7 * k) for k in range(12)]
    large = [
        make_record(k, loss=r.loss("held-out") * math.exp(shift[k] - 0.2), subset=k, regime=regime, phi=r.phi_means)
        for k, r in enumerate(small)
    ]
    return small, large


def result_of(noise: float) -> TransferResult:
    small, large = bases(noise)
    rule = fit_rule(small)
    return TransferResult("large", "held-out", [Runs.of(small, "held-out")], [Runs.of(large, "held-out")], rule)


def test_the_text_says_what_was_found_and_what_it_means_for_the_rule() -> None:
    alike, unlike = result_of(0.001), result_of(3.0)
    text = " ".join(alike.text(100).split())
    assert "The rule is accepted for this base: its runs rank subsets" in text
    assert "24 (" in text and "The small base's best subset is the best there, too" in text
    ruled = [line for line in alike.text(200).splitlines() if line.startswith("the rule")]
    predictions = [alike.rule.predict_mean([r.phi_means[n] for n in alike.rule.indicators])[0] for r in bases(0)[0]]  # type: ignore[union-attr]
    rho = stats.spearmanr(predictions, [r.loss("held-out") for r in bases(0.001)[1]]).statistic
    assert f" {rho:.2f} " in ruled[0] and "Its own predictions are not shown" not in text
    text = " ".join(unlike.text(100).split())
    assert "The rule stays refused: its transfer evidence does not show" in text
    assert "Its own predictions are not shown to rank the other base's losses" in text


def test_evidence_of_several_bases_stands_beside_each_other_and_new_replaces_old() -> None:
    first = result_of(0.001).ruled
    assert first is not None
    other = {**first.transfers[0], "base_model": {"weights": "0" * 32, "tokenizer": "b" * 32}}
    again = replace(result_of(0.001), rule=replace(first, transfers=[other, first.transfers[0]])).ruled
    assert again is not None and [e["base_model"]["weights"][0] for e in again.transfers] == ["0", "f"]


def test_check_regime_takes_the_evidence_and_tells_it(tmp_path: Path) -> None:
    rule = result_of(0.001).ruled
    assert rule is not None
    rule.save(tmp_path / "rule.json")
    read = LinearRule.load(tmp_path / "rule.json")
    there = bases(0)[1][0].regime
    with pytest.warns(UserWarning, match="rank subsets as runs of this base do"):
        assert len(read.check_regime(there)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weigh_evidence(read, {**there, "base_model": {"weights": "1" * 32}}) == ("", "")
    with pytest.raises(RequestError, match="model weights"):
        read.check_regime({**there, "base_model": {"weights": "1" * 32, "tokenizer": "b" * 32}})
    value = json.loads((tmp_path / "rule.json").read_text())
    (tmp_path / "torn.json").write_text(json.dumps({**value, "transfers": ["yes"]}))
    with pytest.raises(DataError, match=r"transfers\[0\]"):
        LinearRule.load(tmp_path / "torn.json")
