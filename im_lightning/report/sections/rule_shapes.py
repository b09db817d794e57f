"""The shape of an additive rule: one curve per indicator."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning.report.charts import curve
from im_lightning.report.parts import Figures, Head, Table, Words
from im_lightning.report.svg import Figure
from im_lightning.report.text import label
from im_lightning.rule.linear_rule import LinearRule


def shape_parts(rule: LinearRule, beside: list[Figure]) -> list[Any]:
    """Figures (and those that stand beside them), and the table; zero is the mean of the runs."""
    coef = dict(zip(rule.feature_names_in_, rule.coef_, strict=True))
    mean = dict(zip(rule.feature_names_in_, rule.coef_ * 0 if rule.mean_ is None else rule.mean_, strict=True))
    figures: list[tuple[float, Figure]] = []
    rows: list[tuple[float, list[str]]] = []
    for place, (indicator, knots) in enumerate(rule.knots.items()):
        names = [n for n, c in zip(rule.feature_names_in_, rule.columns, strict=True) if c == indicator]
        values = np.array([0.0, *(coef[n] for n in names)]) - sum(coef[n] * mean[n] for n in names)
        transform = rule.indicator_transforms[indicator]
        size = float(np.ptp(values))
        shown = transform.label(indicator)
        title = f"{shown}: effect of a single row on the log loss"
        key, scale = f"rule-shape-{place}", transform.kind
        drawing = curve(key, title, knots, values.tolist(), scale, label(indicator), "log loss")
        figures.append((size, drawing))
        lowest, at_knots = f"{knots[int(np.argmin(values))]:.3g}", " ".join(f"{v:+.2g}" for v in values)
        rows.append((size, [label(shown, 40), f"{size:.3g}", lowest, at_knots]))
    words = (
        "The rule is a curve per indicator: below zero is better than the mean of the runs, so a curve that is lowest "
        "in the middle says that both extremes are bad. The strongest indicators come first."
    )
    heads = [
        Head("indicator", right=False),
        Head("range", "Highest minus lowest point of the curve, in log loss: how much the indicator matters."),
        Head("lowest at", "Where the rule sees the least loss, on the scale that the first column names."),
        Head("effect at the knots, low to high", right=False),
    ]
    order = [row for _, row in sorted(rows, key=lambda r: -r[0])]
    drawn = [figure for _, figure in sorted(figures, key=lambda f: -f[0])]
    return [Words(words), Figures([*drawn, *beside]), Table("Shapes", heads, order)]
