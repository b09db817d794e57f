"""`im-lightning fit`: recipes, overrides, errors with their exit status, the printed next command, resume, export."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from fitting import write_pool, write_rule, write_scores

from im_lightning import cli

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the recipes name, and a model."""
    from tiny import make_tiny_llama

    monkeypatch.chdir(tmp_path)
    make_tiny_llama(tmp_path / "model", hidden=16, layers=1)
    write_pool(tmp_path / "pool.jsonl")
    write_pool(tmp_path / "eval.jsonl", n=7, seed=9, tag="e")
    return tmp_path


QUIET = ["--data.model=model", "--model.lora_rank=2", "--trainer.max_epochs=1", "--trainer.logger=false"]


def run(*arguments: str) -> int:
    return cli.main(["fit", *arguments])


def test_weighted_recipe_with_a_designed_subset_on_the_command_line(study: Path, capfd: Any) -> None:
    """The command of the documentation: a recipe with a rule and a budget, made a designed run by two arguments."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from im_lightning.ledger.ledger import RunLedger

    recipe = f"--config={RECIPES / '04_weighted_finetune/weighted_finetune.yaml'}"
    status = run(recipe, *QUIET, "--data.subset_size=12", "--data.subset_seed=7", "--export=adapter")
    out, err = capfd.readouterr()
    assert status == 0, err
    (record,) = RunLedger("runs").records()
    assert record.purpose == "designed" and record.subset["seed"] == 7 and record.seeds["training"] == 0
    assert "adapter: written, an adapter (LoRA of rank 2)" in err
    assert "rule and budget are left aside" in err and "Tip" not in err and "GPU available" not in err and not out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "adapter")
    base = (study / "model" / "config.json").read_bytes()
    assert run(recipe, *QUIET, "--data.subset_size=12", "--export=model") == 2, "it would replace the base itself"
    assert "--export model: this folder holds files, and no fit exported them" in capfd.readouterr().err
    assert (study / "model" / "config.json").read_bytes() == base
    assert run(recipe, *QUIET, "--data.subset_size=12", "--data.subset_seed=7", "--export=adapter") == 0
    (study / "runs" / f"{RunLedger('runs').records()[-1].run_id}.json").unlink()

    command = re.search(r"the next: (im-lightning fit .*)", err)
    assert command is not None
    assert cli.main(shlex.split(command[1])[1:]) == 0, "the command that is printed must run as it stands"
    first, second = RunLedger("runs").records()
    assert second.subset["seed"] == 8 and second.regime == first.regime


def test_an_export_of_all_weights_is_called_a_model(study: Path, capfd: Any) -> None:
    """And `generate --adapter` says how to name it."""
    from transformers import AutoModelForCausalLM

    given = ["--data.data=pool.jsonl", "--data.eval_data=eval.jsonl", "--export=out", "--model.lora_rank=0"]
    assert run(*QUIET, *given, "--data.subset_size=12", "--data.subset_seed=0") == 0
    assert "out: written, the whole model, since all weights were trained" in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained("out")
    asked = ["generate", "eval.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "2", "--device", "cpu"]
    assert cli.main([*asked, "--model", "model", "--adapter", "out"]) == 2
    said = "--adapter out: it holds a whole model and no adapter. Fix: pass --model out without --adapter"
    assert said in capfd.readouterr().err
    assert cli.main([*asked, "--model", "out"]) == 0
    capfd.readouterr()
    assert run(*QUIET, *given[:-1], "--data.subset_size=12", "--data.subset_seed=0") == 2
    assert "--export out: an earlier fit exported a whole model to this folder" in capfd.readouterr().err
    assert not Path("out/adapter_config.json").exists()
    assert len(Path("answers.jsonl").read_text().splitlines()) == 7


def test_weighted_recipe_as_it_stands(study: Path, capfd: Any) -> None:
    scores = write_scores(study / "scores.parquet", "pool.jsonl")
    (study / "runs").mkdir()
    write_rule(study / "runs" / "rule.json", scores)
    recipe = f"--config={RECIPES / '04_weighted_finetune/weighted_finetune.yaml'}"
    assert run(recipe, *QUIET, "--data.budget=12", f"--data.scores={scores}") == 0
    assert "(complete)" in capfd.readouterr().err


def test_designed_recipe_and_resume(study: Path, capfd: Any) -> None:
    from im_lightning.ledger.ledger import RunLedger

    arguments = [f"--config={RECIPES / '02_designed_runs/designed_run.yaml'}", *QUIET, "--data.subset_size=12"]
    folder = "--trainer.default_root_dir=root"
    assert run(*arguments, "--trainer.enable_checkpointing=true", folder) == 0
    (ckpt,) = (study / "root").rglob("*.ckpt")
    assert run(*arguments, "--trainer.max_epochs=2", folder, f"--ckpt_path={ckpt}") == 0, capfd.readouterr().err
    (record,) = RunLedger("runs").records()
    assert record.regime["epochs"] == 2 and record.subset["exposures"] == 24
    status = run(*arguments, "--trainer.max_epochs=2", folder, f"--ckpt_path={ckpt}", "--data.subset_seed=1")
    assert status == 2 and re.search(r"im-lightning fit: resume: .*subset_seed: 0 → 1", capfd.readouterr().err)


@pytest.mark.parametrize("logger", ["false", "true"])
def test_a_fit_leaves_the_users_files_alone_and_its_arguments_beside_its_record(study: Path, logger: str) -> None:
    """Lightning writes config.yaml into the current folder, over whatever was called so."""
    from im_lightning.ledger.ledger import RunLedger

    (study / "config.yaml").write_text("# mine\nlearning_rate: 1\n")
    before = {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()}
    arguments = [*QUIET, f"--trainer.logger={logger}", "--data.data=pool.jsonl", "--data.eval_data=eval.jsonl"]
    assert run(*arguments, "--data.subset_size=12", "--data.indicators=[length_output]") == 0
    assert {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()} == before
    (record,) = RunLedger("runs").records()
    assert run(f"--config=runs/{record.run_id}.config.yaml", "--data.subset_seed=1") == 0
    again = RunLedger("runs").records()[-1]
    assert again.run_id != record.run_id and again.regime == record.regime and again.subset["seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--data.data=nope.jsonl"], 2, "im-lightning fit: nope.jsonl: there is no such file"),
        (["--data.data=pool.jsonl", "--data.budget=0"], 2, "im-lightning fit: budget: it is 0"),
        (["--data.data=pool.jsonl", "--model.dtype=fp8"], 2, "im-lightning fit: dtype: there is no 'fp8'"),
        (["--data.data=pool.jsonl", "--data.rule=rules.json"], 2, "im-lightning fit: rule 'rules.json': it is neither"),
        (["--data.data=bad.jsonl"], 1, "im-lightning fit: bad.jsonl:1"),
        (["--data.data=pool.jsonl", "--data.bugdet=3"], 2, "bugdet: there is no such option (did you mean --data.budg"),
        (
            ["--data.data=pool.jsonl", "--budget=3"],
            2,
            "--budget: there is no such option (did you mean --data.budg",
        ),
        (["--data.data=pool.jsonl", "--data.budget=many"], 2, "fit: --data.budget: 'many' is not a whole number. Fix"),
        (["--config=lots.yaml"], 2, "fit: data.budget in lots.yaml: 'lots' is not a whole number. Fix: see"),
        (["--config=bugdet.yaml"], 2, "fit: --data.bugdet: there is no such option (did you mean --data.budget?)"),
        ([], 2, "im-lightning fit: the pool: it is not named. Fix: name data"),
        (["--config=nope.yaml"], 2, "--config nope.yaml: there is no such file. Fix: see"),
        (
            ["--data.data=pool.jsonl", "--data.eval_data=nope.jsonl"],
            2,
            "im-lightning fit: nope.jsonl: there is no such",
        ),
        (["--data.data=pool.jsonl", "--data.model=./nope"], 2, "im-lightning fit: ./nope: there is no such folder"),
        (["--data.data=pool.jsonl", "--trainer.accelerator=abacus"], 2, "im-lightning fit: arguments of the Trainer: "),
        (
            ["--data.data=pool.jsonl", "--ckpt_path=no.ckpt"],
            2,
            "im-lightning fit: no.ckpt: there is no such checkpoint",
        ),
        (
            ["--data.data=pool.jsonl", "--ckpt_path=bad.jsonl"],
            1,
            "im-lightning fit: bad.jsonl: it is torn, or no check",
        ),
    ],
)
def test_errors_end_with_their_status_and_without_a_traceback(
    study: Path, capfd: Any, arguments: list[str], status: int, text: str
) -> None:
    (study / "bad.jsonl").write_text('{"instruction": "no response"}\n')
    (study / "lots.yaml").write_text("data: {data: pool.jsonl, budget: lots}\n")
    (study / "bugdet.yaml").write_text("data: {data: pool.jsonl, bugdet: 3}\n")
    assert run(*QUIET, *arguments) == status
    err = capfd.readouterr().err
    assert text in err and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("im-lightning fit: "), "one line says it"


def test_help_shows_an_example_and_our_arguments(capfd: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    out = capfd.readouterr().out
    assert stopped.value.code == 0 and "example: im-lightning fit --config" in re.sub(r"\s+", " ", out)
    for argument in ("--data.budget", "--data.subset_seed", "--model.lora_rank", "--mining.ledger", "--export"):
        assert argument in out
    assert "--model.model " not in out, "the model is named once, as data.model"


def test_an_interrupt_ends_with_its_own_status(study: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that loop over seeds must be able to tell Ctrl-C from a failed fit."""
    import signal

    from im_lightning.training.module import InstructTuningModule

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(InstructTuningModule, "training_step", interrupted)
    try:
        assert run(*QUIET, "--data.data=pool.jsonl", "--data.eval_data=eval.jsonl") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "interrupted" in capfd.readouterr().err


