"""Refits of the rule: inside a fit, whose later epochs are drawn by them, and after it.

Version 0 is the rule the fit began with. At the end of an epoch rank 0 may read the ledger, fit another, and weigh the
pool by it; the weights take effect with the next epoch. The order of rows stays a function of (seed, epoch, rule
version): a version, once made, is in every checkpoint and beside the frozen inputs
(`<frozen folder>/refits/<digest>/`), and a resumed fit goes on with it, whatever the ledger holds by then.

After a run the rule is refitted where the ledger has runs enough; else a line says how many are missing and gives the
command that makes the next.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from im_lightning._lightning import Trainer
from im_lightning._utils.force import Force
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.data.overlap.keys import Mask
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.curve import STOPPED
from im_lightning.ledger.ledger import RULE_FILE, RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import comparable, next_seed, runs_missing
from im_lightning.ledger.targets import SCORE, set_of, terms_of
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.rule.rule_file import fields_from_json, rule_to_json
from im_lightning.sampling.draws.sampler import QualityWeightedSampler
from im_lightning.sampling.rows import Choice, exclusion_of, weigh
from im_lightning.sampling.weights.quality_weights import RowWeights
from im_lightning.training.module import InstructTuningModule
from im_lightning.training.run.run_folder import RunInputs, freeze, is_frozen, thaw

FOLDER = "refits"


@dataclass(frozen=True)
class RuleVersion:
    """One refit: the first epoch drawn by it, the rule file's content (plain JSON), the weights of the pool's rows."""

    epoch: int
    rule: dict[str, Any]
    weights: RowWeights

    @property
    def digest(self) -> str:
        return digest_json(self.rule)

    def summary(self) -> dict[str, Any]:
        """For the run's record."""
        names = ("method", "strength", "ess", "eligible")
        told = {name: self.weights.report[name] for name in names if name in self.weights.report}
        return {"epoch": self.epoch, "rule": self.digest, "runs": self.rule["runs"], **told}


@dataclass
class RuleVersions:
    """The refits of one fit.

    Args:
        folder, inputs: The run's frozen folder, and what its digest is of.
        ids: Ids of the pool's N rows.
        weigh: Weights of the pool under a rule.
        weighting: How, as the options have it.
        attempted: The last epoch for which a refit was tried, with or without success.
        made: In order.
        past: Summaries of those that are in `made` no more: a checkpoint keeps the weights of the last two.
    """

    folder: Path
    inputs: dict[str, Any]
    ids: list[str]
    weigh: Callable[[LinearRule], RowWeights]
    weighting: dict[str, Any] = field(default_factory=dict)
    attempted: int = 0
    made: list[RuleVersion] = field(default_factory=list)
    past: list[dict[str, Any]] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The version that the next epoch is drawn by; 0: the rule the fit began with."""
        return len(self.past) + len(self.made)

    def summaries(self) -> list[dict[str, Any]]:
        return [*self.past, *(version.summary() for version in self.made)]

    def propose(self, content: dict[str, Any], epoch: int) -> RuleVersion:
        """A version made of a rule file's content, kept in the frozen folder; what weighing it refuses is raised."""
        rule = self._read(content)
        version, folder = RuleVersion(epoch, content, self.weigh(rule)), self._folder(digest_json(content))
        if not is_frozen(folder):
            freeze(RunInputs(folder, self.inputs, None, rule, version.weights), self.ids)
        return version

    def take(self, version: RuleVersion, sampler: QualityWeightedSampler) -> None:
        """Draws by the version from the next epoch on. Every rank calls it with the same one."""
        sampler.update_weights(version.weights.weights)
        self.made.append(version)

    # checkpoints

    def state(self) -> dict[str, Any]:
        """Plain values: the version in force and the one that is to follow, if there are any, as rule files."""
        kept = self.made[-2:]
        return {
            "attempted": self.attempted,
            "past": self.summaries()[: self.number - len(kept)],
            "version": self.number,
            "rules": [{"epoch": version.epoch, "rule": json.dumps(version.rule)} for version in kept],
            "weighting": self.weighting,
        }

    def adopt(self, state: Mapping[str, Any], sampler: QualityWeightedSampler, epoch: int) -> None:
        """Puts the sampler where it was when `state` was taken, in an epoch; its own state is loaded afterwards."""
        self.attempted, self.past = int(state["attempted"]), list(state["past"])
        self.made = [self._restored(int(one["epoch"]), json.loads(one["rule"])) for one in state["rules"]]
        for version in self.made:
            sampler.update_weights(version.weights.weights)
            if version.epoch <= epoch:
                sampler.set_epoch(sampler.epoch + 1)  # so that they take effect

    def _restored(self, epoch: int, content: dict[str, Any]) -> RuleVersion:
        folder = self._folder(digest_json(content))
        if is_frozen(folder):
            return RuleVersion(epoch, content, thaw(folder).weights)
        return self.propose(content, epoch)

    def _folder(self, digest: str) -> Path:
        return self.folder / FOLDER / digest

    def _read(self, content: dict[str, Any]) -> LinearRule:
        return LinearRule(**vars(fields_from_json(content, str(self._folder(digest_json(content)) / "rule.json"))))


