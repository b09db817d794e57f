"""Sweeps without a server: what is run, what stays after a kill or a failure, and that a trial is one run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fitting import write_pool, write_scores

from im_lightning import cli
from im_lightning.commands.runs import open_sweeps
from im_lightning.errors import RequestError
from im_lightning.experiments.sweep.file import check_sweep, read_sweep
from im_lightning.experiments.sweep.run import SweepSummary, _finish, _start, run_sweep, trials_left
from im_lightning.experiments.sweep.state import SweepState, propose
from im_lightning.experiments.sweep.trial import (
    TrialLogger,
    TrialRequest,
    TrialResult,
    TrialStopped,
    _outcome,
    band_limit,
)
from im_lightning.ledger.curve import stopped_text
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models import device
from im_lightning.training.module import InstructTuningModule

FIT = [
    "--data.data=pool.jsonl", "--data.eval_data=eval.jsonl", "--data.model=model", "--data.scores=scores.parquet",
    "--data.subset_size=12", "--model.lora_rank=2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
    "--trainer.devices=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
]  # fmt: skip
SEEDS = {"data.subset_seed": {"values": [0, 1, 2]}}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pool, its scores, an evaluation set and a model."""
    from tiny import make_tiny_llama

    monkeypatch.chdir(tmp_path)
    make_tiny_llama(tmp_path / "model", hidden=16, layers=1)
    write_pool(tmp_path / "pool.jsonl")
    write_pool(tmp_path / "eval.jsonl", n=7, seed=9, tag="e")
    write_scores(tmp_path / "scores.parquet", str(tmp_path / "pool.jsonl"))
    return tmp_path


def sweep(**changes: Any) -> dict[str, Any]:
    value = {"method": "grid", "command": ["im-lightning", "fit", *FIT, "${args}"], "parameters": SEEDS}
    return {**value, **changes}


def write(path: str = "sweep.yaml", **changes: Any) -> str:
    Path(path).write_text(yaml.safe_dump(sweep(**changes)))
    return path


def records() -> list[Any]:
    return RunLedger("runs").records(status=None)


def state(folder: str = "sweeps/sweep") -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "sweep.json").read_text())["trials"]


# running


def test_a_grid_runs_once_and_leads_to_a_refit(study: Path, capfd: Any) -> None:
    """Every point one run, under the run id of the state; the arguments reach LightningCLI unchanged."""
    file = write(parameters={"data.subset_seed": {"values": [3, 5]}, "seed_everything": {"values": [0, 1]}})
    assert cli.main(["sweep", file]) == 0
    out, err = capfd.readouterr()
    runs = records()
    assert [(r.subset["seed"], r.seeds["training"]) for r in runs] == [(3, 0), (3, 1), (5, 0), (5, 1)]
    assert [t["run_id"] for t in state()] == [r.run_id for r in runs]
    assert [t["losses"]["eval"] for t in state()] == [r.loss("eval") for r in runs]
    assert all(r.status == "complete" and r.purpose == "designed" for r in runs)
    assert "a refit on length_output, ppl, mtld needs" in " ".join(out.split()), "the ledger's summary comes last"
    assert "trial 4 of 4 (data.subset_seed=5, seed_everything=1): eval " in err and "needed to fit a rule" not in err
    assert not (study / "runs" / "rule.json").exists(), "no trial refits"
    before = sorted(study.glob("runs/*"))
    assert cli.main(["sweep", file]) == 0 and sorted(study.glob("runs/*")) == before, "there is nothing left to run"


def test_a_trial_is_the_fit_of_the_command_line(study: Path) -> None:
    """In one process with others, or alone: the same numbers."""
    assert cli.main(["fit", *FIT, "--data.subset_seed=2", "--mining.ledger=alone", "--mining.refit=false"]) == 0
    run_sweep(check_sweep(sweep(), "f"), "s")
    (alone,) = RunLedger("alone").records()
    assert records()[2].loss("eval") == alone.loss("eval")


