"""Section: the rows of the pool as a table to search and sort: indicators, predicted loss, weight."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from im_lightning._utils.force import RISKS
from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.errors import RequestError
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Head, Section, Table
from im_lightning.report.sections import report_section
from im_lightning.report.sections.examples import MOST_FACTS
from im_lightning.report.text import label, reading
from im_lightning.sampling.selection.decisions import why
from im_lightning.sampling.weights.quality_weights import quality_weights

MOST_ROWS = 2000


@report_section("rows", "The rows", place=45)
def rows_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the score table, the rule where there is one, and the data where they are."""
    table = inputs.table
    if table is None:
        section.absent = "add --scores scores.parquet (im-lightning score DATA)."
        return
    section.lead = (
        "What each row was scored, what the rule predicts for it, and how much it weighs (in times the uniform "
        "weight); with --decisions whether it was taken, and why not. Type to search, click a heading to sort."
    )
    predicted = np.full(len(table), np.nan) if inputs.predicted is None else inputs.predicted
    shown, which = _shown(predicted)
    weights = _weights(inputs)
    names = table.indicators[:MOST_FACTS]
    texts = inputs.examples(shown.tolist()) if inputs.data else {}
    decided = [] if inputs.decisions is None else inputs.decisions.take(shown).to_pylist()
    heads = [Head("row"), Head("source", right=False)]
    heads += [Head("predicted", "Log loss by the rule; lower is better.")] if inputs.predicted is not None else []
    heads += [Head("weight", "Times the uniform weight.")] if weights is not None else []
    heads += [Head("taken", right=False), Head("chance", "That a draw by its weights takes it.")] if decided else []
    heads += [Head(label(name, 40)) for name in names]
    heads += [Head("begins", right=False)] if texts else []
    heads += [Head("why", right=False)] if decided else []
    rows = []
    for place, at in enumerate(shown.tolist()):
        cells = [str(int(table.row[at])), label(table.source[at], 40)]
        cells += [number(float(predicted[at]), ".4f")] if inputs.predicted is not None else []
        cells += [number(float(weights[at]), ".3f")] if weights is not None else []
        cells += _taken(decided[place]) if decided else []
        cells += [reading(float(table.values[name][at])) for name in names]
        cells += [label(texts[at].messages[0].content, 60)] if texts else []
        cells += [label(why(decided[place]), 80)] if decided else []
        rows.append(cells)
    left = len(table) - len(rows)
    out = f"{left:,} rows{which} are not listed; the score table has all." if left else ""
    section.parts.append(Table(f"{len(rows):,} of {len(table):,} rows", heads, rows, left_out=out, search=True))


def _shown(predicted: np.ndarray) -> tuple[np.ndarray, str]:
    """The rows that are listed, best first, and which the others are."""
    known, half = np.flatnonzero(np.isfinite(predicted)), MOST_ROWS // 2
    ranked = known[np.argsort(predicted[known], kind="stable")]
    if len(ranked) > MOST_ROWS:
        missing = ", or without a prediction," if len(ranked) < len(predicted) else ""
        return np.concatenate([ranked[:half], ranked[-half:]]), f" between the best and the worst{missing}"
    return np.concatenate([ranked, np.flatnonzero(~np.isfinite(predicted))])[:MOST_ROWS], ""


def _taken(decision: dict[str, Any]) -> list[str]:
    """Whether the row was taken, and by what chance."""
    chance = decision["probability"]
    taken = {True: "yes", False: "no", None: "resampled each epoch"}[decision["taken"]]
    return [taken, number(float("nan") if chance is None else chance, ".3f")]


def _weights(inputs: ReportInputs) -> np.ndarray | None:
    """Weights for the first budget in times the uniform one; None where the rule gives none."""
    if inputs.rule is None or inputs.table is None or inputs.predicted is None:
        return None
    budget = inputs.budgets[0] if inputs.budgets else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the section on the weights says them
            made = quality_weights(inputs.table, inputs.rule, budget=budget, force=tuple(RISKS))
    except RequestError:
        return None
    return np.asarray(made.weights * made.eligible.sum())
