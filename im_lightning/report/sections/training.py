"""Section: how the training losses of single rows went with the indicators, while the models trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.data.score_table import PREDICTED
from im_lightning.report.charts import Dot, deciles, dots, pairs, profile
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Figures, Head, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.svg import Figure
from im_lightning.report.text import count, label, percent

Statistics = Mapping[str, Any]
TENTHS = 10
MOST_PURPOSES = 4


@report_section("training", "Loss during training", place=70)
def training_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the statistics that the ledger keeps beside its runs."""
    if inputs.records is None:
        section.absent = "add --ledger runs/ with runs made with InstructMiningCallback."
        return
    by_purpose: dict[str, list[Statistics]] = {}
    for r in inputs.records:
        found = inputs.statistics.get(r.run_id)
        if found is not None and found.get("indicators"):
            by_purpose.setdefault(r.purpose, []).append(found)
    if not by_purpose:
        section.absent = "the runs of this ledger kept no live statistics; InstructMiningCallback(ledger=…) keeps them."
        return
    section.lead = (
        "How the loss of single rows went with their indicators while the models trained. The rows of the pool are "
        "sorted by one number and cut into ten equal parts (deciles): lines that lie apart mean that this number tells "
        "easy rows from hard ones. An easy row is not yet a good one; which rows help is the rule's question."
    )
    for place, (purpose, runs) in enumerate(list(by_purpose.items())[:MOST_PURPOSES]):
        section.parts += _purpose_parts(f"training-{place}", purpose, runs)


def over_training(runs: Sequence[Statistics], of: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss by step and decile over the runs that kept them.

    Args:
        runs: Statistics.
        of: What the deciles are of.

    Returns:
        (steps [s], losses float64 [s, 10] in nats per token, NaN where no run saw a row of the decile).
    """
    sums: dict[tuple[int, int], list[float]] = {}
    for one in runs:
        own = one.get("deciles") if one.get("deciles_of") == of else (one.get("other_deciles") or {}).get(of)
        for entry in own or []:
            step, decile, loss = entry[:3]
            if loss is not None and 1 <= int(decile) <= TENTHS:
                sums.setdefault((int(step), int(decile)), []).append(float(loss))
    steps = np.array(sorted({step for step, _ in sums}), dtype=np.int64)
    at = {int(step): k for k, step in enumerate(steps)}
    out = np.full((len(steps), TENTHS), np.nan)
    for (step, decile), losses in sums.items():
        out[at[step], decile - 1] = float(np.mean(losses))
    return steps, out


def mean_by_decile(runs: Sequence[Statistics], scale: str) -> np.ndarray:
    """Mean loss of each decile, over all first exposures of all runs, float64 [10]; NaN where there are none."""
    total, rows = np.zeros(TENTHS), np.zeros(TENTHS)
    for one in runs:
        losses = np.array([math.nan if v is None else v for v in (one.get("by_decile") or {}).get(scale, [])], float)
        seen = np.array((one.get("decile_examples") or {}).get(scale, []), float)
        if len(losses) == len(seen) == TENTHS:
            known = np.isfinite(losses)
            total[known] += losses[known] * seen[known]
            rows[known] += seen[known]
    return np.divide(total, rows, out=np.full(TENTHS, np.nan), where=rows > 0)


def correlations(runs: Sequence[Statistics], name: str, repeat: bool) -> np.ndarray:
    """The runs' Pearson correlation of loss and indicator, where known."""
    parts = [(one.get("repeat") or {}) if repeat else one for one in runs]
    found = [(part.get("pearson") or {}).get(name) for part in parts]
    return np.array([v for v in found if v is not None], dtype=np.float64)


def strongest(runs: Sequence[Statistics]) -> list[str]:
    """What to sort the pool by: the rule's prediction where runs knew it, else what goes most with the loss."""
    if any(np.isfinite(mean_by_decile(runs, PREDICTED))):
        return [PREDICTED]
    names = list(dict.fromkeys(n for one in runs for n in one["indicators"]))
    known = {n: correlations(runs, n, False) for n in names}
    return sorted((n for n in names if len(known[n])), key=lambda n: -abs(float(known[n].mean())))[:3]


def _purpose_parts(key: str, purpose: str, runs: list[Statistics]) -> list[Any]:
    examples = sum(int(one.get("examples") or 0) for one in runs)
    seen = [one["pool_seen"] for one in runs if one.get("pool_seen") is not None]
    told = f"{_capital(purpose)} runs: {count(len(runs), 'run')}, {examples:,} rows seen for the first time"
    told += f", on average {percent(float(np.mean(seen)))} of the pool each." if seen else "."
    out: list[Any] = [Words(told)]
    figures: list[Figure] = []
    chosen = strongest(runs)
    title = f"{_capital(purpose)} runs: mean loss of the pool's tenths, sorted by {', '.join(map(_scale, chosen))}"
    lines = {_scale(of): mean_by_decile(runs, of) for of in chosen}
    lines = {of: losses for of, losses in lines.items() if np.isfinite(losses).any()}
    if lines:
        figures.append(profile(f"{key}-profile", title, lines, "tenth of the pool, lowest first", "nats per token"))
    for of in chosen[:1]:
        steps, losses = over_training(runs, of)
        if len(steps) > 2:
            title = f"{_capital(purpose)} runs: loss over training by tenths of {_scale(of)}, mean of the runs"
            figures.append(deciles(f"{key}-deciles", title, steps, losses, "nats per token"))
    names = list(dict.fromkeys(n for one in runs for n in one["indicators"]))
    table, points, repeated = [], [], []
    for name in names:
        first, later = correlations(runs, name, False), correlations(runs, name, True)
        if not len(first):
            continue
        low, high = np.quantile(first, [0.1, 0.9]) if len(first) > 2 else (first.min(), first.max())
        r, again = float(first.mean()), float(later.mean()) if len(later) else math.nan
        ends = mean_by_decile(runs, name)[[0, -1]]
        cells = [label(name, 40), f"{r:+.2f}", f"{low:+.2f}, {high:+.2f}", number(again, "+.2f")]
        table.append([*cells, *(number(float(end)) for end in ends)])
        points.append(Dot(name, r, float(low), float(high), "accent", f"{name}: {r:+.3f}, mean of {len(first)} runs"))
        if len(later):
            repeated.append((name, r, again))
    if points:
        title = f"{_capital(purpose)} runs: correlation of a row's loss with its indicators, first time seen"
        figures.append(dots(f"{key}-pearson", title, points, "Pearson correlation (bar: middle 80 % of runs)"))
    if repeated:
        title = f"{_capital(purpose)} runs: the same when rows come again; a weaker one means the rows were learnt"
        figures.append(pairs(f"{key}-repeat", title, repeated, ("first", "again"), "Pearson correlation", "+.2f"))
    if figures:
        out.append(Figures(figures))
    heads = [
        Head("indicator", right=False),
        Head(
            "Pearson, first",
            "Correlation of a row's loss with the indicator when the row is first seen, with the "
            "progress of training taken out; mean over the runs. From −1 to 1.",
        ),
        Head("over runs", "Middle 80 % of the runs."),
        Head("Pearson, again", "The same for rows that come a second time or later."),
        Head("loss, lowest tenth", "Mean loss of the rows with the lowest tenth of values, nats per token."),
        Head("loss, highest tenth"),
    ]
    if table:
        out.append(Table(f"{_capital(purpose)} runs: loss and indicators", heads, table, folded=True))
    return out


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scale(name: str) -> str:
    return "the rule's prediction" if name == PREDICTED else label(name, 40)