def versions_of(
    choice: Choice, run: RunInputs, ids: list[str], left_out: Callable[[str], Mapping[str, Mask]], force: Force
) -> RuleVersions:
    """The (empty) versions of a run that begins; the arguments are those of the first weighting."""
    drawing = replace(choice, rule="refitted")

    def weighted(rule: LinearRule) -> RowWeights:
        if run.table is None:  # cannot be: `refuse_refits` has asked
            raise RequestError(message("refit", "the pool has no scores for a rule to weigh", "pass scores="))
        rule.check(run.table, force)
        shared = left_out(exclusion_of(run.inputs))
        return weigh(drawing, len(ids), shared, Regressors.of(run.table, rule), run.table.source)

    return RuleVersions(run.folder, run.inputs, ids, weighted, asdict(choice.weighting))


def refuse_refits(choice: Choice, table: Any, every: int) -> None:
    """Refuses refits inside a fit that could not use them.

    Raises:
        RequestError: the rows are drawn once, or not by weight, or the pool is not scored.
    """
    what = f"refit_every_n_epochs={every}"
    if choice.draw_inputs["kind"] != "each epoch":
        cause = "the rows of this fit are drawn once, so a rule that comes later would draw none"
        remedy = "pass budget= and resample_each_epoch=True, or leave refit_every_n_epochs out"
        raise RequestError(message(what, cause, remedy))
    if choice.weighting.weighting == "uniform":
        raise RequestError(message(what, "under weighting uniform a rule changes nothing", "choose another weighting"))
    if table is None:
        remedy = "pass rule=, scores= or indicators="
        raise RequestError(message(what, "the pool has no scores for a rule to weigh", remedy))


def fit_version(
    ledger: RunLedger, evaluation: str | None, versions: RuleVersions, rule: LinearRule | None, regime: Any, epoch: int
) -> RuleVersion:
    """A rule fitted on what the ledger holds now (runs of other processes, too), as the version from `epoch` on.

    It predicts the loss of `evaluation`, by default that of `rule`, with which the fit began, or of the only set; runs
    of that rule's regime are fitted, where there are such. `regime` is what of the data belongs to this run's.

    Raises:
        InstructMiningError: the runs cannot answer, the rule does not fit the run, or nothing has changed.
    """
    evaluation = evaluation or (rule.evaluation if rule is not None else None) or None
    records = ledger.records(status=None)
    fitted = fit_rule(records, evaluation=evaluation, regime=_run_of(records, rule, evaluation))
    last = versions.made[-1].rule["ledger_digest"] if versions.made else rule.ledger_digest_ if rule else None
    if fitted.ledger_digest_ == last:
        raise InstructMiningError("the ledger has no new runs")
    fitted.check_regime(regime)
    return versions.propose(rule_to_json(fitted), epoch)


def _run_of(records: list[RunRecord], rule: LinearRule | None, evaluation: str | None) -> str | None:
    """A complete designed run of the rule's own regime, None where there is none."""
    if rule is None or not rule.regime:
        return None
    mine = comparable(rule.regime, evaluation)
    for record in records:
        told = comparable(record.regime, evaluation)
        same = all(told.get(name) == value for name, value in mine.items() if name in told)
        same = same and told.get(STOPPED) == mine.get(STOPPED)
        if record.purpose == "designed" and record.status == "complete" and same:
            return record.run_id
    return None


_TRAINER = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
_UNSET = {"max_steps": -1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}  # as a Trainer keeps them


