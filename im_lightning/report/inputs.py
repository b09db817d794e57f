"""What a report is made from: reads each input once, and of the data only the rows that are shown."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.files import parse_json
from im_lightning._utils.force import RISKS
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.external_scores import scored_rows
from im_lightning.data.loading import Rejected
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Reading
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule
from im_lightning.sampling.selection.decisions import decisions_file, read_decisions

_READING = Reading()
MOST_STATISTICS = 400
"""Runs whose live statistics are read: the last ones of each purpose."""


@dataclass
class ReportInputs:
    """Everything that was given, read.

    Args:
        records: The ledger's runs by time; None where no ledger was given.
        rejected: (file, cause) of what in the ledger could not be read.
        statistics: Run id → its live statistics, where it kept any.
        rule: The rule, or None.
        table: The score table, or None.
        predicted: float64 [N], predicted log loss of the table's rows; None without rule and prediction.
        rule_notes: What must be known where the rule meets the table.
        data: The scored data, [] where not given.
        reading: How to read them.
        comparison: The parsed JSON of a comparison, or None.
        budgets: Rows to draw, for the weights.
        decisions: On the table's rows, as `read_decisions` has them; None where not given.
        named: (argument, value) as given.
    """

    records: list[RunRecord] | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    rule: LinearRule | None = None
    table: ScoreTable | None = None
    predicted: np.ndarray | None = None
    rule_notes: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    reading: Reading = _READING
    comparison: dict[str, Any] | None = None
    budgets: list[int] = field(default_factory=list)
    named: list[tuple[str, str]] = field(default_factory=list)
    decisions: Any = None

    def examples(self, rows: Sequence[int]) -> dict[int, Example]:
        """The examples at these positions of the table, in one pass over the data.

        Raises:
            RequestError: the data are not those that were scored; names the first row that differs.
            DataError: a bad row.
        """
        assert self.table is not None
        wanted, aside = set(map(int, rows)), list[Rejected]()
        read = scored_rows(self.table, self.data, self.reading, aside, "--scores and --data")
        found = {at: loaded.example for at, loaded in read if at in wanted}
        if aside:
            log(f"{len(aside):,} bad rows left out, the first {aside[0].file}:{aside[0].line}: {aside[0].cause}")
        return found


def read_inputs(
    ledger: str | None = None,
    rule: str | None = None,
    scores: str | None = None,
    data: Sequence[str] = (),
    compare: str | None = None,
    budgets: Sequence[int] = (),
    reading: Reading = _READING,
    decisions: str | None = None,
) -> ReportInputs:
    """Reads what was named.

    Raises:
        RequestError: nothing was named, there is no such file or ledger, a budget is not positive, data without their
            scores.
        DataError: a file is torn or of something else.
    """
    given = {"--ledger": ledger, "--rule": rule, "--scores": scores, "--data": ", ".join(data), "--compare": compare}
    given |= {"--decisions": decisions}
    named = [(flag, value) for flag, value in given.items() if value]
    if not named:
        cause = "there is nothing to report on"
        raise RequestError(message("report", cause, f"give at least one of {', '.join(given)}"))
    for budget in budgets:
        if budget < 1:
            raise RequestError(message(f"--budget {budget}", "it is not a number of rows", "give 1 or more"))
    if (data or decisions) and scores is None:
        cause = "examples and decisions are shown by their scores, and there is no score table"
        raise RequestError(
            message("--data" if data else "--decisions", cause, "add --scores scores.parquet (im-lightning score DATA)")
        )
    out = ReportInputs(data=list(data), reading=reading, budgets=list(budgets), named=named)
    if budgets:
        out.named.append(("--budget", " ".join(map(str, budgets))))
    if ledger is not None:
        _read_ledger(out, ledger)
    if rule is not None:
        out.rule = load_rule(rule)
    if scores is not None:
        out.table = ScoreTable.read(scores)
        if data:
            out.examples(())  # whether they belong together is found out before anything is drawn
        if decisions is not None:
            out.decisions = read_decisions(decisions_file(decisions), out.table)
        _predict(out)
    if compare is not None:
        out.comparison = read_comparison(compare)
    return out


def read_comparison(path: str) -> dict[str, Any]:
    """The JSON of `im-lightning compare` or of the demo, its arms as a list.

    Raises:
        RequestError: there is no such file.
        DataError: it is torn, or no comparison.
    """
    remedy = "name the compare.json that im-lightning compare wrote"
    try:
        value = parse_json(Path(path).read_bytes())
    except OSError as error:
        cause = f"it cannot be read ({error.strerror or error})"
        raise RequestError(message(f"--compare {path}", cause, remedy)) from error
    except ValueError as error:
        raise DataError(message(f"--compare {path}", f"it is not whole JSON ({error})", remedy)) from error
    arms = value.get("arms") if isinstance(value, dict) else None
    if isinstance(arms, dict):  # as earlier versions wrote it
        arms = list(arms.values())
    good = isinstance(arms, list) and arms and all(isinstance(arm, dict) and "arm" in arm for arm in arms)
    if not good or not all(isinstance(arm.get("losses"), list) and arm["losses"] for arm in arms or []):
        raise DataError(message(f"--compare {path}", "it holds no arms of a comparison", remedy))
    return {**value, "arms": arms}


def _read_ledger(out: ReportInputs, path: str) -> None:
    book = RunLedger(path)
    if not book.path.exists():
        raise RequestError(message(f"--ledger {path}", "there is no such ledger", "check the path"))
    out.records = book.records(status=None)
    out.rejected = list(book.rejected)
    if not out.records:
        raise RequestError(message(f"--ledger {path}", "there are no runs in this folder", "make runs into it"))
    seen: dict[str, int] = {}
    for record in reversed(out.records):
        seen[record.purpose] = seen.get(record.purpose, 0) + 1
        if seen[record.purpose] > MOST_STATISTICS or not (book.path / f"{record.run_id}.statistics.json").exists():
            continue
        try:
            out.statistics[record.run_id] = book.statistics(record.run_id)
        except InstructMiningError as error:
            out.rejected.append((f"{record.run_id}.statistics.json", str(error)))


def _predict(out: ReportInputs) -> None:
    """Predictions of the table's rows: by the rule where there is one, else those that the table brought along."""
    assert out.table is not None
    if out.rule is None:
        out.predicted = out.table.predicted_log_loss
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are sentences of the page
        try:
            out.rule_notes = out.rule.check(out.table, tuple(RISKS))
            out.predicted = out.rule.predict(out.table)
        except RequestError as error:
            out.rule_notes = [f"The rule cannot be applied to this table: {error}"]