def test_count_cap_and_more_arguments(study: Path, capfd: Any) -> None:
    parameters = {"data.subset_seed": {"min": 0, "max": 99}}
    file = write(method="random", run_cap=3, parameters=parameters)
    more = ["--arguments=--mining.ledger=other --data.subset_size=9", "--seed=7"]
    assert cli.main(["sweep", file, "--count=2", *more]) == 0
    out, err = capfd.readouterr()
    assert "trial 1 of 3, 1 of 2 in this call (data.subset_seed=" in err
    assert "1 trial of sweep.yaml still to run: im-lightning sweep sweep.yaml" in " ".join(out.split())
    assert "subset seeds" not in out, "no new seeds while trials of the sweep are open"
    assert cli.main(["sweep", file, "--count=2", *more]) == 0
    assert "make " in capfd.readouterr().out
    runs = RunLedger("other").records()
    assert len(runs) == 3 and {r.subset["size"] for r in runs} == {9}
    value = check_sweep(sweep(method="random", run_cap=3, parameters=parameters), "f")
    fresh = SweepState("fresh", value, 7)
    for trial in iter(lambda: propose(fresh), None):
        fresh.trials.append(trial)
    seeds = [t.values["data.subset_seed"] for t in fresh.trials]
    assert [r.subset["seed"] for r in runs] == seeds, "the draws depend on the seed and the number alone"
    capfd.readouterr()
    assert cli.main(["sweep", file, "--count=2"]) == 2
    assert "it holds the trials of seed 7" in capfd.readouterr().err
    assert cli.main(["sweep", file, "--count=2", "--seed=7"]) == 2
    assert "another sweep file, of this one before it was changed, or of other --arguments" in capfd.readouterr().err


def test_a_recipe_that_changed_between_two_calls_is_named(study: Path, capfd: Any) -> None:
    """The file that the command names is no part of the sweep file: trials of two recipes came into one ledger."""
    recipe = Path("recipe.yaml")
    recipe.write_text("model: {learning_rate: 0.0001}\n")
    file = write(command=["im-lightning", "fit", "--config", "recipe.yaml", *FIT, "${args}"])
    assert cli.main(["sweep", file, "--count=1"]) == 0
    capfd.readouterr()
    for text, said in (("model: {learning_rate: 0.0001}\n", False), ("model: {learning_rate: 0.001}\n", True)):
        recipe.write_text(text)
        SweepState("sweeps/sweep", read_sweep(file), 0).close()
        named = "recipe.yaml: IT HAS CHANGED since 1 of the trials in sweeps/sweep were made by it; the others"
        assert (named in capfd.readouterr().err) == said
    assert cli.main(["sweep", file]) == 0
    assert "IT HAS CHANGED" in capfd.readouterr().err
    recipe.write_text("model: {learning_rate: 0.01}\n")
    assert cli.main(["sweep", file]) == 0
    assert "IT HAS CHANGED" not in capfd.readouterr().err, "there is none to follow"


def test_pairs_of_seeds_in_one_config(study: Path, capfd: Any) -> None:
    """As im-lightning design writes them: a grid over two parameters could not say which seeds go together."""
    values = ["{seed_everything: 4, data: {subset_seed: 3}}", "{seed_everything: 5, data: {subset_seed: 3}}"]
    fixed = {"data.data": {"value": "pool.jsonl"}, "data.subset_size": {"value": 12}}
    run_sweep(check_sweep(sweep(parameters={**fixed, "config": {"values": values}}), "f"), "s")
    assert "trial 1 of 2 (config={seed_everything: 4, data: {subset_seed: 3}}): eval " in capfd.readouterr().err
    assert [(r.subset["seed"], r.seeds["training"]) for r in records()] == [(3, 4), (3, 5)]


def test_a_target_ends_the_sweep(study: Path) -> None:
    file = read_sweep(write(metric={"name": "im/eval_loss/eval", "target": 100.0}))
    summary = run_sweep(file, "sweeps/sweep")
    assert len(summary.ran) == 1 and summary.ran[0].value == records()[0].loss("eval")
    assert trials_left(file, "sweeps/sweep") == (0, []) and not open_sweeps("runs"), "that command would run none"


