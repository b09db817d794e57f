"""A LoRA rule was judged under full finetuning at another rate, in silence: what a rule is used for takes the method
and the learning rate of its runs unless told otherwise, and says which it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fitting import write_pool, write_rule, write_scores

from im_lightning.cli import main
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.regime import lora_of
from im_lightning.training.module import InstructTuningModule

RUNS = {"method": "lora r=3 alpha=6 all-linear", "learning_rate": 0.004}


@pytest.fixture
def desk(tmp_path: Path, small_base: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool, three evaluation sets, and a rule whose runs were finetuned with LoRA of rank 3 at 0.004."""
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool.jsonl")
    for seed, name in enumerate(("eval", "search", "report"), start=8):
        write_pool(tmp_path / f"{name}.jsonl", n=5, seed=seed, tag=name)
    rule = Path(write_rule(tmp_path / "rule.json", write_scores(tmp_path / "scores.parquet", "pool.jsonl")))
    rule.write_text(json.dumps({**json.loads(rule.read_text()), "regime": RUNS}))
    (tmp_path / "fit.yaml").write_text(
        f"data: {{data: pool.jsonl, eval_data: eval.jsonl, scores: scores.parquet, model: {small_base}, budget: 5, "
        "rule: rule.json}\n"
        "trainer: {accelerator: cpu, max_epochs: 1, logger: false, enable_checkpointing: false}\n"
    )
    return tmp_path


def asked(command: str, model: str) -> list[str]:
    shared = (
        f"pool.jsonl --scores scores.parquet --rule rule.json --model {model} --device cpu --seeds 1 --out {command}"
    )
    own = {
        "compare": "--eval-data report.jsonl --tokens 200 --steps 2 --arms random,weighted --pool-draw same",
        "search": "--eval-data search.jsonl --report-data report.jsonl --low 4 --high 8 --method grid --grid 2",
    }
    return [command, *shared.split(), *own[command].split()]


def regimes(ledger: str) -> set[tuple[str, float]]:
    return {(r.regime["method"], r.regime["learning_rate"]) for r in RunLedger(ledger).records(status=None)}


@pytest.mark.parametrize("command", ["compare", "search"])
def test_a_study_is_tuned_as_the_rules_runs_were(command: str, desk: Path, small_base: str, capfd: Any) -> None:
    assert main(asked(command, small_base)) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert regimes(f"{command}/ledger") == {("lora r=3 alpha=6 all-linear", 0.004)}
    assert "Method and learning rate are those of the rule's runs: lora r=3 alpha=6 all-linear, 0.004." in shown

    assert main([*asked(command, small_base), "--lora-rank=0", "--out", f"{command}-full"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert regimes(f"{command}-full/ledger") == {("full", 2e-5)}
    assert "NOT AS THE RULE'S RUNS: they were finetuned by lora r=3 alpha=6 all-linear at learning rate 0.004" in shown


def test_a_weighted_fit_is_tuned_as_the_rules_runs_were(desk: Path, capfd: Any) -> None:
    assert main(["fit", "--config=fit.yaml", "--mining.ledger=as-ruled"]) == 0
    said = capfd.readouterr().err
    assert regimes("as-ruled") == {("lora r=3 alpha=6 all-linear", 0.004)}
    assert "method and learning rate as in the rule's runs: lora r=3 alpha=6 all-linear, learning_rate 0.004" in said

    assert main(["fit", "--config=fit.yaml", "--mining.ledger=told", "--model.lora_rank=2"]) == 0
    said = capfd.readouterr().err
    assert regimes("told") == {("lora r=2 alpha=4 all-linear", 0.004)}
    assert (
        "as in the rule's runs" not in said
        and "method: lora r=3 alpha=6 all-linear in the rule's runs, lora r=2" in said
    )


def test_a_weighted_fit_takes_alpha_and_layers_of_the_rules_runs(desk: Path, capfd: Any) -> None:
    """It took rank and rate alone, and said that its method was theirs."""
    method = "lora r=3 alpha=12 k_proj+q_proj"
    (desk / "rule.json").write_text(
        json.dumps({**json.loads((desk / "rule.json").read_text()), "regime": {**RUNS, "method": method}})
    )
    assert main(["fit", "--config=fit.yaml", "--mining.ledger=as-ruled"]) == 0
    assert regimes("as-ruled") == {(method, 0.004)}
    assert f"as in the rule's runs: {method}, learning_rate 0.004" in capfd.readouterr().err
    for own, made in (("alpha=24", "lora r=3 alpha=24 k_proj+q_proj"), ("rank=2", "lora r=2 alpha=4 all-linear")):
        assert main(["fit", "--config=fit.yaml", f"--mining.ledger={own}", f"--model.lora_{own}"]) == 0
        assert regimes(own) == {(made, 0.004)}
        assert "as in the rule's runs" not in capfd.readouterr().err


def test_the_arguments_of_a_method() -> None:
    for method in ("lora r=8 alpha=16 all-linear", "lora r=8 alpha=1e+06 q_proj", "full"):
        assert InstructTuningModule("base", **lora_of(method)).describe()["method"] == method
    assert lora_of("lora r=8 alpha=16 .*[qk]_proj") == {"lora_rank": 8, "lora_target_modules": ".*[qk]_proj"}
    assert lora_of("lora r=8 alpha=4 all-linear on nf4") == {"lora_rank": 8, "lora_alpha": 4.0}
