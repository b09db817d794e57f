"""Section: the weights that the rule gives the pool's rows, and what a draw by them looks like."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np

from im_lightning._utils.force import RISKS
from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.report.charts import bars, counts, pairs
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Bullets, Figures, Head, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.sections.pool import largest_sources
from im_lightning.report.text import count, label, percent
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import inclusion_probabilities
from im_lightning.sampling.weights.quality_weights import RowWeights, move_text, quality_weights

MOST_REGRESSORS = 16
_HEADS = (
    Head("rows drawn", "The budget: rows drawn per epoch."),
    Head(
        "weighting",
        "tilt: the weights closest to uniform whose mean indicators reach the wanted point; softmax: by "
        "the prediction of each row.",
        right=False,
    ),
    Head(
        "strength",
        "How far the tilt goes from the pool's mean (0) to the edge of what the runs cover (1). It stops "
        "earlier where rows would have to be drawn more than once.",
    ),
    Head(
        "effective rows",
        "How many rows with equal weights would be as varied: the whole pool for uniform weights, "
        "fewer the more the weights insist on some rows. In brackets their share of "
        "the rows that may be drawn.",
    ),
    Head("largest weight", "Compared with a uniform weight."),
    Head("predicted, pool", "Log loss the rule predicts for the pool as it is."),
    Head("predicted, draw", "Log loss the rule predicts for the drawn rows."),
    Head("distance", "Of the draw's mean indicators from those of the runs; within the radius the rule interpolates."),
    Head("radius", "Of the region that the runs cover."),
)


@report_section("weights", "The weights", place=30)
def weights_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from rule and score table."""
    rule, table = inputs.rule, inputs.table
    if rule is None or table is None:
        lacking = (("--rule rule.json", rule), ("--scores scores.parquet", table))
        absent = " and ".join(flag for flag, value in lacking if value is None)
        section.absent = f"add {absent}; --budget N says how many rows would be drawn."
        return
    section.lead = (
        "From the rule to a draw: rows with a lower predicted loss weigh more, but only as far as the runs' evidence "
        "reaches. Look at the effective rows (too few: the draw repeats itself) and at the sources that gain or lose."
    )
    section.parts += [Words(note, "note") for note in inputs.rule_notes]
    if inputs.predicted is None:
        return
    if rule.beats_mean is False:
        text = (
            "The rule is no better than the mean: score, select and fit refuse it unless forced, and these "
            "weights mean nothing."
        )
        section.parts.append(Words(text, "bad"))
    found: list[tuple[int | None, RowWeights]] = []
    wanted: list[int | None] = [*inputs.budgets] or [None]
    for budget in wanted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are in the report of the weights
                found.append((budget, quality_weights(table, rule, budget=budget, force=tuple(RISKS))))
        except RequestError as error:
            section.parts.append(Words(str(error), "note"))
    if not found:
        return
    section.parts.append(Table("What the weights reach", _HEADS, [_row(budget, w) for budget, w in found]))
    if not inputs.budgets:
        section.parts.append(
            Words("No --budget was given, so nothing keeps a row from being drawn more than once.", "note")
        )
    notes = [text[0].upper() + text[1:] + "." for _, w in found if (text := move_text(w.report))]
    notes = list(dict.fromkeys([*notes, *(str(n) for _, w in found for n in w.report.get("notes") or [])]))
    if notes:
        section.parts.append(Bullets(notes))
    first, shown = found[0]
    if len(found) > 1:
        section.parts.append(Words(f"The figures and shares are those of {first:,} rows."))
    section.parts += _drawn(table, rule, shown, first)


def _row(budget: int | None, w: RowWeights) -> list[str]:
    r = w.report
    predicted, distance = r.get("predicted") or {}, r.get("mahalanobis") or {}
    effective = f"{r['ess']:,.0f} ({percent(r['ess'] / r['eligible'])})"
    return [
        "any" if budget is None else f"{budget:,}",
        w.method,
        number(r.get("strength"), ".3g"),
        effective,
        f"{r['max_weight'] * r['eligible']:.1f} ×",
        number(predicted.get("pool"), ".4f"),
        number(predicted.get("expected"), ".4f"),
        number(distance.get("expected"), ".2f"),
        number(r.get("radius"), ".2f"),
    ]


def _drawn(table: ScoreTable, rule: LinearRule, w: RowWeights, budget: int | None) -> list[Any]:
    chances = w.weights
    if budget is not None and budget <= np.count_nonzero(w.weights):
        chances = inclusion_probabilities(w.weights, budget)
    chances = chances / chances.sum()
    eligible = np.isfinite(rule.phi(table)).all(axis=1)
    relative = chances[eligible] * eligible.sum()
    title = "Chance of a row to be drawn, compared with a uniform draw (orange: uniform)"
    clipped = np.clip(relative, None, np.quantile(relative, 0.999))
    figures = [counts("weights-all", title, clipped, "times the uniform chance", "rows", 1.0)]
    direction = shifts(table, rule, chances, eligible)
    if direction:
        title = "Where the weights move the mean of each indicator, in standard deviations of the pool's rows"
        figures.insert(0, bars("weights-direction", title, direction, "sd of the pool's rows"))
    shares = source_shares(table, chances)
    parts: list[Any] = []
    if len(shares) > 1:
        title = "Share of each source, before (the pool) and after (the draw)"
        points = [(s, 100 * a, 100 * b) for s, a, b in shares]
        figures.insert(1, pairs("weights-sources", title, points, ("pool", "draw"), "% of rows"))
        heads = [Head("source", right=False), Head("share of the pool"), Head("share of the draw"), Head("draw / pool")]
        rows = [[label(s, 60), percent(a, 1), percent(b, 1), number(b / a if a else None, ".2f")] for s, a, b in shares]
        parts.append(Table("Sources before and after", heads, rows))
    out = int((~eligible).sum())
    if out:
        parts.append(Words(f"{count(out, 'row')} cannot be drawn: the rule needs an indicator that they lack.", "note"))
    return [Figures(figures), *parts]


def source_shares(table: ScoreTable, chances: np.ndarray) -> list[tuple[str, float, float]]:
    """(source, share of the pool, share of the draw) of the largest sources; the others together as "other sources"."""
    by_source = Counter(table.source)
    drawn = dict.fromkeys(by_source, 0.0)
    for source, chance in zip(table.source, chances.tolist(), strict=True):
        drawn[source] += chance
    shown = largest_sources(by_source)
    out = [(s, by_source[s] / len(table), drawn[s]) for s in shown]
    if len(shown) < len(by_source):
        rest = [s for s in by_source if s not in set(shown)]
        out.append(("other sources", sum(by_source[s] for s in rest) / len(table), sum(drawn[s] for s in rest)))
    return out


def shifts(table: ScoreTable, rule: LinearRule, chances: np.ndarray, eligible: np.ndarray) -> list[tuple[str, float]]:
    """(indicator on its scale, shift of its mean from the pool to the draw in sd of the pool), the largest first."""
    rows = []
    for name, transform in rule.indicator_transforms.items():
        values = transform.apply(table.values[name][eligible])
        spread = float(values.std())
        if spread > 0:
            shift = float(chances[eligible] @ values - values.mean()) / spread
            rows.append((transform.label(name), shift))
    return sorted(rows, key=lambda r: -abs(r[1]))[:MOST_REGRESSORS]
