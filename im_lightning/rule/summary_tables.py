"""Tables of a rule's summary: the candidates, the rivals, the shapes of an additive rule, the held-out sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.rule.rule_fields import RuleFields

_CANDIDATES = (
    Column("rule", right=False),
    Column("terms", rank=4),
    Column("R² in sample", rank=5),
    Column("leave-one-out", rank=6),
    Column("R² held out"),
    Column("error held out", rank=2),
    Column("± se", rank=3),
    Column("Spearman", rank=1),
    Column("AIC", rank=8),
    Column("BIC", rank=7),
    Column("", right=False),
)
_RIVALS = (
    Column("rival", right=False),
    Column("R² held out", rank=1),
    Column("error held out", rank=3),
    Column("gain of the rule"),
    Column("95 % interval", rank=2),
)
_RIVAL_NAMES = {"mean": "the mean", "length": "length only", "sources": "source shares only"}


def candidate_table(metrics: dict[str, Any], width: int) -> str:
    """Every rule considered; held out = folds of whole subsets, error = root mean squared, in log loss."""
    rows = []
    for one in metrics["candidates"]:
        rows.append(
            [
                one["method"],
                str(one["regressors"]),
                _text(one["r2"], ".3f"),
                _text(one["leave_one_out_r2"], ".3f"),
                _text(one["grouped_r2"], ".3f"),
                _text(one["grouped_rmse"], ".3g"),
                _text(one["grouped_rmse_se"], ".1g"),
                _text(one["grouped_spearman"], ".2f"),
                _text(one["aic"], ".1f"),
                _text(one["bic"], ".1f"),
                "← recommended" if one["recommended"] else "",
            ]
        )
    folds = metrics.get("folds")
    what = f"candidates, held out in {folds} folds of whole subsets" if folds else "candidates"
    if any(one["method"] == "best-subset" for one in metrics["candidates"]):
        what += " (best-subset is the paper's procedure, for comparison)"
    return wrapped(what, width) + "\n" + text_table(_CANDIDATES, rows, width)


def rival_table(metrics: dict[str, Any], width: int) -> str:
    """What the rule has to beat; gain = held-out R² of the rule − that of the rival, its interval over subsets."""
    rows, reasons = [], []
    for name, one in metrics["rivals"].items():
        label = _RIVAL_NAMES.get(name, name)
        if one.get("reason"):
            reasons.append(f"{label}: not fitted, {one['reason']}")
            continue
        low, high = one["gain_low"], one["gain_high"]
        interval = "" if low is None else f"{low:.3f}, {high:.3f}"
        rows.append(
            [
                label,
                _text(one["grouped_r2"], ".3f"),
                _text(one["grouped_rmse"], ".3g"),
                _text(one["gain"], "+.3f"),
                interval,
            ]
        )
    lines = [wrapped(f"rivals of the rule ({metrics.get('method', 'rule')}); gain is in held-out R²", width)]
    lines.append(text_table(_RIVALS, rows, width))
    return "\n".join([*lines, *(wrapped(reason, width) for reason in reasons)])


def source_lines(metrics: dict[str, Any]) -> list[str]:
    """Leave-one-source-out of the rule: trained without a source, tested where it is at least half."""
    found = metrics.get("source_out") or {}
    if not found:
        return []
    parts = []
    for source, one in found.items():
        if one is None:
            parts.append(f"{source} not estimable")
        else:
            runs = f"{one['runs']} run{'s' * (one['runs'] > 1)}"
            parts.append(f"{source} R² {one['r2']:.2f}, Spearman {_text(one['spearman'], '.2f')} ({runs})")
    return [f"without a source, tested on runs where it is at least half: {'; '.join(parts)}"]


def shape_table(rule: RuleFields, width: int) -> str:
    """One row per indicator of an additive rule: its effect on log loss at its knots, relative to the runs' mean."""
    columns = [Column("indicator", right=False), Column("range"), Column("lowest at", rank=1)]
    columns.append(Column("effect at the knots, low to high", right=False, rank=2))
    rows = []
    coef = dict(zip(rule.feature_names_in_, rule.coef_, strict=True))
    mean = dict(zip(rule.feature_names_in_, rule.mean_ if rule.mean_ is not None else rule.coef_ * 0, strict=True))
    for indicator, knots in rule.knots.items():
        names = [n for n, c in zip(rule.feature_names_in_, rule.columns, strict=True) if c == indicator]
        values = np.array([0.0, *(coef[n] for n in names)])
        values = values - sum(coef[n] * mean[n] for n in names)
        label = rule.indicator_transforms[indicator].label(indicator)
        shape = " ".join(f"{v:+.2g}" for v in values)
        rows.append([label, f"{np.ptp(values):.3g}", f"{knots[int(np.argmin(values))]:.3g}", shape])
    rows.sort(key=lambda row: -float(row[1]))
    note = "range and effect are of single examples, in log loss, on the scale of each indicator's φ"
    return text_table(columns, rows, width) + "\n" + wrapped(note, width)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
