"""`im-lightning score`: scores examples with indicators, and with a rule if one is named; writes a Parquet table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.data.external_scores import read_external
from im_lightning.data.file_io import rows_with
from im_lightning.data.score_table import PREDICTED, ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import get_indicators
from im_lightning.indicators.built_in import KNN
from im_lightning.scoring.settings import Engine, Numerics, ScorerModels, Setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from im_lightning.data.example import Example
    from im_lightning.rule.linear_rule import LinearRule

SUMMARY = "score examples with indicators; write a Parquet table"
EXAMPLE = "im-lightning score alpaca.json --model meta-llama/Llama-3.2-1B --out scores.parquet"
POSITIONAL = ("data",)

_REPLACING = Replacing()


def run(
    data: list[str],
    out: str,
    encoding: Encoding,
    models: ScorerModels,
    numerics: Numerics,
    engine: Engine,
    reading: Reading,
    indicators: str | None = None,
    rule: str | None = None,
    external: str | None = None,
    external_columns: str | None = None,
    external_scorer: str | None = None,
    eval_data: list[str] | None = None,
    dry_run: bool = False,
    force: bool | str = False,
    replacing: Replacing = _REPLACING,
) -> int:
    """Scores examples and writes one row per example, in input order.

    Values are kept in a store: scoring again computes only what is new. Progress and the coverage report go to
    standard error, bad rows that are set aside to OUT.rejected.jsonl.

    Args:
        data: Files (.json, .jsonl, .csv, .tsv, each also .gz or .zst; .parquet), folders, or Hugging Face ids
            (org/name:split).
        out: Score table to write (.parquet).
        encoding: Base model and how it reads.
        models: The other models.
        numerics: Batches, number format, device.
        engine: Where it runs.
        reading: How rows are read.
        indicators: Names separated by commas, FILE.py:NAME for one of your own; by default what the rule needs, else
            all whose model was named.
        rule: Rule file or published rule (instructmining-v1, instructmining-v3); adds predicted_log_loss.
        external: Scores of another tool (.jsonl, .json, .parquet), by the table's id or by row (from 0); each of its
            columns of numbers becomes an indicator.
        external_columns: Those to take, separated by commas.
        external_scorer: What made them, such as armorm-8b-v0.1, so that files of other pools by it count as the same
            indicator; by default the file's digest.
        eval_data: Evaluation and report sets, one or several: none of their rows may be among --targets.
        dry_run: Only say how many rows and tokens there are, and how much time and memory they would take; for
            loss_drop the finetune on the targets is made for that, and kept.
        force: Apply a rule that its own runs find no better than the mean; with other-base after it, one for whose fit
            an indicator was computed in another way; weak-rule,other-base for both; worse-target: a rule that makes a
            named target worse.
        replacing: What may be replaced.
    """
    if encoding.turns != "last":
        cause = "is for finetuning; where a template changes earlier answers, scores are of the last"
        raise RequestError(message(f"--turns {encoding.turns}", cause, "leave it out"))
    unused = {"--external-columns": external_columns, "--external-scorer": external_scorer}
    if external is None and (flag := next((flag for flag, value in unused.items() if value is not None), None)):
        cause = "it is about a file of scores, and none is named"
        raise RequestError(message(f"{flag} {unused[flag]}", cause, "name the file with --external, or leave it out"))
    _check_out(out, dry_run, replacing)
    chosen, models = _load_rule(rule, models)
    setup = Setup(encoding, models, numerics, engine, reading=reading)
    given = None if external is None else read_external(external, comma_list(external_columns), external_scorer)
    names = _indicators(indicators, chosen, setup, () if given is None else given.names)

    from im_lightning.data.loading import Rejected, load_examples, note_rejected, write_rows
    from im_lightning.models.cost import note_cost
    from im_lightning.scoring.api import estimate_plan, execute_plan, load_reference
    from im_lightning.scoring.passes.targets import check_targets
    from im_lightning.scoring.plan import ScoringPlan

    found = get_indicators(names)
    if given is not None:
        given.refuse_names(indicator.name for indicator in found)
    rejected: list[Rejected] = []
    refuses = None if encoding.model is None else setup.tokenizer_and_template()[1].refusal
    examples = load_examples(data, rejected=rejected, refuses=refuses, **asdict(reading))
    if given is not None and given.by == "row":
        _refuse_moved_rows(external, len(rejected), reading)
    if rejected:
        aside = f"{out}.rejected.jsonl"
        if not dry_run:
            replacing.check(aside, "file of rejected rows", rows_with(Rejected.fields))
            write_rows(aside, rejected)
        note_rejected(data, rejected, "" if dry_run else aside)
    elif not dry_run:
        replacing.remove(f"{out}.rejected.jsonl", rows_with(Rejected.fields))
    _refuse_far_neighbours(comma_list(indicators) or [], examples, models.knn_reference)
    if models.targets is not None:
        sets = {path: load_examples(path, **asdict(reading)) for path in eval_data or ()}
        check_targets(setup, {" ".join(data): examples, **sets})
    elif eval_data:
        cause, remedy = "is compared with the target rows, and none are named", "name them with --targets"
        raise RequestError(message(f"--eval-data {' '.join(eval_data)}", cause, remedy))
    more = None if given is None else given.join(_bare_table(examples))
    plan = ScoringPlan(examples, found, setup, load_reference(models.knn_reference, reading))
    if chosen is not None:  # before the work: whether the rule fits depends on the keys alone
        chosen.check(_with_columns(plan.preview(), more), force)
    if dry_run:
        answer(*estimate_plan(plan))
        return 0
    table, coverage = execute_plan(plan)
    for line in coverage.lines():
        log(line)
    table = _with_columns(table, more)
    table.note_refused(rejected)
    if chosen is not None:
        table = _predict(table, chosen)
        if forced := chosen.forced(table):
            table.meta["forced"] = forced
    table.write(out)
    note_cost(out, coverage.steps, table.pool_digest)
    record = {"out": out, "rows": len(table), "rejected": len(rejected), "missing": _missing(table)}
    record["passes"] = [asdict(step) for step in coverage.steps]
    answer(record, _summary(table, out, len(rejected)))
    return 0


def _check_out(out: str, dry_run: bool, replacing: Replacing) -> None:
    """Refuses an output that could not be written, before hours of work."""
    from im_lightning.models.cost import cost_path, is_note
    from im_lightning.scoring.store import check_writable

    path = Path(out)
    if path.suffix.lower() != ".parquet":
        raise RequestError(message(f"--out {out}", "a score table is a Parquet file", "end its name in .parquet"))
    if path.is_dir():
        raise RequestError(message(f"--out {out}", "is a folder", "name a file in it, such as scores.parquet"))
    if not dry_run:
        replacing.check(path, "score table", ScoreTable.wrote)
        replacing.check(cost_path(path), "note of what scoring cost", is_note)
        check_writable(path.parent)


def _load_rule(rule: str | None, models: ScorerModels) -> tuple[LinearRule | None, ScorerModels]:
    """The rule, and the models: under a published rule by default the paper's."""
    from im_lightning.rule.published import judge_models, load_rule

    named: dict[str, Any] = {**judge_models(rule, models.reward_model, models.unieval_model)}
    return None if rule is None else load_rule(rule), replace(models, **named)