def test_the_command_for_what_is_left_goes_on_with_that_sweep(study: Path) -> None:
    """Without its folder it began the sweep anew: every trial again."""
    assert cli.main(["sweep", write(), "--count=1", "--out", "sweeps/mine"]) == 0
    left = "2 trials of sweep.yaml still to run: im-lightning sweep sweep.yaml --out sweeps/mine"
    assert open_sweeps("runs") == left
    file = Path("sweeps/mine/sweep.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 7, "digest": "of more arguments"}))
    more = "with the --arguments, --stop-at and --eval-at that it was begun with"
    assert open_sweeps("runs") == f"{left} --seed 7, {more}"


# failures and kills


def test_a_failed_trial_is_named_and_tried_again(study: Path, capfd: Any) -> None:
    """One bad trial must not cost the others; the ledger keeps one run of each."""
    file = write(parameters={"data.data": {"values": ["pool.jsonl", "late.jsonl"]}, **SEEDS}, run_cap=5)
    assert cli.main(["sweep", file]) == 1
    err = capfd.readouterr().err
    assert "sweeps/sweep: 2 of 5 trials failed: trial 4: late.jsonl: there is no such file" in err
    assert "run the same command to try them again" in err and len(records()) == 3
    write_pool(study / "late.jsonl")
    assert cli.main(["sweep", file]) == 0
    assert len(records()) == 5 and [t["attempts"] for t in state()] == [1, 1, 1, 2, 2]


def test_failures_in_a_row_end_it(study: Path, capfd: Any) -> None:
    file = write(parameters={"data.data": {"value": "no.jsonl"}, "data.subset_seed": {"min": 0, "max": 9}})
    assert cli.main(["sweep", file, "--max-failures=2"]) == 1
    assert "2 of 2 trials failed" in capfd.readouterr().err and not Path("runs").exists()


def test_wrong_arguments_end_it_at_once(study: Path, capfd: Any) -> None:
    """No night is lost on a misspelt name; the mended file runs in the same folder."""
    assert cli.main(["sweep", write(parameters={"data.subset_sede": {"values": [0, 1]}})]) == 2
    err = capfd.readouterr().err
    assert "trial 1 (data.subset_sede=0): --data.subset_sede: there is no such option (did you mean --data.su" in err
    assert cli.main(["sweep", write(parameters={"data.subset_seed": {"value": 0}})]) == 0


def test_an_interrupted_trial_is_run_again_under_its_own_id(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, step = write(), InstructTuningModule.training_step

    def interrupted(self: Any, *given: Any) -> Any:
        if len(records()) == 1:
            raise KeyboardInterrupt
        return step(self, *given)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(InstructTuningModule, "training_step", interrupted)
    assert cli.main(["sweep", file]) == 130
    assert signal.getsignal(signal.SIGINT) is handler, "the next Ctrl-C must be heard"
    assert [t["status"] for t in state()] == ["done", "interrupted"]
    assert [r.status for r in RunLedger("runs").records(status=None)] == ["complete", "interrupted"]
    monkeypatch.undo()
    os.chdir(study)
    assert cli.main(["sweep", file]) == 0
    assert [(r.subset["seed"], r.status) for r in records()] == [(s, "complete") for s in (0, 1, 2)]
    assert {t["run_id"] for t in state()} == {r.run_id for r in records()}


def test_a_run_that_reached_the_ledger_is_not_run_again(study: Path) -> None:
    """Killed between the ledger's file and the state's: neither a double nor an hour's work again."""
    one = check_sweep(sweep(metric={"name": "im/eval_loss/eval"}), "f")
    first = run_sweep(one, "s").state.trials[1]
    path = Path("runs") / f"{first.run_id}.json"
    written, value = path.stat().st_mtime_ns, json.loads(Path("s/sweep.json").read_text())
    value["trials"][1] |= {"status": "running", "value": None, "losses": {}}
    Path("s/sweep.json").write_text(json.dumps(value))
    again = run_sweep(one, "s")
    assert path.stat().st_mtime_ns == written and len(records()) == 3
    assert [t.number for t in again.ran] == [1] and again.ran[0].value == first.value


def test_the_very_first_trial_is_not_doubled_either(study: Path) -> None:
    """Killed between the ledger's file and the state's, when no trial has ended yet."""
    one = check_sweep(sweep(), "f")
    first = run_sweep(one, "s", count=1).state.trials[0]
    value = json.loads(Path("s/sweep.json").read_text())
    value["trials"][0] |= {"status": "running", "losses": {}}
    Path("s/sweep.json").write_text(json.dumps(value))
    run_sweep(one, "s")
    assert sorted(r.subset["seed"] for r in records()) == [0, 1, 2] and records()[0].run_id == first.run_id


def test_a_wrong_request_keeps_its_place(tmp_path: Path) -> None:
    """With several jobs later trials have begun: a number given twice would cost a point of the grid."""
    one = check_sweep(sweep(), "f")
    state = SweepState(tmp_path, one, 0)
    for _ in range(3):
        trial = propose(state)
        assert trial is not None
        _start(state, trial)
    _finish(state, SweepSummary(state), state.trials[0], TrialResult("done"))
    wrong = TrialResult("failed", error="bitsandbytes is not installed", wrong_request=True)
    with pytest.raises(RequestError, match=r"trial 2 \(data.subset_seed=1\): bitsandbytes"):
        _finish(state, SweepSummary(state), state.trials[1], wrong)
    state.close()
    again = SweepState(tmp_path, one, 0)
    assert [t.values["data.subset_seed"] for t in again.waiting] == [1, 2] and propose(again) is None


@pytest.mark.slow
def test_killed_at_any_point_nothing_is_lost_or_doubled(study: Path) -> None:
    file = write(parameters={"data.subset_seed": {"min": 0, "max": 11}})
    command = [sys.executable, "-m", "im_lightning.cli", "sweep", file]
    for runs in (1, 4, 8):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(study.glob("runs/*.json"))) < runs and child.poll() is None:
            time.sleep(0.01)
        child.kill()
        child.wait()
    assert cli.main(["sweep", file]) == 0
    assert sorted(r.subset["seed"] for r in records()) == list(range(12))
    assert [t["status"] for t in state()] == ["done"] * 12


# searching


def test_early_stopping_follows_wandbs_rule() -> None:
    """The best 1/eta of the trials go on."""
    assert band_limit([4.0, 1.0, 3.0, 2.0], 2, maximize=False) == 3.0
    assert band_limit([4.0, 1.0, 3.0, 2.0], 2, maximize=True) == 2.0
    request = TrialRequest(0, [], "r", "f", "loss", bands=[1], peers={"1": [3.0, 2.0, 1.0]}, eta=2.0)
    logger = TrialLogger(request)
    logger.log_metrics({"loss": 9.0})
    logger.log_metrics({"other": 9.0})
    with pytest.raises(TrialStopped, match="loss is 4 at its value 2, and the best 1/2 of the trials reach 3"):
        logger.log_metrics({"loss": 4.0})
    TrialLogger(request).log_metrics({"loss": 9.0})
    better = TrialLogger(request)
    better.log_metrics({"loss": 9.0})
    better.log_metrics({"loss": 2.5})


def test_a_trial_whose_metric_is_not_finite_is_stopped_and_counts_as_the_worst(tmp_path: Path) -> None:
    request = TrialRequest(0, [], "r", str(tmp_path), "loss", bands=[1], peers={"1": [3.0, 2.0, 1.0]}, eta=2.0)
    logger = TrialLogger(request)
    logger.log_metrics({"loss": 1.0})
    with pytest.raises(TrialStopped, match=r"loss is nan at its value 2"):
        logger.log_metrics({"loss": float("nan")})
    logger.finalize("failed")
    result = TrialResult("stopped")
    _outcome(result, request, RunLedger(tmp_path / "ledger"))
    assert result.value is None and result.at_bands == {"1": float("inf")}
    assert band_limit([*result.at_bands.values(), 3.0, 2.0, 1.0], 2, maximize=False) == 3.0


def test_a_stopped_trial_stays_out_of_refits(study: Path) -> None:
    """A run that was cut short is no evidence about its subset."""
    value = sweep(
        parameters={"model.learning_rate": {"values": [1e-3, 1e-3, 0.5]}, "trainer.log_every_n_steps": {"value": 1}},
        metric={"name": "train_loss"},
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2},
    )
    value["command"] = [w for w in value["command"] if "max_epochs" not in w]
    value["command"][2:2] = ["--trainer.max_epochs=3"]
    summary = run_sweep(check_sweep(value, "f"), "s")
    assert [t.status for t in summary.ran] == ["done", "done", "stopped"]
    assert [r.status for r in records()] == ["complete", "complete", "failed"]
    assert "stopped early: train_loss" in records()[2].note and records()[2].steps < records()[0].steps


