"""What a fit tells its loggers: numbers to all of them; to wandb also tables, artifacts, the regime and the record.

docs/logging.md lists every key. wandb is imported only where the Trainer has a WandbLogger, and whatever it refuses
costs a line on standard error and never the run, whose record lies in the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from im_lightning._lightning import Trainer
from im_lightning._utils.files import plain
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError
from im_lightning.ledger.record import WANDB_CONFIG, WANDB_RECORD, RunRecord
from im_lightning.rule.linear_rule import LinearRule

TERM_COLUMNS: tuple[str, ...] = ("term", "estimate", "se", "t", "p", "low", "high", "vif")
DECILE_COLUMNS: tuple[str, ...] = ("scale", "decile", "exposure", "loss", "examples")


def log_scalars(trainer: Trainer, values: Mapping[str, float], prefix: str) -> None:
    """Numbers under `prefix/` to every logger of the Trainer, at its present optimiser step.

    Raises:
        InstructMiningError: a logger of this package ends the fit; what others raise costs a line.
    """
    if values and not trainer.sanity_checking:
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            with _at_no_risk("numbers", type(logger).__name__):
                logger.log_metrics(named, step=trainer.global_step)


def log_config(trainer: Trainer, about: Mapping[str, Any]) -> None:
    """Puts what a run is (its id, purpose and regime) into the wandb config, under `im`. Rank 0 calls it."""
    for run in _wandb_runs(trainer):
        with _at_no_risk("the regime"):
            run.config.update({WANDB_CONFIG: plain(dict(about))}, allow_val_change=True)


def log_record(trainer: Trainer, record: RunRecord) -> None:
    """Puts the record, as JSON, into the wandb summary: from there runs are imported into a ledger. Rank 0 calls it."""
    for run in _wandb_runs(trainer):
        with _at_no_risk("the run's record"):
            run.summary[WANDB_RECORD] = json.dumps(record.to_json())


def log_tables(
    trainer: Trainer, prefix: str, statistics: Mapping[str, Any], rules: Mapping[str, LinearRule | None], scores: Path
) -> None:
    """Tables and artifacts, to wandb alone. Rank 0 calls it, once, at the end of a fit.

    `statistics` are what the run keeps in its ledger, `rules` are "rule" (the one used) and "refitted_rule" with their
    files (`origin`) or None, `scores` is the frozen score table, which need not exist.
    """
    loggers = _wandb_loggers(trainer)
    if not loggers:
        return
    found = {name: rule for name, rule in rules.items() if rule is not None}
    tables = {f"{prefix}/{name}": (TERM_COLUMNS, term_rows(rule)) for name, rule in found.items()}
    if binned := decile_rows(statistics):
        tables[f"{prefix}/decile_loss"] = (DECILE_COLUMNS, binned)
    files = {name: Path(rule.origin) for name, rule in found.items() if rule.origin} | {"scores": scores}
    for logger in loggers:
        for key, (columns, rows) in tables.items():
            with _at_no_risk(f"the table {key}"):
                logger.log_table(key, columns=list(columns), data=rows, step=trainer.global_step)
        for name, path in files.items():
            if path.is_file():
                with _at_no_risk(f"the artifact {name}"):
                    _log_file(logger.experiment, f"{prefix}-{name}", name.removeprefix("refitted_"), path)


def term_rows(rule: LinearRule) -> list[list[Any]]:
    """One row per term of a rule, intercept first, in `TERM_COLUMNS`; None for what a published rule does not say."""
    terms: Sequence[Mapping[str, Any]] = rule.coefficients_ or [
        {"term": term, "estimate": float(value)}
        for term, value in zip(["intercept", *rule.feature_names_in_], [rule.intercept_, *rule.coef_], strict=True)
    ]
    return [[plain(term.get(column)) for column in TERM_COLUMNS] for term in terms]


def decile_rows(statistics: Mapping[str, Any]) -> list[list[Any]]:
    """Mean loss by decile of every scale, first exposures and repeats apart, in `DECILE_COLUMNS`."""
    rows = []
    for exposure, told in (("first", statistics), ("repeat", statistics.get("repeat", {}))):
        for scale, losses in told.get("by_decile", {}).items():
            counts = told["decile_examples"][scale]
            rows += [[scale, d + 1, exposure, losses[d], n] for d, n in enumerate(counts) if n]
    return rows


def _wandb_loggers(trainer: Trainer) -> list[Any]:
    """The WandbLoggers, of either Lightning, without importing wandb."""
    return [one for one in trainer.loggers if any(cls.__name__ == "WandbLogger" for cls in type(one).__mro__)]


def _wandb_runs(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in _wandb_loggers(trainer)]


def _log_file(run: Any, name: str, kind: str, path: Path) -> None:
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), type=kind)
    artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)  # not waited for: offline there is nobody to wait for


@contextmanager
def _at_no_risk(what: str, who: str = "wandb") -> Iterator[None]:
    try:
        yield
    except InstructMiningError:  # a sweep's early stop
        raise
    except Exception as error:  # the ledger keeps the run, and at the end of a fit has yet to get its record
        log(f"{who}: {what} could not be logged: {type(error).__name__}: {error}")