@pytest.mark.parametrize("named", ["FSDP", "DeepSpeed stage 3"])
def test_a_sharded_model_is_not_exported(named: str, study: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There every rank has a piece: an export would write one. Asked before the fit, not after it."""
    from pytorch_lightning import strategies

    class FSDPStrategy(strategies.SingleDeviceStrategy):
        """The real one refuses a CPU."""

    class Zero(strategies.SingleDeviceStrategy):
        zero_stage_3 = True  # as DeepSpeed's has it

    kind = FSDPStrategy if named == "FSDP" else Zero
    monkeypatch.setattr("pytorch_lightning.trainer.connectors.accelerator_connector.SingleDeviceStrategy", kind)
    assert run(*QUIET, "--data.data=pool.jsonl", "--trainer.accelerator=cpu", "--export=adapter") == 2
    assert f"export: under {named} no rank has the whole weights" in capfd.readouterr().err
    assert not (study / "adapter").exists()


def test_a_trial_of_wandbs_agent_is_logged_to_wandb(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes have no logger; the agent, which sets this variable, waits for the metric."""
    import wandb

    from im_lightning.ledger.ledger import RunLedger

    monkeypatch.setenv("WANDB_SWEEP_ID", "abc123")
    try:
        arguments = [*QUIET, "--data.data=pool.jsonl", "--data.eval_data=eval.jsonl", "--data.subset_size=12"]
        assert run(*arguments, "--trainer.accelerator=cpu", "--mining.refit=false") == 0
    finally:
        wandb.finish()
    (record,) = RunLedger("runs").records()
    (folder,) = study.glob("wandb/offline-run-*")
    assert folder.name.endswith(record.loggers["WandbLogger"])


def test_an_export_that_cannot_be_written_is_refused_before_the_fit(study: Path, capfd: Any) -> None:
    """Not after hours of training."""
    Path("taken").write_text("a file")
    given = ["--data.data=pool.jsonl", "--data.eval_data=eval.jsonl", "--export=taken"]
    assert run(*QUIET, *given) == 2
    assert "--export taken: the folder cannot be made: File exists" in capfd.readouterr().err
    assert not Path("runs").exists()
