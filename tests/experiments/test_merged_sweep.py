"""A sweep over blocks: what is trained and what evaluated, that its records say so, and what stays after a kill."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fitting import write_pool, write_scores

from im_lightning import cli
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.training import evaluation
from im_lightning.training.module import InstructTuningModule

RECIPE = """
seed_everything: 5
data: {data: pool.jsonl, eval_data: eval.jsonl, model: model, subset_size: 10, batch_size: 4, template: alpaca}
model: {lora_rank: 2, learning_rate: 0.02}
mining: {ledger: runs, refit: false}
trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false, accelerator: cpu,
  devices: 1}
"""
BLOCKS, TWINS, RUNS, SIZE = 6, 4, 8, 12


def design(*options: str) -> int:
    fixed = ["--config", "recipe.yaml", "--kind", "merged", "--out", "sweep.yaml", "--runs", str(RUNS)]
    fixed += ["--subset-size", str(SIZE), "--blocks", str(BLOCKS), "--twins", str(TWINS)]
    return cli.main(["design", "scores.parquet", "pool.jsonl", *fixed, *options])


def make_world(folder: Path) -> None:
    from tiny import make_tiny_llama

    make_tiny_llama(folder / "model", hidden=16, layers=1)
    write_pool(folder / "pool.jsonl", n=240)
    write_pool(folder / "eval.jsonl", n=5, seed=9, tag="e")
    write_scores(folder / "scores.parquet", str(folder / "pool.jsonl"))
    (folder / "recipe.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; look, do not write."""
    folder, before = tmp_path_factory.mktemp("swept"), Path.cwd()
    make_world(folder)
    os.chdir(folder)
    try:
        assert design() == 0 and cli.main(["sweep", "sweep.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(swept, tmp_path / "w", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def by_kind() -> tuple[list[RunRecord], list[RunRecord]]:
    records = RunLedger("runs").records()
    return [r for r in records if r.kind == "trained"], [r for r in records if r.kind == "merged"]


def test_blocks_and_twins_are_trained_and_mixtures_evaluated(copied: Path, capsys: Any) -> None:
    blocks = json.loads(Path("sweep.blocks.json").read_text())
    trained, merged = by_kind()
    assert (len(trained), len(merged)) == (BLOCKS + TWINS, RUNS)
    parts, twins = trained[:BLOCKS], trained[BLOCKS:]
    pool = [json.loads(line) for line in Path("pool.jsonl").read_text().splitlines()]
    for record, (name, rows) in zip(parts, blocks["rows"].items(), strict=True):
        assert record.subset["shares_wanted"][name] == 1 and record.subset["size"] == SIZE <= len(rows)
        found = [sum(pool[row]["source"] == source for row in rows) / len(rows) for source in "ab"]
        assert sum(found) == pytest.approx(1)
    merged.sort(key=lambda r: r.run_id)
    for record, mixture in zip(merged, blocks["mixtures"], strict=True):
        shares = [mixture.get(name, 0.0) for name in blocks["rows"]]
        for name, value in record.phi_means.items():
            assert value == pytest.approx(sum(a * r.phi_means[name] for a, r in zip(shares, parts, strict=True)))
            assert sum(one[name] for one in record.source_phi_means.values()) == pytest.approx(value)
            hats = sum(a * np.array(r.basis_means[name]["means"]) for a, r in zip(shares, parts, strict=True))
            np.testing.assert_allclose(record.basis_means[name]["means"], hats)
        assert record.made["alpha"] == mixture and record.made["s"] == 1.0 and record.tokens == 0
        told = {name: one["digest"] for name, one in record.made["blocks"].items()}
        assert told == {n: r.subset["digest"] for n, r in zip(blocks["rows"], parts, strict=True) if n in mixture}
        assert record.compute == {**parts[0].compute, "tokens_trained": 0}, "one pass over the evaluation sets"
        assert record.regime == twins[0].regime and record.purpose == "designed" and record.status == "complete"
        assert record.evaluation["eval"]["base_loss"] == parts[0].evaluation["eval"]["base_loss"]
        losses = RunLedger("runs").losses(record.run_id)["eval"]
        assert losses.sums.sum() / losses.counts.sum() == pytest.approx(record.loss("eval"))
    assert [t.mixture_key for t in twins] == [m.mixture_key for m in merged[:TWINS]]
    for twin, mixture in zip(twins, blocks["mixtures"], strict=False):  # exactly in the shares of its mixture
        assert twin.subset["deficit"] == {} and twin.subset["source_shares"].keys() <= {"a", "b"}
        assert {n: s for n, s in twin.subset["shares_wanted"].items() if s} == pytest.approx(mixture)
    assert cli.main(["runs", "runs"]) == 0 and "designed, merged" in capsys.readouterr().out


def test_a_merged_run_is_the_evaluation_of_the_merged_weights(copied: Path) -> None:
    """Against peft's own merge of the kept adapters into the base's weights."""
    from peft import PeftModel

    from im_lightning.training.datamodule import InstructMiningDataModule

    record = by_kind()[1][0]
    module = InstructTuningModule("model", lora_rank=2)
    module.configure_model()
    base = module.network.unload()
    names = list(record.made["alpha"])
    peft = PeftModel.from_pretrained(base, f"sweeps/sweep/adapters/{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(f"sweeps/sweep/adapters/{name}", adapter_name=name)
    peft.add_weighted_adapter(names, [record.made["alpha"][n] for n in names], "all", combination_type="cat")
    peft.set_adapter("all")
    module.network = peft.merge_and_unload().eval()
    data = InstructMiningDataModule("pool.jsonl", "eval.jsonl", "model", template="alpaca")
    data.setup()
    found = evaluation.evaluate(list(data.eval_sets.values()), module.response_nll, module.device)
    assert found["eval"].loss == pytest.approx(record.loss("eval"), abs=1e-5)
    assert abs(record.loss("eval") - record.evaluation["eval"]["base_loss"]) > 1e-3


def test_killed_at_any_point_the_rest_follows(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the evaluations; between a block's record and its adapter; and with nothing left to do."""
    state = Path("sweeps/sweep/sweep.json")
    whole = {r.run_id: r.loss("eval") for r in RunLedger("runs").records()}
    merged = [r.run_id for r in by_kind()[1]]
    before = {path.name: path.stat().st_mtime_ns for path in Path("runs").iterdir()}
    assert cli.main(["sweep", "sweep.yaml"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in Path("runs").iterdir()} == before, "nothing is done again"

    for run_id in merged[3:]:
        for path in Path("runs").glob(f"{run_id}*"):
            path.unlink()
    real, calls = evaluation.evaluate_with, []

    def killed(*given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(evaluation, "evaluate_with", killed)
    assert cli.main(["sweep", "sweep.yaml"]) == 130 and len(by_kind()[1]) == 5
    monkeypatch.undo()
    monkeypatch.chdir(copied)
    value = json.loads(state.read_text())
    value["trials"][1] |= {"status": "running"}  # its record is there, its adapter is not: trained again
    state.write_text(json.dumps(value))
    shutil.rmtree("sweeps/sweep/adapters/b01")
    assert cli.main(["sweep", "sweep.yaml"]) == 0
    again = {r.run_id: r.loss("eval") for r in RunLedger("runs").records()}
    assert again.keys() == whole.keys() and Path("sweeps/sweep/adapters/b01/adapter_config.json").exists()
    assert [again[name] for name in whole] == pytest.approx(list(whole.values()), abs=1e-6)


def test_merged_runs_wait_for_all_trials(copied: Path, capsys: Any) -> None:
    shutil.rmtree("runs")
    shutil.rmtree("sweeps")
    assert cli.main(["sweep", "sweep.yaml", "--count", "2"]) == 0
    assert "merged runs follow when all 10 trials are done" in capsys.readouterr().err
    assert not by_kind()[1]


def test_smaller_blocks_are_scaled_by_their_twins(copied: Path, capsys: Any) -> None:
    """Blocks of a third of the steps stay nearer to the base: s above 1 brings their sum to where the twins are."""
    shutil.rmtree("runs")
    shutil.rmtree("sweeps")
    assert design("--block-size", "4") == 0
    assert cli.main(["sweep", "sweep.yaml"]) == 0
    assert "8 merged runs evaluated, s " in capsys.readouterr().err
    trained, merged = by_kind()
    assert [r.purpose for r in trained] == ["block"] * BLOCKS + ["designed"] * TWINS
    assert [r.steps for r in trained] == [1] * BLOCKS + [3] * TWINS
    (s,) = {r.made["s"] for r in merged}
    assert s > 1.3
    evaluated = [r.compute["tokens_evaluated"] for r in sorted(merged, key=lambda r: r.run_id)]
    assert len(set(evaluated[1:])) == 1 and evaluated[0] > 2 * TWINS * evaluated[1], "the first one paid for s"
    by_key = {r.mixture_key: r.loss("eval") for r in merged}
    twins = trained[BLOCKS:]
    missed = sum(np.log(by_key[t.mixture_key] / t.loss("eval")) ** 2 for t in twins)
    by_base = sum(np.log(t.evaluation["eval"]["base_loss"] / t.loss("eval")) ** 2 for t in twins)
    assert missed < 0.6 * by_base


def test_what_cannot_be_merged_is_refused(copied: Path, capsys: Any) -> None:
    assert design("--repeats", "2") == 2
    assert "--repeats: a design of merged runs has no use for it" in capsys.readouterr().err
    assert design("--arguments=--model.lora_rank=0") == 2
    assert "the recipe finetunes all weights (lora_rank: 0), and what is merged are adapters" in capsys.readouterr().err
    assert design("--arguments=--data.subset_mixture.a=1.0") == 2
    assert "the recipe has a subset_mixture, and blocks are drawn from all sources" in capsys.readouterr().err
    assert design("--blocks", "5") == 2
    assert "--blocks: 5 blocks are too few for 3 regressors" in capsys.readouterr().err
    assert design("--twins", "9") == 2 and "--twins 9: there are 8 merged runs to have one" in capsys.readouterr().err
    assert design("--runs", "3", "--twins", "3") == 2
    assert "--runs 3: 3 mixtures are too few for 3 regressors" in capsys.readouterr().err
    assert design("--block-size", "1") == 0, capsys.readouterr().err
    Path("sweep.blocks.json").write_text('{"kept": 1}')
    assert design() == 2 and "is no file of blocks as im-lightning wrote it" in capsys.readouterr().err
    trained = ["design", "scores.parquet", "pool.jsonl", "--config", "recipe.yaml", "--runs", "9", "--out", "o.yaml"]
    assert cli.main([*trained, "--subset-size", "9", "--twins", "2"]) == 2
    assert "--twins: it says of what merged runs are made, and the runs are trained" in capsys.readouterr().err
    assert cli.main([*trained, "--subset-size", "9", "--kind", "melted"]) == 2
    assert "--kind melted: there is no such kind of run" in capsys.readouterr().err


def test_blocks_that_changed_since_are_refused(copied: Path, capsys: Any) -> None:
    for path in Path("runs").glob("merged-*"):
        path.unlink()
    value = json.loads(Path("sweep.blocks.json").read_text())
    value["rows"]["b00"].pop()
    Path("sweep.blocks.json").write_text(json.dumps(value))
    assert cli.main(["sweep", "sweep.yaml"]) == 2
    err = capsys.readouterr().err
    assert "was not trained on block b00 of its blocks, which have changed since" in err and "--out" in err


def test_the_sweep_file_stays_one_of_wandb(copied: Path) -> None:
    value = yaml.safe_load(Path("sweep.yaml").read_text())
    runs = [yaml.safe_load(text) for text in value["parameters"]["config"]["values"]]
    assert value["method"] == "grid" and value["parameters"]["data.subset_tilt"] == {"value": 0.0}
    assert [run["data"]["subset_size"] for run in runs] == [SIZE] * (BLOCKS + TWINS)
    assert all(run["seed_everything"] == run["data"]["seed"] == 5 for run in runs)
