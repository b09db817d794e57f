"""Files that an earlier build left on a user's disk stay valid: each kind is read, and what was done is not done again.

`old_files/desk` is such a disk, written by `old_files/make.py`; `old_files/expected.json` holds the values it had then.
Only public names are used here, so that no change of the package's inside can hide behind a change of this file.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from im_lightning import (
    InstructMiningCallback,
    InstructMiningDataModule,
    InstructTuningModule,
    LinearRule,
    RunLedger,
    RunRecord,
    ScoreTable,
    fit_rule,
    load_examples,
    load_rule,
    score_examples,
)
from im_lightning.cli import main

OLD = Path(__file__).parent / "old_files"
INDICATORS = ["length_output", "ppl", "mtld", "knn_6"]
FITTED = {"ols": (9, INDICATORS), "additive": (13, ["length_output", "ppl"])}
"""Method → of how many runs, the first ones, its rule was fitted, and on which indicators."""
RULES = [*FITTED, "refit"]
SCORE = ["score", "pool.jsonl", "--model", "model", "--device", "cpu", "--precision", "fp32"]
SCORE += ["--indicators", ",".join(INDICATORS)]
DESIGN = ["design", "scores.parquet", "pool.jsonl", "--runs", "13", "--subset-size", "20", "--config", "recipe.yaml"]
SWEEP = ["sweep", "sweep.yaml"]
REFIT = ["refit", "runs", "--method", "ols", "--permutations", "0", "--bootstrap", "50", "--out"]
COMPARE = [
    "compare", "pool.jsonl", "--scores", "scores.parquet", "--rule", "rules/refit.json", "--ledger", "runs",
    "--eval-data", "report.jsonl", "--model", "model", "--tokens", "300", "--steps", "3", "--device", "cpu",
    "--arms", "base,weighted,diverse", "--seeds", "2", "--out", "compare",
]  # fmt: skip
SEARCH = [
    "search", "pool.jsonl", "--scores", "scores.parquet", "--rule", "rules/ols.json", "--model", "model",
    "--eval-data", "search.jsonl", "--report-data", "report.jsonl", "--low", "12", "--high", "24", "--method", "grid",
    "--budget-trials", "2", "--grid", "2", "--seeds", "1", "--epochs", "1", "--device", "cpu", "--out", "search",
]  # fmt: skip
REPORT = [
    "report", "--ledger", "runs", "--rule", "rules/refit.json", "--scores", "scores.parquet", "--data", "pool.jsonl",
    "--compare", "compare/compare.json", "--budget", "24", "--out", "report.html",
]  # fmt: skip
CHECKPOINT = (2, 1)
"""The epoch and batch after which it was written."""


# what old_files/make.py does too


class Tape(pl.Callback):
    """Notes epoch, batch, rows and loss of every step, and may write one checkpoint."""

    def __init__(self, save: str | None = None, place: tuple[int, int] | None = None) -> None:
        self.save, self.place = save, place
        self.steps: list[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append([trainer.current_epoch, batch_idx, batch["row"].tolist(), float(outputs["loss"])])
        if self.save is not None and self.place == (trainer.current_epoch, batch_idx):
            trainer.save_checkpoint(self.save)


def fit_rule_of(method: str) -> LinearRule:
    runs, indicators = FITTED[method]
    return fit_rule(RunLedger("runs").records()[:runs], method, indicators)


def fit(tape: Tape, checkpoint: str | None = None) -> RunRecord:
    """A fit on rows drawn anew each epoch, by a rule that is fitted anew from the ledger after the first."""
    data = InstructMiningDataModule(
        "pool.jsonl", "eval.jsonl", model="model", rule="rules/ols.json", budget=13, batch_size=3,
        resample_each_epoch=True, precision="fp32",
    )  # fmt: skip
    tuner = InstructTuningModule("model", lora_rank=2, learning_rate=3e-2, dtype="fp32")
    mining = InstructMiningCallback(ledger="runs", refit_every_n_epochs=1, log_every_n_steps=4)
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=4,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[mining, tape],
    )  # fmt: skip
    trainer.fit(tuner, datamodule=data, ckpt_path=checkpoint)
    return mining.record


def values_of(rule: LinearRule) -> dict[str, Any]:
    """What the rule says."""
    return {
        "indicators": list(rule.feature_names_in_), "intercept": float(rule.intercept_),
        "coefficients": rule.coef_.tolist(), "predictions": rule.predict(ScoreTable.read("scores.parquet")).tolist(),
    }  # fmt: skip


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Place in a JSON value → the number there."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in numbers(one, f"{name}.{key}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def content(*folders: str) -> dict[str, bytes]:
    """The files of folders."""
    paths = [p for folder in folders for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p): p.read_bytes() for p in paths}


# the promises


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The old disk as the current folder, its score store as the cache; returns the values it had."""
    shutil.copytree(OLD / "desk", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights cannot be loaded: whoever needs them computes again what is there."""
    from transformers import PreTrainedModel

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded, though nothing is left to compute")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_file_predicts_as_it_did(desk: dict[str, Any], name: str) -> None:
    now, then = values_of(load_rule(f"rules/{name}.json")), desk["rules"][name]
    assert now["indicators"] == then["indicators"]
    for key in ("intercept", "coefficients", "predictions"):
        assert now[key] == pytest.approx(then[key], rel=1e-12, abs=1e-15), key


def test_a_rule_file_is_written_as_it_was_read(desk: dict[str, Any]) -> None:
    """Nothing of an old rule gets lost on the way through a new build."""
    for name in RULES:
        load_rule(f"rules/{name}.json").save("again.json")
        was, now = (json.loads(Path(p).read_text()) for p in (f"rules/{name}.json", "again.json"))
        assert {k: now.get(k) for k in was} == was


def test_every_record_of_a_ledger_is_read(desk: dict[str, Any]) -> None:
    records = {r.run_id: r for r in RunLedger("runs").records(status=None)}
    assert len(records) == len(desk["runs"]) >= 12
    for run, then in desk["runs"].items():
        record = records[run]
        now = {"purpose": record.purpose, "status": record.status, "loss": record.loss("eval"), "steps": record.steps}
        assert now == {k: then[k] for k in now}
        assert record.indicator_means == then["means"]
    for path in Path("runs").glob("*.json"):
        old = json.loads(path.read_text())
        if old.get("format") == "im_lightning.run":
            assert records[old["run_id"]].to_json() == old, "a record goes through a new build unchanged"


@pytest.mark.parametrize("method", FITTED)
def test_a_refit_on_old_records_gives_the_old_rule(desk: dict[str, Any], method: str) -> None:
    now, then = values_of(fit_rule_of(method)), desk["rules"][method]
    for key in ("intercept", "coefficients", "predictions"):
        assert now[key] == pytest.approx(then[key], rel=1e-12, abs=1e-14), key


_METRICS = ("univariate", "correlations", "condition_number", "max_leverage", "repeat_")
KEPT = (".region.mean", ".region.covariance", ".runs", *(f".metrics.{name}" for name in _METRICS))


def test_the_refit_command_reads_the_same_of_old_runs(desk: dict[str, Any]) -> None:
    """What a refit is made of is as it was. Its coefficients are not quite: repeats of a subset count once now."""
    assert main([*REFIT, "again.json"]) == 0
    was, now = (numbers(json.loads(Path(p).read_text())) for p in ("rules/refit.json", "again.json"))
    same = [n for n in was if n.startswith(KEPT) and not n.endswith(("pearson_low", "pearson_high"))]
    assert len(same) > 80 and {n: now.get(n) for n in same} == pytest.approx({n: was[n] for n in same}, rel=1e-9)
    for k in range(len(INDICATORS)):
        coefficient, error = f".regressors.{k}.coefficient", was[f".regressors.{k}.statistics.se"]
        assert now[coefficient] == pytest.approx(was[coefficient], abs=error)


def test_a_score_table_is_read(desk: dict[str, Any]) -> None:
    table = ScoreTable.read("scores.parquet")
    assert table.indicators == desk["scores"]["indicators"] and list(table.id) == desk["scores"]["ids"]
    for name in INDICATORS:
        assert table.values[name].tolist() == desk["scores"]["values"][name]


def test_scoring_again_finds_everything_in_the_store(desk: dict[str, Any], no_model: None) -> None:
    before = content("cache")
    table = score_examples(load_examples("pool.jsonl"), INDICATORS, model="model", device="cpu", precision="fp32")
    for name in INDICATORS:
        assert table.values[name].tolist() == desk["scores"]["values"][name]
    assert main([*SCORE, "--out", "again.parquet"]) == 0
    assert ScoreTable.read("again.parquet").keys == ScoreTable.read("scores.parquet").keys
    after = content("cache")
    assert {k for k in after if k.endswith(".parquet")} == {k for k in before if k.endswith(".parquet")}
    assert all(after[k] == before[k] for k in before)


def test_a_fit_goes_on_from_an_old_checkpoint(desk: dict[str, Any]) -> None:
    """With its frozen folder alone, the score store lost: at the very next row, to the undisturbed fit's end."""
    shutil.rmtree("cache")
    before, then, tape = content("im-lightning"), desk["fit"], Tape()
    record = fit(tape, "mid.ckpt")
    left = [step for step in then["steps"] if tuple(step[:2]) > CHECKPOINT]
    assert [step[:3] for step in tape.steps] == [step[:3] for step in left]
    assert [step[3] for step in tape.steps] == pytest.approx([step[3] for step in left], rel=1e-4)
    assert record.loss("eval") == pytest.approx(then["loss"], rel=1e-4)
    assert record.run_id == then["run_id"] and record.status == "complete"
    assert record.indicator_means == pytest.approx(then["means"]), "rows seen before the checkpoint count"
    assert len(record.weights["refits"]) == 1, "the rule that was fitted inside the first part"
    assert content("im-lightning") == before, "what was frozen stays, and nothing has to be frozen anew"
    assert not list(Path("cache").glob("*-*")), "nothing was scored"


def test_a_checkpoint_names_no_module_of_the_package() -> None:
    """A moved file must not make a checkpoint unreadable."""
    state = torch.load(OLD / "desk" / "mid.ckpt", weights_only=True)
    text = repr({k: v for k, v in state.items() if k != "state_dict"})
    assert set(re.findall(r"\bim_lightning\.\w+", text)) <= {"im_lightning.rule"}, "the name of a format, no module"
    assert "InstructMiningDataModule" in state and "InstructMiningCallback" in state["callbacks"]


def test_an_old_sweep_names_no_version_and_a_new_design_does(desk: dict[str, Any]) -> None:
    """Its subset seeds keep the rows they had (`test_a_sweep_goes_on`); new seeds are drawn in another way."""
    assert main([*DESIGN, "--out", "again/sweep.yaml"]) == 0
    assert "data.subset_version: {value: 2}" in Path("again/sweep.yaml").read_text()
    assert "subset_version" not in Path("sweep.yaml").read_text()


def test_a_sweep_knows_its_trials(desk: dict[str, Any], no_model: None) -> None:
    before = content("sweeps", "runs")
    assert main(SWEEP) == 0
    after = content("sweeps", "runs")
    assert after == before


def test_a_sweep_goes_on(desk: dict[str, Any]) -> None:
    """With one trial not yet run, it runs that one, which comes out as it did."""
    state = json.loads(Path("sweeps/sweep/sweep.json").read_text())
    last = state["trials"][-1]
    gone = RunLedger("runs").path / f"{last['run_id']}.json"
    gone.unlink()
    last["status"] = "running"
    Path("sweeps/sweep/sweep.json").write_text(json.dumps(state))
    before = content("runs")
    assert main(SWEEP) == 0
    added = set(content("runs")) - set(before)
    assert {Path(p).name.split(".")[0] for p in added} == {last["run_id"]}
    (record,) = [r for r in RunLedger("runs").records() if r.run_id == last["run_id"]]
    then = desk["runs"][last["run_id"]]
    assert record.loss("eval") == pytest.approx(then["loss"], rel=1e-4)
    assert record.indicator_means == pytest.approx(then["means"], rel=1e-12)


@pytest.mark.parametrize("words", [COMPARE, SEARCH], ids=lambda w: w[0])
def test_a_study_finds_its_finetunes(desk: dict[str, Any], no_model: None, words: list[str]) -> None:
    """The same command again trains nothing and says the same."""
    name = words[0]
    ledger, result = content(f"{name}/ledger"), json.loads(Path(f"{name}/{name}.json").read_text())
    assert main(words) == 0
    assert content(f"{name}/ledger") == ledger
    again = json.loads(Path(f"{name}/{name}.json").read_text())
    for one in (result, again):  # words and intervals may change, losses may not
        one.get("rule", {}).pop("spread", None)
        for arm in one.get("arms", []):
            for key in ("title", "difference_half_width", "p", "p_holm", "verdict"):
                del arm[key]
    changed = {k for k in result if again.get(k) != result[k]}
    assert changed <= {"created", "seconds", "rendered", "notes", "differences_shown"}


def test_the_page_is_written_from_old_files(desk: dict[str, Any]) -> None:
    assert main(REPORT) == 0
    assert Path("report.html").stat().st_size > 10_000
