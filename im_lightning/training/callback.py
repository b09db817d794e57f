"""`InstructMiningCallback`: live statistics, the final evaluation loss, the run's record, and a refit of the rule.

What it asks of the data module and of a LightningModule is checked before anything is trained (`check_parts`), what
`training_step` returns after the first batch (`step_losses`).
"""

from __future__ import annotations

import math
import time
from typing import Any

from im_lightning._lightning import Callback, Trainer, check_trainer
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import Progress, log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.curve import stopped
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord, checked_run_id, new_run_id, now
from im_lightning.ledger.targets import SCORE, set_of, terms_of
from im_lightning.rule.transfer import GRAVE
from im_lightning.sampling.weights.quality_weights import effective_sample_size
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.evaluation import EvalLosses, all_sum, base_losses, best_losses, best_note, evaluate_with
from im_lightning.training.exact_match import exact_matches, refuse_answers
from im_lightning.training.loggers import log_config, log_record, log_scalars, log_tables
from im_lightning.training.loss_statistics.live import LiveStatistics, step_losses
from im_lightning.training.run.curve import EvaluationCurve
from im_lightning.training.run.refit import refit_after, refit_due, refit_inside, refuse_refits
from im_lightning.training.run.run_record import build_record, other_base, run_regime


def check_parts(trainer: Trainer, module: Any, evaluation: str | None, who: str) -> InstructMiningDataModule:
    """The Trainer's data module, if it and the module can be worked with; before hours of training.

    Raises:
        RequestError: another data module, a module without `response_nll`, an unknown evaluation set.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, InstructMiningDataModule):
        cause = f"the Trainer's datamodule is {type(datamodule).__name__}"
        raise RequestError(message(who, cause, "pass Trainer.fit(..., datamodule=InstructMiningDataModule(...))"))
    if datamodule.eval_sets and not callable(getattr(module, "response_nll", None)):
        remedy = "define response_nll(self, batch) -> (summed NLL [B], response tokens [B]), or leave out eval_data"
        cause = f"{type(module).__name__} has no response_nll, which measures the evaluation loss"
        raise RequestError(message(who, cause, remedy))
    losses = [] if evaluation is None else [term for term in terms_of(evaluation) if not term.startswith(SCORE)]
    absent = [term for term in losses if set_of(term) not in datamodule.eval_sets]
    if absent and evaluation not in datamodule.eval_sets:
        cause = f"there is no evaluation set {absent[0]!r}"
        named = ", ".join(datamodule.eval_sets) or "none: pass eval_data="
        raise RequestError(message("evaluation", cause, f"name one of the sets of eval_data ({named})"))
    return datamodule


def _data(trainer: Any) -> InstructMiningDataModule:
    return trainer.datamodule  # checked in `setup`


class InstructMiningCallback(Callback):
    """Logs how training loss correlates with the indicators, measures the evaluation loss, keeps the run, refits.

    Needs an `InstructMiningDataModule`. A LightningModule of your own returns `example_loss` (mean nats per response
    token, [B]) and `row` (`batch["row"]`), both detached, from `training_step`, and has `response_nll(batch)` that
    returns the summed NLL and the number of response tokens of each example.

    Logged to the Trainer's loggers, under `log_prefix`, every `log_every_n_steps` optimiser steps: how the losses of
    training examples correlate with the indicators, and how much of the pool has been seen; at the end the evaluation
    losses (docs/logging.md explains each key). What it cannot work with is a RequestError, at the first step or before.

    Args:
        ledger: Folder of the runs; each fit adds `<run_id>.json`, `<run_id>.losses.parquet`,
            `<run_id>.statistics.json` and, from the command line, its arguments as `<run_id>.config.yaml`.
        refit: Whether to refit `<ledger>/rule.json` after a designed run, when there are enough runs; a rule that a
            command or a person made, or that was tested, stays.
        refit_every_n_epochs: Whether to refit inside the fit, too: after every so many epochs the rule is fitted again
            on what the ledger then holds (other processes may have added runs), and the next epochs are drawn by it.
            Needs budget= and resample_each_epoch=True. A resumed fit goes on with the rule its checkpoint had.
        evaluation: Evaluation set whose loss a refit explains, or another target (docs/targets.md); by default that of
            the rule refitted, else the first set.
        exact_match: Whether to answer the evaluation rows of short responses greedily at the end and record the share
            of exact matches, which a rule can be fitted on (em:SET).
        evaluate_base: Whether to measure the base model's evaluation loss too; measured once per frozen folder.
        evaluate_best: Whether to measure that of the best checkpoint, too, where a ModelCheckpoint monitors a value.
        log_every_n_steps: Optimiser steps between logged statistics, and the window within which losses are centred.
        log_prefix: First part of the logged names.
        run_id: Id of the run in the ledger, for whoever starts a killed fit again: the record then takes the place of
            the earlier one. By default a new id.
        eval_at: Where the evaluation losses are measured besides the end, at the cost of an evaluation each: shares of
            the optimiser steps or numbers of them, 0.2,0.5 or [50, 100]. The run's record keeps the curve.
        stop_at: Where the run ends early, a share of the optimiser steps or a number of them. Its learning rates are
            those of the full run up to there; its record says so, and no fit takes it for a full run.
    """

    def __init__(
        self,
        ledger: str = "runs",
        refit: bool = True,
        refit_every_n_epochs: int | None = None,
        evaluation: str | None = None,
        evaluate_base: bool = True,
        evaluate_best: bool = True,
        exact_match: bool = False,
        log_every_n_steps: int = 50,
        log_prefix: str = "im",
        run_id: str | None = None,
        eval_at: list[float] | float | str | None = None,
        stop_at: float | None = None,
    ) -> None:
        super().__init__()
        if log_every_n_steps < 1:
            raise RequestError(message("log_every_n_steps", f"it is {log_every_n_steps}", "give at least one step"))
        if refit_every_n_epochs is not None and refit_every_n_epochs < 1:
            what, cause = "refit_every_n_epochs", f"it is {refit_every_n_epochs}"
            raise RequestError(message(what, cause, "give at least one epoch, or leave it out"))
        self.ledger, self.refit_every_n_epochs = RunLedger(ledger), refit_every_n_epochs
        self.refit, self.evaluation = refit, evaluation
        self.evaluate_base, self.evaluate_best, self.exact_match = evaluate_base, evaluate_best, exact_match
        self.log_every_n_steps, self.log_prefix = log_every_n_steps, log_prefix
        self.given_run_id = None if run_id is None else checked_run_id(run_id)
        self.curve = None if eval_at is None and stop_at is None else EvaluationCurve(eval_at, stop_at)
        self.config: str | None = None  # the arguments of the command line, as YAML
        self.run_id: str | None = None
        self.record: RunRecord | None = None
        self.losses: dict[str, EvalLosses] = {}
        self.base_losses: dict[str, float] = {}
        self._of: dict[str, Any] = {}
        self.live = LiveStatistics(0, None, None, log_every_n_steps, math.nan)
        self._restored: dict[str, Any] = {}
        self._reduced: dict[str, Any] = {}

    # start

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        check_trainer(trainer, type(self).__name__)
        if stage != "fit":
            return
        datamodule = check_parts(trainer, pl_module, self.evaluation, type(self).__name__)
        if self.exact_match:
            refuse_answers(trainer, pl_module, datamodule)
        if self.refit_every_n_epochs is not None:
            refuse_refits(datamodule.choice, datamodule.table, self.refit_every_n_epochs)
        if self._records(trainer) and trainer.is_global_zero:
            self.ledger.make()  # not after hours of training
        if datamodule.rule is not None and other_base(pl_module, datamodule) is not None:
            regime = run_regime(trainer, pl_module, datamodule)  # the data module has asked of the base that it names
            datamodule.rule.check_regime({name: regime[name] for name in GRAVE}, datamodule.hparams["force"])
        self.record, self.run_id, self.losses, self.base_losses, self._restored = None, None, {}, {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        data = _data(trainer)
        restored, self._reduced = self._restored, {}
        self._of = {"pool": data.pool.digest, "evaluation": {name: one.digest for name, one in data.eval_sets.items()}}
        if data.rule is not None:
            phi = {name: one.to_json() for name, one in data.rule.transforms_.items()}
            self._of["rule"] = digest_json([data.rule.coef_.tolist(), phi])
        restored = self._of_these(restored, leader=trainer.is_global_zero)
        self.run_id = trainer.strategy.broadcast(restored.get("run_id") or self.given_run_id or new_run_id())
        self.created = restored.get("created") or now()
        self._seconds, self._start = float(restored.get("seconds", 0.0)), time.monotonic()
        versions = data.versions.made if data.versions is not None else []  # those of a checkpoint
        ess = effective_sample_size(versions[-1].weights.weights if versions else data.weights)
        self.live = LiveStatistics(len(data.pool), data.table, data.scored, self.log_every_n_steps, ess)
        self.live.adopt(restored, trainer.global_step, leader=trainer.is_global_zero)
        if "curve" in restored and self.curve is None:  # it keeps the points that it had
            self.curve = EvaluationCurve(None, None)
        if self.curve is not None and self._records(trainer):
            self.curve.begin(trainer, restored.get("curve", ()))
        if trainer.is_global_zero and self._records(trainer):
            if trainer.loggers:
                regime = run_regime(trainer, pl_module, data)
                log_config(trainer, {"run_id": self.run_id, "purpose": data.purpose, "regime": regime})
            if self.config is not None:
                self.ledger.add_config(str(self.run_id), self.config)
        if data.rule is not None and trainer.is_global_zero:
            checked = data.regime().keys()  # by the data module
            rest = {k: v for k, v in run_regime(trainer, pl_module, data).items() if k not in checked}
            data.rule.check_regime(rest)  # warns
        self.base_losses = dict(restored.get("base_losses", {}))
        if self.evaluate_base and not data.eval_sets.keys() <= self.base_losses.keys() and self._records(trainer):
            self.base_losses |= base_losses(trainer, pl_module, data, fresh=not restored and trainer.global_step == 0)

        if data.sampler is not None and trainer.current_epoch > data.sampler.epoch:  # resumed between two epochs
            self._refit_inside(trainer)
        left: float = trainer.num_training_batches * ((trainer.max_epochs or 0) - trainer.current_epoch)
        if trainer.max_steps > 0:
            left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is None and 0 < left < math.inf
        self._progress = Progress("training", left, "batches") if shown else None

    def _of_these(self, restored: dict[str, Any], leader: bool) -> dict[str, Any]:
        """What a checkpoint kept, without what was counted on another pool or under another rule, or measured on other
        evaluation rows, as in a resume with on_mismatch=warn. Those of earlier versions do not say what they are of."""
        was, kept = {**self._of, **restored.get("of", {})}, dict(restored)
        other = {name for name, digest in self._of["evaluation"].items() if was["evaluation"].get(name) != digest}
        if anew := [name for name in ("pool", "rule") if was.get(name) != self._of.get(name)]:
            dropped = ("statistics", "history", "window", *(["exposures"] if "pool" in anew else []))
            kept = {name: value for name, value in kept.items() if name not in dropped}
        if other:
            kept["base_losses"] = {n: v for n, v in restored.get("base_losses", {}).items() if n not in other}
            kept.pop("curve", None)
        if leader and (other or anew):
            what = "the checkpoint is of another pool or rule, or of other evaluation rows"
            log(f"{what}; what was counted on them begins anew")
        return kept

    # steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.live.due(trainer.global_step):
            self._log(trainer, self.live.close(trainer.global_step, all_sum(trainer), trainer.is_global_zero))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        losses = step_losses(pl_module, outputs)
        if losses is not None:
            self.live.see(*losses)
        if self._progress is not None:
            self._progress.advance()
        if self.curve is not None and trainer.global_step in self.curve.due_at:
            self._measure(trainer, pl_module, self.curve)
        if self.curve is not None and trainer.global_step == self.curve.ends_at:
            trainer.should_stop = True
        if trainer.is_last_batch:  # before a checkpoint of this step is written
            self._refit_inside(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stand(trainer)
        self._refit_inside(trainer)

    def _refit_inside(self, trainer: Trainer) -> None:
        """Lets the next epoch be drawn by a new rule, where that is asked for and due. A collective."""
        data, every = _data(trainer), self.refit_every_n_epochs
        if every is None or not refit_due(trainer, data, every):
            return
        version = refit_inside(trainer, data, self.ledger, self.evaluation)
        if version is not None:
            self.live.ess = effective_sample_size(version.weights.weights)
            self._log(trainer, {"rule_version": float(data.begin_refits().number)})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        if trainer.loggers:
            log_scalars(trainer, values, self.log_prefix)

    def _measure(self, trainer: Trainer, pl_module: Any, curve: EvaluationCurve) -> None:
        """A point of the curve: the evaluation losses now, and what has been trained on. A collective."""
        self.live.flush()
        self.live.exposures.reduce(all_sum(trainer))
        evaluation = self._evaluate(trainer, pl_module)
        curve.add(self._build(trainer, pl_module, evaluation, "incomplete", ""))
        self._log(trainer, {f"eval_loss/{name}": told["loss"] for name, told in evaluation.items()})

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> dict[str, dict[str, Any]]:
        sets = _data(trainer).eval_sets
        self.losses = evaluate_with(trainer, pl_module, sets) if sets else {}
        evaluation = {name: losses.summary() for name, losses in self.losses.items()}
        for name in self.base_losses.keys() & evaluation.keys():
            evaluation[name]["base_loss"] = self.base_losses[name]
        return evaluation

    def _stand(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, Any]]:
        """Current statistics: scalars for the loggers, and the whole, which goes into the ledger. A collective."""
        values, everything = self.live.standing(trainer.global_step, all_sum(trainer))
        if trainer.is_global_zero and self._records(trainer):
            try:
                self.ledger.add_statistics(str(self.run_id), everything)
            except InstructMiningError as error:  # a full disk may be emptied before the run's record is due
                log(f"the run's statistics are not kept: {error}")
        return values, everything

    # end

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        data = _data(trainer)
        logged, statistics = self._stand(trainer)
        if not self._records(trainer):
            self._log(trainer, logged)
            return
        evaluation = self._evaluate(trainer, pl_module)
        best = best_losses(trainer, pl_module, data) if self.evaluate_best else {}
        for kind, losses in (("base_loss", self.base_losses), ("best_loss", best)):
            for name in losses.keys() & evaluation.keys():
                evaluation[name][kind] = logged[f"{kind}/{name}"] = losses[name]
        logged |= {f"eval_loss/{name}": told["loss"] for name, told in evaluation.items()}
        for name, answered in (exact_matches(trainer, pl_module, data) if self.exact_match else {}).items():
            evaluation[name] |= answered
            logged[f"exact_match/{name}"] = answered["exact_match"]
        self._log(trainer, logged)
        measured = bool(evaluation) and all(math.isfinite(e["loss"]) for e in evaluation.values())
        status = "complete" if measured else "incomplete"
        note = "" if measured else "the evaluation loss is not finite" if evaluation else "no evaluation set"
        if not trainer.is_global_zero:
            return
        full = self._cut_short(trainer)
        ended = "" if full is None else f"it ended at step {trainer.global_step} of {full}, before its limits"
        note = "; ".join(filter(None, (note, ended, best_note(trainer))))
        self.record = self._write(trainer, pl_module, evaluation, status, note, full)
        log(_result(self.record, self.ledger))
        if ended:
            log(f"{self.run_id}: {ended} (by EarlyStopping or max_time, say); no fit takes it for a full run")
        refitted = None
        if self.refit and self.record.purpose == "designed" and not ended:  # others add nothing to the fit
            asked = {"exact_match": "true" if self.exact_match else "", "evaluation": self.evaluation or ""}
            mining = [f"--mining.{name}={value}" for name, value in asked.items() if value]
            mining += [] if self.curve is None else self.curve.flags
            refitted = refit_after(self.record, self.ledger, self.evaluation, trainer, pl_module, data, mining)
        if trainer.loggers:
            rules, scores = {"rule": data.rule, "refitted_rule": refitted}, data.run_folder / "table.parquet"
            log_tables(trainer, self.log_prefix, statistics, rules, scores)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves a record of a fit that failed; without collectives, since other ranks may be gone."""
        if self.run_id is None or self.record is not None or not self._records(trainer) or not trainer.is_global_zero:
            return
        try:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._write(trainer, pl_module, {}, status, f"{type(exception).__name__}: {exception}")
        except Exception as error:  # the exception that ended the fit is the one to show
            log(f"the failed run could not be recorded: {type(error).__name__}: {error}")

    def _build(self, trainer: Trainer, pl_module: Any, evaluation: Any, status: str, note: str) -> RunRecord:
        return build_record(
            trainer,
            pl_module,
            _data(trainer),
            run_id=str(self.run_id),
            created=self.created,
            seconds=self._seconds + time.monotonic() - self._start,
            exposures=self.live.exposures.total + self.live.exposures.recent,
            evaluation=evaluation,
            status=status,
            note=note,
        )

    def _cut_short(self, trainer: Trainer) -> int | None:
        """How many optimiser steps the run was to have, where something else than its limits and `stop_at` ended it."""
        if not trainer.should_stop or (self.curve is not None and self.curve.ends_at == trainer.global_step):
            return None
        steps = trainer.estimated_stepping_batches
        return int(steps) if trainer.global_step < steps < math.inf else None

    def _write(
        self, trainer: Trainer, pl_module: Any, evaluation: Any, status: str, note: str, full: int | None = None
    ) -> RunRecord:
        """Keeps the record and the losses; `full` are the steps of a run that was cut short."""
        data = _data(trainer)
        record = self._build(trainer, pl_module, evaluation, status, note)
        record = record if self.curve is None else self.curve.put_into(record)
        if full is not None:
            record.curve = {"steps": full, "points": [], **record.curve}
            record = stopped(record, record.steps, full)
        for name in evaluation:
            self.ledger.add_losses(record.run_id, name, data.eval_sets[name].ids, **self.losses[name].columns())
        # A resumed run takes the place of its own earlier record, but not by failing.
        self.ledger.add(record, replace=status not in ("failed", "interrupted"))
        if trainer.loggers:
            log_record(trainer, record)
        return record

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; what needs a reduction over ranks is added in `on_save_checkpoint`."""
        if self.run_id is None:
            return {}
        seconds = self._seconds + time.monotonic() - self._start
        return {
            "run_id": self.run_id,
            "created": self.created,
            "seconds": seconds,
            "base_losses": dict(self.base_losses),
            "of": self._of,
            **({"curve": self.curve.points} if self.curve is not None and self.curve.points else {}),
            **(self._reduced or {"exposures": self.live.exposures.state()}),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reduces on all ranks, then puts the sums into rank 0's copy. After an interrupt the last sums stand: another
        rank may be gone, and waiting for it would never end."""
        if self.run_id is None or (trainer.interrupted and trainer.world_size > 1):
            return
        self._reduced = self.live.state(all_sum(trainer))
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # adopted in `on_train_start`, where the ranks and the pool are known

    def _records(self, trainer: Any) -> bool:
        return not (trainer.fast_dev_run or trainer.overfit_batches or trainer.barebones)


def _result(record: RunRecord, ledger: RunLedger) -> str:
    """One line: the run and its evaluation losses in nats per token."""
    losses = []
    for name, values in record.evaluation.items():
        base = f", base {values['base_loss']:.4f}" if values.get("base_loss") is not None else ""
        losses.append(f"{name} {values['loss']:.4f}{base}" if values["loss"] is not None else f"{name} not finite")
    measured = "; ".join(losses) or "not measured"
    return f"{ledger.path}/{record.run_id}.json: evaluation loss {measured} ({record.status})"