def test_tpe_finds_a_minimum_and_goes_on_the_same(tmp_path: Path) -> None:
    """Bayes must learn from the trials, and a resumed study must propose what the unbroken one would."""
    parameters = {
        "x": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, "kind": {"values": ["a", "b", "c"]},
        "fixed": {"value": 5},
    }  # fmt: skip
    value = {"method": "bayes", "metric": {"name": "loss"}, "run_cap": 40, "parameters": parameters}
    one = check_sweep({**value, "command": ["im-lightning", "fit", "${args}"]}, "f")

    def loss(values: dict[str, Any]) -> float:
        import math

        return (math.log10(values["x"]) + 2.5) ** 2 + {"a": 0.5, "b": 0.0, "c": 0.5}[values["kind"]]

    made = SweepState(tmp_path / "one", one, 0)
    for trial in iter(lambda: propose(made), None):
        trial.status, trial.value = "done", loss(trial.values)
        made.trials.append(trial)
    assert len(made.trials) == 40 and {t.values["fixed"] for t in made.trials} == {5}
    first, last = ([t.value for t in made.trials[k : k + 10]] for k in (0, 30))
    assert sorted(last)[5] < sorted(first)[5] / 3, "the later half of the trials must be near the minimum"
    again = SweepState(tmp_path / "two", one, 0)
    again.trials = made.trials[:25]
    proposed = propose(again)
    assert proposed is not None and proposed.values == made.trials[25].values


