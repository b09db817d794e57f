"""Section: the rows that the rule likes best and least, as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Examples, Section, Shown, Words
from im_lightning.report.sections import report_section
from im_lightning.report.text import label, reading, shortened

MOST_ROWS = 5  # of either kind
MOST_CHARACTERS = 700
MOST_TURNS = 6
MOST_FACTS = 12


@report_section("examples", "The best and the worst rows", place=40)
def examples_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from score table, predictions and data."""
    if inputs.table is None or not inputs.data:
        wanted = [] if inputs.table is not None else ["--scores scores.parquet"]
        wanted += [] if inputs.rule is not None or inputs.predicted is not None else ["--rule rule.json"]
        wanted += [] if inputs.data else ["--data DATA (the scored files)"]
        section.absent = f"add {' and '.join(wanted)}."
        return
    if inputs.predicted is None:
        section.absent = "add a --rule that can be applied to these scores."
        return
    section.lead = (
        "The rows with the lowest and the highest predicted loss, as they are. A rule is right about means of many "
        "rows; its extremes are often odd rows, and seeing them is the quickest check of what the rule has learnt."
    )
    best, worst = best_and_worst(inputs.predicted, inputs.table.id, MOST_ROWS)
    texts = inputs.examples([*best, *worst])
    for title, rows in (("Predicted best", best), ("Predicted worst", worst)):
        items = [_shown(inputs.table, inputs.predicted, at, texts[at]) for at in rows]
        section.parts.append(Examples(title, items) if items else Words("No row has a prediction.", "note"))


def best_and_worst(predicted: np.ndarray, ids: Sequence[str], most: int) -> tuple[list[int], list[int]]:
    """Positions of the rows predicted best and worst, best and worst first; of equal rows (one id) only the first."""
    finite = np.flatnonzero(np.isfinite(predicted))
    order = finite[np.argsort(predicted[finite], kind="stable")]
    return _different(order, ids, most), _different(order[::-1], ids, most)


def _different(order: np.ndarray, ids: Sequence[str], most: int) -> list[int]:
    seen: set[str] = set()
    out: list[int] = []
    for at in order.tolist():
        if len(out) == most:
            break
        if ids[at] not in seen:
            seen.add(ids[at])
            out.append(at)
    return out


def _shown(table: ScoreTable, predicted: np.ndarray, at: int, example: Example) -> Shown:
    source = label(table.source[at], 60) or "(no source)"
    heading = f"row {int(table.row[at]):,} of {source}: predicted log loss {predicted[at]:.4f}"
    facts = ", ".join(f"{label(n, 40)} {reading(float(table.values[n][at]))}" for n in table.indicators[:MOST_FACTS])
    turns = []
    messages = example.messages
    for place, turn in enumerate(messages):
        if MOST_TURNS <= place + 1 < len(messages):  # the response is always shown
            continue
        who = {"user": "prompt", "assistant": "response"}.get(turn.role, turn.role)
        if place < len(messages) - 1 and turn.role == "assistant":
            who = "earlier response"
        text, length = shortened(turn.content, MOST_CHARACTERS)
        turns.append((who, text, length, len(text) < length))
    left = len(messages) - len(turns)
    if left:
        facts += f"; {left} turns in between are not shown"
    return Shown(heading, facts, turns)
