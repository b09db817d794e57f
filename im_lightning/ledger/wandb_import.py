"""Imports runs from wandb into a ledger: what finetunes on many machines logged becomes what a refit reads.

The callback puts each run's whole record into the wandb summary (`WANDB_RECORD`). A record keeps the id that it has
in the ledger of its own machine, so that a run that is already there is not counted twice; where a record has none, the
wandb run id stands in. Importing again changes nothing. Per-example losses stay on the machine that measured them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from im_lightning._utils.files import parse_json
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import WANDB_CONFIG, WANDB_RECORD, RunRecord

EVAL_LOSS = "im/eval_loss/"
_NESTED = ("last", "value", "min", "mean", "max")  # what `define_metric(..., summary=…)` makes of a summary value


@dataclass
class ImportCounts:
    """What an import did."""

    added: list[str] = field(default_factory=list)  # ids of runs that the ledger did not have, or had without a result
    known: list[str] = field(default_factory=list)  # ids of runs that it had already
    # ids of runs of which the ledger has another complete record; its own stays
    kept: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (wandb run, why) of runs that cannot be imported

    def lines(self, path: str, most: int = 10) -> list[str]:
        """What to tell a person, one sentence each; `path` is the wandb project."""
        out = [f"{path}: {len(self.added)} runs imported, {len(self.known)} known already"]
        if self.kept:
            shown = ", ".join(self.kept[:most]) + (", …" if len(self.kept) > most else "")
            out.append(f"the ledger has other records of {shown}, and keeps them")
        out += [f"not imported: {run}: {why}" for run, why in self.skipped[:most]]
        if len(self.skipped) > most:
            out.append(f"and {len(self.skipped) - most} more were not imported")
        return out


def import_wandb_runs(path: str, ledger: RunLedger, api: Any = None) -> ImportCounts:
    """Adds the runs of a wandb project to a ledger.

    Args:
        path: `ENTITY/PROJECT`.
        ledger: Where they go.
        api: A `wandb.Api`, or what has its `runs(path, order=…, per_page=…)`; by default one is made, which needs a
            login and a network.

    Raises:
        RequestError: no such project, no login or no network; the ledger cannot be made.
    """
    if len([part for part in path.split("/") if part]) != 2 or path.count("/") != 1:
        raise RequestError(message(f"--from-wandb {path}", "it is not a project", "write it as ENTITY/PROJECT"))
    counts = ImportCounts()
    found = _runs(path, api)
    ledger.make()
    present = {record.run_id: record for record in ledger.records(status=None)}
    for run in found:
        title = f"{getattr(run, 'name', None) or run.id} ({run.id})"
        try:
            record = record_from_wandb(run)
        except InstructMiningError as error:
            counts.skipped.append((title, str(error)))
            continue
        old = present.get(record.run_id)
        if old is not None and old.to_json() == record.to_json():
            counts.known.append(record.run_id)
        elif old is not None and old.status == "complete":
            counts.kept.append(record.run_id)
        else:
            ledger.add(record, replace=True)
            present[record.run_id] = record
            counts.added.append(record.run_id)
    return counts


def record_from_wandb(run: Any) -> RunRecord:
    """The record that the callback logged.

    Evaluation losses that the summary has under `im/eval_loss/<set>` and the record has not are added.

    Args:
        run: As `wandb.Api().runs` yields them: `id`, `state`, `config`, `summary`.

    Raises:
        DataError: the run has no record, or one that cannot be read; says what it lacks.
    """
    summary = run.summary
    text = summary.get(WANDB_RECORD)
    if text is None:
        raise DataError(message(f"wandb run {run.id}", _lacks(run), "finetune with the callback, to the run's end"))
    place = f"{WANDB_RECORD} of wandb run {run.id}"
    try:
        value = parse_json(text) if isinstance(text, str | bytes) else _plain(text)
    except ValueError as error:
        raise DataError(message(place, f"it is not whole JSON ({error})", "copy the run's ledger file")) from error
    if isinstance(value, dict):
        value.setdefault("run_id", str(run.id))
        value.setdefault("created", str(getattr(run, "created_at", "")))
    record = RunRecord.from_json(value, place)
    for key in summary.keys():  # noqa: SIM118 - wandb's summaries are iterated by keys only
        name = str(key).removeprefix(EVAL_LOSS)
        loss = summary_value(summary, str(key)) if str(key).startswith(EVAL_LOSS) else math.nan
        if math.isfinite(loss) and loss > 0 and name not in record.evaluation:
            record.evaluation[name] = {"loss": loss, "log_loss": math.log(loss)}
    return record


def summary_value(summary: Any, name: str) -> float:
    """A number of a summary, also where `define_metric` nests it (`{"min": 1.2}`); NaN where there is none."""
    value = _plain(summary.get(name))
    if isinstance(value, Mapping):
        value = next((value[key] for key in _NESTED if key in value), None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _lacks(run: Any) -> str:
    """Why there is no record."""
    ours = (_plain(run.config) or {}).get(WANDB_CONFIG)
    if not isinstance(ours, Mapping):
        missing = f"no {WANDB_RECORD} in its summary, no {WANDB_CONFIG} in its config"
        return f"it was not made with InstructMiningCallback ({missing})"
    state = getattr(run, "state", "")
    if state == "running":
        return "it is still running"
    losses = [str(key) for key in run.summary.keys() if str(key).startswith(EVAL_LOSS)]  # noqa: SIM118
    known = f"it has {', '.join(losses)}, but" if losses else "it has no evaluation loss, and"
    return (
        f"{WANDB_RECORD} is missing from its summary ({state or 'state unknown'}): {known} no means of its indicators"
    )


def _runs(path: str, api: Any) -> list[Any]:
    """The runs, oldest first. Whatever wandb raises on the way is the absence of a login, a network or a project."""
    try:
        if api is None:
            import wandb

            api = wandb.Api()
        whole = {"lazy": False} if "lazy" in signature(api.runs).parameters else {}  # else one request more per run
        found: Iterable[Any] = api.runs(path, order="+created_at", per_page=100, **whole)
        return list(found)
    except Exception as error:  # wandb's own, requests', ValueError for an absent project: by version
        said = " ".join(str(error).split()) or type(error).__name__
        remedy = "check the name, the login (wandb login, or WANDB_API_KEY) and the network, or refit the ledger alone"
        cause = f"its runs cannot be read from wandb ({said[:300]})"
        raise RequestError(message(f"--from-wandb {path}", cause, remedy)) from error


def _plain(value: Any) -> Any:
    """Nested summaries of wandb, which only look like dicts, as dicts."""
    return {str(key): _plain(value[key]) for key in value.keys()} if hasattr(value, "keys") else value  # noqa: SIM118