def refit_after(
    record: RunRecord,
    ledger: RunLedger,
    evaluation: str | None,
    trainer: Trainer,
    module: Any,
    datamodule: Any,
    mining: Sequence[str] = (),
) -> LinearRule | None:
    """Fits a rule on the ledger's designed runs of this one's regime and writes `<ledger>/rule.json`; never raises.

    A rule that a person fitted or that was tested stays. The rule predicts `evaluation`, by default the target
    that the rule it replaces was for, else the loss on the run's first set; its `origin` is the file written. None
    where there is no new one: the reason has been said in one line, with the command of the next run and its arguments
    `mining`.
    """
    if record.status != "complete":
        log(f"{ledger.path}: no refit, the run {record.run_id} is {record.status} ({record.note})")
        return None
    path, regime = ledger.path / RULE_FILE, record.run_id
    try:
        before = LinearRule.load(path) if path.exists() else None
        asked = evaluation or (before.evaluation if before is not None else "")
        here = all(set_of(term) in record.evaluation for term in terms_of(asked) if not term.startswith(SCORE))
        evaluation = asked if evaluation or here else next(iter(record.evaluation))
        command = f"im-lightning refit {ledger.path} --out {path}"
        command += f" --evaluation {evaluation}" if [evaluation] != list(record.evaluation) else ""
        if before is not None and not before.replaceable:
            log(f"{path} stays, a command made or tested it; to fit it on this run, too: {command}")
            return None
        records = ledger.records(status=None)
        missing = runs_missing(records, evaluation=evaluation, regime=regime)
        if missing:
            after = next_command(records, ledger, trainer, module, datamodule, mining)
            runs = "one more designed run is" if missing == 1 else f"{missing} more designed runs are"
            log(f"{ledger.path}: {runs} needed to fit a rule; the next: {after}")
            return None
        rule = fit_rule(records, evaluation=evaluation, regime=regime)
        rule.automatic = True
        rule.save(path)
    except InstructMiningError as error:
        log(f"{ledger.path}: no refit: {error}")
        return None
    except Exception as error:  # whatever goes wrong here, the training itself is done and recorded
        log(f"{ledger.path}: no refit, it failed with {type(error).__name__}: {error}")
        return None
    r2 = rule.held_out_r2
    held_out = "not estimable" if r2 is None else f"{r2:.2f}"
    worth = "no better than the mean, and refused" if rule.beats_mean is False else "not tested against the mean"
    log(
        f"{path}: refitted on {rule.n_runs_} runs by least squares for {evaluation} (held-out R² {held_out}; {worth}); "
        f"{command} compares rules and tests them"
    )
    rule.origin = str(path)
    return rule


def refit_due(trainer: Trainer, datamodule: Any, every: int) -> bool:
    """Whether the epoch after the sampler's is one that a refit is to precede, and none has been tried for it yet."""
    coming = datamodule.sampler.epoch + 1
    over = trainer.max_epochs not in (None, -1) and coming >= trainer.max_epochs
    return not over and coming % every == 0 and coming > datamodule.begin_refits().attempted


def refit_inside(trainer: Trainer, datamodule: Any, ledger: RunLedger, evaluation: str | None) -> RuleVersion | None:
    """Fits a rule on what the ledger holds now and lets the next epoch be drawn by it; never raises. A collective.

    Rank 0 reads, fits and weighs; all ranks take what it broadcasts, so that no rounding tells them apart.

    Returns:
        The version, or None where the rule stays as it is; the reason has been said in one line.
    """
    versions, epoch = datamodule.begin_refits(), datamodule.sampler.epoch + 1
    found: RuleVersion | None = None
    if trainer.is_global_zero:
        try:
            found = fit_version(ledger, evaluation, versions, datamodule.rule, datamodule.regime(), epoch)
        except InstructMiningError as error:
            log(f"{ledger.path}: epoch {epoch} is drawn by the same rule as before: {error}")
        except Exception as error:  # a refit is no reason to lose a fit
            reason = f"the refit failed with {type(error).__name__}: {error}"
            log(f"{ledger.path}: epoch {epoch} is drawn by the same rule as before: {reason}")
    version = trainer.strategy.broadcast(found)
    versions.attempted = epoch
    if version is not None:
        versions.take(version, datamodule.sampler)
        if trainer.is_global_zero:
            runs = version.rule["runs"]
            log(f"{ledger.path}: from epoch {epoch} on rows are drawn by a rule refitted on {runs} runs")
    return version


def next_command(
    records: list[RunRecord], ledger: RunLedger, trainer: Trainer, module: Any, datamodule: Any, mining: Sequence[str]
) -> str:
    """The command that makes the next designed run: this run's own arguments, those of the callback besides the ledger
    being `mining`, with the first unused subset seed."""
    designed = [r for r in records if r.purpose == "designed"]
    seed = next_seed(designed) or 0
    data = dict(datamodule.hparams)
    size = data.get("subset_size") or next((r.subset["size"] for r in designed if r.subset.get("size")), None)
    size = size or data.get("budget") or min(1000, max(1, len(datamodule.pool) // 4))
    bases = [(str(one.get("model")), one.get("revision")) for one in (module.hparams, data)]
    if type(module) is not InstructTuningModule or bases[0] != bases[1]:  # the command trains the base that data names
        return f"run this script again with InstructMiningDataModule(..., subset_size={size}, subset_seed={seed})"
    drawn = ("budget", "rule", "replacement", "resample_each_epoch", "one_per_prompt")
    for name in (*drawn, "purpose", "run_dir", "force"):
        data.pop(name, None)  # what a designed run has no use for
    data |= {"subset_size": size, "subset_seed": seed}
    tuning = {k: v for k, v in module.hparams.items() if k != "model"}
    words = ["im-lightning", "fit", *_flags("data", data, type(datamodule).__init__)]
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
    words += [f"--mining.ledger={ledger.path}", *mining]
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