def _indicators(asked: str | None, rule: LinearRule | None, setup: Setup, external: Sequence[str]) -> list[str]:
    """Those asked for and those the rule needs (not the external ones); without either, those whose model was named."""
    from im_lightning.scoring.api import default_indicators

    names = comma_list(asked) or []
    if rule is not None:
        names = [*names, *(name for name in rule.indicators if name not in (*names, *external))]
    return names or default_indicators(setup)


def _refuse_far_neighbours(asked: Sequence[str], examples: Sequence[Example], reference: str | None) -> None:
    """No row has a 1,000th neighbour among 400: that is found out before a model is loaded."""
    if reference is not None:
        return
    others = len(examples) - 1  # a copy is a neighbour, too
    for name in asked:
        knn = KNN.match(name)
        if knn is not None and int(knn[1]) > others:
            cause = f"there are {others:,} other examples, so no row would have a value"
            remedy = f"ask for knn_{min(6, others)}" if others else "leave it out, or name data in --knn-reference"
            raise RequestError(message(f"--indicators {name}", cause, remedy))


def _refuse_moved_rows(external: str | None, rejected: int, reading: Reading) -> None:
    """Numbers of rows say which row is meant only where every row of the data is one of the table."""
    if rejected or reading.answer == "all":
        why = f"{rejected:,} of which set aside" if rejected else "of which --answer all makes several"
        cause = f"it numbers the rows of the data, {why}: the later numbers would mean other rows"
        remedy = "give each record the id that a score table has (im-lightning score DATA --out scores.parquet)"
        raise RequestError(message(f"--external {external}", cause, remedy))


def _bare_table(examples: Sequence[Example]) -> ScoreTable:
    """The rows without scores: whether an external file is of these data is found out before the work."""
    return ScoreTable(range(len(examples)), [e.id for e in examples], [e.source for e in examples], {})


def _with_columns(table: ScoreTable, more: ScoreTable | None) -> ScoreTable:
    """The table with the columns of another one of the same rows; of a preview, their keys alone."""
    if more is None:
        return table
    for name in more.indicators:
        if len(table):
            table = table.with_values(name, more.values[name], more.reasons[name], more.keys[name])
        else:
            table = table.with_values(name, [], key=more.keys[name])
    return table


def _predict(table: ScoreTable, rule: LinearRule) -> ScoreTable:
    """Adds the rule's prediction; a row without one takes over the reason of the first indicator it lacks."""
    values = rule.predict(table)
    reasons: list[str | None] = [None] * len(table)
    for position in np.flatnonzero(np.isnan(values)):
        reasons[position] = rule.why_none(table.source[position])
        for name in rule.indicators:
            if table.reasons[name][position] is not None:
                reasons[position] = f"{name}: {table.reasons[name][position]}"
                break
    return table.with_values(PREDICTED, values, reasons)


def _missing(table: ScoreTable) -> dict[str, dict[str, int]]:
    """Column → reason → rows without a value for it."""
    return {
        name: Counter(table.reasons[name][at] or "no reason was recorded" for at in np.flatnonzero(np.isnan(values)))
        for name, values in table.values.items()
    }


def _summary(table: ScoreTable, out: str, rejected: int) -> str:
    holes = np.isnan(table.matrix(list(table.values))).any(axis=1).sum()
    parts = [f"wrote {out}: {_rows(len(table))}, {', '.join(table.values)}"]
    if holes:
        parts.append(f"{_rows(holes)} without some value")
    if rejected:
        parts.append(f"{_rows(rejected)} rejected")
    return "; ".join(parts)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
