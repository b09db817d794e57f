"""The shape of an additive rule, one curve per indicator; and what a rule says of its runs.

Predicted against measured loss of the runs behind it, with the runs named, and each run's influence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.ledger.record import RunRecord
from im_lightning.report.charts import Dot, Point, against, curve, dots
from im_lightning.report.parts import Figures, Head, Table, Words
from im_lightning.report.svg import Figure
from im_lightning.report.text import label
from im_lightning.rule.fit import COOK
from im_lightning.rule.linear_rule import LinearRule

MOST_ROWS = 300


class Predicted(NamedTuple):
    """A run's log loss and what the rule says of it; None where that is not known."""

    run_id: str
    y: float
    prediction: float
    low: float | None
    high: float | None
    cook: float | None


def prediction_parts(rule: LinearRule, records: Sequence[RunRecord] | None) -> list[Any]:
    """Figure, table and influence; a line where nothing can be shown."""
    if not rule.n_runs_:
        return []
    runs, unseen = held_out(rule), True
    if not runs and records is not None:
        runs, unseen = in_sample(rule, records), False
    if not runs:
        return [
            Words("Predicted against measured loss: refit the rule, or add --ledger with the runs behind it.", "note")
        ]
    words = (
        "Each dot is a run: to the right its predicted log loss, upwards the measured one, the dashed line where they "
        "are equal, the bars 95 % prediction intervals. "
    )
    words += (
        "Each run is predicted by a rule that has not seen it nor any run on the same subset; "
        if unseen
        else "The rule has seen these runs, which flatters it (refit it for predictions of unseen runs); "
    )
    inside = [r for r in runs if r.low is not None and r.high is not None]
    if inside:
        share = sum(r.low <= r.y <= r.high for r in inside)  # type: ignore[operator]
        words += f"{share} of {len(inside)} runs lie inside their interval (about 95 % should)."
    else:
        words += "their intervals are not known."
    points = [
        Point(r.prediction, r.low, r.high, r.y, _tip(r), "warm" if (r.cook or 0) > COOK else "accent") for r in runs
    ]
    title = f"Predicted and measured log loss, runs {'unseen' if unseen else 'seen'} by the rule"
    figures = [against("rule-predictions", title, points, "predicted log loss", "measured log loss")]
    cooks = sorted((r for r in runs if r.cook is not None), key=lambda r: -(r.cook or 0.0))[:12]
    if cooks:
        rows = [Dot(r.run_id[-20:], r.cook or 0.0, None, None, "warm" if (r.cook or 0) > COOK else "accent", _tip(r))
                for r in cooks]  # fmt: skip
        figures.append(dots("rule-cook", "The most influential runs (Cook's distance)", rows, "Cook's distance"))
        words += (
            " Cook's distance says how far all predictions move when one run is left out; above 1 that run alone "
            "decides much of the rule, and deserves a look."
        )
    return [Words(words), Figures(figures), _table(runs, unseen)]


def held_out(rule: LinearRule) -> list[Predicted]:
    """What the fit kept of its held-out predictions."""
    cook = rule.metrics_.cook
    out = []
    for row in rule.metrics_.held_out:
        if row.get("prediction") is not None and row.get("y") is not None:
            run = str(row["run_id"])
            out.append(Predicted(run, row["y"], row["prediction"], row.get("low"), row.get("high"), cook.get(run)))
    return out


def in_sample(rule: LinearRule, records: Sequence[RunRecord]) -> list[Predicted]:
    """Predictions for the designed runs of a ledger by a rule that kept none: with the t interval of least squares."""
    from scipy.stats import t as student

    m = rule.metrics_
    sd, df = m.residual_sd, m.df_residual
    out = []
    for r in records:
        if r.purpose != "designed" or r.status != "complete":
            continue
        x, loss = [r.phi_means.get(n, math.nan) for n in rule.feature_names_in_], r.loss(rule.evaluation)
        if not (np.isfinite(x).all() and loss > 0):
            continue
        prediction, se = rule.predict_mean(x)
        half = None
        if se is not None and sd and df and df > 0:
            half = float(student.ppf(0.975, df)) * math.sqrt(sd**2 + se**2)
        low, high = (None, None) if half is None else (prediction - half, prediction + half)
        out.append(Predicted(r.run_id, math.log(loss), prediction, low, high, m.cook.get(r.run_id)))
    return out


def _tip(r: Predicted) -> str:
    more = "" if r.cook is None else f", Cook's distance {r.cook:.2f}"
    return f"{r.run_id}: measured {r.y:.4f}, predicted {r.prediction:.4f}{more}"


def _table(runs: list[Predicted], unseen: bool) -> Table:
    heads = [
        Head("run", right=False), Head("measured", "Log of the evaluation loss in nats per token."),
        Head("predicted", "By a rule fitted without the run." if unseen else "By the rule, which has seen the run."),
        Head("95 % from", "Lower end of the prediction interval."), Head("to", "Upper end."),
        Head("off by", "Measured minus predicted."),
        Head("Cook's distance", "Influence of the run on all predictions."),
    ]  # fmt: skip
    order = sorted(runs, key=lambda r: -abs(r.y - r.prediction))
    rows = [
        [label(r.run_id, 60), f"{r.y:.4f}", f"{r.prediction:.4f}", number(r.low, ".4f"), number(r.high, ".4f"),
         f"{r.y - r.prediction:+.4f}", number(r.cook, ".2f")]
        for r in order[:MOST_ROWS]
    ]  # fmt: skip
    left = f"{len(order) - MOST_ROWS:,} more runs." if len(order) > MOST_ROWS else ""
    return Table("Predicted and measured, by run; the worst predicted first", heads, rows, left_out=left, folded=True)


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
