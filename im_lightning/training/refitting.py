"""After a run: refit the rule if the ledger has enough of them, else say how many are missing and how to make one."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError
from im_lightning.ledger.ledger import RULE_FILE, RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule, runs_missing
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.training.module import InstructTuningModule
from im_lightning.training.versions import RuleVersion, fit_version

_TRAINER = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
_UNSET = {"max_steps": -1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}  # as a Trainer keeps them


def refit_after(
    record: RunRecord, ledger: RunLedger, evaluation: str | None, trainer: Any, module: Any, datamodule: Any
) -> LinearRule | None:
    """Fits a rule on the ledger's runs of this run's regime and writes `<ledger>/rule.json`; never raises.

    Args:
        record: The run just written.
        ledger: Where it was written.
        evaluation: The evaluation set whose loss the rule predicts; by default the run's first.
        trainer: For the command that makes the next run.
        module: The same.
        datamodule: The same.

    Returns:
        The rule, its `origin` the file written; None where there is no new one: the reason has been said in one line.
    """
    if record.purpose not in ("designed", "weighted"):
        return None
    if record.status != "complete":
        log(f"{ledger.path}: no refit, the run {record.run_id} is {record.status} ({record.note})")
        return None
    evaluation = evaluation or next(iter(record.evaluation))
    regime = record.run_id if record.purpose == "designed" else None
    try:
        records = ledger.records(status=None)
        missing = runs_missing(records, evaluation=evaluation, regime=regime)
        if missing:
            command = next_command(records, ledger, trainer, module, datamodule)
            runs = "one more designed run is" if missing == 1 else f"{missing} more designed runs are"
            log(f"{ledger.path}: {runs} needed to fit a rule; the next: {command}")
            return None
        rule = fit_rule(records, evaluation=evaluation, regime=regime)
        path = ledger.path / RULE_FILE
        rule.save(path)
    except InstructMiningError as error:
        log(f"{ledger.path}: no refit: {error}")
        return None
    except Exception as error:  # whatever goes wrong here, the training itself is done and recorded
        log(f"{ledger.path}: no refit, it failed with {type(error).__name__}: {error}")
        return None
    r2 = rule.metrics_.get("leave_one_out_r2")
    held_out = "not estimable" if r2 is None else f"{r2:.2f}"
    log(
        f"{path}: refitted on {rule.n_runs_} runs by least squares (leave-one-out R² {held_out}; whether it is better "
        f"than the mean was not tested); im-lightning refit {ledger.path} compares rules and tests them"
    )
    rule.origin = str(path)
    return rule


def refit_due(trainer: Any, every: int) -> bool:
    """Whether the epoch after the sampler's is one that a refit is to precede, and none has been tried for it yet."""
    data = trainer.datamodule
    coming = data.sampler.epoch + 1
    over = trainer.max_epochs not in (None, -1) and coming >= trainer.max_epochs
    return not over and coming % every == 0 and coming > data.versions.attempted


def refit_inside(trainer: Any, ledger: RunLedger, evaluation: str | None) -> RuleVersion | None:
    """Fits a rule on what the ledger holds now and lets the next epoch be drawn by it; never raises. A collective.

    Rank 0 reads, fits and weighs; all ranks take what it broadcasts, so that no rounding tells them apart.

    Returns:
        The version, or None where the rule stays as it is; the reason has been said in one line.
    """
    data = trainer.datamodule
    versions, epoch = data.versions, data.sampler.epoch + 1
    found: RuleVersion | None = None
    if trainer.is_global_zero:
        try:
            found = fit_version(ledger, evaluation, versions, data.rule, data.regime(), epoch)
        except InstructMiningError as error:
            log(f"{ledger.path}: epoch {epoch} is drawn by the same rule as before: {error}")
        except Exception as error:  # a refit is no reason to lose a fit
            reason = f"the refit failed with {type(error).__name__}: {error}"
            log(f"{ledger.path}: epoch {epoch} is drawn by the same rule as before: {reason}")
    version = trainer.strategy.broadcast(found)
    versions.attempted = epoch
    if version is not None:
        versions.take(version, data.sampler)
        if trainer.is_global_zero:
            runs = version.rule["runs"]
            log(f"{ledger.path}: from epoch {epoch} on rows are drawn by a rule refitted on {runs} runs")
    return version


def next_command(records: list[RunRecord], ledger: RunLedger, trainer: Any, module: Any, datamodule: Any) -> str:
    """The command that makes the next designed run: this run's own arguments with the first unused subset seed."""
    designed = [r for r in records if r.purpose == "designed"]
    seeds = [s for r in designed if isinstance(s := r.subset.get("seed"), int)]
    seed = max(seeds, default=-1) + 1
    data = dict(datamodule.hparams)
    size = data.get("subset_size") or next((r.subset["size"] for r in designed if r.subset.get("size")), None)
    size = size or data.get("budget") or min(1000, max(1, len(datamodule.pool) // 4))
    if type(module) is not InstructTuningModule:
        return f"run this script again with InstructMiningDataModule(..., subset_size={size}, subset_seed={seed})"
    for name in ("budget", "rule", "replacement", "resample_each_epoch", "purpose", "run_dir"):
        data.pop(name, None)  # what a designed run has no use for
    data |= {"subset_size": size, "subset_seed": seed}
    tuning = {k: v for k, v in module.hparams.items() if k != "model"}
    words = ["im-lightning", "fit"]
    words += _flags("data", data, type(datamodule).__init__)
    words += _flags("model", tuning, InstructTuningModule.__init__)
    if trainer.max_epochs is not None:
        words.append(f"--trainer.max_epochs={trainer.max_epochs}")
    words += _flags("trainer", {name: getattr(trainer, name) for name in _TRAINER}, type(trainer).__init__)
    if trainer.precision_plugin.precision != "32-true":
        words.append(f"--trainer.precision={trainer.precision_plugin.precision}")
    if trainer.num_devices > 1:
        words.append(f"--trainer.devices={trainer.num_devices}")
    if Path(trainer.default_root_dir).resolve() != Path.cwd():
        words.append(f"--trainer.default_root_dir={trainer.default_root_dir}")
    words.append(f"--mining.ledger={ledger.path}")
    return shlex.join(words)


def _flags(group: str, values: dict[str, Any], init: Any) -> list[str]:
    """`--group.name=value` for what differs from the defaults."""
    out = []
    for name, parameter in inspect.signature(init).parameters.items():
        if name not in values or values[name] is None or values[name] == parameter.default:
            continue
        value = values[name]
        if name in _UNSET and repr(value) == repr(_UNSET[name]):  # limit_train_batches: 1 is a batch, 1.0 all
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        out.append(f"--{group}.{name}={text}")
    return out