def test_bayes_needs_its_metric_and_optuna(study: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    parameters = {"model.learning_rate": {"min": 1e-4, "max": 1e-3}}
    file = write(method="bayes", metric={"name": "im/eval_loss/evla"}, run_cap=1, parameters=parameters)
    assert cli.main(["sweep", file]) == 1
    assert "it logged no im/eval_loss/evla, which bayes optimises" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["sweep", write("b.yaml", method="bayes", metric={"name": "l"}, run_cap=1)]) == 2
    shown = capfd.readouterr().err
    assert "it needs optuna" in shown and "pip install 'im-lightning[search]'" in shown


# several processes


def test_a_trial_on_two_ranks_is_one_run(study: Path) -> None:
    """Lightning starts ranks by running the command again; were that the sweep's, every rank would run a sweep."""
    value = sweep(parameters={"data.subset_seed": {"value": 1}})
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    one = check_sweep({**value, "metric": {"name": "im/eval_loss/eval"}}, "f").with_arguments(words)
    summary = run_sweep(one, "s")
    (record,) = records()
    assert record.status == "complete" and record.regime["rows_per_step"] == 16, "two ranks of eight rows"
    assert summary.ran[0].run_id == record.run_id and summary.ran[0].value == record.loss("eval")
    early = {"type": "hyperband", "min_iter": 1}
    stopping = check_sweep({**value, "metric": {"name": "train_loss"}, "early_terminate": early}, "f")
    refused = run_sweep(stopping.with_arguments(words), "t")
    assert "trials on several ranks cannot be stopped early" in refused.ran[0].error


def test_two_jobs_share_the_trials(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """And what is under way in each is shown while they run, as in one process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("im_lightning._utils.progress.LOG_FIRST_SECONDS", 0.0)
    monkeypatch.setattr("im_lightning._utils.progress.LOG_EVERY_SECONDS", 0.0)
    summary = run_sweep(check_sweep(sweep(), "f"), "s", jobs=2)
    assert sorted(r.subset["seed"] for r in records()) == [0, 1, 2] and summary.state.count("done") == 3
    assert "OMP_NUM_THREADS" not in os.environ, "the workers' share of the threads is theirs alone"
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trials of f: ")]
    for number in (1, 2, 3):
        assert any(re.search(rf" of 3 trials, .*; trial {number}, \w.* of \d+ ", line) for line in shown), shown


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_trial_alone(study: Path) -> None:
    from im_lightning.experiments.sweep.workers import Workers

    class Fragile(Workers):
        def start(self, request: TrialRequest) -> None:
            super().start(request)
            if request.number == 1:
                next(iter(self._busy.values()))[0].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("im_lightning.experiments.sweep.run.Workers", Fragile)
        summary = run_sweep(check_sweep(sweep(), "f"), "s", jobs=2)
    failed = [t for t in summary.state.trials if t.status == "failed"]
    assert len(failed) == 1 and "killed by signal 9, as where memory runs out (then fewer --jobs)" in failed[0].error
    assert run_sweep(check_sweep(sweep(), "f"), "s").state.count("done") == 3 and len(records()) == 3


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["--count=0"], {}, "--count: it is 0"),
        (["--jobs=0"], {}, "--jobs: it is 0"),
        (["--seed=-1"], {}, "--seed: it is -1"),
        (["--arguments=--data.model='x"], {}, "'x: it cannot be parted into words: no closing quotation"),
        ([], {"LOCAL_RANK": "1"}, "this is process 1 (LOCAL_RANK) of several"),
    ],
)
def test_requests_that_are_wrong(
    study: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, arguments: list[str], environment: Any, text: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sweep", write(), *arguments]) == 2
    assert text in capfd.readouterr().err and not Path("sweeps").exists()


def test_an_endless_sweep_a_torn_state_and_a_second_process(study: Path) -> None:
    one = check_sweep(sweep(method="random"), "f.yaml")
    with pytest.raises(RequestError, match=r"f\.yaml: method random has no end, and there is no run_cap"):
        run_sweep(one, "s")
    held = SweepState("s", one, 0)
    with pytest.raises(RequestError, match="another process is running this sweep"):
        run_sweep(one, "s", count=1)
    held.close()
    Path("s/sweep.json").write_text('{"format": "im_lightning.sw')
    with pytest.raises(Exception, match=r"s/sweep.json: it cannot be read .*pass another --out, or delete s"):
        run_sweep(one, "s", count=1)


def test_a_wandb_that_is_gone_costs_no_trial(study: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Its service may die in the night; a sweep must not end by what a trial leaves behind."""

    def finish() -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=finish))
    assert run_sweep(check_sweep(sweep(), "f"), "s", count=2).state.count("done") == 2
    assert "the trial's run could not be finished: ConnectionResetError" in capfd.readouterr().err


