"""A rule as a pandas table and as a plot."""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning._utils.display import panels
from im_lightning.rule.rule_file import STATISTICS, RuleFields
from im_lightning.rule.summary import effects


def coefficient_frame(rule: RuleFields) -> Any:
    """One row per regressor; see `LinearRule.to_pandas`."""
    import pandas as pd

    known = {str(row["term"]): row for row in rule.coefficients_}
    table = pd.DataFrame({"regressor": rule.feature_names_in_, "indicator": rule.columns, "coef": rule.coef_})
    sd = np.full(len(table), np.nan) if rule.cov_ is None else np.sqrt(np.diag(rule.cov_))
    table["effect_of_one_sd"] = rule.coef_ * sd
    for key in STATISTICS:
        table[key] = [known.get(name, {}).get(key) for name in rule.feature_names_in_]
        table[key] = table[key].astype(float)
    return table


def plot_rule(rule: RuleFields, axes: Any = None) -> list[Any]:
    """Draws coefficients or, of an additive rule, shapes; see `LinearRule.plot`."""
    if shapes := effects(rule):
        drawn = panels(len(shapes), axes, share_y=True)
        for ax, (name, values) in zip(drawn, shapes.items(), strict=True):
            ax.plot(rule.knots[name], values, marker="o")
            ax.set(xlabel=rule.indicator_transforms[name].label(name), ylabel="effect, log loss")
        return drawn
    (ax,) = panels(1, axes)
    table = coefficient_frame(rule)
    sd = np.ones(len(table)) if rule.cov_ is None else np.sqrt(np.diag(rule.cov_))
    error = np.abs([(table[end] - table["coef"]) * sd for end in ("low", "high")])
    places = np.arange(len(table))[::-1]
    ax.errorbar(table["coef"] * sd, places, xerr=error, fmt="o")
    ax.axvline(0.0, color="0.6", linewidth=0.8)
    unit = "coefficient" if rule.cov_ is None else "effect of one sd of the runs, log loss"
    ax.set(yticks=places, yticklabels=table["regressor"], xlabel=unit)
    return [ax]