@pytest.mark.slow
def test_every_trial_is_a_wandb_run_of_its_own(study: Path) -> None:
    """Without a finish between trials all of them would land in the first one's wandb run."""
    words = ["--trainer.logger=pytorch_lightning.loggers.WandbLogger", "--trainer.logger.offline=true"]
    run_sweep(check_sweep(sweep(), "f").with_arguments(words), "s", count=2)
    assert len(list(study.glob("wandb/offline-run-*"))) == 2
    assert len({r.loggers["WandbLogger"] for r in records()}) == 2


def test_all_runs_of_a_sweep_have_the_first_ones_precision(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone on with on another processor, it would mix what a rule then takes for the effect of the rows."""
    monkeypatch.setattr(device, "CPU_BF16_WIDTH", 8)
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: True)
    run_sweep(check_sweep(sweep(), "f"), "s", count=1)
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: False)
    run_sweep(check_sweep(sweep(), "f"), "s")
    assert [r.numerics["precision"] for r in records()] == ["bf16"] * 3


# runs that stop early


def test_a_sweep_of_short_runs_beside_full_ones_leads_to_a_rule(study: Path, capfd: Any) -> None:
    """Full runs with a curve say what an early point is worth; short ones add subsets at a fraction of the steps."""
    few = write("few.yaml", parameters={"data.subset_seed": {"values": [0, 1, 2, 3]}})
    more = write("more.yaml", parameters={"data.subset_seed": {"values": [2, 3, 4, 5, 6, 7, 8]}})
    small = "--arguments=--data.batch_size=2 --model.learning_rate=5e-3"  # 6 steps
    assert cli.main(["sweep", few, small, "--eval-at=0.5"]) == 0
    assert cli.main(["sweep", more, small, "--stop-at=0.5"]) == 0
    runs = records()
    assert [r.steps for r in runs] == [6] * 4 + [3] * 7 and all(t["status"] == "done" for t in state("sweeps/more"))
    assert {stopped_text(r) for r in runs[4:]} == {"stopped at step 3 of 6"}
    seen = {r.subset["seed"]: r.curve["points"][0]["evaluation"]["eval"]["loss"] for r in runs[:4]}
    assert [r.loss("eval") for r in runs[4:6]] == [seen[2], seen[3]], "a stopped run is the full one up to there"
    capfd.readouterr()
    asked = ["refit", "runs", "--out=rule.json", "--method=ols", "--permutations=0", "--bootstrap=0"]
    asked.append("--indicators=ppl,mtld")
    assert cli.main(asked) == 2 and "fit all runs as they were at one point (--at" in capfd.readouterr().err
    assert cli.main([*asked, "--at=0.5"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "7 runs stopped at step 3 of 6, 4 full runs as their curves have them" in said and "over 4 subsets" in said
    assert cli.main(["sweep", more, small]) == 2, "full runs of the same file need a folder of their own"
    assert "of other --arguments" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--stop-at=0", "--eval-at=half"])
def test_points_that_are_none_are_refused_before_the_first_trial(study: Path, flag: str, capfd: Any) -> None:
    assert cli.main(["sweep", write(), flag]) == 2
    assert f"{flag.split('=')[0]}: " in capfd.readouterr().err and not records()
